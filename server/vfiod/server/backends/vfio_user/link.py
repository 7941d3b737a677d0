"""One connection to a vfio-user server: requests from any thread, each with a time-out; serving its own requests.

Nobody's thread is kept for reading. Who waits for a reply reads the socket meanwhile, for everybody; while nobody
waits, the loop does. The loop hears of the socket through an epoll of the link's own, which is told to say nothing
while a worker reads: so the loop sleeps through other people's replies.

::

    worker ── ask ──► send ──► poll, recvmsg ──► Channel ──► its reply │ replies of others │ DMA_READ, DMA_WRITE
    loop   ── post ─► send                       ▲
    loop   ◄─ epoll ────────────── recvmsg ──────┘   (while no worker reads)

A link is lost once, with a reason: the server hung up, spoke nonsense, or did not read what it was sent. Every
request then fails, at once.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from msgspec import Struct

from vfiod.protocol import vfio_user
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FD_BYTES, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET, FileDescriptor, close_all, rights_of
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, READ_CHUNK, VFIO_USER_MAX_UNREAD, VFIO_USER_PATIENCE
from vfiod.protocol.vfio_user import Broken, Channel, Command, Failure, Outgoing, Payload, Rejected, Reply, Request
from vfiod.server.kernel import open_files

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ConnectionState

__all__ = ["Link", "Serve"]

_log: Final = logging.getLogger(__name__)

_ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * FD_BYTES)
_ROUNDS: Final = 32
"""Reads in one go on the loop: a server that never stops talking must not have it for itself."""

P = TypeVar("P")

Serve = Callable[[Request], "Payload | str"]
"""Does what the server asks for; the reply's body, or the name of an errno. In any thread."""


class _Waiting(Struct, eq=False):
    """A request that has no reply yet.

    Attributes:
        command: what was asked.
        told: called with what came, in whatever thread read it; None: somebody waits and looks.
        outcome: what came; None: nothing yet.

    """

    command: Command
    told: Callable[[Reply | Failure], None] | None = None
    outcome: Reply | Failure | None = None


class _Socket:
    """One socket with its channel, and what waits to be sent on it."""

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.channel = channel
        self.outgoing: deque[Outgoing] = deque()
        self.sent = 0  # bytes of the first that are gone
        self.queued = 0  # bytes that were ever queued
        self.gone = 0  # bytes of messages that were sent whole
        self.wanted: int = select.EPOLLIN  # what the loop is woken by
        self.sending = threading.Lock()

    def queue(self, message: Outgoing) -> None:
        """Send it after all others. With the link's lock: the order is that of ids."""
        self.outgoing.append(message)
        self.queued += len(message.data)

    def flush(self) -> bool:
        """Send what the socket takes now; from any thread. True when nothing is left. Raises OSError."""
        while self.outgoing:
            if not self.sending.acquire(blocking=False):
                return True  # somebody is at it, and looks again when done
            try:
                while self.outgoing:
                    if not self._send(self.outgoing[0]):
                        return False
                    self.gone += len(self.outgoing.popleft().data)
                    self.sent = 0
            finally:
                self.sending.release()
        return True

    def _send(self, message: Outgoing) -> bool:
        data = memoryview(message.data)
        while self.sent < len(data):
            try:
                if message.fds and not self.sent:
                    rights = [(SOL_SOCKET, SCM_RIGHTS, memoryview(_ints(message.fds)))]
                    self.sent += self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                else:
                    self.sent += self.sock.send(data[self.sent :], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
        return True


def _ints(fds: Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(FD_BYTES, _ORDER) for fd in fds)


_ORDER: Final = "little" if memoryview(b"\1\0").cast("H")[0] == 1 else "big"


class Link:
    """A connection. Made by whoever has connected the socket; the handshake is :meth:`ask` of a VERSION.

    Args:
        sock: connected; the link owns it.
        what: the server, for messages.
        timeout_ms: how long a reply may take, in milliseconds.
        serve: does what the server asks for.
        lost: called once with the reason, in any thread, when the connection is lost; not by :meth:`close`.

    Attributes:
        until: when its time for all that is asked now is over (``time.monotonic``), besides that for each reply.

    """

    def __init__(
        self, sock: socket.socket, what: str, *, timeout_ms: int, serve: Serve, lost: Callable[[str], None]
    ) -> None:
        self.what = what
        self._timeout = timeout_ms / 1000
        self._timeout_ms = timeout_ms
        self._serve = serve
        self.until = float("inf")
        self.on_lost = lost
        self._main = _Socket(sock, Channel.client())
        self._twin: _Socket | None = None
        self._state = threading.Condition()
        self._waiting: dict[int, _Waiting] = {}
        self._reading = False  # somebody is at recvmsg
        self._overdue: tuple[Command, int] | None = None  # the first request that got no reply in time
        self._lost: str | None = None
        self._closed = False
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)

    # --- for the loop -------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Watch this for reading, on the loop, and call :meth:`ready`."""
        return self._epoll.fileno()

    def ready(self) -> None:
        """Something happened on a socket. On the loop; never waits."""
        with self._state:
            mine = not (self._reading or self._closed or self._lost is not None)
            self._reading = self._reading or mine
        if mine:
            try:
                self._flush(self._main)
                self._read_some(self._main)
            finally:
                self._hand_back()
        twin = self._twin
        if twin is not None:
            self._flush(twin)
            self._read_some(twin)
            self._listen(twin)

    def _hand_back(self) -> None:
        """Read no longer: the loop hears of the socket again, or the next who waits."""
        with self._state:
            self._reading = False
            self._listen(self._main)
            self._state.notify_all()

    def _listen(self, side: _Socket, *, silently: bool = False) -> None:
        """Have the loop woken by what concerns it; silently: by nothing."""
        if self._lost is None and not self._closed:
            wanted = 0 if silently else select.EPOLLIN | (select.EPOLLOUT if side.outgoing else 0)
            if wanted != side.wanted:
                side.wanted = wanted
                self._epoll.modify(side.sock, wanted)

    # --- asking ---------------------------------------------------------------------------------------------

    @property
    def lost(self) -> str | None:
        """Why it is lost; None: it is not."""
        return self._lost

    @property
    def wire(self) -> vfio_user.Wire:
        """What was agreed on."""
        return self._main.channel.wire

    def agreed(self, wire: vfio_user.Wire, twin: socket.socket | None) -> None:
        """The handshake is done. Owns the twin socket, on which the server's own requests come from now on."""
        self._main.channel.wire = wire
        if twin is None:
            return
        other = self._main.channel.twin()
        # On the main socket the server asks nothing any more.
        self._main.channel.accept_nothing()
        self._twin = _Socket(twin, other)
        self._epoll.register(twin, select.EPOLLIN)

    # --- over a change of the process: on the loop, which does nothing else meanwhile -----------------------

    @property
    def under_way(self) -> str | None:
        """Why it is not at rest, for a person; None: nothing is out, nothing half sent, nobody reads it."""
        with self._state:
            if self._lost is not None or self._closed:
                return f"the end of the connection to {self.what}"
            waiting = next(iter(self._waiting.values()), None)
            if waiting is not None:
                return f"{waiting.command.name}, which {self.what} has not answered,"
            if self._overdue is not None or self._main.channel.unanswered:
                late = "a request" if self._overdue is None else self._overdue[0].name
                return f"{late}, which {self.what} has not answered in time,"
            if self._reading or any(side.outgoing for side in self._sides()):
                return f"what is being said to {self.what}"
        return None

    def keep(self, given: Given) -> ConnectionState:
        """Describe it at rest: what has come of the server's next message stays with it."""
        from vfiod.server.state.machine import ConnectionState, SideState

        first, *twin = (
            SideState(
                fd=given.give(side.sock.fileno(), self.what),
                input=data,
                input_fds=[given.give(fd, f"{self.what} input") for fd in fds],
            )
            for side in self._sides()
            for data, fds in (side.channel.keep(),)
        )
        return ConnectionState(main=first, next_id=self._main.channel.next_id, twin=twin[0] if twin else None)

    def adopt(self, wire: vfio_user.Wire, state: ConnectionState, twin: socket.socket | None, taken: Taken) -> None:
        """Stand where another process's link stood. Nothing is read or sent. Owns the twin socket."""
        channel = self._main.channel
        first = [taken.take(fd) for fd in state.main.input_fds]
        channel.adopt(wire, state.main.input, first, next_id=state.next_id)
        self.agreed(wire, twin)
        if self._twin is not None and state.twin is not None:
            fds = [taken.take(fd) for fd in state.twin.input_fds]
            self._twin.channel.adopt(wire, state.twin.input, fds)

    def _sides(self) -> list[_Socket]:
        return [self._main] if self._twin is None else [self._main, self._twin]

    # --- asking, continued ----------------------------------------------------------------------------------

    def ask(self, payload: Payload, fds: Sequence[int] = (), *, command: Command | None = None) -> Reply:
        """Ask, and wait for the reply. Blocks up to the time-out: never on the loop.

        Raises OperationFailed: what the server said; ETIMEDOUT; ENOTCONN once the connection is lost; EPROTO for a
        reply that makes no sense.
        """
        waiting = _Waiting(command or vfio_user.COMMAND_OF[type(payload)])
        deadline = min(time.monotonic() + self._timeout, self.until)
        id = self._begin(payload, fds, waiting)
        outcome = self._await(id, waiting, deadline)
        if isinstance(outcome, Failure):
            raise self._refused(outcome)
        return outcome

    def ask_for(self, payload: Payload, kind: type[P], *, command: Command | None = None) -> P:
        """:meth:`ask` for a reply of one kind, without fds."""
        reply = self.ask(payload, command=command)
        reply.close()
        if not isinstance(reply.payload, kind):
            raise TypeError(f"The reply to {reply.command.name} is {type(reply.payload).__name__}")
        return reply.payload

    def post(
        self,
        payload: Payload,
        told: Callable[[OperationFailed], None],
        *,
        command: Command | None = None,
    ) -> None:
        """Ask, and do not wait. ``told`` is called, in any thread, if the server refuses.

        Raises OperationFailed when it cannot even be sent.
        """

        def heard(outcome: Reply | Failure) -> None:
            if isinstance(outcome, Failure):
                told(self._refused(outcome))
            else:
                outcome.close()

        self._begin(payload, (), _Waiting(command or vfio_user.COMMAND_OF[type(payload)], heard))

    def _begin(self, payload: Payload, fds: Sequence[int], waiting: _Waiting) -> int:
        main, asked = self._main, waiting.command
        with self._state:
            self._check(asked)
            try:
                id, out = main.channel.request(payload, fds, command=asked)
            except vfio_user.BadMessage as error:
                raise self._failed(asked, error.errno, str(error)) from None
            self._waiting[id] = waiting
            main.queue(out)
        self._flush(main)
        return id

    def _check(self, asked: Command) -> None:
        if self._lost is not None:
            raise self._failed(asked, "ENOTCONN", self._lost)
        if self._overdue is not None:
            late, _ = self._overdue
            advice = f"the server has not answered {late.name} within {self._timeout_ms} ms, nor said anything since"
            raise self._failed(asked, "ETIMEDOUT", advice)

    def _await(self, id: int, waiting: _Waiting, deadline: float) -> Reply | Failure:
        while True:
            with self._state:
                while waiting.outcome is None and self._reading:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._state.wait(left):
                        break
                if waiting.outcome is not None:
                    return waiting.outcome
                if time.monotonic() >= deadline:
                    raise self._too_late(id, waiting.command)
                self._reading = True
                self._listen(self._main, silently=True)
            try:
                self._read_until(waiting, deadline)
            finally:
                self._hand_back()

    def _read_until(self, waiting: _Waiting, deadline: float) -> None:
        """Read for everybody until this one has its reply, or its time is over. The reader's role is ours."""
        main = self._main
        poll = select.poll()
        while waiting.outcome is None:
            poll.register(main.sock, select.POLLIN | (select.POLLOUT if main.outgoing else 0))
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return
            self._flush(main)
            self._read_some(main)

    def _too_late(self, id: int, asked: Command) -> OperationFailed:
        """The time is over. Called with the state's lock."""
        del self._waiting[id]
        if self._main.outgoing:
            # It was not even sent whole, and its fds are lent: it must never be sent.
            self._lose(f"the server has not read what it was sent within {self._timeout_ms} ms")
        else:
            self._main.channel.forget(id)
            self._overdue = self._overdue or (asked, id)
        advice = f"the server has not answered within {self._timeout_ms} ms (x-msg-timeout)"
        if time.monotonic() >= self.until:
            advice = f"the server is too slow: {VFIO_USER_PATIENCE} times x-msg-timeout were not enough to look at it"
        return self._failed(asked, "ETIMEDOUT", advice)

    # --- reading --------------------------------------------------------------------------------------------

    def _read_some(self, side: _Socket) -> None:
        """Read and handle what is there; not all of it when there is much."""
        for _ in range(_ROUNDS):
            if self._lost is not None or self._closed:
                return
            try:
                data, ancillary, _, _ = side.sock.recvmsg(READ_CHUNK, _ANCILLARY, MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"reading from it failed: {error.strerror}")
                return
            fds = rights_of(ancillary)
            if fds and open_files.are_scarce(fds):
                close_all(fds)
                self._lose("it sent fds, and this server has too many open files (RLIMIT_NOFILE)")
                return
            if not data:
                close_all(fds)
                cut = side.channel.cut_short
                self._lose("it hung up" + (f", {cut} bytes into a message" if cut else ""))
                return
            self._received(side, data, fds)
            if len(data) < READ_CHUNK and not ancillary:
                return  # nothing more was there a moment ago

    def _received(self, side: _Socket, data: bytes, fds: list[FileDescriptor]) -> None:
        told: list[tuple[_Waiting, Reply | Failure]] = []
        with self._state:
            self._overdue = None
            happenings = side.channel.receive(data, fds)
            for happening in happenings:
                if isinstance(happening, Reply | Failure):
                    waiting = self._waiting.pop(happening.id, None)
                    if waiting is None:
                        if isinstance(happening, Reply):
                            happening.close()
                        continue
                    waiting.outcome = happening
                    told.append((waiting, happening))
            if told:
                self._state.notify_all()
        for waiting, outcome in told:
            if waiting.told is not None:
                waiting.told(outcome)
        for happening in happenings:
            if isinstance(happening, Request):
                self._answer(side, happening)
            elif isinstance(happening, Rejected):
                _log.warning("%s: %s", self.what, happening.desc)
                self._send(side, happening.outgoing)
            elif isinstance(happening, Broken):
                self._lose(f"it speaks no vfio-user: {happening.desc}")

    def _answer(self, side: _Socket, request: Request) -> None:
        done = self._serve(request)
        request.close()
        out = side.channel.refuse(request, done) if isinstance(done, str) else side.channel.reply(request, done)
        self._send(side, out)

    # --- sending --------------------------------------------------------------------------------------------

    def _send(self, side: _Socket, out: Outgoing | None) -> None:
        if out is None or self._lost is not None:
            return
        with self._state:
            side.queue(out)
        self._flush(side)

    def _flush(self, side: _Socket) -> None:
        if self._lost is not None or self._closed:
            return
        try:
            side.flush()
        except OSError as error:
            self._lose(f"writing to it failed: {error.strerror}")
            return
        if side.queued - side.gone > VFIO_USER_MAX_UNREAD:
            self._lose(f"it has left {side.queued - side.gone} bytes unread")

    # --- the end ----------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        """The connection is of no use any more: everybody who waits hears it. Once; in any thread."""
        told: list[tuple[_Waiting, Failure]] = []
        with self._state:
            if self._lost is not None or self._closed:
                return
            self._lost = reason
            for id, waiting in self._waiting.items():
                failure = Failure(id, waiting.command, "ENOTCONN", reason)
                waiting.outcome = failure
                told.append((waiting, failure))
            self._waiting.clear()
            self._shut()
            self._state.notify_all()
        for waiting, failure in told:
            if waiting.told is not None:
                waiting.told(failure)
        self.on_lost(reason)

    def _shut(self) -> None:
        for side in (self._main, self._twin):
            if side is not None:
                side.channel.close()
                self._epoll.unregister(side.sock)
                with contextlib.suppress(OSError):  # the server was first
                    side.sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Let go of the server: whoever waits gets ENOTCONN at once. From any thread; :meth:`close` must follow."""
        self.on_lost = _nobody
        self._lose("it was closed")

    def close(self) -> None:
        """Hang up, and close; stop watching it before. Whoever still waits gets ENOTCONN. Later calls do nothing."""
        self.hang_up()
        with self._state:
            if self._closed:
                return
            self._closed = True
            while self._reading:  # it sees the end of the stream at once
                self._state.wait()
        self._epoll.close()
        for side in (self._main, self._twin):
            if side is not None:
                side.sock.close()

    # --- errors -----------------------------------------------------------------------------------------------

    def _failed(self, asked: Command, errno: str, advice: str = "") -> OperationFailed:
        return OperationFailed(f"VFIO_USER_{asked.name}", self.what, errno=errno, advice=advice)

    def _refused(self, failure: Failure) -> OperationFailed:
        return self._failed(failure.command, failure.errno, failure.desc)


def _nobody(reason: str) -> None:
    del reason
