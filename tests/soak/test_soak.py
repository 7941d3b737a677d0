"""A short soak: what the server holds does not grow with what it is used for."""

from __future__ import annotations

import pytest
from tests.soak.plot import picture
from tests.soak.served import Census
from tests.soak.soak import FLAT, Sample, run, slope, steep, usual_rise

OPERATIONS, SAMPLES, WARM = 480, 8, 2
"""The first two looks are of a server that does everything for the first time."""


def test_nothing_grows() -> None:
    """A leak is there between any two looks, of which each has some twenty hotplugs, interrupts and mappings.

    And with every seed: what a short run happens to do for the first time, it does at other looks with another.
    """
    said = []
    for seed in (7, 8, 9):
        samples = list(run(OPERATIONS, seed=seed, samples=SAMPLES, faster=5))
        assert [one.operations for one in samples] == [60 * number for number in range(SAMPLES + 1)]
        done = samples[WARM:]
        rises = {name: usual_rise(done, name) for name in FLAT if name != "pss_kib"}
        assert (rises.pop("fds"), rises.pop("threads")) == (0, 0), samples
        said.append((seed, rises, samples))
        if all(rise < 10 for rise in rises.values()):
            break
    else:
        pytest.fail(f"it grew each time: {said}")
    drawn = picture(samples)
    assert drawn.count("<polyline") == 8
    assert "480 operations" in drawn


def test_a_leak_is_seen_and_a_step_is_none() -> None:
    assert slope([(0, 5), (1, 5), (2, 9), (3, 9), (4, 9), (5, 9), (6, 9)]) == 0
    assert slope([(0, 5), (1, 7), (2, 9)]) == 2
    leaking = [Sample(n, 0.0, Census(9, 10, 100, 500 + n // 3, 900, 20_000), {}, {}) for n in range(0, 1000, 100)]
    [fault] = steep(leaking, 200)
    assert fault.startswith("entries rises by 0.33")
    assert usual_rise(leaking, "entries") == 33
