"""Calls into somebody else's program: what comes out is an error that names it, and what hangs is given up.

A parent may raise anything, and may never return. A :class:`Calls` stands before each parent and each device. It makes
a call in a thread of its own and waits for a limited time; then the caller gets ``ETIMEDOUT``, which says in what the
parent hangs, and whoever asks for more gets ``EBUSY`` at once, until that call comes back after all. A result that
comes too late is undone by what the caller gave as ``late``. The threads are daemons: none of them keeps vfiod alive.

A device that says of itself that it never waits (:attr:`~vfiod.server.mdev.parent.MediatedDevice.quick`) is called
directly: no thread, no limit.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final, Generic, ParamSpec, TypeVar

from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.protocol.limits import MDEV_CALL_MS, MDEV_LOOP_CALL_MS

__all__ = ["CallThreads", "Calls", "guarded", "published", "quietly"]

_log: Final = logging.getLogger(__name__)

IDLE_THREADS: Final = 4
"""Threads kept for the next call; a burst may use more, which end after it."""

P = ParamSpec("P")
T = TypeVar("T")


def guarded(operation: str, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call into a parent; whatever comes out of it is a CommandError that names operation and object.

    Args:
        operation: the callback's name, or the kernel's name of the operation.
        what: parent or device.
        function: what is called.
        args: its arguments.
        kwargs: its arguments by name.

    """
    try:
        return function(*args, **kwargs)
    except CommandError:
        raise
    except OSError as error:
        number = error.errno if error.errno is not None else errno.EIO
        raise OperationFailed(operation, what, errno=number, advice=error.strerror or str(error)) from error
    except (Exception, SystemExit) as error:
        # The parent is somebody else's program: its defects are reported, and never ours to die of.
        _log.exception("%s of %s raised %s", operation, what, type(error).__name__)
        advice = f"it raised {type(error).__name__}, which is a defect of the parent; the traceback is in the log"
        raise OperationFailed(operation, what, errno=errno.EIO, advice=advice) from error


def quietly(operation: str, what: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call into a parent whose opinion does not count: what comes out is logged."""
    try:
        guarded(operation, what, function, *args, **kwargs)
    except CommandError as error:
        _log.warning("%s", error)


def published(what: str, attributes: Callable[[], Mapping[str, str]]) -> dict[str, str]:
    """What a parent or device publishes, as text. A failing callback publishes its failure: queries never fail."""
    try:
        told = guarded("attributes", what, attributes)
        return guarded("attributes", what, lambda: {str(key): str(value) for key, value in told.items()})
    except CommandError as error:
        return {"error": str(error)}


class _Job(Generic[T]):
    """One call. ``done`` is locked until it has returned."""

    __slots__ = ("abandoned", "begun", "done", "error", "function", "late", "operation", "result")

    def __init__(self, operation: str, function: Callable[[], T], late: Callable[[T], object] | None) -> None:
        self.operation = operation
        self.function = function
        self.late = late
        self.begun = monotonic()
        self.done = threading.Lock()
        self.done.acquire()
        self.abandoned = False
        self.result: T | None = None
        self.error: BaseException | None = None


class CallThreads:
    """The threads for calls: as many as calls are under way, a few of them kept. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: deque[SimpleQueue[Callable[[], None] | None]] = deque()
        self._closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """Run this in a thread at once; it must not raise."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name="vfiod-mdev", daemon=True).start()
        inbox.put(work)

    def close(self) -> None:
        """Let the idle threads end; the others end with their call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, deque()
        for inbox in idle:
            inbox.put(None)

    def _serve(self, inbox: SimpleQueue[Callable[[], None] | None]) -> None:
        while (work := inbox.get()) is not None:
            work()
            with self._lock:
                if self._closed or len(self._idle) >= IDLE_THREADS:
                    return
                self._idle.append(inbox)


class Calls:
    """Calls into one parent, or into one device.

    Args:
        what: parent or device, for messages.
        threads: where they run; None: directly, because it promised never to wait.
        loop_thread: the loop's thread, which must not be held up for long.
        limit_s: seconds after which a call is given up.
        loop_limit_s: the same for a call that is made on the loop's thread.

    """

    __slots__ = ("_hanging", "_limit", "_lock", "_loop_limit", "_loop_thread", "_owed", "_threads", "what")

    def __init__(
        self,
        what: str,
        threads: CallThreads | None,
        loop_thread: int,
        *,
        limit_s: float = MDEV_CALL_MS / 1000,
        loop_limit_s: float = MDEV_LOOP_CALL_MS / 1000,
    ) -> None:
        self.what = what
        self._threads = threads
        self._loop_thread = loop_thread
        self._limit = limit_s
        self._loop_limit = min(limit_s, loop_limit_s)
        self._lock = threading.Lock()
        self._hanging: list[_Job[Any]] = []
        self._owed: list[tuple[str, Callable[[], object]]] = []

    @property
    def waits(self) -> bool:
        """Whether a call may take long: then it belongs into a thread."""
        return self._threads is not None

    @property
    def hangs(self) -> str | None:
        """In what it hangs, in words; None: in nothing."""
        with self._lock:
            return self._words()

    def run(
        self,
        operation: str,
        what: str,
        function: Callable[[], T],
        *,
        late: Callable[[T], object] | None = None,
        limit_s: float | None = None,
    ) -> T:
        """Make a call. Blocks for at most the limit; from any thread.

        Args:
            operation: the callback's name, or the kernel's name of the operation.
            what: parent, device or part of one, for the error.
            function: what is called, without arguments.
            late: takes a result that comes after the call was given up, and undoes it.
            limit_s: seconds; default: the object's.

        Raises CommandError: what it raised (:func:`guarded`); OperationFailed with ETIMEDOUT: it has not returned;
        with EBUSY: an earlier call has not.

        """
        if self._threads is None:
            return guarded(operation, what, function)
        with self._lock:
            hangs = self._words()
        if hangs is not None:
            raise OperationFailed(operation, what, errno="EBUSY", advice=f"{hangs}; nothing is asked of it until then")
        job = _Job(operation, function, late)
        self._threads.submit(lambda: self._work(job, what))
        on_loop = threading.get_ident() == self._loop_thread
        limit = limit_s if limit_s is not None else self._loop_limit if on_loop else self._limit
        if not job.done.acquire(timeout=limit) and self._abandon(job):
            advice = f"it has not returned after {limit:g} s; nothing is asked of {self.what} until it does"
            _log.error("%s of %s has not returned after %g s", operation, what, limit)
            raise OperationFailed(operation, what, errno="ETIMEDOUT", advice=advice)
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]  # it was set: there was no error

    def quietly(self, operation: str, what: str, function: Callable[[], object]) -> None:
        """Make a call whose outcome does not count: it is logged. While it hangs, the call is made when it is free."""
        with self._lock:
            if self._hanging:
                self._owed.append((operation, function))
                return
        try:
            self.run(operation, what, function)
        except CommandError as error:
            _log.warning("%s", error)

    # --- inside ---------------------------------------------------------------------------------------

    def _words(self) -> str | None:
        if not self._hanging:
            return None
        job = self._hanging[0]
        return f"its '{job.operation}' has not returned for {monotonic() - job.begun:.0f} s"

    def _abandon(self, job: _Job[Any]) -> bool:
        """Give a call up; False when it returned in this very moment."""
        with self._lock:
            if job.done.acquire(blocking=False):
                return False
            job.abandoned = True
            self._hanging.append(job)
            return True

    def _work(self, job: _Job[Any], what: str) -> None:
        try:
            job.result = guarded(job.operation, what, job.function)
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
            job.error = error
        with self._lock:
            job.done.release()
            if not job.abandoned:
                return
        self._came_back(job)

    def _came_back(self, job: _Job[Any]) -> None:
        """A call that was given up has returned. What it did is undone, and what waited for that is done."""
        _log.warning(
            "'%s' of %s has returned after all, after %.1f s", job.operation, self.what, monotonic() - job.begun
        )
        if job.error is None and job.late is not None:
            late = job.late
            quietly(f"{job.operation}, undone", self.what, lambda: late(job.result))
        while True:
            with self._lock:
                # While something is owed it still counts as hanging: nothing must come in between.
                if len(self._hanging) > 1 or not self._owed:
                    self._hanging.remove(job)
                    return
                operation, function = self._owed.pop(0)
            quietly(operation, self.what, function)
