"""Every row of docs/restarts.md names a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "restarts.md").read_text()


def test_every_row_names_a_test_that_is_there() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[^`:]+)(?:::(\w+))?`", row)
        assert named, row
        for file, name in named:
            text = (ROOT / file).read_text()
            assert not name or re.search(rf"def {name}\(", text), f"{file}::{name}"
