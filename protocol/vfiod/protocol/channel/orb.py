"""The operation-request block: what START SUBCHANNEL is given.

Source: Principles of Operation (SA22-7832), chapter 15, "Operation-Request Block"; field names of
``arch/s390/include/asm/orb.h``.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.channel.ccw import LIMIT_24, LIMIT_31, BadChannelStructure, Idaws, exact

__all__ = ["Orb", "OrbFlags"]


class OrbFlags(enum.IntFlag):
    """The one-bit fields of an ORB's second word."""

    SPND = 1 << 27
    """S: the program may suspend itself."""
    STREAMING = 1 << 26
    """C."""
    MOD = 1 << 25
    """M: modification control."""
    SYNC = 1 << 24
    """Y: synchronize control."""
    FMT = 1 << 23
    """F: CCWs of format 1."""
    PFCH = 1 << 22
    """P: the whole program may be fetched before it runs. vfio-ccw always does so."""
    ISIC = 1 << 21
    """I: an interrupt for the initial status."""
    ALCC = 1 << 20
    """A: address-limit checking."""
    SSIC = 1 << 19
    """U: no interrupt when the program suspends itself."""
    TRANSPORT = 1 << 18
    """B: a transport-mode program (TCW), which vfio-ccw does not do."""
    C64 = 1 << 17
    """H: IDAWs of format 2 (64 bits)."""
    I2K = 1 << 16
    """T: format-2 IDAWs with blocks of 2 KiB rather than 4 KiB."""
    ILS = 1 << 7
    """L: an incorrect length of an immediate operation is not reported."""
    MIDAW = 1 << 6
    """D: modified indirect data addressing is allowed."""
    ORBX = 1 << 0
    """X: the ORB has an extension."""


# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_FMT: Final = int(OrbFlags.FMT)
_C64: Final = int(OrbFlags.C64)
_TRANSPORT: Final = int(OrbFlags.TRANSPORT)
_MIDAW: Final = int(OrbFlags.MIDAW)
_FORMAT_1: Final = Idaws.FORMAT_1

DEFAULT_FLAGS: Final = OrbFlags.FMT | OrbFlags.PFCH
_flags = functools.lru_cache(64)(OrbFlags)
_ALL: Final = 0x0FFF00FF
"""Every bit that is no other field's."""


class Orb(Struct, frozen=True):
    """``struct cmd_orb``: 12 bytes, what START SUBCHANNEL takes (without the extension).

    Attributes:
        cpa: where the channel program is: an absolute address, a multiple of 8; below 2**24 with format-0 CCWs, below
            2**31 with format 1.
        intparm: the interruption parameter, 32 bits, the guest's own.
        key: the subchannel's storage key, 0 to 15.
        lpm: the logical-path mask, one bit per path.
        flags: see :class:`OrbFlags`; default: format 1, prefetch.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">III")

    cpa: int
    intparm: int = 0
    key: int = 0
    lpm: int = 0xFF
    flags: OrbFlags = DEFAULT_FLAGS

    @property
    def format(self) -> int:
        """Of its CCWs: 0 or 1."""
        return 1 if int.__and__(self.flags, _FMT) else 0

    @property
    def idaws(self) -> Idaws:
        """Of its IDAWs. Format 1 knows only blocks of 2 KiB."""
        if not int.__and__(self.flags, _C64):
            return _FORMAT_1
        return Idaws.FORMAT_2_2K if OrbFlags.I2K in self.flags else Idaws.FORMAT_2_4K

    @property
    def transport(self) -> bool:
        """Whether it names a transport-control word rather than CCWs."""
        return int.__and__(self.flags, _TRANSPORT) != 0

    def check(self) -> None:
        """Raise BadChannelStructure, naming the field, for what can never be started. A device may refuse more."""
        limit = LIMIT_31 if self.format else LIMIT_24
        if not 0 <= self.cpa < limit:
            raise BadChannelStructure(
                f"The ORB's program address 0x{self.cpa:x} is not below 0x{limit:x}, "
                f"the end of what format-{self.format} CCWs can address"
            )
        if self.cpa % 8:
            raise BadChannelStructure(f"The ORB's program address 0x{self.cpa:x} is not a multiple of 8")
        if int.__and__(self.flags, _MIDAW):
            raise BadChannelStructure(
                "The ORB allows modified indirect addressing (D): vfio-ccw would take a list of MIDAWs for the data "
                "itself; use IDAWs"
            )
        for name, value, bits in (("intparm", self.intparm, 32), ("key", self.key, 4), ("lpm", self.lpm, 8)):
            if not 0 <= value < 1 << bits:
                raise BadChannelStructure(f"The ORB's {name} has {bits} bits, got {value}")
        unknown = int(self.flags) & ~_ALL
        if unknown:
            raise BadChannelStructure(f"The ORB has no flags 0x{unknown:x}")

    def pack(self) -> bytes:
        """12 bytes. Raises BadChannelStructure for values that do not fit their fields."""
        try:
            return self.LAYOUT.pack(self.intparm, self.key << 28 | int(self.flags) | self.lpm << 8, self.cpa)
        except struct.error:
            self.check()
            raise BadChannelStructure(f"An ORB does not hold {self}") from None

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 12 bytes, whatever they say."""
        intparm, word, cpa = exact(cls.LAYOUT, data, "An ORB")
        return cls(cpa, intparm, word >> 28, word >> 8 & 0xFF, _flags(word & _ALL))
