"""Family "objects": what devices refer to by id."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, Family, Result, command
from vfiod.protocol.catalogue.words import UNSET, FdName, Id, Size, UnsetType


class ObjectType(enum.StrEnum):
    """The types ``object-add`` knows."""

    IOMMUFD = "iommufd"
    VFIO_CONTAINER = "vfio-container"
    MEMORY_BACKEND_FD = "memory-backend-fd"


@command("object-add", Family.OBJECTS, slow=True)
class ObjectAdd(Arguments[Empty]):
    """Make an object that other commands refer to by its id.

    ``iommufd`` holds a passed ``/dev/iommu`` fd, for devices added with ``fd`` and ``iommufd``. ``vfio-container``
    holds a passed container fd; ``memory-backend-fd`` holds a passed memfd, hugetlbfs
    file or shared file, from which ``dma-map`` takes guest memory.
    """

    qom_type: ObjectType
    id: Id
    fd: Annotated[FdName, Meta(description="The fd the object takes over.")]
    size: Annotated[
        Size | UnsetType, Meta(description="memory-backend-fd: bytes of the file to use; default: all of it.")
    ] = UNSET
    readonly: Annotated[bool, Meta(description="memory-backend-fd: the device may read this memory only.")] = False


@command("object-del", Family.OBJECTS, slow=True)
class ObjectDel(Arguments[Empty]):
    """Remove an object. Refused while something refers to it; the error says what."""

    id: Id


class ObjectInfo(Result, kw_only=True):
    """One object."""

    id: str
    qom_type: ObjectType
    size: Annotated[int | UnsetType, Meta(description="memory-backend-fd: bytes.")] = UNSET
    readonly: bool | UnsetType = UNSET
    used_by: Annotated[list[str], Meta(description="device:ID, group:N and mapping:IOVA that refer to it.")]


@command("query-objects", Family.OBJECTS, oob=True, mutates=False)
class QueryObjects(Arguments[list[ObjectInfo]]):
    """List the machine's objects."""
