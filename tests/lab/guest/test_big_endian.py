"""The protocol package's unit tests on a big-endian machine: what is host order there, little-endian and big-endian."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lab.guest.machine import SOURCE_ROOTS
from tests.lab.places import REPO

MACHINE = "ccw"

UNIT = REPO / "tests" / "unit" / "protocol"
#: One process each: the imports cost more than most of the tests, and a failure names its part.
PARTS = [*sorted(path.name for path in UNIT.iterdir() if any(path.glob("test_*.py"))), "."]

#: One part, on a busy machine.
SECONDS = 400


@pytest.mark.parametrize("part", PARTS)
def test_unit_tests_of_the_protocol(part: str, tmp_path: Path) -> None:
    # Hundreds of tests in one: more than the limit of one guest test, and a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    files = [str(UNIT / part)] if part != "." else [str(path) for path in sorted(UNIT.glob("test_*.py"))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(REPO / "tests/lab/guest/guest.ini"), f"--rootdir={REPO}"),
            *(f"--basetemp={tmp_path / 'pytest'}", "--tb=short", "--durations=5", *files),
        ],
        # Without the variables that make this pytest the lab's.
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join((str(REPO), *SOURCE_ROOTS)),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    print(done.stdout[-20000:])
    assert done.returncode == 0, f"pytest ended with {done.returncode}; its output is below"
