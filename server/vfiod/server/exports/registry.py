"""All exports of one machine, by id. On the loop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol.catalogue.exports import ExportInfo
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.words import DeviceState
from vfiod.protocol.errors import CommandError, DeviceNotActive, DeviceNotFound, InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.limits import MAX_EXPORTS
from vfiod.server.devices.device import Device
from vfiod.server.exports.export import Export
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.sockets.access import Access
from vfiod.server.sockets.listener import ListenError, open_path

if TYPE_CHECKING:
    from vfiod.server.machine import Machine
    from vfiod.server.state.doors import DoorsState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["Exports", "NewExport", "exports_of"]


class NewExport(Struct, eq=False):
    """An export's socket, made and checked; nobody is accepted yet. Owned: give it to an export, or :meth:`close` it.

    Attributes:
        id: the export's.
        socket: it listens, or is connected.
        path: where it listens; None: it was passed.
        listening: whether it listens.

    """

    id: str
    socket: socket.socket
    path: str | None
    listening: bool

    @classmethod
    def at(cls, id: str, path: str, *, mode: int | None = None, gid: int | None = None) -> NewExport:
        """Listen on a new socket. InvalidArgument, naming the path."""
        try:
            return cls(id, open_path(path, gid, mode), path, True)
        except ListenError as error:
            raise InvalidArgument(str(error)) from error

    @classmethod
    def of(cls, id: str, fd: FileDescriptor) -> NewExport:
        """Take over a Unix stream socket that listens, or is connected. InvalidArgument; then the fd is closed."""
        kind = kind_of(fd.number)
        passed = socket.socket(fileno=fd.give_away())
        if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM:
            passed.close()
            raise InvalidArgument("Parameter 'fd' expects a Unix stream socket")
        return cls(id, passed, None, kind is FdKind.LISTENING_SOCKET)

    def close(self) -> None:
        """It is not used after all: its file goes too."""
        self.socket.close()
        if self.path is not None:
            import os
            from contextlib import suppress

            with suppress(OSError):
                os.unlink(self.path)


class Exports:
    """The exports of one machine.

    Args:
        machine: the machine.

    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._access: Final = Access(machine.allow_uid)
        self._exports: dict[str, Export] = {}
        self._ending = False
        self.on_gone: Callable[[], None] | None = None
        """Called on the loop when an export has ended."""

    def __len__(self) -> int:
        return len(self._exports)

    # --- coming and going -----------------------------------------------------------------------------

    def check(self, id: str) -> None:
        """Refuse an id that is taken, or one export too many. CommandError."""
        if self._ending:
            raise DeviceNotActive("The server is shutting down: nothing can be exported any more")
        if id in self._exports:
            raise CommandError(f"Duplicate export ID '{id}'")
        if len(self._exports) >= MAX_EXPORTS:
            raise CommandError(f"This machine has {MAX_EXPORTS} exports, no more are allowed")

    def check_device(self, device: Device) -> None:
        """Refuse a device that cannot be offered. CommandError."""
        if device.state is not DeviceState.RUNNING:
            raise DeviceNotActive(f"Device '{device.name}' is {device.state}: it cannot be exported now")
        if any(export.device is device for export in self._exports.values()):
            raise CommandError(f"Device '{device.name}' is exported already: one export belongs to one device")
        if device.backend.address_space is None:
            raise DeviceNotActive(
                f"Device '{device.name}' has no IOMMU (noiommu): a guest's DMA would reach the host's memory; "
                "it is not exported"
            )

    def add(self, new: NewExport, device: Device) -> None:
        """Offer a device. Takes the socket over on every path. CommandError."""
        try:
            self.check(new.id)
            self.check_device(device)
        except BaseException:
            new.close()
            raise
        export = Export(self._machine, new.id, device, self._access, self._gone)
        self._exports[new.id] = export
        if new.listening:
            export.listen(new.socket, new.path)
        else:
            export.serve(new.socket)

    def delete(self, id: str, *, force: bool) -> None:
        """``device-export-del``."""
        export = self._exports.get(id)
        if export is None:
            raise DeviceNotFound(f"Export '{id}' not found")
        export.delete(force=force)

    def _gone(self, export: Export) -> None:
        self._exports.pop(export.id, None)
        if self.on_gone is not None:
            self.on_gone()

    # --- over a change of the process -----------------------------------------------------------------

    def hold(self) -> None:
        """Take nothing more from clients, and admit none."""
        for export in self._exports.values():
            export.hold()

    def release(self) -> None:
        """Go on with all."""
        for export in self._exports.values():
            export.release()

    @property
    def under_way(self) -> str | None:
        """What has begun and has not ended, for a person; None: they could be described."""
        return next((what for one in self._exports.values() if (what := one.under_way) is not None), None)

    def keep(self, given: Given) -> DoorsState:
        """Describe them, with their clients."""
        from vfiod.server.state.doors import DoorsState

        return DoorsState(exports=[export.keep(given) for export in self._exports.values()])

    def adopt(self, state: DoorsState, taken: Taken) -> None:
        """Have them again, after their devices. CommandError, OSError."""
        for one in state.exports:
            export = Export(self._machine, one.id, self._machine.device(one.device), self._access, self._gone)
            self._exports[one.id] = export
            export.adopt(one, taken)

    # --- for the machine (:class:`vfiod.server.machine.doors.Doors`) ------------------------------------

    def device_gone(self, name: str) -> None:
        """A device is closed: what offered it ends."""
        for export in tuple(self._exports.values()):
            if export.device.name == name:
                export.device_closed()

    def begin_end(self) -> None:
        """The machine ends: nobody comes in any more, and who is there is disconnected."""
        self._ending = True
        for export in tuple(self._exports.values()):
            export.close("The server ends")

    async def ended(self) -> None:
        """Wait until every client has gone; their devices are closed by now."""
        for export in tuple(self._exports.values()):
            await export.ended()

    def infos(self) -> list[ExportInfo]:
        """For ``query-device-exports``."""
        return [export.info() for export in tuple(self._exports.values())]

    def fd_infos(self) -> Iterator[FdInfo]:
        """For ``query-fds``."""
        for export in tuple(self._exports.values()):
            yield from export.fd_infos()


def exports_of(machine: Machine) -> Exports:
    """The exports of a machine; made when first asked for."""
    exports = machine.doors
    if not isinstance(exports, Exports):
        exports = machine.doors = Exports(machine)
        machine.devices.on_gone = exports.device_gone
    return exports
