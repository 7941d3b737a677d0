"""Every promise of SECURITY.md has a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_has_its_test() -> None:
    promised = re.findall(r"`(tests/[^`:]+)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(promised) > 10
    for file, name in promised:
        assert re.search(rf"def {name}\(", (ROOT / file).read_text()), f"{file}::{name}"
