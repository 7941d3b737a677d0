"""Each part of the benches runs to its end on this tree, in its shortest form. What it measures here means nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from tests.bench.__main__ import PARTS, name_of
from tests.bench.processes import ROOT

#: One row: what, what was measured, its budget, whether it meets that, a note; or why it was left out.
ROW = re.compile(r"\S.*?(?P<measured> [\d.e+-]+\S*)?( +[<>]= \S+)? +(yes|NO|-)(?P<note> .*)?")


@pytest.mark.parametrize("part", [name_of(part) for part in PARTS])
def test_each_part_runs(part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--only", part, "--scale", "0.02"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [ROW.fullmatch(line) for line in done.stdout.splitlines()[3:]]
    assert rows and all(row and (row["measured"] or row["note"]) for row in rows), done.stdout
