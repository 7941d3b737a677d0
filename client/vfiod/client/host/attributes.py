"""Files of sysfs as they are read everywhere here: what is not there, or may not be read, is no error."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_entries", "read_link", "read_names", "read_text", "read_text_or_empty"]


def read_text(path: Path) -> str | None:
    """An attribute's text; None: there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_text_or_empty(path: Path) -> str:
    """An attribute's text; empty: it is, or there is none."""
    return read_text(path) or ""


def read_entries(path: Path) -> list[Path]:
    """What is in a directory, sorted."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def read_names(path: Path) -> list[str]:
    """The names of what is in a directory, sorted."""
    return [entry.name for entry in read_entries(path)]


def read_link(path: Path) -> str | None:
    """The last component of a link's target: sysfs' way to name a relation."""
    try:
        return path.readlink().name
    except OSError:
        return None
