"""The command reference in ``docs`` is what the catalogue says today."""

from __future__ import annotations

import re
from pathlib import Path

from vfiod.protocol.catalogue import COMMANDS, EVENTS
from vfiod.protocol.reference import markdown

COMMITTED = Path(__file__).parents[3] / "docs" / "commands.md"
TEXT = markdown()


def test_docs_are_current() -> None:
    assert COMMITTED.read_text() == TEXT, "docs/commands.md is behind the catalogue: run `make docs`"


def test_every_command_and_event_has_a_chapter() -> None:
    headings = re.findall(r"^### (.+)$", TEXT, re.MULTILINE)
    assert set(COMMANDS) | set(EVENTS) <= set(headings)
    assert len(headings) == len(set(headings))


def test_every_link_leads_somewhere() -> None:
    anchors = {heading.lower() for heading in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert links and links <= anchors


def test_tables_keep_their_columns() -> None:
    for line in TEXT.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4, line
