"""The line of requests for one subchannel: one has its turn, the others wait in order of arrival. On the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from vfiod.protocol.catalogue.ccw import CcwResult
from vfiod.protocol.errors import Busy
from vfiod.protocol.limits import MAX_CCW_QUEUE

__all__ = ["Line", "Place"]

Place = asyncio.Future[CcwResult | None]
"""A place in the line. None: it has its turn; a result: it never gets one, and that is its answer."""


class Line:
    """Whose turn it is.

    Args:
        device: its name, for messages.
        on_empty: called when a turn is over and nobody waits.

    """

    def __init__(self, device: Callable[[], str], on_empty: Callable[[], None]) -> None:
        self._device = device
        self._on_empty = on_empty
        self._places: deque[Place] = deque()
        self._taken = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._places)

    def take(self) -> bool:
        """Take the turn, if nobody has it. Give it back with :meth:`next`."""
        if self._taken:
            return False
        self._taken = True
        return True

    def join(self, queue: bool) -> Place:
        """Wait, if that is wanted, and not too many do. Raises Busy."""
        if not queue:
            raise Busy(
                f"Device '{self._device()}' has a request pending, and a subchannel does one at a time: wait for its "
                "reply, ask with queue=true, or end it with ccw-clear"
            )
        if len(self._places) >= MAX_CCW_QUEUE:
            raise Busy(f"{MAX_CCW_QUEUE} requests wait for device '{self._device()}' already")
        place: Place = asyncio.get_running_loop().create_future()
        self._places.append(place)
        return place

    async def wait(self, place: Place) -> CcwResult | None:
        """Wait for what becomes of a place. Cancelled, it leaves the line; a turn that it just got goes on."""
        try:
            return await place
        except asyncio.CancelledError:
            if place in self._places:
                self._places.remove(place)
            elif place.done() and not place.cancelled() and place.exception() is None and place.result() is None:
                self.next()
            raise

    def next(self) -> None:
        """The turn is over: the next one has it."""
        self._taken = False
        while self._places:
            place = self._places.popleft()
            if not place.done():
                self._taken = True
                place.set_result(None)
                return
        self._on_empty()

    def answer(self, result: Callable[[], CcwResult]) -> None:
        """Answer all who wait: they will get no turn."""
        self._drop(lambda place: place.set_result(result()))

    def refuse(self, error: Callable[[], Exception]) -> None:
        """Refuse all who wait."""
        self._drop(lambda place: place.set_exception(error()))

    def _drop(self, end: Callable[[Place], None]) -> None:
        places, self._places = self._places, deque()
        for place in places:
            if not place.done():
                end(place)
