"""The monitor: round trips, throughput, processor time, fds, start and memory."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from statistics import median
from time import perf_counter_ns

from tests.bench.measuring import Line, Rounds, paired, per_call
from tests.bench.processes import QEMU, Process, Wire, compiled, floor_echo, qemu, vfiod

from vfiod.protocol.fd import FileDescriptor

__all__ = ["SMALL", "first_answer", "lines"]

SMALL = b'{"execute":"query-version"}'
LONG = json.dumps({"execute": "trace-event-get-state", "arguments": {"name": "x" * 1000}}).encode()
NO_QEMU = "left out: qemu-system-x86_64 is not installed"
NO_COMPILER = "left out: no C compiler"


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module. ``scale``: how much longer than the shortest sensible run."""
    yield from _round_trips(scale)
    yield from _start(scale)
    yield from _memory()


def _round_trips(scale: float) -> Iterator[Line]:
    rounds, calls = int(8 * scale), 200
    floor = compiled("floor")
    with ExitStack() as stack:
        processes = {"vfiod": stack.enter_context(vfiod())}
        if QEMU:
            processes["qemu"] = stack.enter_context(qemu())
        wires = {name: process.connect() for name, process in processes.items()}
        if floor:
            wires["floor"] = stack.enter_context(floor_echo(floor)).connect(negotiate=False)

        def against(name: str, result: Rounds) -> float | None:
            return result.ratio("vfiod", name) if name in result.values else None

        small = paired({name: _timed(wire, SMALL, calls) for name, wire in wires.items()}, rounds)
        yield Line(
            "small command, round trip, to QEMU", against("qemu", small), budget=0.17, note="" if QEMU else NO_QEMU
        )
        yield Line("the same, to the C floor", against("floor", small), budget=1.7, note="" if floor else NO_COMPILER)

        long = paired({name: _timed(wires[name], LONG, 20) for name in processes}, rounds)
        yield Line("1 KiB of arguments, to QEMU", against("qemu", long), budget=0.01, note="" if QEMU else NO_QEMU)

        cpu = paired({name: _cpu(processes[name], wires[name], calls) for name in processes}, rounds)
        yield Line(
            "server's processor time per request, to QEMU",
            against("qemu", cpu),
            budget=0.13,
            note="" if QEMU else NO_QEMU,
        )

        rate = paired({name: _pipelined(wires[name], 4000 if name == "vfiod" else 200) for name in processes}, rounds)
        yield Line(
            "pipelined, requests per second, to QEMU",
            against("qemu", rate),
            budget=35,
            at_least=True,
            note="" if QEMU else NO_QEMU,
        )

        bell = stack.enter_context(FileDescriptor(os.eventfd(0)))
        passing = paired({name: _getfd(wires[name], bell, 50) for name in processes}, rounds)
        yield Line("getfd with its fd, to QEMU", against("qemu", passing), budget=0.12, note="" if QEMU else NO_QEMU)
        for wire in wires.values():
            wire.socket.close()


def _timed(wire: Wire, request: bytes, calls: int) -> Callable[[], float]:
    return lambda: per_call(lambda: wire.call(request), calls)


def _cpu(process: Process, wire: Wire, calls: int) -> Callable[[], float]:
    def measure() -> float:
        before = process.cpu_ns()
        for _ in range(calls):
            wire.call(SMALL)
        return (process.cpu_ns() - before) / calls

    return measure


def _pipelined(wire: Wire, count: int) -> Callable[[], float]:
    def measure() -> float:
        start = perf_counter_ns()
        wire.pipelined(SMALL, count)
        return count / (perf_counter_ns() - start)

    return measure


def _getfd(wire: Wire, bell: FileDescriptor, calls: int) -> Callable[[], float]:
    request = b'{"execute":"getfd","arguments":{"fdname":"bench"}}'

    def measure() -> float:
        return per_call(lambda: wire.with_fd(request, bell.number), calls)

    return measure


# --- start and memory -------------------------------------------------------------------------------------


def _start(scale: float) -> Iterator[Line]:
    starts: dict[str, Callable[[], AbstractContextManager[Process]]] = {"vfiod": vfiod}
    if QEMU:
        starts["qemu"] = qemu
    result = paired({name: first_answer(start) for name, start in starts.items()}, max(3, int(3 * scale)))
    yield Line(
        "start to first answer, to QEMU -machine none",
        result.ratio("vfiod", "qemu") if QEMU else None,
        budget=6,
        note="" if QEMU else NO_QEMU,
    )


def first_answer(start: Callable[[], AbstractContextManager[Process]]) -> Callable[[], float]:
    """How long from nothing to the answer of a first command, in ns."""

    def measure() -> float:
        gc.collect()
        begin = perf_counter_ns()
        with start() as process:
            wire = process.connect()
            wire.call(SMALL)
            taken = perf_counter_ns() - begin
            wire.socket.close()
        return taken

    return measure


def _memory() -> Iterator[Line]:
    if not QEMU:
        yield Line("memory (PSS) of one process, to QEMU", None, note=NO_QEMU)
        return
    for count, budget in ((1, None), (20, 1.0)):
        pss = {name: median(_pss(start, count)) for name, start in (("vfiod", vfiod), ("qemu", qemu))}
        what = "memory (PSS) of one process alone, to QEMU's" if count == 1 else "memory (PSS) of each of 20, to QEMU's"
        yield Line(what, pss["vfiod"] / pss["qemu"], budget=budget)


def _pss(start: Callable[[], AbstractContextManager[Process]], count: int) -> list[int]:
    with ExitStack() as stack:
        processes = [stack.enter_context(start()) for _ in range(count)]
        for process in processes:
            wire = process.connect()
            wire.call(SMALL)
            wire.socket.close()
        return [process.pss_kib() for process in processes]
