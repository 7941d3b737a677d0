"""Events as the client gives them out: typed, in order, bounded, and honest about what was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from vfiod.protocol.catalogue import EVENTS, EventData, event_of
from vfiod.protocol.catalogue.monitor import EventsLost

__all__ = ["DEFAULT_LIMIT", "Event", "EventName", "EventQueue", "event_name"]

DEFAULT_LIMIT: Final = 1024
"""Events one reader may leave unread: what the server itself keeps for a session."""

LOST: Final = event_of(EventsLost).name

EventName: TypeAlias = str | type[EventData]
"""An event by its name on the wire, or by its class in the catalogue."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        name: on the wire, ``DEVICE_ADDED``.
        data: the catalogue's class for it; a plain mapping for an event this client does not know.
        seq: its place among all events of the machine, from 1; None when it was made here.
        timestamp: seconds since 1970, by the server's clock; -1 when it had none.
        local: made by this client (``EVENTS_LOST`` for events it received and its reader did not take in time).

    """

    name: str
    data: EventData | dict[str, Any]
    seq: int | None
    timestamp: float
    local: bool = False


def event_name(event: EventName) -> str:
    """The name on the wire."""
    return event if isinstance(event, str) else event_of(event).name


class EventQueue:
    """What one reader has not taken yet: at most ``limit`` events.

    Beyond it the newest are dropped, and an ``EVENTS_LOST`` stands in their place and says which. The server's own
    ``EVENTS_LOST`` passes every filter, since it may have been the one that was waited for.

    Args:
        events: names to let through; none: all.
        limit: how many may wait, 1 or more.

    """

    __slots__ = ("_first", "_last", "_limit", "_lost", "_lost_at", "_names", "_waiting")

    def __init__(self, events: Iterable[EventName] = (), *, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"An event queue holds 1 event or more, got a limit of {limit}")
        self._names = frozenset(map(event_name, events))
        if unknown := sorted(name for name in self._names if not name.isupper()):
            raise ValueError(f"Events are UPPER_CASE, such as {next(iter(EVENTS))}; got {', '.join(unknown)}")
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._lost = self._first = self._last = 0
        self._lost_at = -1.0

    def __len__(self) -> int:
        return len(self._waiting) + bool(self._lost)

    def put(self, event: Event) -> bool:
        """Take an event in, if it is one of those wanted. True when the reader has something to look at."""
        if self._names and event.name not in self._names and event.name != LOST:
            return False
        if self._lost and len(self._waiting) + 1 < self._limit:
            self._waiting.append(self._loss())
        if self._lost or len(self._waiting) >= self._limit:
            self._drop(event)
        else:
            self._waiting.append(event)
        return True

    def get(self) -> Event | None:
        """The oldest event, or None."""
        if self._waiting:
            return self._waiting.popleft()
        return self._loss() if self._lost else None

    def _drop(self, event: Event) -> None:
        self._lost += 1
        self._lost_at = event.timestamp
        if event.seq is not None:
            self._first = self._first or event.seq
            self._last = event.seq

    def _loss(self) -> Event:
        data = EventsLost(count=self._lost, first_seq=self._first, last_seq=self._last)
        self._lost = self._first = self._last = 0
        return Event(LOST, data, None, self._lost_at, local=True)
