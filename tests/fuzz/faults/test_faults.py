"""Each call of each operation fails in each plausible way (issue 7: "Faults, systematically").

The whole takes minutes: ``VFIOD_FUZZ_EXAMPLES=5000 python -m pytest tests/fuzz/faults`` (``make fuzz``). Otherwise each
operation meets a few faults, always the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz.faults.errnos import plausible
from tests.fuzz.faults.exceptions import EXCEPTIONS
from tests.fuzz.faults.injector import Call, Fault, installed
from tests.fuzz.faults.operations import OPERATIONS
from tests.fuzz.faults.sweep import Operation, good_run, starve, sweep_one

LONG = int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100")) > 100
FEW = 1
MOST_FDS = 64
STRIDE = 37
"""Prime, so that the few faults of one operation are not those of the next."""


@pytest.fixture(scope="module", autouse=True)
def wrapped() -> Iterator[None]:
    with installed():
        yield


def faults(operation: Operation, calls: list[Call]) -> list[Fault]:
    """Those to try."""
    every = [Fault(call, number) for call in calls for number in plausible(call.name)]
    if LONG or len(every) <= FEW:
        return every
    start = OPERATIONS.index(operation) * STRIDE
    return [every[(start + n * len(every) // FEW) % len(every)] for n in range(FEW)]


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_each_call_may_fail(operation: Operation) -> None:
    good = good_run(operation)
    if LONG:
        again = good_run(operation)
        assert (good.picture, good.calls) == (again.picture, again.calls), "it is not the same every time"
    tried = faults(operation, good.calls)
    outcomes = [sweep_one(operation, good, fault) for fault in tried]
    excused = sum(outcome.excuse is not None for outcome in outcomes)
    print(f"\n{operation}: {len(good.calls)} calls, {len(tried)} faults, {excused} by an exception")
    assert not (complaints := [one for outcome in outcomes for one in outcome.complaints]), "\n".join(complaints)


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.starves][:: 1 if LONG else 8], ids=str)
def test_fds_may_run_out(operation: Operation) -> None:
    """The limit is real (RLIMIT_NOFILE): one fd more in each run, until it succeeds."""
    good = good_run(operation)
    complaints: list[str] = []
    for left in range(0, MOST_FDS, 1 if LONG else 2):
        outcome = starve(operation, good, left)
        complaints += outcome.complaints
        if outcome.refusal is None:
            break
    else:
        complaints.append(f"{operation} never succeeded")
    assert not complaints, "\n".join(complaints)


def test_every_call_is_thought_of() -> None:
    """A new system call has to say what it may answer."""
    from vfiod.protocol import vfio

    known = (vfio.ContainerIoctl, vfio.GroupIoctl, vfio.DeviceIoctl, vfio.IommufdIoctl)
    used = {call.name for operation in OPERATIONS[::9] for call in good_run(operation).calls}
    assert used
    assert all(plausible(name) for name in used)
    assert {name for name in used if name.isupper()} <= {one.name for enum in known for one in enum}


def test_a_machine_that_is_taken_over_is_the_one_that_was_given() -> None:
    for operation in OPERATIONS:
        if operation.name.startswith("take-over"):
            assert good_run(operation).picture["parent 0"] == {}, operation


def test_every_exception_is_documented() -> None:
    told = (Path(__file__).parents[3] / "docs" / "faults.md").read_text()
    assert [one.why for one in EXCEPTIONS if one.why not in told] == []
