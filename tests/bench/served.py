"""Devices of other programs (the vfio-user backend): what an access costs, to a bare client of the same C server."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.exports import Client
from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, compiled, vfiod
from tests.bench.wire import SMALL

from vfiod.protocol import vfio_user
from vfiod.server.backends.vfio_user.link import Link

__all__ = ["lines"]

_READ = vfio_user.RegionRead(2, 64, 4)


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = int(8 * scale)
    program = compiled("exports")
    if program is None:
        yield Line("register read from a C server through the backend, to a bare client", None, note="no C compiler")
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield from _link(stack, directory, program, rounds)
        yield from _command(stack, directory, rounds)


def _link(stack: ExitStack, directory: Path, program: str, rounds: int) -> Iterator[Line]:
    """One access as the backend makes it, time-out, ids and the reply's checks included."""
    servers = []
    for name in ("a", "b"):
        floor = Process([program, "{fd}"], str(directory / name))
        stack.callback(floor.close)
        servers.append(str(directory / name))
    bare = Client(servers[0])
    stack.callback(bare.socket.close)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(servers[1])
    link = Link(sock, "the C server", timeout_ms=5000, serve=lambda _: "ENOSYS", lost=lambda _: None)
    stack.callback(link.close)
    link.ask(vfio_user.Version(0, 0, vfio_user.OURS)).close()
    measured = paired(
        {
            "backend": lambda: per_call(lambda: link.ask(_READ), 400),
            "bare": lambda: per_call(lambda: bare.ask(_READ), 400),
        },
        rounds,
    )
    yield Line(
        "register read from a C server as the backend does it, to a bare client",
        measured.ratio("backend", "bare"),
        note="no budget yet; ids, time-out, every reply checked",
    )


def _command(stack: ExitStack, directory: Path, rounds: int) -> Iterator[Line]:
    """``region-read`` of a device that another vfiod exports: a lane's turn, a thread, and the other vfiod's answer."""
    serving = stack.enter_context(vfiod(arguments=("--allow-path", str(directory))))
    using = stack.enter_context(vfiod())
    path = str(directory / "served")
    wire = serving.connect()
    made = wire.command("mdev-create", parent="primer", type="primer-pci", parameters={"memory": 4096})
    wire.command("device_add", driver="vfio-pci", id="d0", mdev=made["uuid"], export=path)
    there = using.connect()
    there.command("device_add", driver="vfio-pci", id="d0", socket=path)
    request = (
        b'{"execute":"region-read","arguments":{"device":"d0","region":"bar0","offset":0,"size":4}}'  # trapped there
    )
    measured = paired(
        {
            "served": lambda: per_call(lambda: there.call(request), 200),
            "own": lambda: per_call(lambda: wire.call(request), 200),
            "trivial": lambda: per_call(lambda: there.call(SMALL), 200),
        },
        rounds,
    )
    yield Line(
        "region-read of another program's device, to the same read in that program", measured.ratio("served", "own")
    )
    yield Line("the same, to a trivial command", measured.ratio("served", "trivial"))
