"""Each system call fails while a server keeps its store current, and while one begins with what another has left.

Real processes, real calls (:mod:`tests.fuzz.faults.wall`), and a real keeper. ``VFIOD_FUZZ_EXAMPLES=5000`` for all of
them (``make fuzz``), otherwise a few, always the same ones.
"""

from __future__ import annotations

import errno as e
from pathlib import Path

import pytest
from tests.fuzz.faults.injector import Fault, Injector
from tests.fuzz.faults.shelf import Shelf, When
from tests.fuzz.faults.test_replaced import LONG, all_faults, few_faults
from tests.fuzz.faults.wall import possible

pytestmark = pytest.mark.skipif(
    not possible(), reason="the kernel does not ask about system calls (SECCOMP_USER_NOTIF)"
)

FEW = {
    When.STORING: (("sendmsg", 1, e.ETOOMANYREFS), ("pwrite", 2, e.ENOSPC)),
    When.BEGINNING: (
        ("connect", 1, e.ECONNREFUSED),
        ("pread", 1, e.EIO),
        ("dup", 2, e.EMFILE),
        ("epoll_ctl", 1, e.ENOSPC),
        ("socket", 1, e.EMFILE),
    ),
}


@pytest.mark.parametrize("when", When)
def test_each_call_may_fail(when: When, tmp_path: Path) -> None:
    complaints: list[str] = []
    ends: dict[str, int] = {}
    shelf: Shelf | None = None
    shelves, met = 0, 0
    tried: list[Fault | None] = [None, None]
    try:
        while tried:
            fault = tried.pop(0)
            if shelf is None:
                shelves += 1
                (tmp_path / str(shelves)).mkdir()
                shelf = Shelf(tmp_path / str(shelves))
            injector = Injector(fault)
            end, wrong = shelf.live(when, injector)
            met += injector.met
            ends[end.split(":")[0]] = ends.get(end.split(":")[0], 0) + 1
            if fault is None:
                assert end == "whole" and not wrong, "\n".join(wrong)
                if not tried:
                    calls = injector.calls
                    tried = [*(all_faults(calls) if LONG else few_faults(calls, FEW[when]))]
                    print(f"\n{when}: {len(injector.calls)} calls, {len(tried)} faults")
            complaints += [f"{when} {fault}: {one}" for one in wrong]
            if end != "whole":
                shelf.close()
                shelf = None
    finally:
        if shelf is not None:
            shelf.close()
    print(f"{met} met, {ends}")
    assert not complaints, "\n".join(complaints)
