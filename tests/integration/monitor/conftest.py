"""A real monitor on real sockets: its loop in a thread of this process, its peers blocking in the test's.

The handlers are the server's own, but for two of which a test must decide how long they take: ``system_reset`` and
``device-reset`` wait until the test releases them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.protocol.catalogue import Empty, EventData
from vfiod.protocol.catalogue.monitor import ShutdownCause
from vfiod.protocol.fd import MSG_CMSG_CLOEXEC, FileDescriptor, rights_of
from vfiod.server.commands.call import Call
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine import Machine
from vfiod.server.monitor.server import MonitorServer
from vfiod.server.sockets.access import Access
from vfiod.server.sockets.listener import open_path

PATIENCE = 20.0
"""Seconds before a test gives up on the server; no test measures time."""


class Peer:
    """A client that knows nothing but sockets: what it sends and sees is exactly what is on the wire."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.buffer = b""
        self.fds: list[FileDescriptor] = []
        self.events: list[dict[str, Any]] = []

    def send(self, data: bytes | dict[str, Any] | list[Any], *fds: int) -> None:
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        if fds:
            sent = socket.send_fds(self.socket, [data], list(fds))
            data = data[sent:]
        self.socket.sendall(data)

    def line(self) -> bytes:
        """One line as it came; ``b""`` at the end of the connection. fds go to ``self.fds``."""
        while b"\n" not in self.buffer:
            data, ancillary, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(253 * 4), MSG_CMSG_CLOEXEC)
            self.fds += rights_of(ancillary)
            if not data:
                return b""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"

    def message(self) -> Any:
        """The next message; None at the end of the connection."""
        line = self.line()
        return json.loads(line) if line else None

    def reply(self) -> Any:
        """The next message that is no event; events go to ``self.events``."""
        while True:
            message = self.message()
            if not isinstance(message, dict) or not ("event" in message or "method" in message):
                return message
            self.events.append(message)

    def event(self) -> Any:
        """The next event."""
        return self.events.pop(0) if self.events else self.message()

    def execute(self, command: str, *fds: int, **arguments: Any) -> Any:
        """A QMP command, and its reply."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.send(request, *fds)
        return self.reply()

    def call(self, method: str, **params: Any) -> Any:
        """A JSON-RPC call, and its reply."""
        params = {key.replace("_", "-"): value for key, value in params.items()}
        self.send({"jsonrpc": "2.0", "method": method, "params": params, "id": 1})
        return self.reply()

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            fd.close()
        self.fds.clear()


class Gate:
    """Commands that wait here until the test lets them go."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[Any]] = []
        self.entered = threading.Semaphore(0)
        self.order: list[str] = []

    def handler(self, name: str) -> Callable[[Call, Any], Awaitable[Any]]:
        async def wait(call: Call, arguments: Any) -> Any:
            self.order.append(f"{name} {getattr(arguments, 'id', '')}".strip())
            future = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            self.entered.release()
            result = await future
            return result(call) if callable(result) else result

        return wait


class Monitor:
    """The server under test, and the means to look into it."""

    def __init__(self, directory: Path) -> None:
        self.qmp_path = str(directory / "qmp")
        self.jsonrpc_path = str(directory / "jsonrpc")
        self.gate = Gate()
        self.peers: list[Peer] = []
        self.table = dict(TABLE)
        self.table["system_reset"] = self.gate.handler("system_reset")
        self.table["device-reset"] = self.gate.handler("device-reset")
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.hub = EventHub(self.loop.call_later)
        self.machine = Machine("vm0", hub=self.hub)
        self.server = MonitorServer(self.loop, self.machine, self.hub, Access(), kind_of, self.table)
        for path, dialect in ((self.qmp_path, "qmp"), (self.jsonrpc_path, "jsonrpc")):
            self.server.listen(open_path(path), dialect).remove_at_close(path)
        self._ready.set()
        await self.server.closing
        for future in self.gate.waiting:
            if not future.done():
                future.set_result(Empty())
        self.problems = await self.machine.close()
        self.server.stop_listening()
        await self.server.drain(1.0)
        self.server.close()
        self.hub.flush()

    def stop(self) -> None:
        for peer in self.peers:
            peer.close()
        with contextlib.suppress(RuntimeError):  # after "quit" the loop is closed
            self.loop.call_soon_threadsafe(self.server.shut_down, ShutdownCause.HOST_SIGNAL)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.problems == []

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """Run a function on the server's loop, and give what it returns."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so on the server's loop."""

        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(wait(), PATIENCE), self.loop).result(PATIENCE + 1)

    def emit(self, *events: EventData) -> None:
        def emit() -> None:
            for event in events:
                self.hub.emit(event)

        self.on_loop(emit)

    def release(self, result: Any = None) -> None:
        """Let the oldest waiting command go, with this result."""
        assert self.gate.entered.acquire(timeout=PATIENCE)
        self.on_loop(lambda: self.gate.waiting.pop(0).set_result(Empty() if result is None else result))

    def fds(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    @contextlib.contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """For a while, this process can open so many fds more. Both ends live in it: the limit is the server's, too."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        spare: list[int] = []
        try:
            while not spare or spare[-1] <= highest:  # fds are given lowest first: leave no holes
                spare.append(os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1 + count, hard))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for number in spare:
                os.close(number)

    def qmp(self, *, negotiate: bool = True, oob: bool = False) -> Peer:
        peer = Peer(self.qmp_path)
        self.peers.append(peer)
        assert "QMP" in peer.message()
        if negotiate:
            assert peer.execute("qmp_capabilities", **({"enable": ["oob"]} if oob else {})) == {"return": {}}
        return peer

    def jsonrpc(self) -> Peer:
        peer = Peer(self.jsonrpc_path)
        self.peers.append(peer)
        return peer


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    before = len(os.listdir("/proc/self/fd"))
    monitor = Monitor(tmp_path)
    monitor.start()
    with contextlib.ExitStack() as stack:
        stack.callback(monitor.stop)
        yield monitor
    assert len(os.listdir("/proc/self/fd")) == before, "an fd leaked"
