"""Family "monitor": negotiation, introspection, the process itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import UNSET

from vfiod.protocol.catalogue import COMMANDS, Empty, monitor
from vfiod.protocol.errors import InvalidArgument
from vfiod.server import trace
from vfiod.server.commands.call import Call, Handlers

__all__ = ["HANDLERS", "VERSION"]

PROVIDER: Final = "vfiod"

VERSION: Final = monitor.VersionInfo(
    qemu=monitor.VersionTriple(major=0, minor=1, micro=0),
    package=PROVIDER,
)
"""vfiod's version, in the member QMP clients look for. A test holds it to pyproject's; asking
``importlib.metadata`` at start would cost as much as all of our own modules."""

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"  # what QEMU says when it has none


def qmp_capabilities(call: Call, arguments: monitor.QmpCapabilities) -> Empty:
    """Enable capabilities and leave negotiation."""
    if call.session is None:
        raise InvalidArgument("qmp_capabilities belongs to a QMP session")
    call.session.negotiate([] if arguments.enable is UNSET else arguments.enable)
    return Empty()


def query_version(_call: Call, _arguments: monitor.QueryVersion) -> monitor.VersionInfo:
    """Return vfiod's version."""
    return VERSION


def query_commands(call: Call, _arguments: monitor.QueryCommands) -> list[monitor.CommandInfo]:
    """List every command that may be run here."""
    session = call.session
    return [monitor.CommandInfo(name=name) for name in COMMANDS if session is None or session.allows(name)]


@functools.cache
def _schema() -> msgspec.Raw:
    """The schema as JSON: it never changes, and is long."""
    from vfiod.protocol.introspection import qmp_schema

    return msgspec.Raw(msgspec.json.encode(qmp_schema()))


def query_qmp_schema(_call: Call, _arguments: monitor.QueryQmpSchema) -> msgspec.Raw:
    """Describe every command, event and type."""
    return _schema()


def query_name(call: Call, _arguments: monitor.QueryName) -> monitor.NameInfo:
    """Return the VM's name."""
    return monitor.NameInfo(name=call.machine.name)


def query_uuid(call: Call, _arguments: monitor.QueryUuid) -> monitor.UuidInfo:
    """Return the VM's UUID."""
    return monitor.UuidInfo(uuid=call.machine.uuid or NO_UUID)


def query_status(call: Call, _arguments: monitor.QueryStatus) -> monitor.StatusInfo:
    """Tell whether the server runs or ends."""
    return call.server.status


def query_stats(call: Call, arguments: monitor.QueryStats) -> list[monitor.StatsResult]:
    """Return counters of the machine, its devices or the sessions."""
    if arguments.target is monitor.StatsTarget.SESSION:
        results: Iterable[monitor.StatsResult] = call.server.session_stats()
    elif arguments.target is monitor.StatsTarget.DEVICE:
        results = call.machine.device_stats()
    else:
        results = call.machine.stats()
    if arguments.providers is UNSET:
        return list(results)
    return [chosen for result in results if (chosen := _choose(result, arguments.providers)) is not None]


def _choose(result: monitor.StatsResult, requests: list[monitor.StatsRequest]) -> monitor.StatsResult | None:
    """The part of a result that was asked for; None when its provider was not."""
    asked = [request for request in requests if request.provider == result.provider]
    if not asked:
        return None
    if any(request.names is UNSET for request in asked):
        return result
    names = {name for request in asked if request.names is not UNSET for name in request.names}
    return msgspec.structs.replace(result, stats=[stat for stat in result.stats if stat.name in names])


def trace_event_get_state(_call: Call, arguments: monitor.TraceEventGetState) -> list[monitor.TraceEventInfo]:
    """List the trace points that match."""
    points = list(trace.matching(arguments.name))
    if not points and not _is_pattern(arguments.name):
        raise InvalidArgument(f'unknown event "{arguments.name}"')
    state = monitor.TraceEventState
    return [
        monitor.TraceEventInfo(name=point.name, state=state.ENABLED if point.on else state.DISABLED) for point in points
    ]


def trace_event_set_state(_call: Call, arguments: monitor.TraceEventSetState) -> Empty:
    """Switch the trace points that match."""
    # An unknown name is an error in QEMU too, with the same words; a pattern that matches nothing is none.
    known = trace.switch(arguments.name, arguments.enable) > 0 or _is_pattern(arguments.name)
    if not known and not arguments.ignore_unavailable:
        raise InvalidArgument(f'unknown event "{arguments.name}"')
    return Empty()


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def quit_(call: Call, _arguments: monitor.Quit) -> Empty:
    """Close every device in order and end."""
    call.server.shut_down(monitor.ShutdownCause.HOST_QMP_QUIT)
    return Empty()


HANDLERS: Final[Handlers] = {
    monitor.QmpCapabilities: qmp_capabilities,
    monitor.QueryVersion: query_version,
    monitor.QueryCommands: query_commands,
    monitor.QueryQmpSchema: query_qmp_schema,
    monitor.QueryName: query_name,
    monitor.QueryUuid: query_uuid,
    monitor.QueryStatus: query_status,
    monitor.QueryStats: query_stats,
    monitor.TraceEventGetState: trace_event_get_state,
    monitor.TraceEventSetState: trace_event_set_state,
    monitor.Quit: quit_,
}
