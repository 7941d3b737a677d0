"""The bus, from a program's side: the same commands as methods, and events by topic, over ZeroMQ.

::

    with Bus("ipc:/run/vm1/bus") as bus:
        print(bus.query_devices())

    async with AsyncBus("ipc:/run/vm1/bus") as bus, EventReader("ipc:/run/vm1/events", "DEVICE_DELETED/") as events:
        await bus.device_del(id="nic0")
        print((await events.get()).data)

No fds go over a bus: name them on a Unix socket with ``add-fd``, and give commands ``/dev/fdset/N``. ``tcp:HOST:PORT``
needs keys, as ``zmq.auth.create_certificates`` makes them. ZeroMQ connects, and connects again, by itself: a server
that is not there shows as :class:`~vfiod.client.errors.RequestTimedOut`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import zmq
import zmq.asyncio
from msgspec import UNSET, Struct

from vfiod.client.errors import ConnectFailed, ConnectionLost, ProtocolError, RequestTimedOut
from vfiod.client.events import LOST, Event
from vfiod.client.fds import OpenFd
from vfiod.client.methods.aio import AsyncMethods
from vfiod.client.methods.sync import Methods
from vfiod.protocol.catalogue import EVENTS, Arguments, command_of
from vfiod.protocol.catalogue.monitor import EventsLost
from vfiod.protocol.errors import RemoteError, WireError
from vfiod.protocol.limits import BUS_QUEUE
from vfiod.protocol.wire import packed

__all__ = ["AsyncBus", "Bus", "EventReader", "Keys"]

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds to wait for an answer: a server that is gone gives no sign on a bus."""

LINGER_MS: Final = 100
"""How long what was sent last may take to leave when a client closes."""


Z85_KEY: Final = 40
"""Characters of a CURVE key in a file (RFC 32 of ZeroMQ): 32 bytes."""


class Keys(Struct, frozen=True):
    """What a client needs on ``tcp:``.

    Attributes:
        own: the file of its pair, ``*.key_secret``.
        server: the file of the server's public key, ``*.key``.

    """

    own: str | os.PathLike[str]
    server: str | os.PathLike[str]


def _connect(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, address: str, keys: Keys | None) -> None:
    """Connect, and on ``tcp:`` encrypt. Raises ValueError: no such address, or keys that are missing or none."""
    kind, _, rest = address.partition(":")
    if kind not in ("ipc", "tcp") or not rest:
        raise ValueError(f"A bus is at ipc:PATH or tcp:HOST:PORT, not at '{address}'")
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, BUS_QUEUE)
    socket.setsockopt(zmq.RCVHWM, BUS_QUEUE)
    if kind == "tcp":
        if keys is None:
            raise ValueError(
                f"'{address}' needs keys, ours and the server's (--key, --server-key): anything but ipc: is encrypted"
            )
        public, secret = _key(keys.own)
        if secret is None:
            raise ValueError(f"'{os.fspath(keys.own)}' has no secret key: give the *.key_secret file")
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, _key(keys.server)[0])
    try:
        socket.connect(f"{kind}://{rest}")
    except zmq.ZMQError as error:
        raise ValueError(f"'{address}' is no address: {error.strerror}") from error


@contextmanager
def _taken_in(socket: zmq.Socket[bytes], address: str, patience: float | None) -> Iterator[None]:
    """Connect in here; afterwards the other side has said who it is. Raises ConnectFailed when it did not in time."""
    if patience is None:
        yield
        return
    with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as reports:
        try:
            yield
            if not reports.poll(int(patience * 1000)):
                raise ConnectFailed(f"Nobody publishes on {address}; 'vfiod serve --events {address}' does")
        finally:
            socket.disable_monitor()


def _key(path: str | os.PathLike[str]) -> tuple[bytes, bytes | None]:
    """The public key in a file, and the secret one when it is there. Raises ValueError."""
    from zmq import auth

    try:
        public, secret = auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read the key file '{os.fspath(path)}': {error}") from error
    if any(len(one) != Z85_KEY for one in (public, secret) if one is not None):
        raise ValueError(f"'{os.fspath(path)}' is no key file: a key has {Z85_KEY} characters (zmq_curve(7))")
    return public, secret


def _call_of(
    command: str | Arguments[Any], arguments: Mapping[str, Any] | None, fds: Any, attach: Any, number: int
) -> tuple[str, bytes]:
    if fds or attach:
        raise ValueError("A bus carries no fds: send them over a Unix socket with add-fd, and name /dev/fdset/N here")
    name = command if isinstance(command, str) else command_of(command).name
    given = (arguments or UNSET) if isinstance(command, str) else command
    return name, packed.encode_call(name, given, number)


def _outcome(command: str, answer: packed.Answer | packed.Failure, typed: bool) -> Any:
    if isinstance(answer, packed.Failure):
        raise RemoteError(command, answer.error_class, answer.desc, answer.errno)
    return packed.decode_result(command, answer.value) if typed else answer.value


class Bus(Methods):
    """The bus for ordinary programs. Threads may share it; their calls go one after another.

    Args:
        address: ``ipc:PATH`` or ``tcp:HOST:PORT``.
        keys: for ``tcp:``.
        timeout: seconds to wait for each answer, unless the call says otherwise.

    """

    def __init__(self, address: str, *, keys: Keys | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._address = address
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            _connect(self._socket, address, keys)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        self._context.term()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Run a command by its name, known to the catalogue or not, and return the result as it came.

        ``oob`` says nothing here: a bus has no bands, and nothing waits for another device's work.
        """
        return self._ask(command, arguments, None, (), timeout, typed=False)

    def _run(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        return self._ask(arguments, None, fds, attach, timeout, typed=True)

    def _ask(
        self,
        command: str | Arguments[Any],
        arguments: Mapping[str, Any] | None,
        fds: Any,
        attach: Any,
        timeout: float | None,
        *,
        typed: bool,
    ) -> Any:
        number = next(self._numbers)
        name, payload = _call_of(command, arguments, fds, attach, number)
        seconds = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._socket.closed:
                raise ConnectionLost(f"The client of {self._address} is closed")
            self._socket.send(payload)
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not self._socket.poll(int(left * 1000) + 1):
                    raise RequestTimedOut(f"{self._address} did not answer {name} within {seconds:g} s")
                try:
                    answer = packed.decode_answer(self._socket.recv())
                except WireError as error:
                    raise ProtocolError(str(error)) from error
                if answer.id == number:  # an older one's caller has given up
                    return _outcome(name, answer, typed)


class AsyncBus(AsyncMethods):
    """The bus for asyncio programs: any number of tasks may call at once. The arguments are :class:`Bus`'s."""

    def __init__(self, address: str, *, keys: Keys | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._address = address
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[packed.Answer | packed.Failure]] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._reader: asyncio.Task[None] | None = None
        try:
            _connect(self._socket, address, keys)
        except BaseException:
            self._hang_up()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up; whoever still waits gets ConnectionLost."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        self._fail(ConnectionLost(f"The client of {self._address} is closed"))
        self._hang_up()

    def _hang_up(self) -> None:
        self._socket.close()
        self._context.term()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as in the synchronous client
    ) -> Any:
        """Run a command by its name, known to the catalogue or not, and return the result as it came.

        ``oob`` says nothing here: a bus has no bands, and nothing waits for another device's work.
        """
        return await self._ask(command, arguments, None, (), timeout, typed=False)

    async def _run(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as in the synchronous client
    ) -> Any:
        return await self._ask(arguments, None, fds, attach, timeout, typed=True)

    async def _ask(
        self,
        command: str | Arguments[Any],
        arguments: Mapping[str, Any] | None,
        fds: Any,
        attach: Any,
        seconds: float | None,
        *,
        typed: bool,
    ) -> Any:
        if self._socket.closed:
            raise ConnectionLost(f"The client of {self._address} is closed")
        number = next(self._numbers)
        name, payload = _call_of(command, arguments, fds, attach, number)
        seconds = self._timeout if seconds is None else seconds
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(seconds):
                await self._socket.send(payload)
                answer = await answered
        except TimeoutError as error:
            raise RequestTimedOut(f"{self._address} did not answer {name} within {seconds:g} s") from error
        finally:
            self._waiting.pop(number, None)
        return _outcome(name, answer, typed)

    async def _read(self) -> None:
        while True:
            try:
                answer = packed.decode_answer(await self._socket.recv())
            except WireError as error:
                self._fail(ProtocolError(str(error)))
                continue
            waiting = self._waiting.get(answer.id) if isinstance(answer.id, int) else None
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def _fail(self, error: Exception) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)


class EventReader:
    """Events of the bus, by topic. For asyncio programs with :meth:`get`, for others with :meth:`get_now`.

    Args:
        address: ``ipc:PATH`` or ``tcp:HOST:PORT`` of ``--events``.
        topics: beginnings of ``NAME/device``: ``IRQ/nic0``, ``DEVICE_``; none: all events.
        keys: for ``tcp:``.
        patience: seconds to wait until somebody who publishes has taken us in; None: connected to whenever he comes.

    Raises:
        ConnectFailed: nobody did.

    A reader of all events sees by their numbers when some did not come (it was too slow), and gets an ``EVENTS_LOST``
    of its own in their place. A reader of some topics cannot know.

    """

    def __init__(self, address: str, *topics: str, keys: Keys | None = None, patience: float | None = None) -> None:
        self._address = address
        self._all = not topics
        self._next: int | None = None
        self._kept: Event | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        try:
            for topic in topics or ("",):
                self._socket.subscribe(topic)
            with _taken_in(self._socket, address, patience):
                _connect(self._socket, address, keys)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Read no more."""
        self._socket.close()
        self._context.term()

    def fileno(self) -> int:
        """Readable when :meth:`pending` may find something, once it was called."""
        return int(self._socket.getsockopt(zmq.FD))

    def pending(self) -> list[Event]:
        """What has arrived so far, without waiting."""
        found = []
        while self._kept is not None or self._socket.poll(0):
            found.append(self._take())
        return found

    def get_now(self, timeout: float | None = None) -> Event:
        """The next event; waits for it. Raises RequestTimedOut after so many seconds, None: never."""
        if self._kept is None and not self._socket.poll(None if timeout is None else int(timeout * 1000)):
            raise RequestTimedOut(f"No event on {self._address} within {timeout:g} s")
        return self._take()

    async def get(self, timeout: float | None = None) -> Event:  # noqa: ASYNC109 - the same argument as elsewhere
        """The next event. Raises RequestTimedOut after so many seconds, None: never."""
        if self._kept is None:
            shadow = zmq.asyncio.Socket.from_socket(self._socket)
            try:
                async with asyncio.timeout(timeout):
                    await shadow.poll()
            except TimeoutError as error:
                raise RequestTimedOut(f"No event on {self._address} within {timeout:g} s") from error
        return self._take()

    def _take(self) -> Event:
        kept, self._kept = self._kept, None
        if kept is not None:
            return kept
        frames = self._socket.recv_multipart()
        try:
            event = _event_of(packed.decode_notice(frames[-1]))
        except WireError as error:
            raise ProtocolError(str(error)) from error
        expected, self._next = self._next, (event.seq or 0) + 1
        if self._all and expected is not None and event.seq is not None and event.seq > expected:
            self._kept = event
            lost = EventsLost(count=event.seq - expected, first_seq=expected, last_seq=event.seq - 1)
            return Event(LOST, lost, None, event.timestamp, local=True)
        return event


def _event_of(notice: packed.Notice) -> Event:
    spec = EVENTS.get(notice.name)
    data: Any = notice.data
    if spec is not None:
        try:
            data = msgspec.convert(notice.data, spec.data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"The data of {notice.name} are not what the catalogue declares: {error}") from error
    timestamp = -1.0 if notice.seconds < 0 else notice.seconds + notice.microseconds / 1e6
    return Event(notice.name, data, notice.seq, timestamp)
