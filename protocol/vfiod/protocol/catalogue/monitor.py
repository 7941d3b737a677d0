"""Family "monitor": negotiation, introspection, the process itself."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from msgspec import Meta, field

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, UnsetType
from vfiod.protocol.limits import MAX_COMMAND_LINE, MAX_PATTERN


class QmpCapability(enum.StrEnum):
    """Capabilities of the QMP specification; ``oob`` is the only one there is."""

    OOB = "oob"


@command("qmp_capabilities", Family.MONITOR, mutates=False)
class QmpCapabilities(Arguments[Empty]):
    """Enable capabilities and leave negotiation. QMP sessions only, and once."""

    enable: list[QmpCapability] | UnsetType = UNSET


class VersionTriple(Result):
    """A version, as QEMU's greeting carries it."""

    major: int
    minor: int
    micro: int


class VersionInfo(Result):
    """What answers. ``qemu`` is the member QMP clients look for; its numbers are vfiod's."""

    qemu: VersionTriple
    package: str


@command("query-version", Family.MONITOR, oob=True, mutates=False)
class QueryVersion(Arguments[VersionInfo]):
    """Return vfiod's version."""


class CommandInfo(Result):
    """One command's name."""

    name: str


@command("query-commands", Family.MONITOR, oob=True, mutates=False)
class QueryCommands(Arguments[list[CommandInfo]]):
    """List every command of this server."""


@command("query-qmp-schema", Family.MONITOR, oob=True, mutates=False)
class QueryQmpSchema(Arguments[list[dict[str, Any]]]):
    """Describe every command, event and type (QEMU ``qapi/introspect.json``)."""


class NameInfo(Result):
    """The machine's name (``--name``)."""

    name: str


@command("query-name", Family.MONITOR, oob=True, mutates=False)
class QueryName(Arguments[NameInfo]):
    """Return the name of the VM this server works for."""


class UuidInfo(Result):
    """The machine's UUID (``--uuid``); all zeroes when none was given, as in QEMU."""

    uuid: str = field(name="UUID")


@command("query-uuid", Family.MONITOR, oob=True, mutates=False)
class QueryUuid(Arguments[UuidInfo]):
    """Return the UUID of the VM this server works for."""


class RunState(enum.StrEnum):
    """A subset of QEMU's ``RunState``: vfiod runs, or is closing its devices."""

    RUNNING = "running"
    SHUTDOWN = "shutdown"


class StatusInfo(Result):
    """QEMU's ``StatusInfo``."""

    running: bool
    status: RunState


@command("query-status", Family.MONITOR, oob=True, mutates=False)
class QueryStatus(Arguments[StatusInfo]):
    """Tell whether the server is running or shutting down."""


class StatsTarget(enum.StrEnum):
    """What statistics are about."""

    VM = "vm"
    DEVICE = "device"
    SESSION = "session"


class StatsRequest(Result, forbid_unknown_fields=True):
    """Which provider, and which of its values."""

    provider: str
    names: list[str] | UnsetType = UNSET


class Stat(Result):
    """One counter or gauge."""

    name: str
    value: int | float | str


class StatsResult(Result, kw_only=True):
    """The values of one object."""

    provider: str
    qom_path: str | UnsetType = UNSET
    stats: list[Stat]


@command("query-stats", Family.MONITOR, oob=True, mutates=False)
class QueryStats(Arguments[list[StatsResult]]):
    """Return counters of the machine, of its devices or of the monitor's sessions."""

    target: StatsTarget
    providers: list[StatsRequest] | UnsetType = UNSET


class TraceEventState(enum.StrEnum):
    """QEMU's ``TraceEventState``."""

    UNAVAILABLE = "unavailable"
    DISABLED = "disabled"
    ENABLED = "enabled"


class TraceEventInfo(Result):
    """One trace point."""

    name: str
    state: TraceEventState


TracePattern = Annotated[
    str,
    Meta(min_length=1, max_length=MAX_PATTERN, description="A trace point's name, or a pattern with * and ?."),
]


@command("trace-event-get-state", Family.MONITOR, oob=True, mutates=False)
class TraceEventGetState(Arguments[list[TraceEventInfo]]):
    """List the trace points that match a pattern, and whether they are on."""

    name: TracePattern


@command("trace-event-set-state", Family.MONITOR)
class TraceEventSetState(Arguments[Empty]):
    """Turn the trace points that match a pattern on or off. They are written to the log."""

    name: TracePattern
    enable: bool
    ignore_unavailable: bool = False


@command("human-monitor-command", Family.MONITOR, slow=True)
class HumanMonitorCommand(Arguments[str]):
    """Run a line as a person would type it (``info devices``), and return text for a person to read."""

    command_line: Annotated[str, Meta(max_length=MAX_COMMAND_LINE)]
    cpu_index: int | UnsetType = UNSET


@command("quit", Family.MONITOR)
class Quit(Arguments[Empty]):
    """Close every device in order and end the server. The connection may close before the reply comes."""


class ShutdownCause(enum.StrEnum):
    """A subset of QEMU's ``ShutdownCause``."""

    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


@event("SHUTDOWN", Family.MONITOR)
class Shutdown(EventData):
    """The server closes its devices and ends."""

    guest: bool
    reason: ShutdownCause


@event("MACHINE_RESTORED", Family.MONITOR)
class MachineRestored(EventData):
    """The server before this one died without closing anything; this one has what it could take over of it.

    ``query-machine`` tells it, too: whoever hears of the restart comes later than the event. Numbers of events go on
    well above those of the dead server.
    """

    devices: Annotated[list[str], Meta(description="The devices that are there as before.")]
    lost: Annotated[list[str], Meta(description="What could not be restored, and why, a sentence each.")]


@event("EVENTS_LOST", Family.MONITOR)
class EventsLost(EventData):
    """This reader did not drain: the events from ``first-seq`` to ``last-seq`` were dropped for it alone.

    ``query-machine`` tells the state, and the ``seq`` it belongs to.
    """

    count: int
    first_seq: int
    last_seq: int
