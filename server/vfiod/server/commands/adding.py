"""``device_add``: from its arguments to a device, by way of one origin.

Imported with the first device: a server that has none does not pay for device models and backends.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final
from uuid import UUID

from msgspec.structs import replace

from vfiod.protocol.catalogue.devices import Check, DeviceAdd, DeviceAddResult, Driver
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor, close_all
from vfiod.protocol.limits import DEFAULT_MSG_TIMEOUT_MS
from vfiod.server.backends.cdev import CdevOrigin, IommufdSource
from vfiod.server.backends.checks import possible
from vfiod.server.backends.group import ContainerSource, GroupOrigin
from vfiod.server.commands.call import Call
from vfiod.server.commands.properties import check_properties, options
from vfiod.server.devices.device import Device
from vfiod.server.devices.model import Options
from vfiod.server.machine import NewDevice

if TYPE_CHECKING:
    from vfiod.server.exports import NewExport

__all__ = ["add"]

ORIGINS: Final = (
    "give one origin: 'host' or 'sysfsdev' (a device of a kernel group, with 'group-fd' for the first of its group), "
    "'fd' with 'iommufd' (a device of a cdev), 'mdev' (a mediated device), 'socket' or 'socket-fd' (vfio-user)"
)

FOR_GROUPS: Final = ("group_fd", "container_fd", "container", "x_noiommu")
FOR_THE_KERNELS: Final = ("iommufd", "vf_token")
FOR_SERVERS: Final = ("x_msg_timeout", "reconnect_ms")


def add(call: Call, arguments: DeviceAdd) -> Awaitable[DeviceAddResult]:
    """Add a device, or say whether it could be added."""
    a = arguments
    if a.driver not in set(Driver):
        raise InvalidArgument(f"'{a.driver}' is not a valid device model name")
    check_properties(a)
    _check_origin(a)
    chosen = options(call, a)
    door = None
    try:
        if a.export is not UNSET:
            door = _door(call, a, a.export)
        if a.mdev is not UNSET:
            work = _add_mediated(call, a, chosen, a.mdev.lower())
        elif a.socket is not UNSET or a.socket_fd is not UNSET:
            work = _add_served(call, a, chosen)
        elif a.iommufd is not UNSET:
            work = _add_cdev(call, a, chosen, a.iommufd)
        else:
            work = _add_from_group(call, a, chosen)
    except BaseException:
        if chosen.romfile is not None:
            chosen.romfile.close()
        if door is not None:
            door.close()
        raise
    if a.x_dry_run and chosen.romfile is not None:
        chosen.romfile.close()
    return work if door is None else _with_door(call, a, work, door)


def _door(call: Call, a: DeviceAdd, path: str) -> NewExport | None:
    """The socket of its export, before there is a device: what is wrong with it is said before anything is opened."""
    from vfiod.server.exports import NewExport, exports_of

    if a.id is UNSET:
        raise InvalidArgument("Parameter 'id' is missing: an export has the id of its device")
    exports_of(call.machine).check(a.id)
    return None if a.x_dry_run else NewExport.at(a.id, path)


async def _with_door(call: Call, a: DeviceAdd, work: Awaitable[DeviceAddResult], door: NewExport) -> DeviceAddResult:
    from vfiod.server.exports import exports_of

    try:
        result = await work
    except BaseException:
        door.close()
        raise
    device = call.machine.device(door.id)
    try:
        exports_of(call.machine).add(door, device)
    except BaseException:
        # It was asked for with its door, or not at all.
        call.machine.remove_device(door.id, force=True, timeout_ms=0)
        raise
    return result


def _check_origin(a: DeviceAdd) -> None:
    """Exactly one origin, and only what belongs to it. Raises InvalidArgument."""
    named = [
        name for name in ("host", "sysfsdev", "fd", "mdev", "socket", "socket_fd") if getattr(a, name) is not UNSET
    ]
    if not named:
        raise InvalidArgument(f"Parameter 'host' is missing: {ORIGINS}")
    if len(named) > 1:
        both = " and ".join(f"'{name.replace('_', '-')}'" for name in named)
        raise InvalidArgument(f"Parameters {both} exclude each other: {ORIGINS}")
    if a.mdev is not UNSET:
        _refuse(a, FOR_GROUPS, "is for devices of a kernel group; 'mdev' takes none")
        _refuse(a, FOR_THE_KERNELS, "is for devices of the kernel; 'mdev' takes none")
    elif a.socket is not UNSET or a.socket_fd is not UNSET:
        _refuse(a, FOR_GROUPS, "is for devices of a kernel group; a vfio-user server's takes none")
        _refuse(a, FOR_THE_KERNELS, "is for devices of the kernel; a vfio-user server's takes none")
        if a.socket_fd is not UNSET:
            _refuse(a, ("reconnect_ms",), "takes 'socket': nobody can connect anew to the one behind 'socket-fd'")
        return
    elif a.iommufd is not UNSET:
        _refuse(a, FOR_GROUPS, "is for devices of a kernel group; 'iommufd' takes none")
    elif a.fd is not UNSET:
        raise InvalidArgument("Parameter 'iommufd' is missing: 'fd' is bound to the iommufd object it names")
    _refuse(a, FOR_SERVERS, "is for devices of a vfio-user server: give 'socket' or 'socket-fd'")
    if a.container_fd is not UNSET and a.container is not UNSET:
        raise InvalidArgument("Parameters 'container-fd' and 'container' exclude each other: give one of them")


def _refuse(a: DeviceAdd, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(a, name) is not UNSET and getattr(a, name) is not False:
            raise InvalidArgument(f"Parameter '{name.replace('_', '-')}' {why}")


def _add_mediated(call: Call, a: DeviceAdd, options: Options, uuid: str) -> Awaitable[DeviceAddResult]:
    machine = call.machine
    if a.x_dry_run:
        return _report(call, a, machine.check_mediated(uuid, a.driver))
    new = NewDevice(
        id="" if a.id is UNSET else a.id,
        driver=Driver(a.driver),
        backend_kind="mdev",
        host=uuid,
        options=options,
        open=lambda user: machine.sources.mediated.open(uuid, user, a.driver),
        discard=lambda: None,
        in_workers=machine.sources.mediated.waits(uuid),
        on_request_timeout_ms=a.on_request_timeout_ms,
    )
    return _added(machine.add_device(_with_romfile(new)))


def _add_served(call: Call, a: DeviceAdd, options: Options) -> Awaitable[DeviceAddResult]:
    from vfiod.server.backends.vfio_user.source import VfioUserOrigin

    machine = call.machine
    origin = VfioUserOrigin(
        driver=a.driver,
        path=None if a.socket is UNSET else a.socket,
        fd=None if a.socket_fd is UNSET else call.fd("socket-fd", a.socket_fd, FdKind.SOCKET),
        name="" if a.socket_fd is UNSET else a.socket_fd,
        timeout_ms=DEFAULT_MSG_TIMEOUT_MS if a.x_msg_timeout is UNSET else max(1, a.x_msg_timeout),
        reconnect_ms=0 if a.reconnect_ms is UNSET else a.reconnect_ms,
    )
    if a.x_dry_run:
        call.keep_names()
        return _report(call, a, machine.check_served(origin))
    new = NewDevice(
        id="" if a.id is UNSET else a.id,
        driver=Driver(a.driver),
        backend_kind="vfio-user",
        host=origin.what,
        options=options,
        open=lambda user: machine.sources.served.open(origin, user),
        discard=lambda: close_all(origin.fds()),
        on_request_timeout_ms=a.on_request_timeout_ms,
        in_workers=True,
    )
    return _added(machine.add_device(_with_romfile(new)))


def _token(a: DeviceAdd) -> UUID | None:
    return None if a.vf_token is UNSET else UUID(a.vf_token)


def _add_cdev(call: Call, a: DeviceAdd, options: Options, iommufd: str) -> Awaitable[DeviceAddResult]:
    machine = call.machine
    source = IommufdSource(iommufd, machine.objects.iommufd(iommufd))  # an unknown id is said before the fd is taken
    origin = CdevOrigin(
        driver=a.driver,
        iommufd=source,
        fd=None if a.fd is UNSET else call.fd("fd", a.fd, FdKind.VFIO_DEVICE),
        host=None if a.host is UNSET else a.host,
        sysfsdev=None if a.sysfsdev is UNSET else a.sysfsdev,
        vf_token=_token(a),
    )
    if a.x_dry_run:
        call.keep_names()
        return _report(call, a, machine.check_cdev(origin))
    new = NewDevice(
        id="" if a.id is UNSET else a.id,
        driver=Driver(a.driver),
        backend_kind="kernel-cdev",
        host=origin.host or origin.sysfsdev,
        options=options,
        open=lambda _: machine.open_cdev(origin),
        discard=lambda: close_all(origin.fds()),
        on_request_timeout_ms=a.on_request_timeout_ms,
    )
    return _added(machine.add_device(_with_romfile(new)))


def _add_from_group(call: Call, a: DeviceAdd, options: Options) -> Awaitable[DeviceAddResult]:
    machine = call.machine
    container_object = None if a.container is UNSET else a.container
    if container_object is not None:
        machine.objects.container(container_object)  # an unknown id is said before anything is opened
    group_fd: FileDescriptor | None = None
    container: ContainerSource | None = None
    try:
        if a.group_fd is not UNSET:
            group_fd = call.fd("group-fd", a.group_fd, FdKind.VFIO_GROUP)
        if a.container_fd is not UNSET:
            fd = call.fd("container-fd", a.container_fd, FdKind.VFIO_CONTAINER)
            container = ContainerSource(fd, a.container_fd)
    except BaseException:
        if group_fd is not None:
            group_fd.close()
        raise
    origin = GroupOrigin(
        driver=a.driver,
        host=None if a.host is UNSET else a.host,
        sysfsdev=None if a.sysfsdev is UNSET else a.sysfsdev,
        group_fd=group_fd,
        container=container,
        noiommu=a.x_noiommu,
        vf_token=_token(a),
    )
    if a.x_dry_run:
        call.keep_names()
        return _report(call, a, machine.check_group(origin, container_object))

    new = NewDevice(
        id="" if a.id is UNSET else a.id,
        driver=Driver(a.driver),
        backend_kind="kernel-group",
        host=origin.host or origin.sysfsdev,
        options=options,
        open=lambda _: machine.open_group(origin, container_object),
        discard=lambda: close_all(origin.fds()),
        on_request_timeout_ms=a.on_request_timeout_ms,
    )
    return _added(machine.add_device(_with_romfile(new)))


def _with_romfile(new: NewDevice) -> NewDevice:
    romfile = new.options.romfile
    if romfile is None:
        return new

    def discard() -> None:
        romfile.close()
        new.discard()

    return replace(new, open=romfile.before(new.open, new.discard), discard=discard)


async def _added(work: Awaitable[Device]) -> DeviceAddResult:
    await work
    return DeviceAddResult()


async def _report(call: Call, a: DeviceAdd, work: Awaitable[tuple[Check, ...]]) -> DeviceAddResult:
    own = call.machine.devices.check("" if a.id is UNSET else a.id)
    checks = [*own, *await work]
    return DeviceAddResult(possible=possible(checks), checks=checks)
