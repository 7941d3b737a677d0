"""Pages of the documentation, taken apart: fenced blocks, and how each says that it is run.

The first word of a fence is the language; what follows says how the block is run, and readers do not see it:

=====================  =================================================================================================
``console``            lines that begin with ``$ `` are typed in a shell, in the page's own directory; what follows them
                       is printed. ``...`` stands for anything. A command that ends in ``&`` is a server: the page goes
                       on when it accepts, or, when lines follow it, when it has printed them. A line ending in a
                       backslash goes on in the next.
``terminal``           the same for ``vfiod`` at a terminal: what follows appears on it, and then it is closed
``json``               a conversation by QMP or JSON-RPC: ``-> `` is sent, ``<- `` is received, events too.
                       ``socket=NAME`` says where; default: the page's first monitor socket.
``python``             part of the page's program; a ``text`` block ends the program and is what it prints
``monitor``            what is typed in ``vfiod monitor``, after the prompt, and the start of what appears
``text drawing``       a picture made of characters: not run
ANY ``file=NAME``      the file of that name, written into the page's directory
ANY ``of=PATH``        an excerpt of a file of this repository, letter by letter
ANY ``run-by=ID``      run by that test (``tests/x.py::name``), which reads this page
ANY ``not-run=WHY``    cannot be run here, and why
ANY ``needs=WHAT``     beside the others: run only where this program or path exists
=====================  =================================================================================================

A block with none of these fails the test. A page may begin with a comment of this form; ``serve`` is a server that is
there already, ``replace`` a directory that stands for the page's own::

    <!-- page: serve="--name vm1 --qmp unix:vm1.sock" replace=/run/vfiod -->
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

REPO: Final = Path(__file__).parents[3]
PAGES: Final = sorted([*REPO.glob("*.md"), REPO / "examples/README.md", *(REPO / "docs").glob("*.md")])
NAMES: Final = [str(page.relative_to(REPO)) for page in PAGES]

HOW: Final = ("file", "of", "run-by", "not-run")
KNOWN: Final = {*HOW, "needs", "socket", "drawing"}
RUN_LANGUAGES: Final = ("console", "terminal", "json", "python", "monitor")
SHORTEST_REASON: Final = 15


class Block(msgspec.Struct, frozen=True):
    """A fenced block. ``line``: of its fence, from 1. ``how``: what the fence says beside the language."""

    page: str
    line: int
    language: str
    how: dict[str, str]
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Page(msgspec.Struct, frozen=True):
    name: str
    text: str
    blocks: list[Block]
    serve: str
    replace: str


def read_page(name: str) -> Page:
    text = (REPO / name).read_text()
    head = re.search(r"^<!-- page: (.*) -->$", text, re.MULTILINE)
    options = dict(word.split("=", 1) for word in shlex.split(head[1])) if head else {}
    assert options.keys() <= {"serve", "replace"}, f"{name}: a page has no {sorted(options)}"
    return Page(name, text, list(_blocks(name, text)), options.get("serve", ""), options.get("replace", ""))


def _blocks(name: str, text: str) -> Iterator[Block]:
    begun: tuple[int, str, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"(\s*```+)(.*)$", line)
        if begun is None and fence:
            begun = (number, fence[1], fence[2])
            inside = []
        elif begun is not None and fence and fence[1] == begun[1] and not fence[2].strip():
            language, *words = shlex.split(begun[2]) or [""]
            how = dict(word.partition("=")[::2] for word in words)
            yield Block(name, begun[0], language, how, "".join(f"{one}\n" for one in inside))
            begun = None
        elif begun is not None:
            inside.append(line)
    assert begun is None, f"{name}:{begun and begun[0]}: this block has no end"


def faults(page: Page) -> Iterator[str]:
    """What is wrong with a page before anything of it is run."""
    program_open = False
    for block in page.blocks:
        if unknown := block.how.keys() - KNOWN:
            yield f"{block.place}: a fence has no {sorted(unknown)}; see tests/integration/pages/blocks.py"
        how = [one for one in HOW if one in block.how]
        if len(how) > 1:
            yield f"{block.place}: {how} at once"
        elif how:
            yield from _faults_of(block, how[0])
        elif block.language == "python":
            program_open = True
        elif block.language == "text" and program_open:
            program_open = False
        elif block.language not in RUN_LANGUAGES and "drawing" not in block.how:
            yield (
                f"{block.place}: how is this {block.language or 'nameless'} block run? Make it one of {RUN_LANGUAGES}, "
                'or say file=, of=, run-by= or not-run="why" in its fence (tests/integration/pages/blocks.py)'
            )
        elif block.language in ("console", "terminal") and not block.text.startswith("$ "):
            yield f"{block.place}: a {block.language} block begins with '$ '"
    yield from _indented(page)


def _faults_of(block: Block, how: str) -> Iterator[str]:
    value = block.how[how]
    if how == "not-run" and len(value) < SHORTEST_REASON:
        yield f"{block.place}: 'not-run={value}' is no reason"
    elif how == "of" and block.text.strip("\n") not in (REPO / value).read_text():
        yield f"{block.place}: this is not, letter by letter, in {value}"
    elif how == "run-by":
        file, _, name = value.partition("::")
        source = (REPO / file).read_text() if (REPO / file).is_file() else ""
        if not re.search(rf"^ *(async )?def {re.escape(name.rpartition('::')[2])}\(", source, re.MULTILINE):
            yield f"{block.place}: there is no test {value}"
        elif Path(block.page).name not in source:
            yield f"{block.place}: {file} does not read {block.page}"


def _indented(page: Page) -> Iterator[str]:
    """Blocks made by indenting say nothing of how they are run."""
    fenced = re.sub(r"^(\s*```).*?^\1$", lambda found: "\n" * found[0].count("\n"), page.text, flags=re.M | re.S)
    before = ""
    for number, line in enumerate(fenced.splitlines(), 1):
        if line.startswith("    ") and line.strip() and not before.strip():
            yield f"{page.name}:{number}: an indented block: fence it, and say how it is run"
        before = line if not line.startswith("    ") else "indented"


def broken_links(page: Page) -> Iterator[str]:
    """Relative links whose file, or heading in it, is not there."""
    directory = (REPO / page.name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", page.text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        there = (directory / path) if path else REPO / page.name
        if not there.exists():
            yield f"{page.name}: there is no {target}"
        elif heading and there.suffix == ".md" and heading not in headings(there):
            yield f"{page.name}: {path or 'this page'} has no heading #{heading}"


@cache
def headings(path: Path) -> frozenset[str]:
    """Names of a page's headings in links, as forges make them."""
    found: Counter[str] = Counter()
    for title in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[name] += 1
    return frozenset(f"{name}-{number}" if number else name for name, times in found.items() for number in range(times))
