"""The device as a whole, its interrupts and its features.

Source: QEMU ``docs/interop/vfio-user.rst``; numbers of flags, actions and features are those of
``include/uapi/linux/vfio.h`` (:mod:`vfiod.protocol.vfio`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar, Self

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.limits import MAX_VECTORS
from vfiod.protocol.vfio_user.header import BadMessage
from vfiod.protocol.vfio_user.payload import SPECIFIED, Wire, fields_of, sized_data

__all__ = [
    "DeviceFeature",
    "DeviceInfoReply",
    "GetDeviceInfo",
    "GetIrqInfo",
    "IrqInfoReply",
    "MigrationData",
    "MigrationRead",
    "MigrationWrite",
    "SetIrqs",
    "split_irqs",
]

_FOUR = struct.Struct("=IIII")
_TWO = struct.Struct("=II")


class GetDeviceInfo(Struct, frozen=True):
    """Ask what the device is. ``argsz``: bytes of a reply payload the client takes."""

    argsz: int = 16

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return _FOUR.pack(self.argsz, 0, 0, 0)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage when the reply could not be sent."""
        del wire
        argsz, *_ = fields_of(_FOUR, body, "DEVICE_GET_INFO")
        if argsz < _FOUR.size:
            raise BadMessage(f"DEVICE_GET_INFO has argsz {argsz}, its reply has {_FOUR.size} bytes")
        return cls(argsz)


class DeviceInfoReply(Struct, frozen=True):
    """What the device is: 16 bytes, never more; QEMU takes no longer reply."""

    info: vfio.DeviceInfo

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes; capabilities have no place here."""
        del wire
        info = self.info
        flags = info.flags & ~vfio.DeviceFlags.CAPS
        return _FOUR.pack(_FOUR.size, flags, info.num_regions, info.num_irqs)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        del wire
        _, flags, regions, irqs = fields_of(_FOUR, body, "The reply to DEVICE_GET_INFO")
        return cls(vfio.DeviceInfo(vfio.DeviceFlags(flags) & ~vfio.DeviceFlags.CAPS, regions, irqs))


class GetIrqInfo(Struct, frozen=True):
    """Ask what an interrupt index is."""

    index: int
    argsz: int = 16

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return _FOUR.pack(self.argsz, 0, self.index, 0)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage when the reply could not be sent."""
        del wire
        argsz, _, index, _ = fields_of(_FOUR, body, "DEVICE_GET_IRQ_INFO")
        if argsz < _FOUR.size:
            raise BadMessage(f"DEVICE_GET_IRQ_INFO has argsz {argsz}, its reply has {_FOUR.size} bytes")
        return cls(index, argsz)


class IrqInfoReply(Struct, frozen=True):
    """What an interrupt index is."""

    info: vfio.IrqInfo

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return self.info.pack()

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage, also when an index has more interrupts than any can have."""
        del wire
        _, flags, index, count = fields_of(_FOUR, body, "The reply to DEVICE_GET_IRQ_INFO")
        if count > MAX_VECTORS:
            raise BadMessage(f"Interrupt index {index} has {count} interrupts: at most {MAX_VECTORS}")
        return cls(vfio.IrqInfo(index, vfio.IrqFlags(flags), count))


class SetIrqs(Struct, frozen=True):
    """``struct vfio_irq_set`` without eventfds: those travel beside, one for each interrupt, or none at all.

    Attributes:
        index: the interrupt index.
        start: the first interrupt of the range.
        count: interrupts in the range.
        action: mask, unmask or trigger.
        data: what comes with it.
        values: with ``BOOL``: ``count`` booleans.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIII")

    index: int
    start: int
    count: int
    action: vfio.IrqAction
    data: vfio.IrqData = vfio.IrqData.NONE
    values: tuple[bool, ...] = ()

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """20 bytes, and one for each boolean. QEMU and libvfio-user take no room for eventfds in the body."""
        del wire
        body = bytes(self.values)
        argsz = self.LAYOUT.size + len(body)
        return self.LAYOUT.pack(argsz, self.action | self.data, self.index, self.start, self.count) + body

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: flags that are not one ACTION and one DATA, too many interrupts, missing booleans."""
        del wire
        argsz, flags, index, start, count = fields_of(cls.LAYOUT, body, "DEVICE_SET_IRQS")
        if argsz < cls.LAYOUT.size:
            raise BadMessage(f"DEVICE_SET_IRQS has argsz {argsz}, its structure has {cls.LAYOUT.size} bytes")
        kinds = _IRQ_FLAGS.get(flags)
        if kinds is None:
            raise BadMessage(f"DEVICE_SET_IRQS takes one ACTION and one DATA, got flags 0x{flags:x}")
        if start + count > MAX_VECTORS:
            raise BadMessage(f"DEVICE_SET_IRQS of {count} interrupts from {start}: an index has at most {MAX_VECTORS}")
        action, data = kinds
        values: tuple[bool, ...] = ()
        if data is vfio.IrqData.BOOL:
            if len(body) < cls.LAYOUT.size + count:
                raise BadMessage(f"DEVICE_SET_IRQS says it has {count} booleans, {len(body) - cls.LAYOUT.size} came")
            values = tuple(map(bool, body[cls.LAYOUT.size : cls.LAYOUT.size + count]))
        return cls(index, start, count, action, data, values)

    def with_fds(self, fds: Sequence[int]) -> vfio.SetIrqs:
        """The whole request, as the kernel's interface has it; no fds with ``EVENTFD`` take the eventfds away.

        Raises BadMessage when the number of fds is neither ``count`` nor 0, or there are some that nothing asks for.
        """
        eventfds = self.data is vfio.IrqData.EVENTFD
        if fds and (not eventfds or len(fds) != self.count):
            raise BadMessage(
                f"DEVICE_SET_IRQS of {self.count} interrupts with {self.data.name} came with {len(fds)} fds: "
                + (f"{self.count}, or none to take them away" if eventfds else "none")
            )
        given = (tuple(fds) or (-1,) * self.count) if eventfds else ()
        return vfio.SetIrqs(self.index, self.start, self.count, self.action, self.data, given, self.values)


_IRQ_FLAGS = {int(action | data): (action, data) for action in vfio.IrqAction for data in vfio.IrqData}


def split_irqs(request: vfio.SetIrqs, max_fds: int) -> list[tuple[SetIrqs, tuple[int, ...]]]:
    """A request of the kernel's interface as messages with their fds, in order.

    One message has an fd for every interrupt it speaks of, or none (and takes eventfds away): a request that has both
    becomes several, as do more fds than the peer takes at once.

    Args:
        request: what is to be done.
        max_fds: fds of one message that the peer takes, 1 or more.

    """
    head = request.index
    if request.data is not vfio.IrqData.EVENTFD:
        return [(SetIrqs(head, request.start, request.count, request.action, request.data, request.values), ())]
    out: list[tuple[SetIrqs, tuple[int, ...]]] = []
    position = request.start
    for given, run in groupby(request.fds, lambda fd: fd >= 0):
        fds = tuple(run)
        step = max_fds if given else len(fds)
        for begin in range(0, len(fds), step):
            part = fds[begin : begin + step]
            message = SetIrqs(head, position, len(part), request.action, request.data)
            out.append((message, part if given else ()))
            position += len(part)
    return out


class DeviceFeature(Struct, frozen=True):
    """``struct vfio_device_feature``, request and reply: get, set or probe one feature.

    Attributes:
        feature: its number, 16 bits.
        flags: GET, SET, PROBE.
        data: the feature's own.
        argsz: in a request the bytes of a reply payload the client takes; in a reply its own size. 0: that of this.

    """

    HEADER_SIZE: ClassVar[int] = _TWO.size

    feature: int
    flags: vfio.FeatureFlags
    data: bytes = b""
    argsz: int = 0

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes and the data."""
        del wire
        return _TWO.pack(self.argsz or _TWO.size + len(self.data), self.flags | self.feature) + self.data

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: more data than the limit of transfers."""
        argsz, flags = fields_of(_TWO, body, "DEVICE_FEATURE")
        if len(body) - _TWO.size > wire.max_transfer:
            raise BadMessage(f"DEVICE_FEATURE with {len(body)} bytes: at most {wire.max_transfer}", "E2BIG")
        mask = vfio.VFIO_DEVICE_FEATURE_MASK
        return cls(flags & mask, vfio.FeatureFlags(flags & ~mask), body[_TWO.size :], argsz)


class MigrationRead(Struct, frozen=True):
    """MIG_DATA_READ: up to ``size`` bytes of the device's state."""

    size: int
    argsz: int = 0

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes."""
        del wire
        return _TWO.pack(self.argsz or _TWO.size + self.size, self.size)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage; E2BIG above the transfer limit."""
        argsz, size = fields_of(_TWO, body, "MIG_DATA_READ")
        if size > wire.max_transfer:
            raise BadMessage(f"MIG_DATA_READ of {size} bytes: at most {wire.max_transfer} at once", "E2BIG")
        if argsz < _TWO.size + size:
            raise BadMessage(f"MIG_DATA_READ of {size} bytes has argsz {argsz}, its reply may have {_TWO.size + size}")
        return cls(size, argsz)


class MigrationData(Struct, frozen=True):
    """The reply to MIG_DATA_READ; less than asked for: there is no more."""

    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes and the data."""
        del wire
        return _TWO.pack(_TWO.size + len(self.data), len(self.data)) + self.data

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        _, size = fields_of(_TWO, body, "The reply to MIG_DATA_READ")
        return cls(sized_data(body, _TWO.size, size, "The reply to MIG_DATA_READ", wire))


class MigrationWrite(Struct, frozen=True):
    """MIG_DATA_WRITE: the next bytes of the device's state. The reply is a header alone."""

    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes and the data."""
        del wire
        return _TWO.pack(_TWO.size + len(self.data), len(self.data)) + self.data

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        _, size = fields_of(_TWO, body, "MIG_DATA_WRITE")
        return cls(sized_data(body, _TWO.size, size, "MIG_DATA_WRITE", wire))
