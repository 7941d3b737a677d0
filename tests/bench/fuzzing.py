"""Fuzzing: executions of every target per second, and what it costs to watch which lines they reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import process_time

from tests.bench.measuring import Line
from tests.fuzz.guided import Guided
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

ROUND_S = 0.3
"""Seconds of processor time for each measurement at scale 1."""

INPUTS = 10


def lines(scale: float) -> Iterator[Line]:
    """Executions per second of processor time."""
    for target in TARGETS.values():
        run = Guided(target.run, target.seeds(), modules=target.modules)
        mutated = _seconds(partial(run.run, INPUTS), ROUND_S * scale)
        yield Line(f"fuzzing: {target.name}, executions per second", INPUTS / mutated, unit="/s")
        kept = run.kept[:INPUTS]
        watched = _seconds(partial(run.feed, kept), ROUND_S * scale)
        bare = _seconds(partial(_all, target, kept), ROUND_S * scale)
        yield Line(f"fuzzing: {target.name}, coverage watched to bare", watched / bare)


def _all(target: Target, inputs: list[bytes]) -> None:
    for one in inputs:
        target.run(one)


def _seconds(call: Callable[[], object], at_least: float) -> float:
    """Of processor time, for one call."""
    begun, calls = process_time(), 0
    while (spent := process_time() - begun) < at_least:
        call()
        calls += 1
    return spent / calls
