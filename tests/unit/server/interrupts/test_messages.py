"""How many vectors there are when the host grants fewer, and runs of them.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.server.interrupts.messages import next_try, power_below, runs


@pytest.mark.parametrize(("count", "power"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (31, 16), (32, 32)])
def test_power_below(count: int, power: int) -> None:
    assert power_below(count) == power


def test_a_negative_number_of_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        power_below(-1)


@pytest.mark.parametrize(
    ("asked", "granted", "then"),
    [
        (8, 5, 4),  # a positive return: that many, rounded down
        (8, 4, 4),
        (8, 1, 1),
        (8, 0, 0),
        (8, None, 4),  # ENOSPC does not say: the next lower power of two
        (5, None, 4),
        (1, None, 0),
        (4, 9, 2),  # a kernel that refuses and grants more: never ask for as much again
    ],
)
def test_what_to_ask_for_next(asked: int, granted: int | None, then: int) -> None:
    assert next_try(asked, granted) == then


def test_nothing_was_asked_for() -> None:
    with pytest.raises(ValueError, match="At least one"):
        next_try(0, None)


@given(st.integers(1, 2048), st.none() | st.integers(-1, 4096))
def test_asking_again_always_ends(asked: int, granted: int | None) -> None:
    then = next_try(asked, granted)
    assert 0 <= then < asked
    assert then == power_below(then)


def test_runs_of_neighbours() -> None:
    assert list(runs([])) == []
    assert list(runs([3])) == [(3, 1)]
    assert list(runs([5, 0, 1, 2, 4, 2])) == [(0, 3), (4, 2)]


@given(st.sets(st.integers(0, 40)))
def test_runs_are_what_was_given_and_never_touch(vectors: set[int]) -> None:
    split = list(runs(vectors))
    assert {v for first, count in split for v in range(first, first + count)} == vectors
    assert all(first + count < following for (first, count), (following, _) in itertools.pairwise(split))
