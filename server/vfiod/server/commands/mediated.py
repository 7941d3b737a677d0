"""Family "mediated": devices made by a parent. The work is done by :class:`~vfiod.server.mdev.bus.MdevBus`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from vfiod.protocol.catalogue import Empty
from vfiod.protocol.catalogue.mediated import (
    MdevCreate,
    MdevCreateResult,
    MdevDestroy,
    MdevShutdown,
    MdevStart,
    MdevTypeInfo,
    QueryMdevTypes,
)
from vfiod.protocol.catalogue.words import UNSET
from vfiod.server.commands.call import Call, Handlers

__all__ = ["HANDLERS"]


def query_mdev_types(call: Call, arguments: QueryMdevTypes) -> list[MdevTypeInfo] | Awaitable[list[MdevTypeInfo]]:
    """Out of band it answers at once, with the parents that are known by then and what they last said."""
    del arguments
    bus = call.machine.mdevs
    return bus.types() if call.oob else bus.ask()


async def mdev_create(call: Call, arguments: MdevCreate) -> MdevCreateResult:
    """In the parent's own lane, not the machine's: a slow parent holds nobody else up."""
    uuid = arguments.uuid if arguments.uuid is not UNSET else None
    parameters = arguments.parameters if arguments.parameters is not UNSET else None
    return MdevCreateResult(uuid=await call.machine.mdevs.create(arguments.parent, arguments.type, uuid, parameters))


async def mdev_destroy(call: Call, arguments: MdevDestroy) -> Empty:
    """Refused while it is added."""
    await call.machine.mdevs.destroy(arguments.uuid)
    return Empty()


async def mdev_start(call: Call, arguments: MdevStart) -> Empty:
    """For this machine, unless another VM is named."""
    await call.machine.mdevs.start(arguments.uuid if arguments.uuid is not UNSET else call.machine.uuid)
    return Empty()


async def mdev_shutdown(call: Call, arguments: MdevShutdown) -> Empty:
    """For this machine, unless another VM is named."""
    await call.machine.mdevs.shutdown(arguments.uuid if arguments.uuid is not UNSET else call.machine.uuid)
    return Empty()


HANDLERS: Final[Handlers] = {
    QueryMdevTypes: query_mdev_types,
    MdevCreate: mdev_create,
    MdevDestroy: mdev_destroy,
    MdevStart: mdev_start,
    MdevShutdown: mdev_shutdown,
}
"""The family's handlers, by the declaration they execute."""
