"""Blocking work in a thread of its own, in nobody's order: for what must not wait behind the work it is to stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["aside"]

T = TypeVar("T")


async def aside(what: str, function: Callable[[], T]) -> T:
    """Run a function in a new thread; what it returns or raises comes back. On the loop.

    Neither a lane nor the shared pool: all threads of that may be held by what this is to end. Cancelled, the function
    runs to its end all the same, and nobody hears of it.

    Args:
        what: the thread's name, for a person.
        function: it may block; how many there are at once is the caller's to limit.

    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not done.done():
            outcome()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            raised = error
            outcome: Callable[[], None] = lambda: done.set_exception(raised)  # noqa: E731
        else:
            outcome = lambda: done.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name=f"vfiod-{what}", daemon=True).start()
    return await done
