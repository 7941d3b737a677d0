"""The description of those who are connected: monitor sessions, exports, their clients, and where others may come."""

from __future__ import annotations

from msgspec import Struct, field

from vfiod.server.state.machine import HeldState, Place

__all__ = [
    "ClientRangeState",
    "ClientState",
    "DoorbellState",
    "DoorsState",
    "ExportState",
    "ListenerState",
    "MonitorState",
    "OutgoingState",
    "SessionState",
]


class OutgoingState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bytes that have not left, and the fds that go with the first of them.

    ``events`` has the bytes of each event, last first; None for replies.
    """

    data: bytes
    fds: list[Place] = field(default_factory=list)
    events: list[int] | None = None


class ListenerState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A listening socket of the monitor's, or the one of the hand-over (dialect ``take-over``)."""

    fd: Place
    dialect: str
    role: str
    path: str | None


class SessionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A monitor session between two requests."""

    id: int
    dialect: str
    role: str
    fd: Place
    pid: int
    uid: int
    negotiated: bool
    oob: bool
    subscribed: bool
    input: bytes
    output: list[OutgoingState]
    named: list[tuple[str, HeldState]]
    pending: list[Place]
    commands: int
    errors: int
    events: int
    fds_received: int
    bytes_received: int
    bytes_sent: int
    lost_total: int
    lost: tuple[int, int] | None


class MonitorState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All sessions and listeners."""

    number: int
    listeners: list[ListenerState] = field(default_factory=list)
    sessions: list[SessionState] = field(default_factory=list)


class ClientRangeState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A mapping of a client: ``file`` is which of the client files, None: it came without."""

    iova: int
    size: int
    offset: int
    readonly: bool
    file: Place | None
    by_machine: bool


class DoorbellState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A doorbell that was given out."""

    fd: Place
    region: int
    offset: int
    data: bytes


class ClientState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A connected client. ``version`` is the body of its VERSION, None: none came; ``room`` its bytes as it came.

    ``mapped``: the regions whose fds it was given.
    """

    fd: Place
    pid: int
    uid: int
    version: bytes | None
    room: int
    input: bytes
    input_fds: list[Place]
    output: list[OutgoingState]
    notices: list[tuple[int, Place]]
    doorbells: list[DoorbellState]
    ranges: list[ClientRangeState]
    requests: int
    errors: int
    failed_reads: int
    mapped: list[int] = field(default_factory=list)


class ExportState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One export. ``occupied``: a client was connected that is not described (a store of fds has none)."""

    id: str
    device: str
    attached: int
    fd: Place | None
    path: str | None
    client: ClientState | None
    occupied: bool = False


class DoorsState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All exports."""

    exports: list[ExportState] = field(default_factory=list)
