"""The kernel's own VFIO: devices, mappings, vectors and configuration space, to a C program doing the same ioctls.

Only inside the lab's machine ``bench``: ``make bench-lab``.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import Any

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, Wire, compiled, vfiod
from tests.lab.guest import pci
from tests.lab.topologies import BENCH_EDUS, BENCH_NVME

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.group import GroupOrigin, KernelGroups
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["available", "lines"]

OURS, PEERS, ALONE = BENCH_EDUS
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
PIECES = (("4 KiB", 4 * KiB, 200), ("2 MiB", 2 * MiB, 32), ("1 GiB", GiB, 1))
"""What is mapped: a name, the size, and how many in a row."""


def available() -> bool:
    """Whether this is the lab's machine."""
    return all(pci.device_path(address).exists() for address in (*BENCH_EDUS, BENCH_NVME)) and os.geteuid() == 0


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(3, int(5 * scale))
    program = compiled("kernel")
    if program is None:
        yield Line("the kernel's VFIO, to a C program", None, note="left out: no C compiler")
        return
    with pci.bound(OURS, PEERS, ALONE, BENCH_NVME):
        for way in ("group", "cdev"):
            with Peer(program, way, PEERS) as peer, vfiod() as process:
                bench = _Kernel(process, way)
                yield from _opening(bench, peer, rounds)
                if way == "group":
                    yield from _config(bench, peer, rounds)
                    yield from _direct(bench)
                yield from _mapping(bench, peer, rounds)
                bench.close()
        yield from _vectors(program, rounds)
        yield from _backend(program, rounds)


class Peer:
    """The C program, with a device of its own."""

    def __init__(self, program: str, way: str, address: str) -> None:
        place = f"/dev/vfio/{pci.group_of(address)}" if way == "group" else str(pci.vfio_cdev(address))
        self._process = subprocess.Popen(
            [program, way, address, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, command: str) -> list[float]:
        """What a command took, in ns."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return [float(word) for word in self._line().split()]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("The C program is gone; its error is above")
        return line


class _Kernel:
    """A vfiod with one device."""

    def __init__(self, process: Process, way: str, address: str = OURS) -> None:
        self.process = process
        self.wire = process.connect()
        self.way = way
        self.address = address
        if way == "cdev":
            with FileDescriptor(os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)) as fd:
                self.wire.command("getfd", fd.number, fdname="iommufd")
            self.wire.command("object-add", qom_type="iommufd", id="i0", fd="iommufd")
        self.add()

    def add(self) -> float:
        """Add the device; how long ``device_add`` took, in ns."""
        group = f"/dev/vfio/{pci.group_of(self.address)}" if self.way == "group" else str(pci.vfio_cdev(self.address))
        with FileDescriptor(os.open(group, os.O_RDWR | os.O_CLOEXEC)) as fd:
            self.wire.command("getfd", fd.number, fdname="place")
        where = {"host": self.address, "group_fd": "place"} if self.way == "group" else {"fd": "place", "iommufd": "i0"}
        start = perf_counter_ns()
        self.wire.command("device_add", driver="vfio-pci", id="d0", **where)
        return perf_counter_ns() - start

    def remove(self) -> None:
        """Remove it, and wait until it is gone."""
        self.wire.command("device_del", id="d0")
        while self.wire.command("query-devices"):
            time.sleep(0.002)

    def close(self) -> None:
        """End the session."""
        self.wire.socket.close()


def _opening(bench: _Kernel, peer: Peer, rounds: int) -> Iterator[Line]:
    def ours() -> float:
        bench.remove()
        return bench.add()

    result = paired({"vfiod": ours, "c": lambda: peer.ask("open")[0]}, rounds)
    yield Line(
        f"open to usable device, by {bench.way}",
        result.ratio("vfiod", "c"),
        note=f"C: {result.median('c') / 1e6:.2g}ms",
    )


def _mapping(bench: _Kernel, peer: Peer, rounds: int) -> Iterator[Line]:
    with FileDescriptor(os.memfd_create("guest")) as memory:
        os.ftruncate(memory.number, GiB)
        with mmap.mmap(memory.number, GiB) as pages:
            for at in range(0, GiB, mmap.PAGESIZE):
                pages[at] = 1
        bench.wire.command("getfd", memory.number, fdname="ram")
        bench.wire.command("object-add", qom_type="memory-backend-fd", id="ram", fd="ram")
    for name, size, count in PIECES:
        took: dict[str, list[float]] = {"vfiod": [], "c": []}

        def ours(size: int = size, count: int = count, took: dict[str, list[float]] = took) -> float:
            mapping, unmapping = _map_unmap(bench.wire, size, count)
            took["vfiod"].append(unmapping)
            return mapping

        def theirs(size: int = size, count: int = count, took: dict[str, list[float]] = took) -> float:
            mapping, unmapping = peer.ask(f"map {size} {count}")
            took["c"].append(unmapping)
            return mapping

        result = paired({"vfiod": ours, "c": theirs}, rounds)
        # Rates: pieces in a second, so the C program's time to vfiod's.
        yield Line(
            f"map, {name} by {bench.way}: rate, to the C program",
            result.ratio("c", "vfiod"),
            budget=0.95,
            at_least=True,
            note=f"a round trip each; C: {result.median('c') / 1e3:.3g}us",
        )
        yield Line(
            f"unmap, {name} by {bench.way}: rate, to the C program",
            median(c / v for c, v in zip(took["c"][1:], took["vfiod"][1:], strict=True)),
            budget=0.95,
            at_least=True,
            note=f"C: {median(took['c'][1:]) / 1e3:.3g}us",
        )
    yield from _many_mappings(bench)
    bench.wire.command("object-del", id="ram")


def _request(command: str, **arguments: Any) -> bytes:
    members = {key.replace("_", "-"): value for key, value in arguments.items()}
    return json.dumps({"execute": command, "arguments": members}).encode()


def _map_unmap(wire: Wire, size: int, count: int) -> tuple[float, float]:
    """ns for each piece to be mapped, and to be unmapped, a command and a reply each."""
    maps = [_request("dma-map", iova=n * size, size=size, memory_backend="ram") for n in range(count)]
    unmaps = [_request("dma-unmap", iova=n * size, size=size) for n in range(count)]
    start = perf_counter_ns()
    for request in maps:
        reply = wire.call(request)
    middle = perf_counter_ns()
    assert b'"return"' in reply, reply
    for request in unmaps:
        reply = wire.call(request)
    end = perf_counter_ns()
    assert b'"return"' in reply, reply
    return (middle - start) / count, (end - middle) / count


def _many_mappings(bench: _Kernel) -> Iterator[Line]:
    count = 1000
    costs = []
    for number in range(count):
        request = _request("dma-map", iova=number << 12, size=4096, memory_backend="ram")
        start = perf_counter_ns()
        bench.wire.call(request)
        costs.append(perf_counter_ns() - start)
    bench.wire.command("dma-unmap", iova=0, size=count << 12)
    yield Line(
        f"dma-map by {bench.way}, the {count}th to the first ten", median(costs[-20:]) / median(costs[1:11]), budget=1.2
    )


def _config(bench: _Kernel, peer: Peer, rounds: int) -> Iterator[Line]:
    requests = {
        "trivial": b'{"execute":"query-version"}',
        "virtual": _request("region-read", device="d0", region="config", offset=0x10, size=4),
        "device": _request("region-read", device="d0", region="config", offset=0x04, size=4),
    }

    def calls(request: bytes) -> Callable[[], float]:
        return lambda: per_call(lambda: bench.wire.call(request), 50)

    contestants = {name: calls(request) for name, request in requests.items()}
    result = paired({**contestants, "pread": lambda: peer.ask("config 200")[0]}, rounds)
    yield Line(
        "config read of a device's register, to a trivial command", result.ratio("device", "trivial"), budget=1.3
    )
    yield Line("config read of a virtualised register, to the same", result.ratio("virtual", "trivial"), budget=1.3)
    yield Line(
        "config read through vfiod, to pread in C",
        result.ratio("device", "pread"),
        note="a round trip to a system call",
    )


def _direct(bench: _Kernel) -> Iterator[Line]:
    """edu's MSI, raised and acknowledged through the mapped BAR, as a guest does: vfiod sleeps."""
    wire = bench.wire
    wire.command("region-write", device="d0", region="config", offset=4, size=2, value=6)
    with ExitStack() as stack:
        trigger = stack.enter_context(FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)))
        wire.command("getfd", trigger.number, fdname="trigger")
        eventfds = [{"vector": 0, "trigger": "trigger"}]
        wire.command("irq-start", device="d0", index="msi", mode="direct", eventfds=eventfds)
        told, fds = _reply(wire, _request("region-map", device="d0", region="bar0"))
        device = stack.enter_context(FileDescriptor(fds[0]))
        window = stack.enter_context(mmap.mmap(device.number, told["size"], offset=told["offset"]))
        words = stack.enter_context(memoryview(window).cast("I"))
        poll = select.poll()
        poll.register(trigger.number, select.POLLIN)
        time.sleep(1.5)  # what was begun (a limited event of region-map) has ended by then
        before, count = bench.process.wakeups(), 200
        arrived = 0
        for _ in range(count):
            words[pci.EDU_IRQ_RAISE // 4] = 1
            poll.poll(10_000)
            arrived += os.eventfd_read(trigger.number)
            words[pci.EDU_IRQ_ACK // 4] = 1
        woken = bench.process.wakeups() - before
    assert arrived == count, f"{arrived} of {count} interrupts came"
    yield Line(f"{count} direct interrupts of the kernel: wake-ups of vfiod", woken, "", budget=0)
    wire.command("irq-stop", device="d0")
    wire.command("region-unmap", device="d0", region="bar0")


@contextmanager
def _opened_alone() -> Iterator[Any]:
    """A device's address space without a server around it."""
    spaces: list[Any] = []
    groups = KernelGroups(Syscalls(), spaces.append, spaces.remove)
    group = FileDescriptor(os.open(f"/dev/vfio/{pci.group_of(ALONE)}", os.O_RDWR | os.O_CLOEXEC))
    backend = groups.open(GroupOrigin("vfio-pci", ALONE, group_fd=group))
    try:
        yield backend.address_space
    finally:
        backend.close()
        groups.close()


def _backend(program: str, rounds: int) -> Iterator[Line]:
    """The ioctls from Python, without a monitor: what a mapping of a hypervisor costs besides its message."""
    fd = FileDescriptor(os.memfd_create("guest"))
    os.ftruncate(fd.number, 2 * MiB)
    memory = SharedMemory(fd)
    with Peer(program, "group", PEERS) as peer, _opened_alone() as space:
        for name, size, count in PIECES[:2]:

            def ours(size: int = size, count: int = count) -> float:
                start = perf_counter_ns()
                for number in range(count):
                    space.map(Mapping(number * size, size, memory, 0, readonly=False))
                took = (perf_counter_ns() - start) / count
                for number in range(count):
                    space.unmap(number * size, size)
                return took

            result = paired({"python": ours, "c": partial(_first, peer, f"map {size} {count}")}, rounds)
            yield Line(
                f"map, {name}: the backend alone, rate, to the C program",
                result.ratio("c", "python"),
                budget=0.95,
                at_least=True,
            )
    memory.close()


def _first(peer: Peer, command: str) -> float:
    return peer.ask(command)[0]


def _vectors(program: str, rounds: int) -> Iterator[Line]:
    """An NVMe disk's vectors, as many as two processors have: in one go, and one by one."""
    most = 128
    with Peer(program, "group", BENCH_NVME) as peer:
        theirs = [peer.ask(f"vectors {most}")[0] for _ in range(rounds)]
    with vfiod() as process:
        bench = _Kernel(process, "group", BENCH_NVME)
        bench.wire.command("region-write", device="d0", region="config", offset=4, size=2, value=6)
        ours = []
        for _ in range(rounds):
            start = perf_counter_ns()
            _start(bench.wire, range(most))
            ours.append(perf_counter_ns() - start)
            bench.wire.command("irq-stop", device="d0")
        yield Line(f"MSI-X, {most} vectors in one irq-start, to one SET_IRQS in C", median(ours) / median(theirs))
        single = []
        for vector in range(most):
            start = perf_counter_ns()
            _start(bench.wire, [vector])
            single.append(perf_counter_ns() - start)
        ratio = median(single[-10:]) / median(single[:10])
        yield Line(f"MSI-X one by one, the {most}th to the first ten, by the kernel", ratio, note=_noresize(bench.wire))
        bench.close()


def _noresize(wire: Wire) -> str:
    msix = next(irq for irq in wire.command("query-irqs", device="d0") if irq["name"] == "msix")
    return "the kernel allocates all again each time" if msix["flags"]["noresize"] else "the kernel adds one"


def _start(wire: Wire, vectors: Any) -> None:
    """Start vectors whose eventfds vfiod makes; those that come with the reply are closed."""
    _, fds = _reply(wire, _request("irq-start", device="d0", index="msix", vectors=list(vectors)))
    for fd in fds:
        os.close(fd)


def _reply(wire: Wire, request: bytes) -> tuple[Any, list[int]]:
    """The result of a request, and the fds that came with it; events are passed over."""
    wire.socket.sendall(request)
    data = b""
    fds: list[int] = []
    while True:
        more, came, _, _ = socket.recv_fds(wire.socket, 1 << 20, 253)
        data, fds = data + more, fds + came
        for line in data.splitlines() if data.endswith(b"\n") else ():
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(message["error"]["desc"])
            if "return" in message:
                return message["return"], fds
