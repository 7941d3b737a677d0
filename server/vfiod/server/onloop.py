"""The event loop, called from any thread: a worker has something done there, and waits until it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

__all__ = ["OnLoop"]

T = TypeVar("T")


class OnLoop:
    """One loop. Made on its thread.

    Args:
        loop: the loop.

    """

    __slots__ = ("_thread", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self._thread: Final = threading.get_ident()

    @property
    def here(self) -> bool:
        """Whether this is the loop's thread, on which nothing may wait."""
        return threading.get_ident() == self._thread

    def soon(self, function: Callable[[], object]) -> None:
        """Have it done there, in order of the calls; from any thread. Once the loop has ended it is not done."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function)

    def run(self, function: Callable[[], T]) -> T:
        """Have it done there, and wait: at once on the loop's own thread. What it returns or raises comes back.

        A worker may wait for the loop, because the loop never waits for a worker.
        """
        if self.here:
            return function()
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is raised again where it was asked for
                done.set_exception(error)

        self.loop.call_soon_threadsafe(work)
        return done.result()
