"""An address space that a dead process has left: what it has is made what it is known to have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vfiod.protocol.errors import OperationFailed
from vfiod.server.backends.base import AddressSpace, Mapping

__all__ = ["settle"]


def settle(space: AddressSpace, mappings: Iterable[Mapping], clear: Callable[[int, int], object]) -> list[str]:
    """Unmap everything between the mappings, and map those that are not there. Blocks.

    What is mapped and known is not touched: a device may be at it. Returns what could not be done, in sentences.

    Args:
        space: the address space.
        mappings: all that belongs in it.
        clear: unmaps whatever is in a range (first address, bytes); OperationFailed with ENOENT: there was nothing.

    """
    problems: list[str] = []
    known = sorted(mappings, key=lambda one: one.iova)
    for first, size in _gaps(space.iova_ranges(), known):
        try:
            clear(first, size)
        except OperationFailed as error:
            if error.errno != "ENOENT":
                problems.append(f"{space.name}: what else is mapped could not be unmapped: {error}")
    for mapping in known:
        try:
            space.map(mapping)
        except OperationFailed as error:
            if error.errno not in ("EEXIST", "EADDRINUSE"):  # it is there
                problems.append(f"{space.name}: {error}")
    return problems


def _gaps(ranges: Iterable[tuple[int, int]], known: list[Mapping]) -> list[tuple[int, int]]:
    """The parts of the ranges (first, last) that no mapping has: first address, and bytes."""
    gaps = []
    for first, last in ranges:
        at = first
        for one in known:
            if one.last < at or one.iova > last:
                continue
            if one.iova > at:
                gaps.append((at, one.iova - at))
            at = one.last + 1
        if at <= last:
            gaps.append((at, last - at + 1))
    return gaps
