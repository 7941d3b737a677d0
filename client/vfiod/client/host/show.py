"""How ``vfiod host`` shows what it found."""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["json_out", "table"]


def json_out(value: Any) -> int:
    """For programs."""
    print(json.dumps(value, indent=2))
    return 0


def table(heads: list[str], rows: list[list[str]], empty: str) -> int:
    """A table for a person; on a pipe, as wide as it needs to be. Without rows ``empty`` goes to standard error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty, file=sys.stderr)
        return 0
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 400)
    shown = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    return 0
