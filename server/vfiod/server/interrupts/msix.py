"""MSI-X vectors are used one by one: what that costs the others, and which of them the guest wants.

The host allocates only up to the highest vector in use. A kernel that cannot allocate more while some are in use
(``VFIO_IRQ_INFO_NORESIZE``) must be told to disable the index and to enable it again with all of them; what fired in
between may be lost. Source: QEMU ``hw/vfio/pci.c`` (``vfio_msix_vector_do_use``); ``include/uapi/linux/vfio.h``.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Set
from typing import Final

__all__ = ["Growth", "USED", "growth", "to_signal", "wanted"]


class Growth(enum.Enum):
    """How the kernel comes to another set of vectors."""

    WITHIN = "all of them are allocated: only those that change are set"
    ADD = "the kernel allocates more while others are in use: only those that change are set"
    AGAIN = "the index is disabled, and enabled again with all of them; unused ones are -1"


_GROWTH: Final[Mapping[tuple[bool, bool], Growth]] = {
    # (above what is allocated, the kernel can grow)
    (False, False): Growth.WITHIN,
    (False, True): Growth.WITHIN,
    (True, False): Growth.AGAIN,
    (True, True): Growth.ADD,
}


def growth(allocated: int, needed: int, *, resizable: bool) -> Growth:
    """How to come from so many allocated vectors to so many needed ones (the highest in use, plus one)."""
    return _GROWTH[needed > allocated, resizable]


def to_signal(way: Growth, before: Collection[int], after: Collection[int]) -> tuple[int, ...]:
    """Which vectors are signalled once, because an interrupt of theirs may have been lost.

    Enabled again: every one that is used. Within what is allocated: the one taken into use, which the device may have
    fired before. Added: none, it has never existed before.
    """
    if way is Growth.AGAIN:
        return tuple(sorted(after))
    if way is Growth.ADD:
        return ()
    return tuple(sorted(set(after) - set(before)))


USED: Final[Mapping[tuple[bool, bool, bool], bool]] = {
    # (MSI-X enabled, all masked by the function mask, the vector's own mask): whether the vector is used
    (False, False, False): False,
    (False, False, True): False,
    (False, True, False): False,
    (False, True, True): False,
    (True, False, False): True,
    (True, False, True): False,
    (True, True, False): False,
    (True, True, True): False,
}


def wanted(*, enabled: bool, all_masked: bool, unmasked: Set[int]) -> frozenset[int]:
    """The vectors that a guest uses, of those it has unmasked (PCI 3.0, 6.8.2.3 and 6.8.2.9)."""
    return frozenset(unmasked) if USED[enabled, all_masked, False] else frozenset()
