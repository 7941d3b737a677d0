"""The event loop, as device models see it (:class:`vfiod.server.devices.environment.Environment`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vfiod.protocol.catalogue import EventData
from vfiod.server.devices.environment import Timer
from vfiod.server.events import EventHub
from vfiod.server.lanes import Lane

__all__ = ["LoopEnvironment"]


class LoopEnvironment:
    """One device's world: the machine's events, the loop's readers and timers, a lane of the device's own.

    Args:
        loop: the machine's event loop.
        hub: the machine's events.
        lane: the device's lane.

    """

    __slots__ = ("_hub", "_lane", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, hub: EventHub, lane: Lane) -> None:
        self._loop = loop
        self._hub = hub
        self._lane = lane

    @property
    def lane(self) -> Lane:
        """The device's own lane."""
        return self._lane

    def emit(self, event: EventData) -> None:
        """Send an event."""
        self._hub.emit(event)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back on the loop whenever ``fd`` is readable."""
        self._loop.add_reader(fd, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching; an fd that is not watched is passed over."""
        self._loop.remove_reader(fd)

    def after(self, milliseconds: int, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many milliseconds."""
        return self._loop.call_later(milliseconds / 1000, callback)

    def now(self) -> float:
        """Monotonic time, in seconds."""
        return self._loop.time()
