"""The client for asyncio programs.

::

    async with await AsyncClient.connect("vm1.sock") as client:
        with client.events("DEVICE_DELETED") as deleted:
            await client.device_del(id="nic0")
            print((await deleted.get(timeout=10)).data)

Any number of tasks may call at once. asyncio's own streams and transports lose the fds that come over a socket, so
this one watches the socket itself (``add_reader`` and ``recvmsg``).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from vfiod.client.connection import Connection, Dialect, State, Ticket
from vfiod.client.errors import ConnectionLost, RequestTimedOut
from vfiod.client.events import DEFAULT_LIMIT, Event, EventName, EventQueue
from vfiod.client.fds import OpenFd
from vfiod.client.methods.aio import AsyncMethods
from vfiod.client.sockets import adopt, connect_failed, new_socket, path_of, receive, send
from vfiod.protocol.catalogue import Arguments
from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.limits import GREETING_MS

__all__ = ["AsyncClient", "AsyncEventStream"]

ACCEPT_RETRY: Final = 0.02
"""Seconds between attempts when the server's accept queue is full: a Unix socket then refuses at once (EAGAIN)."""


class AsyncClient(AsyncMethods):
    """A session with a vfiod server; :meth:`connect` makes one. Every command of the catalogue is a method."""

    def __init__(self, sock: socket.socket, connection: Connection, timeout: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._connection = connection
        self._timeout = timeout
        self._streams: list[AsyncEventStream] = []
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._writing = False
        self._closed_here = False
        self._loop.add_reader(sock, self._readable)

    @classmethod
    async def connect(
        cls,
        where: str | os.PathLike[str] | socket.socket,
        *,
        dialect: Dialect | str = Dialect.QMP,
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as in the synchronous client
    ) -> Self:
        """Connect, and negotiate.

        Args:
            where: the socket's path; or a connected Unix stream socket, which the client then owns.
            dialect: what the socket speaks: ``qmp`` or ``jsonrpc``.
            timeout: seconds to wait here, and for each answer later unless the call says otherwise; None: for ever.

        Raises:
            ConnectFailed: nobody there, or no permission.
            RequestTimedOut, ConnectionLost, ProtocolError: somebody is there, and does not answer as a server does.

        """
        peer = "the server" if isinstance(where, socket.socket) else os.fspath(where)
        try:
            async with asyncio.timeout(timeout):
                sock = adopt(where) if isinstance(where, socket.socket) else await _connected(where)
                client = cls(sock, Connection(Dialect(dialect), peer=peer), timeout)
                try:
                    client._settle()
                    asking = client._loop.call_later(GREETING_MS / 1000, client._ask)
                    try:
                        await client._ready
                    finally:
                        asking.cancel()
                except BaseException:
                    await client.close()
                    raise
        except TimeoutError as error:
            raise RequestTimedOut(f"{peer} did not answer the greeting within {timeout:g} s") from error
        return client

    def _ask(self) -> None:
        self._connection.ask()
        self._flush()

    @property
    def version(self) -> VersionInfo | None:
        """What greeted us; None in JSON-RPC, which has no greeting."""
        return self._connection.version

    def fileno(self) -> int:
        """The socket's fd; -1 when closed."""
        return self._sock.fileno()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as in the synchronous client
    ) -> Any:
        """Run a command by its name, known to the catalogue or not, and return the result as it came.

        ``...-fd`` members of the result are :class:`~vfiod.protocol.fd.FileDescriptor`, the caller's to close.
        For the other arguments and the errors see :meth:`call`.
        """
        done = self._loop.create_future()
        ticket = self._connection.start(
            command, arguments, fds=fds, attach=attach, oob=oob, on_done=lambda: _resolve(done)
        )
        return await self._finish(ticket, done, timeout)

    async def _run(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as in the synchronous client
    ) -> Any:
        done = self._loop.create_future()
        ticket = self._connection.start(arguments, fds=fds, attach=attach, oob=oob, on_done=lambda: _resolve(done))
        return await self._finish(ticket, done, timeout)

    async def _finish(self, ticket: Ticket, done: asyncio.Future[None], seconds: float | None) -> Any:
        self._flush()
        seconds = self._timeout if seconds is None else seconds
        try:
            if seconds is None:
                await done
            else:
                async with asyncio.timeout(seconds):
                    await done
        except TimeoutError as error:
            self._connection.abandon(ticket)
            peer = self._connection.peer
            raise RequestTimedOut(f"{peer} did not answer {ticket.command} within {seconds:g} s") from error
        except BaseException:
            self._connection.abandon(ticket)
            raise
        return ticket.result()

    async def send_fds(self, fds: Sequence[OpenFd]) -> None:
        """Send fds, lent, that ``getfd`` or ``add_fd`` will name one by one. Seldom needed: methods take fds."""
        self._connection.send_fds(fds)
        self._flush()

    def events(self, *events: EventName, limit: int = DEFAULT_LIMIT) -> AsyncEventStream:
        """The events from now on: of these names or classes, or all. Close it, or use it in ``with``."""
        return AsyncEventStream(self, EventQueue(events, limit=limit))

    async def wait_closed(self) -> None:
        """Wait until the session has ended, by either side."""
        await asyncio.shield(self._ended)

    async def close(self) -> None:
        """End the session. What the server holds on for it (names of fds) goes; devices stay."""
        self._closed_here = True
        self._connection.fail(ConnectionLost("This client was closed"))
        self._settle()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # --- moving bytes ----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what the socket takes now; the loop sends the rest."""
        if self._writing or self._connection.error is not None:
            return
        try:
            if not send(self._sock, self._connection.data_to_send()):
                self._writing = True
                self._loop.add_writer(self._sock, self._writable)
        except OSError as error:
            self._lost(error)

    def _writable(self) -> None:
        try:
            if send(self._sock, self._connection.data_to_send()):
                self._writing = False
                self._loop.remove_writer(self._sock)
        except OSError as error:
            self._lost(error)

    def _readable(self) -> None:
        try:
            data, fds, truncated = receive(self._sock)
        except BlockingIOError:
            return
        except OSError as error:
            self._connection.receive_eof(error)
        else:
            if data:
                self._connection.receive_data(data, fds, truncated=truncated)
            else:
                self._connection.receive_eof()
        self._settle()
        self._flush()

    def _lost(self, error: OSError) -> None:
        # A server that refuses us may have said why before it closed: a failed send does not hide that.
        while self._connection.error is None:
            try:
                data, fds, truncated = receive(self._sock)
            except OSError:
                break
            if not data:
                break
            self._connection.receive_data(data, fds, truncated=truncated)
        self._connection.receive_eof(error)
        self._settle()

    def _settle(self) -> None:
        """Hand on what the connection has found: events, readiness, the end."""
        for event in self._connection.events_received():
            for stream in self._streams:
                stream._put(event)
        if self._connection.state is State.READY:
            _resolve(self._ready)
        error = self._connection.error
        if error is None or self._ended.done():
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._ended.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be waiting for it
        for stream in tuple(self._streams):
            stream._wake()


class AsyncEventStream:
    """Events of one client, from the moment it was made.

    Iterating waits for the next, without end; it stops when the client is closed here, and raises ConnectionLost when
    the connection is lost. One task reads it.
    """

    def __init__(self, client: AsyncClient, queue: EventQueue) -> None:
        self._client = client
        self._queue = queue
        self._something = asyncio.Event()
        client._streams.append(self)

    def _put(self, event: Event) -> None:
        if self._queue.put(event):
            self._something.set()

    def _wake(self) -> None:
        self._something.set()

    async def get(self, timeout: float | None = None) -> Event:  # noqa: ASYNC109 - as the synchronous client
        """The next event. Raises RequestTimedOut after ``timeout`` seconds (None: never), ConnectionLost at the end."""
        event = self._queue.get()
        try:
            async with asyncio.timeout(timeout):
                while event is None:
                    if (error := self._client._connection.error) is not None:
                        raise ConnectionLost(str(error))
                    self._something.clear()
                    await self._something.wait()
                    event = self._queue.get()
        except TimeoutError as error:
            peer = self._client._connection.peer
            raise RequestTimedOut(f"{peer} did not answer with an event within {timeout:g} s") from error
        return event

    def pending(self) -> list[Event]:
        """What has arrived so far, without waiting. Raises ConnectionLost when nothing can come any more."""
        if not len(self._queue) and (error := self._client._connection.error) is not None:
            raise ConnectionLost(str(error))
        return list(iter(self._queue.get, None))

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self.get()
        except ConnectionLost:
            if not self._client._closed_here:
                raise
            raise StopAsyncIteration from None

    def close(self) -> None:
        """No more events; what was not taken is dropped."""
        if self in self._client._streams:
            self._client._streams.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _connected(path: str | os.PathLike[str]) -> socket.socket:
    sock = new_socket()
    try:
        while True:
            try:
                sock.connect(path_of(path))  # on a Unix socket this never waits
            except BlockingIOError:
                await asyncio.sleep(ACCEPT_RETRY)
            else:
                return sock
    except OSError as error:
        sock.close()
        raise connect_failed(path, error) from error
    except BaseException:
        sock.close()
        raise
