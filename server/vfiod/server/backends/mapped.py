"""What one IOMMU of the kernel's has mapped, as vfiod remembers it: sizes by address."""

from __future__ import annotations

__all__ = ["forget_range"]


def forget_range(mapped: dict[int, int], iova: int, size: int) -> None:
    """All that begins in a range is mapped no more."""
    if mapped.get(iova) == size:  # the common case, whatever the number of mappings
        del mapped[iova]
        return
    last = iova + size - 1
    for start in [start for start in mapped if iova <= start <= last]:
        del mapped[start]
