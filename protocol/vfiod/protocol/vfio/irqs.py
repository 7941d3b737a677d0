"""``struct vfio_irq_set``: everything that is done to interrupts.

``VFIO_DEVICE_SET_IRQS`` has one ACTION (mask, unmask, trigger) on a range of one index, and one kind of DATA:

* ``NONE``: do it now, to all of the range; with TRIGGER and count 0: disable the index.
* ``BOOL``: do it now, to those whose byte is not zero.
* ``EVENTFD``: from now on do it when the eventfd fires (MASK, UNMASK), or fire the eventfd (TRIGGER);
  -1 takes the eventfd away.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Self

from msgspec import Struct

from vfiod.protocol.vfio.capabilities import BadStructure
from vfiod.protocol.vfio.constants import IrqSetFlags

__all__ = ["IrqAction", "IrqData", "SetIrqs"]


class IrqAction(enum.IntEnum):
    """What is done."""

    MASK = IrqSetFlags.ACTION_MASK
    UNMASK = IrqSetFlags.ACTION_UNMASK
    TRIGGER = IrqSetFlags.ACTION_TRIGGER


class IrqData(enum.IntEnum):
    """What comes with it."""

    NONE = IrqSetFlags.DATA_NONE
    BOOL = IrqSetFlags.DATA_BOOL
    EVENTFD = IrqSetFlags.DATA_EVENTFD


_ACTIONS = IrqAction.MASK | IrqAction.UNMASK | IrqAction.TRIGGER
_DATA = IrqData.NONE | IrqData.BOOL | IrqData.EVENTFD


class SetIrqs(Struct, frozen=True):
    """``struct vfio_irq_set``. Build it with :meth:`disable`, :meth:`now`, :meth:`eventfds`, or whole.

    Attributes:
        index: the IRQ index.
        start: the first interrupt of the range within the index.
        count: interrupts in the range.
        action: what is done.
        data: what comes with it.
        fds: with ``EVENTFD``: ``count`` eventfds, -1 for none.
        values: with ``BOOL``: ``count`` booleans.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIII")

    index: int
    start: int
    count: int
    action: IrqAction
    data: IrqData = IrqData.NONE
    fds: tuple[int, ...] = ()
    values: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        fds = self.count if self.data is IrqData.EVENTFD else 0
        values = self.count if self.data is IrqData.BOOL else 0
        if len(self.fds) != fds or len(self.values) != values:
            raise ValueError(
                f"SetIrqs of {self.count} with data {self.data.name} takes {fds} fds and {values} booleans, "
                f"got {len(self.fds)} and {len(self.values)}"
            )

    @classmethod
    def disable(cls, index: int) -> Self:
        """Switch the whole index off: TRIGGER, no data, count 0."""
        return cls(index, 0, 0, IrqAction.TRIGGER)

    @classmethod
    def now(cls, action: IrqAction, index: int, start: int = 0, count: int = 1) -> Self:
        """Mask, unmask or trigger these at once. ``count`` is 1 or more: 0 with TRIGGER would disable the index."""
        if count < 1:
            raise ValueError(f"{action.name} takes a count of 1 or more, got {count}")
        return cls(index, start, count, action)

    @classmethod
    def eventfds(cls, action: IrqAction, index: int, fds: tuple[int, ...], start: int = 0) -> Self:
        """Bind one eventfd per interrupt from ``start`` on; -1 takes the eventfd away."""
        return cls(index, start, len(fds), action, IrqData.EVENTFD, fds)

    @property
    def is_disable(self) -> bool:
        """Whether it switches the whole index off."""
        return self.action is IrqAction.TRIGGER and self.data is IrqData.NONE and self.count == 0

    def describe(self) -> str:
        """A few words for messages: ``TRIGGER of 0 to 3 by EVENTFD``."""
        if self.is_disable:
            return "disable"
        span = str(self.start) if self.count == 1 else f"{self.start} to {self.start + self.count - 1}"
        return f"{self.action.name} of {span}" + ("" if self.data is IrqData.NONE else f" by {self.data.name}")

    def pack(self) -> bytes:
        """With ``argsz``."""
        body = b""
        if self.data is IrqData.EVENTFD:
            body = struct.pack(f"={self.count}i", *self.fds)
        elif self.data is IrqData.BOOL:
            body = bytes(self.values)
        size = self.LAYOUT.size + len(body)
        return self.LAYOUT.pack(size, self.action | self.data, self.index, self.start, self.count) + body

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure` for flags that are not one ACTION and one DATA, and for missing data."""
        if len(buffer) < cls.LAYOUT.size:
            raise BadStructure(f"struct vfio_irq_set has {cls.LAYOUT.size} bytes, {len(buffer)} came")
        _, flags, index, start, count = cls.LAYOUT.unpack_from(buffer)
        try:
            action, data = IrqAction(flags & _ACTIONS), IrqData(flags & _DATA)
        except ValueError:
            raise BadStructure(f"struct vfio_irq_set takes one ACTION and one DATA, got flags 0x{flags:x}") from None
        if flags & ~(_ACTIONS | _DATA):
            raise BadStructure(f"struct vfio_irq_set has no flags 0x{flags & ~(_ACTIONS | _DATA):x}")
        width = {IrqData.NONE: 0, IrqData.BOOL: 1, IrqData.EVENTFD: 4}[data]
        if len(buffer) < cls.LAYOUT.size + width * count:
            raise BadStructure(f"struct vfio_irq_set says {count} interrupts, {len(buffer)} bytes came")
        end = cls.LAYOUT.size + width * count
        if data is IrqData.EVENTFD:
            fds: tuple[int, ...] = struct.unpack_from(f"={count}i", buffer, cls.LAYOUT.size)
            return cls(index, start, count, action, data, fds)
        if data is IrqData.BOOL:
            return cls(index, start, count, action, data, (), tuple(map(bool, buffer[cls.LAYOUT.size : end])))
        return cls(index, start, count, action, data)
