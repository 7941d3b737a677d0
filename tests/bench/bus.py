"""The bus: a call's way there and back, calls in flight, and what readers of events cost, to bare pyzmq.

Bare pyzmq is a process that does nothing else: a ROUTER that answers with a prepared message, a PUB that sends one.
What vfiod's events cost is shown twice: their way alone (``publisher.py``: hub and PUB in such a process), and with the
start or shutdown of the devices that they tell of, in a whole vfiod.
Readers read one after another, so with many of them the rate is mostly their own; the server's processor time is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from statistics import median
from time import perf_counter_ns

import msgpack
import zmq
from tests.bench.devices import VM, read_lines
from tests.bench.measuring import Line, paired, per_call
from tests.bench.monitor import SMALL, first_answer
from tests.bench.processes import ROOT, Process, cpu_ns, vfiod

from vfiod.client.bus import Bus
from vfiod.protocol.limits import BUS_QUEUE, MAX_BUS_IN_FLIGHT, MAX_SESSIONS

__all__ = ["lines"]

CALL = msgpack.packb({"jsonrpc": "2.0", "method": "query-version", "id": 1})
BURST = 200
"""Events at a time: what waits for a reader stays below its high-water mark, so none is dropped."""
assert BURST < BUS_QUEUE

BARE = """
import sys, zmq
where = sys.argv[1]
context = zmq.Context()
router, publisher = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
router.bind(f"ipc://{where}/bare")
publisher.bind(f"ipc://{where}/bare-events")
answer, event = bytes.fromhex(sys.argv[2]), [b"MDEV_STARTED/", bytes.fromhex(sys.argv[3])]
while True:
    peer, call = router.recv_multipart()
    if call[:1] == b"p":
        for _ in range(int(call[1:])):
            publisher.send_multipart(event, zmq.DONTWAIT)
    router.send_multipart([peer, answer])
"""


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    with _contestants() as bench:
        yield from _calls(bench, max(3, int(8 * scale)))
        for readers in (1, 10, 1000):
            yield from _events(bench, readers, max(2, int((8 if readers < 1000 else 3) * scale)))
    yield from _who_has_none(max(3, int(4 * scale)))


class _Bench:
    """A vfiod with a bus, one without, bare pyzmq; and clients of each.

    Attributes:
        bus_process: serves the bus alone; its events are for readers of the bus.
        unix_process: serves Unix sockets alone.
        bus, echo, due: DEALERs at the bus, at bare pyzmq, and at the way of an event alone.
        wire: a session on the Unix socket.

    """

    def __init__(
        self,
        directory: str,
        bus_process: Process,
        unix_process: Process,
        bare: subprocess.Popen[bytes],
        alone: subprocess.Popen[bytes],
    ) -> None:
        self.directory = directory
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4096)
        self.bus_process = bus_process
        self.unix_process = unix_process
        self.bare = bare
        self.alone = alone
        self.wire = unix_process.connect()
        self.bus = self.connected(zmq.DEALER, "bus")
        self.echo = self.connected(zmq.DEALER, "bare")
        self.due = self.connected(zmq.DEALER, "alone")
        self.started = dict.fromkeys(("bus", "unix"), False)
        parameters = {"memory": 4096}
        with Bus(f"ipc:{directory}/bus") as bus:
            for _ in range(BURST):
                bus.mdev_create(parent="primer", type="primer-pci", parameters=parameters)
                self.wire.command("mdev-create", parent="primer", type="primer-pci", parameters=parameters)

    def connected(self, kind: int, name: str) -> zmq.Socket[bytes]:
        """A socket at one of the addresses."""
        made = self.context.socket(kind)
        made.linger = 0
        if kind == zmq.SUB:
            made.subscribe(b"")
        made.connect(f"ipc://{self.directory}/{name}")
        return made

    def burst_command(self, name: str) -> str:
        """What makes a burst of events: all mediated devices of a machine start, or shut down."""
        self.started[name] = not self.started[name]
        return "mdev-start" if self.started[name] else "mdev-shutdown"

    def publish(self, name: str) -> None:
        """Make a burst on the bus, or have one of the others send one. Its reply is not read."""
        if name != "bus":
            self._dealer(name).send(b"p%d" % BURST)
        else:
            call = {"jsonrpc": "2.0", "method": self.burst_command("bus"), "params": {"uuid": VM}, "id": 1}
            self.bus.send(msgpack.packb(call))

    def answer(self, name: str) -> None:
        """Wait until it has begun no further work."""
        self._dealer(name).recv()

    def _dealer(self, name: str) -> zmq.Socket[bytes]:
        return {"bus": self.bus, "bare": self.echo, "alone": self.due}[name]

    def close(self) -> None:
        """End what is not a process."""
        self.context.destroy(linger=0)
        self.wire.socket.close()


@contextmanager
def _contestants() -> Iterator[_Bench]:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vb-"))
        addresses = ["--bus", f"ipc:{directory}/bus", "--events", f"ipc:{directory}/events"]
        processes = [stack.enter_context(vfiod(arguments=addresses)), stack.enter_context(vfiod())]
        answer = msgpack.packb({"jsonrpc": "2.0", "result": {"package": "", "qemu": [1, 2, 3]}, "id": 1})
        stamp = {"seconds": 1795261745, "microseconds": 842484}
        params = {"uuid": VM, "vm": VM, "seq": 1, "timestamp": stamp}
        event = msgpack.packb({"jsonrpc": "2.0", "method": "MDEV_STARTED", "params": params})
        bare = subprocess.Popen([sys.executable, "-c", BARE, directory, answer.hex(), event.hex()])
        stack.callback(bare.wait)
        stack.callback(bare.terminate)
        path = os.pathsep.join(str(ROOT / part) for part in ("protocol", "server", ""))
        command = [sys.executable, "-m", "tests.bench.publisher", directory, VM]
        alone = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        stack.callback(alone.wait)
        stack.callback(alone.terminate)
        bench = _Bench(directory, processes[0], processes[1], bare, alone)
        stack.callback(bench.close)
        yield bench


# --- calls ------------------------------------------------------------------------------------------------


def _calls(bench: _Bench, rounds: int) -> Iterator[Line]:
    def asked(dealer: zmq.Socket[bytes]) -> Callable[[], float]:
        def once() -> None:
            dealer.send(CALL)
            dealer.recv()

        return lambda: per_call(once, 200)

    ways: dict[str, Callable[[], float]] = {
        "bus": asked(bench.bus),
        "bare": asked(bench.echo),
        "unix": lambda: per_call(lambda: bench.wire.call(SMALL), 200),
    }
    result = paired(ways, rounds)
    yield Line("bus: small command, round trip, to bare pyzmq", result.ratio("bus", "bare"), note="ROUTER and DEALER")
    yield Line("the same, to the Unix socket", result.ratio("bus", "unix"))
    yield Line("bare pyzmq, to the Unix socket of vfiod", result.ratio("bare", "unix"))

    count = 2000

    def in_flight(dealer: zmq.Socket[bytes]) -> Callable[[], float]:
        def measure() -> float:
            start = perf_counter_ns()
            for _ in range(MAX_BUS_IN_FLIGHT):
                dealer.send(CALL)
            for _ in range(count - MAX_BUS_IN_FLIGHT):
                dealer.recv()
                dealer.send(CALL)
            for _ in range(MAX_BUS_IN_FLIGHT):
                dealer.recv()
            return count / (perf_counter_ns() - start)

        return measure

    def pipelined() -> float:
        start = perf_counter_ns()
        bench.wire.pipelined(SMALL, count)
        return count / (perf_counter_ns() - start)

    result = paired({"bus": in_flight(bench.bus), "bare": in_flight(bench.echo), "unix": pipelined}, rounds)
    yield Line(f"bus: {MAX_BUS_IN_FLIGHT} calls in flight: rate, to bare pyzmq", result.ratio("bus", "bare"))
    yield Line("the same, to the Unix socket, pipelined", result.ratio("bus", "unix"))


# --- events -----------------------------------------------------------------------------------------------


def _events(bench: _Bench, count: int, rounds: int) -> Iterator[Line]:
    """A burst of events, until each reader has all of it."""
    before = bench.bus_process.pss_kib()
    readers = {
        "bus": [bench.connected(zmq.SUB, "events") for _ in range(count)],
        "bare": [bench.connected(zmq.SUB, "bare-events") for _ in range(count)],
    }
    if count <= MAX_SESSIONS:  # of a thousand ZeroMQ's own work is nearly all
        readers["alone"] = [bench.connected(zmq.SUB, "alone-events") for _ in range(count)]
    sessions = [bench.unix_process.connect().socket for _ in range(count - 1)] if count <= MAX_SESSIONS else []
    for name, subscribers in readers.items():
        _subscribed(bench, name, subscribers)
    kib = (bench.bus_process.pss_kib() - before) / count
    spent: dict[str, list[float]] = {}

    def published(name: str) -> Callable[[], float]:
        pid = {"bus": bench.bus_process.pid, "alone": bench.alone.pid, "bare": bench.bare.pid}[name]

        def measure() -> float:
            cpu, start = cpu_ns(pid), perf_counter_ns()
            bench.publish(name)
            for one in readers[name]:
                for _ in range(BURST):
                    one.recv_multipart()
            took = perf_counter_ns() - start
            bench.answer(name)
            spent.setdefault(name, []).append((cpu_ns(pid) - cpu) / BURST)
            return BURST / took

        return measure

    def unix() -> float:
        cpu, start = bench.unix_process.cpu_ns(), perf_counter_ns()
        request = {"execute": bench.burst_command("unix"), "arguments": {"uuid": VM}}
        bench.wire.socket.sendall(json.dumps(request).encode())
        read_lines([*((one, BURST) for one in sessions), (bench.wire.socket, BURST + 1)])  # and the reply
        spent.setdefault("unix", []).append((bench.unix_process.cpu_ns() - cpu) / BURST)
        return BURST / (perf_counter_ns() - start)

    ways: dict[str, Callable[[], float]] = {name: published(name) for name in readers}
    if count <= MAX_SESSIONS:
        ways["unix"] = unix
    result = paired(ways, rounds)
    many = f"{count} reader{'s' if count > 1 else ''}"
    if "alone" in readers:
        yield Line(
            f"bus: events to {many}, their way alone, to bare pyzmq", result.ratio("alone", "bare"),
            budget=0.7, at_least=True, note="PUB and SUB; bare sends one prepared message",
        )  # fmt: skip
    yield Line(
        f"bus: events to {many}, with what makes them, to bare pyzmq", result.ratio("bus", "bare"),
        budget=0.7 if count <= 10 else None, at_least=True, note="devices start or shut down; bare makes nothing",
    )  # fmt: skip
    if count <= MAX_SESSIONS:
        yield Line("the same, to sessions of the Unix socket", result.ratio("bus", "unix"))
    else:
        yield Line("the same, to sessions of the Unix socket", None, note=f"left out: there are {MAX_SESSIONS} at most")
    costs = {name: median(each) for name, each in spent.items()}
    yield Line(
        f"server's processor time per event with {many}", costs["bus"] / 1000, "us",
        note=", ".join(f"{name}: {cost / 1000:.3g}us" for name, cost in costs.items() if name != "bus"),
    )  # fmt: skip
    if count > MAX_SESSIONS:
        yield Line("memory (PSS) of the server for each reader", kib, "KiB")
    for one in (one for each in readers.values() for one in each):
        one.close()
    for session in sessions:
        session.close()


def _subscribed(bench: _Bench, name: str, subscribers: list[zmq.Socket[bytes]]) -> None:
    """Until all subscriptions have arrived: of that ZeroMQ gives no sign but an event. Nothing is left to read."""
    missing = subscribers
    while missing:
        bench.publish(name)
        bench.answer(name)
        missing = [one for one in missing if not one.poll(1000)]
    for one in subscribers:
        while one.poll(300 if one is subscribers[0] else 0):
            one.recv_multipart()


# --- who has none -----------------------------------------------------------------------------------------


def _who_has_none(rounds: int) -> Iterator[Line]:
    """Start and memory with a bus, to those without: what is saved where none is asked for."""
    with tempfile.TemporaryDirectory(prefix="vb-") as directory:
        addresses = ["--bus", f"ipc:{directory}/bus", "--events", f"ipc:{directory}/events"]
        starts: dict[str, Callable[[], AbstractContextManager[Process]]] = {
            "with": lambda: vfiod(arguments=addresses),
            "without": vfiod,
        }
        result = paired({name: first_answer(start) for name, start in starts.items()}, rounds)
        yield Line("start to first answer with a bus, to without", result.ratio("with", "without"))
        sizes = {}
        for name, start in starts.items():
            with start() as process:
                process.connect().call(SMALL)
                sizes[name] = process.pss_kib()
        yield Line("memory (PSS) of one process with a bus, to without", sizes["with"] / sizes["without"])
