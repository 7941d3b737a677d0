"""Family "reset"."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.reset import DeviceReset, SystemReset
from vfiod.protocol.errors import CommandError
from vfiod.server.commands.call import Call, Handler

__all__ = ["HANDLERS"]


async def device_reset(call: Call, arguments: DeviceReset) -> Empty:
    """Reset one device."""
    await call.machine.device(arguments.id).reset()
    return Empty()


async def system_reset(call: Call, arguments: SystemReset) -> Empty:
    """Reset every device that can be reset; the rest of them also when one fails."""
    async with call.machine.topology.turn("system_reset"):
        devices = [device for device in call.machine.devices.all() if device.can_reset]
        results = await asyncio.gather(*(device.reset() for device in devices), return_exceptions=True)
    failed: list[str] = []
    for device, result in zip(devices, results, strict=True):
        if isinstance(result, CommandError):
            failed.append(f"device '{device.name}': {result}")
        elif isinstance(result, BaseException):
            raise result
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(devices)} devices could not be reset, the others were: " + "; ".join(failed)
        )
    return Empty()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    DeviceReset: device_reset,
    SystemReset: system_reset,
}
