"""What the store of fds costs, and how long a server that was killed is away: to one without, to one that starts."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter_ns, sleep

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import ROOT

from vfiod.client.sync import Client

__all__ = ["lines"]

DEVICES = 20


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(3, int(10 * scale))
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_server(kept=name == "kept")) for name in ("kept", "alone")}
        clients = {name: stack.enter_context(Client.connect(one.path)) for name, one in servers.items()}
        trips = paired({name: _query(client) for name, client in clients.items()}, rounds)
        yield Line("query, round trip, with a store of fds to without", trips.ratio("kept", "alone"), budget=1.02)
        for client in clients.values():
            for number in range(DEVICES):
                _add(client, f"d{number}")
        writes = paired({name: _register(client) for name, client in clients.items()}, rounds)
        yield Line("register write, with a store of fds to without", writes.ratio("kept", "alone"))
        changes = paired({name: _plug(client) for name, client in clients.items()}, rounds)
        difference = (changes.median("kept") - changes.median("alone")) / 1e6
        note = f"{difference:.2f} ms more, with {DEVICES} devices"
        yield Line(
            "mdev-create and -destroy, with a store of fds to without", changes.ratio("kept", "alone"), note=note
        )
    ends = paired({"killed": _killed, "started": _started}, max(3, int(6 * scale)))
    note = f"{ends.median('killed') / 1e6:.0f} ms with {DEVICES} devices, to {ends.median('started') / 1e6:.0f} ms"
    yield Line("kill -9 to serving again, to the start of an empty server", ends.ratio("killed", "started"), note=note)


class _Server:
    """A vfiod under a keeper, or not."""

    def __init__(self, place: Path, *, kept: bool) -> None:
        self.path = place / "qmp"
        words = ["-m", "vfiod.client.program", "keeper", "--restarts", "1000", "--"] if kept else ["-m", "vfiod.server"]
        environment = os.environ | {
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("protocol", "server", "client"))
        }
        self.process = subprocess.Popen(
            [sys.executable, *words, "--name", "bench", "--qmp", f"unix:{self.path}", "--log-level", "error"],
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    def wait(self, dead: int = 0) -> int:
        """The process that serves, once it does and is not the dead one."""
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(self.path)) == 0:
                    pid = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                    if pid != dead:
                        return int(pid)
            sleep(0.001)


@contextmanager
def _server(*, kept: bool) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory() as place:
        made = _Server(Path(place), kept=kept)
        try:
            made.wait()
            yield made
        finally:
            made.process.terminate()
            made.process.wait()


def _add(client: Client, id: str) -> None:
    uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
    client.device_add(driver="vfio-pci", id=id, mdev=uuid)


def _query(client: Client) -> Callable[[], float]:
    return lambda: per_call(client.query_version, 200)


def _register(client: Client) -> Callable[[], float]:
    return lambda: per_call(lambda: client.region_write(device="d0", region="bar0", offset=4, size=4, value=1), 200)


def _plug(client: Client) -> Callable[[], float]:
    return lambda: per_call(
        lambda: client.mdev_destroy(uuid=client.mdev_create(parent="primer", type="primer-pci").uuid), 20
    )


def _killed() -> float:
    with _server(kept=True) as server:
        with Client.connect(server.path) as client:
            for number in range(DEVICES):
                _add(client, f"d{number}")
        pid = server.wait()
        begin = perf_counter_ns()
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)
        return perf_counter_ns() - begin


def _started() -> float:
    begin = perf_counter_ns()
    with _server(kept=False) as server:
        server.wait()
        return perf_counter_ns() - begin
