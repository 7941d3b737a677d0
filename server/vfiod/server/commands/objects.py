"""Family "objects": ``object-add``, ``object-del``, ``query-objects``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.objects import ObjectAdd, ObjectDel, ObjectInfo, ObjectType, QueryObjects
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind
from vfiod.server.commands.call import Call, Handler
from vfiod.server.dma.files import MEMORY_KINDS

__all__ = ["HANDLERS"]


def object_add(call: Call, arguments: ObjectAdd) -> Awaitable[Empty]:
    """Make an object of a passed fd."""
    a = arguments
    if a.qom_type is ObjectType.MEMORY_BACKEND_FD:
        fd = call.fd("fd", a.fd, *MEMORY_KINDS, write=not a.readonly)
        size = None if a.size is UNSET else a.size
        return _done(call.machine.add_memory(a.id, fd, size=size, readonly=a.readonly))
    if a.size is not UNSET or a.readonly:
        unfit = "size" if a.size is not UNSET else "readonly"
        raise InvalidArgument(f"Property '{a.qom_type}.{unfit}' not found")
    if a.qom_type is ObjectType.IOMMUFD:
        return _done(call.machine.add_iommufd(a.id, call.fd("fd", a.fd, FdKind.IOMMUFD)))
    return _done(call.machine.add_container(a.id, call.fd("fd", a.fd, FdKind.VFIO_CONTAINER)))


def object_del(call: Call, arguments: ObjectDel) -> Awaitable[Empty]:
    """Remove an object that nothing refers to."""
    return _done(call.machine.remove_object(arguments.id))


async def _done(work: Awaitable[None]) -> Empty:
    await work
    return Empty()


def query_objects(call: Call, arguments: QueryObjects) -> list[ObjectInfo]:
    """List objects."""
    return call.machine.objects.infos()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    ObjectAdd: object_add,
    ObjectDel: object_del,
    QueryObjects: query_objects,
}
