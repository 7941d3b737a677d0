"""A server of one's own: for the demo, for tests, for programs that want one for themselves alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vfiod.client.errors import ClientError
from vfiod.client.serve import server_command
from vfiod.client.signals import held
from vfiod.client.sockets import new_socket

__all__ = ["OwnServer", "accepts", "own_directory", "own_server"]

START_SECONDS: Final = 60.0
"""How long a server may take to accept: it takes a tenth of a second, and a busy machine is no failure."""

STOP_SECONDS: Final = 20.0
"""How long a server may take to close its devices."""


class OwnServer:
    """A running server.

    Attributes:
        path: its QMP socket.
        pid: its process.
        log: the file its standard error goes to.

    """

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
        self.process = process
        self.path = path
        self.log = log

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def messages(self) -> str:
        """What it has said on standard error so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it accepts. Raises ClientError with what it said when it ended instead."""
        deadline = time.monotonic() + seconds
        while not accepts(self.path):
            if (status := self.process.poll()) is not None:
                raise ClientError(f"The server ended with status {status}:\n{self.messages()}".rstrip())
            if time.monotonic() > deadline:
                raise ClientError(f"The server does not accept on {self.path} after {seconds:g} s:\n{self.messages()}")
            time.sleep(0.01)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait until it has ended. Its exit status. Raises ClientError when it does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ClientError(f"The server did not end within {seconds:g} s") from error

    def stop(self) -> int:
        """End it as systemd would: SIGTERM, and SIGKILL when that does not help. Its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def accepts(path: Path) -> bool:
    """Whether somebody accepts connections there at this moment."""
    with new_socket() as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def own_server(directory: Path, arguments: Sequence[str] = (), *, name: str = "own") -> Iterator[OwnServer]:
    """Start a server with a QMP socket in a directory, wait until it accepts, and end it afterwards.

    Args:
        directory: an existing, private directory; it gets ``qmp.sock`` and ``server.log``.
        arguments: more options of ``vfiod serve``.
        name: its ``--name``.

    Raises:
        ClientError: it did not start; the text has what it said.

    """
    path, log = directory / "qmp.sock", directory / "server.log"
    server: OwnServer | None = None
    try:
        with held(), log.open("wb") as output:
            process = subprocess.Popen(
                server_command(["--name", name, "--qmp", f"unix:{path}", *arguments]),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            server = OwnServer(process, path, log)
        server.wait_ready()
        yield server
    finally:
        with held():
            if server is not None:
                server.stop()


@contextlib.contextmanager
def own_directory(prefix: str) -> Iterator[Path]:
    """A private directory among the temporary ones, removed with all that is in it, whatever happens."""
    made: Path | None = None
    try:
        with held():
            made = Path(tempfile.mkdtemp(prefix=prefix))
        yield made
    finally:
        with held():
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
