"""Fuzzing: executions of every target per second, and what it costs to watch which lines they reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import process_time

from tests.bench.measuring import Line
from tests.fuzz.guided import Guided
from tests.fuzz.targets import TARGETS

ROUND_S = 0.3
"""Seconds of processor time for each measurement at scale 1."""

INPUTS = 10


def lines(scale: float) -> Iterator[Line]:
    """Executions per second of processor time."""
    for target in TARGETS.values():
        run = Guided(target.run, target.seeds(), modules=target.modules)
        guided = _seconds(lambda run=run: run.run(INPUTS), ROUND_S * scale)
        yield Line(f"fuzzing: {target.name}, executions per second", INPUTS / guided, unit="/s")
        kept = (run.kept * INPUTS)[:INPUTS]
        bare = _seconds(lambda target=target, kept=kept: [target.run(one) for one in kept], ROUND_S * scale)
        yield Line(f"fuzzing: {target.name}, coverage watched to bare", guided / bare)


def _seconds(call: Callable[[], object], at_least: float) -> float:
    """Of processor time, for one call."""
    begun, calls = process_time(), 0
    while (spent := process_time() - begun) < at_least:
        call()
        calls += 1
    return spent / calls
