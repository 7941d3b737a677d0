"""The end that gives: a socket of its own, at which a new process asks for everything.

Until it commits nothing is lost: sessions and clients are held, what is under way ends, and then this process's loop
stands still while the other one makes everything anew. If that fails, or dies, the loop goes on where it stood.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.limits import TAKE_OVER_MS, TAKE_OVER_QUIET_MS
from vfiod.server.sockets.access import Access, Peer, peer_of
from vfiod.server.state.format import VERSION
from vfiod.server.takeover.conversation import (
    PROTOCOL,
    Abort,
    BadHandOver,
    Commit,
    Giver,
    GiverState,
    Hello,
    Message,
    Refuse,
    Welcome,
    Whole,
    decode_message,
)
from vfiod.server.takeover.server import Everything
from vfiod.server.takeover.whole import program_version
from vfiod.server.takeover.wire import HEADER, Wire, message_size, packed

if TYPE_CHECKING:
    from vfiod.server.monitor.server import MonitorServer
    from vfiod.server.store.current import Current

__all__ = ["HandOver"]

_log: Final = logging.getLogger(__name__)

LOOK_S: Final = 0.002
"""Seconds between two looks whether what was under way has ended."""


class HandOver:
    """Hands everything over to who asks, one at a time. On the loop.

    Args:
        server: the monitor, with its machine.
        leave: ends this process at once with a status, without closing or telling anything; does not return.
        store: keeps our fds; None: nobody does.
        watchdog: seconds of silence after which who keeps them takes us for stuck.

    """

    def __init__(
        self,
        server: MonitorServer,
        leave: Callable[[int], NoReturn],
        store: Current | None = None,
        watchdog: float | None = None,
    ) -> None:
        self._server = server
        self._loop = server.loop
        self._access = Access()  # root and ourselves: whoever takes everything is no mere client
        self._everything = Everything(server, store, watchdog)
        self._leave = leave
        self._store = store
        self._task: asyncio.Task[None] | None = None

    def admit(self, connection: socket.socket) -> None:
        """Somebody connected."""
        peer = peer_of(connection)
        refusal = self._access.refusal(peer, "hand-over")
        if refusal is None and self._store is not None:
            refusal = _beyond(self._store, peer)
        if refusal is None and self._task is not None:
            refusal = "A hand-over is under way: one at a time"
        if refusal is not None:
            _log.warning("Refused a hand-over to uid %d, pid %d: %s", peer.uid, peer.pid, refusal)
            _say_and_close(connection, Refuse(refusal))
            return
        self._task = self._loop.create_task(self._serve(connection, peer.pid))

    def close(self) -> None:
        """Hand nothing over any more."""
        if self._task is not None:
            self._task.cancel()

    async def _serve(self, connection: socket.socket, pid: int) -> None:
        giver = Giver()
        reason: str | None = None
        try:
            await self._talk(connection, giver, pid)
        except TimeoutError:
            reason = f"The new process said nothing for {TAKE_OVER_MS} ms"
        except (OSError, VfiodError) as error:
            reason = str(error)
        except Exception:  # noqa: BLE001 - a defect: this server goes on, and the log has it
            _log.exception("Handing over failed by a defect of vfiod")
            reason = "a defect of vfiod; its log has the rest"
        finally:
            self._everything.release()
            self._task = None
            if reason is not None:
                _log.warning("Nothing was handed over to process %d: %s", pid, reason)
                _say_and_close(connection, Refuse(reason))
            else:
                connection.close()

    async def _talk(self, connection: socket.socket, giver: Giver, pid: int) -> None:
        hello = await self._hear(connection, giver)
        if not isinstance(hello, Hello):
            return
        if (hello.protocol, hello.state) != (PROTOCOL, VERSION):
            raise BadHandOver(
                f"vfiod {hello.program} takes over by protocol {hello.protocol} and reads state {hello.state}; this is "
                f"vfiod {program_version()}, with protocol {PROTOCOL} and state {VERSION}"
            )
        if self._store is not None and (refusal := _astray(self._store.unit, hello)) is not None:
            raise BadHandOver(refusal)
        welcome = await self._look()
        await asyncio.wait_for(self._loop.sock_sendall(connection, packed(welcome)), TAKE_OVER_MS / 1000)
        await self._hear(connection, giver)
        if giver.state is not GiverState.GIVING:
            _log.warning("The new process does not take over")
            return
        if self._store is not None:
            await self._store.announce(pid)
        await self._quiet()
        self._give(connection, giver, pid)

    async def _look(self) -> Welcome:
        """What there is, once nothing is under way: under load that is so only while everybody is held."""
        if self._everything.under_way() is not None:
            self._everything.hold()
        await self._wait()
        welcome = self._everything.welcome()
        self._everything.release()
        return welcome

    async def _hear(self, connection: socket.socket, giver: Giver) -> Message:
        size = message_size(await self._exactly(connection, HEADER.size))
        message = decode_message(await self._exactly(connection, size))
        giver.hear(message)
        return message

    async def _exactly(self, connection: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await asyncio.wait_for(self._loop.sock_recv(connection, size - len(data)), TAKE_OVER_MS / 1000)
            if not part:
                raise BadHandOver("The new process is gone")
            data += part
        return data

    async def _quiet(self) -> None:
        """Begin nothing more, and wait until what is under way has ended. BadHandOver: it does not."""
        self._everything.hold()
        await self._wait()

    async def _wait(self) -> None:
        end = self._loop.time() + TAKE_OVER_QUIET_MS / 1000
        while (what := self._everything.under_way()) is not None:
            if self._loop.time() > end:
                raise BadHandOver(f"It cannot be handed over now: {what} goes on")
            await asyncio.sleep(LOOK_S)

    def _give(self, connection: socket.socket, giver: Giver, pid: int) -> None:
        """The loop stands still from here on. Returns, or raises, when everything stays ours."""
        data, fds = self._everything.describe()
        connection.setblocking(True)
        connection.settimeout(TAKE_OVER_MS / 1000)
        wire = Wire(connection)
        try:
            wire.send(Whole(len(data), len(fds)))
            wire.send_whole(data, fds)
            answer = wire.receive()
            giver.hear(answer)
        except (OSError, BadHandOver) as error:
            _say(wire, Abort(str(error)))
            raise BadHandOver(f"The new process did not take it: {error}") from error
        if isinstance(answer, Refuse):
            raise BadHandOver(f"The new process refuses: {answer.reason}")
        if self._store is not None:
            self._pass_on(self._store, wire, connection, pid)
        # From here on the other end may own it at any moment: only its word or its end decides.
        connection.settimeout(None)
        wire.send(Commit())
        giver.hear(wire.receive(to_the_end=True))
        self._leave(0)

    def _pass_on(self, store: Current, wire: Wire, connection: socket.socket, pid: int) -> None:
        """Whoever keeps the store decides who follows us, and is told: then we end. BadHandOver: it was not told.

        A process that dies before it has written its state leaves the store as ours, whole, and is followed as any
        that was killed: so nobody may go on here, whatever becomes of it.
        """
        try:
            store.pass_on(pid)
        except VfiodError as error:
            _say(wire, Abort(str(error)))
            raise BadHandOver(f"Who keeps the fds was not told: {error}") from error
        status = 1
        try:
            # One that was dying when the keeper looked was not taken for us: then our end has to be a failure, after
            # which the store is given to a new server. vfiod's own keeper takes whoever is not gone altogether, and
            # the connection of one that is gone is closed. systemd has more reasons to refuse one, and says none of
            # them; it counts the status of the main process alone, so ours may be a failure in any case: that is
            # heard only if nobody was taken for us.
            if not _hung_up(connection):
                status = 0 if store.unit is None else 1
                _say(wire, Commit())
        finally:
            self._leave(status)


def _beyond(store: Current, peer: Peer) -> str | None:
    """Why whoever keeps the fds cannot follow a process, nor end it; None: it can."""
    if not peer.pid:
        return "Whoever keeps the fds has to be told your process, and it cannot be seen from here"
    own = os.geteuid()
    if store.unit is None and own not in (0, peer.uid):
        return f"The fds are kept by uid {own}, which cannot end a process of uid {peer.uid}: start it as uid {own}"
    return None


def _astray(unit: str | None, hello: Hello) -> str | None:
    """Why systemd would not follow the taker, or not see it die, or not end it before it starts a server anew."""
    if unit is None or (unit and unit == hello.unit and hello.orphan):
        return None
    what = f"is in the control group '{hello.unit}'" if hello.unit != unit or not unit else "has a parent that may stay"
    return (
        "systemd keeps the fds of this server, and looks after orphans and children of its own in the unit alone; your "
        f"process {what}, the unit is '{unit}'. Start it by ExecReload= of the unit, with --daemonize, and 'systemctl "
        "reload' (docs/takeover.md)"
    )


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection, or is dead."""
    patience = connection.gettimeout()
    connection.settimeout(0)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(patience)


def _say(wire: Wire, message: Message) -> None:
    try:
        wire.send(message)
    except (OSError, VfiodError) as error:
        _log.debug("The other end did not hear: %s", error)


def _say_and_close(connection: socket.socket, message: Message) -> None:
    with connection:
        try:
            connection.send(packed(message))
        except OSError as error:
            _log.debug("The other end did not hear: %s", os.strerror(error.errno or 0))
