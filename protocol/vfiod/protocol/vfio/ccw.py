"""The regions of ``vfio-ccw``, and the interrupts of ``vfio-ccw`` and ``vfio-ap``.

Source: ``include/uapi/linux/vfio_ccw.h``, ``vfio.h``; ``Documentation/arch/s390/vfio-ccw.rst``. Commands and return
codes are in host order; what the channel subsystem defines (ORB, SCSW, IRB, SCHIB, CRW) is big-endian in itself.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.vfio.capabilities import BadStructure

__all__ = [
    "CRW_REGION_SIZE",
    "SCHIB_REGION_SIZE",
    "VFIO_AP_NUM_IRQS",
    "VFIO_CCW_NUM_IRQS",
    "VFIO_CCW_NUM_REGIONS",
    "ApIrq",
    "AsyncCommand",
    "CcwCmdRegion",
    "CcwIoRegion",
    "CcwIrq",
    "CcwRegion",
    "CcwSubtype",
]


class CcwRegion(enum.IntEnum):
    """``VFIO_CCW_*_REGION_INDEX``. The others are found by their type capability (:class:`CcwSubtype`)."""

    CONFIG = 0


class CcwSubtype(enum.IntEnum):
    """``VFIO_REGION_SUBTYPE_CCW_*``, of type ``VFIO_REGION_TYPE_CCW``."""

    ASYNC_CMD = 1
    SCHIB = 2
    CRW = 3


class CcwIrq(enum.IntEnum):
    """``VFIO_CCW_*_IRQ_INDEX``."""

    IO = 0
    CRW = 1
    REQ = 2


class ApIrq(enum.IntEnum):
    """``VFIO_AP_*_IRQ_INDEX``."""

    REQ = 0
    CFG_CHG = 1


class AsyncCommand(enum.IntFlag):
    """``VFIO_CCW_ASYNC_CMD_*``: HALT SUBCHANNEL, CLEAR SUBCHANNEL."""

    HSCH = 1 << 0
    CSCH = 1 << 1


VFIO_CCW_NUM_REGIONS: Final = 1
VFIO_CCW_NUM_IRQS: Final = 3
VFIO_AP_NUM_IRQS: Final = 2
SCHIB_REGION_SIZE: Final = 52
CRW_REGION_SIZE: Final = 8


class CcwIoRegion(Struct, frozen=True):
    """``struct ccw_io_region``: writing all of it starts the program; reading it gives the IRB.

    Attributes:
        orb: 12 bytes.
        scsw: 12 bytes.
        irb: 96 bytes.
        ret_code: 0, or a negative errno of the host (its number, not its name).

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=12s12s96si")

    orb: bytes = bytes(12)
    scsw: bytes = bytes(12)
    irb: bytes = bytes(96)
    ret_code: int = 0

    def pack(self) -> bytes:
        """124 bytes."""
        return self.LAYOUT.pack(self.orb, self.scsw, self.irb, self.ret_code)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises BadStructure unless there are 124 bytes."""
        if len(data) != cls.LAYOUT.size:
            raise BadStructure(f"struct ccw_io_region has {cls.LAYOUT.size} bytes, {len(data)} came")
        return cls(*cls.LAYOUT.unpack(data))


class CcwCmdRegion(Struct, frozen=True):
    """``struct ccw_cmd_region``: writing all of it halts or clears the subchannel."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=Ii")

    command: AsyncCommand
    ret_code: int = 0

    def pack(self) -> bytes:
        """8 bytes."""
        return self.LAYOUT.pack(self.command, self.ret_code)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises BadStructure unless there are 8 bytes."""
        if len(data) != cls.LAYOUT.size:
            raise BadStructure(f"struct ccw_cmd_region has {cls.LAYOUT.size} bytes, {len(data)} came")
        command, ret_code = cls.LAYOUT.unpack(data)
        return cls(AsyncCommand(command), ret_code)
