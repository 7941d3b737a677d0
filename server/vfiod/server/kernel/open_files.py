"""Open files that are kept free for those who cannot do without.

What others send (fds, connections) is taken only as long as files are left beyond what is reserved: who sends many
starves himself. The kernel gives the lowest free number, so a number near the limit says that nearly all are taken.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable

from vfiod.protocol.fd import FileDescriptor

__all__ = ["are_scarce", "reserve", "reserved"]

_reserved = 0


def reserve(count: int) -> None:
    """Keep so many more free; fewer, for a negative number."""
    global _reserved
    _reserved += count


def reserved() -> int:
    """How many are kept free: at most half of what the limit allows."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_reserved, limit // 2)


def are_scarce(given: Iterable[int | FileDescriptor]) -> bool:
    """Whether what has just been given to us came out of the reserve: then it must be closed, and refused."""
    if not _reserved:
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = limit - min(_reserved, limit // 2)
    return any((one if isinstance(one, int) else one.number) >= first for one in given)
