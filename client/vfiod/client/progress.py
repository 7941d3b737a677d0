"""What a long operation is at: a moving line on a terminal, plain lines on a pipe, nothing with ``--quiet``."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

__all__ = ["Progress"]


class Progress:
    """Tells of steps, on standard error.

    Args:
        who: the program, before each plain line.
        quiet: say nothing.

    """

    def __init__(self, who: str, *, quiet: bool = False) -> None:
        self._who = who
        self._quiet = quiet

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step that may take long. On a terminal it is shown while it runs, and ticked off with its seconds."""
        if self._quiet:
            yield
        elif sys.stderr.isatty():
            from rich.console import Console  # seldom needed, and slow
            from rich.markup import escape

            console, begun = Console(stderr=True, highlight=False), time.monotonic()
            try:
                with console.status(escape(text)):
                    yield
            except BaseException:
                console.print(f"[red]✗[/red] {escape(text)}")
                raise
            console.print(f"[green]✓[/green] {escape(text)} [dim]{time.monotonic() - begun:.1f} s[/dim]")
        else:
            self.say(text)
            yield

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            print(f"{self._who}: {text}", file=sys.stderr, flush=True)
