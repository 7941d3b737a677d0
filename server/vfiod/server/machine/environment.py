"""The event loop, as device models see it (:class:`vfiod.server.devices.environment.Environment`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from vfiod.protocol.catalogue import EventData
from vfiod.server.devices.environment import Timer
from vfiod.server.events import EventHub
from vfiod.server.lanes import Lane
from vfiod.server.onloop import OnLoop

__all__ = ["AnyThreadEnvironment", "LoopEnvironment"]

T = TypeVar("T")


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

    def on_loop(self, function: Callable[[], T]) -> T:
        """Do it: this is the loop."""
        return function()


class AnyThreadEnvironment:
    """The same for a device whose every access may wait (``Backend.may_block``): its commands run in a worker.

    What they want of the loop is done on the loop, and they wait for it; events only keep their order.
    """

    __slots__ = ("_here", "_lane", "_on_loop", "emit", "now")

    def __init__(self, on_loop: OnLoop, hub: EventHub, lane: Lane) -> None:
        self._on_loop = on_loop
        self._here = LoopEnvironment(on_loop.loop, hub, lane)
        self._lane = lane
        self.now: Final[Callable[[], float]] = on_loop.loop.time

        def emit(event: EventData) -> None:
            if on_loop.here:
                hub.emit(event)
            else:
                on_loop.soon(lambda: hub.emit(event))

        self.emit: Final[Callable[[EventData], None]] = emit

    @property
    def lane(self) -> Lane:
        """The device's own lane."""
        return self._lane

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back on the loop whenever ``fd`` is readable."""
        self._on_loop.run(lambda: self._here.watch(fd, callback))

    def unwatch(self, fd: int) -> None:
        """Stop watching; an fd that is not watched is passed over."""
        self._on_loop.run(lambda: self._here.unwatch(fd))

    def after(self, milliseconds: int, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many milliseconds."""
        return self._on_loop.run(lambda: self._here.after(milliseconds, callback))

    def on_loop(self, function: Callable[[], T]) -> T:
        """Do it on the loop, and wait until it is done."""
        return self._on_loop.run(function)
