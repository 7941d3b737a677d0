"""Family "memory": ``dma-map``, ``dma-unmap``, ``query-dma``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

from vfiod.protocol.catalogue.declare import Arguments
from vfiod.protocol.catalogue.memory import (
    DmaMap,
    DmaMapResult,
    DmaUnmap,
    DmaUnmapResult,
    MappingInfo,
    QueryDma,
)
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.server.commands.call import Call, Handler
from vfiod.server.dma.files import MEMORY_KINDS

__all__ = ["HANDLERS"]


def dma_map(call: Call, arguments: DmaMap) -> Awaitable[DmaMapResult]:
    """Map a passed file, or a part of a memory backend."""
    a = arguments
    if a.fd is not UNSET and a.memory_backend is not UNSET:
        raise InvalidArgument("Parameters 'fd' and 'memory-backend' exclude each other: give one of them")
    call.check_claims()
    if a.fd is not UNSET:
        fd = call.fd("fd", a.fd, *MEMORY_KINDS, write=not a.readonly)
        return _mapped(call.machine.map_file(a.iova, a.size, fd, offset=a.offset, readonly=a.readonly))
    if a.memory_backend is not UNSET:
        return _mapped(call.machine.map_object(a.iova, a.size, a.memory_backend, offset=a.offset, readonly=a.readonly))
    raise InvalidArgument("Parameter 'fd' is missing: dma-map takes 'fd' or 'memory-backend'")


async def _mapped(work: Awaitable[tuple[int, int]]) -> DmaMapResult:
    iova, size = await work
    return DmaMapResult(iova=iova, size=size)


async def dma_unmap(call: Call, arguments: DmaUnmap) -> DmaUnmapResult:
    """Take a range back."""
    call.check_claims()
    return DmaUnmapResult(size=await call.machine.unmap(arguments.iova, arguments.size))


def query_dma(call: Call, arguments: QueryDma) -> list[MappingInfo]:
    """List mappings."""
    return call.machine.memory.infos()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    DmaMap: dma_map,
    DmaUnmap: dma_unmap,
    QueryDma: query_dma,
}
