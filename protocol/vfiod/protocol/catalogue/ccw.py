"""Family "ccw": channel I/O (vfio-ccw)."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, Milliseconds, UnsetType
from vfiod.protocol.limits import DEFAULT_CCW_TIMEOUT_MS

OrbBytes = Annotated[bytes, Meta(description="The ORB of START SUBCHANNEL: 12 bytes, big-endian, in base64.")]
Words = Annotated[list[str], Meta(description="For a person, line by line.")]


class IdawFormat(enum.StrEnum):
    """How the program's IDAWs are read (H and T of the ORB)."""

    FORMAT_1 = "format-1"
    FORMAT_2_2K = "format-2-2k"
    FORMAT_2_4K = "format-2-4k"


class OrbFields(Result, forbid_unknown_fields=True, kw_only=True):
    """An ORB by its fields, for those who would rather not pack one."""

    cpa: Annotated[
        int,
        Meta(ge=0, description="Guest address of the first CCW: a multiple of 8, below 16 MiB (format 0) or 2 GiB."),
    ]
    intparm: Annotated[int, Meta(ge=0, lt=1 << 32, description="Interruption parameter.")] = 0
    key: Annotated[int, Meta(ge=0, le=15, description="Storage key.")] = 0
    lpm: Annotated[int, Meta(ge=0, le=255, description="Logical-path mask.")] = 255
    format: Annotated[int, Meta(ge=0, le=1, description="Of the CCWs.")] = 1
    idaws: IdawFormat = IdawFormat.FORMAT_1
    prefetch: Annotated[bool, Meta(description="P: the program may be fetched before it runs; vfio-ccw does so.")] = (
        True
    )
    suspend: Annotated[bool, Meta(description="S: the program may suspend itself.")] = False
    suppress_length: Annotated[
        bool, Meta(description="L: incorrect length of immediate operations is not reported.")
    ] = False


class DecodedIrb(Result, kw_only=True):
    """An IRB in words. Names of bits are those of the Principles of Operation."""

    summary: Annotated[str, Meta(description="How it ended, in a few words.")]
    words: Words
    functions: Annotated[list[str], Meta(description="start, halt, clear")]
    activity: Annotated[list[str], Meta(description="What still goes on: suspended, start-pending, ...")]
    status: Annotated[list[str], Meta(description="alert, intermediate, primary, secondary, status-pending")]
    device_status: Annotated[list[str], Meta(description="channel-end, device-end, unit-check, attention, ...")]
    subchannel_status: Annotated[list[str], Meta(description="program-check, incorrect-length, ...")]
    deferred_condition_code: int
    ccw_address: Annotated[int, Meta(description="Usually of the last CCW used, plus 8.")]
    residual_count: Annotated[int, Meta(description="Bytes of the last CCW that were not moved.")]
    sense: Annotated[bytes | UnsetType, Meta(description="Sense data that came along, base64.")] = UNSET


ConditionCode = Annotated[
    int,
    Meta(description="As the guest's instruction sets it: 0 accepted, 1 status pending, 2 busy, 3 not operational."),
]


class CcwResult(Result, kw_only=True):
    """How a channel program ended, or why it was not started."""

    condition_code: ConditionCode
    meaning: Annotated[str, Meta(description="The condition code in words, with the reason for it.")]
    irb: Annotated[
        bytes | UnsetType, Meta(description="The interruption-response block, 96 bytes, base64; with code 0.")
    ] = UNSET
    decoded: DecodedIrb | UnsetType = UNSET
    return_code: Annotated[
        str | UnsetType,
        Meta(description="The errno that the kernel or a parent gave; the IRB is then made up here, as QEMU does."),
    ] = UNSET


@command("ccw-request", Family.CCW, slow=True)
class CcwRequest(Arguments[CcwResult]):
    """Start a channel program on a subchannel (the guest's START SUBCHANNEL), and wait for its interrupt.

    Give ``orb`` or ``orb-fields``. The program lies in guest memory (``dma-map``), and the kernel, or the mediated
    device, fetches it there. One program runs at a time: while another request is pending this one is refused with
    EBUSY, or waits for its turn with ``queue``. When the time is over the program is not stopped: ``ccw-clear`` does
    that; its late interrupt becomes ``CCW_IO``. A halt or clear meanwhile ends the request with the IRB of that.
    """

    device: str
    orb: OrbBytes | UnsetType = UNSET
    orb_fields: OrbFields | UnsetType = UNSET
    scsw: Annotated[
        bytes | UnsetType, Meta(description="The guest's SCSW, 12 bytes, base64; default: start function accepted.")
    ] = UNSET
    timeout_ms: Annotated[
        Milliseconds, Meta(description="From the start of the program; with queue, from its turn.")
    ] = DEFAULT_CCW_TIMEOUT_MS
    queue: Annotated[bool, Meta(description="Wait for a pending request of this subchannel rather than fail.")] = False


class CcwControlResult(Result, kw_only=True):
    """Whether the halt or clear was accepted. Its end is an interrupt: of the pending request, or ``CCW_IO``."""

    condition_code: ConditionCode
    meaning: str
    return_code: str | UnsetType = UNSET


@command("ccw-halt", Family.CCW, oob=True)
class CcwHalt(Arguments[CcwControlResult]):
    """Halt what the subchannel does (HALT SUBCHANNEL). Needs the async command region.

    It waits for no other command of the device, in band neither.
    """

    device: str


@command("ccw-clear", Family.CCW, oob=True)
class CcwClear(Arguments[CcwControlResult]):
    """Clear the subchannel (CLEAR SUBCHANNEL): whatever it did is over. Needs the async command region.

    It waits for no other command of the device, in band neither.
    """

    device: str


class SubchannelInfo(Result, kw_only=True):
    """A subchannel, as STORE SUBCHANNEL shows it, and what vfiod knows of it."""

    device: str
    schib: Annotated[bytes | UnsetType, Meta(description="52 bytes, base64; absent without a SCHIB region.")] = UNSET
    device_number: int | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    channel_paths: Annotated[list[int] | UnsetType, Meta(description="Ids of the installed paths.")] = UNSET
    status: DecodedIrb | UnsetType = UNSET
    words: Words
    pending: Annotated[bool, Meta(description="A ccw-request waits for its interrupt.")]
    waiting: Annotated[int, Meta(description="Requests that wait for their turn.")]
    can_halt: Annotated[bool, Meta(description="It has the async command region: ccw-halt and ccw-clear work.")]
    requests: Annotated[int, Meta(description="Programs started so far.")]
    late: Annotated[int, Meta(description="Programs whose request timed out and whose interrupt has not come yet.")]


@command("query-subchannel", Family.CCW, oob=True, mutates=False)
class QuerySubchannel(Arguments[SubchannelInfo]):
    """Read the SCHIB of a subchannel, which makes the kernel store it, and show what goes on there."""

    device: str


class CrwInfo(Result, kw_only=True):
    """One channel-report word."""

    crw: Annotated[int, Meta(description="The word.")]
    source: Annotated[int, Meta(description="Reporting-source code: 3 subchannel, 4 channel path.")]
    event: Annotated[int, Meta(description="Error-recovery code: what happened.")]
    id: Annotated[int, Meta(description="Which one: a subchannel number, a channel-path id.")]
    overflow: Annotated[bool, Meta(description="Reports before it were lost.")]
    chained: Annotated[bool, Meta(description="The next one belongs to it.")]
    words: str


@command("query-crw", Family.CCW, oob=True, mutates=False)
class QueryCrw(Arguments[list[CrwInfo]]):
    """Read the channel-report words that are pending, until there are no more, and those that came last as events.

    Reading takes a report from the kernel, so those that became ``CCW_CRW`` are kept here, the last few of them.
    """

    device: str


@event("CCW_IO", Family.CCW)
class CcwIo(EventData, kw_only=True):
    """An interrupt of a subchannel that answers no pending request.

    Attention from the device, the second half of a program's end, the end of a halt or clear, or of a program whose
    request timed out (``late``).
    """

    device: str
    irb: Annotated[bytes, Meta(description="96 bytes, base64.")]
    decoded: DecodedIrb
    solicited: Annotated[bool, Meta(description="It answers a start, halt or clear; false: the device's own.")]
    late: Annotated[bool, Meta(description="It belongs to a program whose request timed out.")]


@event("CCW_CRW", Family.CCW)
class CcwCrw(EventData):
    """The machine reports a change of the subchannel or its channel paths."""

    device: str
    crw: CrwInfo


@event("AP_CONFIG_CHANGED", Family.CCW)
class ApConfigChanged(EventData):
    """The adapters, domains or control domains of a vfio-ap device have changed (the CFG_CHG interrupt)."""

    device: str
    count: Annotated[int, Meta(description="How often since it was added.")]
