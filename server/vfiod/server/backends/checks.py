"""The dry run of ``device_add``: every check that can be made without changing anything, each with its finding.

A later real ``device_add`` makes the same checks again, in the same words (:mod:`vfiod.server.backends.origin`);
what only the kernel can say by doing it (``VFIO_SET_IOMMU``, pinning memory) is foretold here from what the host
tells of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Final, Generic, TypeVar

from msgspec import Struct

from vfiod.protocol.catalogue.devices import Check
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.cdev_origin import CdevOrigin, find_cdev, is_bound, open_cdev
from vfiod.server.backends.container import Container
from vfiod.server.backends.origin import (
    ContainerSource,
    GroupOrigin,
    check_status,
    find_device,
    group_of,
    group_status,
    open_container,
    open_group,
    refuse_noiommu,
)
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs

__all__ = ["ADVISORY", "CdevDryRun", "CdevHoldings", "DryRun", "GroupHoldings", "possible"]

ADVISORY: Final = frozenset({"reset"})
"""Checks that may fail and the device is added all the same."""

FDS_PER_DEVICE: Final = 16
"""fds one device takes: its own, its group's and container's, one per mapped BAR, REQ, ERR and a few vectors."""


def possible(checks: Sequence[Check]) -> bool:
    """Whether ``device_add`` would succeed by these checks."""
    return all(check.ok or check.name in ADVISORY for check in checks)


class Holdings(Struct, frozen=True):
    """What the machine has at the moment of a dry run, by either interface.

    Attributes:
        attached: names of the host devices it has by this interface.
        allow_open: whether files of VFIO may be opened here.
        mapped_bytes: guest memory mapped.

    """

    attached: frozenset[str]
    allow_open: bool
    mapped_bytes: int


class GroupHoldings(Holdings, frozen=True):
    """What it has by groups.

    Attributes:
        groups: numbers of the groups in use.
        lingering: numbers of the groups that are held without a device.
        containers: those there are.

    """

    groups: frozenset[int]
    lingering: frozenset[int]
    containers: tuple[Container, ...]


class CdevHoldings(Holdings, frozen=True):
    """What it has by cdevs.

    Attributes:
        resumable: names of the devices that are still bound to an iommufd and can be taken up again.
        group_in_use: whether a group is held through its group file.
        ioases: names of the IOASes in the iommufd.

    """

    resumable: frozenset[str]
    group_in_use: Callable[[int], bool]
    ioases: tuple[str, ...]


H = TypeVar("H", bound=Holdings)


class HostChecks(Generic[H]):
    """What is checked of every device of the kernel.

    Args:
        calls: the system calls.
        holdings: what the machine has.

    """

    def __init__(self, calls: Syscalls, holdings: H) -> None:
        self._calls = calls
        self._sysfs = Sysfs(calls)
        self._has = holdings

    def _found(self, find: Callable[[], HostDevice]) -> Generator[Check, None, HostDevice | None]:
        """What is checked of every one first. Returns it; None: there is none, and nothing more to be said."""
        try:
            device = find()
        except CommandError as error:
            yield Check(name="host-device", ok=False, detail=str(error))
            return None
        yield self._host_device(device)
        yield self._open_files()
        yield self._reset(device)
        return device

    def _members(self, number: int) -> str:
        return ", ".join(map(str, self._sysfs.members(number))) or "members not known"

    def _host_device(self, device: HostDevice) -> Check:
        if device.name in self._has.attached:
            return Check(
                name="host-device",
                ok=False,
                detail=f"Host device {device.name} is already attached to this machine",
            )
        if not device.path:
            return Check(name="host-device", ok=True, detail=f"{device.name}; sysfs cannot be read to know more")
        bound = device.driver is not None and "vfio" in device.driver
        detail = f"{device.name} is a {device.bus} device, bound to {device.driver or 'no driver'}"
        return Check(name="host-device", ok=bound, detail=detail + ("" if bound else ": bind it to vfio-pci"))

    def _interrupt_remapping(self) -> Check:
        remapping = self._sysfs.interrupt_remapping()
        return Check(name="interrupt-remapping", ok=remapping.ok, detail=remapping.detail)

    def _memory_lock(self, *, shared: bool) -> Check:
        limit = self._calls.memory_lock_limit()
        locked = self._calls.memory_locked()
        # Memory is pinned once per container: one that is there already has it.
        need = locked + (0 if shared else self._has.mapped_bytes)
        detail = f"{need} bytes needed ({locked} locked now, {self._has.mapped_bytes} of guest memory mapped)"
        if limit is None:
            return Check(name="memory-lock", ok=True, detail=f"no limit; {detail}")
        if self._calls.may_lock_any_memory():
            return Check(
                name="memory-lock", ok=True, detail=f"RLIMIT_MEMLOCK {limit}, lifted by CAP_IPC_LOCK; {detail}"
            )
        ok = need <= limit
        advice = "" if ok else f": raise it to {need} or above (ulimit -l, LimitMEMLOCK= of the service)"
        return Check(name="memory-lock", ok=ok, detail=f"RLIMIT_MEMLOCK {limit}; {detail}{advice}")

    def _open_files(self) -> Check:
        limit, used = self._calls.open_file_limit(), self._calls.open_files()
        ok = used + FDS_PER_DEVICE <= limit
        advice = "" if ok else f": raise it, a device takes about {FDS_PER_DEVICE}, and one more per vector"
        return Check(name="open-files", ok=ok, detail=f"RLIMIT_NOFILE {limit}, {used} used{advice}")

    def _reset(self, device: HostDevice) -> Check:
        methods = self._sysfs.reset_methods(device)
        if methods is None:
            return Check(name="reset", ok=True, detail="not known before the device is opened")
        if not methods:
            return Check(name="reset", ok=False, detail="the host knows no way to reset it; it is added all the same")
        return Check(name="reset", ok=True, detail=f"by {methods}")


class DryRun(HostChecks[GroupHoldings]):
    """One dry run of a device of a group."""

    def checks(self, origin: GroupOrigin) -> tuple[Check, ...]:
        """Make every check; those that need a failed one's result are left out. Lends the origin's fds."""
        return tuple(self._run(origin))

    def _run(self, origin: GroupOrigin) -> Iterator[Check]:
        device = yield from self._found(lambda: find_device(self._sysfs, origin))
        if device is None:
            return
        try:
            number, noiommu = group_of(self._calls, self._sysfs, origin.group_fd, device)
        except CommandError as error:
            yield Check(name="group", ok=False, detail=str(error))
            return
        if noiommu:
            refusal = str(refuse_noiommu(number, device))
            yield Check(name="noiommu", ok=origin.noiommu, detail="accepted" if origin.noiommu else refusal)
        yield from self._group(origin, device, number, noiommu=noiommu)
        yield self._container(origin.container, noiommu=noiommu)
        shared = any(container.noiommu == noiommu for container in self._has.containers) and origin.container is None
        if not noiommu:
            yield self._interrupt_remapping()
            yield self._memory_lock(shared=shared)

    def _group(self, origin: GroupOrigin, device: HostDevice, number: int, *, noiommu: bool) -> Iterator[Check]:
        passed = origin.group_fd
        if number in self._has.groups:
            detail = f"group {number} is held here already"
            yield Check(
                name="group", ok=passed is None, detail=detail if passed is None else f"{detail}: leave group-fd out"
            )
            return
        if number in self._has.lingering:
            detail = f"group {number} is still held here since its last device left: it is taken up again"
            yield Check(name="group", ok=True, detail=detail)
            return
        with ExitStack() as opened:
            try:
                fd = passed or self._open_group(opened, device, number, noiommu=noiommu)
                yield Check(
                    name="group", ok=True, detail=f"group {number} {'passed' if passed else 'can be opened here'}"
                )
            except CommandError as error:
                yield Check(name="group", ok=False, detail=str(error))
                return
            try:
                check_status(self._sysfs, group_status(self._calls, fd, number), number)
                yield Check(name="viable", ok=True, detail=f"group {number}: {self._members(number)}")
            except CommandError as error:
                yield Check(name="viable", ok=False, detail=str(error))

    def _open_group(self, opened: ExitStack, device: HostDevice, number: int, *, noiommu: bool) -> FileDescriptor:
        fd = open_group(self._calls, number, device, noiommu=noiommu, allowed=self._has.allow_open)
        opened.callback(fd.close)
        return fd

    def _container(self, source: ContainerSource | None, *, noiommu: bool) -> Check:
        try:
            return Check(name="container", ok=True, detail=self._container_found(source, noiommu=noiommu))
        except CommandError as error:
            return Check(name="container", ok=False, detail=str(error))

    def _container_found(self, source: ContainerSource | None, *, noiommu: bool) -> str:
        """Words for the container it would enter. Raises what ``device_add`` would raise."""
        fitting = [container for container in self._has.containers if container.noiommu == noiommu]
        if source is None and fitting:
            return f"{fitting[0].name} is tried first, then a new one"
        for container in self._has.containers if source is not None else ():
            if source is not None and self._calls.same_file(source.fd.number, container.fd.number):
                if container.noiommu != noiommu:
                    raise InvalidArgument(f"{container.name} and the group do not mix: one of them has no IOMMU")
                return f"'{source.name}' is {container.name}"
        with ExitStack() as opened:
            fd = source.fd.duplicate() if source is not None else open_container(self._calls)
            opened.callback(fd.close)
            fresh = Container(self._calls, -1, fd, passed=source is not None)
            fresh.check()
            kind = fresh.choose_iommu(noiommu=noiommu)
            return f"{'passed' if source is not None else 'a new one'}, {kind.name}"


class CdevDryRun(HostChecks[CdevHoldings]):
    """One dry run of a device of a cdev."""

    def checks(self, origin: CdevOrigin) -> tuple[Check, ...]:
        """Make every check; those that need a failed one's result are left out. Lends the origin's fd."""
        return tuple(self._run(origin))

    def _run(self, origin: CdevOrigin) -> Iterator[Check]:
        device = yield from self._found(lambda: find_cdev(self._calls, self._sysfs, origin))
        if device is None:
            return
        yield self._cdev(origin, device)
        if device.group is not None:
            yield self._group(device.group)
        found = f"{self._has.ioases[0]} is tried first, then a new one" if self._has.ioases else "a new one"
        yield Check(name="ioas", ok=True, detail=found)
        yield self._interrupt_remapping()
        yield self._memory_lock(shared=bool(self._has.ioases))

    def _cdev(self, origin: CdevOrigin, device: HostDevice) -> Check:
        with ExitStack() as opened:
            fd = origin.fd
            if fd is None:
                try:
                    fd = open_cdev(self._calls, self._sysfs, device, allowed=self._has.allow_open)
                except CommandError as error:
                    return Check(name="cdev", ok=False, detail=str(error))
                opened.callback(fd.close)
            if not is_bound(self._calls, fd):
                return Check(name="cdev", ok=True, detail="it is not bound to an iommufd yet")
        resumable = device.name in self._has.resumable
        detail = "bound to an iommufd already" + (": here, it is taken up again" if resumable else ": open it anew")
        return Check(name="cdev", ok=resumable, detail=detail)

    def _group(self, number: int) -> Check:
        if self._has.group_in_use(number):
            detail = f"group {number} is held here through its group file: never both interfaces"
            return Check(name="viable", ok=False, detail=detail)
        blocked = bool(self._sysfs.culprits(number))
        advice = "; a host driver is in the way" if blocked else ""
        return Check(name="viable", ok=not blocked, detail=f"group {number}: {self._members(number)}{advice}")
