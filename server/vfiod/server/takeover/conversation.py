"""What the two processes say to each other, and who owns everything at each moment. No I/O; a missing key is the error.

::

    taker                                     giver
      Hello: my version of the state  ────────►
      ◄──────── Welcome: what I have, by name         or Refuse: why not; nothing has moved
      Begin: I know all of that       ────────►  (holds its sessions and clients; its loop stands still from here on)
      ◄──────── Whole: the state; then its bytes, then the fds
      Ready: I have made all of it    ────────►  or Refuse: the giver goes on as if nothing had been
      ◄──────── Commit: it is yours                   or Abort
      Owned: it is mine               ────────►  the giver ends at once, closing nothing but its own fds

The giver owns everything until it has read ``Owned``. The taker owns everything from ``Commit`` on, or when the giver
died after ``Ready``. ``Owned`` is sent before the taker does anything: a taker that dies sooner leaves the giver the
owner, and one that dies later dies as any owner may.

With a store of fds (a need of ``Welcome``), whoever keeps it starts a new server when the one it watches dies, and puts
the taker away first: systemd ends all of a unit, ``vfiod keeper`` is told the taker before ``Whole``. So the keeper
decides, and not the death of an end: after ``Ready`` the giver tells it to watch the taker (``MAINPID=``), says
``Commit`` and ends. The taker owns everything from ``Commit`` on, and by that alone; it writes its state into the store
before it does anything. Whoever dies, then or sooner, the store is whole, and is given to one new server.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec
from msgspec import Struct, field

from vfiod.protocol.errors import VfiodError

__all__ = [
    "GIVER",
    "PROTOCOL",
    "TAKER",
    "Abort",
    "BadHandOver",
    "Begin",
    "Commit",
    "Giver",
    "GiverState",
    "Hello",
    "Message",
    "Owned",
    "Ready",
    "Refuse",
    "Taker",
    "TakerState",
    "Welcome",
    "Whole",
    "decode_message",
    "encode_message",
]

PROTOCOL: Final = 1
"""Version of this conversation."""


class BadHandOver(VfiodError):
    """The other end said what cannot be said now, or nothing that is understood."""


class Hello(Struct, frozen=True, tag="hello"):
    """The taker's first word: the versions it speaks and reads.

    Attributes:
        protocol: the version of this conversation.
        state: that of the state.
        program: that of the program.
        unit: its control group, by which systemd knows whose process it is; empty: it has none.
        orphan: it outlives its parent (``--daemonize``), and becomes the child of who looks after orphans.

    """

    protocol: int
    state: int
    program: str
    unit: str = ""
    orphan: bool = False


class Welcome(Struct, frozen=True, tag="welcome"):
    """What the giver has.

    Attributes:
        name: of the VM.
        uuid: of the VM.
        needs: what the taker must know (:class:`~vfiod.server.state.format.State`).
        roles: roles of its sockets.
        paths: its socket files.
        program: its version.

    """

    name: str
    uuid: str
    program: str
    needs: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class Refuse(Struct, frozen=True, tag="refuse"):
    """Either end: it does not come to that. Everything stays the giver's."""

    reason: str


class Begin(Struct, frozen=True, tag="begin"):
    """The taker can do with all of it."""


class Whole(Struct, frozen=True, tag="whole"):
    """So many bytes of state follow, then so many fds."""

    size: int
    fds: int


class Ready(Struct, frozen=True, tag="ready"):
    """The taker has made everything, and touched nothing."""


class Commit(Struct, frozen=True, tag="commit"):
    """It is the taker's."""


class Abort(Struct, frozen=True, tag="abort"):
    """The giver keeps it."""

    reason: str


class Owned(Struct, frozen=True, tag="owned"):
    """The taker owns everything."""


Message = Hello | Welcome | Refuse | Begin | Whole | Ready | Commit | Abort | Owned

_decoder: Final = msgspec.json.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """Its bytes: JSON."""
    return msgspec.json.encode(message)


def decode_message(data: bytes) -> Message:
    """A message. Raises BadHandOver."""
    try:
        message: Message = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise BadHandOver(f"What came is no message of a hand-over: {error}") from error
    return message


class GiverState(enum.Enum):
    """Where the giver is. In all but GONE it owns everything."""

    LISTENING = "nobody has said anything"
    WELCOMED = "it was said what there is"
    GIVING = "everything is on its way"
    COMMITTED = "it is the taker's as soon as that says so"
    GONE = "it is the taker's"
    ENDED = "it did not come to that"


GIVER: Final[Mapping[tuple[GiverState, type], GiverState]] = {
    (GiverState.LISTENING, Hello): GiverState.WELCOMED,
    (GiverState.LISTENING, Refuse): GiverState.ENDED,
    (GiverState.WELCOMED, Begin): GiverState.GIVING,
    (GiverState.WELCOMED, Refuse): GiverState.ENDED,
    (GiverState.GIVING, Ready): GiverState.COMMITTED,
    (GiverState.GIVING, Refuse): GiverState.ENDED,
    (GiverState.COMMITTED, Owned): GiverState.GONE,
}
"""What the giver hears: ``(state, message) -> next state``."""


class TakerState(enum.Enum):
    """Where the taker is. In OWNER alone it owns everything."""

    ASKING = "it has said hello"
    WELCOMED = "it knows what there is"
    WAITING = "it waits for everything"
    MAKING = "it has everything, and makes a machine of it"
    READY = "it is made"
    OWNER = "it is ours"
    ENDED = "it did not come to that"


TAKER: Final[Mapping[tuple[TakerState, type], TakerState]] = {
    (TakerState.ASKING, Welcome): TakerState.WELCOMED,
    (TakerState.ASKING, Refuse): TakerState.ENDED,
    (TakerState.WAITING, Whole): TakerState.MAKING,
    (TakerState.WAITING, Refuse): TakerState.ENDED,
    (TakerState.WAITING, Abort): TakerState.ENDED,
    (TakerState.READY, Commit): TakerState.OWNER,
    (TakerState.READY, Abort): TakerState.ENDED,
}
"""What the taker hears."""

SAID: Final[Mapping[tuple[TakerState, type], TakerState]] = {
    (TakerState.WELCOMED, Begin): TakerState.WAITING,
    (TakerState.WELCOMED, Refuse): TakerState.ENDED,
    (TakerState.MAKING, Ready): TakerState.READY,
    (TakerState.MAKING, Refuse): TakerState.ENDED,
}
"""What the taker says."""


_State = TypeVar("_State", GiverState, TakerState)


def _following(table: Mapping[tuple[_State, type], _State], state: _State, message: Message) -> _State:
    """The next state. Raises BadHandOver: the table has none."""
    following = table.get((state, type(message)))
    if following is None:
        raise BadHandOver(f"'{type(message).__name__}' came while {state.value}")
    return following


class Giver:
    """The giver's end."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = GiverState.LISTENING

    def hear(self, message: Message) -> None:
        """Raises BadHandOver: it cannot be said now."""
        self.state = _following(GIVER, self.state, message)

    @property
    def owns(self) -> bool:
        """Whether everything is the giver's, should the connection end now."""
        return self.state is not GiverState.GONE


class Taker:
    """The taker's end."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = TakerState.ASKING

    def hear(self, message: Message) -> None:
        """Raises BadHandOver: it cannot be said now."""
        self.state = _following(TAKER, self.state, message)

    def say(self, message: Message) -> None:
        """Raises BadHandOver: a defect."""
        self.state = _following(SAID, self.state, message)

    def giver_died(self) -> bool:
        """The giver is dead: whether everything is ours now."""
        if self.state is TakerState.READY:
            self.state = TakerState.OWNER
        return self.state is TakerState.OWNER
