"""Status in words: what an IRB, an SCSW, a SCHIB or a CRW says, for a person."""

from __future__ import annotations

import enum
import functools
from typing import Final

from vfiod.protocol.channel.ccw import Idaws
from vfiod.protocol.channel.irb import ErwFlags, Irb
from vfiod.protocol.channel.orb import Orb, OrbFlags
from vfiod.protocol.channel.schib import Crw, CrwErc, CrwFlags, CrwRsc, PmcwFlags, Schib
from vfiod.protocol.channel.scsw import Actl, Cstat, Dstat, Fctl, Scsw, Stctl
from vfiod.protocol.channel.sense import sense_words

__all__ = ["CONDITION_CODES", "explain_crw", "explain_irb", "explain_orb", "explain_schib", "names", "summary"]

KEPT: Final = 256
"""Answers remembered: the same few kinds of status come again and again, and asking an IntFlag for each bit is slow."""

CONDITION_CODES: Final = {
    0: "started",
    1: "status pending: something else has to be read first",
    2: "busy: a function is in progress at the subchannel",
    3: "not operational: the subchannel or its device cannot be used",
}
"""Condition codes of START, HALT and CLEAR SUBCHANNEL."""

_DEFERRED: Final = {
    1: "deferred condition code 1: there was status already, the program was not started",
    2: "deferred condition code 2",
    3: "deferred condition code 3: not operational, no path to the device works",
}

_CSTAT: Final = {
    Cstat.PROGRAM_CONTROLLED_INTERRUPTION: "program-controlled interruption: a CCW asked for this interrupt",
    Cstat.INCORRECT_LENGTH: "incorrect length: the device moved another number of bytes than the CCW counts",
    Cstat.PROGRAM_CHECK: "program check: the channel program is wrong (a CCW, an IDAW, an address, or its length)",
    Cstat.PROTECTION_CHECK: "protection check: storage that the key or a read-only mapping protects",
    Cstat.CHANNEL_DATA_CHECK: "channel-data check: storage could not be read or written",
    Cstat.CHANNEL_CONTROL_CHECK: "channel-control check: the channel itself failed",
    Cstat.INTERFACE_CONTROL_CHECK: "interface-control check: the device's answer on its path was wrong",
    Cstat.CHAINING_CHECK: "chaining check: data chaining was too slow",
}

_DSTAT: Final = {
    Dstat.ATTENTION: "attention: the device asks for something on its own",
    Dstat.STATUS_MODIFIER: "status modifier",
    Dstat.CONTROL_UNIT_END: "control unit end",
    Dstat.BUSY: "busy",
    Dstat.CHANNEL_END: "channel end: the transfer is over",
    Dstat.DEVICE_END: "device end: the device is ready again",
    Dstat.UNIT_CHECK: "unit check: see the sense data",
    Dstat.UNIT_EXCEPTION: "unit exception: something unusual for this command, such as the end of the data",
}


# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_CLEAR: Final = int(Fctl.CLEAR)
_HALT: Final = int(Fctl.HALT)
_SUSPENDED: Final = int(Actl.SUSPENDED)
_PRIMARY: Final = int(Stctl.PRIMARY)
_SECONDARY: Final = int(Stctl.SECONDARY)
_TIMED_OUT: Final = int(ErwFlags.CPT)


def names(flags: enum.IntFlag) -> list[str]:
    """The names of the bits that are set, in lower case with hyphens, highest first."""
    return list(_names(type(flags), int(flags)))


@functools.lru_cache(KEPT)
def _names(kind: type[enum.IntFlag], value: int) -> tuple[str, ...]:
    found = [one for one in kind if int(one) & value]
    return tuple(str(one.name).lower().replace("_", "-") for one in sorted(found, reverse=True))


@functools.lru_cache(KEPT)
def _phrases(cstat: int, dstat: int) -> tuple[str, ...]:
    """What subchannel and device status say."""
    return (
        *(phrase for bit, phrase in _CSTAT.items() if int(bit) & cstat),
        *(phrase for bit, phrase in _DSTAT.items() if int(bit) & dstat),
    )


def summary(scsw: Scsw) -> str:
    """One phrase: how it ended, or what it is."""
    if scsw.cc:
        return _DEFERRED[scsw.cc]
    if not scsw.pending:
        return f"no status ({', '.join(names(scsw.actl)) or 'idle'})"
    if not scsw.solicited:
        return f"unsolicited: {', '.join(names(scsw.dstat)) or 'no device status'}"
    bad = [phrase.split(":")[0] for phrase in _phrases(int(scsw.cstat) & 0x7F, int(scsw.dstat) & 0xF3)]
    if bad:
        return ", ".join(bad)
    if int.__and__(scsw.fctl, _CLEAR):
        return "cleared"
    if int.__and__(scsw.fctl, _HALT):
        return "halted"
    if int.__and__(scsw.actl, _SUSPENDED):
        return "suspended"
    if int.__and__(scsw.stctl, _SECONDARY):
        return "ended normally"
    return "under way" if not int.__and__(scsw.stctl, _PRIMARY) else "transfer over, device still at work"


def explain_irb(irb: Irb) -> list[str]:
    """An IRB, line by line: the outcome first, then what each bit means, the sense data, and where it stopped."""
    scsw = irb.scsw
    lines = [summary(scsw)]
    lines += _phrases(int(scsw.cstat), int(scsw.dstat))
    if scsw.fctl:
        lines.append(f"functions: {', '.join(names(scsw.fctl))}")
    if scsw.actl:
        lines.append(f"still: {', '.join(names(scsw.actl))}")
    if irb.sense:
        lines.append(f"sense data {irb.sense.hex(' ')}")
        lines += sense_words(irb.sense)
    if irb.esw.failing_address is not None:
        lines.append(f"storage failed at 0x{irb.esw.failing_address:x}")
    if int.__and__(irb.esw.erw.flags, _TIMED_OUT):
        lines.append("a channel path timed out")
    logout = irb.logout
    if logout is not None:
        lines.append(f"subchannel logout: flags 0x{logout.esf:02x}, path 0x{logout.lpum:02x}, sequence {logout.seqc}")
    if scsw.pending and scsw.solicited and scsw.cpa:
        lines.append(f"after the CCW at 0x{scsw.cpa - 8 & 0x7FFFFFF8:x}; {scsw.count} bytes of it were not moved")
    return lines


def explain_orb(orb: Orb) -> list[str]:
    """An ORB, line by line."""
    if orb.transport:
        return [f"transport mode, program at 0x{orb.cpa:x}"]
    lines = [f"program of format-{orb.format} CCWs at 0x{orb.cpa:x}"]
    block = {Idaws.FORMAT_1: "31-bit", Idaws.FORMAT_2_2K: "64-bit, 2 KiB blocks", Idaws.FORMAT_2_4K: "64-bit, 4 KiB"}
    lines.append(f"IDAWs: {block[orb.idaws]}")
    flags = orb.flags & ~(OrbFlags.FMT | OrbFlags.C64 | OrbFlags.I2K)
    lines.append(f"interruption parameter 0x{orb.intparm:08x}, key {orb.key}, paths 0x{orb.lpm:02x}")
    if flags:
        lines.append(f"flags: {', '.join(names(flags))}")
    return lines


def explain_schib(schib: Schib) -> list[str]:
    """A SCHIB, line by line."""
    pmcw = schib.pmcw
    number = f"device {pmcw.dev:04x}" if PmcwFlags.DNV in pmcw.flags else "no valid device"
    state = "enabled" if PmcwFlags.ENA in pmcw.flags else "not enabled"
    paths = ", ".join(f"{one:02x}" for bit, one in enumerate(pmcw.chpid) if pmcw.pim & 0x80 >> bit) or "none"
    return [
        f"{number}, {state}, interruption subclass {pmcw.isc}",
        f"channel paths {paths}; available 0x{pmcw.pam:02x}, operational 0x{pmcw.pom:02x}, last used 0x{pmcw.lpum:02x}",
        f"status: {summary(schib.scsw)}",
    ]


def explain_crw(crw: Crw) -> str:
    """A CRW in one phrase."""
    kinds, events = {int(one): one for one in CrwRsc}, {int(one): one for one in CrwErc}
    what = kinds[crw.rsc].name.lower().replace("_", " ") if crw.rsc in kinds else f"source 0x{crw.rsc:x}"
    event = events[crw.erc].name.lower().replace("_", " ") if crw.erc in events else f"code 0x{crw.erc:x}"
    lost = "; reports before it were lost" if CrwFlags.OFLW in crw.flags else ""
    return f"{what} 0x{crw.rsid:04x}: {event}{lost}"
