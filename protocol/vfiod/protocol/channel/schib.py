"""What a subchannel is (SCHIB), and what the machine reports of its channels (CRW).

Source: Principles of Operation (SA22-7832), chapter 15, "Subchannel-Information Block", and chapter 17, "Channel-Report
Word"; field names of ``arch/s390/include/asm/schib.h``, ``crw.h``.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.channel.ccw import exact
from vfiod.protocol.channel.scsw import Scsw

__all__ = ["Crw", "CrwErc", "CrwFlags", "CrwRsc", "Pmcw", "PmcwFlags", "Schib"]


class PmcwFlags(enum.IntFlag):
    """One-bit fields of the second word of a PMCW, and its limit and measurement modes."""

    QF = 1 << 31
    """QDIO."""
    W = 1 << 30
    ENA = 1 << 23
    """E: enabled; a start on a disabled subchannel is not operational."""
    MP = 1 << 18
    """D: multipath mode."""
    TF = 1 << 17
    """T: timing facility."""
    DNV = 1 << 16
    """V: there is a device, and its number is valid."""


_FLAGS: Final = PmcwFlags(0xC0870000)


class Pmcw(Struct, frozen=True):
    """``struct pmcw``: the path-management control word, 28 bytes.

    Attributes:
        intparm: interruption parameter.
        flags: see :class:`PmcwFlags`.
        isc: interruption subclass, 0 to 7.
        lm: limit mode, 0 to 3.
        mme: measurement mode, 0 to 3.
        dev: device number.
        lpm, pnom, lpum, pim: masks of paths: logical, not operational, last used, installed.
        mbi: measurement-block index.
        pom, pam: masks of paths: operational, available.
        chpid: channel-path ids, 8 bytes.
        st: subchannel type: 0 is I/O.
        csense: sense data comes with the interrupt.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">IIBBBBHBB8sI")

    intparm: int = 0
    flags: PmcwFlags = PmcwFlags(0)
    isc: int = 0
    lm: int = 0
    mme: int = 0
    dev: int = 0
    lpm: int = 0
    pnom: int = 0
    lpum: int = 0
    pim: int = 0
    mbi: int = 0
    pom: int = 0
    pam: int = 0
    chpid: bytes = bytes(8)
    st: int = 0
    csense: bool = False

    def pack(self) -> bytes:
        """28 bytes."""
        word = self.flags | self.isc << 27 | self.lm << 21 | self.mme << 19 | self.dev
        return self.LAYOUT.pack(
            self.intparm,
            word,
            self.lpm,
            self.pnom,
            self.lpum,
            self.pim,
            self.mbi,
            self.pom,
            self.pam,
            self.chpid,
            self.st << 21 | self.csense,
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 28 bytes."""
        exact(cls.LAYOUT, data, "A PMCW")
        intparm, word, lpm, pnom, lpum, pim, mbi, pom, pam, chpid, last = cls.LAYOUT.unpack(data)
        return cls(
            intparm=intparm,
            flags=PmcwFlags(word & _FLAGS),
            isc=word >> 27 & 7,
            lm=word >> 21 & 3,
            mme=word >> 19 & 3,
            dev=word & 0xFFFF,
            lpm=lpm,
            pnom=pnom,
            lpum=lpum,
            pim=pim,
            mbi=mbi,
            pom=pom,
            pam=pam,
            chpid=chpid,
            st=last >> 21 & 7,
            csense=bool(last & 1),
        )


class Schib(Struct, frozen=True):
    """``struct schib``: 52 bytes: PMCW 28, SCSW 12, then the measurement block's address and the model's own."""

    SIZE: ClassVar[int] = 52

    pmcw: Pmcw = Pmcw()
    scsw: Scsw = Scsw()
    mba: int = 0
    mda: bytes = bytes(4)

    def pack(self) -> bytes:
        """52 bytes."""
        return self.pmcw.pack() + self.scsw.pack() + struct.pack(">Q4s", self.mba, self.mda)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 52 bytes."""
        exact(struct.Struct("52x"), data, "A SCHIB")
        mba, mda = struct.unpack(">Q4s", data[40:])
        return cls(Pmcw.unpack(data[:28]), Scsw.unpack(data[28:40]), mba, mda)


class CrwFlags(enum.IntFlag):
    """One-bit fields of a CRW."""

    SLCT = 1 << 30
    """S: solicited."""
    OFLW = 1 << 29
    """R: reports before it were lost."""
    CHN = 1 << 28
    """C: the next one belongs to it."""
    ANC = 1 << 23
    """A: there is ancillary information."""


class CrwRsc(enum.IntEnum):
    """What a CRW reports of (``CRW_RSC_*``)."""

    MONITOR = 0x2
    SUBCHANNEL = 0x3
    CHANNEL_PATH = 0x4
    CONFIGURATION_ALERT = 0x9
    CHANNEL_SUBSYSTEM = 0xB


class CrwErc(enum.IntEnum):
    """What has happened to it (``CRW_ERC_*``)."""

    EVENT = 0
    AVAILABLE = 1
    INITIALIZED = 2
    TEMPORARY_ERROR = 3
    INSTALLED_PARAMETERS_INITIALIZED = 4
    TERMINAL = 5
    PERMANENT_ERROR_NOT_INITIALIZED = 6
    PERMANENT_ERROR_INITIALIZED = 7
    INSTALLED_PARAMETERS_MODIFIED = 8


_CRW_FLAGS: Final = CrwFlags.SLCT | CrwFlags.OFLW | CrwFlags.CHN | CrwFlags.ANC


class Crw(Struct, frozen=True):
    """``struct crw``: a channel-report word, 4 bytes; all zero: there is none.

    Attributes:
        rsc: what it is about, see :class:`CrwRsc`.
        erc: what happened, see :class:`CrwErc`.
        rsid: which one: a subchannel's number, a channel path's id.
        flags: see :class:`CrwFlags`.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">I")

    rsc: int
    erc: int
    rsid: int
    flags: CrwFlags = CrwFlags(0)

    def pack(self) -> bytes:
        """4 bytes."""
        return self.LAYOUT.pack(self.flags | self.rsc << 24 | self.erc << 16 | self.rsid)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From 4 bytes."""
        (word,) = exact(cls.LAYOUT, data, "A CRW")
        return cls(word >> 24 & 0xF, word >> 16 & 0x3F, word & 0xFFFF, CrwFlags(word & _CRW_FLAGS))
