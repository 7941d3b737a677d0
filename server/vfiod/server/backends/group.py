"""Devices of the kernel's groups and containers: who is in what, and in which order things open and close.

The rules (``behaviour.md`` section 1, ``drivers/vfio/group.c``, ``drivers/vfio/container.c``):

* A group is the unit of ownership. It is passed, or opened here, once, and serves all its devices.
* A group enters a container that the machine has, if one takes it; else a new one. Guest memory is replayed
  between ``VFIO_SET_IOMMU`` and ``VFIO_GROUP_GET_DEVICE_FD``.
* A device closes before its group leaves the container; the last device out takes the group out, the last
  group out closes the container. Whatever fails on the way in is undone in the same order.
* A device whose fd was given to another process may live on there. Then the kernel keeps its group in the
  container (``VFIO_GROUP_UNSET_CONTAINER`` says EBUSY), and the group *lingers*: :attr:`KernelGroups.lingering`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Check, ContainerInfo, GroupInfo
from vfiod.protocol.errors import Busy, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server import trace
from vfiod.server.backends.base import AddressSpace, Backend
from vfiod.server.backends.checks import DryRun, GroupHoldings
from vfiod.server.backends.container import Container
from vfiod.server.backends.device import KernelDevice
from vfiod.server.backends.ioctls import call, failed
from vfiod.server.backends.origin import (
    NO_VM,
    ContainerSource,
    GroupOrigin,
    check_class,
    check_status,
    find_device,
    group_of,
    group_status,
    open_container,
    open_group,
    refuse_noiommu,
    why_not_viable,
)
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import BackendState, ContainerState, GroupState

__all__ = ["ContainerSource", "GroupOrigin", "HeldFd", "KernelGroups"]


class HeldFd(Struct, frozen=True):
    """One fd that is held here, for ``query-fds``."""

    owner: str  # group:N, container:N, host:ADDRESS
    kind: FdKind
    number: int


class Group:
    """One group.

    Attributes:
        devices: those open here; replaced, never changed. Empty: the group lingers, or is on its way in or out.
        given_out: whether the fd of some device of it, open or closed, was given to another process.

    """

    __slots__ = ("container", "devices", "fd", "given_out", "id", "noiommu")

    def __init__(self, number: int, fd: FileDescriptor, *, noiommu: bool) -> None:
        self.id = number
        self.fd = fd
        self.noiommu = noiommu
        self.container: Container | None = None
        self.devices: tuple[KernelDevice, ...] = ()
        self.given_out = False


class KernelGroups:
    """All containers, groups and kernel devices of a machine.

    ``open``, ``check``, ``sweep``, ``close`` and the ``close`` of a backend block, and are called in the topology
    lane, never two at once. The queries may be called at any time from the loop.

    Args:
        calls: the system calls.
        attach_space: replays all guest memory into a new address space; raises and leaves nothing, or succeeds.
        detach_space: forgets an address space. It need not unmap: what is left is unmapped here, after it.
        allow_open: open ``/dev/vfio/N`` here when no group fd is passed (``--allow-open``).
        mapped_bytes: how much guest memory is mapped at this moment (for the memory-lock check).
        open_by_cdev: names of the devices of a group, by number, that are open here by their cdevs.

    """

    def __init__(
        self,
        calls: Syscalls,
        attach_space: Callable[[AddressSpace], None],
        detach_space: Callable[[AddressSpace], None],
        *,
        allow_open: bool = False,
        mapped_bytes: Callable[[], int] = lambda: 0,
        open_by_cdev: Callable[[int], tuple[str, ...]] = lambda _: (),
    ) -> None:
        self._calls = calls
        self._open_by_cdev = open_by_cdev
        self._sysfs = Sysfs(calls)
        self._attach_space = attach_space
        self._detach_space = detach_space
        self._allow_open = allow_open
        self._mapped_bytes = mapped_bytes
        self._groups: dict[int, Group] = {}
        self._lingering: dict[int, Group] = {}
        self._attached: dict[str, KernelDevice] = {}  # by host name
        self._containers: dict[int, Container] = {}
        self._next_container = 0

    # --- adding ---
    def open(self, origin: GroupOrigin) -> Backend:
        """Open a device. Takes over the origin's fds, whatever comes of it; unwinds everything on failure.

        Raises:
            InvalidArgument: the host device, the group fd or the container does not fit.
            PermissionRefused: it would have to be opened here, which was not allowed; a noiommu group not asked for.
            Busy: attached already, a group that is not viable or used by somebody else.
            OperationFailed: the kernel said no.

        """
        with ExitStack() as passed, ExitStack() as undo:
            for fd in origin.fds():
                passed.callback(fd.close)  # one that finds its owner below is given away, and this does nothing
            device = self._find_device(origin)
            self._sweep(besides=device.group)
            group = self._enter_group(origin, device)
            undo.callback(self._leave, group)
            container = self._enter_container(origin, group)
            backend = self._open_device(origin, group, container, device)
            undo.pop_all()
        return backend

    def _find_device(self, origin: GroupOrigin) -> HostDevice:
        device = find_device(self._sysfs, origin)
        if device.name in self._attached:
            raise Busy(f"Host device {device.name} is already attached to this machine")
        return device

    def _enter_group(self, origin: GroupOrigin, device: HostDevice) -> Group:
        """The group: known, passed or opened here. A new one is viable, and registered; :meth:`_leave` undoes it."""
        passed = origin.group_fd
        number, noiommu = group_of(self._calls, self._sysfs, passed, device)
        if noiommu and not origin.noiommu:
            raise refuse_noiommu(number, device)
        by_cdev = self._open_by_cdev(number)
        if by_cdev:
            raise Busy(
                f"Group {number} of {device.name} is used here through cdevs ({', '.join(by_cdev)}), and a group is "
                "never used through both interfaces: remove them, or add this device by its cdev (fd and iommufd)"
            )
        known = self._groups.get(number)
        if known is not None:
            self._check_known(known, passed, device)
            return known
        if passed is not None:
            fd = FileDescriptor(passed.give_away())
        else:
            fd = open_group(self._calls, number, device, noiommu=noiommu, allowed=self._allow_open)
        with ExitStack() as undo:
            undo.callback(fd.close)
            check_status(self._sysfs, group_status(self._calls, fd, number), number)
            undo.pop_all()
        group = self._groups[number] = Group(number, fd, noiommu=noiommu)
        if trace.group_found.on:
            trace.group_found(group=number, device=device.name, fd=fd.number, noiommu=noiommu)
        return group

    def _check_known(self, group: Group, passed: FileDescriptor | None, device: HostDevice) -> None:
        # A lingering group is gone for the manager, who may well pass it again: the fd here serves as well.
        if passed is not None and group.devices:
            raise InvalidArgument(
                f"Parameter 'group-fd': group {group.id} is held here already, by the fd that came first, and serves "
                f"{device.name} too: leave group-fd out"
            )

    def _enter_container(self, origin: GroupOrigin, group: Group) -> Container:
        """Put the group into a container with an IOMMU and the guest's memory. :meth:`_leave` undoes it."""
        container = group.container
        if container is not None:
            self._check_same_container(origin, group, container)
        elif origin.container is not None:
            container = self._enter_passed(origin.container, group)
        else:
            container = self._enter_existing(group)
            if container is None:
                fresh = Container(self._calls, self._next_container, open_container(self._calls), passed=False)
                container = self._enter_new(fresh, group)
        if container.space is not None:
            container.space.refresh()
            if not container.attached:
                self._attach_space(container.space)
                container.attached = True
        return container

    def _check_same_container(self, origin: GroupOrigin, group: Group, container: Container) -> None:
        source = origin.container
        if source is None or (source.object_id is not None and source.object_id == container.object_id):
            return
        if not self._calls.same_file(source.fd.number, container.fd.number):
            raise InvalidArgument(
                f"Group {group.id} is in {container.name} already, and '{source.name}' is another container: a group "
                "is in one at a time; leave the container out"
            )

    def _enter_passed(self, source: ContainerSource, group: Group) -> Container:
        for container in self._containers.values():
            if self._calls.same_file(source.fd.number, container.fd.number):
                self._set_container(group, container)
                return container
        fd = FileDescriptor(source.fd.give_away())
        fresh = Container(self._calls, self._next_container, fd, passed=True, object_id=source.object_id)
        return self._enter_new(fresh, group)

    def _enter_existing(self, group: Group) -> Container | None:
        """Try each container the machine has: one address space for all is best, where the IOMMU can do it."""
        for container in self._containers.values():
            if container.noiommu != group.noiommu:
                continue
            try:
                self._set_container(group, container)
            except OperationFailed:
                continue  # another IOMMU, other reserved ranges; a container of its own says what is really wrong
            return container
        return None

    def _enter_new(self, container: Container, group: Group) -> Container:
        """Take a fresh container. On failure it is closed, and :meth:`_leave` takes the group out of it."""
        with ExitStack() as undo:
            undo.callback(container.close)
            container.check()
            self._set_container(group, container)
            container.set_iommu(noiommu=group.noiommu)
            undo.pop_all()
        self._next_container += 1
        self._containers[container.id] = container
        return container

    def _set_container(self, group: Group, container: Container) -> None:
        request = vfio.GroupIoctl.VFIO_GROUP_SET_CONTAINER
        argument = bytearray(struct.pack("=i", container.fd.number))
        try:
            self._calls.ioctl(group.fd.number, request, argument)
        except OSError as error:
            advice = {
                errno.EBUSY: why_not_viable(self._sysfs, group.id),
                errno.EINVAL: "the group is in another container, or this container's IOMMU cannot take it",
                errno.EPERM: "groups with and without an IOMMU do not mix, and one without needs CAP_SYS_RAWIO",
                errno.EBADFD: "the container is not an fd of /dev/vfio/vfio",
            }
            raise failed(request.name, f"group {group.id} (into {container.name})", error, advice) from error
        container.groups = (*container.groups, group.id)
        group.container = container

    def _open_device(self, origin: GroupOrigin, group: Group, container: Container, device: HostDevice) -> KernelDevice:
        request = vfio.GroupIoctl.VFIO_GROUP_GET_DEVICE_FD
        advice = {
            errno.ENODEV: f"it is not bound to a vfio driver (its driver: {device.driver or 'none'}): bind it first",
            errno.EBUSY: "the device is in use",
            errno.EACCES: (
                "it needs the VF token its physical function's user set: pass vf-token"
                if origin.vf_token is None
                else "the VF token is not the one in use"
            ),
            errno.EINVAL: (
                "the device was opened as something else"
                if origin.vf_token is None
                else "it takes no VF token: it is neither a physical function of SR-IOV nor a virtual one whose "
                "physical function is bound to vfio-pci; leave vf-token out"
            ),
            errno.EPERM: "a noiommu device needs CAP_SYS_RAWIO",
            errno.EMFILE: "this process has no file descriptor left: raise RLIMIT_NOFILE",
        }
        if origin.driver == "vfio-ap":
            advice[errno.EINVAL] = NO_VM
        # "0000:04:10.0 vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3" (drivers/vfio/pci/vfio_pci_core.c)
        token = f" vf_token={origin.vf_token}" if origin.vf_token is not None else ""
        argument = bytearray(f"{device.name}{token}".encode() + b"\0")
        what = f"group {group.id} (device {device.name})"
        fd = FileDescriptor(call(self._calls, group.fd.number, request, argument, what, advice))
        with ExitStack() as undo:
            undo.callback(fd.close)
            backend = self._made(group, container, fd, device.name)
            check_class(origin.driver, device.name, backend.info())
            undo.pop_all()
        self._has(group, container, backend)
        return backend

    def _made(self, group: Group, container: Container, fd: FileDescriptor, name: str) -> KernelDevice:
        return KernelDevice(
            self._calls,
            fd,
            name,
            kind="kernel-group",
            address_space=container.space,
            group=GroupInfo(id=group.id, container=container.id, noiommu=group.noiommu),
            left=partial(self._device_left, group),
        )

    def _has(self, group: Group, container: Container, backend: KernelDevice) -> None:
        """A device of the group is open here."""
        group.devices = (*group.devices, backend)
        container.devices += 1
        self._lingering.pop(group.id, None)
        self._attached[backend.name] = backend

    # --- leaving ---
    def _device_left(self, group: Group, device: KernelDevice) -> bool:
        """A device's fd was closed. Returns whether the kernel let the device go."""
        del self._attached[device.name]
        if group.container is not None:
            group.container.devices -= 1
        others_given_out = group.given_out
        group.given_out = group.given_out or device.given_out
        group.devices = tuple(other for other in group.devices if other is not device)
        if group.devices:
            # The group stays, so the kernel cannot be asked: only who was given the fd knows.
            return not device.given_out
        if self._leave(group):
            return True
        # Some fd is still open. It is this device's, unless only another device's fd was ever given out.
        return others_given_out and not device.given_out

    def _leave(self, group: Group) -> bool:
        """Let a group go if no device of ours needs it. Returns False when the kernel keeps it: it lingers."""
        if group.devices:
            return True
        container = group.container
        if container is not None:
            if not container.devices:
                self._empty(container)
            if not self._unset_container(group, container):
                self._lingering[group.id] = group
                return False
        group.fd.close()
        del self._groups[group.id]
        self._lingering.pop(group.id, None)
        if container is not None and not container.groups:
            self._containers.pop(container.id, None)
            container.close()
        return True

    def _empty(self, container: Container) -> None:
        """Take the guest's memory out of a container whose last device is gone: nobody left behind may reach it."""
        if container.space is None or not container.attached:
            return
        container.attached = False
        self._detach_space(container.space)
        container.space.clear()

    def _unset_container(self, group: Group, container: Container) -> bool:
        """``VFIO_GROUP_UNSET_CONTAINER``. Returns False on EBUSY: an fd of some device of it is still open."""
        try:
            self._calls.ioctl(group.fd.number, vfio.GroupIoctl.VFIO_GROUP_UNSET_CONTAINER)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            # EINVAL: it is in no container: who shares the fd took it out. ENODEV: the host took it away.
        group.container = None
        container.groups = tuple(number for number in container.groups if number != group.id)
        if not container.groups:
            container.forget_iommu()
        return True

    def sweep(self) -> tuple[int, ...]:
        """Try again to let go of lingering groups; returns the ids of those that are gone now."""
        return self._sweep()

    def _sweep(self, *, besides: int | None = None) -> tuple[int, ...]:
        lingering = tuple(self._lingering.items())
        return tuple(number for number, group in lingering if number != besides and self._leave(group))

    def close(self) -> None:
        """Let go of everything that is left, when the machine ends: devices first, then groups, then containers.

        A group that lingers even now is closed: the kernel takes it out of its container when the last fd given out
        is closed.
        """
        for device in tuple(self._attached.values()):
            device.close()
        for group in tuple(self._groups.values()):
            self._leave(group)
            group.fd.close()
        self._groups.clear()
        self._lingering.clear()
        for container in tuple(self._containers.values()):
            container.close()
        self._containers.clear()

    # --- over a change of the process ---
    def keep(self, given: Given) -> tuple[list[ContainerState], int, list[GroupState]]:
        """Describe containers and groups, and say which number the next container gets."""
        from vfiod.server.state.machine import GroupState

        groups = [
            GroupState(
                id=group.id,
                fd=given.give(group.fd, f"group:{group.id}"),
                noiommu=group.noiommu,
                given_out=group.given_out,
                container=None if group.container is None else group.container.id,
            )
            for group in self._groups.values()
        ]
        return [one.keep(given) for one in self._containers.values()], self._next_container, groups

    def closes_with(self, device: KernelDevice) -> list[FileDescriptor]:
        """The fds of group and container that are closed when this device leaves."""
        group = None if device.group is None else self._groups.get(device.group.id)
        if group is None or any(other is not device for other in group.devices):
            return []
        container = group.container
        alone = container is not None and container.object_id is None and container.groups == (group.id,)
        return [group.fd] + ([container.fd] if container is not None and alone else [])

    def keep_device(self, device: KernelDevice, given: Given) -> BackendState:
        """Describe a device of a group."""
        from vfiod.server.state.machine import BackendState

        return BackendState(
            kind=device.kind,
            name=device.name,
            given_out=device.given_out,
            fd=given.give(device.fd, f"host:{device.name}"),
            group=None if device.group is None else device.group.id,
        )

    def adopt(
        self,
        containers: list[ContainerState],
        following: int,
        groups: list[GroupState],
        taken: Taken,
        adopt_space: Callable[[AddressSpace], None],
    ) -> None:
        """Make containers and groups again around their fds. The kernel is told nothing. OperationFailed."""
        for container_state in containers:
            container = Container.adopt(self._calls, container_state, taken)
            self._containers[container.id] = container
            if container.space is not None and container.attached:
                adopt_space(container.space)
        self._next_container = following
        for state in groups:
            group = self._groups[state.id] = Group(state.id, taken.take(state.fd), noiommu=state.noiommu)
            group.given_out = state.given_out
            self._lingering[state.id] = group  # until a device of it comes
            if state.container is not None:
                group.container = self._containers[state.container]
                group.container.groups = (*group.container.groups, state.id)

    def adopt_device(self, state: BackendState, taken: Taken) -> Backend:
        """Make a device of a group again around its fd. OperationFailed."""
        group = self._groups[state.group or 0]
        container = group.container
        if container is None or state.fd is None:
            raise InvalidArgument(f"Device {state.name} of group {group.id} came without its fd or its container")
        backend = self._made(group, container, taken.take(state.fd), state.name)
        if state.given_out:
            backend.give_out()
        self._has(group, container, backend)
        return backend

    # --- looking ---
    def check(self, origin: GroupOrigin) -> tuple[Check, ...]:
        """What ``device_add`` with ``x-dry-run`` says. Takes over (and closes) the origin's fds; changes nothing."""
        with ExitStack() as passed:
            for fd in origin.fds():
                passed.callback(fd.close)
            holdings = GroupHoldings(
                attached=frozenset(self._attached),
                groups=frozenset(group.id for group in self._groups.values() if group.devices),
                lingering=frozenset(self.lingering),
                containers=tuple(self._containers.values()),
                allow_open=self._allow_open,
                mapped_bytes=self._mapped_bytes(),
            )
            return DryRun(self._calls, holdings).checks(origin)

    @property
    def lingering(self) -> tuple[int, ...]:
        """Groups without a device of ours that the kernel keeps, because an fd that was given out is still open.

        Their fd stays here and they stay in their container, which no longer has any mapping unless other groups use
        it. A later :meth:`open` takes such a group up again. Call :meth:`sweep` now and then while there are any.
        """
        return tuple(self._lingering)

    def containers(self) -> tuple[ContainerInfo, ...]:
        """Every container, lowest id first; lingering groups are listed in theirs."""
        return tuple(container.describe() for container in tuple(self._containers.values()))

    def fds(self) -> tuple[HeldFd, ...]:
        """Every fd held here."""
        held = [
            *((f"container:{c.id}", FdKind.VFIO_CONTAINER, c.fd) for c in tuple(self._containers.values())),
            *((f"group:{g.id}", FdKind.VFIO_GROUP, g.fd) for g in tuple(self._groups.values())),
            *((f"host:{d.name}", FdKind.VFIO_DEVICE, d.fd) for d in tuple(self._attached.values())),
        ]
        found = []
        for owner, kind, fd in held:
            with suppress(ValueError):  # closed at this moment, in the topology lane
                found.append(HeldFd(owner, kind, fd.number))
        return tuple(found)

    def group_fd(self, number: int) -> int | None:
        """The fd of a group that is held here, lent; None: it is not. For a hot reset."""
        group = self._groups.get(number)
        return None if group is None or group.fd.closed else group.fd.number

    def in_use(self, number: int) -> bool:
        """Whether a group is held here."""
        return number in self._groups

    def users_of(self, object_id: str) -> tuple[str, ...]:
        """``group:N`` for each group in the container that this ``vfio-container`` object passed."""
        return tuple(
            f"group:{number}"
            for container in tuple(self._containers.values())
            if container.object_id == object_id
            for number in container.groups
        )
