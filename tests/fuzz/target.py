"""What a fuzz target is, and where its inputs come from.

Corpus files are text. One line is one input: ``t TEXT`` (with Python's escapes), ``x HEX``, or ``r COUNT TEXT`` for
TEXT so many times; ``#`` begins a comment. What a run has found goes into the file of its target, with a comment that
says what was wrong: it is replayed by every ``make test`` from then on.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["CORPUS", "Target", "lines", "written"]

CORPUS = Path(__file__).with_name("corpus")


class Target(NamedTuple):
    """One door, as a function of bytes.

    Attributes:
        name: what it is called in the table, and its file in the corpus.
        run: feeds one input. Raises what it finds: AssertionError for a broken promise, or the defect itself.
        seeds: gives what to begin with.
        modules: prefixes of the modules whose lines count as coverage.
        promise: what ``run`` holds of every input, in words.
        inputs: how many mutations ``make test`` tries.

    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    modules: tuple[str, ...]
    promise: str
    inputs: int


def written(line: str) -> bytes:
    """One line of a corpus file as bytes. Raises ValueError."""
    kind, _, rest = line.partition(" ")
    if kind == "x":
        return bytes.fromhex(rest)
    if kind == "r":
        count, _, rest = rest.partition(" ")
        return _text(rest) * int(count)
    if kind != "t":
        raise ValueError(f"A line of a corpus begins with t, x or r: {line[:60]!r}")
    return _text(rest)


def _text(text: str) -> bytes:
    value = ast.literal_eval("b'" + text.replace("'", "\\x27") + "'")
    assert isinstance(value, bytes)
    return value


def lines(name: str) -> list[bytes]:
    """The inputs of ``corpus/NAME.txt``."""
    text = (CORPUS / f"{name}.txt").read_text()
    return [written(line) for line in text.splitlines() if line and not line.startswith("#")]
