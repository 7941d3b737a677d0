"""The subchannel-status word of command mode: what a subchannel is doing, and how the last program ended.

Source: Principles of Operation (SA22-7832), chapter 16, "Subchannel-Status Word"; field names of
``arch/s390/include/asm/scsw.h``.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.channel.ccw import exact

__all__ = ["Actl", "Cstat", "Dstat", "Fctl", "Scsw", "ScswFlags", "Stctl"]


class ScswFlags(enum.IntFlag):
    """One-bit fields of the first halfword of an SCSW (key, deferred condition code and fctl aside)."""

    SCTL = 1 << 27
    """S: suspend control, as in the ORB."""
    ESWF = 1 << 26
    """L: the ESW is of format 0."""
    FMT = 1 << 23
    PFCH = 1 << 22
    ISIC = 1 << 21
    ALCC = 1 << 20
    SSI = 1 << 19
    ZCC = 1 << 18
    """Z: the initial status had condition code 0."""
    ECTL = 1 << 17
    """E: the ECW holds something."""
    PNO = 1 << 16
    """N: a path was not operational."""


class Fctl(enum.IntFlag):
    """Function control: what was accepted."""

    CLEAR = 1
    HALT = 2
    START = 4


class Actl(enum.IntFlag):
    """Activity control: what it is doing."""

    SUSPENDED = 0x01
    DEVICE_ACTIVE = 0x02
    SUBCHANNEL_ACTIVE = 0x04
    CLEAR_PENDING = 0x08
    HALT_PENDING = 0x10
    START_PENDING = 0x20
    RESUME_PENDING = 0x40


class Stctl(enum.IntFlag):
    """Status control: which kind of status waits to be read."""

    STATUS_PENDING = 0x01
    SECONDARY = 0x02
    PRIMARY = 0x04
    INTERMEDIATE = 0x08
    ALERT = 0x10


class Dstat(enum.IntFlag):
    """Device status."""

    UNIT_EXCEPTION = 0x01
    UNIT_CHECK = 0x02
    DEVICE_END = 0x04
    CHANNEL_END = 0x08
    BUSY = 0x10
    CONTROL_UNIT_END = 0x20
    STATUS_MODIFIER = 0x40
    ATTENTION = 0x80


class Cstat(enum.IntFlag):
    """Subchannel status."""

    CHAINING_CHECK = 0x01
    INTERFACE_CONTROL_CHECK = 0x02
    CHANNEL_CONTROL_CHECK = 0x04
    CHANNEL_DATA_CHECK = 0x08
    PROTECTION_CHECK = 0x10
    PROGRAM_CHECK = 0x20
    INCORRECT_LENGTH = 0x40
    PROGRAM_CONTROLLED_INTERRUPTION = 0x80


# Making a flag of a number takes a microsecond; each of these has 1024 values at most.
_scsw_flags = functools.lru_cache(None)(ScswFlags)
_fctl = functools.lru_cache(None)(Fctl)
_actl = functools.lru_cache(None)(Actl)
_stctl = functools.lru_cache(None)(Stctl)
_dstat = functools.lru_cache(None)(Dstat)
_cstat = functools.lru_cache(None)(Cstat)
_NONE: Final = ScswFlags(0)

# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_PENDING: Final = int(Stctl.STATUS_PENDING)
_ALERTED: Final = int(Stctl.STATUS_PENDING | Stctl.ALERT)
_GOES_ON: Final = int(Actl.SUBCHANNEL_ACTIVE | Actl.DEVICE_ACTIVE | Actl.SUSPENDED)


class Scsw(Struct, frozen=True):
    """``struct cmd_scsw``: 12 bytes.

    Attributes:
        key: storage key.
        flags: see :class:`ScswFlags`.
        cc: deferred condition code: 0; 1 status pending instead of the start; 3 no path works.
        fctl: functions accepted.
        actl: what goes on.
        stctl: kind of status.
        cpa: usually the address of the last CCW used, plus 8.
        dstat: device status.
        cstat: subchannel status.
        count: bytes of the last CCW that were not moved.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">IIBBH")

    key: int = 0
    flags: ScswFlags = _NONE
    cc: int = 0
    fctl: Fctl = Fctl(0)
    actl: Actl = Actl(0)
    stctl: Stctl = Stctl(0)
    cpa: int = 0
    dstat: Dstat = Dstat(0)
    cstat: Cstat = Cstat(0)
    count: int = 0

    @property
    def pending(self) -> bool:
        """Whether it holds status at all."""
        return int.__and__(self.stctl, _PENDING) != 0

    @property
    def solicited(self) -> bool:
        """Whether it is the answer to a start, halt or clear (``scsw_cmd_is_solicited`` of the kernel)."""
        return self.cc != 0 or int(self.stctl) != _ALERTED

    @property
    def active(self) -> bool:
        """Whether the program goes on after this status: more will come."""
        return int.__and__(self.actl, _GOES_ON) != 0

    def pack(self) -> bytes:
        """12 bytes."""
        # By integers: "|" of flags makes flags, and takes its time for it.
        word = (
            self.key << 28
            | int(self.flags)
            | self.cc << 24
            | int(self.fctl) << 12
            | int(self.actl) << 5
            | int(self.stctl)
        )
        return self.LAYOUT.pack(word, self.cpa, self.dstat, self.cstat, self.count)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 12 bytes, whatever they say."""
        word, cpa, dstat, cstat, count = exact(cls.LAYOUT, data, "An SCSW")
        return cls(
            key=word >> 28,
            flags=_scsw_flags(word & 0x0CFF0000),
            cc=word >> 24 & 3,
            fctl=_fctl(word >> 12 & 7),
            actl=_actl(word >> 5 & 0x7F),
            stctl=_stctl(word & 0x1F),
            cpa=cpa,
            dstat=_dstat(dstat),
            cstat=_cstat(cstat),
            count=count,
        )
