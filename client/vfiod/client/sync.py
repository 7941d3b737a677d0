"""The client for programs that wait: no threads, no loop.

::

    with Client.connect("vm1.sock") as client:
        with client.events("DEVICE_DELETED") as deleted:
            client.device_del(id="nic0")
            print(deleted.get(timeout=10).data)

A client belongs to one thread at a time: events arrive, and answers are matched, only while one of its methods waits.
Several threads open several clients; a server takes 64.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from vfiod.client.connection import Connection, Dialect, State, Ticket
from vfiod.client.errors import ConnectionLost, RequestTimedOut
from vfiod.client.events import DEFAULT_LIMIT, Event, EventName, EventQueue
from vfiod.client.fds import OpenFd
from vfiod.client.methods.sync import Methods
from vfiod.client.sockets import adopt, connect_failed, new_socket, path_of, receive, send
from vfiod.protocol.catalogue import Arguments
from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.limits import GREETING_MS

__all__ = ["Client", "EventStream"]

MAX_POLL: Final = 3600.0
"""Seconds of one poll(2); a longer wait is several of them (its argument is a C int of milliseconds)."""


class Client(Methods):
    """A session with a vfiod server; :meth:`connect` makes one. Every command of the catalogue is a method."""

    def __init__(self, sock: socket.socket, connection: Connection, timeout: float | None) -> None:
        self._sock = sock
        self._connection = connection
        self._timeout = timeout
        self._queues: list[EventQueue] = []
        self._closed_here = False

    @classmethod
    def connect(
        cls,
        where: str | os.PathLike[str] | socket.socket,
        *,
        dialect: Dialect | str = Dialect.QMP,
        timeout: float | None = None,
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
        if isinstance(where, socket.socket):
            sock = adopt(where)
        else:
            sock = new_socket()
            try:
                sock.settimeout(timeout)
                sock.connect(path_of(where))
                sock.setblocking(False)
            except OSError as error:
                sock.close()
                raise connect_failed(where, error) from error
        client = cls(sock, Connection(Dialect(dialect), peer=peer), timeout)
        try:
            client._greet(timeout)
        except BaseException:
            client.close()
            raise
        return client

    def _greet(self, timeout: float | None) -> None:
        def ready() -> bool:
            return self._connection.state is State.READY

        patience = GREETING_MS / 1000
        if timeout is not None and timeout <= patience:
            self._wait(ready, timeout, "the greeting")
            return
        try:
            self._wait(ready, patience, "the greeting")
        except RequestTimedOut:
            self._connection.ask()
            self._wait(ready, None if timeout is None else timeout - patience, "the greeting, and a question after it")

    @property
    def version(self) -> VersionInfo | None:
        """What greeted us; None in JSON-RPC, which has no greeting."""
        return self._connection.version

    def fileno(self) -> int:
        """The socket's fd: readable when :meth:`poll` would find something. -1 when closed."""
        return self._sock.fileno()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Run a command by its name, known to the catalogue or not, and return the result as it came.

        ``...-fd`` members of the result are :class:`~vfiod.protocol.fd.FileDescriptor`, the caller's to close.
        For the other arguments and the errors see :meth:`call`.
        """
        ticket = self._connection.start(command, arguments, fds=fds, attach=attach, oob=oob)
        return self._finish(ticket, timeout)

    def _run(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        ticket = self._connection.start(arguments, fds=fds, attach=attach, oob=oob)
        return self._finish(ticket, timeout)

    def _finish(self, ticket: Ticket, timeout: float | None) -> Any:
        try:
            self._wait(lambda: ticket.done, self._timeout if timeout is None else timeout, ticket.command)
        except ConnectionLost:
            pass  # the ticket says so itself, with the command's name
        except BaseException:
            self._connection.abandon(ticket)
            raise
        return ticket.result()

    def send_fds(self, fds: Sequence[OpenFd]) -> None:
        """Send fds, lent, that ``getfd`` or ``add_fd`` will name one by one. Seldom needed: methods take fds."""
        self._connection.send_fds(fds)
        self._turn(0)  # what the socket does not take now goes before the next command

    def events(self, *events: EventName, limit: int = DEFAULT_LIMIT) -> EventStream:
        """The events from now on: of these names or classes, or all. Close it, or use it in ``with``."""
        return EventStream(self, EventQueue(events, limit=limit))

    def poll(self) -> None:
        """Take in what has arrived, without waiting. Raises ConnectionLost."""
        self._check()
        self._turn(0)

    def close(self) -> None:
        """End the session. What the server holds on for it (names of fds) goes; devices stay."""
        self._closed_here = True
        self._connection.fail(ConnectionLost("This client was closed"))
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- moving bytes ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._connection.error is not None:
            raise ConnectionLost(str(self._connection.error))

    def _wait(self, done: Callable[[], bool], seconds: float | None, what: str) -> None:
        """Move bytes until it is done. Raises RequestTimedOut; ConnectionLost when that can never be."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not done():
            self._check()
            left = MAX_POLL if deadline is None else min(max(deadline - time.monotonic(), 0.0), MAX_POLL)
            if not self._turn(left) and deadline is not None and time.monotonic() >= deadline:
                raise RequestTimedOut(f"{self._connection.peer} did not answer {what} within {seconds:g} s")

    def _turn(self, seconds: float) -> bool:
        """Send what can be sent, wait for something, take it in. False when nothing came."""
        out = self._connection.data_to_send()
        try:
            flushed = send(self._sock, out)
            poll = select.poll()
            poll.register(self._sock, select.POLLIN | (0 if flushed else select.POLLOUT))
            ready = poll.poll(seconds * 1000)
            if not ready:
                return False
            if ready[0][1] & ~select.POLLOUT:
                self._read()
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost(error)
        return True

    def _read(self) -> None:
        data, fds, truncated = receive(self._sock)
        if data:
            self._connection.receive_data(data, fds, truncated=truncated)
            self._distribute()
            if self._connection.error is not None:
                self._sock.close()
        else:
            self._lost(None)

    def _lost(self, error: OSError | None) -> None:
        # A server that refuses us may have said why before it closed: a failed send does not hide that.
        while error is not None:
            try:
                data, fds, truncated = receive(self._sock)
            except OSError:
                break
            if not data:
                break
            self._connection.receive_data(data, fds, truncated=truncated)
        self._distribute()
        self._connection.receive_eof(error)
        self._sock.close()

    def _distribute(self) -> None:
        for event in self._connection.events_received():
            for queue in self._queues:
                queue.put(event)


class EventStream:
    """Events of one client, from the moment it was made.

    Iterating waits for the next, without end; it stops when the client is closed here, and raises ConnectionLost when
    the connection is lost.
    """

    def __init__(self, client: Client, queue: EventQueue) -> None:
        self._client = client
        self._queue = queue
        client._queues.append(queue)

    def fileno(self) -> int:
        """The client's: readable when :meth:`pending` may find something. -1 when closed."""
        return self._client.fileno()

    def get(self, timeout: float | None = None) -> Event:
        """The next event. Raises RequestTimedOut after ``timeout`` seconds (None: never), ConnectionLost at the end."""
        event = self._queue.get()
        if event is None:
            self._client._wait(lambda: len(self._queue) > 0, timeout, "with an event")
            event = self._queue.get()
        assert event is not None  # noqa: S101 - the wait saw one, and nobody else takes from here
        return event

    def pending(self) -> list[Event]:
        """What has arrived so far, without waiting. Raises ConnectionLost when nothing can come any more."""
        if self._client._connection.error is None:
            self._client._turn(0)
        if not len(self._queue):
            self._client._check()
        return list(iter(self._queue.get, None))

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return self.get()
        except ConnectionLost:
            if not self._client._closed_here:
                raise
            raise StopIteration from None

    def close(self) -> None:
        """No more events; what was not taken is dropped."""
        if self._queue in self._client._queues:
            self._client._queues.remove(self._queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
