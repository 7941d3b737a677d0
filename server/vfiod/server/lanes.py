"""Lanes: blocking work off the event loop, one thing at a time and in order of arrival.

A lane is an order, not a thread: every lane borrows a thread of one shared pool while it works. Each device has a
lane, and the machine has one named ``topology`` for all that changes which devices, memory and objects there are.

All methods are called on the event loop's thread; only the functions given to :meth:`Lane.run` and
:meth:`Turn.run` run elsewhere.

When the caller of :meth:`Lane.run` is cancelled before its turn, it leaves the queue and its function never runs.
Cancelled during its turn, the function runs to its end (a system call cannot be taken back) and only then the
next one begins; what it returns is dropped. Whoever must see the result regardless owns a task of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import TypeVar

from vfiod.protocol.errors import CommandError

__all__ = ["Lane", "Turn"]

T = TypeVar("T")


class Turn:
    """One stay at the head of a lane: ``async with lane.turn("what") as turn``.

    While it lasts nothing else of the lane runs. Inside, :meth:`run` does blocking work in a thread, and the rest
    happens on the loop; so a step on the loop may follow one in a thread with nothing in between.
    """

    __slots__ = ("_admitted", "_lane", "_working", "what")

    def __init__(self, lane: Lane, what: str) -> None:
        self.what = what
        self._lane = lane
        self._admitted: asyncio.Future[None] | None = None
        self._working: asyncio.Future[object] | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in a thread; what it returns or raises comes back. Only inside the turn."""
        working = asyncio.get_running_loop().run_in_executor(self._lane.executor, function)
        # One name, two types: the lane only asks whether it is done.
        self._working = working  # type: ignore[assignment]
        # Shielded: cancelling the caller must not mark as done what a thread still does.
        return await asyncio.shield(working)

    async def __aenter__(self) -> Turn:
        admitted = self._admitted = asyncio.get_running_loop().create_future()
        self._lane._enter(self, admitted)
        try:
            await admitted
        except asyncio.CancelledError:
            self._lane._abandon(self, admitted)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        working = self._working
        if working is None or working.done():
            self._lane._leave(self)
            return
        working.add_done_callback(self._finish_late)

    def _finish_late(self, working: asyncio.Future[object]) -> None:
        if not working.cancelled():
            working.exception()  # nobody is left to hear it
        self._lane._leave(self)


class Lane:
    """Runs blocking functions one after another.

    Args:
        name: of the lane, for error texts (``topology``, ``device n0``).
        executor: the machine's pool of threads.

    Attributes:
        executor: as given.
        on_idle: called on the loop each time the last one has finished; for whoever waits for a device's end.

    """

    __slots__ = ("_current", "_idle_waiters", "_queue", "_refusal", "executor", "name", "on_idle")

    def __init__(self, name: str, executor: Executor) -> None:
        self.name = name
        self.executor = executor
        self.on_idle: Callable[[], None] | None = None
        self._current: Turn | None = None
        self._queue: deque[tuple[Turn, asyncio.Future[None]]] = deque()
        self._refusal: CommandError | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []

    @property
    def busy(self) -> bool:
        """Whether something runs now."""
        return self._current is not None

    @property
    def free(self) -> bool:
        """Whether nothing runs now, and it is not closed: a fast command may run at once on the loop."""
        return self._current is None and self._refusal is None

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @property
    def current(self) -> str | None:
        """What runs now, for a person; None when idle."""
        return self._current.what if self._current is not None else None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called: no more turns."""
        return self._refusal is not None

    def pending(self) -> tuple[str, ...]:
        """What runs and what waits, in order, for a person."""
        running = (self._current.what,) if self._current is not None else ()
        return running + tuple(turn.what for turn, _ in self._queue)

    def turn(self, what: str) -> Turn:
        """A turn at the head of the lane, to be entered with ``async with``. Raises what :meth:`close` was given."""
        return Turn(self, what)

    async def run(self, what: str, function: Callable[[], T]) -> T:
        """Run a function in a thread when its turn comes.

        Args:
            what: for a person, and for who asks what holds a device: ``device-reset``.
            function: called in a thread; it may block.

        Returns what the function returns, or raises what it raises. Raises the lane's refusal once closed.

        """
        async with Turn(self, what) as turn:
            return await turn.run(function)

    async def idle(self) -> None:
        """Wait until nothing runs and nothing waits."""
        while self._current is not None:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def close(self, refusal: CommandError) -> None:
        """Admit nobody any more: who waits, and who comes later, gets ``refusal``. What runs, runs to its end."""
        self._refusal = refusal
        queue, self._queue = self._queue, deque()
        for _, admitted in queue:
            if not admitted.done():
                admitted.set_exception(_copy(refusal))

    # --- turns --------------------------------------------------------------------------------

    def _enter(self, turn: Turn, admitted: asyncio.Future[None]) -> None:
        if self._refusal is not None:
            raise _copy(self._refusal)
        if self._current is None:
            self._current = turn
            admitted.set_result(None)
        else:
            self._queue.append((turn, admitted))

    def _abandon(self, turn: Turn, admitted: asyncio.Future[None]) -> None:
        """Its caller was cancelled before it could begin."""
        if self._current is turn:
            self._leave(turn)
            return
        if admitted.done() and not admitted.cancelled():
            admitted.exception()  # the lane was closed in the same moment; nobody is left to hear it
        self._queue = deque(entry for entry in self._queue if entry[0] is not turn)

    def _leave(self, turn: Turn) -> None:
        if self._current is not turn:
            return
        self._current = None
        while self._queue:
            following, admitted = self._queue.popleft()
            if not admitted.done():
                self._current = following
                admitted.set_result(None)
                return
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self.on_idle is not None:
            self.on_idle()


def _copy(refusal: CommandError) -> CommandError:
    """A fresh exception: one object raised in several places would gather all their tracebacks."""
    fresh = type(refusal).__new__(type(refusal))
    fresh.args = refusal.args
    fresh.__dict__.update(refusal.__dict__)
    return fresh
