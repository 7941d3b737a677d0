"""What devices say of themselves: sense ID, and sense data after a unit check.

Source: "Common I/O-Device Commands and Self Description" (SA22-7204); ``arch/s390/include/asm/ccwdev.h``.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.channel.ccw import BadChannelStructure

__all__ = ["Ciw", "SenseByte0", "SenseId", "sense_words"]


class SenseByte0(enum.IntFlag):
    """Byte 0 of sense data, which all device types have in common."""

    COMMAND_REJECT = 0x80
    INTERVENTION_REQUIRED = 0x40
    BUS_OUT_CHECK = 0x20
    EQUIPMENT_CHECK = 0x10
    DATA_CHECK = 0x08
    OVERRUN = 0x04
    DEVICE_DEPENDENT_6 = 0x02
    DEVICE_DEPENDENT_7 = 0x01


_MEANINGS: Final = {
    SenseByte0.COMMAND_REJECT: "command reject: the device does not do this command, or not now, or not so",
    SenseByte0.INTERVENTION_REQUIRED: "intervention required: somebody has to see to the device",
    SenseByte0.BUS_OUT_CHECK: "bus-out check: a command or data arrived damaged",
    SenseByte0.EQUIPMENT_CHECK: "equipment check: the device is broken",
    SenseByte0.DATA_CHECK: "data check: the medium's data are damaged",
    SenseByte0.OVERRUN: "overrun: the channel was too slow",
    SenseByte0.DEVICE_DEPENDENT_6: "bit 6, which depends on the device type",
    SenseByte0.DEVICE_DEPENDENT_7: "bit 7, which depends on the device type",
}


def sense_words(sense: bytes) -> list[str]:
    """Sense data for a person: the meaning of each bit of byte 0. Empty for empty or zero data."""
    if not sense:
        return []
    return [meaning for bit, meaning in _MEANINGS.items() if sense[0] & bit]


class Ciw(Struct, frozen=True):
    """``struct ciw``: a command-information word: which command does something well known on this device.

    Attributes:
        ct: what it does: 0 read configuration data, 1 set interface identifier, 2 read node identifier.
        cmd: the command code.
        count: how many bytes it moves.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">BBH")

    ct: int
    cmd: int
    count: int

    def pack(self) -> bytes:
        """4 bytes, its entry type 01."""
        return self.LAYOUT.pack(0x40 | self.ct & 0xF, self.cmd, self.count)


class SenseId(Struct, frozen=True):
    """``struct senseid``: what SENSE ID reads; 7 bytes, or more with the CIWs from byte 8 on.

    Attributes:
        cu_type: control unit's type (``0x3990``).
        cu_model: and model.
        dev_type: the device's type (``0x3390``); 0: none.
        dev_model: and model.
        ciws: command-information words.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">BHBHB")

    cu_type: int
    cu_model: int
    dev_type: int = 0
    dev_model: int = 0
    ciws: tuple[Ciw, ...] = ()

    def pack(self) -> bytes:
        """7 bytes; 8 and 4 for each CIW when there are any."""
        fixed = self.LAYOUT.pack(0xFF, self.cu_type, self.cu_model, self.dev_type, self.dev_model)
        return fixed + b"\0" + b"".join(one.pack() for one in self.ciws) if self.ciws else fixed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From at least 7 bytes; what follows is read as far as it holds CIWs."""
        if len(data) < cls.LAYOUT.size or data[0] != 0xFF:
            raise BadChannelStructure(
                f"Sense ID data have {cls.LAYOUT.size} bytes or more and begin with ff, got {data[:8].hex() or 'none'}"
            )
        _, cu_type, cu_model, dev_type, dev_model = cls.LAYOUT.unpack_from(data)
        ciws = []
        for at in range(8, len(data) - 3, 4):
            kind, cmd, count = Ciw.LAYOUT.unpack_from(data, at)
            if kind >> 6 != 1:
                break
            ciws.append(Ciw(kind & 0xF, cmd, count))
        return cls(cu_type, cu_model, dev_type, dev_model, tuple(ciws))

    def describe(self) -> str:
        """For a person: ``control unit 3990-e9, device 3390-0a``."""
        device = f", device {self.dev_type:04x}-{self.dev_model:02x}" if self.dev_type else ""
        return f"control unit {self.cu_type:04x}-{self.cu_model:02x}{device}"
