"""One attached client: what each of its requests does to the device. On the loop; what blocks is awaited.

Register accesses, nearly all there ever is, are done at once, by few steps (:meth:`ClientSession._fast`). They still
keep the order of the device's lane: when something slow is at work on the device, they wait for their turn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec.structs import replace

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.errors import CommandError, DeviceNotActive, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import VFIO_USER_HANDSHAKE_MS, VFIO_USER_MAX_FDS, VFIO_USER_MAX_INFO
from vfiod.protocol.vfio_user import Command, Request
from vfiod.server import trace
from vfiod.server.devices.device import Device
from vfiod.server.devices.regions import INLINE_BYTES, Region
from vfiod.server.exports.connection import DONE, Answer, Connection
from vfiod.server.exports.doorbells import Doorbells
from vfiod.server.exports.interrupts import ClientInterrupts
from vfiod.server.exports.remote import RemoteMemory
from vfiod.server.exports.whole import WholeRegions
from vfiod.server.kernel.memory import ACCESS_SIZES
from vfiod.server.sockets.access import Peer

if TYPE_CHECKING:
    from vfiod.server.dma.clients import Client
    from vfiod.server.machine import Machine
    from vfiod.server.state.doors import ClientState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["ClientSession"]

_log: Final = logging.getLogger(__name__)

_ACCESS: Final = struct.Struct("=HHIIIQII")
"""A whole REGION_READ, and what a REGION_WRITE begins with: id, command, size, flags, error, offset, region, count."""

_unpack: Final = _ACCESS.unpack_from
_DATA: Final = {size: struct.Struct(f"=HHIIIQII{one}").pack for size, one in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))}
"""Make a whole reply to a REGION_READ of so many bytes."""

_READ: Final = int(Command.REGION_READ)
_WRITE: Final = int(Command.REGION_WRITE)
_REPLY: Final = int(vfio_user.MessageType.REPLY)
_NO_REPLY: Final = int(vfio_user.Flags.NO_REPLY)
_FEATURES: Final = frozenset(
    {vfio.Feature.LOW_POWER_ENTRY, vfio.Feature.LOW_POWER_EXIT, vfio.Feature.BUS_MASTER},
)
"""The device's features a client may probe, get and set: those that touch the device alone.

Not the VF token (a secret between drivers of the host), not migration and DMA logging (vfiod migrates nothing), not
those that come with a file, for which the message has no place (wake-up eventfd, DMA-BUF).
"""

_HEADER: Final = vfio_user.Header.LAYOUT


class ClientSession:
    """One client, from its connection to its end.

    Args:
        machine: the machine.
        device: the device.
        name: of the export, for messages: ``export 'e0'``.
        connection: the socket, connected.
        peer: who is there.
        attached: called on the loop when the handshake is done and the device is the client's.
        ended: called once, soon after the connection has ended, with the reason.

    Attributes:
        peer: as given.
        version: what it proposed; None before the handshake.
        memory: what it has mapped; None before the handshake.
        interrupts: its interrupts.
        failed_reads: reads of registers that failed, and were answered with all ones.

    """

    def __init__(
        self,
        machine: Machine,
        device: Device,
        name: str,
        connection: socket.socket,
        peer: Peer,
        *,
        attached: Callable[[], None],
        ended: Callable[[str], None],
    ) -> None:
        self.peer: Final = peer
        self.version: vfio_user.Version | None = None
        self.memory: Client | None = None
        self.interrupts: Final = ClientInterrupts(device, f"the client of {name}")
        self.failed_reads = 0
        self.mapped: Final[set[int]] = set()
        self._doorbells: Final = Doorbells(
            machine.loop, device, lambda region, at, data: self._write(region, at, data, DONE)
        )
        self._machine = machine
        self._device = device
        self._name = name
        self._attached = attached
        self._ended = ended
        self._room = 0  # bytes of its VERSION
        self._regions: tuple[Region, ...] = ()
        self._direct = 0  # regions that are accessed at once: all, of a device that waits for nobody
        self._whole = WholeRegions(device) if device.whole_regions else None
        self._handlers: Final[dict[Command, Callable[[Request], Answer | Awaitable[Answer]]]] = {
            Command.VERSION: self._negotiate,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._migration,
            Command.MIG_DATA_WRITE: self._migration,
        }
        self._connection: Final = Connection(
            machine.loop, connection, execute=self._execute, fast=self._fast, ended=self._over
        )
        self._patience: asyncio.TimerHandle | None = machine.loop.call_later(
            VFIO_USER_HANDSHAKE_MS / 1000, self._too_late
        )

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen to it."""
        self._connection.start()

    @property
    def open(self) -> bool:
        """Whether it is there."""
        return self._connection.open

    @property
    def requests(self) -> int:
        """How many requests have come."""
        return self._connection.requests

    @property
    def errors(self) -> int:
        """How many were refused."""
        return self._connection.errors

    @property
    def max_transfer(self) -> int:
        """Bytes of data in one message."""
        return self._connection.channel.wire.max_transfer

    def fileno(self) -> int:
        """The socket, lent; -1 once it has ended."""
        return self._connection.fileno()

    def end(self, reason: str) -> None:
        """Disconnect it now."""
        self._connection.end(reason)

    async def settled(self) -> None:
        """Wait until what it asked for last has been done."""
        await self._connection.settled()

    def ask(self, payload: vfio_user.Payload, answer: Any) -> None:
        """See :class:`~vfiod.server.exports.remote.Asker`."""
        self._connection.ask(payload, answer)

    def forget(self, answer: Any) -> None:
        """See :class:`~vfiod.server.exports.remote.Asker`."""
        self._connection.forget(answer)

    def _too_late(self) -> None:
        self._patience = None
        self._connection.end(f"The client has sent no VERSION within {VFIO_USER_HANDSHAKE_MS} ms")

    def _over(self, reason: str) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._doorbells.close()
        self._ended(reason)

    def _execute(self, request: Request) -> Answer | Awaitable[Answer]:
        if trace.export_request.on:
            trace.export_request(export=self._name, request=request.header.title, size=request.header.size)
        return self._handlers[request.command](request)

    # --- the handshake --------------------------------------------------------------------------------

    def _negotiate(self, request: Request) -> Awaitable[Answer]:
        return self._attach(request, cast("vfio_user.Version", request.payload))

    async def _attach(self, request: Request, proposed: vfio_user.Version) -> Answer:
        try:
            return await self._agree(request, proposed)
        except (CommandError, vfio_user.BadMessage) as error:
            self._machine.loop.call_soon(self._connection.part, f"There is no agreement: {error}")
            raise

    async def _agree(self, request: Request, proposed: vfio_user.Version) -> Answer:
        """Agree on what holds, and take the device for the client: what the monitor started on it ends."""
        space = self._device.backend.address_space
        if space is None:
            raise DeviceNotActive(f"Device '{self._device.name}' has no IOMMU: guest memory cannot be mapped for it")
        ours = replace(vfio_user.OURS, pgsizes=space.page_size)
        room = request.header.size - vfio_user.HEADER_SIZE
        reply, agreement = vfio_user.answer(proposed, ours, room=room)
        remote = RemoteMemory(f"memory of {self._name}", self._machine.loop, self) if _by_messages(space) else None

        await self._device.stop_interrupts(reason=f"a client attaches to {self._name}")
        clients = self._machine.memory.clients
        async with self._machine.topology.turn(f"a client attaches to {self._name}"):
            if not self._connection.open:
                raise DeviceNotActive("The client is gone")
            self.memory = clients.join(f"the client of {self._name}", space, remote)
        self._have(proposed, room)
        self._connection.channel.wire = agreement.wire
        self._attached()
        return Answer(reply)

    # --- memory ---------------------------------------------------------------------------------------

    def _joined(self) -> Client:
        memory = self.memory
        if memory is None:
            raise DeviceNotActive("There is no memory before VERSION", errno="EINVAL")
        return memory

    def _dma_map(self, request: Request) -> Answer | Awaitable[Answer]:
        asked = cast("vfio_user.DmaMap", request.payload)
        memory = self._joined()
        fd = request.fds.pop() if request.fds else None

        def work() -> None:
            if not asked.readable:
                flags = vfio_user.DmaFlags(asked.flags & (vfio_user.DmaFlags.READ | vfio_user.DmaFlags.WRITE))
                raise InvalidArgument(f"DMA_MAP with {flags!r}: memory that devices reach is readable at least")
            memory.map(asked.address, asked.size, fd, offset=asked.offset, readonly=not asked.writable)

        if not self._alone():
            return self._map_later(asked, fd, work)
        try:
            work()
        except CommandError as error:
            self._not_mapped(fd, error)
            raise
        self._mapped(asked, fd)
        return DONE

    async def _map_later(self, asked: vfio_user.DmaMap, fd: FileDescriptor | None, work: Callable[[], None]) -> Answer:
        try:
            await self._change_memory("dma-map of an export", work)
        except CommandError as error:
            self._not_mapped(fd, error)
            raise
        self._mapped(asked, fd)
        return DONE

    def _not_mapped(self, fd: FileDescriptor | None, error: CommandError) -> None:
        if fd is not None:
            fd.close()
        # The client may not hear the error (QEMU does not look), and its guest would run on memory that the
        # device cannot reach.
        self._machine.loop.call_soon(self._connection.part, f"Its memory could not be mapped: {error}")

    def _mapped(self, asked: vfio_user.DmaMap, fd: FileDescriptor | None) -> None:
        memory = self._joined()
        if memory.unreachable_bytes and fd is None and not memory.by_messages:
            _log.info(
                "%s maps %d bytes at 0x%x without a file: device '%s' cannot reach them (share=on?)",
                memory.name,
                asked.size,
                asked.address,
                self._device.name,
            )

    def _dma_unmap(self, request: Request) -> Answer | Awaitable[Answer]:
        asked = cast("vfio_user.DmaUnmap", request.payload)
        memory = self._joined()

        def work() -> None:
            if asked.everything:
                memory.unmap_all()
            else:
                memory.unmap(asked.address, asked.size)

        if not self._alone():
            return self._unmap_later(asked, work)
        work()
        return Answer(asked)

    async def _unmap_later(self, asked: vfio_user.DmaUnmap, work: Callable[[], None]) -> Answer:
        await self._change_memory("dma-unmap of an export", work)
        return Answer(asked)

    def _alone(self) -> bool:
        """Whether memory may be changed at once, without a task: nothing else of the client's waits behind it.

        With many in a row the others have their turns of the loop in between.
        """
        return not self._connection.queued and self._quick()

    def _quick(self) -> bool:
        """Whether changing its memory waits for nobody: else it is done in its lane, in a thread."""
        memory = self._joined()
        # A device that asks its client holds its memory's lock meanwhile, and the loop brings it the answer.
        return memory.quick and not memory.unreachable_bytes and self._machine.topology.free

    async def _change_memory(self, what: str, work: Callable[[], None]) -> None:
        if self._quick():
            work()
        else:
            await self._machine.topology.run(what, work)

    # --- what the device is ---------------------------------------------------------------------------

    def _device_info(self, request: Request) -> Answer:
        del request
        device = self._device
        info = device.backend.info()
        return Answer(
            vfio_user.DeviceInfoReply(
                vfio.DeviceInfo(info.flags, len(device.regions.all), len(device.interrupts.indexes))
            )
        )

    def _region(self, index: int) -> Region:
        if index >= len(self._regions):
            raise InvalidArgument(f"Device '{self._device.name}' has regions 0 to {len(self._regions) - 1}, no {index}")
        return self._regions[index]

    def _region_info(self, request: Request) -> Answer:
        asked = cast("vfio_user.GetRegionInfo", request.payload)
        region = self._region(asked.index)
        info = self._shown(region)
        reply = vfio_user.RegionInfoReply.answering(asked, info)
        if not info.mappable or not reply.complete:
            return Answer(reply)
        answer = Answer(reply, (self._device.share_region(region),))
        self.mapped.add(region.index)
        return answer

    def _shown(self, region: Region) -> vfio.RegionInfo:
        """A region as its client may use it: what may be mapped is what the device model lets be mapped."""
        own = region.info if self._whole is None else self._whole.info(region)
        options = self._device.options
        flags = own.flags & (vfio.RegionFlags.READ | vfio.RegionFlags.WRITE)
        capabilities: list[vfio.Capability] = [] if own.type is None else [own.type]
        if region.areas and options.share_fd and not options.no_mmap:
            flags |= vfio.RegionFlags.MMAP
            areas = tuple(vfio.Area(offset, size) for offset, size in region.areas)
            if areas != (vfio.Area(0, own.size),):
                capabilities.append(vfio.SparseMmap(areas))
            if own.msix_mappable:
                capabilities.append(vfio.MsixMappable())
        return vfio.RegionInfo(region.index, flags, own.size, own.offset, tuple(capabilities))

    def _region_io_fds(self, request: Request) -> Answer:
        asked = cast("vfio_user.GetRegionIoFds", request.payload)
        told = None if self.version is None else self.version.capabilities
        max_fds = (told or vfio_user.Capabilities()).fds
        self._joined()
        return self._doorbells.answer(asked, self._region(asked.index), min(max_fds, VFIO_USER_MAX_FDS))

    def _irq_info(self, request: Request) -> Answer:
        asked = cast("vfio_user.GetIrqInfo", request.payload)
        return Answer(vfio_user.IrqInfoReply(self.interrupts.info(asked.index)))

    async def _feature(self, request: Request) -> Answer:
        asked = cast("vfio_user.DeviceFeature", request.payload)
        if asked.feature not in _FEATURES:
            raise OperationFailed(
                "VFIO_DEVICE_FEATURE",
                f"device '{self._device.name}'",
                errno="ENOTTY",
                advice=f"feature {asked.feature} is not passed on to clients",
            )
        room = min(asked.argsz - vfio_user.DeviceFeature.HEADER_SIZE, VFIO_USER_MAX_INFO)
        wanted = vfio.DeviceFeature(asked.feature, asked.flags, asked.data)
        data = await self._device.feature(wanted, max(room, 0))
        return Answer(vfio_user.DeviceFeature(asked.feature, asked.flags, data))

    def _migration(self, request: Request) -> Answer:
        raise OperationFailed(
            request.command.name, f"device '{self._device.name}'", errno="EOPNOTSUPP", advice="it does not migrate"
        )

    # --- interrupts and reset -------------------------------------------------------------------------

    def _set_irqs(self, request: Request) -> Answer | Awaitable[Answer]:
        whole = self.interrupts.check(cast("vfio_user.SetIrqs", request.payload), request.fds)

        def act() -> Answer:
            self.interrupts.set(whole, request.fds)
            return DONE

        return self._device.in_order("SET_IRQS of an export", act)

    async def _reset(self, request: Request) -> Answer:
        del request
        if not self._device.can_reset:
            raise OperationFailed("VFIO_DEVICE_RESET", f"device '{self._device.name}'", errno="ENOTTY")
        await self._device.reset()
        return DONE

    # --- registers ------------------------------------------------------------------------------------

    def _fast(self, data: bytearray, size: int) -> bytes | None:
        """A register access that is a whole message by itself, and can be done now; None: it is something else."""
        if size < 32 or size > 40:
            return None
        number, command, told, flags, _, offset, index, count = _unpack(data)
        pack = _DATA.get(count)
        if told != size or index >= self._direct or pack is None or offset % count or trace.export_request.on:
            return None
        region, device = self._regions[index], self._device
        if not device.lane.free or (region.overlay is not None and not region.overlay.ready):
            return None
        memory = self.memory
        if (
            memory is not None
            and memory.unreachable_bytes
            and device.access_waits(region, offset, count, write=command == _WRITE)
        ):
            return None
        try:
            if command == _READ and size == 32 and not flags:
                value = device.load(region, offset, count)
                return pack(number, _READ, 32 + count, _REPLY, 0, offset, index, count, value)
            if command == _WRITE and size == 32 + count and not flags & ~_NO_REPLY:
                device.store(region, offset, count, int.from_bytes(data[32:size], "little"))
                if flags:
                    return b""
                return _ACCESS.pack(number, _WRITE, 32, _REPLY, 0, offset, index, count)
        except InvalidArgument:
            return None  # refused before anything was accessed: said in full below
        except CommandError as error:
            if command == _READ:
                ones = self._failed_read(region, offset, count, error)
                head = _ACCESS.pack(number, _READ, 32 + count, _REPLY, 0, offset, index, count)
                return head + ones
            if flags:
                _log.warning("A posted write of %d bytes to %s at 0x%x failed: %s", count, region.name, offset, error)
                return b""
            code = vfio_user.errno_number(error.errno)
            error_reply = _REPLY | int(vfio_user.Flags.ERROR)
            return _HEADER.pack(number, _WRITE, vfio_user.HEADER_SIZE, error_reply, code)
        return None

    def _failed_read(self, region: Region, offset: int, count: int, error: CommandError) -> bytes:
        """What hardware gives when nobody answers. The first is logged; all are counted."""
        self.failed_reads += 1
        level = logging.WARNING if self.failed_reads == 1 else logging.DEBUG
        _log.log(level, "%s reads all ones from %s at 0x%x: %s", self._name, region.name, offset, error)
        return b"\xff" * count

    def _region_read(self, request: Request) -> Answer | Awaitable[Answer]:
        asked = cast("vfio_user.RegionRead", request.payload)
        region, offset, count = self._region(asked.region), asked.offset, asked.count
        if not count:
            return Answer(vfio_user.RegionData(region.index, offset, b""))
        if self._whole is not None:
            return self._whole.read(region, offset, count)
        self._device.regions.check(region, offset, count, write=False)

        def read() -> Answer:
            try:
                data = self._read_now(region, offset, count)
            except InvalidArgument:
                raise
            except CommandError as error:
                data = self._failed_read(region, offset, count, error)
            return Answer(vfio_user.RegionData(region.index, offset, data))

        if count > INLINE_BYTES or not region.ready or self._device.access_waits(region, offset, count, write=False):
            return self._read_long(region, offset, count)
        return self._device.in_order("REGION_READ of an export", read)

    def _read_now(self, region: Region, offset: int, count: int) -> bytes:
        if count in ACCESS_SIZES and not offset % count:
            return self._device.load(region, offset, count).to_bytes(count, "little")
        return self._device.read_now(region, offset, count)

    async def _read_long(self, region: Region, offset: int, count: int) -> Answer:
        try:
            data = await self._device.read(region, offset, count)
        except (InvalidArgument, DeviceNotActive):
            raise
        except CommandError as error:
            data = self._failed_read(region, offset, count, error)
        return Answer(vfio_user.RegionData(region.index, offset, data))

    def _region_write(self, request: Request) -> Answer | Awaitable[Answer]:
        asked = cast("vfio_user.RegionWrite", request.payload)
        done = Answer(vfio_user.RegionWritten(asked.region, asked.offset, len(asked.data)))
        region = self._region(asked.region)
        return self._write(region, asked.offset, asked.data, done)

    def _write(self, region: Region, offset: int, data: bytes, done: Answer) -> Answer | Awaitable[Answer]:
        count = len(data)
        if not count:
            return done
        if self._whole is not None:
            return self._whole.write(region, offset, data, done)
        self._device.regions.check(region, offset, count, write=True)
        if count > INLINE_BYTES or self._device.access_waits(region, offset, count, write=True):
            return self._write_long(region, offset, data, done)

        def write() -> Answer:
            if count in ACCESS_SIZES and not offset % count:
                self._device.store(region, offset, count, int.from_bytes(data, "little"))
            else:
                self._device.write_now(region, offset, data)
            return done

        return self._device.in_order("REGION_WRITE of an export", write)

    async def _write_long(self, region: Region, offset: int, data: bytes, done: Answer) -> Answer:
        await self._device.write(region, offset, data)
        return done

    async def _write_multi(self, request: Request) -> Answer:
        asked = cast("vfio_user.WriteMulti", request.payload)
        for number, one in enumerate(asked.writes):
            try:
                result = self._write(self._region(one.region), one.offset, one.data, DONE)
                if not isinstance(result, Answer):
                    await result
            except CommandError as error:
                if not number:
                    raise
                _log.warning("Write %d of %d of a REGION_WRITE_MULTI failed: %s", number, len(asked.writes), error)
                return Answer(vfio_user.WroteMulti(number))
        return Answer(vfio_user.WroteMulti(len(asked.writes)))

    # --- over a change of the process -----------------------------------------------------------------

    def hold(self) -> None:
        """Take nothing more from it."""
        self._connection.hold()

    def release(self) -> None:
        """Go on with it."""
        self._connection.release()

    @property
    def under_way(self) -> str | None:
        """What has begun, for a person; None: it could be described."""
        return "a doorbell of a client" if self._doorbells.under_way else self._connection.under_way

    def keep(self, owner: str, given: Given) -> ClientState:
        """Describe it, between two requests."""
        from vfiod.server.state.doors import ClientState

        data, fds, out = self._connection.keep(owner, given)
        clients = self._machine.memory.clients
        return ClientState(
            fd=given.give(self.fileno(), f"{owner}/client"),
            pid=self.peer.pid,
            uid=self.peer.uid,
            version=None if self.version is None else self.version.pack(),
            room=self._room,
            input=data,
            input_fds=fds,
            output=out,
            notices=self.interrupts.keep(owner, given),
            doorbells=self._doorbells.keep(owner, given),
            ranges=[] if self.memory is None else clients.keep(self.memory, given),
            requests=self.requests,
            errors=self.errors,
            failed_reads=self.failed_reads,
            mapped=sorted(self.mapped),
        )

    def adopt(self, state: ClientState, taken: Taken) -> bool:
        """Be where the other process's session stood, before :meth:`start`. Whether it is attached."""
        self.failed_reads = state.failed_reads
        self.mapped.update(state.mapped)
        if state.version is None:
            self._connection.adopt(None, state, taken)
            return False
        proposed = vfio_user.Version.unpack(state.version)
        space = self._device.backend.address_space
        assert space is not None  # noqa: S101 - without one nobody attaches
        ours = replace(vfio_user.OURS, pgsizes=space.page_size)
        _, agreement = vfio_user.answer(proposed, ours, room=state.room)
        clients = self._machine.memory.clients
        remote = RemoteMemory(f"memory of {self._name}", self._machine.loop, self) if _by_messages(space) else None
        self.memory = clients.join(f"the client of {self._name}", space, remote)
        clients.adopt(self.memory, state.ranges, taken)
        self._have(proposed, state.room)
        self.interrupts.adopt(state.notices, taken)
        self._doorbells.adopt(state.doorbells, self._regions, taken)
        self._connection.adopt(agreement.wire, state, taken)
        return True

    def _have(self, proposed: vfio_user.Version, room: int) -> None:
        """It is agreed: the device's regions are the client's."""
        self.version, self._room = proposed, room
        self._regions = self._device.regions.all
        self._direct = 0 if self._device.waits or self._whole is not None else len(self._regions)
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # --- the end --------------------------------------------------------------------------------------

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """Eventfds of its own by what they are for, for ``query-fds``."""
        notices = [("notice", fd) for fd in self.interrupts.fds()]
        return notices + [("doorbell", fd) for fd in self._doorbells.fds()]


def _by_messages(space: object) -> bool:
    """Whether devices of this address space can ask for memory: those written in Python."""
    return bool(getattr(space, "by_messages", False))
