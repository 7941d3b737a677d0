"""The processes that are compared, and a client that costs little.

All of them run on one core, this process too: a round trip then is two switches and the work, whatever the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vfiod.protocol.fd import FileDescriptor

__all__ = ["ROOT", "Process", "Wire", "compiled", "cpu_ns", "floor_echo", "qemu", "steal_fd", "vfiod"]

ROOT = Path(__file__).parents[2]
QEMU = shutil.which("qemu-system-x86_64")

_PIDFD_GETFD = 438  # <asm-generic/unistd.h>, the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class Wire:
    """A monitor session at the level of bytes: the same, and as cheap, for every peer."""

    def __init__(self, sock: socket.socket, *, negotiate: bool = True) -> None:
        self.socket = sock
        if negotiate:
            self.reply()
            self.call(b'{"execute":"qmp_capabilities"}')

    def call(self, request: bytes) -> bytes:
        """One request, one reply; events in between would be taken for it."""
        self.socket.sendall(request)
        return self.reply()

    def reply(self) -> bytes:
        """What arrives, to the end of a line."""
        data = self.socket.recv(65536)
        while not data.endswith(b"\n"):
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError("The peer is gone")
            data += more
        return data

    def command(self, name: str, sending: int | None = None, /, **arguments: Any) -> Any:
        """A command by name; its result. Events are passed over. Not for measuring."""
        members = {key.replace("_", "-"): value for key, value in arguments.items()}
        request = json.dumps({"execute": name, "arguments": members}).encode()
        if sending is not None:
            socket.send_fds(self.socket, [request], [sending])
        else:
            self.socket.sendall(request)
        while True:
            for line in self._lines():
                message = json.loads(line)
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise RuntimeError(f"{name}: {message['error']['desc']}")

    def _lines(self) -> list[bytes]:
        return self.reply().splitlines()

    def with_fd(self, request: bytes, fd: int) -> bytes:
        """One request with an fd."""
        socket.send_fds(self.socket, [request], [fd])
        return self.reply()

    def pipelined(self, request: bytes, count: int) -> None:
        """So many requests at once; returns when all are answered."""
        data = memoryview(request * count)
        sent = answered = 0
        self.socket.setblocking(False)
        while answered < count:
            if sent < len(data):
                with contextlib.suppress(BlockingIOError):
                    sent += self.socket.send(data[sent : sent + 65536])
            try:
                answered += self.socket.recv(262144).count(b"\n")
            except BlockingIOError:
                self.socket.setblocking(True)
                answered += self.socket.recv(262144).count(b"\n")
                self.socket.setblocking(False)
        self.socket.setblocking(True)


class Process:
    """A server on an inherited listening socket: whoever connects waits for it in the kernel, nobody polls."""

    def __init__(self, command: Sequence[str], path: str, *fds: int, env: dict[str, str] | None = None) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(64)
        self.path = path
        number = self.listener.fileno()
        self._process = subprocess.Popen(
            [part.replace("{fd}", str(number)) for part in command],
            pass_fds=(number, *fds),
            env={**os.environ, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._process.pid

    def connect(self, *, negotiate: bool = True) -> Wire:
        """A session."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        return Wire(sock, negotiate=negotiate)

    def cpu_ns(self) -> int:
        """Time on a processor so far, all threads, in ns."""
        return cpu_ns(self.pid)

    def wakeups(self) -> int:
        """How often any of its threads slept and was woken."""
        lines = (line for task in self._tasks() for line in task.joinpath("status").read_text().splitlines())
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    def pss_kib(self) -> int:
        """Proportional set size, in KiB."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self.listener.close()
        Path(self.path).unlink(missing_ok=True)  # QEMU removes it itself

    def _tasks(self) -> list[Path]:
        return list(Path(f"/proc/{self.pid}/task").iterdir())


def cpu_ns(pid: int) -> int:
    """Time on a processor so far of a process, all threads, in ns."""
    return sum(int(task.joinpath("schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


_directory = tempfile.TemporaryDirectory(prefix="vfiod-bench-")
_numbers = iter(range(1 << 30))


def _path() -> str:
    return f"{_directory.name}/{next(_numbers)}"


@contextlib.contextmanager
def vfiod(*paths: str, arguments: Sequence[str] = ()) -> Iterator[Process]:
    """A server with these arguments; ``paths`` are on its Python path too."""
    path = os.pathsep.join([*(str(ROOT / part) for part in ("protocol", "server", "client")), *paths])
    command = [
        sys.executable,
        "-m",
        "vfiod.server",
        "--name",
        "bench",
        "--qmp",
        "fd={fd}",
        "--allow-connect",
        *arguments,
    ]
    # With compiled modules, as an installed program has them, whatever this process was told about writing them.
    cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{_directory.name}/pycache"}
    if not os.path.exists(f"{_directory.name}/pycache"):  # in its sandbox a server writes none
        parts = [str(ROOT / part) for part in ("protocol", "server")]
        subprocess.run([sys.executable, "-m", "compileall", "-q", *parts], env={**os.environ, **cache}, check=True)
    process = Process(command, _path(), env={"PYTHONPATH": path, **cache})
    try:
        yield process
    finally:
        process.close()


@contextlib.contextmanager
def qemu() -> Iterator[Process]:
    """QEMU without a machine: its monitor and nothing else."""
    assert QEMU is not None
    chardev = "socket,id=monitor,fd={fd},server=on,wait=off"
    options = [
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "none",
        "-S",
        "-chardev",
        chardev,
        "-qmp",
        "chardev:monitor",
    ]
    process = Process([QEMU, *options], _path())
    try:
        yield process
    finally:
        process.close()


def compiled(name: str) -> str | None:
    """The path of one of the C programs beside this file; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    program = f"{_directory.name}/{name}"
    if not os.path.exists(program):
        source = str(Path(__file__).with_name(f"{name}.c"))
        subprocess.run([compiler, "-O2", "-Wall", "-o", program, source], check=True)
    return program


@contextlib.contextmanager
def floor_echo(program: str) -> Iterator[Process]:
    """The C epoll server that answers with a prepared line."""
    process = Process([program, "echo", "{fd}"], _path())
    try:
        yield process
    finally:
        process.close()


def steal_fd(pid: int, number: int) -> FileDescriptor:
    """A duplicate of another process's fd (``pidfd_getfd``), to play the kernel: to signal what only it signals."""
    pidfd = FileDescriptor(os.pidfd_open(pid))
    with pidfd:
        stolen = _libc.syscall(_PIDFD_GETFD, pidfd.number, number, 0)
        if stolen < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return FileDescriptor(stolen)
