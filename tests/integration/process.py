"""A real server process, its log, and a session with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from vfiod.client.errors import ConnectFailed
from vfiod.client.sync import Client


class ServerProcess:
    """A server that was started, and answers.

    Args:
        directory: for its socket and its log.
        options: of ``vfiod serve``, besides its name and its monitor.
        patience: seconds to wait for an answer.

    """

    def __init__(self, directory: Path, *options: str, patience: float) -> None:
        self.path = directory / "qmp.sock"
        self._patience = patience
        self._log = (directory / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vfiod.server", "--name", "test", "--qmp", f"unix:{self.path}", *options],
            stderr=self._log,
        )
        try:
            self.client = self._connected()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._log.close()
            raise

    def _connected(self) -> Client:
        while True:
            assert self.process.poll() is None, self.log()
            try:
                return Client.connect(self.path, timeout=self._patience)
            except ConnectFailed:
                time.sleep(0.01)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> str:
        """Terminate it: it ends well. Its log."""
        self.client.close()
        self.process.terminate()
        assert self.process.wait(self._patience) == 0, self.log()
        log = self.log()
        self._log.close()
        return log
