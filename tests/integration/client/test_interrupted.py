"""Ctrl-C and SIGTERM at any line of what makes things: nothing is left, whatever has been made by then.

The program sends itself the signal at the n-th line it runs of the files below; which n is the test's. All of them take
long (VFIOD_EVERY_LINE=1); a slice is always run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

EVERY_LINE: Final = bool(os.environ.get("VFIOD_EVERY_LINE"))
SLICE: Final = 5
"""How many lines of each are tried when not all are."""

PATIENCE: Final = 300.0
INTERRUPTED: Final = """
import signal, sys, threading
from vfiod.client.program import main

at, number, *words = sys.argv[1:]
files = ("client/run.py", "client/manager.py", "client/demo.py", "client/spawn.py", "client/signals.py", "tempfile.py",
         "contextlib.py")
count = 0

def trace(frame, event, _):
    global count
    if not frame.f_code.co_filename.endswith(files):
        return None
    if event == "line":
        count += 1
        if count == int(at):
            signal.raise_signal(int(number))
    return trace

main(["--version"])
sys.settrace(trace)
status = main(words)
sys.settrace(None)
print("lines", count)
sys.exit(status)
"""
RUN: Final = ["run", "--quiet", "--name", "swept", "--mdev", "primer-pci", "--", "true", "{export}"]
DEMO: Final = ["demo", "--quiet"]


@pytest.fixture
def place() -> Iterator[Path]:
    """Short, since sockets are made in it; and empty at the end."""
    with tempfile.TemporaryDirectory(prefix="vi-") as name:
        yield Path(name)


def interrupted(place: Path, at: int, number: signal.Signals, words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(at), str(int(number)), *words],
        env=os.environ | {"TMPDIR": str(place)}, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    where = f"{number.name} at line {at} of {words[0]}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert [one.name for one in place.iterdir()] == [], where
    assert "Traceback" not in done.stderr, where
    return done


def lines_of(place: Path, words: list[str]) -> int:
    done = interrupted(place, 0, signal.SIGINT, words)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1].split()[1])


def chosen(count: int) -> list[int]:
    if EVERY_LINE:
        return list(range(1, count))
    return [count * one // (SLICE + 1) for one in range(1, SLICE + 1)]


def test_run(place: Path) -> None:
    """No directory is left; and no vfiod, which would have its sockets in it."""
    for at in chosen(lines_of(place, RUN)):
        for number in (signal.SIGINT, signal.SIGTERM) if EVERY_LINE else (signal.SIGINT,):
            done = interrupted(place, at, number, RUN)
            unhandled = -number  # until it handles them: then nothing has been made
            assert done.returncode in (0, 128 + number, unhandled), done.stderr
            assert servers_in(place) == [], f"{number.name} at line {at}"


def test_demo(place: Path) -> None:
    for at in chosen(lines_of(place, DEMO)):
        done = interrupted(place, at, signal.SIGINT, DEMO)
        assert done.returncode in (0, 128 + signal.SIGINT), done.stderr
        assert servers_in(place) == [], f"at line {at}"


def servers_in(place: Path) -> list[str]:
    """The servers with this directory for temporary files: those this test began."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            if b"TMPDIR=" + os.fsencode(place) in words:
                found.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue  # it has ended, or is another user's
    return found
