"""A real server process, with a parent from "another package" whose devices hang when a test wants them to."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.sync import Client

PATIENCE = 30.0
"""Seconds before a test gives up; no test measures time."""

PARENT = '''
"""A parent of another package: a primer that hangs in open and reset while a file of that name says so."""

import os
import time
from pathlib import Path

from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

ROOT = Path(os.environ["STICKY_ROOT"])


def pass_by(what):
    if (ROOT / f"hold-{what}").exists():
        (ROOT / f"reached-{what}").touch()
        while (ROOT / f"hold-{what}").exists():
            time.sleep(0.002)


class StickyDevice(PrimerDevice):
    def open(self):
        pass_by("open")
        super().open()

    def reset(self):
        pass_by("reset")
        super().reset()


class Sticky(Primer):
    name = "sticky"

    def create(self, host, uuid, mdev_type, parameters):
        return StickyDevice(host, memory=1 << 16, vectors=4, granted=4)
'''

START = """
import sys
import vfiod.server.machine.root as root
from vfiod.server.program import main

root.CLOSE_TIMEOUT_MS = {close_ms}
sys.exit(main(sys.argv[1:]))
"""


class Server:
    """One server process. ``hold`` and ``release`` say where its devices hang."""

    def __init__(self, directory: Path, *, close_ms: int = 10_000) -> None:
        self.root = directory
        (directory / "sticky.py").write_text(PARENT)
        about = directory / "sticky-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sticky\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[vfiod.mdev_parents]\nsticky = sticky:Sticky\n")
        path = os.pathsep.join([str(directory), *filter(None, sys.path)])
        self.path = directory / "qmp.sock"
        self._log = (directory / "log").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(START).format(close_ms=close_ms),
                *(
                    "--name",
                    "test",
                    "--qmp",
                    f"unix:{self.path}",
                    "--allow-path",
                    str(directory),
                    "--pidfile",
                    str(directory / "pid"),
                ),
            ],
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path, "STICKY_ROOT": str(directory)},
        )
        self.clients: list[Client] = []
        self.wait_for(self.path)

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.process.poll() is None, self.log()
            time.sleep(0.002)

    def hold(self, what: str) -> None:
        (self.root / f"hold-{what}").touch()

    def release(self, what: str) -> None:
        (self.root / f"hold-{what}").unlink(missing_ok=True)

    def is_held(self, what: str) -> None:
        """Wait until a device hangs there."""
        self.wait_for(self.root / f"reached-{what}")

    def client(self) -> Client:
        self.clients.append(Client.connect(self.path, timeout=PATIENCE))
        return self.clients[-1]

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> int:
        """Ask it to end; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        for what in ("open", "reset"):
            self.release(what)
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.end()
        log = self.log()
        self._log.close()
        assert "Traceback" not in log, log


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.fixture
def hasty_server(tmp_path: Path) -> Iterator[Server]:
    """A server that gives what is under way half a second at its end."""
    made = Server(tmp_path, close_ms=500)
    yield made
    made.close()
