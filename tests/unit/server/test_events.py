"""Events: numbers, rate limits as QEMU's, and the account of a slow reader. Time is given by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceDeleted
from vfiod.protocol.catalogue.interrupts import Irq
from vfiod.protocol.catalogue.monitor import EventsLost
from vfiod.protocol.limits import EVENT_RATE_PERIOD_MS, MAX_EVENT_BACKLOG
from vfiod.server.events import Backlog, Event, EventHub


class Hand:
    """A clock and a timer service that move when told."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.timers: list[tuple[float, Callable[[], None], Hand.Timer]] = []

    class Timer:
        def __init__(self) -> None:
            self.cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def now_ns(self) -> int:
        return int(self.seconds * 1_000_000_000)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Hand.Timer()
        self.timers.append((self.seconds + seconds, callback, timer))
        return timer

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        due = [entry for entry in self.timers if entry[0] <= self.seconds]
        self.timers = [entry for entry in self.timers if entry[0] > self.seconds]
        for _, callback, timer in due:
            if not timer.cancelled:
                callback()


PERIOD = EVENT_RATE_PERIOD_MS / 1000


def _added(device: str) -> DeviceAdded:
    return DeviceAdded(device=device, path=f"/machine/peripheral/{device}")


def _irq(fired: int, vector: int = 0) -> Irq:
    return Irq(device="nic0", index=1, vector=vector, fired=fired, delivered=fired)


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def hub(hand: Hand) -> EventHub:
    return EventHub(hand.later, hand.now_ns)


@pytest.fixture
def seen(hub: EventHub) -> list[Event]:
    events: list[Event] = []
    hub.subscribe(events.append)
    return events


def test_events_are_numbered_from_one_and_timed(hub: EventHub, hand: Hand, seen: list[Event]) -> None:
    assert hub.seq == 0
    hub.emit(_added("a"))
    hand.seconds = 123.25
    hub.emit(DeviceDeleted(device="a", path="/machine/peripheral/a", released=True))
    assert [(event.seq, event.spec.name, event.seconds, event.microseconds) for event in seen] == [
        (1, "DEVICE_ADDED", 100, 0),
        (2, "DEVICE_DELETED", 123, 250_000),
    ]
    assert hub.seq == 2


def test_an_event_without_readers_still_has_a_number(hub: EventHub) -> None:
    hub.emit(_added("a"))
    assert hub.seq == 1


def test_rate_limit_first_at_once_last_at_the_end_between_dropped(hub: EventHub, hand: Hand, seen: list[Event]) -> None:
    for fired in range(1, 6):
        hub.emit(_irq(fired))
    assert [event.data.fired for event in seen] == [1]  # type: ignore[attr-defined]
    hand.advance(PERIOD)
    assert [event.data.fired for event in seen] == [1, 5]  # type: ignore[attr-defined]
    assert [event.seq for event in seen] == [1, 2]  # no gaps: what was dropped never had a number
    assert hub.suppressed == 3
    # The delayed one keeps the time at which it happened, as QEMU's does.
    assert seen[1].seconds == 100


def test_the_delayed_event_begins_a_new_period(hub: EventHub, hand: Hand, seen: list[Event]) -> None:
    hub.emit(_irq(1))
    hub.emit(_irq(2))
    hand.advance(PERIOD)
    hub.emit(_irq(3))
    assert len(seen) == 2
    hand.advance(PERIOD)
    assert len(seen) == 3
    hand.advance(PERIOD)  # a period in which nothing came: the next is sent at once
    hub.emit(_irq(4))
    assert len(seen) == 4


def test_keys_are_limited_apart(hub: EventHub, seen: list[Event]) -> None:
    hub.emit(_irq(1, vector=0))
    hub.emit(_irq(1, vector=1))
    hub.emit(_irq(2, vector=0))
    assert [event.data.vector for event in seen] == [0, 1]  # type: ignore[attr-defined]


def test_an_idle_key_costs_no_timer(hub: EventHub, hand: Hand, seen: list[Event]) -> None:
    hub.emit(_irq(1))
    hand.advance(PERIOD)
    assert hand.timers == []


def test_flush_sends_what_waits(hub: EventHub, hand: Hand, seen: list[Event]) -> None:
    hub.emit(_irq(1))
    hub.emit(_irq(2))
    hub.flush()
    assert len(seen) == 2
    hand.advance(PERIOD)
    assert len(seen) == 2


def test_a_reader_that_leaves_gets_no_more_and_leaving_twice_is_harmless(hub: EventHub) -> None:
    events: list[Event] = []
    leave = hub.subscribe(events.append)
    hub.emit(_added("a"))
    leave()
    leave()
    hub.emit(_added("b"))
    assert len(events) == 1


def test_a_reader_that_fails_is_logged_and_the_others_have_it(hub: EventHub, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_event: Event) -> None:
        raise RuntimeError("no")

    hub.subscribe(fail)
    events: list[Event] = []
    hub.subscribe(events.append)
    hub.emit(_added("a"))
    assert len(events) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_reader_may_leave_while_an_event_goes_round(hub: EventHub) -> None:
    events: list[Event] = []
    leave = hub.subscribe(lambda event: leave())
    hub.subscribe(events.append)
    hub.emit(_added("a"))
    assert len(events) == 1


def test_backlog_drops_beyond_its_bound_and_names_one_range() -> None:
    backlog = Backlog()
    admitted = [seq for seq in range(1, MAX_EVENT_BACKLOG + 101) if backlog.admit(seq)]
    assert admitted == list(range(1, MAX_EVENT_BACKLOG + 1))
    assert backlog.take_lost() is None  # what waits must leave first: order
    backlog.sent(MAX_EVENT_BACKLOG - 1)
    assert not backlog.admit(MAX_EVENT_BACKLOG + 101)  # once it drops, it drops until it is empty
    backlog.sent()
    assert backlog.take_lost() == (MAX_EVENT_BACKLOG + 1, MAX_EVENT_BACKLOG + 101)
    assert backlog.take_lost() is None
    assert backlog.admit(MAX_EVENT_BACKLOG + 102)
    assert backlog.lost_total == 101


def test_events_lost_bears_the_last_lost_number(hub: EventHub) -> None:
    event = hub.lost(5, 9)
    assert event.seq == 9
    assert event.data == EventsLost(count=5, first_seq=5, last_seq=9)
    assert hub.seq == 0  # for one reader alone: the machine's count is not touched
