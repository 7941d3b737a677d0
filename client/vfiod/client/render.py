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

__all__ = ["coloured", "describe_fd", "json_text", "plain"]

WIDE: Final = 96
"""Columns a list or an object may take on one line."""


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


def coloured(value: Any, indent: int = 0) -> Iterator[tuple[str, str]]:
    """A value as pretty JSON in (style, text) pieces, as prompt_toolkit takes them. Short ones stay on one line."""
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    if isinstance(value, dict | list):
        wide = len(json.dumps(value)) + indent > WIDE or _nested(value)
        line, last = ("\n" + " " * (indent + 2), "\n" + " " * indent) if wide and value else ("", "")
        yield "", opening
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        for number, (name, item) in enumerate(items):
            yield "", ("," if wide else ", ") * bool(number) + line
            if name is not None:
                yield "class:json.name", json.dumps(name)
                yield "", ": "
            yield from coloured(item, indent + 2)
        yield "", last + closing
    elif isinstance(value, str):
        yield "class:json.text", json.dumps(value)
    elif isinstance(value, bool) or value is None:
        yield "class:json.word", json.dumps(value)
    else:
        yield "class:json.number", json.dumps(value)


def _nested(value: dict[str, Any] | list[Any]) -> bool:
    """Objects in lists read better one below the other."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value)
