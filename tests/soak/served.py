"""The server under the soak: a real one, in its sandbox, whose clock runs ahead; and what it weighs.

Only its loop's clock is another: timers (rate limits of events, time limits of removals, storms) come as early as they
would in so many hours. On SIGUSR1 it collects garbage and says what its interpreter holds; on SIGUSR2
its clock is an ordinary one again, for the end: how long that may take is a limit of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

from msgspec import Struct

from vfiod.client.spawn import accepts

__all__ = ["Census", "Served"]

PATIENCE: Final = 120.0
"""Seconds before anything here is given up; nothing depends on time."""

PROGRAM: Final = """
import collections, gc, json, os, signal, sys, time
from vfiod.server import program

faster, report = float(sys.argv[1]), int(sys.argv[2])
made = program.new_loop


def new_loop():
    loop, begun = made(), time.monotonic()
    select = loop._selector.select
    loop.time = lambda: begun + (time.monotonic() - begun) * faster
    loop._selector.select = lambda timeout=None: select(timeout if timeout is None else timeout / faster)

    def slow_down(*_):
        ahead = loop.time() - time.monotonic()
        loop.time = lambda: ahead + time.monotonic()
        loop._selector.select = select

    signal.signal(signal.SIGUSR2, slow_down)
    return loop


def count(*_):
    sys._clear_type_cache()
    gc.unfreeze()
    gc.collect()
    found = gc.get_objects()
    entries = sum(len(one) for one in found if isinstance(one, (dict, list, set, collections.deque)))
    text = json.dumps({"objects": len(found), "entries": entries, "blocks": sys.getallocatedblocks()})
    os.write(report, text.encode() + b"\\n")


program.new_loop = new_loop
signal.signal(signal.SIGUSR1, count)
sys.exit(program.main(sys.argv[3:]))
"""


class Census(Struct, frozen=True):
    """What the server holds when nothing is left of what was done.

    Attributes:
        fds: open files.
        threads: of the process.
        objects: that the garbage collector knows.
        entries: of all dicts, lists, sets and deques together.
        blocks: of memory that Python has handed out.
        pss_kib: proportional set size.

    """

    fds: int
    threads: int
    objects: int
    entries: int
    blocks: int
    pss_kib: int


class Served:
    """A server process.

    Args:
        directory: for its socket and its log.
        faster: how many seconds of its clock go by in one.

    Attributes:
        path: its monitor.

    """

    def __init__(self, directory: Path, *, faster: float) -> None:
        self.path = directory / "qmp.sock"
        self._log = directory / "server.log"
        reading, writing = os.pipe()
        self._reports = os.fdopen(reading)
        options = ["--name", "soak", "--qmp", f"unix:{self.path}"]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM, str(faster), str(writing), *options],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writing],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )  # fmt: skip
        except BaseException:
            self._reports.close()
            raise
        finally:
            os.close(writing)
        self._about = Path(f"/proc/{self._process.pid}")

    def wait_ready(self) -> None:
        """Until it accepts."""
        deadline = monotonic() + PATIENCE
        while not accepts(self.path):
            if self._process.poll() is not None or monotonic() > deadline:
                raise RuntimeError(f"The server did not start:\n{self._log.read_text()}")
            sleep(0.01)

    def census(self) -> Census:
        """What it holds, once two looks give the same: what ends on its loop or in a thread may take a moment."""
        before = self._look()
        deadline = monotonic() + PATIENCE
        # Blocks are never the same: a look makes some.
        while {**(now := self._look()), "blocks": 0} != {**before, "blocks": 0} and monotonic() < deadline:
            before = now
        return Census(**now, pss_kib=self._pss_kib())

    def _look(self) -> dict[str, int]:
        self._process.send_signal(signal.SIGUSR1)
        line = self._reports.readline()
        if not line:
            raise RuntimeError(f"The server has ended:\n{self._log.read_text()}")
        held: dict[str, Any] = json.loads(line)
        fds, threads = (len(os.listdir(self._about / what)) for what in ("fd", "task"))
        return {**held, "fds": fds, "threads": threads}

    def _pss_kib(self) -> int:
        lines = (self._about / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def close(self) -> None:
        """End it. Raises RuntimeError with its log unless it ended well and had nothing to complain of."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)  # taken before SIGTERM: by number
            self._process.terminate()
        status = self._process.wait()
        self._reports.close()
        log = self._log.read_text()
        if status or " E " in log or "Traceback" in log or "ResourceWarning" in log:
            raise RuntimeError(f"The server ended with status {status} and said:\n{log}")
