"""QEMU's own restart that keeps its fds (``cpr-transfer``, docs/devel/migration/CPR.rst): the pause of its guest.

The new process is there and waits before the old one stops, as in a take-over; RAM stays in its memfd. The guest is
the firmware under TCG, with devices that QEMU plays. Both times are QEMU's own: of STOP in the old process and of
RESUME in the new one, on one host's clock.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import sleep
from typing import Any

from tests.lab.small.guest import find_program

__all__ = ["Unable", "program", "transfer"]

Message = dict[str, Any]

PATIENCE_S = 120
"""A QEMU that says nothing for so long says nothing any more."""


class Unable(Exception):
    """This QEMU cannot do it; the words say why."""


def program() -> str | None:
    """The newest QEMU here: the lab's, or the installed one."""
    found = find_program()
    return shutil.which("qemu-system-x86_64") if found is None else str(found)


class _Qemu:
    """One process and a session of its monitor, whose greeting comes once it has what it waits for."""

    def __init__(self, command: str, place: Path, name: str, devices: int, *more: str) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.fspath(place / name))
            listening.listen(1)
            # QEMU's defaults are left out: they are not what is restarted here.
            command_line = [
                *(command, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64M"),
                *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
                *("-machine", "q35,memory-backend=ram,aux-ram-share=on"),
                *(part for number in range(devices) for part in ("-device", f"virtio-rng-pci,id=n{number}")),
                *("-chardev", f"socket,id=m,fd={listening.fileno()},server=on,wait=off", "-qmp", "chardev:m"),
                *more,
            ]
            errors = place / f"{name}.err"
            with errors.open("wb") as stream:
                self._process = subprocess.Popen(command_line, pass_fds=[listening.fileno()], stderr=stream)
            self._errors = errors
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(PATIENCE_S)
            self._socket.connect(os.fspath(place / name))
        self._lines = self._messages()
        self._kept: list[Message] = []

    def greeted(self) -> None:
        """Wait for the greeting, and negotiate."""
        self._next(lambda message: "QMP" in message)
        self.call("qmp_capabilities")

    def call(self, name: str, **arguments: Any) -> Any:
        """A command; its result. Raises Unable: QEMU refused it."""
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        reply = self._next(lambda message: "return" in message or "error" in message)
        if "error" in reply:
            raise Unable(f"{name}: {reply['error']['desc']}")
        return reply["return"]

    def event(self, name: str) -> int:
        """When it happened, in us; waits for it."""
        kept = next((message for message in self._kept if message.get("event") == name), None)
        stamp = (kept or self._next(lambda message: message.get("event") == name))["timestamp"]
        return int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])

    def _next(self, wanted: Callable[[Message], bool]) -> Message:
        for message in self._lines:
            if wanted(message):
                return message
            self._kept.append(message)
        raise Unable(self._words())

    def _messages(self) -> Iterator[Message]:
        with self._socket.makefile("rb") as stream:
            for line in stream:
                yield json.loads(line)

    def _words(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it ended without a word"

    def check(self) -> None:
        """Raises Unable: it has ended."""
        if self._process.poll() is not None:
            raise Unable(self._words())

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _listens(path: Path) -> bool:
    """Whether somebody listens there: the file alone comes earlier. 00010000 is the kernel's __SO_ACCEPTCON."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


def transfer(command: str, place: Path, devices: int) -> float:
    """One restart: from STOP to RESUME, in ns. Raises Unable."""

    def channel(kind: str) -> Message:
        return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(place / kind)}}

    with ExitStack() as stack:
        old = _Qemu(command, place, "old", devices)
        stack.callback(old.close)
        old.greeted()
        old.call("migrate-set-parameters", mode="cpr-transfer")
        incoming = [part for kind in ("main", "cpr") for part in ("-incoming", json.dumps(channel(kind)))]
        new = _Qemu(command, place, "new", devices, *incoming)
        stack.callback(new.close)
        while not _listens(place / "cpr"):
            new.check()
            sleep(0.01)
        old.call("migrate", channels=[channel("main"), channel("cpr")])
        new.greeted()
        if new.call("query-status")["running"]:
            raise Unable("it went on before anyone could hear of it")  # events go to negotiated sessions alone
        stopped = old.event("STOP")
        return (new.event("RESUME") - stopped) * 1000.0
