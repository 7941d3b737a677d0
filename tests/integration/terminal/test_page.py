"""Pictures and keys of the documentation: what it shows is there, what is there is shown."""

from __future__ import annotations

import re
from pathlib import Path

from vfiod.client.watch.view import HELP

DOCS = Path(__file__).parents[3] / "docs"


def test_each_picture_is_shown_and_each_shown_is_there() -> None:
    shown = {
        name for page in DOCS.glob("*.md") for name in re.findall(r"\]\(pictures/([a-z-]+\.svg)\)", page.read_text())
    }
    assert {path.name for path in (DOCS / "pictures").iterdir()} == shown


def test_the_page_has_every_key() -> None:
    page = (DOCS / "monitor.md").read_text()
    keys = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    for row in HELP:
        assert any(row[0].split(",")[0].split()[0] == key.split(",")[0] for key in keys), row
