"""What one reader has not taken: bounded, and honest about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.events import Event, EventQueue
from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceDeleted
from vfiod.protocol.catalogue.monitor import EventsLost


def event(seq: int, name: str = "DEVICE_ADDED") -> Event:
    return Event(name, DeviceAdded(path=f"/{seq}"), seq, seq / 10)


def test_in_order() -> None:
    queue = EventQueue()
    assert queue.get() is None
    for seq in (1, 2, 3):
        assert queue.put(event(seq))
    assert [queue.get(), queue.get(), queue.get(), queue.get()] == [event(1), event(2), event(3), None]


def test_only_what_is_wanted() -> None:
    queue = EventQueue([DeviceDeleted, "SHUTDOWN"])
    assert not queue.put(event(1))
    assert queue.put(event(2, "DEVICE_DELETED"))
    assert queue.put(event(3, "EVENTS_LOST")), "it may have been the one that was waited for"
    assert len(queue) == 2


def test_loss_stands_where_it_happened() -> None:
    queue = EventQueue(limit=2)
    for seq in (1, 2, 3, 4):
        queue.put(event(seq))
    assert len(queue) == 3
    assert queue.get() == event(1)
    assert queue.get() == event(2)
    lost = queue.get()
    assert lost is not None
    assert lost.data == EventsLost(count=2, first_seq=3, last_seq=4)
    assert (lost.name, lost.local, lost.seq) == ("EVENTS_LOST", True, None)
    assert queue.get() is None
    queue.put(event(5))
    assert queue.get() == event(5)


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
def test_every_event_is_seen_or_reported(steps: list[bool], limit: int) -> None:
    """Whatever the pace of writer and reader: seen and lost together are all, in order, and the queue is bounded."""
    queue = EventQueue(limit=limit)
    accounted: list[int] = []

    def take() -> None:
        found = queue.get()
        if found is None:
            return
        if found.local:
            assert isinstance(found.data, EventsLost)
            assert found.data.count == found.data.last_seq - found.data.first_seq + 1
            accounted.extend(range(found.data.first_seq, found.data.last_seq + 1))
        else:
            assert found.seq is not None
            accounted.append(found.seq)

    put = 0
    for write in steps:
        if write:
            put += 1
            queue.put(event(put))
        else:
            take()
        assert len(queue) <= limit + 1
    while len(queue):
        take()
    assert accounted == list(range(1, put + 1))


def test_nonsense() -> None:
    with pytest.raises(ValueError, match="1 event or more"):
        EventQueue(limit=0)
    with pytest.raises(ValueError, match="UPPER_CASE"):
        EventQueue(["device_added"])
