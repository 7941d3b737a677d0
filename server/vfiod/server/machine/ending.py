"""How a machine ends: step by step, each within the time there is, and nothing that fails stops the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

__all__ = ["Ending"]

T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

GRACE_S: Final = 0.2
"""Seconds one step may take although the time for all of them is over: closing is quick, or stuck."""


class Ending:
    """The account of one end.

    Args:
        loop: the machine's event loop.
        timeout_s: seconds for everything together.

    Attributes:
        problems: what went wrong, in sentences.
        stuck: whether something did not end in time: a thread is still in the kernel.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._loop = loop
        self._deadline = loop.time() + timeout_s
        self.problems: list[str] = []
        self.stuck = False

    async def wait(self, *work: Awaitable[Any]) -> bool:
        """Wait for all of it, as long as there is time; what failed is no business of this. True when all is done."""
        futures = [asyncio.ensure_future(one) for one in work]
        for future in futures:
            future.add_done_callback(_heard)
        if futures:
            await asyncio.wait(futures, timeout=max(GRACE_S, self._deadline - self._loop.time()))
        if all(future.done() for future in futures):
            return True
        self.stuck = True
        return False

    async def step(self, what: str, work: Awaitable[T]) -> T | None:
        """Do one step; None when it failed or does not end, which is noted.

        Args:
            what: in the words of a sentence: ``Closing device n0``.
            work: the step.

        """
        future = asyncio.ensure_future(work)
        if not await self.wait(future):
            self.note(f"{what} does not end; it is left to the kernel")
            return None
        if future.cancelled():
            self.note(f"{what} was cancelled")
            return None
        failure = future.exception()
        if failure is not None:
            _log.error("%s failed", what, exc_info=failure)
            self.note(f"{what} failed: {failure}")
            return None
        return future.result()

    def note(self, problem: str) -> None:
        """Something went wrong: a whole sentence."""
        _log.error("%s", problem)
        self.problems.append(problem)


def _heard(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
