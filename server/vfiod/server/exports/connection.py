"""One client's connection: bytes and fds in and out, whole requests in order, one at a time. Knows no command.

In: everything is read as it comes; replies to our own questions are given out at once, requests queue and are executed
strictly in order of arrival (the specification, "Command Concurrency"). One that has to wait keeps those behind it
waiting, and nobody else. Out: replies are sent at once as far as the client reads; what it leaves unread is bounded, and
then its requests are left unread too. So a client that stops reading stops itself.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from msgspec import Struct

from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.protocol.fd import FileDescriptor, close_all, rights_of
from vfiod.protocol.limits import (
    READ_CHUNK,
    VFIO_USER_MAX_BACKLOG,
    VFIO_USER_MAX_FDS,
    VFIO_USER_MAX_PENDING,
    VFIO_USER_MAX_QUEUE,
)
from vfiod.protocol.vfio_user.framing import FrameError, Framer, Message
from vfiod.protocol.vfio_user.header import HEADER_SIZE, BadMessage, Command, Flags, Header, MessageType

__all__ = ["Connection", "Reply"]

_log: Final = logging.getLogger(__name__)

_HEADER: Final = Header.LAYOUT
_REPLY: Final = int(MessageType.REPLY)
_ERROR_REPLY: Final = int(MessageType.REPLY) | int(Flags.ERROR)
_NO_REPLY: Final = int(Flags.NO_REPLY)
_FD_SPACE: Final = socket.CMSG_SPACE((VFIO_USER_MAX_FDS + 1) * 4)
"""Room for one fd more than is allowed: who sends more is told, and the rest is cut off by the kernel."""


class Reply(Struct, frozen=True, eq=False):
    """What answers a request: the bytes after the header, and fds, which are closed once they are sent."""

    body: bytes = b""
    fds: tuple[FileDescriptor, ...] = ()


DONE: Final = Reply()

Fast = Callable[[bytes], bytes | None]
"""Tried with what one read gave, when nothing else is under way: the whole answer, or None when it is not for it."""

Execute = Callable[[Message], Reply | Awaitable[Reply]]


class Connection:
    """One connection.

    Args:
        loop: the event loop.
        connection: the socket; the object owns it from here on.
        execute: does what a request asks for; raises CommandError or BadMessage to refuse. Owns the message's fds.
        fast: see :data:`Fast`.
        ended: called once, soon after the connection has ended, with the reason.

    Attributes:
        requests: how many requests have come.
        errors: how many were answered with an error.

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
        self.requests = 0
        self.errors = 0
        self._loop = loop
        self._socket = connection
        self._execute = execute
        self._fast = fast
        self._on_end = ended
        self._framer = Framer()
        self._queue: deque[Message] = deque()
        self._queued = 0  # bytes in the queue
        self._task: asyncio.Task[None] | None = None
        self._out: deque[tuple[memoryview, tuple[FileDescriptor, ...]]] = deque()
        self._backlog = 0  # bytes not sent yet
        self._reading = False
        self._pumping = False
        self._asked: dict[int, Future[bytes]] = {}  # our own requests, by id
        self._next_id = 0
        self._parting: str | None = None  # ends when all is sent
        self._reason: str | None = None

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read."""
        self._read_on()

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self._reason is None

    @property
    def busy(self) -> bool:
        """Whether a request is being executed, or waits."""
        return self._task is not None or bool(self._queue)

    def fileno(self) -> int:
        """The socket, lent."""
        return self._socket.fileno()

    def part(self, reason: str) -> None:
        """Execute nothing more; end when what is to be said has been sent."""
        if self._reason is None and self._parting is None:
            self._parting = reason
            self._stop_reading()
            self._drop_queue()
            if not self._out:
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
        self._framer.close()
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
        for message in self._queue:
            message.close()
        self._queue.clear()
        self._queued = 0

    # --- reading --------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """Read when there is room for what comes; else leave it to the kernel."""
        # While we ask, the answer may stand behind requests: those are read too, to a limit.
        room = self._queued < VFIO_USER_MAX_QUEUE and self._backlog < VFIO_USER_MAX_BACKLOG
        wanted = self._reason is None and self._parting is None and (room or bool(self._asked))
        if wanted and not self._reading:
            self._loop.add_reader(self._socket.fileno(), self._readable)
            self._reading = True
        elif not wanted:
            self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket.fileno())
            self._reading = False

    def _readable(self) -> None:
        try:
            data, ancillary, _flags, _ = self._socket.recvmsg(READ_CHUNK, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(f"The connection broke: {error.strerror}")
            return
        if not ancillary and self._task is None and not self._out and not self._framer.pending and not self._queue:
            # Nearly always: one whole request that wants no more than a register.
            answer = self._fast(data)
            if answer is not None:
                self.requests += 1
                if answer:
                    self._send(answer)
                return
        if not data and not ancillary:
            cut = f" in the middle of a message ({self._framer.pending} bytes of it came)" if self._framer.pending else ""
            self.end(f"The client has closed the connection{cut}")
            return
        for one in self._framer.receive_data(data, rights_of(ancillary)):
            self._received(one)
        if self._queued > VFIO_USER_MAX_QUEUE * 8:
            self.end(f"The client sent {self._queued} bytes of requests and did not answer ours")
        self._pump()
        self._read_on()

    def _received(self, one: Message | FrameError) -> None:
        if self._parting is not None or self._reason is not None:
            if isinstance(one, Message):
                one.close()
            return
        if isinstance(one, FrameError):
            self.errors += 1
            if one.header is not None and not one.header.no_reply and not one.header.is_reply:
                self._refuse(one.header, one.errno)
            if one.fatal:
                self.part(one.desc)
            else:
                _log.warning("%s", one.desc)
            return
        if one.header.is_reply:
            self._answered(one)
            return
        self.requests += 1
        self._queue.append(one)
        self._queued += one.header.size

    # --- executing, in order ----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Execute what is queued, until one has to wait, or the client does not read."""
        while self._queue and self._task is None and self._backlog < VFIO_USER_MAX_BACKLOG:
            message = self._queue.popleft()
            self._queued -= message.header.size
            self._one(message)

    def _one(self, message: Message) -> None:
        try:
            result = self._execute(message)
        except (CommandError, BadMessage) as error:
            message.close()
            self._failed(message.header, error)
            return
        if isinstance(result, Reply):
            message.close()
            self._reply(message.header, result)
            return
        self._task = self._loop.create_task(self._wait(message, result))

    async def _wait(self, message: Message, result: Awaitable[Reply]) -> None:
        try:
            self._reply(message.header, await result)
        except (CommandError, BadMessage) as error:
            self._failed(message.header, error)
        except Exception as error:
            _log.exception("Executing %s failed by a defect of vfiod", message.header.title)
            self._failed(message.header, OperationFailed(message.header.title, "vfiod", errno="EIO", advice=str(error)))
        finally:
            message.close()
            self._task = None
            self._pump()
            self._read_on()

    def _failed(self, header: Header, error: CommandError | BadMessage) -> None:
        self.errors += 1
        _log.info("%s refused: %s", header.title, error)
        if not header.no_reply:
            self._refuse(header, error.errno or "EIO")

    def _refuse(self, header: Header, errno_name: str) -> None:
        number = getattr(errno, errno_name, errno.EIO)
        self._send(_HEADER.pack(header.id, header.command, HEADER_SIZE, _ERROR_REPLY, number))

    def _reply(self, header: Header, reply: Reply) -> None:
        if header.flags & _NO_REPLY or self._reason is not None:
            close_all(reply.fds)
            return
        head = _HEADER.pack(header.id, header.command, HEADER_SIZE + len(reply.body), _REPLY, 0)
        self._send(head + reply.body, reply.fds)

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, command: Command, body: bytes, answer: Future[bytes]) -> None:
        """Send a request of our own; the body of the reply goes to ``answer``, or what went wrong."""
        if self._reason is not None or self._parting is not None:
            _fail(answer, OperationFailed(command.name, "the client", errno="ENOTCONN", advice=self._reason or "it goes"))
            return
        if len(self._asked) >= VFIO_USER_MAX_PENDING:
            _fail(answer, OperationFailed(command.name, "the client", errno="EBUSY", advice="it answers nothing"))
            return
        while self._next_id in self._asked:
            self._next_id = (self._next_id + 1) & 0xFFFF
        number, self._next_id = self._next_id, (self._next_id + 1) & 0xFFFF
        self._asked[number] = answer
        self._send(_HEADER.pack(number, command, HEADER_SIZE + len(body), 0, 0) + body)
        self._read_on()

    def forget(self, answer: Future[bytes]) -> None:
        """Nobody waits for it any more: its reply, should it come, is dropped."""
        for number, one in tuple(self._asked.items()):
            if one is answer:
                del self._asked[number]
        self._read_on()

    def _answered(self, message: Message) -> None:
        message.close()  # replies bring no fds
        header = message.header
        answer = self._asked.pop(header.id, None)
        if answer is None:
            _log.info("A reply to a question nobody waits for (%s) is dropped", header.title)
        elif header.is_error:
            number = header.error or errno.EIO
            _fail(answer, OperationFailed(header.title, "the client", errno=number))
        elif not answer.cancelled():
            answer.set_result(message.body)

    # --- sending ----------------------------------------------------------------------------------------

    def _send(self, data: bytes, fds: tuple[FileDescriptor, ...] = ()) -> None:
        if self._reason is not None:
            close_all(fds)
            return
        if self._out:
            self._out.append((memoryview(data), fds))
            self._backlog += len(data)
            return
        sent = self._try(data, fds)
        if sent < 0 or sent == len(data):
            return
        # fds go with the first byte; whatever was taken took them along.
        rest = () if sent else fds
        self._out.append((memoryview(data)[sent:], rest))
        self._backlog += len(data) - sent
        self._loop.add_writer(self._socket.fileno(), self._writable)

    def _try(self, data: bytes | memoryview, fds: tuple[FileDescriptor, ...]) -> int:
        """Bytes that the kernel took, fds gone with the first; -1: the connection has ended."""
        try:
            if not fds:
                return self._socket.send(data)
            sent = self._socket.sendmsg([data], [_rights(fds)])
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


def _rights(fds: Sequence[FileDescriptor]) -> tuple[int, int, bytes]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *(fd.number for fd in fds))


def _fail(answer: Future[bytes], error: OperationFailed) -> None:
    with suppress(Exception):  # whoever waited has given up
        answer.set_exception(error)
