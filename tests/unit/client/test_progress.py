"""Progress: plain lines on a pipe, ticks on a terminal, nothing with --quiet."""

from __future__ import annotations

import sys

import pexpect  # type: ignore[import-untyped]
import pytest

from vfiod.client.progress import Progress

PROGRAM = """
import contextlib
from vfiod.client.progress import Progress

told = Progress("program")
with told.step("first [1/2]"):
    pass
with contextlib.suppress(ValueError), told.step("second"):
    raise ValueError
"""


def test_plain(capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress("program")
    with told.step("first"):
        told.say("within")
    assert capsys.readouterr() == ("", "program: first\nprogram: within\n")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress("program", quiet=True)
    with told.step("first"):
        told.say("within")
    assert capsys.readouterr() == ("", "")


def test_a_terminal() -> None:
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM], encoding="utf-8", timeout=60)
    child.expect("✓.*first \\[1/2\\]")
    child.expect("✗.*second")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
