"""Family "exports": ``device-export-add``, ``device-export-del``, ``query-device-exports``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.exports import DeviceExportAdd, DeviceExportDel, ExportInfo, QueryDeviceExports
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import DeviceNotFound, InvalidArgument
from vfiod.protocol.fd import FdKind
from vfiod.server.commands.call import Call, Handler

if TYPE_CHECKING:
    from vfiod.server.exports import NewExport

__all__ = ["HANDLERS"]


def device_export_add(call: Call, arguments: DeviceExportAdd) -> Empty:
    """Offer a device to a hypervisor."""
    from vfiod.server.exports import exports_of

    exports, device = exports_of(call.machine), call.machine.device(arguments.device)
    exports.check(arguments.id)
    exports.check_device(device)
    exports.add(_socket(call, arguments), device)
    return Empty()


def _socket(call: Call, a: DeviceExportAdd) -> NewExport:
    from vfiod.server.exports import NewExport

    if a.path is not UNSET and a.fd is not UNSET:
        raise InvalidArgument("Parameters 'path' and 'fd' exclude each other: give one of them")
    if a.path is not UNSET:
        mode = None if a.socket_mode is UNSET else a.socket_mode
        gid = None if a.socket_group is UNSET else _group(a.socket_group)
        return NewExport.at(a.id, a.path, mode=mode, gid=gid)
    if a.fd is UNSET:
        raise InvalidArgument("Parameter 'path' is missing: an export has 'path' or 'fd'")
    for name in ("socket_mode", "socket_group"):
        if getattr(a, name) is not UNSET:
            raise InvalidArgument(f"Parameter '{name.replace('_', '-')}' is for sockets that are made: give 'path'")
    return NewExport.of(a.id, call.fd("fd", a.fd, FdKind.SOCKET, FdKind.LISTENING_SOCKET))


def _group(name: str) -> int:
    if name.isascii() and name.isdigit() and len(name) < 10:
        return int(name)
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise InvalidArgument(f"Parameter 'socket-group': there is no group '{name}'") from error


def device_export_del(call: Call, arguments: DeviceExportDel) -> Empty:
    """Close an export."""
    if call.machine.doors is None:
        raise DeviceNotFound(f"Export '{arguments.id}' not found")
    call.machine.doors.delete(arguments.id, force=arguments.force)
    return Empty()


def query_device_exports(call: Call, arguments: QueryDeviceExports) -> list[ExportInfo]:
    """List exports."""
    return [] if call.machine.doors is None else call.machine.doors.infos()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    DeviceExportAdd: device_export_add,
    DeviceExportDel: device_export_del,
    QueryDeviceExports: query_device_exports,
}
