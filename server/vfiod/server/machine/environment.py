"""The event loop, as device models see it (:class:`vfiod.server.devices.environment.Environment`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

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

    Attributes:
        emit: sends an event.
        now: monotonic time, in seconds.

    """

    __slots__ = ("_lane", "_loop", "emit", "now")

    def __init__(self, loop: asyncio.AbstractEventLoop, hub: EventHub, lane: Lane) -> None:
        self._loop = loop
        self._lane = lane
        # Not methods that call these: a relayed interrupt would pay for them each time.
        self.emit: Final[Callable[[EventData], None]] = hub.emit
        self.now: Final[Callable[[], float]] = loop.time

    @property
    def lane(self) -> Lane:
        """The device's own lane."""
        return self._lane

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back on the loop whenever ``fd`` is readable."""
        self._loop.add_reader(fd, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching; an fd that is not watched is passed over."""
        self._loop.remove_reader(fd)

    def after(self, milliseconds: int, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many milliseconds."""
        return self._loop.call_later(milliseconds / 1000, callback)
