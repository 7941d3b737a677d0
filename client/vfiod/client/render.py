"""Values as people and scripts read them: JSON, plain or in colours, and what an fd is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from vfiod.protocol.fd import FileDescriptor

__all__ = ["coloured", "describe_fd", "json_text", "plain", "table"]

WIDE: Final = 96
"""Columns a list or an object may take on one line."""

CELL: Final = 40
"""Columns of the widest cell of a table: a UUID fits; what is longer is cut."""

FIRST: Final = frozenset({"id", "name", "device"})
"""Members that say what a row is about."""

FEWEST: Final = 3
"""Columns without which a table says too little: then it is JSON."""

GAP: Final = "  "


def plain(value: Any, fds: list[tuple[str, FileDescriptor]] | None = None, path: str = "") -> Any:
    """A result as JSON has it. fds become their index again, and are added to ``fds`` with the path they stand at."""
    if isinstance(value, FileDescriptor):
        if fds is None:
            return describe_fd(value)
        fds.append((path, value))
        return len(fds) - 1
    if isinstance(value, dict):
        return {name: plain(item, fds, f"{path}.{name}" if path else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item, fds, f"{path}[{index}]") for index, item in enumerate(value)]
    return msgspec.to_builtins(value)


def json_text(value: Any, *, compact: bool = False) -> str:
    """JSON for a terminal or a pipe: ASCII, so that no terminal is driven by what a device is called."""
    return json.dumps(value) if compact else json.dumps(value, indent=2)


def describe_fd(fd: FileDescriptor) -> str:
    """What an fd of ours is: its name in /proc, and its size where it has one."""
    try:
        name = str(Path(f"/proc/self/fd/{fd.number}").readlink())
    except OSError:
        name = "a file descriptor"
    status = os.fstat(fd.number)
    return f"{name} ({status.st_size} bytes)" if stat.S_ISREG(status.st_mode) else name


def coloured(value: Any, indent: int = 0, *, room: int = WIDE) -> Iterator[tuple[str, str]]:
    """A value as pretty JSON in (style, text) pieces, as prompt_toolkit takes them.

    What is no wider than ``room`` columns stays on one line.
    """
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    if isinstance(value, dict | list):
        wide = len(json.dumps(value)) + indent > room or _nested(value)
        line, last = ("\n" + " " * (indent + 2), "\n" + " " * indent) if wide and value else ("", "")
        yield "", opening
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        for number, (name, item) in enumerate(items):
            yield "", ("," if wide else ", ") * bool(number) + line
            if name is not None:
                yield "class:json.name", json.dumps(name)
                yield "", ": "
            yield from coloured(item, indent + 2, room=room)
        yield "", last + closing
    elif isinstance(value, str):
        yield "class:json.text", json.dumps(value)
    elif isinstance(value, bool) or value is None:
        yield "class:json.word", json.dumps(value)
    else:
        yield "class:json.number", json.dumps(value)


def table(value: Any, width: int) -> Iterator[tuple[str, str]] | None:
    """A list of objects as columns, in (style, text) pieces; None for what is no such list, or has no room.

    Args:
        value: of :func:`plain`.
        width: columns of the terminal. Members that do not fit are named below the table.

    """
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) and row for row in value):
        return None
    names = list(dict.fromkeys(name for row in value for name in row))
    cells = {name: [_cell(row[name]) if name in row else "-" for row in value] for name in names}
    widths: dict[str, int] = {}
    room = width
    for name in sorted(names, key=lambda name: name not in FIRST):  # what a row is about gets its room first
        wide = min(max(len(_cell(name)), *map(len, cells[name])), CELL)
        if wide <= room:
            widths[name] = wide
            room -= wide + len(GAP)
    shown = [(name, widths[name]) for name in names if name in widths]
    left = [name for name in names if name not in widths]
    if not shown or (left and len(shown) < FEWEST):
        return None
    return _rows(value, shown, left, cells)


def _rows(
    value: list[dict[str, Any]], shown: list[tuple[str, int]], left: list[str], cells: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    yield "class:head", GAP.join(f"{_cut(_cell(name), wide):<{wide}}" for name, wide in shown).rstrip()
    for number, row in enumerate(value):
        for place, (name, wide) in enumerate(shown):
            yield "", GAP if place else "\n"
            item, text = row.get(name), _cut(cells[name][number], wide)
            right = type(item) is int
            yield _style(item), f"{text:>{wide}}" if right else text if name == shown[-1][0] else f"{text:<{wide}}"
    if left:
        yield "class:note", f"\nNot shown: {', '.join(map(_cell, left))}. 'json COMMAND' shows all."


def _cut(text: str, wide: int) -> str:
    """A text in so many columns; ``~`` says that it went on."""
    return text if len(text) <= wide else text[: wide - 1] + "~"


def _cell(value: Any) -> str:
    """A value in one cell."""
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() and value else json.dumps(value)
    if isinstance(value, dict):
        return " ".join(f"{_cell(name)}={_cell(item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return ",".join(map(_cell, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else json.dumps(value)


def _style(value: Any) -> str:
    return f"class:json.{'number' if type(value) is int else 'word' if isinstance(value, bool) else 'text'}"


def _nested(value: dict[str, Any] | list[Any]) -> bool:
    """Objects in lists read better one below the other."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value)
