"""QMP sessions: in-band commands one after another, out-of-band ones at once (QEMU ``docs/interop/qmp-spec.rst``)."""

from __future__ import annotations

import logging
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final

from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.monitor import QmpCapability
from vfiod.protocol.errors import CommandError, CommandNotFound, InternalError, VfiodError, WireError
from vfiod.protocol.limits import MAX_INBAND_QUEUE
from vfiod.protocol.wire import qmp
from vfiod.server.commands.call import Call
from vfiod.server.commands.monitor import VERSION
from vfiod.server.events import Event
from vfiod.server.monitor import dispatch
from vfiod.server.monitor.session import Session
from vfiod.server.sockets.access import Peer

if TYPE_CHECKING:
    from vfiod.server.state.doors import SessionState
    from vfiod.server.state.fds import Taken

__all__ = ["QmpSession"]

_log: Final = logging.getLogger(__name__)

NEGOTIATION: Final = "qmp_capabilities"

_DECODED: Final = (qmp.Request, qmp.Rejected)

GREETING: Final = qmp.encode_greeting(VERSION)


class QmpSession(Session):
    """One QMP session. It begins in negotiation, where ``qmp_capabilities`` alone is known and no event comes."""

    dialect: ClassVar[str] = "qmp"

    def __init__(
        self, number: int, connection: socket.socket, peer: Peer, server: Any, methods: dispatch.RoleMethods
    ) -> None:
        super().__init__(number, connection, peer, server, methods)
        self._oob_enabled = False
        self._running = False  # an in-band command is not finished
        self._queue: Final[deque[qmp.Request | qmp.Rejected]] = deque()

    # --- the dialect ----------------------------------------------------------------------------

    def _greet(self) -> None:
        self._writer.put(GREETING)

    def negotiate(self, enable: list[QmpCapability]) -> None:
        """Leave negotiation; from now on events come."""
        if self.negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self.negotiated = True
        self._oob_enabled = QmpCapability.OOB in enable
        self.subscribe()

    def _oob(self) -> bool:
        return self._oob_enabled

    def adopt(self, state: SessionState, taken: Taken) -> None:
        """See :meth:`Session.adopt`."""
        self._oob_enabled = state.oob
        super().adopt(state, taken)

    @property
    def _stalled(self) -> bool:
        return self._running and len(self._queue) >= MAX_INBAND_QUEUE - 1

    def _encode_event(self, event: Event) -> bytes:
        return qmp.encode_event(event.data, event.seq, event.seconds, event.microseconds)

    @staticmethod
    def complaint(error: VfiodError) -> bytes:
        """One line that tells an error which answers no request."""
        return qmp.encode_error(error)

    _decode = staticmethod(qmp.decode_plain)

    def _abandon(self) -> None:
        self._queue.clear()

    # --- commands -------------------------------------------------------------------------------

    def _take(self, item: qmp.Request | qmp.Rejected | bytes | WireError) -> None:
        """Begin one request, and answer it unless it goes on."""
        request = item if isinstance(item, _DECODED) else qmp.decode_request(item, oob_enabled=self._oob_enabled)
        if self._running and type(request) is not qmp.OobRequest:
            # Errors wait for their turn too: replies to in-band input come in its order.
            self._queue.append(request)
            return
        self.commands += 1
        if isinstance(request, qmp.Rejected):
            self._refuse(request.error, request.id)
            return
        oob = request.oob
        method = self._methods.get(request.command) if self.negotiated else None
        try:
            if method is None or (oob and not method.allow_oob):
                method = self._unusual(request.command, oob)
            raw = request.arguments
            arguments = method.no_arguments if raw is UNSET else None
            if arguments is None:
                arguments = dispatch.prepare(method, raw)
        except CommandError as error:
            self._server.refused(self, request.command, error)
            self._refuse(error, request.id)
            return
        call = Call(self._machine, self._server, self, oob)
        value = dispatch.execute(method, call, arguments)
        if type(value) is not dispatch.Pending:
            self._answer(value, call, request.id)
        else:
            self._go_on(method, call, value, request.id)

    def _go_on(
        self, method: dispatch.Method, call: Call, pending: dispatch.Pending, request_id: Raw | UnsetType
    ) -> None:
        """A command has begun and is not finished."""
        if call.oob:
            self._later(method, call, pending, lambda value, call: self._answer(value, call, request_id))
            return
        self._running = True
        self._later(method, call, pending, lambda value, call: self._next(value, call, request_id))

    def _unusual(self, name: str, oob: bool) -> dispatch.Method:
        """The method in negotiation; or the error that says why there is none."""
        if not self.negotiated and name != NEGOTIATION:
            raise CommandNotFound(f"Expecting capabilities negotiation with '{NEGOTIATION}'")
        method = dispatch.find(self._methods, name)
        if oob and not method.allow_oob:
            raise CommandError(f"The command {name} does not support OOB")
        return method

    def _next(self, value: Any, call: Call, request_id: Raw | UnsetType) -> None:
        """An in-band command that went on has ended: answer it, and begin what waited for that."""
        self._answer(value, call, request_id)
        self._running = False
        while self._queue and not self._running:
            self._take(self._queue.popleft())

    def _answer(self, value: Any, call: Call, request_id: Raw | UnsetType) -> None:
        if type(value) is dispatch.Failure:
            self._refuse(value.error, request_id)
            return
        try:
            line = qmp.encode_return(value, request_id)
        except Exception:  # noqa: BLE001 - a result that is not what the catalogue says
            _log.exception("A result cannot be encoded")
            call.fail()
            self._refuse(InternalError("The result cannot be encoded: a defect of vfiod; see its log"), request_id)
            return
        if self._alone and not call.used_fds:
            self._writer.write(line)
        else:
            self._put(line, call.succeed())

    def _refuse(self, error: VfiodError, request_id: Raw | UnsetType) -> None:
        self.errors += 1
        self._put(qmp.encode_error(error, request_id), None)
