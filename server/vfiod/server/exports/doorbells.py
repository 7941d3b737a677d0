"""Doorbells of a device, given to its client as ioeventfds (DEVICE_GET_REGION_IO_FDS). On the loop.

A register that a device declares a doorbell (``MediatedDevice.doorbells``) need not be a message each time: the client
gets an eventfd of ours, its KVM signals it when the guest writes just that value with just that width, and we write the
register. Rings are counted by nobody: several that come at once are one. They keep no order with messages either; that
is what declaring it means.

Kernel devices declare none. ``VFIO_DEVICE_IOEVENTFD`` would write the register in the kernel, but wants to be told
which, and what is written there; QEMU's own quirks know that of a few graphics cards (``hw/vfio/pci-quirks.c``), and
vfiod of no device. QEMU's vfio-user client (11.1) never asks; libvfio-user's entries have 48 bytes, ours the
specification's 40.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.vfio_user import GetRegionIoFds, IoFdFlags, RegionIoFds, SubRegion
from vfiod.server.devices import eventfds
from vfiod.server.devices.device import Device
from vfiod.server.devices.regions import Region
from vfiod.server.exports.connection import Answer

if TYPE_CHECKING:
    from vfiod.server.state.doors import DoorbellState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["Doorbells"]

_log: Final = logging.getLogger(__name__)

Ring = Callable[[Region, int, bytes], Answer | Awaitable[Answer]]
"""Writes a register: region, offset, data."""


class Doorbells:
    """The doorbells one client was given.

    Args:
        loop: the event loop.
        device: the device.
        ring: writes the register, in the device's order.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, device: Device, ring: Ring) -> None:
        self._loop = loop
        self._device = device
        self._ring = ring
        self._fds: dict[tuple[int, int, bytes], FileDescriptor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def answer(self, asked: GetRegionIoFds, region: Region, max_fds: int) -> Answer:
        """The reply for one region: as many doorbells as the client takes fds at once.

        Asked with too little room, it says how much there must be, and has no fds. OperationFailed (EMFILE).
        """
        bells = self._device.backend.doorbells(region.index)[:max_fds]
        entries = tuple(
            SubRegion(offset, len(data), number, flags=IoFdFlags.DATAMATCH, datamatch=int.from_bytes(data, "little"))
            for number, (offset, data) in enumerate(bells)
        )
        reply = RegionIoFds(region.index, entries, limit=asked.argsz)
        if not reply.fits:
            return Answer(reply)
        given: list[FileDescriptor] = []
        try:
            for offset, data in bells:
                given.append(eventfds.duplicate(self._eventfd(region, offset, data), self._what(region, offset)))
        except BaseException:
            close_all(given)
            raise
        return Answer(reply, tuple(given))

    def fds(self) -> list[FileDescriptor]:
        """Every eventfd, for ``query-fds``."""
        return list(self._fds.values())

    @property
    def under_way(self) -> bool:
        """Whether one that was rung is being written."""
        return bool(self._tasks)

    def keep(self, owner: str, given: Given) -> list[DoorbellState]:
        """Describe those that were given."""
        from vfiod.server.state.doors import DoorbellState

        return [
            DoorbellState(fd=given.give(fd, f"{owner}/doorbell"), region=region, offset=offset, data=data)
            for (region, offset, data), fd in self._fds.items()
        ]

    def adopt(self, states: Iterable[DoorbellState], regions: Sequence[Region], taken: Taken) -> None:
        """Have them again, and listen: what was rung meanwhile is still in the eventfd."""
        for one in states:
            fd = self._fds[one.region, one.offset, one.data] = taken.take(one.fd)
            self._listen(fd, regions[one.region], one.offset, one.data)

    def close(self) -> None:
        """Hear nothing any more. Later calls do nothing."""
        self._closed = True
        for fd in self._fds.values():
            self._loop.remove_reader(fd.number)
            fd.close()
        self._fds.clear()

    # --- inside ---------------------------------------------------------------------------------------

    def _what(self, region: Region, offset: int) -> str:
        return f"a doorbell of device '{self._device.name}' ({region.name} at 0x{offset:x})"

    def _eventfd(self, region: Region, offset: int, data: bytes) -> FileDescriptor:
        key = (region.index, offset, data)
        known = self._fds.get(key)
        if known is None:
            known = self._fds[key] = eventfds.make(self._what(region, offset))
            self._listen(known, region, offset, data)
        return known

    def _listen(self, fd: FileDescriptor, region: Region, offset: int, data: bytes) -> None:
        self._loop.add_reader(fd.number, self._rung, fd, region, offset, data)

    def _rung(self, fd: FileDescriptor, region: Region, offset: int, data: bytes) -> None:
        if not eventfds.take_foreign(fd):
            return
        try:
            result = self._ring(region, offset, data)
        except CommandError as error:
            _log.warning("Ringing %s failed: %s", self._what(region, offset), error)
            return
        if not isinstance(result, Answer):
            # Until it is done nothing is heard: who rings without end must not pile up work.
            self._loop.remove_reader(fd.number)
            task: asyncio.Task[None] = self._loop.create_task(self._wait(result, fd, region, offset, data))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _wait(self, result: Awaitable[Any], fd: FileDescriptor, region: Region, offset: int, data: bytes) -> None:
        try:
            await result
        except CommandError as error:
            _log.warning("Ringing %s failed: %s", self._what(region, offset), error)
        finally:
            if not self._closed:
                self._listen(fd, region, offset, data)
