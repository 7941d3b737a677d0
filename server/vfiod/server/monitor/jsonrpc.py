"""JSON-RPC 2.0 sessions: every request begins at once, those for one device in their order.

A notification gets no answer, not even an error (section 4.1 of the specification). A batch is answered as a whole,
when its last request has ended. Events come as notifications.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple

from msgspec import UNSET

from vfiod.protocol.catalogue import Arguments
from vfiod.protocol.errors import CommandError, InternalError, VfiodError, WireError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import MAX_JSONRPC_IN_FLIGHT
from vfiod.protocol.wire import jsonrpc
from vfiod.server.commands.call import Call
from vfiod.server.events import Event
from vfiod.server.monitor import dispatch
from vfiod.server.monitor.session import Session
from vfiod.server.sockets.access import Peer

__all__ = ["JsonRpcSession"]

_log: Final = logging.getLogger(__name__)

DEVICE_PATH: Final = "/machine/peripheral/"

Answer = Callable[[bytes | None, list[FileDescriptor] | None], None]
"""Takes one reply, or None for a notification's."""


class _Job(NamedTuple):
    """One request on its way."""

    request: jsonrpc.Request
    method: dispatch.Method
    arguments: Arguments[Any]
    device: str | None
    answer: Answer
    alone: bool


class _Batch:
    """Collects the replies to a batch, in the order of its requests."""

    __slots__ = ("_done", "_missing", "_replies")

    def __init__(self, size: int, done: Callable[[list[bytes]], None]) -> None:
        self._replies: list[bytes | None] = [None] * size
        self._missing = size
        self._done = done

    def slot(self, index: int) -> Answer:
        """Where the reply to the request of this index goes."""

        def answer(line: bytes | None, fds: list[FileDescriptor] | None) -> None:
            close_all(fds or ())  # none: Call.attach refuses them in a batch
            self._replies[index] = line
            self._missing -= 1
            if not self._missing:
                self._done([reply for reply in self._replies if reply is not None])

        return answer


class JsonRpcSession(Session):
    """One JSON-RPC session. There is nothing to negotiate: events come from the beginning."""

    dialect: ClassVar[str] = "jsonrpc"

    def __init__(
        self, number: int, connection: socket.socket, peer: Peer, server: Any, methods: dispatch.RoleMethods
    ) -> None:
        super().__init__(number, connection, peer, server, methods)
        self.negotiated = True
        self._devices: Final[dict[str, deque[_Job]]] = {}  # a device is in here while a command of it is in flight

    # --- the dialect ----------------------------------------------------------------------------

    def _greet(self) -> None:
        self.subscribe()

    @property
    def _stalled(self) -> bool:
        return self.in_flight >= MAX_JSONRPC_IN_FLIGHT

    def _encode_event(self, event: Event) -> bytes:
        return jsonrpc.encode_notification(event.data, event.seq, event.seconds, event.microseconds)

    @staticmethod
    def complaint(error: VfiodError) -> bytes:
        """One line that tells an error which answers no request: its id is null."""
        return jsonrpc.encode_error(error)

    _decode = staticmethod(jsonrpc.decode_plain)

    def _take(self, item: jsonrpc.Single | bytes | WireError) -> None:
        message = item if isinstance(item, jsonrpc.Single) else jsonrpc.decode_request(item)
        if isinstance(message, jsonrpc.Single):
            self._begin(message.item, self._answer_single, True)
            return
        items = message.items
        batch = _Batch(len(items), self._put_batch)
        for index, request in enumerate(items):
            self._begin(request, batch.slot(index), False)

    def _abandon(self) -> None:
        for waiting in self._devices.values():
            self.in_flight -= len(waiting)
            waiting.clear()

    # --- commands -------------------------------------------------------------------------------

    def _begin(self, request: jsonrpc.Request | jsonrpc.Rejected, answer: Answer, alone: bool) -> None:
        self.commands += 1
        if isinstance(request, jsonrpc.Rejected):
            self.errors += 1
            answer(jsonrpc.encode_error(request.error, request.id), None)
            return
        try:
            method = dispatch.find(self._methods, request.command)
            arguments = dispatch.prepare(method, request.arguments)
        except CommandError as error:
            self._server.refused(self, request.command, error)
            self._refuse(request, error, answer)
            return
        device = None if method.device_member is None else _device_of(method.device_member, arguments)
        job = _Job(request, method, arguments, device, answer, alone)
        waiting = None if device is None else self._devices.get(device)
        if waiting is None:
            self._execute(job)
        else:
            self.in_flight += 1
            waiting.append(job)

    def _execute(self, job: _Job) -> None:
        request, method, arguments, device, _, alone = job
        call = Call(self._machine, self._server, self, False, alone and request.id is not UNSET)
        value = dispatch.execute(method, call, arguments)
        if type(value) is not dispatch.Pending:
            self._answer(job, value, call)
            return
        if device is not None:
            self._devices.setdefault(device, deque())
        self._later(method, call, value, lambda value, call: self._next(job, value, call))

    def _next(self, job: _Job, value: Any, call: Call) -> None:
        """A command that went on has ended: answer it, and begin what waited for its device."""
        self._answer(job, value, call)
        if job.device is None:
            return
        waiting = self._devices.pop(job.device)
        while waiting and not self.closed:
            self.in_flight -= 1
            self._execute(waiting.popleft())
            if job.device in self._devices:  # that one goes on: the rest waits for it
                self._devices[job.device] = waiting
                return

    def _answer(self, job: _Job, value: Any, call: Call) -> None:
        if type(value) is dispatch.Failure:
            self._refuse(job.request, value.error, job.answer)
            return
        request_id = job.request.id
        if request_id is UNSET:  # a notification
            close_all(call.succeed() or ())
            job.answer(None, None)
            return
        try:
            line = jsonrpc.encode_result(value, request_id)
        except Exception:  # noqa: BLE001 - a result that is not what the catalogue says
            _log.exception("A result cannot be encoded")
            call.fail()
            error = InternalError("The result cannot be encoded: a defect of vfiod; see its log")
            self._refuse(job.request, error, job.answer)
            return
        job.answer(line, call.succeed() if call.used_fds else None)

    def _refuse(self, request: jsonrpc.Request, error: VfiodError, answer: Answer) -> None:
        self.errors += 1
        if request.is_notification:
            _log.debug("Notification %s was refused: %s", request.command, error)
            answer(None, None)
        else:
            answer(jsonrpc.encode_error(error, request.id), None)

    # --- replies --------------------------------------------------------------------------------

    def _answer_single(self, line: bytes | None, fds: list[FileDescriptor] | None) -> None:
        if line is not None:
            self._put(line, fds)

    def _put_batch(self, replies: list[bytes]) -> None:
        line = jsonrpc.encode_batch(replies)
        if line:
            self._writer.put(line)


def _device_of(member: str, arguments: Arguments[Any]) -> str | None:
    """The device whose order a command joins, by its id, whether it was named by that or by its path."""
    device = getattr(arguments, member)
    return device.removeprefix(DEVICE_PATH) if isinstance(device, str) else None
