"""Platform devices: what relaying their interrupts costs, and that direct ones cost nothing."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter_ns
from typing import Any

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, Wire, compiled, steal_fd, vfiod

from vfiod.protocol.fd import FileDescriptor

__all__ = ["lines"]

MANY = 256


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = max(2, int(8 * scale))
    with vfiod() as process:
        wire = process.connect()
        yield from _relayed(process, wire, rounds)
        yield from _sustained(process, wire, int(10_000 * scale))
        yield from _direct(process, wire)
        yield from _many(process, wire, rounds)
        wire.socket.close()


class _Level:
    """One level interrupt: ``source`` is what the kernel signals, ``out`` and ``eoi`` are the hypervisor's."""

    def __init__(self, source: FileDescriptor, out: FileDescriptor, eoi: FileDescriptor) -> None:
        self.source, self.out, self.eoi = source.number, out.number, eoi.number
        self._arrives, self._taken = select.poll(), select.poll()
        self._arrives.register(self.out, select.POLLIN)
        self._taken.register(self.eoi, select.POLLIN)

    def once(self) -> None:
        """It fires, arrives, is completed, and whoever relays has heard of that."""
        os.eventfd_write(self.source, 1)
        self._arrives.poll()
        os.eventfd_read(self.out)
        os.eventfd_write(self.eoi, 1)
        while self._taken.poll(0):
            os.sched_yield()

    def cycles(self) -> Callable[[], float]:
        """For :func:`paired`."""
        return lambda: per_call(self.once, 200)


def _eventfd(stack: ExitStack) -> FileDescriptor:
    return stack.enter_context(FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)))


@contextmanager
def _device(wire: Wire, name: str, **parameters: int) -> Iterator[None]:
    made = wire.command("mdev-create", parent="platform", type="primer-platform", parameters=parameters)
    wire.command("device_add", driver="vfio-platform", id=name, mdev=made["uuid"])
    yield
    wire.command("device_del", id=name)


def _start(process: Process, wire: Wire, stack: ExitStack, device: str, index: int, mode: str) -> _Level:
    """Start one interrupt with eventfds of ours. In direct mode ``source`` is the trigger: the kernel's side of it."""
    out, eoi = _eventfd(stack), _eventfd(stack)
    names = {"trigger": f"{device}-{index}-trigger", "resample": f"{device}-{index}-resample"}
    wire.command("getfd", out.number, fdname=names["trigger"])
    wire.command("getfd", eoi.number, fdname=names["resample"])
    wire.command("irq-start", device=device, index=index, mode=mode, eventfds=[{"vector": 0, **names}])
    if mode == "direct":
        return _Level(out, out, eoi)
    fds: list[dict[str, Any]] = wire.command("query-fds")
    mine = (fd["number"] for fd in fds if fd["owner"] == f"device:{device}" and fd.get("name") == f"irq{index} relay")
    # The eventfd that the kernel would signal: the server's own. Taken out of it, to play the kernel.
    return _Level(stack.enter_context(steal_fd(process.pid, next(mine))), out, eoi)


def _relayed(process: Process, wire: Wire, rounds: int) -> Iterator[Line]:
    what = "platform, relayed level interrupt and its EOI, to C: epoll, two writes"
    floor = compiled("floor")
    if floor is None:
        yield Line(what, None, budget=1.6, note="left out: no C compiler")
        return
    with ExitStack() as stack, _device(wire, "p0"):
        ours = _start(process, wire, stack, "p0", 0, "relayed")
        source, out, eoi, unmask = (_eventfd(stack) for _ in range(4))
        numbers = [fd.number for fd in (source, out, eoi, unmask)]
        relay = subprocess.Popen([floor, "level", *map(str, numbers)], pass_fds=numbers)
        try:
            result = paired({"vfiod": ours.cycles(), "c": _Level(source, out, eoi).cycles()}, rounds)
        finally:
            relay.terminate()
            relay.wait()
    yield Line(what, result.ratio("vfiod", "c"), budget=1.6)


def _sustained(process: Process, wire: Wire, count: int) -> Iterator[Line]:
    """So many interrupts one after the other: how fast, and whether each arrived."""
    with ExitStack() as stack, _device(wire, "p1"):
        line = _start(process, wire, stack, "p1", 0, "relayed")
        start = perf_counter_ns()
        for _ in range(count):
            line.once()
        rate = count / (perf_counter_ns() - start) * 1e9
        (told,) = (irq for irq in wire.command("query-irqs", device="p1") if irq["index"] == 0)
    yield Line("platform, relayed: level interrupts per second", rate, "/s", budget=10_000, at_least=True)
    yield Line(f"of these {count}: lost", count - told["delivered"], "", budget=0)


def _direct(process: Process, wire: Wire) -> Iterator[Line]:
    """The kernel signals the caller's eventfd; that is played here, so this shows only that vfiod does not listen."""
    with ExitStack() as stack, _device(wire, "p2"):
        line = _start(process, wire, stack, "p2", 0, "direct")
        time.sleep(0.1)  # it still has to fall asleep after its reply
        before, cpu = process.wakeups(), process.cpu_ns()
        for _ in range(10_000):
            os.eventfd_write(line.source, 1)
            os.eventfd_read(line.out)
        woken, spent = process.wakeups() - before, process.cpu_ns() - cpu
    yield Line("platform, 10,000 direct interrupts: wake-ups of vfiod", woken, "", budget=0)
    yield Line("the same: processor time of vfiod", spent, "ns", budget=0)


def _many(process: Process, wire: Wire, rounds: int) -> Iterator[Line]:
    with ExitStack() as stack, _device(wire, "one"), _device(wire, "many", level=MANY, edge=0, messages=0):
        took = []
        started = []
        for index in range(MANY):
            start = perf_counter_ns()
            started.append(_start(process, wire, stack, "many", index, "relayed"))
            took.append(perf_counter_ns() - start)
        one = _start(process, wire, stack, "one", 0, "relayed")
        result = paired({"one": one.cycles(), "many": started[-1].cycles()}, rounds)
        for line in started:
            line.once()
        delivered = [irq["delivered"] for irq in wire.command("query-irqs", device="many")]
    what = f"platform, the last of {MANY} relayed IRQs of a device, to an only one"
    yield Line(what, result.ratio("many", "one"), budget=1.1)
    yield Line(
        f"irq-start of the last of {MANY}, to the first ten", median(took[-10:]) / median(took[:10]),
        note="with query-fds, which lists them all",
    )  # fmt: skip
    yield Line(f"of {MANY}: IRQs that did not arrive", sum(count < 1 for count in delivered), "", budget=0)
