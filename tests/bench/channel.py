"""Channel I/O on the built-in disk: round trips, to a trivial command, and to the same shape in C."""

from __future__ import annotations

import base64
import json
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Wire, compiled, vfiod

from vfiod.protocol.channel import ChannelProgram
from vfiod.protocol.fd import FileDescriptor

__all__ = ["lines"]

SMALL = b'{"execute":"query-version"}'
MEMORY = 1 << 16


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(2, int(8 * scale))
    with tempfile.TemporaryDirectory() as directory, vfiod(arguments=("--allow-path", directory)) as process:
        wire = process.connect()
        yield from _requests(wire, directory, rounds)
        wire.socket.close()


def _guest(wire: Wire, directory: str) -> bytes:
    """A disk, guest memory, a NOP in it; the request that runs it."""
    with tempfile.NamedTemporaryFile(dir=directory) as image:
        image.write(bytes(1 << 16))
        image.flush()
        made = wire.command("mdev-create", parent="fba", type="fba-ccw", parameters={"file": image.name})
    wire.command("device_add", driver="vfio-ccw", id="disk", mdev=made["uuid"])
    program = ChannelProgram(0x1000, 0x1000)
    program.nop()
    laid = program.build()
    with FileDescriptor(os.memfd_create("guest")) as memory:
        os.ftruncate(memory.number, MEMORY)
        with mmap.mmap(memory.number, MEMORY) as mapped:
            for address, data in laid.pieces:
                mapped[address : address + len(data)] = data
        wire.command("getfd", memory.number, fdname="guest")
        wire.command("dma-map", iova=0, size=MEMORY, fd="guest")
    orb = base64.b64encode(laid.orb.pack()).decode()
    return json.dumps({"execute": "ccw-request", "arguments": {"device": "disk", "orb": orb}}).encode()


def _requests(wire: Wire, directory: str, rounds: int) -> Iterator[Line]:
    request = _guest(wire, directory)
    if b"ended normally" not in wire.call(request):
        raise RuntimeError("The disk does not answer")
    contestants = {
        "request": lambda: per_call(lambda: wire.call(request), 200),
        "trivial": lambda: per_call(lambda: wire.call(SMALL), 200),
    }
    floor = compiled("channel")
    if floor is not None:
        contestants["c"] = lambda: float(subprocess.run([floor, "2000"], check=True, capture_output=True).stdout)
    result = paired(contestants, rounds)
    per_second = 1e9 / result.median("request")
    yield Line("ccw-request of a NOP to the built-in disk, per second", per_second, unit="/s")
    yield Line("the same, to a trivial command", result.ratio("request", "trivial"))
    if floor is None:
        yield Line("the same, to pwrite, poll and pread in C", None, note="left out: no C compiler")
        return
    note = "the monitor, JSON and words included; C has neither"
    yield Line("the same, to pwrite, poll and pread in C", result.ratio("request", "c"), note=note)
