"""How a parent leaves the bus: its users are told first, and given a moment; then its devices go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.mediated import MdevRemoved
from vfiod.server.lanes import Turn
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.registered import Registered

__all__ = ["Leaving"]


class Leaving:
    """Takes the devices of a parent away, which is hidden already. On the loop's thread.

    Args:
        lock: under which it is decided who has a device.
        emit: sends an event.
        forget: called for each device that is gone.

    """

    def __init__(
        self,
        lock: threading.Lock,
        emit: Callable[[EventData], None],
        forget: Callable[[Registered, Instance], None],
    ) -> None:
        self._lock = lock
        self._emit = emit
        self._forget = forget

    async def take_away(self, record: Registered, reason: str, patience: float) -> None:
        """Ask its users for its devices, wait so many seconds, and take them, whatever anybody says."""
        async with record.lane.turn("unregister") as turn:
            for instance in record.devices.values():
                self._emit(MdevRemoved(uuid=instance.uuid, parent=record.name, reason=reason))
            await self._ask_users(record, turn, patience)
            for instance in tuple(record.devices.values()):
                with self._lock:
                    user = instance.user
                    if user is not None:
                        instance.gone = reason
                        instance.host.memory = None
                if user is not None:
                    self._emit(DeviceError(device=user, reason=f"{instance.what} is gone: {reason}"))
                    if instance.on_gone is not None:
                        instance.on_gone(reason)
                await turn.run(partial(record.unmake, instance))
                self._forget(record, instance)

    async def _ask_users(self, record: Registered, turn: Turn, patience: float) -> None:
        """Ask for the devices that are in use (REQ), and wait until they are free, for so many seconds."""
        loop = asyncio.get_running_loop()
        free: list[asyncio.Future[None]] = []
        for instance in record.devices.values():
            future = loop.create_future()
            with self._lock:
                if instance.user is None:
                    continue
                instance.released = partial(loop.call_soon_threadsafe, _settle, future)
            free.append(future)
            request = partial(instance.device.request, 0)
            await turn.run(partial(instance.calls.quietly, "request", instance.what, request))
        if free and patience > 0:
            await asyncio.wait(free, timeout=patience)
        for instance in record.devices.values():
            instance.released = None


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
