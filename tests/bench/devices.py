"""Devices: adding many, registers, interrupts, mappings, and what all of them cost everybody else."""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter_ns

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, Wire, compiled, steal_fd, vfiod

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.memory import RegionWindow
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["VM", "lines", "read_lines"]

SMALL = b'{"execute":"query-version"}'
VM = "00000000-0000-4000-8000-000000000001"


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = int(8 * scale)
    with vfiod() as process:
        wire = process.connect()
        bench = _Devices(process, wire)
        bench.add()
        yield from _idle(bench)
        yield from _mapped(bench)
        yield from _registers(bench, rounds)
        yield from _interrupts(bench, rounds)
        wire.socket.close()
    yield from _growth(scale)
    yield from _events(rounds)


def _calls(wire: Wire, request: bytes) -> Callable[[], float]:
    return lambda: per_call(lambda: wire.call(request), 200)


class _Devices:
    """A server with primers."""

    def __init__(self, process: Process, wire: Wire) -> None:
        self.process = process
        self.wire = wire
        self.count = 0

    def make(self) -> str:
        """One more mediated device, not added."""
        made = self.wire.command("mdev-create", parent="primer", type="primer-pci", parameters={"memory": 4096})
        uuid = made["uuid"]
        assert isinstance(uuid, str)
        return uuid

    def add(self) -> float:
        """One more device; how long ``device_add`` took, in ns."""
        uuid = self.make()
        request = {"driver": "vfio-pci", "id": f"d{self.count}", "mdev": uuid}
        start = perf_counter_ns()
        self.wire.command("device_add", **request)
        self.count += 1
        return perf_counter_ns() - start

    def eventfd(self, name: str) -> FileDescriptor:
        """An eventfd that the server knows by name."""
        fd = FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK))
        self.wire.command("getfd", fd.number, fdname=name)
        return fd


# --- registers ----------------------------------------------------------------------------------------------


def _registers(bench: _Devices, rounds: int) -> Iterator[Line]:
    wire = bench.wire
    requests = {"trivial": SMALL} | {
        region: json.dumps(
            {"execute": "region-read", "arguments": {"device": "d0", "region": region, "offset": 0, "size": 4}}
        ).encode()
        for region in ("bar0", "bar2")
    }
    result = paired({name: _calls(wire, request) for name, request in requests.items()}, rounds)
    what = "region-read of a register, to a trivial command"
    yield Line(what, result.ratio("bar2", "trivial"), budget=1.3)
    yield Line("the same, trapped by a device written in Python", result.ratio("bar0", "trivial"))

    with FileDescriptor(os.memfd_create("registers")) as memory:
        os.ftruncate(memory.number, 4096)
        window = RegionWindow(Syscalls(), memory.number, 0, 4096)
        count = 20_000

        def loads() -> float:
            load = window.load
            start = perf_counter_ns()
            for _ in range(count):
                load(16, 4)
            return (perf_counter_ns() - start) / count

        def view() -> float:
            words = memoryview(mapped).cast("I")
            start = perf_counter_ns()
            for _ in range(count):
                words[4]
            took = (perf_counter_ns() - start) / count
            words.release()
            return took

        def preads() -> float:
            pread, number = os.pread, memory.number
            start = perf_counter_ns()
            for _ in range(count):
                pread(number, 4, 16)
            return (perf_counter_ns() - start) / count

        with mmap.mmap(memory.number, 4096) as mapped:
            result = paired({"load": loads, "view": view, "pread": preads}, rounds)
        window.close()
    yield Line("one register access, mapped: RegionWindow.load", result.median("load"), "ns", budget=100)
    yield Line("the same, to pread of 4 bytes", result.ratio("load", "pread"), note="how much the mapped way saves")
    yield Line("the same, to a bare cast memoryview", result.ratio("load", "view"), note="what the checks cost")


# --- interrupts ----------------------------------------------------------------------------------------------


def _interrupts(bench: _Devices, rounds: int) -> Iterator[Line]:
    what = "relayed interrupt, eventfd in to eventfd out, to a C epoll relay"
    floor = compiled("floor")
    if floor is None:
        yield Line(what, None, budget=1.6, note="left out: no C compiler")
        return
    with ExitStack() as stack:
        out = stack.enter_context(bench.eventfd("out"))
        eventfds = [{"vector": 0, "trigger": "out"}]
        bench.wire.command("irq-start", device="d0", index="msi", mode="relayed", eventfds=eventfds)
        # The eventfd that the kernel would signal: the server's own. Taken out of it, to play the kernel.
        inside = next(
            fd["number"]
            for fd in bench.wire.command("query-fds")
            if fd["owner"] == "device:d0" and fd.get("name") == "msi0 relay"
        )
        source = stack.enter_context(steal_fd(bench.process.pid, inside))
        c_in = stack.enter_context(FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)))
        c_out = stack.enter_context(FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)))
        relay = subprocess.Popen(
            [floor, "relay", str(c_in.number), str(c_out.number)], pass_fds=(c_in.number, c_out.number)
        )
        pairs = {"vfiod": (source, out), "c": (c_in, c_out)}
        result = paired({name: _relay(*pair) for name, pair in pairs.items()}, rounds)
        relay.terminate()
        relay.wait()
        bench.wire.command("irq-stop", device="d0", index="msi")
    yield Line(what, result.ratio("vfiod", "c"), budget=1.6)


def _relay(source: FileDescriptor, out: FileDescriptor) -> Callable[[], float]:
    poll = select.poll()
    poll.register(out.number, select.POLLIN)

    def once() -> None:
        os.eventfd_write(source.number, 1)
        poll.poll()
        os.eventfd_read(out.number)

    return lambda: per_call(once, 200)


def _idle(bench: _Devices) -> Iterator[Line]:
    seconds = 3
    time.sleep(1.5)  # what was begun has ended by then
    before, cpu = bench.process.wakeups(), bench.process.cpu_ns()
    time.sleep(seconds)
    wakeups, spent = bench.process.wakeups() - before, bench.process.cpu_ns() - cpu
    yield Line("idle, with a device and a session: wake-ups per second", wakeups / seconds, "/s", budget=0)
    yield Line("the same: processor time", spent / seconds / 1e9, "s/s", budget=0)


def _mapped(bench: _Devices) -> Iterator[Line]:
    bench.wire.socket.sendall(b'{"execute":"region-map","arguments":{"device":"d0","region":"bar2"}}')
    data = b""
    fds: list[int] = []
    while b'"return"' not in data:
        more, came, _, _ = socket.recv_fds(bench.wire.socket, 65536, 1)
        data, fds = data + more, fds + came
    told = next(json.loads(line)["return"] for line in data.splitlines() if b'"return"' in line)
    time.sleep(0.1)  # it still has to fall asleep after its reply
    before = bench.process.wakeups()
    with FileDescriptor(fds[0]) as memory, mmap.mmap(memory.number, told["size"], offset=told["offset"]) as window:
        words = memoryview(window).cast("I")
        for _ in range(100_000):
            words[4] = words[5]
        words.release()
    yield Line("100,000 accesses of a mapped BAR: wake-ups of vfiod", bench.process.wakeups() - before, "", budget=0)


# --- growth -----------------------------------------------------------------------------------------------


def _growth(scale: float) -> Iterator[Line]:
    most = 1000 if scale >= 1 else 100
    with ExitStack() as stack:
        small, large = stack.enter_context(vfiod()), stack.enter_context(vfiod())
        one, many = _Devices(small, small.connect()), _Devices(large, large.connect())
        one.add()
        costs = [many.add() for _ in range(most)]
        base = median(costs[2:12])
        marks = [mark for mark in (10, 100, 1000) if mark <= most]
        for mark in marks:
            near = median(costs[max(0, mark - 10) : mark])
            yield Line(f"device_add, the {mark}th to the first ten", near / base, budget=1.2)
        yield Line("open fds of the server for each device", _fds(large) / most, "", note="of primers")

        mappings = 10_000 if scale >= 1 else 1000
        memory = stack.enter_context(FileDescriptor(os.memfd_create("guest")))
        os.ftruncate(memory.number, 1 << 20)
        adding = []
        # Mapping into 1,000 address spaces is 1,000 mappings each: so it is the single device that gets them first.
        for bench, count in ((one, 1), (many, mappings)):
            bench.wire.command("getfd", memory.number, fdname="ram")
            bench.wire.command("object-add", qom_type="memory-backend-fd", id="ram", fd="ram")
            for number in range(count):
                start = perf_counter_ns()
                bench.wire.command("dma-map", iova=number << 12, size=4096, memory_backend="ram")
                adding.append(perf_counter_ns() - start)
        yield Line(
            f"dma-map into {most} devices, the {mappings}th to the first ten",
            median(adding[-10:]) / median(adding[1:11]),
            note="no budget; it shows growth",
        )
        result = paired({"one": _calls(one.wire, SMALL), "many": _calls(many.wire, SMALL)}, int(8 * scale))
        what = f"round trip with {most} devices and {mappings} mappings, to one of each"
        yield Line(what, result.ratio("many", "one"), budget=1.1)


def _fds(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


# --- events -----------------------------------------------------------------------------------------------


def _events(rounds: int) -> Iterator[Line]:
    """Bursts of events: starting 500 mediated devices is 500 events; shutting them down as many."""
    burst = 500
    with vfiod() as process:
        bench = _Devices(process, process.connect())
        for _ in range(burst):
            bench.make()
        state = {"on": False}
        for readers in (1, 10):
            sockets = [process.connect().socket for _ in range(readers - 1)] + [bench.wire.socket]

            def ours(sockets: list[socket.socket] = sockets) -> float:
                name = "mdev-shutdown" if state["on"] else "mdev-start"
                state["on"] = not state["on"]
                start = perf_counter_ns()
                bench.wire.socket.sendall(b'{"execute":"%s","arguments":{"uuid":"%s"}}' % (name.encode(), VM.encode()))
                read_lines([*((one, burst) for one in sockets[:-1]), (bench.wire.socket, burst + 1)])  # and the reply
                return burst / (perf_counter_ns() - start)

            result = paired({"vfiod": ours, "bare": partial(_bare, burst, readers)}, rounds)
            yield Line(
                f"events to {readers} reader{'s' if readers > 1 else ''}, to a bare loop of sends",
                result.ratio("vfiod", "bare"),
                budget=0.7,
                at_least=True,
                note="Unix sockets; the bare loop sends one prepared line per event and reader",
            )
            for one in sockets[:-1]:
                one.close()


def read_lines(wanted: Sequence[tuple[socket.socket, int]]) -> None:
    """Read so many lines from each."""
    poll = select.poll()
    left = {one.fileno(): (one, count) for one, count in wanted}
    for number in left:
        poll.register(number, select.POLLIN)
    while left:
        for number, _ in poll.poll():
            one, count = left[number]
            count -= one.recv(65536).count(b"\n")
            left[number] = (one, count)
            if count <= 0:
                poll.unregister(number)
                del left[number]


def _bare(burst: int, readers: int) -> float:
    """A process that does nothing but send: a prepared line for every event and reader."""
    line = b'{"timestamp":{"seconds":1795261745,"microseconds":842484},"event":"MDEV_STARTED",'
    line += b'"data":{"uuid":"%s","vm":"%s","seq":1}}\r\n' % (VM.encode(), VM.encode())
    pairs = [socket.socketpair() for _ in range(readers)]

    def send() -> None:
        for _ in range(burst):
            for _, there in pairs:
                there.send(line)

    sender = threading.Thread(target=send)
    start = perf_counter_ns()
    sender.start()
    read_lines([(here, burst) for here, _ in pairs])
    took = perf_counter_ns() - start
    sender.join()
    for pair in pairs:
        for end in pair:
            end.close()
    return burst / took
