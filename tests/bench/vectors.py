"""MSI-X set-up of 2,048 vectors: all at once, in ranges, one by one; on a device written in Python."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from tests.bench.measuring import Line
from tests.bench.processes import ROOT, Wire, vfiod
from tests.bench.wide import VECTORS

__all__ = ["lines"]

RANGE = 250
"""Vectors one irq-start can start (253, as many as fds in one message)."""


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module; with less than 1, of fewer vectors."""
    vectors = max(2 * RANGE, int(VECTORS * min(1.0, scale)))
    with tempfile.TemporaryDirectory(prefix="vfiod-bench-") as directory:
        _install(Path(directory))
        with vfiod(str(ROOT), directory) as process:
            wire = process.connect()
            for resizable in (False, True):
                yield from _device(wire, vectors, resizable=resizable)
            wire.socket.close()


def _install(directory: Path) -> None:
    """Make the parent known as an installed package would."""
    info = directory / "wide-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wide\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vfiod.mdev_parents]\nwide = tests.bench.wide:Wide\n")


def _device(wire: Wire, vectors: int, *, resizable: bool) -> Iterator[Line]:
    kind = "vectors can be added" if resizable else "all are allocated again (NORESIZE)"
    uuid = wire.command("mdev-create", parent="wide", type="wide-pci", parameters={"resizable": resizable})["uuid"]
    name = f"w{int(resizable)}"
    wire.command("device_add", driver="vfio-pci", id=name, mdev=uuid)

    # In one irq-start: as many as it takes, and a fifth of that. Per vector it should be the same.
    many, few = RANGE, RANGE // 5
    costs = {count: median(_brought(wire, name, count) for _ in range(3)) for count in (many, few)}
    yield Line(
        f"irq-start of {many} vectors at once, per vector, to {few} at once",
        costs[many] / many / (costs[few] / few),
        budget=1.2,
        note=kind,
    )
    ranges = [_start(wire, name, range(first, min(first + RANGE, vectors))) for first in range(0, vectors, RANGE)]
    yield Line(
        f"{vectors} vectors by ranges of {RANGE}, the last full range to the first", ranges[-2] / ranges[0], note=kind
    )
    wire.command("irq-stop", device=name)
    single = [_start(wire, name, [vector]) for vector in range(vectors)]
    yield Line(
        f"{vectors} vectors one by one, the last to the first ones",
        median(single[-20:]) / median(single[1:21]),
        note=kind,
    )
    yield Line(f"{vectors} vectors: one by one, to by ranges of {RANGE}", sum(single) / sum(ranges), note=kind)
    wire.command("irq-stop", device=name)


def _brought(wire: Wire, device: str, count: int) -> float:
    """ns of one irq-start with eventfds that were sent before, and are closed after."""
    number = os.eventfd(0, os.EFD_NONBLOCK)
    for vector in range(count):
        wire.command("getfd", number, fdname=f"e{vector}")
    eventfds = [{"vector": vector, "trigger": f"e{vector}"} for vector in range(count)]
    request = _request("irq-start", device=device, index="msix", eventfds=eventfds)
    start = perf_counter_ns()
    reply = wire.call(request)
    took = perf_counter_ns() - start
    if b'"error"' in reply:
        raise RuntimeError(reply.decode())
    os.close(number)
    wire.command("irq-stop", device=device)
    return took


def _start(wire: Wire, device: str, vectors: Sequence[int]) -> float:
    """ns of one irq-start whose eventfds vfiod makes; those that come are closed."""
    request = _request("irq-start", device=device, index="msix", vectors=list(vectors))
    start = perf_counter_ns()
    wire.socket.sendall(request)
    data = b""
    while b'"return"' not in data or not data.endswith(b"\n"):
        more, fds, _, _ = socket.recv_fds(wire.socket, 1 << 20, 253)
        data += more
        for fd in fds:
            os.close(fd)
        if b'"error"' in data:
            raise RuntimeError(data.decode())
    return perf_counter_ns() - start


def _request(command: str, **arguments: object) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode()
