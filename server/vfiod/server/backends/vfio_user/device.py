"""A device that another program serves, as a backend, and what its DMA reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import GroupInfo
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.vfio_user import (
    DeviceFeature,
    RegionData,
    RegionRead,
    RegionWrite,
    RegionWritten,
)
from vfiod.server.backends.base import AddressSpace, Mapping
from vfiod.server.backends.vfio_user.peer import Peer
from vfiod.server.backends.vfio_user.seen import Seen
from vfiod.server.mdev.space import Piece

__all__ = ["VfioUserBackend", "VfioUserSpace"]

T = TypeVar("T")

_CONFIG: Final = int(vfio.PciRegion.CONFIG)

ALL_ADDRESSES: Final = (0, (1 << 64) - 1)


class VfioUserSpace:
    """What the server can reach (:class:`AddressSpace`): all guest memory, by fds of it where it takes them."""

    def __init__(self, peer: Peer) -> None:
        self.name = f"vfio-user:{peer.user}"
        self.page_size = peer.agreement.page_size
        self._peer = peer

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Everything below 2**64."""
        return (ALL_ADDRESSES,)

    def map(self, mapping: Mapping) -> None:
        """See :class:`AddressSpace`. The server may use it as soon as it knows of it, and not before it can."""
        piece = Piece(mapping.iova, mapping.size, mapping.memory, mapping.offset, mapping.readonly)
        self._peer.translation.add(piece)
        try:
            self._peer.map(mapping)
        except BaseException:
            self._peer.translation.remove(mapping.iova, mapping.size)
            raise

    def know(self, mapping: Mapping) -> None:
        """It is mapped already: the server was told by the process whose place this one took."""
        self._peer.translation.add(Piece(mapping.iova, mapping.size, mapping.memory, mapping.offset, mapping.readonly))
        self._peer.know(mapping)

    def unmap(self, iova: int, size: int) -> None:
        """See :class:`AddressSpace`."""
        self._peer.unmap(iova, size)
        self._peer.translation.remove(iova, size)


class VfioUserBackend:
    """One device (:class:`~vfiod.server.backends.base.Backend`)."""

    kind = "vfio-user"
    given_out = False
    compatible = None
    may_block = True
    prompt = False
    foreign = True

    def __init__(self, peer: Peer, space: VfioUserSpace, left: Callable[[AddressSpace], None]) -> None:
        self.name = peer.what
        self._peer = peer
        self._space = space
        self._left = left
        self._closed = False
        self._seen = Seen()
        self._recalling = False

    # --- over a change of the process -------------------------------------------------------------------------

    @property
    def peer(self) -> Peer:
        """Its server."""
        return self._peer

    @property
    def seen(self) -> Seen:
        """What it has shown of itself."""
        return self._seen

    def recall(self, seen: Seen) -> None:
        """Until :meth:`look_again` ask it nothing, and have it be what another process has seen."""
        self._seen, self._recalling = seen, True

    def look_again(self) -> None:
        """From now on ask it."""
        self._recalling = False

    def forsake(self) -> None:
        """It does not come to a device: close it, unless its connection is still another process's."""
        if not self._peer.has_link:
            self.close()

    @property
    def address_space(self) -> AddressSpace:
        """Its own."""
        return self._space

    @property
    def group(self) -> GroupInfo | None:
        """None: it is the server that knows of groups, if there is one."""
        return None

    def give_out(self) -> None:
        """Nothing to note: what is given out is the server's memory."""

    # --- looking: asked when connected, known since ---------------------------------------------------------

    def info(self) -> vfio.DeviceInfo:
        """See :class:`Backend`."""
        return self._peer.facts.info

    def region_info(self, index: int) -> vfio.RegionInfo:
        """See :class:`Backend`."""
        return self._known(self._peer.facts.regions, index, "DEVICE_GET_REGION_INFO")

    def irq_info(self, index: int) -> vfio.IrqInfo:
        """See :class:`Backend`."""
        return self._known(self._peer.facts.irqs, index, "DEVICE_GET_IRQ_INFO")

    def _known(self, known: tuple[T | OperationFailed, ...], index: int, operation: str) -> T:
        if not 0 <= index < len(known):
            raise OperationFailed(f"VFIO_USER_{operation}", f"{self.name} index {index}", errno="EINVAL")
        told = known[index]
        if isinstance(told, OperationFailed):
            raise told.with_traceback(None)
        return told

    def region_fd(self, index: int) -> int | None:
        """See :class:`Backend`."""
        fd = self._peer.facts.files.get(index)
        if fd is None and index < len(self._peer.facts.regions):
            info = self._peer.facts.regions[index]
            if isinstance(info, vfio.RegionInfo) and info.mappable:
                self._peer.check_there("mmap")  # it was not found again since this process was started
        return None if fd is None else fd.number

    def hot_reset_info(self) -> vfio.HotResetInfo:
        """A device of another program has no bus here. OperationFailed, EOPNOTSUPP."""
        raise self._no_bus("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO")

    def hot_reset(self, group_fds: Sequence[int]) -> None:
        """See :meth:`hot_reset_info`."""
        del group_fds
        raise self._no_bus("VFIO_DEVICE_PCI_HOT_RESET")

    def _no_bus(self, operation: str) -> OperationFailed:
        advice = "vfio-user has no reset of a bus: use device-reset"
        return OperationFailed(operation, self.name, errno="EOPNOTSUPP", advice=advice)

    # --- access: blocks --------------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, length: int) -> bytes:
        """See :class:`Backend`."""
        if self._recalling:
            return self._seen.recall(index, offset, length, self._what(index))
        try:
            data = self.region_read_some(index, offset, length)
        except OperationFailed:
            self._seen.refused(index)
            raise
        if self._is_pci:
            self._seen.note(index, offset, data)
        if len(data) != length:
            advice = f"{length} bytes were asked for at offset 0x{offset:x}, {len(data)} came"
            raise OperationFailed("VFIO_USER_REGION_READ", self._what(index), errno="EIO", advice=advice)
        return data

    def region_read_some(self, index: int, offset: int, length: int) -> bytes:
        """See :class:`Backend`."""
        limit = self._peer.agreement.wire.max_transfer
        parts: list[bytes] = []
        done = 0
        while done < length:
            wanted = min(length - done, limit)
            part = self._read(index, offset + done, wanted)
            parts.append(part)
            done += len(part)
            if len(part) < wanted:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read(self, index: int, offset: int, length: int) -> bytes:
        reply = self._peer.ask(RegionRead(index, offset, length)).payload
        if not isinstance(reply, RegionData) or len(reply.data) > length:
            raise self._nonsense("REGION_READ", index, f"more than the {length} bytes that were asked for")
        return reply.data

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """See :class:`Backend`. What is written to configuration space is given to its server again."""
        if index == _CONFIG and self._is_pci:
            self._peer.write_config(offset, lambda: self._write(index, offset, data), data, self._config)
        else:
            self._write(index, offset, data)

    @property
    def _is_pci(self) -> bool:
        """Whether its regions are those of a PCI device: of any other, the numbers mean nothing."""
        return vfio.DeviceFlags.PCI in self._peer.facts.info.flags

    def _config(self, offset: int, length: int) -> bytes:
        return self.region_read(_CONFIG, offset, length)

    def _write(self, index: int, offset: int, data: bytes) -> None:
        limit = self._peer.agreement.wire.max_transfer
        for done in range(0, len(data), limit):
            part = data[done : done + limit]
            reply = self._peer.ask(RegionWrite(index, offset + done, part)).payload
            if not isinstance(reply, RegionWritten) or reply.count > len(part):
                raise self._nonsense("REGION_WRITE", index, f"more than the {len(part)} bytes that were sent")
            if reply.count < len(part):
                advice = f"{len(part)} bytes were sent for offset 0x{offset + done:x}, {reply.count} were written"
                raise OperationFailed("VFIO_USER_REGION_WRITE", self._what(index), errno="EIO", advice=advice)

    def _nonsense(self, operation: str, index: int, what: str) -> OperationFailed:
        return OperationFailed(
            f"VFIO_USER_{operation}", self._what(index), errno="EPROTO", advice=f"the server answers with {what}"
        )

    def _what(self, index: int) -> str:
        return f"{self.name} region {index}"

    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """See :class:`Backend`. On the loop it does not wait, and takes no eventfds."""
        self._peer.set_irqs(request)

    def reset(self) -> None:
        """See :class:`Backend`."""
        self._peer.reset(self._config)

    def doorbells(self, index: int) -> Sequence[tuple[int, bytes]]:
        """None that we know of."""
        del index
        return ()

    def access_waits(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """False: every access waits (``may_block``)."""
        del index, offset, length, write
        return False

    def probe_feature(self, feature: int) -> bool:
        """See :class:`Backend`. What a server does not know, it does not have."""
        if self._recalling:
            return self._seen.features.get(feature, False)
        flags = vfio.FeatureFlags.PROBE | vfio.FeatureFlags.GET
        try:
            self._peer.ask(DeviceFeature(feature, flags)).close()
        except OperationFailed as error:
            if error.errno in ("ENOTCONN", "ETIMEDOUT"):
                raise
            self._seen.features[feature] = False
            return False
        self._seen.features[feature] = True
        return True

    def watch_end(self, gone: Callable[[str], None]) -> None:
        """See :class:`Backend`. It goes with its server, and comes back with it if that is wanted."""
        self._peer.when_lost = gone

    def watch_return(self, back: Callable[[Sequence[int]], None]) -> None:
        """See :class:`Backend`."""
        self._peer.when_back = back

    def feature(self, request: vfio.DeviceFeature, room: int) -> bytes:
        """See :class:`Backend`."""
        asked = DeviceFeature(request.feature, request.flags, request.data, DeviceFeature.HEADER_SIZE + room)
        reply = self._peer.ask(asked)
        reply.close()
        payload = reply.payload
        return payload.data if isinstance(payload, DeviceFeature) and vfio.FeatureFlags.GET in request.flags else b""

    def close(self) -> bool:
        """See :class:`Backend`. True: the server hears that we are gone, and lets go of everything."""
        if not self._closed:
            self._closed = True
            self._peer.close()
            self._left(self._space)
        return True
