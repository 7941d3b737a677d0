"""The monitor as a whole: its sessions, and what commands may ask of the process around the machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from vfiod.protocol.catalogue.devices import SessionInfo
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.monitor import RunState, Shutdown, ShutdownCause, Stat, StatsResult, StatusInfo
from vfiod.protocol.errors import Busy, CommandError, PermissionRefused
from vfiod.protocol.limits import MAX_OTHER_SESSIONS, MAX_SESSIONS
from vfiod.server.commands.call import Call, Handler, SessionLike
from vfiod.server.events import EventHub
from vfiod.server.fds import KindOf
from vfiod.server.monitor.dispatch import RoleMethods, build_methods
from vfiod.server.monitor.jsonrpc import JsonRpcSession
from vfiod.server.monitor.qmp import QmpSession
from vfiod.server.monitor.roles import OPERATOR, RoleError, build_roles
from vfiod.server.monitor.session import Session
from vfiod.server.sockets.access import Access, Peer, peer_of
from vfiod.server.sockets.listener import Listener

if TYPE_CHECKING:
    from vfiod.server.machine import Machine
    from vfiod.server.monitor.audit import Asker, Audit
    from vfiod.server.monitor.bus import Bus, EventBus
    from vfiod.server.state.doors import MonitorState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["DIALECTS", "MonitorServer"]

_log: Final = logging.getLogger(__name__)

RUNNING: Final = StatusInfo(running=True, status=RunState.RUNNING)
ENDING: Final = StatusInfo(running=False, status=RunState.SHUTDOWN)

DIALECTS: Final[Mapping[str, type[Session]]] = {"qmp": QmpSession, "jsonrpc": JsonRpcSession}
"""The dialects a socket may speak."""


class MonitorServer:
    """All sessions of one machine.

    Args:
        loop: the event loop everything runs on.
        machine: what commands work on.
        hub: its events.
        access: who may come in.
        kind_of: tells what an fd is.
        table: the handler of every command.
        roles: what the sockets' roles may run, besides the two that are built in.
        audit: where commands that may change something are noted; None: nowhere.

    Attributes:
        methods: the method table.
        status: running, or shutting down.
        on_change: called with the name of each command that may have changed something, before its answer leaves.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        machine: Machine,
        hub: EventHub,
        access: Access,
        kind_of: KindOf,
        table: Mapping[str, Handler],
        roles: Mapping[str, Iterable[str]] | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.loop: Final = loop
        self.machine: Final = machine
        self.hub: Final = hub
        self.kind_of: Final = kind_of
        self.methods: Final = build_methods(table)
        self._roles: Final = {name: RoleMethods(self.methods, role) for name, role in build_roles(roles or {}).items()}
        self._audit: Final = audit
        self.on_change: Callable[[str], None] | None = None
        self.status = RUNNING
        self.closing: Final[asyncio.Future[ShutdownCause]] = loop.create_future()
        self._access: Final = access
        self._sessions: Final[dict[int, Session]] = {}
        self._listeners: Final[list[Listener]] = []
        self._told: Final[dict[Listener, tuple[str, str]]] = {}  # dialect and role of each
        self._held = False
        self._buses: Final[list[Bus | EventBus]] = []
        self._tasks: Final[set[asyncio.Future[None]]] = set()
        self._drained: asyncio.Future[None] | None = None
        self._number = 0

    # --- coming in ------------------------------------------------------------------------------

    def listen(self, listening: socket.socket, dialect: str, role: str = OPERATOR) -> Listener:
        """Accept sessions of a dialect on a listening socket, which is the server's from here on.

        Raises RoleError: there is no such role.
        """
        session_type, methods = DIALECTS[dialect], self.role(role)
        listener = Listener(self.loop, listening, lambda connection: self._admit(connection, session_type, methods))
        self._listeners.append(listener)
        self._told[listener] = (dialect, role)
        return listener

    def role(self, name: str) -> RoleMethods:
        """What a role may run. Raises RoleError: there is no such role."""
        if name not in self._roles:
            raise RoleError(f"There is no role '{name}': there are {', '.join(self._roles)}; --role makes one")
        return self._roles[name]

    def join_bus(self, bus: Bus | EventBus) -> None:
        """Take over a socket of the bus: it is counted, waited for and closed with the sessions."""
        self._buses.append(bus)

    def _admit(self, connection: socket.socket, session_type: type[Session], methods: RoleMethods) -> None:
        """Somebody connected: begin a session, or say why not."""
        peer = peer_of(connection)
        refusal: CommandError | None = None
        sentence = self._access.refusal(peer)
        if sentence is not None:
            refusal = PermissionRefused(sentence)
        elif len(self._sessions) >= MAX_SESSIONS:
            refusal = Busy(f"There are {MAX_SESSIONS} monitor sessions, no more are allowed: close one first")
        elif methods.role.name != OPERATOR and self._others() >= MAX_OTHER_SESSIONS:
            refusal = Busy(
                f"There are {MAX_OTHER_SESSIONS} monitor sessions of roles like '{methods.role.name}', no more are "
                "allowed beside operators: close one first"
            )
        if refusal is not None:
            _log.warning(
                "Refused a %s session of uid %d, pid %d: %s", session_type.dialect, peer.uid, peer.pid, refusal
            )
            _send_and_close(connection, session_type.complaint(refusal))
            return
        self._number += 1
        session = session_type(self._number, connection, peer, self, methods)
        self._sessions[session.id] = session
        session.start()

    def _others(self) -> int:
        """How many sessions are no operators'."""
        return sum(session.role != OPERATOR for session in self._sessions.values())

    def ended(self, session: Session) -> None:
        """A session has ended."""
        self._sessions.pop(session.id, None)
        self.machine.session_ended(session.id)
        self.settled()

    def keep(self, task: asyncio.Future[None]) -> None:
        """Hold on to a command's task, which asyncio itself does not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- over a change of the process -----------------------------------------------------------

    def has_role(self, name: str) -> bool:
        """Whether sockets may have this role."""
        return name in self._roles

    def listens_at(self, path: str) -> bool:
        """Whether there is a listening socket whose file this is."""
        return any(one.path == path for one in self._listeners)

    def listen_for(self, listening: socket.socket, dialect: str, admit: Callable[[socket.socket], None]) -> Listener:
        """Accept others than sessions on a listening socket: it is held, kept and closed with the rest."""
        listener = Listener(self.loop, listening, admit)
        self._listeners.append(listener)
        self._told[listener] = (dialect, "")
        return listener

    @property
    def held(self) -> bool:
        """Whether sessions are not read, because everything is about to be handed over."""
        return self._held

    def hold(self) -> None:
        """Read no session and admit nobody: what comes waits in the kernel."""
        self._held = True
        for listener in self._listeners:
            listener.pause()
        for session in self._sessions.values():
            session.hold()

    def release(self) -> None:
        """Go on."""
        self._held = False
        for listener in self._listeners:
            listener.resume()
        for session in tuple(self._sessions.values()):
            session.release()

    @property
    def under_way(self) -> str | None:
        """What has begun and has not ended, for a person; None: the sessions could be described."""
        if not all(bus.idle for bus in self._buses):
            return "a command of the bus"
        return next((what for one in self._sessions.values() if (what := one.under_way) is not None), None)

    def describe(self, given: Given) -> MonitorState:
        """Describe sessions and listening sockets."""
        from vfiod.server.state.doors import ListenerState, MonitorState

        sessions = [state for one in self._sessions.values() if (state := one.keep(given)) is not None]
        listeners = [
            ListenerState(
                fd=given.give(one.fileno(), f"server/{one.name}"),
                dialect=self._told[one][0],
                role=self._told[one][1],
                path=one.path,
            )
            for one in self._listeners
        ]
        return MonitorState(number=self._number, listeners=listeners, sessions=sessions)

    def adopt(self, state: MonitorState, taken: Taken) -> None:
        """Go on with the sessions and sockets of another process. Other dialects than ours are left to the caller."""
        self._number = state.number
        for one in state.listeners:
            if one.dialect in DIALECTS:
                listening = socket.socket(fileno=taken.take(one.fd).give_away())
                belongs_to(self.listen(listening, one.dialect, one.role), one.path)
        for kept in state.sessions:
            connection = socket.socket(fileno=taken.take(kept.fd).give_away())
            connection.setblocking(False)
            peer = Peer(kept.pid, kept.uid)
            session = DIALECTS[kept.dialect](kept.id, connection, peer, self, self.role(kept.role))
            self._sessions[session.id] = session
            session.adopt(kept, taken)

    # --- for commands ---------------------------------------------------------------------------

    def session_infos(self) -> list[SessionInfo]:
        """The sessions, oldest first."""
        return [session.info() for session in tuple(self._sessions.values())]

    def session_stats(self) -> list[StatsResult]:
        """Counters of each session."""
        return [session.stats() for session in tuple(self._sessions.values())] + [
            StatsResult(
                provider="vfiod",
                qom_path=f"/bus/{bus.name}",
                stats=[Stat(name=name, value=value) for name, value in bus.stats().items()],
            )
            for bus in self._buses
        ]

    def fd_infos(self) -> Iterator[FdInfo]:
        """The fds of the sessions, and the server's own sockets."""
        for session in tuple(self._sessions.values()):
            yield from session.names.infos(f"session:{session.id}")
            number = session.fileno()
            yield FdInfo(owner="server", name=f"session:{session.id}", kind=self.kind_of(number), number=number)
        for listener in self._listeners:
            number = listener.fileno()
            yield FdInfo(owner="server", name=listener.name, kind=self.kind_of(number), number=number)

    def audited(self, call: Call, command: str, error: CommandError | None) -> None:
        """A command that may change something has ended: note it."""
        if self.on_change is not None:
            self.on_change(command)
        if self._audit is not None:
            self._audit.note(_asker(call.session), command, call.arguments, error)

    def refused(self, session: Session | None, command: str, error: CommandError) -> None:
        """A command was refused before it began: note it, when it might have changed something. No session: the bus."""
        if self._audit is not None and (method := self.methods.get(command)) is not None and method.spec.mutates:
            self._audit.note(_asker(session), command, None, error)

    def shut_down(self, cause: ShutdownCause) -> None:
        """Begin to end: tell the readers, and whoever awaits :attr:`closing`."""
        if not self.closing.done():
            self.status = ENDING
            self.closing.set_result(cause)
            self.hub.emit(Shutdown(guest=False, reason=cause))

    # --- the end --------------------------------------------------------------------------------

    def stop_listening(self) -> None:
        """Accept nobody any more; socket files that are ours are removed."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._told.clear()

    async def drain(self, seconds: float) -> None:
        """Wait until every reply has left, at most so long: a reader that does not read must not keep us."""
        self._drained = self.loop.create_future()
        self.settled()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained, seconds)

    def settled(self) -> None:
        """A session has done what it could for now."""
        drained = self._drained
        if (
            drained is not None
            and not drained.done()
            and all(one.idle for one in (*self._sessions.values(), *self._buses))
        ):
            drained.set_result(None)

    def close(self) -> None:
        """End every session, and the bus."""
        for session in tuple(self._sessions.values()):
            session.close()
        for bus in self._buses:
            bus.close()
        self._buses.clear()


def _send_and_close(connection: socket.socket, line: bytes) -> None:
    """Tell a peer that it may not come in, if it takes that at once, and hang up."""
    with connection:
        try:
            connection.send(line)
        except OSError as error:
            _log.debug("The refusal did not arrive: %s", os.strerror(error.errno or 0))


def _asker(session: SessionLike | None) -> Asker:
    """Who asked; no session: the bus."""
    from vfiod.server.monitor.audit import Asker

    return session.asker() if isinstance(session, Session) else Asker(None, "bus", None, None, OPERATOR)


def belongs_to(listener: Listener, path: str | None) -> None:
    """The socket's file is ours to remove, if it still is there."""
    if path is not None:
        with contextlib.suppress(OSError):
            listener.remove_at_close(path)
