"""The pause of a take-over: the longest round trip of a session that goes on.

To a restart with the same devices, and to the pause of QEMU's own restart with as many (``cpr.py``), turn by turn.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from tests.bench import cpr
from tests.bench.measuring import Line
from tests.bench.processes import Wire

__all__ = ["lines"]

DEVICES = 10
SMALL = b'{"execute":"query-version"}'


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(3, int(7 * scale))
    pauses: list[float] = []
    restarts: list[float] = []
    usual: list[float] = []
    transfers: list[float] = []
    qemu, missing = cpr.program(), "there is no qemu-system-x86_64"
    with tempfile.TemporaryDirectory(prefix="vfiod-") as directory:
        for number in range(rounds):
            place = Path(directory) / str(number)
            place.mkdir()
            pause, restart, trip = _take_over(place)
            pauses.append(pause)
            restarts.append(restart)
            usual.append(trip)
            if qemu is None:
                continue
            try:
                transfers.append(cpr.transfer(qemu, place, DEVICES))
            except cpr.Unable as error:
                qemu, missing = None, f"QEMU says: {error}"
    words = f"{median(pauses) / 1e6:.0f} ms with {DEVICES} devices; a usual round trip is {median(usual) / 1e3:.0f} us"
    ratio = median(one / other for one, other in zip(pauses, restarts, strict=True))
    yield Line("take-over: the pause of a session, to a restart with the same devices", ratio, note=words)
    what = "the same, to STOP until RESUME of QEMU's cpr-transfer"
    if qemu is None:
        yield Line(what, None, note=f"left out: {missing}")
        return
    ratio = median(one / other for one, other in zip(pauses, transfers, strict=True))
    yield Line(what, ratio, note=f"{median(transfers) / 1e6:.0f} ms: firmware under TCG, {DEVICES} devices QEMU plays")


def _take_over(place: Path) -> tuple[float, float, float]:
    """The pause, a start with as many devices, and a usual round trip; in ns."""
    begin = perf_counter_ns()
    server = _start(place, "--name", "vm", "--qmp", f"unix:{place}/qmp", "--hand-over", f"unix:{place}/hand")
    wire = _connect(place / "qmp")
    for device in range(DEVICES):
        made = wire.command("mdev-create", parent="primer", type="primer-pci")
        wire.command("device_add", driver="vfio-pci", id=f"n{device}", mdev=made["uuid"])
    wire.call(SMALL)
    restart = perf_counter_ns() - begin
    gc.collect()
    following = _start(place, "--take-over", f"unix:{place}/hand")
    trips: list[int] = []
    while server.poll() is None:
        begin = perf_counter_ns()
        wire.call(SMALL)
        trips.append(perf_counter_ns() - begin)
    wire.socket.close()
    following.terminate()
    following.wait()
    server.wait()
    return max(trips), restart, median(trips)


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
