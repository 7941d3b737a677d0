"""Each system call of a take-over fails in each plausible way, at either end: exactly one owns everything afterwards.

Real processes, real calls (:mod:`tests.fuzz.faults.wall`); a manager and a hypervisor are connected all the time.
``VFIOD_FUZZ_EXAMPLES=5000`` for all of them (``make fuzz``), otherwise a few, always the same ones.
"""

from __future__ import annotations

import errno as e
import os
from pathlib import Path

import pytest
from tests.fuzz.faults.errnos import plausible_of_process
from tests.fuzz.faults.injector import Call, Fault
from tests.fuzz.faults.row import End, Row, fds_of
from tests.fuzz.faults.wall import possible

pytestmark = pytest.mark.skipif(
    not possible(), reason="the kernel does not ask about system calls (SECCOMP_USER_NOTIF)"
)

LONG = int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100")) > 100

FEW = {
    End.GIVER: (("accept4", 1, e.EMFILE), ("sendmsg", 1, e.ETOOMANYREFS), ("recvfrom", -1, e.ENOMEM)),
    End.TAKER: (("recvmsg", 1, e.ENOMEM), ("dup", 2, e.EMFILE), ("epoll_ctl", 2, e.ENOSPC), ("poll", -1, e.ENOMEM)),
}
"""What is always tried; numbers below zero count from the end."""


def all_faults(calls: list[Call]) -> list[Fault]:
    """Those of a long run."""
    return [Fault(call, number) for call in calls for number in plausible_of_process(call.name)]


def few_faults(calls: list[Call], few: tuple[tuple[str, int, int], ...]) -> list[Fault]:
    """Those of a short one."""
    made = [(call, name, nth, number) for call in calls for name, nth, number in few if call.name == name]
    last = {call.name: call.nth for call in calls}
    return [Fault(call, number) for call, name, nth, number in made if call.nth == nth % (last[name] + 1)]


@pytest.mark.parametrize("end", End)
def test_each_call_of_a_take_over_may_fail(end: End, tmp_path: Path) -> None:
    complaints: list[str] = []
    done, met, rows = 0, 0, 0
    row = heirs = None
    try:
        calls: list[Call] = []
        tried: list[Fault | None] = [None, None]
        while tried:
            fault = tried.pop(0)
            if row is None:
                rows += 1
                (tmp_path / str(rows)).mkdir()
                row = Row(tmp_path / str(rows))
                row.fds_of_heirs = heirs
            injector, taken, wrong = row.replace(end, fault)
            done += taken
            met += injector.met
            if fault is None:
                assert taken and not wrong, "\n".join(wrong)
                row.fds_of_heirs = heirs = fds_of(row.owner.process.pid)
                if not tried:
                    calls = injector.calls
                    tried = [*(all_faults(calls) if LONG else few_faults(calls, FEW[end]))]
                    print(f"\n{end}: {len(calls)} calls, {len(tried)} faults")
                continue
            if wrong:
                complaints += [f"{end} {fault}: {one}" for one in wrong]
                row.close()
                row = None
    finally:
        if row is not None:
            row.close()
    print(f"{met} met, {done} done all the same")
    assert not complaints, "\n".join(complaints)
