"""Family "ccw": channel I/O."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.catalogue.ccw import (
    CcwClear,
    CcwControlResult,
    CcwHalt,
    CcwRequest,
    CcwResult,
    CrwInfo,
    IdawFormat,
    OrbFields,
    QueryCrw,
    QuerySubchannel,
    SubchannelInfo,
)
from vfiod.protocol.catalogue.declare import Arguments
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import Busy, InvalidArgument
from vfiod.server.commands.call import Call, Handler

if TYPE_CHECKING:
    from vfiod.protocol.channel import Orb
    from vfiod.server.devices.ccw import CcwDevice

__all__ = ["HANDLERS"]


def _device(call: Call, name: str) -> CcwDevice:
    # Here, not above: a server without CCW devices does without their model.
    from vfiod.server.devices.ccw import as_ccw

    return as_ccw(call.machine.device(name))


def _to_use(call: Call, name: str) -> CcwDevice:
    """The subchannel, for a function: not while a client has it, whose status it would take."""
    device = _device(call, name)
    if device.claim is not None:
        raise Busy(
            f"Device '{name}' is attached to by the client of {device.claim.name}: its functions and their status are "
            "the client's; device-export-del first"
        )
    return device


def ccw_request(call: Call, arguments: CcwRequest) -> CcwResult | Awaitable[CcwResult]:
    """Start a channel program and wait for its interrupt."""
    device = _to_use(call, arguments.device)
    return device.request(_orb(arguments), _scsw(arguments), timeout_ms=arguments.timeout_ms, queue=arguments.queue)


def _orb(a: CcwRequest) -> Orb:
    from vfiod.protocol.channel import BadChannelStructure, Orb

    if a.orb is not UNSET and a.orb_fields is not UNSET:
        raise InvalidArgument("Parameters 'orb' and 'orb-fields' exclude each other: the bytes, or the fields")
    try:
        if a.orb is not UNSET:
            orb = Orb.unpack(a.orb)
            if not orb.transport:  # a program the kernel refuses, and says so; its address is another thing
                orb.check()
            return orb
        if a.orb_fields is UNSET:
            raise InvalidArgument("Parameter 'orb' is missing: give the ORB's 12 bytes, or its fields as 'orb-fields'")
        orb = _from_fields(a.orb_fields)
        orb.check()
    except BadChannelStructure as error:
        name = "orb" if a.orb is not UNSET else "orb-fields"
        raise InvalidArgument(f"Parameter '{name}': {error}") from error
    return orb


def _from_fields(fields: OrbFields) -> Orb:
    from vfiod.protocol.channel import Orb, OrbFlags

    flags = OrbFlags(0)
    for wanted, flag in (
        (fields.format, OrbFlags.FMT),
        (fields.prefetch, OrbFlags.PFCH),
        (fields.suspend, OrbFlags.SPND),
        (fields.suppress_length, OrbFlags.ILS),
        (fields.idaws is not IdawFormat.FORMAT_1, OrbFlags.C64),
        (fields.idaws is IdawFormat.FORMAT_2_2K, OrbFlags.I2K),
    ):
        if wanted:
            flags |= flag
    return Orb(fields.cpa, fields.intparm, fields.key, fields.lpm, flags)


def _scsw(a: CcwRequest) -> bytes:
    from vfiod.protocol.channel import Fctl, Scsw

    if a.scsw is UNSET:
        return Scsw(fctl=Fctl.START).pack()
    if len(a.scsw) != Scsw.LAYOUT.size:
        raise InvalidArgument(f"Parameter 'scsw' has {Scsw.LAYOUT.size} bytes, got {len(a.scsw)}")
    return a.scsw


def ccw_halt(call: Call, arguments: CcwHalt) -> CcwControlResult | Awaitable[CcwControlResult]:
    """Halt what the subchannel does."""
    from vfiod.protocol.vfio.ccw import AsyncCommand

    return _to_use(call, arguments.device).control(AsyncCommand.HSCH, now=call.oob)


def ccw_clear(call: Call, arguments: CcwClear) -> CcwControlResult | Awaitable[CcwControlResult]:
    """Clear the subchannel."""
    from vfiod.protocol.vfio.ccw import AsyncCommand

    return _to_use(call, arguments.device).control(AsyncCommand.CSCH, now=call.oob)


def query_subchannel(call: Call, arguments: QuerySubchannel) -> SubchannelInfo | Awaitable[SubchannelInfo]:
    """Show a subchannel."""
    return _device(call, arguments.device).subchannel()


def query_crw(call: Call, arguments: QueryCrw) -> list[CrwInfo] | Awaitable[list[CrwInfo]]:
    """Show channel reports."""
    return _device(call, arguments.device).crws()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    CcwRequest: ccw_request,
    CcwHalt: ccw_halt,
    CcwClear: ccw_clear,
    QuerySubchannel: query_subchannel,
    QueryCrw: query_crw,
}
