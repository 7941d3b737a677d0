"""How things are measured: paired, interleaved, medians.

The machine is shared and noisy, so no time means anything by itself. Contestants take turns in short rounds; each round
gives one median per contestant, and so one ratio; the median of the ratios is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns

__all__ = ["Line", "Rounds", "paired", "per_call"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        what: what was compared with what.
        value: the ratio, or the quantity.
        unit: ``x`` for a ratio.
        budget: the most it may be (``at_least``: the least); None: there is no budget, it is to be known.
        at_least: the budget is a lower bound.
        note: why it was left out, or what to know about it.

    """

    what: str
    value: float | None
    unit: str = "x"
    budget: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def meets(self) -> bool | None:
        """Whether it is within its budget; None: there is none, or nothing was measured."""
        if self.value is None or self.budget is None:
            return None
        return self.value >= self.budget if self.at_least else self.value <= self.budget


class Rounds:
    """What a paired measurement gave: per contestant, one value per round."""

    def __init__(self, values: Mapping[str, list[float]]) -> None:
        self.values = values

    def ratio(self, one: str, other: str) -> float:
        """The median of the ratios, round by round."""
        return median(a / b for a, b in zip(self.values[one], self.values[other], strict=True))

    def median(self, one: str) -> float:
        """The median of one contestant's rounds."""
        return median(self.values[one])


def per_call(call: Callable[[], object], calls: int) -> float:
    """The median time of one call, in ns."""
    times = []
    for _ in range(calls):
        start = perf_counter_ns()
        call()
        times.append(perf_counter_ns() - start)
    return median(times)


def paired(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Let contestants take turns.

    Args:
        contestants: each measures itself once per round, and gives a number.
        rounds: how many, at least one; one more is made first and forgotten.

    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(max(1, rounds) + 1):
        # Who goes first changes, so that what the first leaves in the caches helps everybody alike.
        for name in order if number % 2 else reversed(order):
            value = contestants[name]()
            if number:
                values[name].append(value)
    return Rounds(values)
