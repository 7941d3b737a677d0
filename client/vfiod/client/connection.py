"""One session of the client, without the socket: what to send, what came, whose answer it is.

Both skins (:mod:`vfiod.client.aio`, :mod:`vfiod.client.sync`) do nothing but move bytes and fds between this and a
socket, and wait. The boundary has websockets' names: :meth:`Connection.receive_data`,
:meth:`Connection.events_received`, :meth:`Connection.data_to_send`.

**Sending fds.** Commands refer to fds by name. A call that lends open fds goes in two steps: the fds travel with one
``getfd`` for each, and when every name is known, the command follows. When it fails, the names are closed again, so
that a call leaves no trace at the server. The fds being named at one time are bounded, as the server bounds them.

**Receiving fds.** fds come with the first byte of the reply that speaks of them, in order, and the reply's ``...-fd``
members say which is which. So they queue here, and each reply takes as many as it speaks of, one that nobody waits for
any more too. What is left when everything received has been understood belongs to nobody, and is closed.
"""

from __future__ import annotations

import array
import enum
import functools
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from vfiod.client.dialects import CODECS, Announced, Codec, Dialect, Failed, Happened, Heard, Returned
from vfiod.client.errors import ClientError, ConnectionLost, ProtocolError
from vfiod.client.events import Event
from vfiod.client.fds import OpenFd, OwnedFds, descriptors, fd_indexes, number_of, with_fds
from vfiod.client.methods.values import OWN
from vfiod.protocol.catalogue import EVENTS, Arguments, CommandSpec, Empty, EventData, command_of
from vfiod.protocol.catalogue.devices import DeviceAdd
from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.errors import RemoteError, WireError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, MAX_PENDING_FDS

__all__ = ["Connection", "Dialect", "Outgoing", "State", "Ticket"]

UNKNOWN: Final = "what this client does not understand"

OTHERS: Final = {
    Dialect.QMP: (b'"jsonrpc"', "JSON-RPC, not QMP: give --jsonrpc (in a program: dialect='jsonrpc')"),
    Dialect.JSONRPC: (b'"QMP"', "QMP, not JSON-RPC: leave out --jsonrpc (in a program: dialect='jsonrpc')"),
}
"""By what the other dialect is known, and what to say then."""

MAX_UNCLAIMED: Final = 4 * MAX_FDS_PER_MESSAGE
"""fds received whose reply is not complete yet. A reply carries at most 253; four such may be under way."""


class State(enum.Enum):
    """Where the session is in its life."""

    GREETING = "waiting for the greeting"
    NEGOTIATING = "negotiating"
    READY = "ready"
    CLOSED = "closed"


class Outgoing:
    """Bytes to send, and the fds that go with the first of them."""

    __slots__ = ("data", "fds")

    def __init__(self, data: bytes, fds: Sequence[FileDescriptor] = ()) -> None:
        self.data = bytearray(data)
        self.fds = list(fds)

    def rights(self) -> bytes:
        """The fds as ``SCM_RIGHTS`` has them."""
        return array.array("i", [fd.number for fd in self.fds]).tobytes()

    def close(self) -> None:
        """Close our duplicates: they went, or never will."""
        close_all(self.fds)
        self.fds.clear()


class Ticket:
    """One command under way: what its caller holds until the answer is here."""

    __slots__ = (
        "_arguments",
        "_names",
        "_naming",
        "_on_done",
        "_oob",
        "_outcome",
        "abandoned",
        "command",
        "done",
        "spec",
    )

    def __init__(
        self,
        command: str,
        arguments: Any,
        spec: CommandSpec | None,
        *,
        oob: bool,
        on_done: Callable[[], object] | None,
    ) -> None:
        self.command = command
        self.spec = spec
        self.done = False
        self.abandoned = False
        self._arguments = arguments
        self._oob = oob
        self._on_done = on_done
        self._outcome: Any = None
        self._names: dict[str, FileDescriptor] = {}
        self._naming = 0

    def result(self) -> Any:
        """The result. Raises what the command ended in: RemoteError, ConnectionLost, ProtocolError."""
        if not self.done:
            raise RuntimeError(f"{self.command} is still under way")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Connection:
    """A session's state, from the first byte to the last.

    Args:
        dialect: what the socket speaks.
        peer: how to call the server in messages.

    """

    def __init__(self, dialect: Dialect = Dialect.QMP, *, peer: str = "the server") -> None:
        self.dialect = dialect
        self.peer = peer
        self.state = State.GREETING if dialect is Dialect.QMP else State.READY
        self.version: VersionInfo | None = None
        self.oob_enabled = False
        self._codec: Codec = CODECS[dialect]()
        self._ids = itertools.count(1)
        self._answers: dict[int, Callable[[Returned | Failed], None]] = {}
        self._tickets: dict[Ticket, None] = {}
        self._to_name: deque[Ticket] = deque()
        self._naming = 0
        self._fds: deque[FileDescriptor] = deque()
        self._out: deque[Outgoing] = deque()
        self._events: list[Event] = []
        self._error: ClientError | None = None
        self._quit_sent = False

    # --- what the skins call ------------------------------------------------------------------------------------

    def start(
        self,
        command: str | Arguments[Any],
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        on_done: Callable[[], object] | None = None,
    ) -> Ticket:
        """Begin a command.

        Args:
            command: typed, from the catalogue; or a name.
            arguments: with a name: its arguments, as they are on the wire.
            fds: open fds to send, by the names the arguments have for them. Lent: duplicates are sent.
            attach: open fds that go with the command's own first byte. Lent.
            oob: out of band. JSON-RPC knows no bands: there, nothing waits for another device's work anyway.
            on_done: called, without arguments, when the ticket is done; never before this returns.

        Raises:
            ConnectionLost: the connection is closed.
            ValueError: out of band was not negotiated, too many fds, or one that is not open.

        """
        if self._error is not None or self.state is not State.READY:
            raise ConnectionLost(str(self._error or f"The session with {self.peer} is {self.state.value}"))
        if oob and self.dialect is Dialect.QMP and not self.oob_enabled:
            raise ValueError(f"{self.peer} does not offer out-of-band execution")
        fds = fds or {}
        for what in (fds, attach):
            if len(what) > MAX_FDS_PER_MESSAGE:
                raise ValueError(f"A call carries at most {MAX_FDS_PER_MESSAGE} fds, got {len(what)}: ask by range")
        if isinstance(command, str):
            ticket = Ticket(command, arguments or UNSET, None, oob=oob, on_done=on_done)
        else:
            spec = command_of(command)
            ticket = Ticket(spec.name, command, spec, oob=oob, on_done=on_done)
        duplicates = _duplicate(attach)
        if not fds:
            self._tickets[ticket] = None
            self._send_command(ticket, duplicates)
            return ticket
        try:
            ticket._names = dict(zip(fds, _duplicate(tuple(fds.values())), strict=True))
        except BaseException:
            close_all(duplicates)
            raise
        if duplicates:
            close_all([*duplicates, *ticket._names.values()])
            raise ValueError("Give a call fds to name, or fds to attach, not both")
        self._tickets[ticket] = None
        self._to_name.append(ticket)
        self._name_next()
        return ticket

    def send_fds(self, fds: Sequence[OpenFd]) -> None:
        """Send fds ahead of a ``getfd`` or ``add-fd``, with one space, as ``qemu.qmp`` does. Lent. At most 253."""
        if not 0 < len(fds) <= MAX_FDS_PER_MESSAGE:
            raise ValueError(f"1 to {MAX_FDS_PER_MESSAGE} fds can be sent at once, got {len(fds)}")
        if self._error is not None:
            raise ConnectionLost(str(self._error))
        self._send(b" ", _duplicate(fds))

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for this any more. Its answer is taken when it comes, and the fds in it are closed."""
        ticket.abandoned = True
        ticket._on_done = None
        if ticket.done:
            close_all(descriptors(ticket._outcome))
        elif ticket in self._to_name:  # nothing of it was sent
            self._to_name.remove(ticket)
            self._finish(ticket, ConnectionLost(f"{ticket.command} was abandoned"))

    def receive_data(self, data: bytes, fds: Sequence[FileDescriptor] = (), *, truncated: bool = False) -> None:
        """Take in what one read gave. Owns the fds. ``truncated``: the kernel had to drop some (``MSG_CTRUNC``)."""
        if self._error is not None:
            close_all(fds)
            return
        self._fds.extend(fds)
        if truncated:
            self.fail(ProtocolError(f"{self.peer} sent more fds than this process can take (RLIMIT_NOFILE?)"))
            return
        for message in self._codec.receive(data):
            if isinstance(message, WireError):
                self.fail(ProtocolError(self._other_dialect(data) or f"{self.peer} sent {UNKNOWN}: {message}"))
            else:
                self._receive(message)
            if self._error is not None:
                return
        if self._fds and not self._codec.buffered():
            self._drop_fds()
        elif len(self._fds) > MAX_UNCLAIMED:
            self.fail(ProtocolError(f"{self.peer} sent {len(self._fds)} fds that no reply speaks of"))

    def ask(self) -> None:
        """No greeting has come: find out what is there. A socket of JSON-RPC says nothing until it is spoken to.

        It refuses this at once, in its own dialect. A QMP server that is only slow (it starts, or another process takes
        its place) refuses it after its greeting, as any command before the negotiation, and nothing has changed.
        """
        if self.state is State.GREETING and self._error is None:
            number = next(self._ids)
            self._answers[number] = _nothing
            self._send(self._codec.request("query-version", UNSET, number, oob=False))

    def receive_eof(self, cause: OSError | None = None) -> None:
        """The other side closed, or the socket failed."""
        why = f": {cause.strerror or cause}" if cause else ""
        before = "before its greeting" if self.state is State.GREETING else ""
        self.fail(ConnectionLost(f"{self.peer} closed the connection {before}".rstrip() + why))

    def fail(self, error: ClientError) -> None:
        """End the session: every command under way ends in this. Later calls do nothing."""
        if self._error is not None:
            return
        self._error = error
        self.state = State.CLOSED
        self._drop_fds()
        for out in self._out:
            out.close()
        self._out.clear()
        self._to_name.clear()
        self._answers.clear()
        for ticket in list(self._tickets):
            if ticket.command == "quit" and self._quit_sent and isinstance(error, ConnectionLost):
                # "The connection may close before the reply comes": that is what was asked for.
                self._finish(ticket, Empty() if ticket.spec else {})
            else:
                self._finish(ticket, type(error)(f"{error} before {ticket.command} was answered"))

    @property
    def error(self) -> ClientError | None:
        """Why the session is closed; None while it is not."""
        return self._error

    def events_received(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> deque[Outgoing]:
        """What is to be sent, in order. The skin removes what has gone."""
        return self._out

    # --- outward ----------------------------------------------------------------------------------------------

    def _send(self, data: bytes, fds: Sequence[FileDescriptor] = ()) -> None:
        if self._out and not fds:
            self._out[-1].data += data
        else:
            self._out.append(Outgoing(data, fds))

    def _send_command(self, ticket: Ticket, fds: Sequence[FileDescriptor] = ()) -> None:
        number = next(self._ids)
        self._answers[number] = functools.partial(self._answered, ticket)
        self._quit_sent |= ticket.command == "quit"
        self._send(self._codec.request(ticket.command, ticket._arguments, number, oob=ticket._oob), fds)

    def _name_next(self) -> None:
        while self._to_name and self._naming + len(self._to_name[0]._names) <= MAX_PENDING_FDS:
            ticket = self._to_name.popleft()
            self._naming += len(ticket._names)
            ticket._naming = len(ticket._names)
            request = bytearray()
            failures: list[RemoteError] = []
            for name in ticket._names:
                number = next(self._ids)
                self._answers[number] = functools.partial(self._named, ticket, failures)
                request += self._codec.request("getfd", {"fdname": name}, number, oob=False)
            self._send(bytes(request), list(ticket._names.values()))

    def _named(self, ticket: Ticket, failures: list[RemoteError], answer: Returned | Failed) -> None:
        self._naming -= 1
        ticket._naming -= 1
        if isinstance(answer, Failed):
            failures.append(answer.error(f"{ticket.command} (getfd)"))
        if ticket._naming == 0:
            if failures or ticket.abandoned:
                self._finish_without_names(ticket, failures[0] if failures else None)
            else:
                self._send_command(ticket)
            self._name_next()

    def _finish_without_names(self, ticket: Ticket, outcome: Any) -> None:
        """The call consumed no name: close them at the server, and only then let it end.

        Its caller may want to open the same file again at once, and a VFIO group can be open but once.
        """
        if not ticket._names:
            self._finish(ticket, outcome)
            return
        ticket._naming = len(ticket._names)
        for name in ticket._names:
            number = next(self._ids)
            self._answers[number] = functools.partial(self._forgotten, ticket, outcome)
            self._send(self._codec.request("closefd", {"fdname": name}, number, oob=False))

    def _forgotten(self, ticket: Ticket, outcome: Any, _: Returned | Failed) -> None:
        """One name less. For one that was gone already the error is no matter."""
        ticket._naming -= 1
        if ticket._naming == 0:
            self._finish(ticket, outcome)

    # --- inward -----------------------------------------------------------------------------------------------

    def _receive(self, message: Heard) -> None:
        match message:
            case Happened():
                self._happened(message)
            case Announced():
                self._announced(message)
            case Failed(id=None):
                self.fail(ProtocolError(f"{self.peer} did not understand a request: {message.desc}"))
            case Returned() | Failed():
                # An id nobody knows is dropped: the specification says so.
                answer = None if message.id is None else self._answers.pop(message.id, None)
                if answer is not None:
                    answer(message)
                elif isinstance(message, Returned):
                    self._discard(message.value)

    def _other_dialect(self, data: bytes) -> str | None:
        """What to say of a peer that, in its first words, speaks the other dialect."""
        mark, words = OTHERS[self.dialect]
        begun = self.state is State.GREETING or self.dialect is Dialect.JSONRPC
        return f"{self.peer} speaks {words}" if begun and mark in data else None

    def _announced(self, greeting: Announced) -> None:
        if self.state is not State.GREETING:
            self.fail(ProtocolError(f"{self.peer} greeted twice"))
            return
        self.version = greeting.version
        self.oob_enabled = "oob" in greeting.capabilities
        self.state = State.NEGOTIATING
        number = next(self._ids)
        self._answers[number] = self._negotiated
        enable = {"enable": ["oob"]} if self.oob_enabled else UNSET
        self._send(self._codec.request("qmp_capabilities", enable, number, oob=False))

    def _negotiated(self, answer: Returned | Failed) -> None:
        if isinstance(answer, Failed):
            self.fail(ProtocolError(f"{self.peer} refused the negotiation: {answer.desc}"))
        else:
            self.state = State.READY

    def _happened(self, event: Happened) -> None:
        spec = EVENTS.get(event.name)
        text = b"{}" if isinstance(event.data, UnsetType) else event.data
        try:
            data: EventData | dict[str, Any]
            data = msgspec.json.decode(text, type=spec.data) if spec else msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            self.fail(ProtocolError(f"{self.peer} sent an event {event.name} this client does not understand: {error}"))
            return
        self._events.append(Event(event.name, data, event.seq, event.timestamp))

    def _answered(self, ticket: Ticket, answer: Returned | Failed) -> None:
        if isinstance(answer, Failed):
            self._finish_without_names(ticket, answer.error(ticket.command))
            return
        try:
            outcome = self._understand(ticket.spec, answer.value)
        except RecursionError:
            error = ProtocolError(f"The answer to {ticket.command} is nested too deep: fds in it cannot be told")
            self._finish(ticket, error)
            self.fail(error)
            return
        except ProtocolError as error:
            self._finish(ticket, error)
            self.fail(error)
            return
        except msgspec.MsgspecError as error:
            self._discard(answer.value)
            outcome = ProtocolError(f"The answer to {ticket.command} is not what this client expects: {error}")
        if _is_dry_run(ticket._arguments):
            self._finish_without_names(ticket, outcome)
        else:
            self._finish(ticket, outcome)

    def _understand(self, spec: CommandSpec | None, value: msgspec.Raw) -> Any:
        """The result as its caller gets it: typed where the catalogue knows it, with its fds in it."""
        if spec is None:
            result = msgspec.json.decode(value)
            own: Callable[[Any, OwnedFds], Any] = with_fds
        else:
            result = _decoder(spec.name, spec.returns).decode(value)
            if spec.name not in OWN:
                return result
            own = OWN[spec.name]
        owned = OwnedFds(self._take(result))
        try:
            outcome = own(result, owned)
        except BaseException:
            owned.close_all()
            raise
        owned.close()
        return outcome

    def _take(self, result: Any) -> list[FileDescriptor]:
        """As many fds as the result speaks of."""
        count = 1 + max(fd_indexes(result), default=-1)
        if count > len(self._fds):
            raise ProtocolError(f"{self.peer} speaks of {count} fds in a reply, {len(self._fds)} came with it")
        return [self._fds.popleft() for _ in range(count)]

    def _discard(self, value: msgspec.Raw) -> None:
        """A reply nobody wants: its fds must not be taken for another's."""
        try:
            close_all(self._take(msgspec.json.decode(value)))
        except ProtocolError as error:
            self.fail(error)

    def _finish(self, ticket: Ticket, outcome: Any) -> None:
        del self._tickets[ticket]
        close_all(ticket._names.values())
        ticket.done = True
        ticket._outcome = outcome
        if ticket.abandoned:
            close_all(descriptors(outcome))
        elif ticket._on_done is not None:
            ticket._on_done()

    def _drop_fds(self) -> None:
        close_all(self._fds)
        self._fds.clear()


def _nothing(_: Returned | Failed) -> None:
    """What is done with an answer that only had to come."""


@functools.cache
def _decoder(command: str, returns: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(returns)


def _duplicate(fds: Sequence[OpenFd]) -> list[FileDescriptor]:
    """Our own duplicates, all or none: the caller may close its fds before ours have gone."""
    duplicates: list[FileDescriptor] = []
    try:
        for fd in fds:
            duplicates.append(FileDescriptor.duplicate_of(number_of(fd)))
    except OSError as error:
        close_all(duplicates)
        raise ValueError(f"Cannot send fd {len(duplicates)} of the call: {error}") from error
    except BaseException:
        close_all(duplicates)
        raise
    return duplicates


def _is_dry_run(arguments: Any) -> bool:
    """Whether the command succeeds without consuming its names."""
    if isinstance(arguments, DeviceAdd):
        return arguments.x_dry_run
    return isinstance(arguments, Mapping) and arguments.get("x-dry-run") is True
