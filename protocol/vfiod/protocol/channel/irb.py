"""The interruption-response block: what TEST SUBCHANNEL stores.

Source: Principles of Operation (SA22-7832), chapter 16, "Interruption-Response Block", "Extended-Status Word",
"Extended-Control Word"; field names of ``arch/s390/include/asm/cio.h``.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.channel.ccw import exact
from vfiod.protocol.channel.scsw import Cstat, Scsw, ScswFlags

__all__ = ["Erw", "ErwFlags", "Esw", "Irb", "Sublog"]

MAX_SENSE: Final = 32
"""Bytes of the ECW: what fits of the sense data."""


class ErwFlags(enum.IntFlag):
    """One-bit fields of the extended-report word."""

    AUTH = 1 << 28
    """A: authorization check."""
    PVRF = 1 << 27
    """P: paths must be verified."""
    CPT = 1 << 26
    """T: a path timed out."""
    FSAVF = 1 << 25
    """F: the failing storage address is valid."""
    CONS = 1 << 24
    """S: the ECW holds sense data, so many bytes as ``scnt`` says."""
    SCAVF = 1 << 23
    """C: the secondary CCW address is valid."""
    FSAF = 1 << 22
    """R: the failing storage address has 64 bits."""


_WHOLE: Final = struct.Struct("96x")
_erw_flags = functools.lru_cache(None)(ErwFlags)  # seven bits


class Erw(Struct, frozen=True):
    """``struct erw``: the extended-report word, 4 bytes; ``scnt`` is the count of sense bytes in the ECW."""

    flags: ErwFlags = ErwFlags(0)
    scnt: int = 0

    def pack(self) -> int:
        """As a word."""
        return int(self.flags) | (self.scnt & 0x3F) << 16

    @classmethod
    def unpack(cls, word: int) -> Self:
        """From a word."""
        return cls(_erw_flags(word & 0x1FC00000), word >> 16 & 0x3F)


class Sublog(Struct, frozen=True):
    """``struct sublog``: the subchannel logout, the first word of an ESW of format 0.

    Attributes:
        esf: extended status flags.
        lpum: the last path used, one bit.
        arep: an ancillary report is there.
        fvf: which of the other fields are valid.
        sacc: storage access code.
        termc: how the device was left.
        devsc: device status check.
        serr: secondary error.
        ioerr: an error of the I/O interface, detected by the device.
        seqc: where in the sequence it happened.

    """

    esf: int = 0
    lpum: int = 0
    arep: bool = False
    fvf: int = 0
    sacc: int = 0
    termc: int = 0
    devsc: bool = False
    serr: bool = False
    ioerr: bool = False
    seqc: int = 0

    def pack(self) -> int:
        """As a word."""
        return (
            (self.esf & 0x7F) << 24
            | (self.lpum & 0xFF) << 16
            | self.arep << 15
            | (self.fvf & 0x1F) << 10
            | (self.sacc & 3) << 8
            | (self.termc & 3) << 6
            | self.devsc << 5
            | self.serr << 4
            | self.ioerr << 3
            | self.seqc & 7
        )

    @classmethod
    def unpack(cls, word: int) -> Self:
        """From a word."""
        return cls(
            esf=word >> 24 & 0x7F,
            lpum=word >> 16 & 0xFF,
            arep=bool(word >> 15 & 1),
            fvf=word >> 10 & 0x1F,
            sacc=word >> 8 & 3,
            termc=word >> 6 & 3,
            devsc=bool(word >> 5 & 1),
            serr=bool(word >> 4 & 1),
            ioerr=bool(word >> 3 & 1),
            seqc=word & 7,
        )


class Esw(Struct, frozen=True):
    """The extended-status word, 20 bytes. Which format it has only the SCSW says (L): format 0, or 1 to 3.

    Attributes:
        word0: the subchannel logout (format 0), or the last path used mask in its second byte (others).
        erw: extended report.
        faddr: failing storage address: two words.
        saddr: secondary CCW address.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">IIIII")

    word0: int = 0
    erw: Erw = Erw()
    faddr: tuple[int, int] = (0, 0)
    saddr: int = 0

    @property
    def lpum(self) -> int:
        """The last path used, one bit; the same byte in every format."""
        return self.word0 >> 16 & 0xFF

    @property
    def logout(self) -> Sublog:
        """The first word, as format 0 has it."""
        return Sublog.unpack(self.word0)

    @property
    def failing_address(self) -> int | None:
        """Where storage failed; None when it does not say."""
        if ErwFlags.FSAVF not in self.erw.flags:
            return None
        return self.faddr[0] << 32 | self.faddr[1] if ErwFlags.FSAF in self.erw.flags else self.faddr[0]

    def pack(self) -> bytes:
        """20 bytes."""
        return self.LAYOUT.pack(self.word0, self.erw.pack(), *self.faddr, self.saddr)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 20 bytes."""
        word0, erw, first, second, saddr = exact(cls.LAYOUT, data, "An ESW")
        return cls(word0, Erw.unpack(erw), (first, second), saddr)


# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_CONS: Final = int(ErwFlags.CONS)
_ECTL: Final = int(ScswFlags.ECTL)
_ESWF: Final = int(ScswFlags.ESWF)
_CHECKS: Final = int(Cstat.CHANNEL_DATA_CHECK | Cstat.CHANNEL_CONTROL_CHECK | Cstat.INTERFACE_CONTROL_CHECK)


class Irb(Struct, frozen=True):
    """``struct irb``: 96 bytes: SCSW 12, ESW 20, ECW 32, EMW 32.

    Attributes:
        scsw: status.
        esw: extended status.
        ecw: extended control, 32 bytes: sense data when the ESW says so, else of the machine's own kind.
        emw: extended measurement, 32 bytes.

    """

    SIZE: ClassVar[int] = 96

    scsw: Scsw = Scsw()
    esw: Esw = Esw()
    ecw: bytes = bytes(32)
    emw: bytes = bytes(32)

    @property
    def sense(self) -> bytes:
        """The sense data that came with a unit check (concurrent sense); empty when there is none.

        All of the ECW when the count is zero: QEMU leaves it so (``hw/s390x/css.c``).
        """
        if not int.__and__(self.esw.erw.flags, _CONS) or not int.__and__(self.scsw.flags, _ECTL):
            return b""
        return self.ecw[: self.esw.erw.scnt or MAX_SENSE]

    @property
    def logout(self) -> Sublog | None:
        """The subchannel logout, when the ESW is of format 0 for a check that has one."""
        if int.__and__(self.scsw.cstat, _CHECKS) and int.__and__(self.scsw.flags, _ESWF):
            return self.esw.logout
        return None

    def pack(self) -> bytes:
        """96 bytes."""
        return self.scsw.pack() + self.esw.pack() + self.ecw.ljust(32, b"\0")[:32] + self.emw.ljust(32, b"\0")[:32]

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 96 bytes, whatever they say."""
        exact(_WHOLE, data, "An IRB")
        return cls(Scsw.unpack(data[:12]), Esw.unpack(data[12:32]), bytes(data[32:64]), bytes(data[64:96]))
