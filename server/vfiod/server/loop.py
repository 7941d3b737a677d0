"""asyncio's own event loop, with a shorter way from epoll to the callbacks of ``add_reader``.

asyncio makes two trips of every event: from the selector's list to a queue of handles, and from there to the callback.
Of a small command that is a third of the whole. :class:`Poller` is the selector that
:class:`asyncio.SelectorEventLoop` is made with (its documented argument): it calls back what epoll reports while it is
at it, and tells the loop of nothing; it goes back to the loop as soon as the loop has something to do: a callback that
is ready (``call_soon``, a task's step, a future's), a timer, the end.

Only a loop that has nothing else to do goes that way: what is ready comes before what epoll reports, as ever. What
differs from the stock loop, and is nowhere promised: what a reader's callback gives to ``call_soon`` runs in the same
turn and not in the next. What stays: callbacks run in their context, what they raise goes to the loop's exception
handler, one that was removed is called no more, and every event of a poll is served before the next poll.

In debug mode the loop gets its events as from any selector, so that it can time the callbacks. When a Python to come
has not the few private names that this leans on (:func:`_fits`), all of it is the stock loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import selectors
import time
from typing import Any, Final

__all__ = ["Poller", "new_loop"]

_log: Final = logging.getLogger(__name__)

WATCH_AGAIN_SECONDS: Final = 0.1
"""When an fd that epoll had no room for is tried again."""

EVENTS_PER_POLL: Final = 64
"""Most events taken from epoll at once. Python reserves room for as many each time; what is left comes next."""

_NOT_READ: Final = ~select.EPOLLIN
_NOT_WRITE: Final = ~select.EPOLLOUT


class Poller(selectors.EpollSelector):
    """A selector that calls back by itself, as long as the loop has nothing else to do.

    Attributes:
        loop: the loop it belongs to; None: it is a plain selector.

    """

    def __init__(self) -> None:
        super().__init__()
        self.loop: Any = None
        self._handles: Final[dict[int, tuple[Any, Any]]] = {}
        """The loop's handles of each fd: the reader's and the writer's."""
        self._unwatched: Final[set[int]] = set()
        """fds that epoll has had no room for yet."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As any selector does; but no room in epoll (ENOMEM, ENOSPC) is waited for.

        Whoever reads here could do nothing but give up what it reads for: a session, an interrupt, a whole device.
        """
        try:
            key = super().register(fileobj, events, data)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC) or self.loop is None:
                raise
            base: Any = selectors
            key = base._BaseSelectorImpl.register(self, fileobj, events, data)
            if not self._unwatched:
                _log.error("epoll has no room for another fd (fs.epoll.max_user_watches), it is tried again: %s", error)
                self.loop.call_later(WATCH_AGAIN_SECONDS, self._watch_again)
            self._unwatched.add(key.fd)
        self._handles[key.fd] = data
        return key

    def _watch_again(self) -> None:
        selector: Any = self
        for fd in tuple(self._unwatched):
            events = self.get_map()[fd].events
            try:
                selector._selector.register(
                    fd,
                    bool(events & selectors.EVENT_READ) * select.EPOLLIN
                    | bool(events & selectors.EVENT_WRITE) * select.EPOLLOUT,
                )
            except OSError:
                continue
            self._unwatched.discard(fd)
        if self._unwatched and self.loop is not None:
            self.loop.call_later(WATCH_AGAIN_SECONDS, self._watch_again)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As any selector does."""
        if self._unwatched and self.get_key(fileobj).fd in self._unwatched:
            self.unregister(fileobj)
            return self.register(fileobj, events, data)
        key = super().modify(fileobj, events, data)
        self._handles[key.fd] = data
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As any selector does."""
        key = super().unregister(fileobj)
        self._unwatched.discard(key.fd)
        self._handles.pop(key.fd, None)
        return key

    def close(self) -> None:
        """As any selector does."""
        self.loop = None
        self._handles.clear()
        self._unwatched.clear()
        super().close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events and call back what waits for them, until the loop has something to do.

        Args:
            timeout: seconds after which the loop wants to go on; None: it waits for events alone.

        Returns what the loop shall do itself: everything in debug mode, else nothing.

        """
        loop = self.loop
        if timeout == 0 or loop is None or loop._debug:
            return super().select(timeout)
        selector: Any = self
        poll, handles, ready, scheduled = selector._selector.poll, self._handles, loop._ready, loop._scheduled
        first = scheduled[0] if scheduled else None
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            events = poll(timeout, EVENTS_PER_POLL)
            if len(events) == 1:
                fd, event = events[0]
                reader, writer = handles.get(fd, _NOBODY)
                if event & _NOT_WRITE and reader is not None:
                    reader._run()
                if event & _NOT_READ and writer is not None and not writer._cancelled:
                    writer._run()
            elif events:
                # Who is called is settled before anybody is called: a callback may close an fd and open another by its
                # number, and the event was not for that.
                called = []
                for fd, event in events:
                    reader, writer = handles.get(fd, _NOBODY)
                    if event & _NOT_WRITE and reader is not None:
                        called.append(reader)
                    if event & _NOT_READ and writer is not None:
                        called.append(writer)
                for handle in called:
                    if not handle._cancelled:
                        handle._run()
            if ready or loop._stopping or loop._debug:
                return []
            if scheduled:
                if scheduled[0] is not first or first._cancelled or until is None:
                    return []
                timeout = until - time.monotonic()
                if timeout <= 0:
                    return []
            elif until is not None:
                return []  # the timer is gone, or there never was one: the loop says how long to wait


_NOBODY: Final = (None, None)


def _fits(loop: asyncio.SelectorEventLoop, poller: Poller) -> bool:
    """Whether this Python's loop and selector are made as :class:`Poller` needs them."""
    try:
        handle: Any = loop.call_soon(_nothing)
        handle.cancel()
        inside: Any = loop
        selector: Any = poller
        inside._ready.remove(handle)
        return (
            bool(handle._cancelled)
            and callable(handle._run)
            and isinstance(inside._scheduled, list)
            and inside._stopping is False
            and inside._debug is loop.get_debug()
            and isinstance(selector._selector, select.epoll)
            and isinstance(selector, selectors._BaseSelectorImpl)
            and bool(poller._handles)  # the loop's own socket pair
            and all(_is_pair(data) for data in poller._handles.values())
        )
    except (AttributeError, ValueError):
        return False


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], asyncio.Handle) and data[1] is None


def _nothing() -> None:
    """Do nothing."""


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop for :class:`asyncio.Runner`: short ways where this Python allows it, else the stock one's."""
    poller = Poller()
    loop = asyncio.SelectorEventLoop(poller)
    if _fits(loop, poller):
        poller.loop = loop
    return loop
