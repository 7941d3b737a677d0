"""One connection to the monitor: bytes and fds in, commands begun, replies and events out.

All of it runs on the event loop's thread and never waits. A dialect (:mod:`.qmp`, :mod:`.jsonrpc`) is a subclass
that says what a text means, and in which order commands may run.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final

from vfiod.protocol.catalogue.devices import SessionInfo
from vfiod.protocol.catalogue.monitor import QmpCapability, Stat, StatsResult
from vfiod.protocol.errors import CommandError, CommandNotFound, LimitExceeded, VfiodError
from vfiod.protocol.fd import MSG_CMSG_CLOEXEC, MSG_CTRUNC, FileDescriptor, close_all, rights_of
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, MAX_REPLY_BACKLOG, READ_CHUNK
from vfiod.protocol.wire.stream import JsonStream
from vfiod.server import trace
from vfiod.server.commands.call import Call
from vfiod.server.events import Event
from vfiod.server.fds import FdNames
from vfiod.server.kernel import open_files
from vfiod.server.monitor import dispatch
from vfiod.server.monitor.writer import JOIN_BYTES, Writer
from vfiod.server.sockets.access import Peer

if TYPE_CHECKING:
    from vfiod.server.monitor.audit import Asker
    from vfiod.server.monitor.server import MonitorServer
    from vfiod.server.state.doors import SessionState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["Session"]

_log: Final = logging.getLogger(__name__)

ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * 4)

SMALL_READ: Final = 16 * 1024
"""Bytes asked of one ``recvmsg`` as long as requests are small."""

TURN: Final = 128
"""Requests begun in one go: then the other sessions have theirs."""

EVENTS_PER_FLUSH: Final = 64
"""Events gathered while a read is worked off, before they are sent without waiting for its end."""


class Session(ABC):
    """One connection.

    Args:
        number: the session's id, from 1.
        connection: a connected, non-blocking stream socket; the session owns it.
        peer: who is there.
        server: the monitor it belongs to.
        methods: what its socket's role may run.

    """

    dialect: ClassVar[str]
    """The dialect's name: ``qmp``, ``jsonrpc``."""

    def __init__(
        self, number: int, connection: socket.socket, peer: Peer, server: MonitorServer, methods: dispatch.RoleMethods
    ) -> None:
        self.id: Final = number
        self.peer: Final = peer
        self.names: Final = FdNames(server.kind_of)
        self.negotiated = False
        self.closed = False
        self.in_flight = 0
        self.commands = 0
        self.errors = 0
        self.events = 0
        self.fds_received = 0
        self.bytes_received = 0
        self._server: Final = server
        self._machine: Final = server.machine
        self._methods: Final = methods
        self._loop: Final = server.loop
        self._connection: Final = connection
        self._receive: Final = connection.recvmsg
        self._stream: Final = JsonStream()
        self._inbox: Final[deque[Any]] = deque()
        self._writer: Final = Writer(connection, server.loop, self._drained, self._broken)
        self._reading = False
        self._working = False
        self._alone = False
        self._ask = SMALL_READ
        self._scheduled = False
        self._unsubscribe: Any = None

    # --- what a dialect says --------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def _decode(text: bytes) -> Any:
        """What the text asks for, when that is plain at the first look; else None."""

    @abstractmethod
    def _take(self, item: Any) -> None:
        """Work on one item of the stream: what :meth:`_decode` gave, a text, or an error.

        Begin what it asks for, or answer why not.
        """

    @property
    @abstractmethod
    def _stalled(self) -> bool:
        """Whether so much is in flight that no further text may be taken."""

    @abstractmethod
    def _encode_event(self, event: Event) -> bytes:
        """One line for one event."""

    @staticmethod
    @abstractmethod
    def complaint(error: VfiodError) -> bytes:
        """One line that tells an error which answers no request."""

    @abstractmethod
    def _greet(self) -> None:
        """Say what the dialect says first, if anything."""

    def negotiate(self, enable: list[QmpCapability]) -> None:
        """``qmp_capabilities``. Raises CommandNotFound where there is nothing to negotiate."""
        raise CommandNotFound("qmp_capabilities belongs to QMP sessions: this dialect negotiates nothing")

    # --- for the server -------------------------------------------------------------------------

    def start(self) -> None:
        """Greet, and begin to read."""
        if trace.session_opened.on:
            trace.session_opened(session=self.id, dialect=self.dialect, uid=self.peer.uid, pid=self.peer.pid)
        self._greet()
        self._writer.flush()
        self._settle()

    def info(self) -> SessionInfo:
        """What ``query-machine`` says of it."""
        return SessionInfo(
            id=self.id,
            dialect=self.dialect,
            uid=self.peer.uid,
            pid=self.peer.pid,
            negotiated=self.negotiated,
            events_lost=self._writer.backlog.lost_total,
            role=self._methods.role.name,
        )

    @property
    def role(self) -> str:
        """The name of its socket's role."""
        return self._methods.role.name

    def allows(self, command: str) -> bool:
        """Whether the socket's role may run a command."""
        return command in self._methods

    def refusal(self, command: str) -> CommandError:
        """What to say to a command that the role may not run."""
        return self._methods.role.refusal(command)

    def asker(self) -> Asker:
        """Who is there, for the audit log."""
        from vfiod.server.monitor.audit import Asker

        return Asker(self.id, self.dialect, self.peer.uid, self.peer.pid, self._methods.role.name)

    def stats(self) -> StatsResult:
        """What ``query-stats`` says of it."""
        values = {
            "commands": self.commands,
            "errors": self.errors,
            "events": self.events,
            "events-lost": self._writer.backlog.lost_total,
            "fds-received": self.fds_received,
            "bytes-received": self.bytes_received,
            "bytes-sent": self._writer.bytes_sent,
            "in-flight": self.in_flight,
            "bytes-waiting": self._writer.bytes_waiting,
        }
        return StatsResult(
            provider="vfiod",
            qom_path=f"/sessions/{self.id}",
            stats=[Stat(name=name, value=value) for name, value in values.items()],
        )

    def fileno(self) -> int:
        """The connection's fd, lent."""
        return self._connection.fileno()

    @property
    def idle(self) -> bool:
        """Nothing is in flight and nothing waits to be sent."""
        return self.in_flight == 0 and self._writer.idle

    def close(self) -> None:
        """End it: what is in flight goes on, its reply is dropped; what was named is closed."""
        if self.closed:
            return
        self.closed = True
        if trace.session_closed.on:
            trace.session_closed(session=self.id)
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._stop_reading()
        self._writer.close()
        self._inbox.clear()
        self._abandon()
        self.names.close()
        self._connection.close()
        self._server.ended(self)

    @abstractmethod
    def _abandon(self) -> None:
        """Forget commands that have not begun."""

    # --- over a change of the process -----------------------------------------------------------

    @property
    def under_way(self) -> str | None:
        """What has begun, for a person; None: it is between two requests."""
        return f"a command of session {self.id}" if self.in_flight or self._inbox else None

    def hold(self) -> None:
        """Read nothing more; what was read is done."""
        self._stop_reading()

    def release(self) -> None:
        """Read on."""
        self._settle()

    def keep(self, given: Given) -> SessionState | None:
        """Describe it, between two requests; None: its reader has lost its place, it can only end."""
        from vfiod.server.state.doors import SessionState

        unread = self._stream.unread
        if unread is None or self.closed:
            return None
        owner = f"session:{self.id}"
        named, pending = self.names.keep(owner, given)
        backlog = self._writer.backlog
        return SessionState(
            id=self.id,
            dialect=self.dialect,
            role=self._methods.role.name,
            fd=given.give(self.fileno(), owner),
            pid=self.peer.pid,
            uid=self.peer.uid,
            negotiated=self.negotiated,
            oob=self._oob(),
            subscribed=self._unsubscribe is not None,
            input=unread,
            output=self._writer.keep(owner, given),
            named=named,
            pending=pending,
            commands=self.commands,
            errors=self.errors,
            events=self.events,
            fds_received=self.fds_received,
            bytes_received=self.bytes_received,
            bytes_sent=self._writer.bytes_sent,
            lost_total=backlog.lost_total,
            lost=backlog.keep(),
        )

    def _oob(self) -> bool:
        """Whether out-of-band commands were negotiated."""
        return False

    def adopt(self, state: SessionState, taken: Taken) -> None:
        """Go on where the other process's session stood: without a greeting, with the events that follow."""
        self.negotiated = state.negotiated
        self.commands, self.errors, self.events = state.commands, state.errors, state.events
        self.fds_received, self.bytes_received = state.fds_received, state.bytes_received
        self.names.adopt(state.named, state.pending, taken)
        self._stream.receive(state.input, self._decode)
        self._writer.bytes_sent = state.bytes_sent
        self._writer.adopt(state.output, taken)
        self._writer.backlog.adopt(state.lost_total, state.lost)
        if state.subscribed:
            self.subscribe()
        self._loop.call_soon(self._begin_again)

    def _begin_again(self) -> None:
        if not self.closed:
            self._writer.flush()
            self._settle()

    # --- events ---------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """From now on events come here."""
        if self._unsubscribe is None:
            self._unsubscribe = self._server.hub.subscribe(self._deliver)

    def _deliver(self, event: Event) -> None:
        backlog = self._writer.backlog
        if not backlog.admit(event.seq):
            return
        self._put_event(event)
        if not self._working or backlog.waiting > EVENTS_PER_FLUSH:
            self._writer.flush()

    def _put_event(self, event: Event) -> None:
        line = event.encoded.get(self.dialect)
        if line is None:
            line = event.encoded[self.dialect] = self._encode_event(event)
        self.events += 1
        self._writer.put(line, event=True)

    def _tell_lost(self) -> None:
        """All that waited has left: name what could not wait."""
        lost = self._writer.backlog.take_lost()
        if lost is not None:
            event = self._server.hub.lost(*lost)
            self._writer.backlog.waiting += 1
            self._put_event(event)
            self._writer.flush()

    # --- reading --------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._receive(self._ask, ANCILLARY_BYTES, MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._broken(error)
            return
        if ancillary or flags & MSG_CTRUNC:
            self._receive_fds(ancillary, flags)
        if not data:
            self.close()
            return
        self.bytes_received += len(data)
        # Large reads cost memory even when little comes: ask for much only while much comes.
        self._ask = READ_CHUNK if len(data) == self._ask else SMALL_READ
        stream = self._stream
        # The way nearly every command goes: one plain text, answered at once by one write. What is saved here counts:
        # between a message and the next, the processor has forgotten all of this code.
        item = self._decode(data) if stream.between and len(data) <= stream.sure_bytes else None
        if item is None or self._inbox:
            items = stream.receive(data, self._decode)
            if len(items) != 1 or self._inbox:
                if items:
                    self._inbox.extend(items)
                    self._work()
                return
            item = items[0]
        self._working = self._alone = True
        try:
            self._take(item)
        finally:
            self._working = self._alone = False
        writer = self._writer
        if writer.bytes_waiting:
            writer.flush()
        if self.in_flight or writer.blocked:
            self._settle()

    def _put(self, line: bytes, fds: list[FileDescriptor] | None) -> None:
        """One reply: sent now when it answers the only text of a read, else with the others."""
        if self._alone and fds is None:
            self._writer.write(line)
        else:
            self._writer.put(line, fds)

    def _receive_fds(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        fds = rights_of(ancillary)  # owned, whatever comes next
        self.fds_received += len(fds)
        if trace.session_fds.on:
            trace.session_fds(session=self.id, fds=[fd.number for fd in fds])
        trouble: LimitExceeded | None = None
        if flags & MSG_CTRUNC or open_files.are_scarce(fds):
            close_all(fds)
            trouble = LimitExceeded(
                f"File descriptors were lost on arrival, {len(fds)} that came were closed: the server has too many"
                " open files; close some, or raise its RLIMIT_NOFILE"
            )
        else:
            try:
                self.names.receive(fds)
            except LimitExceeded as error:
                trouble = error
        if trouble is not None:
            self.errors += 1
            self._writer.put(self.complaint(trouble))
            self._writer.flush()

    def _work(self) -> None:
        """Take texts as long as that is allowed, answer, and see whether to read on."""
        if self._working:
            return
        self._working = True
        inbox = self._inbox
        writer = self._writer
        turn = TURN
        try:
            while inbox and turn and not self._stalled and writer.bytes_waiting < MAX_REPLY_BACKLOG:
                turn -= 1
                self._take(inbox.popleft())
        finally:
            self._working = False
        if self.closed:
            return
        # In the middle of many texts small replies gather: each send may wake the peer.
        if not inbox or self._stalled or self._writer.bytes_waiting >= JOIN_BYTES:
            self._writer.flush()
        self._settle()

    def _settle(self) -> None:
        """Read on, work on later, or wait for something to end."""
        self._server.settled()
        if self.closed:
            return
        if self._server.held:
            self._stop_reading()
        elif self._stalled or self._writer.full:
            # What lets go calls _work again: a command that ends, or the writer that has drained.
            self._stop_reading()
        elif self._inbox:
            self._stop_reading()
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._continue)
        elif not self._reading:
            self._reading = True
            self._loop.add_reader(self._connection.fileno(), self._readable)

    def _continue(self) -> None:
        self._scheduled = False
        if not self.closed:
            self._work()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._connection.fileno())

    # --- writing --------------------------------------------------------------------------------

    def _drained(self) -> None:
        self._tell_lost()
        self._work()

    def _broken(self, error: OSError) -> None:
        _log.debug("Session %d broke: %s", self.id, error)
        self.close()

    # --- commands -------------------------------------------------------------------------------

    def _later(self, method: dispatch.Method, call: Call, pending: dispatch.Pending, done: Any) -> None:
        """Wait for a pending command in a task of its own; ``done(value, call)`` has its end."""
        self.in_flight += 1

        async def wait() -> None:
            try:
                value = await dispatch.finish(method, call, pending)
            finally:
                self.in_flight -= 1
            if self.closed:
                close_all(call.succeed() or ())  # nobody is left to take them
                return
            done(value, call)
            self._writer.flush()
            self._work()

        self._server.keep(asyncio.ensure_future(wait()))
