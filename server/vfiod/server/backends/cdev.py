"""Devices of the kernel's cdevs (``/dev/vfio/devices/vfioN``), bound to an iommufd.

The rules (``behaviour.md`` section 1, ``drivers/vfio/device_cdev.c``, ``drivers/iommu/iommufd/device.c``):

* A cdev is bound to an iommufd, once, and attached to an IOAS: one the machine has in that iommufd, if it takes the
  device, else a new one. Guest memory is replayed into a new IOAS.
* There is no unbinding but the end of the file. An fd that somebody else keeps (a session's name after a failure, a
  process an fd was given to) keeps the device bound; :class:`KernelCdevs` remembers it, and takes it up again when
  the same file is passed again.
* The last device out of an IOAS destroys it.
* One group is used by one of the kernel's two interfaces, never by both.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Check
from vfiod.protocol.errors import Busy, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import AddressSpace, Backend
from vfiod.server.backends.cdev_origin import CdevOrigin, IommufdSource, find_cdev, is_bound, open_cdev
from vfiod.server.backends.checks import CdevDryRun, CdevHoldings
from vfiod.server.backends.device import KernelDevice
from vfiod.server.backends.group import HeldFd
from vfiod.server.backends.ioctls import Advice, call, failed
from vfiod.server.backends.iommufd import Ioas, Iommufd
from vfiod.server.backends.origin import NO_VM, check_class
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import BackendState, IommufdState

__all__ = ["CdevOrigin", "IoasInfo", "IommufdSource", "KernelCdev", "KernelCdevs"]

# ATTACH of an IOAS that cannot take the device: another kind of IOMMU (EINVAL), reserved addresses that are mapped
# there (EADDRINUSE). Another IOAS may do.
_UNFIT: frozenset[str] = frozenset({"EINVAL", "EADDRINUSE"})

_ATTACH_ADVICE: Advice = {
    errno.EINVAL: "the IOMMU does not take this device, or a device of its group is attached to something else",
    errno.EADDRINUSE: "addresses this device's IOMMU reserves are mapped there",
    errno.EBUSY: "the device, or one of its group, is being reset: try again",
}


@dataclass(frozen=True, slots=True)
class IoasInfo:
    """One IOAS, for the topology."""

    name: str
    iommufd: str  # the object's id
    devices: tuple[str, ...]  # host names


@dataclass(frozen=True, slots=True)
class _Bound:
    """A device that stays bound to an iommufd though no device of ours uses it."""

    iommufd: Iommufd
    devid: int


class KernelCdev(KernelDevice):
    """One opened cdev.

    Attributes:
        devid: its id in the iommufd.
        ioas: what it is attached to.
        iommufd: what it is bound to.
        host: the host device.

    """

    def __init__(
        self,
        calls: Syscalls,
        fd: FileDescriptor,
        host: HostDevice,
        *,
        iommufd: Iommufd,
        devid: int,
        ioas: Ioas,
        left: Callable[[KernelCdev], bool],
    ) -> None:
        super().__init__(
            calls, fd, host.name, kind="kernel-cdev", address_space=ioas, group=None, left=lambda _: left(self)
        )
        self.host = host
        self.iommufd = iommufd
        self.devid = devid
        self.ioas = ioas

    def close(self) -> bool:
        """Detach the device, close it, and let its IOAS go if it was the last."""
        if not self.fd.closed:
            _detach(self._calls, self.fd)
        return super().close()


class KernelCdevs:
    """All iommufds, IOASes and cdevs of a machine. Threads: as :class:`~vfiod.server.backends.group.KernelGroups`.

    Args:
        calls: the system calls.
        attach_space: replays all guest memory into a new address space; raises and leaves nothing, or succeeds.
        detach_space: forgets an address space.
        group_in_use: whether a group, by number, is held here through its group file.
        allow_open: open ``/dev/vfio/devices/vfioN`` here when no fd is passed (``--allow-open``).
        mapped_bytes: how much guest memory is mapped at this moment.

    """

    def __init__(
        self,
        calls: Syscalls,
        attach_space: Callable[[AddressSpace], None],
        detach_space: Callable[[AddressSpace], None],
        *,
        group_in_use: Callable[[int], bool] = lambda _: False,
        allow_open: bool = False,
        mapped_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._calls = calls
        self._sysfs = Sysfs(calls)
        self._attach_space = attach_space
        self._detach_space = detach_space
        self._group_in_use = group_in_use
        self._allow_open = allow_open
        self._mapped_bytes = mapped_bytes
        self._iommufds: dict[str, Iommufd] = {}  # by object id; those with a device
        self._devices: dict[str, KernelCdev] = {}  # by host name
        self._still_bound: dict[str, _Bound] = {}  # by host name

    # --- adding ---
    def open(self, origin: CdevOrigin) -> Backend:
        """Open a device. Takes over the origin's fd, whatever comes of it; unwinds everything on failure.

        Raises:
            InvalidArgument: the fd is no cdev, or of another class of device.
            PermissionRefused: it would have to be opened here, which was not allowed.
            Busy: attached already, bound already, or its group is used through its group file.
            OperationFailed: the kernel said no.

        """
        with ExitStack() as undo:
            if origin.fd is not None:
                undo.callback(origin.fd.close)
            device = find_cdev(self._calls, self._sysfs, origin)
            self._check_free(device)
            fd = origin.fd
            if fd is None:
                fd = open_cdev(self._calls, self._sysfs, device, allowed=self._allow_open)
                undo.callback(fd.close)
            iommufd = self._enter_iommufd(origin.iommufd)
            undo.callback(self._leave_iommufd, iommufd)
            devid = self._bind(fd, device, iommufd, origin.vf_token)
            undo.callback(self._left_bound, device, iommufd, devid, fd)
            ioas = self._attach(fd, device, iommufd)
            undo.callback(self._leave_ioas, iommufd, ioas, device.name)
            undo.callback(_detach, self._calls, fd)
            self._enter_memory(ioas)
            backend = KernelCdev(
                self._calls, fd, device, iommufd=iommufd, devid=devid, ioas=ioas, left=self._device_left
            )
            check_class(origin.driver, device.name, backend.info())
            undo.pop_all()
        self._devices[device.name] = backend
        return backend

    def _check_free(self, device: HostDevice) -> None:
        if device.name in self._devices:
            raise Busy(f"Host device {device.name} is already attached to this machine")
        if device.group is not None and self._group_in_use(device.group):
            raise Busy(
                f"Group {device.group} of {device.name} is held here through its group file (/dev/vfio/{device.group}),"
                " and a group is never used through both interfaces: remove its devices, or add this one by its group"
            )

    def _enter_iommufd(self, source: IommufdSource) -> Iommufd:
        iommufd = self._iommufds.get(source.object_id)
        if iommufd is None:
            iommufd = self._iommufds[source.object_id] = Iommufd(self._calls, source.object_id, source.fd)
        iommufd.devices += 1
        return iommufd

    def _leave_iommufd(self, iommufd: Iommufd) -> None:
        iommufd.devices -= 1
        if not iommufd.devices:
            del self._iommufds[iommufd.object_id]

    # --- binding ---
    def _bind(self, fd: FileDescriptor, device: HostDevice, iommufd: Iommufd, token: UUID | None) -> int:
        """``VFIO_DEVICE_BIND_IOMMUFD``; the device's id in the iommufd."""
        if is_bound(self._calls, fd):
            return self._bound_before(device, iommufd)
        self._still_bound.pop(device.name, None)
        try:
            return self._bind_with(fd, device, iommufd, token)
        except OperationFailed as refusal:
            if token is None or refusal.errno not in ("EINVAL", "E2BIG"):
                raise
            # Before Linux 6.17 BIND knew no token. A physical function is told it by DEVICE_FEATURE; a device
            # that takes none says so there, in this kernel as in that.
            devid = self._bind_with(fd, device, iommufd, None)
            with ExitStack() as undo:
                undo.callback(self._left_bound, device, iommufd, devid, fd)
                self._set_token(fd, device, token)
                undo.pop_all()
            return devid

    def _bound_before(self, device: HostDevice, iommufd: Iommufd) -> int:
        bound = self._still_bound.get(device.name)
        if bound is None or not self._same(bound, iommufd):
            raise Busy(
                f"The cdev of {device.name} is bound to an iommufd already, by whoever opened it, and there is no way "
                "back: close it, open it anew, and pass it unbound"
            )
        return bound.devid

    def _same(self, bound: _Bound, iommufd: Iommufd) -> bool:
        """Whether what was bound here before is bound to this very iommufd."""
        known = bound.iommufd.fd
        if known.closed or not self._calls.same_file(known.number, iommufd.fd.number):
            return False
        return iommufd.has_device(bound.devid) is not False

    def _bind_with(self, fd: FileDescriptor, device: HostDevice, iommufd: Iommufd, token: UUID | None) -> int:
        request = vfio.BindIommufd(iommufd.fd.number)
        secret = ctypes.create_string_buffer(token.bytes if token is not None else b"", 16)
        if token is not None:
            request = vfio.BindIommufd(
                iommufd.fd.number, flags=vfio.BindFlags.TOKEN, token_uuid_ptr=ctypes.addressof(secret)
            )
        argument = bytearray(request.pack())
        what = f"{device.name} (to {iommufd.name})"
        try:
            self._calls.ioctl(fd.number, vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD, argument)
        except OSError as error:
            advice = {error.errno or 0: self._bind_advice(error, device, token)}
            raise failed("VFIO_DEVICE_BIND_IOMMUFD", what, error, advice) from error
        return vfio.BindIommufd.unpack(argument).out_devid

    def _bind_advice(self, error: OSError, device: HostDevice, token: UUID | None) -> str:
        group = "its group" if device.group is None else f"group {device.group}"
        match error.errno:
            case errno.EBUSY:
                return f"the file of {group} (/dev/vfio) is open: a group is never used through both interfaces"
            case errno.EINVAL if device.device_api == "vfio-ap":
                return NO_VM
            case errno.EINVAL:
                return (
                    "the device is open elsewhere (a cdev is opened by one at a time), or its IOMMU is not coherent"
                    + (", or it takes no VF token" if token is not None else "")
                )
            case errno.EPERM:
                culprits = self._sysfs.culprits(device.group) if device.group is not None else ()
                if culprits:
                    return f"bound to host drivers in {group}: {', '.join(map(str, culprits))}; unbind them"
                return (
                    f"another iommufd owns {group}, or the platform does not isolate interrupts: switch interrupt "
                    "remapping on in the firmware, or load iommufd with allow_unsafe_interrupts=1"
                )
            case errno.EACCES:
                return (
                    "it needs the VF token its physical function's user set: pass vf-token"
                    if token is None
                    else "the VF token is not the one in use"
                )
            case errno.ENODEV:
                return "the device is gone from the host, or in no IOMMU group"
            case errno.ENOTTY:
                return "the fd is a device of a group, or the kernel has no cdevs (CONFIG_VFIO_DEVICE_CDEV)"
            case _:
                return ""

    def _set_token(self, fd: FileDescriptor, device: HostDevice, token: UUID) -> None:
        feature = vfio.DeviceFeature(vfio.Feature.PCI_VF_TOKEN, vfio.FeatureFlags.SET, token.bytes)
        advice = {errno.ENOTTY: "it takes no VF token: it is no physical function of SR-IOV; leave vf-token out"}
        what = f"{device.name} (PCI_VF_TOKEN)"
        call(
            self._calls,
            fd.number,
            vfio.DeviceIoctl.VFIO_DEVICE_FEATURE,
            bytearray(feature.pack()),
            what,
            advice,
        )

    def _left_bound(self, device: HostDevice, iommufd: Iommufd, devid: int, fd: FileDescriptor) -> bool:
        """Close the fd, and look whether the device is still bound, by another fd of the same open file."""
        fd.close()
        bound = iommufd.has_device(devid)
        if bound:
            self._still_bound[device.name] = _Bound(iommufd, devid)
        return bool(bound)

    # --- the address space ---
    def _attach(self, fd: FileDescriptor, device: HostDevice, iommufd: Iommufd) -> Ioas:
        """Attach to an IOAS the machine has in this iommufd, or else to a new one. :meth:`_leave_ioas` undoes it."""
        for ioas in iommufd.ioases:
            try:
                self._attach_to(fd, device, ioas)
            except OperationFailed as refusal:
                if refusal.errno not in _UNFIT:
                    raise
                continue  # one of its own says what is really wrong
            return ioas
        ioas = iommufd.allocate()
        with ExitStack() as undo:
            undo.callback(iommufd.release, ioas)
            self._attach_to(fd, device, ioas)
            undo.pop_all()
        return ioas

    def _attach_to(self, fd: FileDescriptor, device: HostDevice, ioas: Ioas) -> None:
        argument = bytearray(vfio.AttachPt(ioas.id).pack())
        request = vfio.DeviceIoctl.VFIO_DEVICE_ATTACH_IOMMUFD_PT
        call(self._calls, fd.number, request, argument, f"{device.name} (to {ioas.name})", _ATTACH_ADVICE)
        ioas.devices = (*ioas.devices, device.name)

    def _enter_memory(self, ioas: Ioas) -> None:
        ioas.refresh()
        if not ioas.attached:
            self._attach_space(ioas)
            ioas.attached = True

    def _leave_ioas(self, iommufd: Iommufd, ioas: Ioas, name: str) -> None:
        """A device was detached: the last one out destroys the IOAS."""
        ioas.devices = tuple(other for other in ioas.devices if other != name)
        if ioas.devices:
            return
        if ioas.attached:
            ioas.attached = False
            self._detach_space(ioas)
        iommufd.release(ioas)

    # --- leaving ---
    def _device_left(self, device: KernelCdev) -> bool:
        """A device was detached, its fd closed. Returns whether the kernel let it go."""
        self._devices.pop(device.name, None)
        iommufd = device.iommufd
        self._leave_ioas(iommufd, device.ioas, device.name)
        bound = iommufd.has_device(device.devid)
        if bound:
            self._still_bound[device.name] = _Bound(iommufd, device.devid)
        self._leave_iommufd(iommufd)
        return not device.given_out if bound is None else not bound

    def close(self) -> None:
        """Close every device that is left, when the machine ends."""
        for device in tuple(self._devices.values()):
            device.close()
        self._still_bound.clear()

    # --- over a change of the process ---
    def keep(self) -> list[IommufdState]:
        """Describe the iommufds that devices are bound to."""
        return [one.keep() for one in self._iommufds.values()]

    def keep_device(self, device: KernelCdev, given: Given) -> BackendState:
        """Describe a cdev."""
        from vfiod.server.state.machine import BackendState, HostState

        host = device.host
        return BackendState(
            kind=device.kind,
            name=device.name,
            given_out=device.given_out,
            fd=given.give(device.fd, f"host:{device.name}"),
            host=HostState(
                name=host.name,
                bus=host.bus,
                path=host.path,
                driver=host.driver,
                group=host.group,
                device_api=host.device_api,
            ),
            iommufd=device.iommufd.object_id,
            devid=device.devid,
            ioas=device.ioas.id,
        )

    def adopt(
        self,
        states: list[IommufdState],
        fd_of: Callable[[str], FileDescriptor],
        adopt_space: Callable[[AddressSpace], None],
    ) -> None:
        """Make the iommufds' IOASes again; their devices follow (:meth:`adopt_device`). OperationFailed.

        Args:
            states: what :meth:`keep` gave.
            fd_of: the fd of an ``iommufd`` object, by its id.
            adopt_space: called with each IOAS that has the guest's memory.

        """
        for state in states:
            iommufd = self._iommufds[state.object_id] = Iommufd(self._calls, state.object_id, fd_of(state.object_id))
            iommufd.adopt(state)
            for ioas in iommufd.ioases:
                if ioas.attached:
                    adopt_space(ioas)

    def adopt_device(self, state: BackendState, taken: Taken) -> Backend:
        """Make a cdev again around its fd: it stays bound and attached. OperationFailed."""
        if state.fd is None or state.host is None or state.devid is None:
            raise InvalidArgument(f"Device {state.name} came without its fd")
        iommufd = self._iommufds[state.iommufd or ""]
        ioas = next(one for one in iommufd.ioases if one.id == state.ioas)
        host = state.host
        device = HostDevice(host.name, host.bus, host.path, host.driver, host.group, host.device_api)
        backend = KernelCdev(
            self._calls,
            taken.take(state.fd),
            device,
            iommufd=iommufd,
            devid=state.devid,
            ioas=ioas,
            left=self._device_left,
        )
        if state.given_out:
            backend.give_out()
        iommufd.devices += 1
        ioas.devices = (*ioas.devices, device.name)
        self._devices[device.name] = backend
        return backend

    def rehome(self) -> list[str]:
        """What other processes mapped counts for this one from now on. Returns what could not be done, in sentences."""
        return [problem for one in tuple(self._iommufds.values()) if (problem := one.rehome()) is not None]

    # --- looking ---
    def check(self, origin: CdevOrigin) -> tuple[Check, ...]:
        """What ``device_add`` with ``x-dry-run`` says. Takes over (and closes) the origin's fd; changes nothing."""
        with ExitStack() as passed:
            if origin.fd is not None:
                passed.callback(origin.fd.close)
            iommufd = self._iommufds.get(origin.iommufd.object_id)
            holdings = CdevHoldings(
                attached=frozenset(self._devices),
                resumable=frozenset(self._still_bound),
                group_in_use=self._group_in_use,
                ioases=tuple(ioas.name for ioas in iommufd.ioases) if iommufd is not None else (),
                allow_open=self._allow_open,
                mapped_bytes=self._mapped_bytes(),
            )
            return CdevDryRun(self._calls, holdings).checks(origin)

    def attached(self, name: str) -> bool:
        """Whether a host device is open here by its cdev."""
        return name in self._devices

    def in_group(self, number: int) -> tuple[str, ...]:
        """Names of the devices of a group that are open here by their cdevs."""
        return tuple(device.name for device in tuple(self._devices.values()) if device.host.group == number)

    def users_of(self, object_id: str) -> tuple[str, ...]:
        """Names of the host devices bound to this ``iommufd`` object here."""
        return tuple(device.name for device in tuple(self._devices.values()) if device.iommufd.object_id == object_id)

    def ioases(self) -> tuple[IoasInfo, ...]:
        """Every IOAS that was made here."""
        return tuple(
            IoasInfo(ioas.name, iommufd.object_id, ioas.devices)
            for iommufd in tuple(self._iommufds.values())
            for ioas in iommufd.ioases
        )

    def fds(self) -> tuple[HeldFd, ...]:
        """Every fd held here; the iommufds are the objects'."""
        devices = tuple(self._devices.values())
        return tuple(
            HeldFd(f"host:{one.name}", FdKind.VFIO_DEVICE, one.fd.number) for one in devices if not one.fd.closed
        )


def _detach(calls: Syscalls, fd: FileDescriptor) -> None:
    """``VFIO_DEVICE_DETACH_IOMMUFD_PT``: nothing depends on its answer, closing does the same unless others hold it."""
    try:
        calls.ioctl(fd.number, vfio.DeviceIoctl.VFIO_DEVICE_DETACH_IOMMUFD_PT, bytearray(vfio.DetachPt().pack()))
    except OSError:
        return
