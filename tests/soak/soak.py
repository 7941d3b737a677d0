"""The run: operations, a census now and then when nothing is left of them, and how steep each line is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter_ns
from typing import Final

from msgspec import Struct
from tests.soak.mix import KINDS, PATIENCE, Mix
from tests.soak.served import Census, Served

from vfiod.client.sync import Client

__all__ = ["FLAT", "Sample", "run", "slope", "steep", "usual_rise"]

FLAT: Final = {"fds": 0.0, "threads": 0.0, "entries": 0.02, "objects": 0.02, "blocks": 0.05, "pss_kib": 0.02}
"""What a line may rise with each operation. What one hotplug leaves behind would be about a third of itself: fds and
threads not at all; of objects and their memory (the least, a number in a list, is one entry and one block) less than
that, for an interpreter keeps some for use again. 0.02 KiB are 2 MiB in 100,000 operations."""


class Sample(Struct, frozen=True):
    """One look.

    Attributes:
        operations: before it.
        hours: of the server's clock, since it began.
        held: by the server, which has nothing to hold.
        median_ms: of each kind of operation since the last look, in milliseconds.
        worst_ms: the 99th percentile of the same.

    """

    operations: int
    hours: float
    held: Census
    median_ms: dict[str, float]
    worst_ms: dict[str, float]


def run(operations: int, *, seed: int, samples: int, faster: float) -> Iterator[Sample]:
    """Soak a server; yields each look at it.

    Args:
        operations: in all.
        seed: of their order.
        samples: looks, evenly; one more before the first operation.
        faster: seconds of the server's clock in one.

    """
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        served = Served(Path(name), faster=faster)
        try:
            served.wait_ready()
            with Client.connect(served.path, timeout=PATIENCE) as client:
                mix = Mix(client, served.path, seed)
                try:
                    yield from _looks(served, mix, operations, samples, faster)
                finally:
                    mix.close()
        except BaseException as error:
            try:
                served.close()
            except RuntimeError as end:
                error.add_note(str(end))
            raise
        served.close()


def _looks(served: Served, mix: Mix, operations: int, samples: int, faster: float) -> Iterator[Sample]:
    begun, done = monotonic(), 0
    for number in range(samples + 1):
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        while done < operations * number // samples:
            start = perf_counter_ns()
            kind = mix.step()
            times[kind].append((perf_counter_ns() - start) / 1e6)
            done += 1
        mix.calm()
        yield Sample(
            operations=done,
            hours=(monotonic() - begun) * faster / 3600,
            held=served.census(),
            median_ms={kind: median(all) for kind, all in times.items() if all},
            worst_ms={kind: quantiles(all, n=100)[-1] for kind, all in times.items() if len(all) > 1},
        )


def slope(points: list[tuple[float, float]]) -> float:
    """The median of the slopes between any two points (Theil and Sen): a single step does not matter."""
    return median((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))


def usual_rise(samples: list[Sample], name: str) -> float:
    """How much a number rises from one look to the next, as a rule: what leaks does so between any two."""
    return float(median(getattr(b.held, name) - getattr(a.held, name) for a, b in pairwise(samples)))


def steep(samples: list[Sample], warm: int) -> list[str]:
    """What rises more than :data:`FLAT` allows, in words.

    Args:
        samples: of a run.
        warm: operations that do not count: everything is imported and cached for the first time then.

    """
    counted = [one for one in samples if one.operations >= warm]
    faults = []
    for name, allowed in FLAT.items():
        rise = slope([(one.operations, getattr(one.held, name)) for one in counted])
        if rise > allowed:
            values = [getattr(one.held, name) for one in counted]
            faults.append(f"{name} rises by {rise:.5f} with each operation, allowed are {allowed}: {values}")
    return faults
