"""A program in a terminal, seen as a person sees it: a real pty, and an emulator that draws what comes out of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pexpect  # type: ignore[import-untyped]
import pyte

PROGRAM: Final = [sys.executable, "-m", "vfiod.client.program"]
PATIENCE: Final = 120.0
"""Seconds until what is awaited must be there: a busy machine is no failure."""

COLOURS: Final = {
    "default": "#d8d8d8", "black": "#555555", "red": "#f07070", "green": "#8fd18f", "brown": "#e0c070",
    "blue": "#7fb0f0", "magenta": "#d090e0", "cyan": "#70d0d0", "white": "#ffffff", "brightblack": "#8a8a8a",
}  # fmt: skip


class Screen:
    """A terminal with ``vfiod`` in it.

    Args:
        arguments: of ``vfiod``.
        home: where it keeps its state.
        columns, lines: of the terminal.
        environment: more of it.
        directory: where it is started.

    """

    def __init__(
        self,
        *arguments: object,
        home: Path,
        columns: int = 100,
        lines: int = 30,
        environment: dict[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        told = {
            "XDG_STATE_HOME": str(home),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "LC_ALL": "C.UTF-8",
        }
        self.child: Any = pexpect.spawn(
            PROGRAM[0], [*PROGRAM[1:], *map(str, arguments)], env=kept | told | (environment or {}),
            dimensions=(lines, columns), timeout=PATIENCE, cwd=directory,
        )  # fmt: skip
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.child.close(force=True)

    @property
    def text(self) -> str:
        """The screen, without the spaces at the ends."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, text: str) -> None:
        self.child.send(text)

    def see(self, *what: str) -> str:
        """Wait until all of it is on the screen at once."""
        return self.until(lambda text: all(part in text for part in what), f"{what}")

    def until(self, fits: Callable[[str], bool], what: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not fits(self.text):
            assert self._feed(), f"it ended, and never showed {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what} on the screen:\n{self.text}"
        return self.text

    def end(self) -> int:
        """Wait until it has ended. Its exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._feed():
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
        self.child.close()
        return int(self.child.exitstatus)

    def _feed(self) -> bool:
        try:
            data = self.child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def svg(self, title: str) -> str:
        """The screen as a picture, for the documentation: text that can be searched, and compared line by line."""
        wide, high, left, top = 8.4, 18, 12, 40
        lines = self.text.count("\n") + 1
        width, height = int(self.screen.columns * wide + 2 * left), lines * high + top + 12
        drawn = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<title>{escape(title, quote=False)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#1c1f26"/>',
            f'<text x="{width // 2}" y="22" fill="#9a9a9a" text-anchor="middle" font-family="sans-serif" '
            f'font-size="13">{escape(title, quote=False)}</text>',
            '<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">',
        ]
        for number in range(lines):
            drawn += self._row(number, wide, left, top + number * high)
        return "\n".join([*drawn, "</g>", "</svg>", ""])

    def _row(self, number: int, wide: float, left: int, y: int) -> list[str]:
        """Runs of characters that look the same."""
        row = [self.screen.buffer[number][column] for column in range(self.screen.columns)]
        drawn: list[str] = []
        start = 0
        for column in range(1, len(row) + 1):
            first = row[start]
            if column < len(row) and row[column]._replace(data=first.data) == first:
                continue
            text = "".join(char.data for char in row[start:column])
            x = left + start * wide
            fill = COLOURS.get(first.fg, f"#{first.fg}")
            if first.reverse or first.bg != "default":
                back = fill if first.reverse else COLOURS.get(first.bg, f"#{first.bg}")
                length = (column - start) * wide
                drawn.append(f'<rect x="{x:.1f}" y="{y - 13}" width="{length:.1f}" height="18" fill="{back}"/>')
                fill = "#1c1f26" if first.reverse else fill
            if text.strip():
                bold = ' font-weight="bold"' if first.bold else ""
                length = (column - start) * wide
                placed = f'x="{x:.1f}" y="{y}" fill="{fill}"{bold} textLength="{length:.1f}"'
                drawn.append(f"<text {placed}>{escape(text, quote=False)}</text>")
            start = column
        return drawn
