"""What clients of exports have mapped in one address space: each mapping with who counts it, in order of address."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from msgspec import Struct, field

from vfiod.server.backends.base import AddressSpace, Mapping

if TYPE_CHECKING:
    from vfiod.server.dma.clients import Client

__all__ = ["ClientRange", "RangeTable"]


class ClientRange(Struct, eq=False):
    """One mapping in one address space, and who counts it.

    Attributes:
        mapping: what it is.
        identity: what makes two mappings at one address the same: the file, and where in it.
        owners: the clients that count it.
        by_machine: the machine has the same mapping there, and had it first: the space has it from the machine.
        reachable: the space has it; else it is only known.

    """

    mapping: Mapping
    identity: tuple[object, ...]
    owners: list[Client]
    by_machine: bool = False
    reachable: bool = True

    @property
    def first(self) -> int:
        """The first address."""
        return self.mapping.iova

    @property
    def end(self) -> int:
        """The address after the last."""
        return self.mapping.iova + self.mapping.size


class RangeTable(Struct, eq=False):
    """The client mappings of one address space, lowest address first."""

    space: AddressSpace
    ranges: list[ClientRange] = field(default_factory=list)

    def overlapping(self, first: int, end: int) -> ClientRange | None:
        """One that has an address in this range."""
        at = bisect_left(self.ranges, first, key=_first)
        for one in self.ranges[max(0, at - 1) : at + 1]:
            if one.first < end and first < one.end:
                return one
        return None

    def exact(self, iova: int, size: int) -> ClientRange | None:
        """The one that is exactly this range."""
        at = bisect_left(self.ranges, iova, key=_first)
        if at < len(self.ranges) and self.ranges[at].first == iova and self.ranges[at].mapping.size == size:
            return self.ranges[at]
        return None

    def counting(self, first: int, end: int) -> Client | None:
        """A client that counts on a mapping of the machine's in this range."""
        low = bisect_right(self.ranges, first, key=_first)
        for one in self.ranges[max(0, low - 1) : bisect_left(self.ranges, end, key=_first)]:
            if one.by_machine and one.end > first:
                return one.owners[0]
        return None

    def insert(self, one: ClientRange) -> None:
        """It is mapped."""
        self.ranges.insert(bisect_left(self.ranges, one.first, key=_first), one)

    def remove(self, one: ClientRange) -> None:
        """It is mapped no more."""
        del self.ranges[bisect_left(self.ranges, one.first, key=_first)]


def _first(one: ClientRange) -> int:
    return one.mapping.iova
