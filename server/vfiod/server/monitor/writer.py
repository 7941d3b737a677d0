"""What goes out of one session: in order, bounded, never waiting, each fd with the first byte of its reply.

A reply goes straight to the socket; only what the socket does not take is kept, and sent when it is writable again.
Events alone wait for the end of the loop's turn, so that a burst of them is few sends, and wakes the reader as often.
Replies and events share one queue, so that their order is the order in which they happened.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from vfiod.protocol.fd import SCM_RIGHTS, SOL_SOCKET, FileDescriptor, close_all
from vfiod.protocol.limits import MAX_REPLY_BACKLOG
from vfiod.server.events import Backlog

if TYPE_CHECKING:
    from vfiod.server.state.doors import OutgoingState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["EVENTS_PER_SEND", "JOIN_BYTES", "SendLoop", "Writer"]

JOIN_BYTES: Final = 64 * 1024
"""How much is joined into one ``send``: about what a Unix socket takes at once."""

EVENTS_PER_SEND: Final = 64
"""Events that may gather before they are sent without waiting for the end of the turn: far fewer than may wait for a
reader, so that gathering loses none."""

_NATIVE: Final = sys.byteorder


class SendLoop(Protocol):
    """The part of an event loop the writer needs."""

    def add_writer(self, fd: int, callback: Callable[[], object]) -> object:
        """Call back while the fd is writable."""

    def remove_writer(self, fd: int) -> object:
        """Call back no more."""

    def call_soon(self, callback: Callable[[], object]) -> object:
        """Call back once, in the loop's next turn."""


class _Entry:
    """Replies, or events, that wait; ``data`` shrinks as it goes out.

    ``events`` has the bytes of each event that has not left, in reverse order; it is None for replies.
    """

    __slots__ = ("data", "events", "fds")

    def __init__(self, data: bytes | memoryview, fds: list[FileDescriptor] | None, events: list[int] | None) -> None:
        self.data = data
        self.fds = fds
        self.events = events


class Writer:
    """The outgoing side of one connection.

    Args:
        connection: a non-blocking stream socket; lent.
        loop: the event loop.
        drained: called when everything has left that could not be sent at once.
        broken: called once, when the peer cannot be written to any more.

    Attributes:
        backlog: the account of this reader's events.
        blocked: the socket is full; nothing is tried until it is writable.
        bytes_waiting: bytes that the socket has not taken yet.
        bytes_sent: bytes it has.

    """

    __slots__ = (
        "_broken",
        "_connection",
        "_drained",
        "_events",
        "_gathering",
        "_loop",
        "_plain",
        "_queue",
        "_transmit",
        "backlog",
        "blocked",
        "bytes_sent",
        "bytes_waiting",
        "dead",
    )

    def __init__(
        self, connection: socket.socket, loop: SendLoop, drained: Callable[[], None], broken: Callable[[OSError], None]
    ) -> None:
        self._connection = connection
        self._transmit = connection.send
        self._loop = loop
        self._drained = drained
        self._broken = broken
        self._queue: deque[_Entry] = deque()
        # At most one of them has anything: what was put last, not yet joined.
        self._plain: list[bytes] = []
        self._events: list[bytes] = []
        self._gathering = False
        self.blocked = False
        self.backlog = Backlog()
        self.bytes_waiting = 0
        self.bytes_sent = 0
        self.dead = False

    @property
    def full(self) -> bool:
        """So many bytes wait that the session must not be read until they have left."""
        return self.bytes_waiting >= MAX_REPLY_BACKLOG

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return self.bytes_waiting == 0

    def put(self, data: bytes, fds: list[FileDescriptor] | None = None, *, event: bool = False) -> None:
        """Queue one reply or event; :meth:`flush` sends it. The fds are the writer's from here on."""
        if self.dead:
            close_all(fds or ())
            return
        self.bytes_waiting += len(data)
        if event:
            if self._plain:
                self._seal()
            self._events.append(data)
            return
        if fds or self._events:
            self._seal()
        if fds:
            self._queue.append(_Entry(data, fds, None))
        else:
            self._plain.append(data)

    def write(self, data: bytes) -> None:
        """Send one reply without fds, now; the same as :meth:`put` and :meth:`flush`, and quicker."""
        if not self.bytes_waiting and not self.dead:
            try:
                count = self._transmit(data)
            except OSError:
                count = 0  # flush meets it again, and knows what to do
            self.bytes_sent += count
            if count == len(data):
                return
            data = data[count:]
        self.put(data)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now; the rest follows by itself. A few events alone: when the turn ends."""
        if self.blocked:
            return
        if self._queue or self._plain or len(self._events) > EVENTS_PER_SEND:
            self._send()
        elif self._events and not self._gathering:
            self._gathering = True
            self._loop.call_soon(self._gathered)

    def _gathered(self) -> None:
        """The turn has ended: send its events, unless a reply has taken them along."""
        self._gathering = False
        if self._events and not self.blocked:
            self._send()
            if not self.blocked and not self.dead:
                self._drained()

    def _seal(self) -> None:
        """Make one entry of the plain replies, or of the events, put since the last."""
        plain, events = self._plain, self._events
        if plain:
            self._queue.append(_Entry(plain[0] if len(plain) == 1 else b"".join(plain), None, None))
            plain.clear()
        elif events:
            self._queue.append(_Entry(b"".join(events), None, [len(event) for event in reversed(events)]))
            events.clear()

    def _send(self) -> None:
        self._seal()
        queue = self._queue
        try:
            while queue:
                entry = queue[0]
                if entry.fds:
                    self._send_with_fds(entry)
                elif len(queue) == 1:
                    self._sent(self._connection.send(entry.data))
                else:
                    self._sent(self._connection.send(self._joined()))
        except (BlockingIOError, InterruptedError):
            if not self.blocked:
                self.blocked = True
                self._loop.add_writer(self._connection.fileno(), self._writable)
        except OSError as error:
            self.close()
            self._broken(error)

    def _joined(self) -> bytes:
        """The oldest entries without fds, joined, as many as one send may take."""
        parts: list[bytes | memoryview] = []
        size = 0
        for entry in self._queue:
            if entry.fds or size >= JOIN_BYTES:
                break
            parts.append(entry.data)
            size += len(entry.data)
        return b"".join(parts)

    def _send_with_fds(self, entry: _Entry) -> None:
        """Fds go with the first byte of their reply, and with it alone: then they are the receiver's."""
        fds = entry.fds or []
        rights = b"".join(fd.number.to_bytes(4, _NATIVE, signed=True) for fd in fds)
        count = self._connection.sendmsg([entry.data], [(SOL_SOCKET, SCM_RIGHTS, rights)])
        entry.fds = None
        close_all(fds)
        self._sent(count)

    def _sent(self, count: int) -> None:
        """So many bytes have left: take them off the queue."""
        self.bytes_waiting -= count
        self.bytes_sent += count
        queue = self._queue
        while count:
            entry = queue[0]
            size = len(entry.data)
            if count < size:
                entry.data = memoryview(entry.data)[count:]
                if entry.events is not None:
                    self._left(entry.events, count)
                return
            count -= size
            queue.popleft()
            if entry.events is not None:
                self.backlog.sent(len(entry.events))

    def _left(self, events: list[int], count: int) -> None:
        """So many bytes of an entry's events have left: account for those that are gone whole."""
        while count >= events[-1]:
            count -= events.pop()
            self.backlog.sent()
        events[-1] -= count

    def _writable(self) -> None:
        self.blocked = False
        self._send()
        if not self.blocked and not self.dead:
            self._loop.remove_writer(self._connection.fileno())
            self._drained()

    def keep(self, owner: str, given: Given) -> list[OutgoingState]:
        """Describe what waits, in order; it waits on."""
        from vfiod.server.state.doors import OutgoingState

        self._seal()
        return [
            OutgoingState(
                data=bytes(entry.data),
                fds=[given.give(fd, f"{owner}/reply") for fd in entry.fds or ()],
                events=None if entry.events is None else list(entry.events),
            )
            for entry in self._queue
        ]

    def adopt(self, states: Iterable[OutgoingState], taken: Taken) -> None:
        """Have what waited in another process; :meth:`flush` sends it."""
        for one in states:
            fds = [taken.take(place) for place in one.fds]
            self._queue.append(_Entry(one.data, fds or None, one.events))
            self.bytes_waiting += len(one.data)
            self.backlog.waiting += len(one.events or ())

    def close(self) -> None:
        """Drop what waits, with its fds. Call it before the connection is closed."""
        if self.dead:
            return
        self.dead = True
        self._loop.remove_writer(self._connection.fileno())
        for entry in self._queue:
            close_all(entry.fds or ())
        self._queue.clear()
        self._plain.clear()
        self._events.clear()
        self.bytes_waiting = 0
