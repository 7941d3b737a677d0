"""The protocol package's unit tests on a big-endian machine: what is host order there, little-endian and big-endian."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

from tests.lab.guest.machine import SOURCE_ROOTS
from tests.lab.places import REPO

MACHINE = "ccw"

UNIT = REPO / "tests" / "unit" / "protocol"
#: Left out: the same thing many times over, minutes in emulation (their neighbours have each field once), and what
#: is about names and pictures, where no byte has an order.
LONG = (
    *("whatever_comes", "do_not_overlap", "calls_round_trip", "byte_by_byte"),
    *("every_member_with_a_wrong_value", "test_introspection", "sensible_number", "test_drawing", "test_settings"),
)
#: Left out: Python 3.14, the guest's, counts no recursion in C, so that texts about 1,000 deep are read. That has
#: nothing to do with the order of bytes.
DEEP = ("test_deep_arguments_are_refused", "test_long_texts_have_to_be_plain", "WireError-null")
#: All of them, on a busy machine.
SECONDS = 700


def test_unit_tests_of_the_protocol(tmp_path: Path) -> None:
    # Hundreds of tests in one: more than the limit of one guest test, and a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(REPO / "tests/lab/guest/guest.ini"), f"--rootdir={REPO}"),
            *(f"--basetemp={tmp_path / 'pytest'}", "--tb=short", "--durations=5", str(UNIT)),
            *("-p", "tests.lab.few_examples", "-k", f"not ({' or '.join(LONG + DEEP)})"),
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
