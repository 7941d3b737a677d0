"""What a device saves of its parts: each has a name, its values stand under it, and its fds begin with it."""

from __future__ import annotations

from collections.abc import Mapping

from vfiod.server.mdev.parent import Saved

__all__ = ["joined", "part_of"]


def joined(parts: Mapping[str, Saved]) -> Saved:
    """One account of several, by their names; a name has no dot."""
    values = {name: part.values for name, part in parts.items()}
    return Saved(values, {f"{name}.{fd}": one for name, part in parts.items() for fd, one in part.fds.items()})


def part_of(saved: Saved, name: str) -> Saved:
    """One of them again. KeyError: there is none of that name."""
    begins = f"{name}."
    fds = {fd.removeprefix(begins): one for fd, one in saved.fds.items() if fd.startswith(begins)}
    return Saved(saved.values[name], fds)
