"""Events: numbered, rate limited as QEMU does, and handed to readers that may be slow.

Nothing here waits or opens anything: the clock and the timer are given. All of it runs on the event loop's thread.

* :class:`EventHub` numbers events from 1 and gives each to every subscriber, at once.
* :class:`Backlog` is one reader's account: how many events wait for it, and which were dropped.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from msgspec import Struct, field

from vfiod.protocol.catalogue import EventData, EventSpec, event_of
from vfiod.protocol.catalogue.monitor import EventsLost
from vfiod.protocol.limits import EVENT_RATE_PERIOD_MS, MAX_EVENT_BACKLOG

__all__ = ["Backlog", "Event", "EventHub", "Later", "Subscriber", "Timer"]

_log: Final = logging.getLogger(__name__)


class Timer(Protocol):
    """What a timer service gives back (``asyncio.TimerHandle`` is one)."""

    def cancel(self) -> None:
        """Never call back."""


Later = Callable[[float, Callable[[], None]], Timer]
"""Calls back once, after so many seconds (``loop.call_later``)."""


class Event(Struct, frozen=True, eq=False):
    """One event as it goes to its readers.

    Attributes:
        seq: its place among all events of the machine, from 1; for ``EVENTS_LOST`` the last number that was lost.
        spec: its declaration.
        data: its data.
        seconds: when it happened, since the epoch.
        microseconds: the rest of that.
        encoded: each dialect's bytes of it, kept so that many readers cost one encoding.

    """

    seq: int
    spec: EventSpec
    data: EventData
    seconds: int
    microseconds: int
    encoded: dict[str, bytes] = field(default_factory=dict)


Subscriber = Callable[[Event], None]
"""Takes one event. It must not raise, nor wait: what raises is logged, and the others still get theirs."""


class _Period(Struct):
    """One key within its period: the last event that must wait for the period's end, if any."""

    timer: Timer
    waiting: tuple[EventSpec, EventData, int] | None = None


_KeyOf = Callable[[EventData], Any]
"""Takes the members of an event's data that make the key of its rate limit."""


def _key_of(members: tuple[str, ...] | None) -> _KeyOf | None:
    if members is None:
        return None
    return operator.attrgetter(*members) if members else lambda _data: ()


class EventHub:
    """Numbers events and gives them to every subscriber.

    A rate limited event (``rate_key`` of its declaration) goes out at most once per period and key: the first at
    once; of those within the period only the last, at its end (QEMU ``monitor/monitor.c``). A number is given
    when an event goes out, so that readers see no gaps but those that ``EVENTS_LOST`` names.

    Args:
        later: the timer service, ``loop.call_later``.
        now_ns: the wall clock, in nanoseconds.

    """

    def __init__(self, later: Later, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._later = later
        self._now_ns = now_ns
        self._subscribers: dict[int, Subscriber] = {}
        self._next_key = 0
        self._periods: dict[tuple[str, Any], _Period] = {}
        self._sorts: dict[type[EventData], tuple[EventSpec, _KeyOf | None]] = {}
        self.seq = 0
        self.suppressed = 0

    # ``seq``: the last number given; 0 before the first event. ``suppressed``: rate limited ones that never went out.

    def emit(self, data: EventData) -> None:
        """Send an event to every subscriber, now or at the end of its period. Never raises, never waits."""
        # On the way of every relayed interrupt: what a sort of event is was found out once.
        spec, key_of = self._sorts.get(type(data)) or self._sort(data)
        now = self._now_ns()
        if key_of is None:
            self._send(spec, data, now)
            return
        key = (spec.name, key_of(data))
        period = self._periods.get(key)
        if period is None:
            self._open_period(key)
            self._send(spec, data, now)
        else:
            if period.waiting is not None:
                self.suppressed += 1
            period.waiting = (spec, data, now)

    def _sort(self, data: EventData) -> tuple[EventSpec, _KeyOf | None]:
        spec = event_of(data)
        sort = self._sorts[type(data)] = (spec, _key_of(spec.rate_key))
        return sort

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Give every later event to ``subscriber``; the function that is returned ends that."""
        key = self._next_key = self._next_key + 1
        self._subscribers[key] = subscriber
        return lambda: self._subscribers.pop(key, None) and None

    def lost(self, first: int, last: int) -> Event:
        """The ``EVENTS_LOST`` for one reader that was not given the events ``first`` to ``last``."""
        data = EventsLost(count=last - first + 1, first_seq=first, last_seq=last)
        return self._stamp(last, event_of(data), data, self._now_ns())

    def flush(self) -> None:
        """Send what waits for the end of its period, now: the server ends."""
        periods, self._periods = self._periods, {}
        for period in periods.values():
            period.timer.cancel()
            if period.waiting is not None:
                self._send(*period.waiting)

    def _open_period(self, key: tuple[str, Any]) -> None:
        self._periods[key] = _Period(self._later(EVENT_RATE_PERIOD_MS / 1000, lambda: self._end_period(key)))

    def _end_period(self, key: tuple[str, Any]) -> None:
        period = self._periods.pop(key, None)
        if period is not None and period.waiting is not None:
            self._open_period(key)
            self._send(*period.waiting)

    @staticmethod
    def _stamp(seq: int, spec: EventSpec, data: EventData, now: int) -> Event:
        seconds, rest = divmod(now, 1_000_000_000)
        return Event(seq, spec, data, seconds, rest // 1000)

    def _send(self, spec: EventSpec, data: EventData, now: int) -> None:
        self.seq += 1
        event = self._stamp(self.seq, spec, data, now)
        for subscriber in tuple(self._subscribers.values()):
            try:
                subscriber(event)
            except Exception:  # noqa: BLE001 - whatever a reader does, the others get theirs
                _log.exception("A reader of events failed on %s; the others have it", spec.name)


class Backlog:
    """One reader's account of events: bounded, honest about what it dropped.

    The reader's writer asks :meth:`admit` before it queues an event, and says :meth:`sent` when one has left. Once
    full, everything is dropped until all that waited has left; then :meth:`take_lost` names the one range that was
    dropped. So a reader sees what it could take, then ``EVENTS_LOST``, then goes on, always in order.
    """

    __slots__ = ("_first", "_last", "lost_total", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.lost_total = 0
        self._first = 0
        self._last = 0

    def admit(self, seq: int) -> bool:
        """Whether this event may be queued; it counts as queued, or as lost."""
        if self._first == 0 and self.waiting < MAX_EVENT_BACKLOG:
            self.waiting += 1
            return True
        if self._first == 0:
            self._first = seq
        self._last = seq
        self.lost_total += 1
        return False

    def sent(self, count: int = 1) -> None:
        """So many queued events have left."""
        self.waiting -= count

    def keep(self) -> tuple[int, int] | None:
        """The first and last number dropped that nobody was told of yet."""
        return (self._first, self._last) if self._first else None

    def adopt(self, lost_total: int, lost: tuple[int, int] | None) -> None:
        """Have another process's account."""
        self.lost_total = lost_total
        self._first, self._last = lost or (0, 0)

    def take_lost(self) -> tuple[int, int] | None:
        """The first and last number dropped, once nothing waits any more; None when nothing was dropped."""
        if self._first == 0 or self.waiting:
            return None
        lost = (self._first, self._last)
        self._first = 0
        return lost
