"""Servers as a service manager starts them, and the manager's side of it: real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120
"""Seconds before a test gives up; no test measures time."""

Start = Callable[..., subprocess.Popen[str]]


class Manager:
    """The service manager's end of sd_notify."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(str(path))

    def next(self) -> dict[str, str]:
        """The next thing it is told."""
        return dict(line.partition("=")[::2] for line in self.socket.recv(65536).decode().split("\n"))

    def until(self, key: str) -> dict[str, str]:
        """What it is told next of this."""
        while key not in (told := self.next()):
            pass
        return told


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server in ``tmp_path``, its errors in ``errors``; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            *arguments: str, env: dict[str, str] | None = None, before: tuple[str, ...] = (), **options: Any
        ) -> subprocess.Popen[str]:
            environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), **(env or {})}
            if "stderr" not in options:
                options["stderr"] = stack.enter_context(open(tmp_path / "errors", "a"))
            process = subprocess.Popen(
                [*before, sys.executable, "-W", "error", "-m", "vfiod.server", *arguments],
                cwd=tmp_path, env=environment, text=True, stdin=subprocess.DEVNULL, **options,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def wait_for(found: Callable[[], Any], what: str) -> Any:
    """What ``found`` says as soon as it says something."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)
    return value
