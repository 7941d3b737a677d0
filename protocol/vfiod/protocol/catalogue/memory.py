"""Family "memory": what devices can reach by DMA."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, Address, FdName, Force, Id, Size, UnsetType

Offset = Annotated[int, Meta(ge=0, description="Where in the file, in bytes.")]


class DmaMapResult(Result):
    """What was really mapped: clipped to whole pages of the IOMMU."""

    iova: int
    size: int


@command("dma-map", Family.MEMORY, slow=True)
class DmaMap(Arguments[DmaMapResult]):
    """Let every device of the machine, now and later, reach a piece of memory.

    Takes ``fd`` (consumed) or ``memory-backend``. The range is clipped to whole pages of the IOMMU's smallest
    page size; IOVA and offset must agree within a page. Either every address space has it, or none.
    """

    iova: Address
    size: Size
    fd: FdName | UnsetType = UNSET
    memory_backend: Annotated[Id | UnsetType, Meta(description="The id of a memory-backend-fd object.")] = UNSET
    offset: Offset = 0
    readonly: Annotated[bool, Meta(description="Devices may read it, not write it.")] = False
    force: Force = False


class DmaUnmapResult(Result):
    """How much was unmapped."""

    size: Annotated[int, Meta(description="Bytes.")]


@command("dma-unmap", Family.MEMORY, slow=True)
class DmaUnmap(Arguments[DmaUnmapResult]):
    """Take a range back. Clips as ``dma-map`` does; refuses to split a mapping; may cover several."""

    iova: Address
    size: Size
    force: Force = False


class MappingInfo(Result, kw_only=True):
    """One mapping of guest memory."""

    iova: int
    size: int
    offset: int
    readonly: bool
    memory_backend: str | UnsetType = UNSET
    address_space: Annotated[
        str | UnsetType, Meta(description="Of a client's mapping: the only address space that has it.")
    ] = UNSET
    clients: Annotated[list[str] | UnsetType, Meta(description="Whose mapping it is, when clients made it.")] = UNSET


@command("query-dma", Family.MEMORY, oob=True, mutates=False)
class QueryDma(Arguments[list[MappingInfo]]):
    """List guest memory mappings: the machine's, which every address space has, then those of clients of exports."""


@event("DMA_UNMAPPED", Family.MEMORY)
class DmaUnmapped(EventData):
    """A mapping was removed by other means than ``dma-unmap``."""

    iova: int
    size: int
    reason: str
