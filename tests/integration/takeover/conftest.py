"""Real server processes, one of which takes the other's place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiod.client.errors import ConnectFailed
from vfiod.client.sync import Client

PATIENCE = 120.0
"""Seconds before a test gives up; no test measures time."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


class Server:
    """One server process."""

    def __init__(self, house: House, *arguments: str) -> None:
        self.log_path = house.directory / f"log{len(house.servers)}"
        with self.log_path.open("w") as log:
            command = [sys.executable, "-m", "vfiod.server", "--log-level", "info", *arguments]
            self.process = subprocess.Popen(command, stderr=log)

    def log(self) -> str:
        return self.log_path.read_text()

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


class House:
    """Servers that follow each other, and the sockets they share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qmp = directory / "qmp"
        self.hand = directory / "hand-over"
        self.servers: list[Server] = []

    def first(self, *more: str) -> Server:
        arguments = ("--name", "vm", "--qmp", f"unix:{self.qmp}", "--hand-over", f"unix:{self.hand}")
        return self.start(*arguments, "--allow-path", str(self.directory), *more)

    def next(self, *more: str) -> Server:
        """Take the last one's place; returns when that has ended, or when it did not come to that."""
        before = self.servers[-1]
        made = self.start("--take-over", f"unix:{self.hand}", "--allow-path", str(self.directory), *more)
        until(lambda: before.process.poll() is not None or made.process.poll() is not None)
        return made

    def start(self, *arguments: str) -> Server:
        self.servers.append(Server(self, *arguments))
        return self.servers[-1]

    def connect(self) -> Client:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return Client.connect(self.qmp, timeout=PATIENCE)
            except ConnectFailed:
                assert self.servers[-1].process.poll() is None, self.servers[-1].log()
                assert time.monotonic() < end
                time.sleep(0.01)

    def close(self) -> None:
        for one in self.servers:
            if one.process.poll() is None:
                one.process.terminate()
            one.process.wait(PATIENCE)
            assert "Traceback" not in one.log(), one.log()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def fds_of(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))
