"""Metrics in the OpenMetrics text format, from the counters that ``query-stats`` shows (OpenMetrics 1.0, IETF draft).

One table names every metric; a counter that has no line in it is a defect, which a test finds. Labels: ``vm`` is the
machine's name, ``device`` a device's id or path, ``session`` a session's number, ``bus`` the address of a bus socket.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from vfiod.protocol.catalogue.monitor import StatsResult

__all__ = ["CONTENT_TYPE", "METRICS", "Kind", "Metric", "render"]

CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Kind(enum.StrEnum):
    """What a number means: one that only grows, or one that goes up and down."""

    COUNTER = "counter"
    GAUGE = "gauge"


class Metric(Struct, frozen=True):
    """One line of the table.

    Attributes:
        stat: the name in ``query-stats``.
        name: the metric's, without ``_total``.
        kind: counter or gauge.
        help: a sentence.
        unit: what the name ends in; empty: a plain number.

    """

    stat: str
    name: str
    kind: Kind
    help: str
    unit: str = ""


def _gauge(stat: str, help: str, name: str = "", unit: str = "") -> Metric:
    return Metric(stat, name or f"vfiod_{stat.replace('-', '_')}", Kind.GAUGE, help, unit)


def _counter(stat: str, help: str, name: str = "", unit: str = "") -> Metric:
    return Metric(stat, name or f"vfiod_{stat.replace('-', '_')}", Kind.COUNTER, help, unit)


VM: Final = (
    _gauge("uptime-seconds", "Time since the server began to serve.", unit="seconds"),
    _gauge("devices", "Devices, those being added or removed too."),
    _gauge("objects", "Objects made by object-add."),
    _gauge("mappings", "Pieces of guest memory that devices can reach."),
    _gauge("mapped-bytes", "Guest memory that devices can reach.", unit="bytes"),
    _gauge("address-spaces", "Containers, IOASes and address spaces of mediated devices."),
    _gauge("containers", "VFIO containers."),
    _gauge("ioases", "IOASes of iommufds."),
    _gauge("groups-lingering", "Groups the kernel keeps because an fd that was given out is open."),
    _gauge("mdevs", "Mediated devices on the machine's bus."),
    _counter("events", "Events emitted; also the last sequence number."),
    _counter("events-suppressed", "Events that their rate limit held back."),
    _gauge("topology-waiting", "Commands that wait for their turn to change devices, memory or objects."),
)
DEVICE: Final = (
    _counter(
        "irqs-fired", "Interrupts of the device that vfiod heard; direct ones pass it by.", "vfiod_device_irqs_fired"
    ),
    _counter("irqs-delivered", "Interrupts that vfiod passed on.", "vfiod_device_irqs_delivered"),
    _counter("irqs-spurious", "Interrupts that came when none was expected.", "vfiod_device_irqs_spurious"),
    _counter("requested", "How often the host has asked for the device.", "vfiod_device_requests"),
    _gauge("holders", "Who keeps the device from being removed.", "vfiod_device_holders"),
)
SESSION: Final = (
    _counter("commands", "Commands the session asked for.", "vfiod_session_commands"),
    _counter("errors", "Commands that ended in an error.", "vfiod_session_errors"),
    _counter("events", "Events given to the session.", "vfiod_session_events"),
    _counter("events-lost", "Events the session was too slow for.", "vfiod_session_events_lost"),
    _counter("fds-received", "File descriptors the session sent.", "vfiod_session_fds_received"),
    _counter("bytes-received", "What the session sent.", "vfiod_session_received_bytes", "bytes"),
    _counter("bytes-sent", "What the session was sent.", "vfiod_session_sent_bytes", "bytes"),
    _gauge("in-flight", "Commands of the session under way.", "vfiod_session_in_flight"),
    _gauge("bytes-waiting", "Replies and events the session has not read.", "vfiod_session_waiting_bytes", "bytes"),
)
BUS: Final = (
    _counter("bus-calls", "Messages the bus took."),
    _counter("bus-errors", "Messages that were answered with an error."),
    _gauge("bus-in-flight", "Calls of the bus under way."),
    _counter("bus-replies-dropped", "Replies whose client did not read, or was gone."),
    _counter("bus-events", "Events published."),
    _gauge("bus-connections", "Connections to the bus."),
    _counter("bus-connections-refused", "Connections that were too many."),
)
METRICS: Final = (*VM, *DEVICE, *SESSION, *BUS)

_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs)


def render(
    vm: str,
    uuid: str,
    version: str,
    machine: Sequence[StatsResult],
    devices: Sequence[tuple[str, StatsResult]],
    sessions: Sequence[StatsResult],
) -> str:
    """All metrics as text.

    Args:
        vm: the machine's name.
        uuid: the machine's.
        version: vfiod's.
        machine: what ``query-stats`` says of target ``vm``.
        devices: of target ``device``, each with the device's name.
        sessions: of target ``session``; sockets of the bus are among them.

    """
    own = ("vm", vm)
    info = _labels((own, ("uuid", uuid), ("version", version)))
    lines = [
        "# TYPE vfiod info",
        "# HELP vfiod The server.",
        f"vfiod_info{{{info}}} 1",
    ]
    table: list[tuple[tuple[Metric, ...], list[tuple[str, StatsResult]]]] = [
        (VM, [(_labels((own,)), one) for one in machine]),
        (DEVICE, [(_labels((own, ("device", name))), one) for name, one in devices]),
    ]
    plain, buses = [], []
    for one in sessions:
        path = one.qom_path if isinstance(one.qom_path, str) else ""
        kind, _, name = path.lstrip("/").partition("/")
        if kind == "bus":
            buses.append((_labels((own, ("bus", name))), one))
        else:
            plain.append((_labels((own, ("session", name))), one))
    table += [(SESSION, plain), (BUS, buses)]
    for metrics, results in table:
        for metric in metrics:
            lines += _family(metric, results)
    lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _family(metric: Metric, results: list[tuple[str, StatsResult]]) -> list[str]:
    samples = [
        f"{metric.name}{'_total' if metric.kind is Kind.COUNTER else ''}{{{labels}}} {stat.value}"
        for labels, result in results
        for stat in result.stats
        if stat.name == metric.stat
    ]
    if not samples:
        return []
    unit = [f"# UNIT {metric.name} {metric.unit}"] if metric.unit else []
    return [f"# TYPE {metric.name} {metric.kind}", *unit, f"# HELP {metric.name} {metric.help}", *samples]
