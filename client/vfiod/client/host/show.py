"""How ``vfiod host`` shows what it found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["json_out", "table"]

SENTENCE: Final = 24
"""Columns below which the last column, where sentences stand, is no longer read: the rows become records."""

GAP: Final = 2
"""Columns between two of a table, and before what belongs to a record."""


def json_out(value: Any) -> int:
    """For programs."""
    print(json.dumps(value, indent=2))
    return 0


def table(heads: list[str], rows: list[list[str]], empty: str) -> int:
    """A table for a person; on a pipe, as wide as it needs to be. Without rows ``empty`` goes to standard error.

    On a terminal too narrow for it each row is a record of lines. Nothing is ever left out: half an address is none.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty, file=sys.stderr)
        return 0
    widths = [max(_width(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    whole = sum(widths) + GAP * (len(widths) - 1)
    terminal = sys.stdout.isatty()
    columns, lines = shutil.get_terminal_size()  # rich believes neither where TERM is "dumb"
    console = Console(soft_wrap=not terminal, width=columns if terminal else whole, height=lines)
    if console.width < whole - max(widths[-1] - SENTENCE, 0):
        for row in rows:
            _record(console, heads, row)
        return 0
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for head in heads[:-1]:
        shown.add_column(head, no_wrap=True)
    shown.add_column(heads[-1], overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    return 0


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _record(console: Console, heads: Sequence[str], row: Sequence[str]) -> None:
    """One row in lines: what it is, and below that a line or more for each other column."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((f"{heads[0]} ", "bold"), row[0]), soft_wrap=True)
    names = max(map(_width, heads[1:]), default=0)
    beside = console.width - 2 * GAP - names >= SENTENCE
    shown = Table.grid(padding=(0, GAP, 0, 0))
    if beside:
        shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for head, cell in zip(heads[1:], row[1:], strict=True):
        if beside:
            shown.add_row(head, Text(cell))
        else:  # the name on a line of its own
            shown.add_row(head)
            shown.add_row(Padding(Text(cell, overflow="fold"), (0, 0, 0, GAP)))
    console.print(Padding(shown, (0, 0, 0, GAP), expand=False))
