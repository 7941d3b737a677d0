"""Message signalled interrupts: how many vectors there are when the host grants fewer, and runs of them.

MSI allocates powers of two (PCI 3.0, 6.8.1.3, "Multiple Message Enable"). The kernel answers ``SET_IRQS`` for more
than it can give with a positive number, how many it could, or with ENOSPC (``vfio_msi_enable``,
``drivers/vfio/pci/vfio_pci_intrs.c``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["next_try", "power_below", "runs"]


def power_below(count: int) -> int:
    """The largest power of two that is not above ``count``; 0 for 0."""
    if count < 0:
        raise ValueError(f"A number of vectors is not negative, got {count}")
    return 1 << (count.bit_length() - 1) if count else 0


def next_try(asked: int, granted: int | None) -> int:
    """How many vectors to ask for next, after ``asked`` (at least 1) were refused; 0: none are to be had.

    Args:
        asked: how many were refused.
        granted: how many the kernel said it could give; None when it only said ENOSPC.

    """
    if asked < 1:
        raise ValueError(f"At least one vector was asked for, not {asked}")
    if granted is None:
        # The next lower power of two: 4 after 8, but also 4 after 5.
        return power_below(asked - 1)
    return power_below(min(max(granted, 0), asked - 1))


def runs(vectors: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Split vectors into runs of neighbours, ``(first, count)``, in order: one ``SET_IRQS`` sets one run."""
    first = count = 0
    for vector in sorted(set(vectors)):
        if count and vector == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = vector, 1
    if count:
        yield first, count
