"""What commands and events say of a subchannel: IRBs and condition codes as the catalogue's values."""

from __future__ import annotations

from typing import Final

from vfiod.protocol.catalogue.ccw import CcwControlResult, CcwResult, CrwInfo, DecodedIrb
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.channel import (
    Crw,
    CrwFlags,
    Cstat,
    Fctl,
    Irb,
    Orb,
    Scsw,
    ScswFlags,
    Stctl,
    explain_crw,
    explain_irb,
)
from vfiod.protocol.channel.words import CONDITION_CODES, names, summary
from vfiod.protocol.errors import OperationFailed

__all__ = ["answered", "control_refused", "controlled", "crw_info", "decoded", "made_up", "refused"]

_NOT_STARTED: Final = {"EBUSY": 2, "ENODEV": 3, "EACCES": 3, "ENOTCONN": 3}
"""Condition codes by the errno of the write that hands a function over (QEMU ``hw/vfio/ccw.c``).

ENOTCONN: the program that serves the device is gone, and the device with it.
"""

_HINTS: Final = {
    "EOPNOTSUPP": "only command mode is done: no transport mode, no QDIO",
    "EINVAL": "the program is longer than 255 CCWs, or the subchannel is not ready for it",
    "EFAULT": "a CCW, IDAW or data address lies in no guest memory that is mapped",
    "ENOMEM": "the kernel has no memory for the translated program",
}


def decoded(irb: Irb) -> DecodedIrb:
    """An IRB in words."""
    scsw = irb.scsw
    return DecodedIrb(
        summary=summary(scsw),
        words=explain_irb(irb),
        functions=names(scsw.fctl),
        activity=names(scsw.actl),
        status=names(scsw.stctl),
        device_status=names(scsw.dstat),
        subchannel_status=names(scsw.cstat),
        deferred_condition_code=scsw.cc,
        ccw_address=scsw.cpa,
        residual_count=scsw.count,
        sense=irb.sense or UNSET,
    )


def answered(irb: bytes) -> CcwResult:
    """A program ran, and this is its IRB."""
    return CcwResult(condition_code=0, meaning=CONDITION_CODES[0], irb=irb, decoded=decoded(Irb.unpack(irb)))


def made_up(errno: str, orb: Orb | None) -> Irb:
    """The IRB for a return code that comes without one, as QEMU's ``vfio_ccw_io_notifier_handler`` makes it.

    ENODEV, and ENOTCONN (its program is gone): deferred condition code 3. EFAULT: channel-data check. Anything else:
    program check.
    """
    fctl = Fctl.START
    flags = ScswFlags.FMT if orb is None or orb.format else ScswFlags(0)
    if errno in ("ENODEV", "ENOTCONN"):
        return Irb(scsw=Scsw(flags=flags, cc=3, fctl=fctl, stctl=Stctl.ALERT | Stctl.STATUS_PENDING))
    return Irb(
        scsw=Scsw(
            flags=flags,
            fctl=fctl,
            stctl=Stctl.ALERT | Stctl.PRIMARY | Stctl.SECONDARY | Stctl.STATUS_PENDING,
            cpa=0 if orb is None else orb.cpa + 8 & 0x7FFFFFF8,
            cstat=Cstat.CHANNEL_DATA_CHECK if errno == "EFAULT" else Cstat.PROGRAM_CHECK,
        )
    )


def refused(error: OperationFailed, orb: Orb | None) -> CcwResult:
    """A program was not taken: a condition code, or the IRB that QEMU would make up."""
    errno = error.errno or "EIO"
    code = _NOT_STARTED.get(errno)
    if code is not None:
        return CcwResult(condition_code=code, meaning=f"{CONDITION_CODES[code]} ({error})", return_code=errno)
    return unreadable(error, orb)


def unreadable(error: OperationFailed, orb: Orb | None) -> CcwResult:
    """It was taken or not, and failed without an IRB of its own."""
    errno = error.errno or "EIO"
    irb = made_up(errno, orb)
    hint = f"; {_HINTS[errno]}" if errno in _HINTS else ""
    meaning = f"{summary(irb.scsw)}, made up for the return code {errno} ({error}{hint})"
    return CcwResult(condition_code=0, meaning=meaning, irb=irb.pack(), decoded=decoded(irb), return_code=errno)


def controlled() -> CcwControlResult:
    """A halt or clear was accepted."""
    return CcwControlResult(condition_code=0, meaning="accepted: an interrupt will say when it is done")


def control_refused(error: OperationFailed) -> CcwControlResult:
    """A halt or clear was refused with a condition code; raises what is none."""
    code = _NOT_STARTED.get(error.errno or "")
    if code is None:
        raise error
    meaning = f"{CONDITION_CODES[code]} ({error})"
    return CcwControlResult(condition_code=code, meaning=meaning, return_code=error.errno or UNSET)


def crw_info(crw: Crw) -> CrwInfo:
    """A channel report."""
    return CrwInfo(
        crw=int.from_bytes(crw.pack(), "big"),
        source=crw.rsc,
        event=crw.erc,
        id=crw.rsid,
        overflow=CrwFlags.OFLW in crw.flags,
        chained=CrwFlags.CHN in crw.flags,
        words=explain_crw(crw),
    )
