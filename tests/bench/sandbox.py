"""What the sandbox and the audit log cost: round trips and the start with them, to those without."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import perf_counter_ns

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, Wire, vfiod

__all__ = ["lines"]

SMALL = b'{"execute":"query-version"}'
CHANGING = b'{"execute":"trace-event-set-state","arguments":{"name":"irq_*","enable":false}}'
"""The least that is noted."""


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = int(12 * scale)
    yield from _sandbox(rounds)
    yield from _audit(rounds)
    yield from _start(max(5, int(15 * scale)))


def _sandbox(rounds: int) -> Iterator[Line]:
    with ExitStack() as stack:
        on, off = (stack.enter_context(vfiod(arguments=["--sandbox", mode])) for mode in ("on", "off"))
        wires = {"on": on.connect(), "off": off.connect()}
        trips = paired({name: _trips(wire, SMALL) for name, wire in wires.items()}, rounds)
        yield Line("small command, round trip, sandbox on to off", trips.ratio("on", "off"), budget=1.02)
        work = paired({"on": _work(on, wires["on"]), "off": _work(off, wires["off"])}, rounds)
        yield Line("server's processor time per request, sandbox on to off", work.ratio("on", "off"), budget=1.02)


def _audit(rounds: int) -> Iterator[Line]:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        wires = {
            "on": stack.enter_context(vfiod(arguments=["--audit", f"{directory}/audit"])).connect(),
            "off": stack.enter_context(vfiod()).connect(),
        }
        noted = paired({name: _trips(wire, CHANGING) for name, wire in wires.items()}, rounds)
        yield Line("command that changes something, round trip, audit on to off", noted.ratio("on", "off"))
        looking = paired({name: _trips(wire, SMALL) for name, wire in wires.items()}, rounds)
        yield Line("query, round trip, audit on to off", looking.ratio("on", "off"), budget=1.02)


def _start(rounds: int) -> Iterator[Line]:
    starts = paired({mode: _first_answer(mode) for mode in ("on", "off")}, rounds)
    differences = [(on - off) / 1e6 for on, off in zip(starts.values["on"], starts.values["off"], strict=True)]
    differences.sort()
    note = f"{differences[len(differences) // 2]:.1f} ms more, of {starts.median('off') / 1e6:.0f} ms"
    yield Line("start to first answer, sandbox on to off", starts.ratio("on", "off"), budget=1.03, note=note)


def _trips(wire: Wire, request: bytes) -> Callable[[], float]:
    return lambda: per_call(lambda: wire.call(request), 400)


def _work(process: Process, wire: Wire) -> Callable[[], float]:
    def measure() -> float:
        before = process.cpu_ns()
        for _ in range(400):
            wire.call(SMALL)
        return (process.cpu_ns() - before) / 400

    return measure


def _first_answer(mode: str) -> Callable[[], float]:
    def measure() -> float:
        gc.collect()
        begin = perf_counter_ns()
        with vfiod(arguments=["--sandbox", mode]) as process:
            wire = process.connect()
            wire.call(SMALL)
            taken = perf_counter_ns() - begin
            wire.socket.close()
        return taken

    return measure
