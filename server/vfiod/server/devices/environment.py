"""What a device needs of the machine around it: events out, fds to watch, timers, a lane of its own.

The machine gives one to each device. Everything here is called on the loop's thread, except where it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from vfiod.protocol.catalogue import EventData
from vfiod.server.lanes import Lane

__all__ = ["Environment", "Timer"]


T = TypeVar("T")


class Timer(Protocol):
    """What :meth:`Environment.after` gives back (``asyncio.TimerHandle`` is one)."""

    def cancel(self) -> None:
        """Never call back. Later calls do nothing."""


class Environment(Protocol):
    """The world of one device."""

    @property
    def lane(self) -> Lane:
        """The device's own lane: its ordered commands, one at a time.

        The device uses ``busy``, ``waiting``, ``current``, ``run(what, function)`` (a worker's thread, in turn) and
        ``turn(what)`` (an asynchronous context manager: the holder's turn, on the loop, until it leaves).
        """

    def emit(self, event: EventData) -> None:
        """Send an event. Never raises, never waits; rate limits are its business."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back on the loop whenever ``fd`` is readable (level triggered). One callback per fd."""

    def unwatch(self, fd: int) -> None:
        """Stop watching. Call it before the fd is closed; an fd that is not watched is passed over."""

    def after(self, milliseconds: int, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many milliseconds of monotonic time."""

    def on_loop(self, function: Callable[[], T]) -> T:
        """Do something on the loop's thread, and wait until it is done; what it returns or raises comes back."""

    def now(self) -> float:
        """Monotonic time, in seconds (``loop.time``)."""
