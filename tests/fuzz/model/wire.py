"""A whole monitor in this process, on real sockets: one loop, which runs only while a test waits for something.

The kernel is the model of it; built-in mediated devices are the real ones. Nothing here knows what is right: that is
:mod:`tests.fuzz.model.machine`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.fd import MSG_CMSG_CLOEXEC, FdKind, FileDescriptor, rights_of
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine import Machine
from vfiod.server.monitor.server import MonitorServer
from vfiod.server.sockets.access import Access
from vfiod.server.sockets.listener import open_path

__all__ = ["Reply", "Session", "Wire"]

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds after which something hangs."""

_ROOM = socket.CMSG_SPACE(64 * 4)


class Reply:
    """An answer.

    Attributes:
        ok: whether it is a result.
        value: the result; or the error's text.
        fds: those that came with it.

    """

    def __init__(self, message: dict[str, Any], fds: list[FileDescriptor]) -> None:
        self.ok = "return" in message or "result" in message
        error = message.get("error") or {}
        self.value: Any = message.get("return", message.get("result"))
        if not self.ok:
            self.value = error.get("desc") or error.get("message")
        self.fds = fds

    def close(self) -> None:
        for fd in self.fds:
            fd.close()

    def __repr__(self) -> str:
        return f"{'ok' if self.ok else 'error'}: {self.value}"


class Session:
    """One session, of either dialect."""

    def __init__(self, wire: Wire, dialect: str) -> None:
        self.dialect = dialect
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._wire = wire
        self._buffer = b""
        self._fds: list[FileDescriptor] = []
        self._replies: dict[int, Reply] = {}
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(wire.paths[dialect])
        self._socket.setblocking(False)
        self._news = asyncio.Event()
        wire.loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(1 << 16, _ROOM, MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        assert data, "the server hung up"
        self._fds += rights_of(ancillary)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        self._news.set()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append((message["event"], message.get("data", {})))
        elif "method" in message:
            self.events.append((message["method"], message["params"]))
        elif "QMP" not in message:
            fds, self._fds = self._fds, []
            self._replies[message["id"]] = Reply(message, fds)

    def send(self, command: str, arguments: dict[str, Any], *fds: int) -> int:
        """Ask; the number of the request."""
        self._number += 1
        if self.dialect == "qmp":
            request: dict[str, Any] = {"execute": command, "arguments": arguments, "id": self._number}
        else:
            request = {"jsonrpc": "2.0", "method": command, "params": arguments, "id": self._number}
        data = json.dumps(request).encode() + b"\n"
        assert socket.send_fds(self._socket, [data], list(fds)) == len(data)
        return self._number

    async def reply(self, number: int) -> Reply:
        """The answer to a request."""
        while number not in self._replies:
            self._news.clear()
            await self._news.wait()
        return self._replies.pop(number)

    def close(self) -> None:
        self._wire.loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for fd in self._fds:
            fd.close()
        for reply in self._replies.values():
            reply.close()


class Wire:
    """The process under test."""

    def __init__(self) -> None:
        self.fds_before = _open_fds()
        self.loop = asyncio.new_event_loop()
        self.troubles: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self.troubles.append(f"{context}"))
        self.folder = tempfile.TemporaryDirectory(prefix="vfiod-model-")
        self.paths = {dialect: f"{self.folder.name}/{dialect}" for dialect in ("qmp", "jsonrpc")}
        self.kernel = FakeKernel()
        self.sessions: list[Session] = []
        self.run(self._begin)

    async def _begin(self) -> None:
        self.hub = EventHub(self.loop.call_later)
        self.machine = Machine("model", hub=self.hub, syscalls=self.kernel)
        self.server = MonitorServer(self.loop, self.machine, self.hub, Access(), self.kind, TABLE)
        for dialect, path in self.paths.items():
            self.server.listen(open_path(path), dialect).remove_at_close(path)

    def kind(self, fd: int) -> FdKind:
        """What an fd is, of the model or of the real kernel."""
        return self.kernel.kind(fd) or kind_of(fd)

    def run(self, what: Callable[[], Awaitable[T]]) -> T:
        """Let the loop run until something is done."""

        async def limited() -> T:
            return await asyncio.wait_for(_as_coroutine(what()), PATIENCE)

        return self.loop.run_until_complete(limited())

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something is so."""

        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.0005)

        self.run(wait)

    def connect(self, dialect: str) -> Session:
        """A session that hears events."""
        made = Session(self, dialect)
        self.sessions.append(made)
        if dialect == "qmp":
            assert self.ask(made, "qmp_capabilities").ok
        else:
            assert self.ask(made, "query-name").ok
        return made

    def ask(self, session: Session, command: str, /, *fds: int, **arguments: Any) -> Reply:
        """A command and its answer."""
        number = session.send(command, arguments, *fds)
        return self.run(lambda: session.reply(number))

    def disconnect(self, session: Session) -> None:
        """The session ends, and the server has noticed."""
        left = len(self.server.session_infos()) - 1
        self.sessions.remove(session)
        session.close()
        self.until(lambda: len(self.server.session_infos()) == left)

    def settle(self) -> None:
        """Nothing is under way."""

        async def wait() -> None:
            await self.machine.topology.idle()
            for device in self.machine.devices.all():
                await device.lane.idle()
            for _ in range(4):
                await asyncio.sleep(0)

        self.run(wait)

    def end(self) -> None:
        """Close everything, and see that nothing is left."""
        for session in tuple(self.sessions):
            self.disconnect(session)

        async def close() -> list[str]:
            problems = await self.machine.close()
            self.server.stop_listening()
            self.server.close()
            self.hub.flush()
            return list(problems)

        problems = self.run(close)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()
        assert self.kernel.nothing_is_open()
        assert problems == [] and self.troubles == []
        assert _open_fds() == self.fds_before, "fds are left open"


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _open_fds() -> int:
    gc.collect(0)
    return len(os.listdir("/proc/self/fd"))
