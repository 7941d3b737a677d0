"""An address space that a dead process has left: what belongs there is left alone, the rest goes, what lacks comes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vfiod.protocol.errors import OperationFailed
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.settling import settle

PAGE = 4096


class Space:
    """An address space that has some mappings, and refuses as the kernel does."""

    name = "container:0"
    page_size = PAGE

    def __init__(self, *mapped: tuple[int, int]) -> None:
        self.mapped = dict(mapped)
        self.done: list[str] = []

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, 16 * PAGE - 1), (32 * PAGE, 64 * PAGE - 1))

    def map(self, mapping: Mapping) -> None:
        if any(at < mapping.iova + mapping.size and mapping.iova < at + size for at, size in self.mapped.items()):
            raise OperationFailed("VFIO_IOMMU_MAP_DMA", self.name, errno="EEXIST")
        self.mapped[mapping.iova] = mapping.size
        self.done.append(f"map {mapping.iova // PAGE}")

    def unmap(self, iova: int, size: int) -> None:
        inside = [at for at, length in self.mapped.items() if iova <= at and at + length <= iova + size]
        if any(at < iova < at + length or at < iova + size < at + length for at, length in self.mapped.items()):
            raise OperationFailed("VFIO_IOMMU_UNMAP_DMA", self.name, errno="EINVAL")
        if not inside:
            raise OperationFailed("IOMMU_IOAS_UNMAP", self.name, errno="ENOENT")
        for at in inside:
            del self.mapped[at]
            self.done.append(f"unmap {at // PAGE}")


def mapping(page: int, pages: int) -> Mapping:
    return Mapping(page * PAGE, pages * PAGE, cast("Any", None), 0, False)


@pytest.mark.parametrize(
    ("has", "known", "done"),
    [
        ([], [], []),
        ([(1, 2), (40, 4)], [(1, 2), (40, 4)], []),
        ([(1, 2), (5, 1), (33, 3)], [(1, 2)], ["unmap 5", "unmap 33"]),
        ([(5, 1)], [(0, 2), (5, 1), (60, 4)], ["map 0", "map 60"]),
        ([(0, 1), (15, 1), (32, 1), (63, 1)], [(7, 1)], ["unmap 0", "unmap 15", "unmap 32", "unmap 63", "map 7"]),
    ],
)
def test_it_has_what_it_is_known_to_have(
    has: list[tuple[int, int]], known: list[tuple[int, int]], done: list[str]
) -> None:
    space = Space(*((page * PAGE, pages * PAGE) for page, pages in has))
    wanted = [mapping(page, pages) for page, pages in known]
    assert settle(space, reversed(wanted), space.unmap) == []
    assert space.done == done
    assert space.mapped == {one.iova: one.size for one in wanted}


def test_what_cannot_be_done_is_said() -> None:
    space = Space()

    def refuse(iova: int, size: int) -> None:
        raise OperationFailed("VFIO_IOMMU_UNMAP_DMA", space.name, errno="EIO")

    first, second = settle(space, [], refuse)
    assert first == second
    assert "container:0: what else is mapped could not be unmapped" in first
