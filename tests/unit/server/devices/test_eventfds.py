"""Eventfds of others: whatever their owner does to them, signalling never waits and loses nothing that fits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.devices.eventfds import Consumer

FULL = 2**64 - 2


@pytest.fixture(params=[0, os.EFD_NONBLOCK], ids=["blocking", "non-blocking"])
def eventfd(request: pytest.FixtureRequest) -> Iterator[FileDescriptor]:
    with FileDescriptor(os.eventfd(0, request.param)) as fd:
        yield fd


@pytest.mark.parametrize("count", [1, 3])
def test_counts_add_up(eventfd: FileDescriptor, count: int) -> None:
    consumer = Consumer(eventfd)
    consumer.signal(count)
    consumer.signal(count)
    assert os.eventfd_read(eventfd.number) == 2 * count


@pytest.mark.parametrize("room", [0, 1, 2, 5])
def test_a_counter_without_room_for_all_is_filled_and_nobody_waits(eventfd: FileDescriptor, room: int) -> None:
    os.eventfd_write(eventfd.number, FULL - room)
    Consumer(eventfd).signal(4)  # a blocking eventfd would hold the loop here for good
    assert os.eventfd_read(eventfd.number) == FULL - room + min(room, 4)
