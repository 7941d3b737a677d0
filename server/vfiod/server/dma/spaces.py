"""One mapping and one address space: what the space refuses, and mapping and unmapping with errors that say where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.server import trace
from vfiod.server.dma.ranges import END_OF_SPACE, words

if TYPE_CHECKING:  # later: see Machine
    from vfiod.server.backends.base import AddressSpace, Mapping

__all__ = ["check_pages", "check_range", "check_reach", "failed", "map_into", "unmap_from"]


def check_range(iova: int, size: int) -> None:
    """Refuse what goes beyond the space. InvalidArgument."""
    if iova + size > END_OF_SPACE:
        raise InvalidArgument(f"Parameter 'size': IOVA {iova:#x} plus size {size:#x} is beyond 64 bits")


def check_pages(space: AddressSpace, mapping: Mapping) -> None:
    """Refuse what is not made of the space's pages. InvalidArgument."""
    if (mapping.iova | mapping.size | mapping.offset) % space.page_size:
        raise InvalidArgument(
            f"The mapping {words(mapping.iova, mapping.size)} is not made of pages of {space.page_size:#x} bytes,"
            f" the smallest of {space.name}; dma-unmap it, or map it anew in such pages"
        )


def check_reach(space: AddressSpace, mapping: Mapping) -> None:
    """Refuse what the IOMMU cannot translate (VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) before any ioctl."""
    ranges = space.iova_ranges()
    last = mapping.iova + mapping.size - 1
    if not ranges or any(low <= mapping.iova and last <= high for low, high in ranges):
        return
    usable = ", ".join(f"{low:#x} to {high:#x}" for low, high in ranges)
    raise InvalidArgument(
        f"Parameter 'iova': {space.name} cannot translate {words(mapping.iova, mapping.size)}; it can do {usable}"
    )


def map_into(space: AddressSpace, mapping: Mapping) -> None:
    """Map it, and trace that. CommandError."""
    try:
        space.map(mapping)
    except OSError as error:
        raise failed("map", space, mapping, error) from error
    if trace.mapping_made.on:
        trace.mapping_made(space=space.name, iova=hex(mapping.iova), size=mapping.size, readonly=mapping.readonly)


def unmap_from(space: AddressSpace, mapping: Mapping) -> None:
    """Take it back, and trace that. CommandError."""
    try:
        space.unmap(mapping.iova, mapping.size)
    except OSError as error:
        raise failed("unmap", space, mapping, error) from error
    if trace.mapping_removed.on:
        trace.mapping_removed(space=space.name, iova=hex(mapping.iova), size=mapping.size)


def failed(operation: str, space: AddressSpace, mapping: Mapping, error: OSError) -> OperationFailed:
    """What the kernel said, as the error of a command that says where."""
    what = f"{space.name}, IOVA {words(mapping.iova, mapping.size)}"
    return OperationFailed(operation, what, errno=error.errno or "EIO")
