"""The pause of a take-over: the longest round trip of a session that goes on, to a restart with the same devices."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns

from tests.bench.measuring import Line
from tests.bench.processes import Wire

__all__ = ["lines"]

DEVICES = 10
SMALL = b'{"execute":"query-version"}'


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(3, int(7 * scale))
    with tempfile.TemporaryDirectory(prefix="vfiod-") as directory:
        pauses, restarts, usual = _measure(Path(directory), rounds)
    pause, restart = _middle(pauses), _middle(restarts)
    note = f"{pause / 1e6:.0f} ms with {DEVICES} devices; a usual round trip is {_middle(usual) / 1e3:.0f} us"
    yield Line("take-over: the pause of a session, to a restart with the same devices", pause / restart, note=note)


def _measure(directory: Path, rounds: int) -> tuple[list[float], list[float], list[float]]:
    pauses: list[float] = []
    restarts: list[float] = []
    usual: list[float] = []
    for number in range(rounds):
        place = directory / str(number)
        place.mkdir()
        begin = perf_counter_ns()
        server = _start(place, "--name", "vm", "--qmp", f"unix:{place}/qmp", "--hand-over", f"unix:{place}/hand")
        wire = _connect(place / "qmp")
        for device in range(DEVICES):
            made = wire.command("mdev-create", parent="primer", type="primer-pci")
            wire.command("device_add", driver="vfio-pci", id=f"n{device}", mdev=made["uuid"])
        wire.call(SMALL)
        restarts.append(perf_counter_ns() - begin)
        gc.collect()
        following = _start(place, "--take-over", f"unix:{place}/hand")
        trips: list[int] = []
        while server.poll() is None:
            begin = perf_counter_ns()
            wire.call(SMALL)
            trips.append(perf_counter_ns() - begin)
        pauses.append(max(trips))
        usual.append(sorted(trips)[len(trips) // 2])
        wire.socket.close()
        following.terminate()
        following.wait()
        server.wait()
    return pauses, restarts, usual


def _start(place: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vfiod.server", *arguments, "--allow-path", str(place)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _connect(path: Path) -> Wire:
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
        else:
            return Wire(sock)


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
