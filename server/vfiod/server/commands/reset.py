"""Family "reset"."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.reset import DeviceReset, HotReset, HotResetReport, QueryHotReset, SystemReset
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.fd import FdKind, FileDescriptor, close_all
from vfiod.server.commands.call import Call, Handler

__all__ = ["HANDLERS"]


async def device_reset(call: Call, arguments: DeviceReset) -> Empty:
    """Reset one device."""
    await call.device_to_change(arguments.id).reset()
    return Empty()


def query_hot_reset(call: Call, arguments: QueryHotReset) -> Awaitable[HotResetReport]:
    """Say what a hot reset would touch. Also out of band: it waits for no lane."""
    return call.machine.resets.query(arguments.id)


def hot_reset(call: Call, arguments: HotReset) -> Awaitable[HotResetReport]:
    """Reset a bus or slot."""
    call.device_to_change(arguments.id)  # whose device it would touch besides is known when it is judged
    lent: list[FileDescriptor] = []
    try:
        for position, name in enumerate(() if arguments.group_fds is UNSET else arguments.group_fds):
            lent.append(call.fd(f"group-fds[{position}]", name, FdKind.VFIO_GROUP))
        return call.machine.resets.hot_reset(arguments.id, lent, force=arguments.force)
    except BaseException:
        close_all(lent)
        raise


async def system_reset(call: Call, arguments: SystemReset) -> Empty:
    """Reset every device that can be reset; the rest of them also when one fails."""
    await call.machine.resets.system_reset(force=arguments.force)
    return Empty()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    DeviceReset: device_reset,
    QueryHotReset: query_hot_reset,
    HotReset: hot_reset,
    SystemReset: system_reset,
}
