"""The bus: many clients, many calls in flight, and events for any number of readers, on ZeroMQ.

Two sockets, either of which may be absent: a ROUTER that takes JSON-RPC calls in msgpack, and a PUB that publishes
each event under the topic ``NAME/device``. Messages carry no fds (``zmq_ipc(7)``): commands that need one refer to an
fd set, ``/dev/fdset/N``, whose fds were sent over a Unix socket. Calls for one device run in the order in which they
came.

ZeroMQ's fd says only that something *may* have happened, and only once (``zmq_getsockopt(3)``, ZMQ_FD): so after every
look, and after every send, the socket is asked what it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import zmq
from msgspec import UNSET

from vfiod.protocol.errors import Busy, CommandError, InternalError, InvalidRequest, VfiodError
from vfiod.protocol.limits import (
    BUS_LINGER_MS,
    MAX_BUS_CALLS,
    MAX_BUS_FRAMES,
    MAX_BUS_IN_FLIGHT,
    MAX_MESSAGE_BYTES,
)
from vfiod.protocol.wire import packed
from vfiod.protocol.wire.arguments import convert_arguments
from vfiod.server.commands.call import Call
from vfiod.server.events import Event
from vfiod.server.monitor import dispatch
from vfiod.server.monitor.bus_socket import Address, BusSocket

if TYPE_CHECKING:
    from vfiod.server.monitor.server import MonitorServer

__all__ = ["Bus", "EventBus"]

_log: Final = logging.getLogger(__name__)

TURN: Final = 64
"""Messages taken in one go: then the loop's other work has its turn."""

FRAMES_IN_TURN: Final = 256
"""Frames dropped in one go, of a message that has too many: about as long as 64 calls take."""

DIALECT: Final = "msgpack"
"""What :attr:`Event.encoded` keeps our bytes under."""


# As plain numbers: pyzmq looks its own constants up anew at each use.
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_MORE: Final = int(zmq.RCVMORE)
_NOW: Final = int(zmq.DONTWAIT)
_NOW_AND_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)


def _received(socket: zmq.Socket[bytes]) -> list[bytes]:
    """One message, which is there; of one with too many frames, one more than may be.

    A frame knows whether more follow; ``recv_multipart`` asks the socket each time.
    """
    frame = socket.recv(_NOW, copy=False)
    frames = [frame.bytes]
    while frame.more and len(frames) <= MAX_BUS_FRAMES:
        frame = socket.recv(_NOW, copy=False)
        frames.append(frame.bytes)
    return frames


def _envelope(frames: list[bytes]) -> list[bytes]:
    """Where an answer goes: to the peer, with an empty frame when a REQ socket sent one."""
    return frames[:2] if len(frames) > 2 and not frames[1] else frames[:1]


def _send_frames(socket: zmq.Socket[bytes], first: Iterable[bytes], last: bytes) -> None:
    """One message, without waiting. Raises ZMQError, at the first frame if at all: the rest goes where that went."""
    for frame in first:
        socket.send(frame, _NOW_AND_MORE)
    socket.send(last, _NOW)


class _Job:
    """One call that is being worked on, or waits for its device."""

    __slots__ = ("arguments", "call", "device", "envelope", "method")

    def __init__(
        self, envelope: list[bytes], call: packed.Call, method: dispatch.Method, arguments: Any, device: str | None
    ) -> None:
        self.envelope = envelope
        self.call = call
        self.method = method
        self.arguments = arguments
        self.device = device

    @property
    def client(self) -> bytes:
        """Whose it is: the identity ZeroMQ gave the peer."""
        return self.envelope[0]


class Bus:
    """The socket of calls.

    Args:
        server: the monitor it belongs to.
        address: where to listen.

    Raises:
        ListenError: it cannot be listened on.

    """

    def __init__(self, server: MonitorServer, address: Address) -> None:
        self._server: Final = server
        self._loop: Final = server.loop
        self._place: Final = BusSocket(address, zmq.ROUTER, server.loop)
        socket = self._socket = self._place.socket
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # A reply that cannot be queued is an error to us, and not a silence.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._number: Final = int(socket.getsockopt(zmq.FD))
        self._devices: Final[dict[str, deque[_Job]]] = {}  # a device is here while a call of it is in flight
        self._clients: Final[Counter[bytes]] = Counter()
        self._in_flight = 0
        self._scheduled = False
        self._closed = False
        self._endless: list[bytes] | None = None  # whose message has too many frames, and is being dropped
        self.calls = 0
        self.errors = 0
        self.replies_dropped = 0
        self._place.bind()
        self._loop.add_reader(self._number, self._look)
        self._later()  # what came before we watched gives no second sign

    @property
    def name(self) -> str:
        """Where it listens, for a person."""
        return str(self._place.address)

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return self._in_flight == 0

    def stats(self) -> dict[str, int]:
        """For ``query-stats``."""
        return {
            "bus-calls": self.calls,
            "bus-errors": self.errors,
            "bus-in-flight": self._in_flight,
            "bus-replies-dropped": self.replies_dropped,
            **self._place.stats(),
        }

    # --- messages in ----------------------------------------------------------------------------

    def _later(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False
        self._look()

    def _look(self) -> None:
        """Take messages as long as there are any, for one turn."""
        if self._closed:
            return
        socket = self._socket
        for _ in range(TURN):
            if self._in_flight >= MAX_BUS_CALLS:
                return  # a call that ends looks again
            if self._endless is None:
                # Asked last, after every send of ours: if it has nothing now, the fd will tell when it has.
                if not int(socket.getsockopt(_EVENTS)) & _POLLIN:
                    return
                frames = _received(socket)
                if len(frames) <= MAX_BUS_FRAMES:
                    self._take(frames)
                    continue
                self._endless = _envelope(frames)
            if not self._drop(self._endless):
                break
        self._later()

    def _drop(self, envelope: list[bytes]) -> bool:
        """Read past what is left of a message of too many frames, for one turn. Whether its end was there."""
        for _ in range(FRAMES_IN_TURN):
            if not self._socket.getsockopt(_MORE):
                self._endless = None
                self.calls += 1
                error = InvalidRequest(f"A call is one frame of msgpack; this message has more than {MAX_BUS_FRAMES}")
                self._refuse(envelope, error, None)
                return True
            self._socket.recv(_NOW, copy=False)
        return False

    def _take(self, frames: list[bytes]) -> None:
        """One message: the peer, an empty frame when a REQ socket sent it, and the call."""
        self.calls += 1
        envelope = _envelope(frames)
        body = frames[len(envelope) :]
        if len(body) != 1:
            self._refuse(envelope, InvalidRequest(f"A call is one frame of msgpack, not {len(body)}"), None)
            return
        call = packed.decode_call(body[0])
        if isinstance(call, packed.Refused):
            self._refuse(envelope, call.error, call.id)
            return
        try:
            if self._clients[envelope[0]] >= MAX_BUS_IN_FLIGHT:
                raise Busy(f"This client has {MAX_BUS_IN_FLIGHT} calls in flight: wait for one of their answers")
            method = dispatch.find(self._server.methods, call.command)
            arguments = convert_arguments(method.spec, call.arguments)
        except CommandError as error:
            self._server.refused(None, call.command, error)
            self._answer_error(envelope, call, error)
            return
        member = method.device_member
        device = None if member is None else getattr(arguments, member)
        job = _Job(envelope, call, method, arguments, device if isinstance(device, str) else None)
        waiting = None if job.device is None else self._devices.get(job.device)
        if waiting is None:
            self._execute(job)
        else:
            self._count(job, 1)
            waiting.append(job)

    # --- calls ----------------------------------------------------------------------------------

    def _execute(self, job: _Job) -> None:
        call = Call(self._server.machine, self._server)
        value = dispatch.execute(job.method, call, job.arguments)
        if type(value) is not dispatch.Pending:
            self._answer(job, value, call)
            return
        if job.device is not None:
            self._devices.setdefault(job.device, deque())
        self._count(job, 1)
        self._server.keep(asyncio.ensure_future(self._finish(job, call, value)))

    async def _finish(self, job: _Job, call: Call, pending: dispatch.Pending) -> None:
        try:
            value = await dispatch.finish(job.method, call, pending)
        finally:
            self._count(job, -1)
        if not self._closed:
            self._answer(job, value, call)
        self._next(job)
        self._later()
        self._server.settled()

    def _next(self, job: _Job) -> None:
        """Begin what waited for a call's device."""
        if job.device is None:
            return
        waiting = self._devices.pop(job.device)
        while waiting and not self._closed:
            following = waiting.popleft()
            self._count(following, -1)
            self._execute(following)
            if job.device in self._devices:  # that one goes on: the rest waits for it
                self._devices[job.device] = waiting
                return

    def _count(self, job: _Job, more: int) -> None:
        self._in_flight += more
        self._clients[job.client] += more
        if not self._clients[job.client]:
            del self._clients[job.client]

    # --- answers --------------------------------------------------------------------------------

    def _answer(self, job: _Job, value: Any, call: Call) -> None:
        if type(value) is dispatch.Failure:
            self._answer_error(job.envelope, job.call, value.error)
            return
        call.succeed()
        if job.call.id is UNSET:
            return
        try:
            payload = packed.encode_result(value, job.call.id)
        except Exception:  # noqa: BLE001 - a result that is not what the catalogue says
            _log.exception("A result cannot be encoded")
            error = InternalError("The result cannot be encoded: a defect of vfiod; see its log")
            self._answer_error(job.envelope, job.call, error)
            return
        self._send(job.envelope, payload)

    def _answer_error(self, envelope: list[bytes], call: packed.Call, error: VfiodError) -> None:
        if call.id is UNSET:
            self.errors += 1
        else:
            self._refuse(envelope, error, call.id)

    def _refuse(self, envelope: list[bytes], error: VfiodError, id: packed.Id) -> None:
        self.errors += 1
        self._send(envelope, packed.encode_error(error, id))

    def _send(self, envelope: list[bytes], payload: bytes) -> None:
        try:
            _send_frames(self._socket, envelope, payload)
        except zmq.ZMQError as error:
            # EAGAIN: a client that does not read; EHOSTUNREACH: one that is gone. Nobody else waits for either.
            self.replies_dropped += 1
            _log.debug("A reply on the bus was dropped: %s", error)

    def close(self) -> None:
        """Take no further call; answers that wait have a moment to leave."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._number)
        self._devices.clear()
        self._place.close(BUS_LINGER_MS)


class EventBus:
    """The socket of events.

    Args:
        server: the monitor it belongs to.
        address: where to listen.

    Raises:
        ListenError: it cannot be listened on.

    """

    def __init__(self, server: MonitorServer, address: Address) -> None:
        self._place: Final = BusSocket(address, zmq.PUB, server.loop)
        self._socket = self._place.socket
        self._place.bind()
        self.published = 0
        self._unsubscribe: Callable[[], object] | None = server.hub.subscribe(self._publish)

    @property
    def name(self) -> str:
        """Where it listens, for a person."""
        return str(self._place.address)

    @property
    def idle(self) -> bool:
        """Always: what waits, ZeroMQ's own threads send."""
        return True

    def stats(self) -> dict[str, int]:
        """For ``query-stats``."""
        return {"bus-events": self.published, **self._place.stats()}

    def _publish(self, event: Event) -> None:
        payload = event.encoded.get(DIALECT)
        if payload is None:
            payload = event.encoded[DIALECT] = packed.encode_notice(
                event.data, event.seq, event.seconds, event.microseconds
            )
        self.published += 1
        # Never waits: a reader whose queue is full misses it, and nobody else does.
        _send_frames(self._socket, (packed.topic_of(event.data),), payload)

    def close(self) -> None:
        """Publish no more; what waits has a moment to leave."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
            self._place.close(BUS_LINGER_MS)
