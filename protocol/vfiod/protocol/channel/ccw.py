"""Channel command words and indirect data addresses.

Source: z/Architecture Principles of Operation (SA22-7832), chapter 15, "Channel-Command Word" and "CCW Indirect Data
Addressing". Everything is big-endian, whatever the host is.

=========  =============================================================================
format 0   command, 24-bit address, flags, zero, count      addresses below 16 MiB
format 1   command, flags, count, 31-bit address            addresses below 2 GiB
=========  =============================================================================
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Callable
from typing import ClassVar, Final, Self

from msgspec import Struct

__all__ = [
    "CCW_SIZE",
    "LIMIT_24",
    "LIMIT_31",
    "LIMIT_64",
    "MAX_COUNT",
    "BadChannelStructure",
    "Ccw",
    "CcwFlags",
    "Command",
    "Idaws",
    "command_name",
    "exact",
    "is_tic",
    "read_idaws",
    "segments",
    "write_idaws",
]

CCW_SIZE: Final = 8
"""Bytes of a CCW, and its alignment."""

LIMIT_24: Final = 1 << 24
LIMIT_31: Final = 1 << 31
LIMIT_64: Final = 1 << 64
MAX_COUNT: Final = 0xFFFF
"""Bytes one CCW can move: its count has 16 bits."""


class BadChannelStructure(ValueError):
    """Bytes or values that do not make the structure they should; the text says what is wrong."""


def exact(layout: struct.Struct, data: bytes | bytearray | memoryview, what: str) -> tuple[int, ...]:
    """Unpack exactly one structure. Raises BadChannelStructure that names it, its size and what came."""
    if len(data) != layout.size:
        raise BadChannelStructure(f"{what} has {layout.size} bytes, got {len(data)}")
    return layout.unpack(data)


class Command(enum.IntEnum):
    """Command codes that devices have in common; the rest is each device type's own."""

    READ_IPL = 0x02
    NOP = 0x03
    SENSE = 0x04
    TIC = 0x08
    READ_DEVICE_CHARACTERISTICS = 0x64
    SENSE_ID = 0xE4


_KINDS: Final = {0b01: "write", 0b10: "read", 0b11: "control"}


def command_name(code: int) -> str:
    """A command code for a person: ``SENSE ID``, or its kind (``write 0x63``) from the low bits."""
    known = {int(one): one.name.replace("_", " ") for one in Command}
    if code in known:
        return known[code]
    if is_tic(code, 0):
        return "TIC"
    low = code & 0xF
    kind = "sense" if low == 0x4 else "read backward" if low == 0xC else _KINDS.get(code & 3, "invalid command")
    return f"{kind} 0x{code:02x}"


def is_tic(code: int, format: int) -> bool:
    """Whether a command code is transfer-in-channel: any ``x8`` in format 0, exactly 08 in format 1."""
    return (code if format else code & 0xF) == _TIC


class CcwFlags(enum.IntFlag):
    """Flags of a CCW."""

    CHAIN_DATA = 0x80
    CHAIN_COMMAND = 0x40
    SUPPRESS_LENGTH = 0x20
    SKIP = 0x10
    INTERRUPT = 0x08
    INDIRECT = 0x04
    SUSPEND = 0x02
    MODIFIED_INDIRECT = 0x01


_NO_FLAGS: Final = CcwFlags(0)

# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_INDIRECT: Final = int(CcwFlags.INDIRECT)
_TIC: Final = int(Command.TIC)
_flags = functools.lru_cache(None)(CcwFlags)  # of one byte


class Ccw(Struct, frozen=True):
    """One channel command word.

    Attributes:
        command: its code, one byte.
        address: of the data, of a list of IDAWs (with ``INDIRECT``), or of the next CCW (TIC).
        count: bytes, 0 to 65535.
        flags: see :class:`CcwFlags`.

    """

    FORMAT_0: ClassVar[struct.Struct] = struct.Struct(">IBBH")
    FORMAT_1: ClassVar[struct.Struct] = struct.Struct(">BBHI")

    command: int
    address: int = 0
    count: int = 0
    flags: CcwFlags = _NO_FLAGS

    def pack(self, format: int = 1) -> bytes:
        """8 bytes, in format 0 or 1. Raises BadChannelStructure for a value that does not fit the format."""
        limit = LIMIT_31 if format else LIMIT_24
        if not 0 <= self.address < limit:
            raise BadChannelStructure(
                f"The address 0x{self.address:x} of a format-{format} CCW is not below 0x{limit:x}"
            )
        if not 0 <= self.count <= MAX_COUNT or not 0 <= self.command <= 0xFF:
            raise BadChannelStructure(
                f"A CCW has a command of one byte and a count of 0 to {MAX_COUNT}, "
                f"got 0x{self.command:x} and {self.count}"
            )
        if format:
            return self.FORMAT_1.pack(self.command, self.flags, self.count, self.address)
        return self.FORMAT_0.pack(self.command << 24 | self.address, self.flags, 0, self.count)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, format: int = 1) -> Self:
        """From 8 bytes. Bits that must be zero are kept where a member holds them, and else ignored."""
        if format:
            command, flags, count, address = exact(cls.FORMAT_1, data, "A format-1 CCW")
        else:
            word, flags, _, count = exact(cls.FORMAT_0, data, "A format-0 CCW")
            command, address = word >> 24, word & (LIMIT_24 - 1)
        return cls(command, address, count, _flags(flags))

    def describe(self) -> str:
        """For a person: ``READ 0x02, 512 bytes at 0x2000, CHAIN_COMMAND``."""
        if self.command == Command.TIC:
            return f"TIC to 0x{self.address:x}"
        flags = "".join(f", {one.name}" for one in CcwFlags if one in self.flags)
        return f"{command_name(self.command)}, {self.count} bytes at 0x{self.address:x}{flags}"


class Idaws(enum.Enum):
    """How data is addressed: directly, or by a list of indirect data address words.

    The ORB says which: H (format-2 IDAWs) and T (2 KiB blocks). A block ends at a multiple of its size; every IDAW but
    the first begins on such a boundary.
    """

    NONE = "none"
    FORMAT_1 = "format-1"
    FORMAT_2_2K = "format-2-2k"
    FORMAT_2_4K = "format-2-4k"

    @property
    def block(self) -> int:
        """Bytes between two boundaries."""
        return 4096 if self is Idaws.FORMAT_2_4K else 2048

    @property
    def width(self) -> int:
        """Bytes of one IDAW, and the alignment of their list."""
        return 4 if self is Idaws.FORMAT_1 else 8

    @property
    def limit(self) -> int:
        """The first address that an IDAW cannot hold."""
        return LIMIT_31 if self is Idaws.FORMAT_1 else LIMIT_64

    def count(self, address: int, length: int) -> int:
        """How many IDAWs it takes for ``length`` bytes that begin at ``address``."""
        return max(1, -(-(address % self.block + length) // self.block))


def write_idaws(idaws: Idaws, address: int, length: int) -> bytes:
    """The list for one contiguous piece of memory. Raises BadChannelStructure for an address beyond the format."""
    if idaws is Idaws.NONE:
        raise BadChannelStructure("Direct addressing has no IDAWs")
    block = idaws.block
    starts = [address] + [address - address % block + block * index for index in range(1, idaws.count(address, length))]
    if address < 0 or address + length > idaws.limit:
        raise BadChannelStructure(
            f"{length} bytes at 0x{address:x} reach beyond 0x{idaws.limit:x}, the end of {idaws.value} IDAWs"
        )
    return struct.pack(f">{len(starts)}{'I' if idaws.width == 4 else 'Q'}", *starts)


def read_idaws(idaws: Idaws, data: bytes) -> tuple[int, ...]:
    """The addresses of a list. A format-1 IDAW whose bit 0 is one is BadChannelStructure (a program check)."""
    if len(data) % idaws.width:
        raise BadChannelStructure(f"A list of {idaws.value} IDAWs has a multiple of {idaws.width} bytes")
    found: tuple[int, ...] = struct.unpack(f">{len(data) // idaws.width}{'I' if idaws.width == 4 else 'Q'}", data)
    for one in found:
        if one >= idaws.limit:
            raise BadChannelStructure(f"The IDAW 0x{one:x} is not below 0x{idaws.limit:x}")
    return found


def segments(
    ccw: Ccw, idaws: Idaws, fetch: Callable[[int, int], bytes], format: int = 1
) -> tuple[tuple[int, int], ...]:
    """Where a CCW's data lies: (address, length) pieces, in order.

    Args:
        ccw: a CCW with data.
        idaws: what the ORB says of indirect addresses; used when the CCW has ``INDIRECT``.
        fetch: reads guest memory, ``fetch(address, length)``; what it raises goes through.
        format: of the CCW, 0 or 1.

    Raises BadChannelStructure for what the channel subsystem answers with a program check.

    """
    if not int.__and__(ccw.flags, _INDIRECT):
        if format and ccw.address >= LIMIT_31:
            raise BadChannelStructure(f"The data address 0x{ccw.address:x} is not below 0x{LIMIT_31:x}")
        return ((ccw.address, ccw.count),) if ccw.count else ()
    if ccw.address % idaws.width:
        raise BadChannelStructure(
            f"A list of {idaws.value} IDAWs is aligned to {idaws.width} bytes, 0x{ccw.address:x} is not"
        )
    # The first address says how many there are.
    first = read_idaws(idaws, fetch(ccw.address, idaws.width))[0]
    count = idaws.count(first, ccw.count)
    rest: tuple[int, ...] = ()
    if count > 1:
        rest = read_idaws(idaws, fetch(ccw.address + idaws.width, idaws.width * (count - 1)))
    found: list[tuple[int, int]] = []
    left = ccw.count
    for position, address in enumerate((first, *rest)):
        if position and address % idaws.block:
            raise BadChannelStructure(
                f"IDAW {position} is 0x{address:x}: all but the first lie on a boundary of {idaws.block} bytes"
            )
        length = min(left, idaws.block - address % idaws.block)
        if length:
            found.append((address, length))
        left -= length
    return tuple(found)
