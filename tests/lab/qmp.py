"""The least QMP that drives QEMU itself: unplug a device, resize the balloon, ask for the PCI tree.

QEMU offers two monitors to the lab: a Unix socket on the host (``Guest.qmp_path``), and a
virtio-serial port inside the guest, so that a guest test can do to its own machine what a
host would do, and stay in step with it. Both speak the same bytes; this class takes any
unbuffered file. It stays apart from ``vfiod.client`` on purpose: a test tool that shared
the tested code's parser would share its mistakes.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class QmpError(RuntimeError):
    """QEMU answered a command with an error; the message is its ``class: desc``."""


class Qmp:
    """One session, past the greeting. ``events`` are all that came so far, oldest first."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader = reader
        self._writer = writer
        self.events: list[dict[str, Any]] = []
        self._sequence = 0
        # The greeting stays in the pipe until somebody opens a session; a port that was
        # opened before has lost its greeting, so it is skipped when it comes, never awaited.
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command (``_`` in an argument's name stands for ``-``); QmpError when QEMU refuses."""
        self._sequence += 1
        message: dict[str, Any] = {"execute": command, "id": self._sequence}
        if arguments:
            message["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()
        while True:
            reply = self._read()
            if reply.get("id") != self._sequence:
                continue
            if "error" in reply:
                error = reply["error"]
                if command == "qmp_capabilities" and error["class"] == "CommandNotFound":
                    return None  # this session is already past its negotiation
                raise QmpError(f"{error['class']}: {error['desc']}")
            return reply["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the next event called ``name`` and forget it; waits for as long as the reader does."""
        while True:
            for position, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(position)
            self._read()

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            raise QmpError("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message


@contextmanager
def connect(path: Path, timeout: float = 30.0) -> Iterator[Qmp]:
    """Open a session on the Unix socket ``path``; every wait in it ends after ``timeout`` seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        with connection.makefile("rb") as reader, connection.makefile("wb") as writer:
            yield Qmp(reader, writer)
