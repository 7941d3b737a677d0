"""Plays a scenario in a world of its own, and looks that nothing of it is left afterwards."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar


class World(Protocol):
    """What scenarios are played in."""

    def end(self) -> Awaitable[object]:
        """Everything of it goes."""


W = TypeVar("W", bound=World)


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def play_in(make: Callable[[], W], scenario: Callable[[W], Awaitable[None]]) -> None:
    """Make a world on a loop of its own, play, end it. No fd may stay open, no task end unheard."""

    async def main() -> None:
        world = make()
        troubles: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        try:
            await asyncio.wait_for(scenario(world), 60)
        finally:
            await world.end()
        gc.collect()
        assert troubles == [], "the loop had to complain"

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before, "file descriptors are left open"
