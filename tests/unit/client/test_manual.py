"""The manual pages: current, complete, and well formed to whoever reads roff here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfiod.client.manual import pages
from vfiod.client.program import SUBCOMMANDS
from vfiod.client.programs import options_of, programs
from vfiod.protocol.catalogue import COMMANDS, EVENTS
from vfiod.protocol.settings import SERVE

MAN = Path(__file__).parents[3] / "docs" / "man"
PAGES = pages()
PATIENCE = 120


def test_the_pages_in_docs_are_current() -> None:
    assert {path.name for path in MAN.iterdir()} == set(PAGES)
    for name, text in PAGES.items():
        assert (MAN / name).read_text() == text, f"docs/man/{name} is behind: run `make docs`"


def _plain(text: str) -> str:
    return re.sub(r"\\f[BIR]", "", text).replace("\\-", "-")


def test_nothing_is_left_out() -> None:
    assert {f"vfiod-{name}.1" for name in SUBCOMMANDS} <= set(PAGES)
    for program in programs():
        page = _plain(PAGES[f"vfiod-{program.words[0]}.1"])
        if program.last:
            assert f"vfiod {' '.join(program.words)}" in page
            for option in options_of(program)[0]:
                assert all(name in page for name in option.option_strings)
    commands = _plain(PAGES["vfiod-commands.7"])
    assert all(f'.SS "{name}' in commands for name in [*COMMANDS, *EVENTS])
    file = _plain(PAGES["vfiod.toml.5"])
    assert all(f"\n{one.name} = " in file for one in SERVE if one.in_file)


@pytest.mark.parametrize("program", ["groff", "mandoc"])
def test_whoever_formats_them_has_nothing_to_say(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    how = {"groff": ["-man", "-ww", "-Tutf8", "-z"], "mandoc": ["-T", "lint", "-W", "error"]}[program]
    for path in sorted(MAN.iterdir()):
        ran = subprocess.run([program, *how, str(path)], capture_output=True, text=True, timeout=PATIENCE)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", ""), path.name


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_line_is_a_text_or_a_known_request(page: str) -> None:
    """Texts of others must not become requests, nor end a font."""
    for line in PAGES[page].splitlines():
        if line[:1] in (".", "'"):
            assert re.match(r'\.(TH|SH|SS|TP|PP|IP|B|I|RI|br|nf|fi|\\")( |$)', line), line
        assert set(re.findall(r"\\(.)", line)) <= set('f-(e&["'), line
