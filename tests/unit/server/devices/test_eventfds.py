"""Eventfds of others: whatever their owner does to them, signalling never waits and loses nothing that fits."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.devices.eventfds import Consumer
from vfiod.server.kernel import signalling

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


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.getsignal(signalling.SIGNAL)
    signalling.interruptible()
    yield
    signal.signal(signalling.SIGNAL, before)


@pytest.mark.usefixtures("interruptible")
def test_a_write_that_has_to_wait_is_interrupted() -> None:
    """As when its owner fills it between the question and the write; again and again, and from any thread."""
    with FileDescriptor(os.eventfd(0)) as full:
        os.eventfd_write(full.number, FULL)
        for _ in range(2):
            with pytest.raises(InterruptedError):
                signalling.write(full.number, 1)
        with ThreadPoolExecutor(1) as other:
            assert isinstance(other.submit(signalling.write, full.number, 1).exception(), InterruptedError)
        assert os.eventfd_read(full.number) == FULL, "something was added nevertheless"
        signalling.write(full.number, 5)
        assert os.eventfd_read(full.number) == 5


@pytest.mark.usefixtures("interruptible")
def test_who_fills_it_between_the_question_and_the_write_is_signalled_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileDescriptor(os.eventfd(0)) as shared:
        consumer = Consumer(shared)
        os.eventfd_write(shared.number, FULL)
        monkeypatch.setattr(consumer, "_writable", lambda _: [(shared.number, select.POLLOUT)])  # as a moment ago
        consumer.signal(1)
        assert "signalled no more" in caplog.text
        assert os.eventfd_read(shared.number) == FULL
        consumer.signal(1)
        os.eventfd_write(shared.number, 7)
        assert os.eventfd_read(shared.number) == 7
