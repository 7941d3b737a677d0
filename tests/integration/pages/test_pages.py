"""Every page of the documentation: each block says how it is run, and is run; each link leads somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import pytest
from tests.integration.pages.blocks import NAMES, REPO, broken_links, faults, read_page
from tests.integration.pages.session import Session

from vfiod.protocol.catalogue import COMMANDS, EVENTS
from vfiod.server.mdev.parent import ENTRY_POINTS

LIKE_A_COMMAND = re.compile(r"(?:query|irq|region|dma|mdev|ccw|object|device|trace-event)-[a-z-]+|device_[a-z_]+")
LIKE_AN_EVENT = re.compile(r"(?:DEVICE|IRQ|CCW|REGION|MACHINE|EVENTS)_[A-Z_]+")
LIKE_AN_OPTION = re.compile(r"--[a-z][a-z0-9-]+")


@pytest.mark.parametrize("name", NAMES)
def test_each_block_says_how_it_is_run(name: str) -> None:
    assert list(faults(read_page(name))) == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert list(broken_links(read_page(name))) == []


@pytest.mark.parametrize("name", [name for name in NAMES if Path(name).name != "commands.md"])
def test_the_page_is_true(name: str, tmp_path: Path) -> None:
    Session(read_page(name), tmp_path).run()


def test_the_entry_point_of_mediated_md() -> None:
    """What mediated.md tells a package to say: the group is the one that is looked for, and the object is there."""
    page = read_page("docs/mediated.md")
    (text,) = [block.text for block in page.blocks if block.language == "toml"]
    ((group, points),) = tomllib.loads(text)["project"]["entry-points"].items()
    assert group == ENTRY_POINTS
    module, _, name = points["casino"].partition(":")
    spec = importlib.util.spec_from_file_location(module, REPO / f"examples/{module}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert getattr(loaded, name)().name == "casino"


def test_trouble_quotes_what_is_said() -> None:
    """The first column of a table "it says" is in the sources, as somebody who searches for it would type it."""
    files = [
        Path(directory, name)
        for root in ("protocol", "server", "client")
        for directory, _, names in os.walk(REPO / root)
        for name in names
        if name.endswith(".py")
    ]
    sources = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
    tables = re.findall(r"^\| it says \|.*?(?=^[^|])", (REPO / "docs/trouble.md").read_text(), re.MULTILINE | re.DOTALL)
    quoted = [text for table in tables for text in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)]
    assert len(quoted) > 8
    assert [text for text in quoted if text not in sources] == []


def test_what_is_named_exists() -> None:
    """Words in backticks that look like commands, events or options are some, on every page."""
    reference = (REPO / "docs/commands.md").read_text()
    known = {*COMMANDS, *EVENTS, *re.findall(r"`([^`\n]+)`", reference)}  # members of results look like commands, too
    manuals = "".join(path.read_text() for path in (REPO / "docs/man").iterdir()).replace("\\-", "-")
    options = set(LIKE_AN_OPTION.findall(manuals))
    wrong, seen = [], 0
    for name in NAMES:
        text = re.sub(r"^```.*?^```", "", (REPO / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        for word in re.findall(r"`([^` \n]+)[^`]*`", text):
            if (LIKE_A_COMMAND.fullmatch(word) or LIKE_AN_EVENT.fullmatch(word)) and word not in known:
                wrong.append(f"{name}: {word}")
            # Examples have options of their own.
            if (found := LIKE_AN_OPTION.match(word)) and not name.startswith("examples") and found[0] not in options:
                wrong.append(f"{name}: {word}")
            seen += word in known or word in options
    assert wrong == [] and seen > 300
