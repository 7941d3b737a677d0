"""One client's connection: bytes and fds in and out, requests in order, one at a time. Knows no command.

In: everything is read as it comes; replies to our own questions are given out at once, requests queue and are executed
strictly in order of arrival (the specification, "Command Concurrency"). One that has to wait keeps those behind it
waiting, and nobody else. Out: replies are sent at once as far as the client reads; what it leaves unread is bounded,
and then its requests are left unread too: a client that stops reading stops itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol import vfio_user
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.protocol.fd import MSG_CMSG_CLOEXEC, FileDescriptor, close_all, rights_of
from vfiod.protocol.limits import (
    READ_CHUNK,
    VFIO_USER_MAX_BACKLOG,
    VFIO_USER_MAX_FDS,
    VFIO_USER_MAX_QUEUE,
    VFIO_USER_PARTING_MS,
)
from vfiod.protocol.vfio_user import BadMessage, Broken, Channel, Outgoing, Rejected, Request
from vfiod.server.kernel import open_files

if TYPE_CHECKING:
    from vfiod.server.state.doors import ClientState, OutgoingState
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import Place

__all__ = ["DONE", "Answer", "Connection"]

_log: Final = logging.getLogger(__name__)

_FD_SPACE: Final = socket.CMSG_SPACE((VFIO_USER_MAX_FDS + 1) * 4)
"""Room for one fd more than is allowed: who sends more is told so, and the kernel closes the rest."""


class Answer(Struct, frozen=True, eq=False):
    """What answers a request: the reply's body, and fds, which are closed once they are sent."""

    payload: vfio_user.Payload | None = None
    fds: tuple[FileDescriptor, ...] = ()


DONE: Final = Answer()
"""Done, and a header says so."""

Execute = Callable[[Request], Answer | Awaitable[Answer]]

Fast = Callable[[bytearray, int], bytes | None]
"""Tried on what one read gave when nothing else is under way, so many bytes at the start of a buffer.

Gives the whole reply, empty for none; None: it is not for it.
"""

_BUFFER: Final = bytearray(READ_CHUNK)
_VIEW: Final = memoryview(_BUFFER)
_INTO: Final = (_BUFFER,)
"""What all connections read into, one at a time, on the loop: a fresh buffer each time costs more than the rest."""


class Connection:
    """One connection.

    Args:
        loop: the event loop.
        connection: the socket; the object owns it from here on.
        execute: does what a request asks for; raises CommandError or BadMessage to refuse. It takes the fds it keeps.
        fast: see :data:`Fast`.
        ended: called once, soon after the connection has ended, with the reason.

    Attributes:
        channel: the protocol's state.
        requests: how many requests have come.
        errors: how many were refused.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        *,
        execute: Execute,
        fast: Fast,
        ended: Callable[[str], None],
    ) -> None:
        self.channel: Final = Channel.server()
        self.requests = 0
        self.errors = 0
        self._loop = loop
        self._socket = connection
        self._receive: Final = connection.recvmsg_into
        self._transmit: Final = connection.send
        self._execute = execute
        self._fast = fast
        self._on_end = ended
        self._queue: deque[Request | Rejected | Broken] = deque()
        self._queued = 0  # bytes of requests in the queue
        self._task: asyncio.Task[None] | None = None
        self._out: deque[tuple[memoryview, tuple[FileDescriptor, ...]]] = deque()
        self._backlog = 0  # bytes not sent yet
        self._reading = False
        self._held = False  # nothing new is taken: a hand-over is near
        self._cut = False  # a message has not come whole
        self._asked: dict[int, Future[vfio_user.Payload]] = {}  # our own requests, by id
        self._parting: str | None = None  # ends when all is sent
        self._reason: str | None = None

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read."""
        self._read_on()

    @property
    def open(self) -> bool:
        """Whether it has not ended, and is not about to."""
        return self._reason is None and self._parting is None

    def fileno(self) -> int:
        """The socket, lent; -1 once it has ended."""
        return self._socket.fileno()

    @property
    def queued(self) -> bool:
        """Whether requests wait behind the one that is executed."""
        return bool(self._queue)

    def part(self, reason: str) -> None:
        """Execute nothing more; end when what is to be said has been sent, or is not read."""
        if not self.open:
            return
        self._parting = reason
        self._stop_reading()
        self._drop_queue()
        if self._out:
            self._loop.call_later(VFIO_USER_PARTING_MS / 1000, self.end, reason)
        else:
            self.end(reason)

    def end(self, reason: str) -> None:
        """End now. What is being executed goes on, and its reply is dropped. Later calls do nothing."""
        if self._reason is not None:
            return
        self._reason = reason
        self._stop_reading()
        if self._out:
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self.channel.close()
        self._drop_queue()
        for _, fds in self._out:
            close_all(fds)
        self._out.clear()
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            _fail(answer, OperationFailed("DMA", "the client's memory", errno="ENOTCONN", advice=reason))
        self._loop.call_soon(self._on_end, reason)

    async def settled(self) -> None:
        """Wait until the request under way, if any, has been executed."""
        while self._task is not None:
            await asyncio.wait([self._task])

    def _drop_queue(self) -> None:
        for one in self._queue:
            if isinstance(one, Request):
                one.close()
        self._queue.clear()
        self._queued = 0

    # --- over a change of the process -------------------------------------------------------------------

    def hold(self) -> None:
        """Take nothing more but answers to what we asked; what has come is executed."""
        self._held = True
        self._read_on()

    def release(self) -> None:
        """Take everything again."""
        self._held = False
        self._read_on()

    @property
    def under_way(self) -> str | None:
        """What has begun, for a person; None: it is between two requests."""
        if self._task is not None or self._queue:
            return "a request of a client"
        if self._asked:
            return "a device's DMA by messages"
        return "the parting of a client" if not self.open else None

    def keep(self, owner: str, given: Given) -> tuple[bytes, list[Place], list[OutgoingState]]:
        """Describe what has come of the next request, with its fds, and what has not left."""
        from vfiod.server.state.doors import OutgoingState

        data, fds = self.channel.keep()
        out = [
            OutgoingState(data=bytes(waiting), fds=[given.give(fd, f"{owner}/reply") for fd in with_it])
            for waiting, with_it in self._out
        ]
        return data, [given.give(fd, f"{owner}/request") for fd in fds], out

    def adopt(self, wire: vfio_user.Wire | None, state: ClientState, taken: Taken) -> None:
        """Be where another process's connection stood, before :meth:`start`."""
        self.requests, self.errors = state.requests, state.errors
        self.channel.adopt(wire, state.input, [taken.take(place) for place in state.input_fds])
        self._cut = bool(state.input)
        for one in state.output:
            self._out.append((memoryview(one.data), tuple(taken.take(place) for place in one.fds)))
            self._backlog += len(one.data)
        if self._out:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    # --- reading --------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """Read when there is room for what comes; else leave it to the kernel."""
        # While we ask, the answer may stand behind requests: those are read too, to a limit.
        room = self._queued < VFIO_USER_MAX_QUEUE and self._backlog < VFIO_USER_MAX_BACKLOG
        wanted = self.open and ((room and not self._held) or bool(self._asked))
        if wanted is not self._reading:
            if wanted:
                self._loop.add_reader(self._socket.fileno(), self._readable)
                self._reading = True
            else:
                self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket.fileno())
            self._reading = False

    def _readable(self) -> None:
        try:
            size, ancillary, _, _ = self._receive(_INTO, _FD_SPACE, MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(f"The connection broke: {error.strerror}")
            return
        if not (ancillary or self._task or self._out or self._queue or self._cut):
            # Nearly always: one whole request that wants no more than a register.
            answer = self._fast(_BUFFER, size)
            if answer is not None:
                self.requests += 1
                if answer:
                    # As _send, which meets what goes wrong here again, and knows what to do.
                    try:
                        sent = self._transmit(answer)
                    except OSError:
                        sent = 0
                    if sent < len(answer):
                        self._send(answer[sent:])
                return
        if not size and not ancillary:
            cut = self.channel.cut_short
            self.end("The client has closed the connection" + (f", {cut} bytes into a message" if cut else ""))
            return
        fds = rights_of(ancillary)
        if fds and open_files.are_scarce(fds):
            close_all(fds)
            self.end("The client sent fds, and the server has too many open files (RLIMIT_NOFILE)")
            return
        happenings = self.channel.receive(bytes(_VIEW[:size]), fds)
        self._cut = self.channel.cut_short > 0
        self._take(happenings)
        if self._queued > 8 * VFIO_USER_MAX_QUEUE:
            self.end(f"The client sent {self._queued} bytes of requests while it did not answer ours")
        self._pump()
        self._read_on()

    def _take(self, happenings: Iterable[vfio_user.Happening]) -> None:
        for one in happenings:
            if not self.open:
                if isinstance(one, Request | vfio_user.Reply):
                    one.close()
            elif isinstance(one, vfio_user.Reply | vfio_user.Failure):
                self._answered(one)
            else:
                # Refusals too: replies come in the order of requests.
                self._queue.append(one)
                if isinstance(one, Request):
                    self._queued += one.header.size

    # --- executing, in order ----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Execute what is queued, until one has to wait, or the client does not read."""
        while self._queue and self._task is None and self._backlog < VFIO_USER_MAX_BACKLOG:
            one = self._queue.popleft()
            if isinstance(one, Request):
                self._queued -= one.header.size
                self.requests += 1
                self._one(one)
                continue
            self.errors += 1
            _log.info("Refused: %s", one.desc)
            if one.outgoing is not None:
                self._send(one.outgoing.data)
            if isinstance(one, Broken):
                self.part(one.desc)

    def _one(self, request: Request) -> None:
        try:
            result = self._execute(request)
        except (CommandError, BadMessage) as error:
            self._refuse(request, error)
            return
        if isinstance(result, Answer):
            self._reply(request, result)
            return
        self._task = self._loop.create_task(self._wait(request, result))

    async def _wait(self, request: Request, result: Awaitable[Answer]) -> None:
        try:
            self._reply(request, await result)
        except (CommandError, BadMessage) as error:
            self._refuse(request, error)
        except Exception:  # noqa: BLE001 - a defect; the client hears EIO, the log has the rest
            _log.exception("Executing %s failed by a defect of vfiod", request.header.title)
            self._refuse(request, BadMessage("a defect of vfiod", "EIO"))
        finally:
            self._task = None
            self._pump()
            self._read_on()

    def _refuse(self, request: Request, error: CommandError | BadMessage) -> None:
        request.close()
        self.errors += 1
        _log.info("%s refused: %s", request.header.title, error)
        self._outgoing(self.channel.refuse(request, error.errno or "EINVAL"))

    def _reply(self, request: Request, answer: Answer) -> None:
        request.close()
        out = self.channel.reply(request, answer.payload)
        if out is None:
            close_all(answer.fds)
        else:
            self._send(out.data, answer.fds)

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, payload: vfio_user.Payload, answer: Future[vfio_user.Payload]) -> None:
        """Send a request of our own; the body of the reply goes to ``answer``, or OperationFailed."""
        if not self.open:
            _fail(answer, OperationFailed("DMA", "the client's memory", errno="ENOTCONN", advice="the client is gone"))
            return
        try:
            id, out = self.channel.request(payload)
        except BadMessage as error:
            _fail(answer, OperationFailed("DMA", "the client's memory", errno=error.errno, advice=str(error)))
            return
        self._asked[id] = answer
        self._outgoing(out)
        self._read_on()

    def forget(self, answer: Future[vfio_user.Payload]) -> None:
        """Nobody waits for it any more: its reply, should it come, is dropped."""
        for id, one in tuple(self._asked.items()):
            if one is answer:
                del self._asked[id]
                self.channel.forget(id)
        self._read_on()

    def _answered(self, one: vfio_user.Reply | vfio_user.Failure) -> None:
        answer = self._asked.pop(one.id, None)
        if isinstance(one, vfio_user.Reply):
            one.close()
            if answer is not None:
                with suppress(InvalidStateError):  # whoever waited has given up in this moment
                    answer.set_result(one.payload)
        elif answer is not None:
            _fail(answer, OperationFailed(one.command.name, "the client's memory", errno=one.errno, advice=one.desc))

    # --- sending ----------------------------------------------------------------------------------------

    def _outgoing(self, out: Outgoing | None) -> None:
        if out is not None:
            self._send(out.data)

    def _send(self, data: bytes, fds: tuple[FileDescriptor, ...] = ()) -> None:
        if self._reason is not None:
            close_all(fds)
            return
        sent = 0
        if not self._out:
            sent = self._try(data, fds)
            if sent == len(data) or sent < 0:
                return
            self._loop.add_writer(self._socket.fileno(), self._writable)
        # fds go with the first byte; whatever was taken took them along.
        self._out.append((memoryview(data)[sent:], () if sent else fds))
        self._backlog += len(data) - sent

    def _try(self, data: bytes | memoryview, fds: tuple[FileDescriptor, ...]) -> int:
        """Bytes that the kernel took, the fds with the first; -1: the connection has ended."""
        try:
            if not fds:
                return self._transmit(data)
            rights = struct.pack(f"={len(fds)}i", *(fd.number for fd in fds))
            sent = self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            close_all(fds)
            self.end(f"The connection broke: {error.strerror}")
            return -1
        close_all(fds)
        return sent

    def _writable(self) -> None:
        while self._out:
            data, fds = self._out[0]
            sent = self._try(data, fds)
            if sent < 0:
                return
            self._backlog -= sent
            if sent < len(data):
                if sent:
                    self._out[0] = (data[sent:], ())
                return
            self._out.popleft()
        self._loop.remove_writer(self._socket.fileno())
        if self._parting is not None:
            self.end(self._parting)
            return
        self._pump()
        self._read_on()


def _fail(answer: Future[vfio_user.Payload], error: OperationFailed) -> None:
    with suppress(InvalidStateError):  # whoever waited has given up
        answer.set_exception(error)
