"""The outgoing side of a session, on a real socket pair with a small buffer: order, bounds, fds with their reply."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_REPLY_BACKLOG
from vfiod.server.monitor.writer import EVENTS_PER_SEND, Writer


class Loop:
    """The calls a writer makes of an event loop; the test decides when the socket is writable, and a turn ends."""

    def __init__(self) -> None:
        self.writers: dict[int, Callable[[], object]] = {}
        self.soon: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def end_turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        self.writers[fd] = callback

    def remove_writer(self, fd: int) -> None:
        self.writers.pop(fd, None)


class Setting:
    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.loop = Loop()
        self.drained = 0
        self.errors: list[OSError] = []
        self.writer = Writer(self.ours, self.loop, self._drained, self.errors.append)

    def _drained(self) -> None:
        self.drained += 1

    def read(self) -> bytes:
        """Everything that is there."""
        data = b""
        while True:
            try:
                part = self.theirs.recv(65536)
            except BlockingIOError:
                return data
            if not part:
                return data
            data += part

    def writable(self) -> None:
        for callback in list(self.loop.writers.values()):
            callback()


@pytest.fixture
def setting() -> Iterator[Setting]:
    before = len(os.listdir("/proc/self/fd"))
    setting = Setting()
    yield setting
    setting.writer.close()
    setting.ours.close()
    setting.theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_put_goes_out_joined_at_the_flush(setting: Setting) -> None:
    for line in (b"a\n", b"b\n", b"c\n"):
        setting.writer.put(line)
    assert setting.read() == b""
    setting.writer.flush()
    assert setting.read() == b"a\nb\nc\n"
    assert setting.writer.idle
    assert setting.writer.bytes_sent == 6
    assert setting.loop.writers == {}


def test_a_write_goes_out_at_once_behind_what_was_put(setting: Setting) -> None:
    setting.writer.put(b"event\n")
    setting.writer.write(b"reply\n")
    assert setting.read() == b"event\nreply\n"
    setting.writer.write(b"next\n")
    assert setting.read() == b"next\n"
    assert setting.writer.bytes_sent == 17


def test_what_the_socket_does_not_take_follows_when_it_is_writable(setting: Setting) -> None:
    lines = [bytes([65 + index]) * 5000 for index in range(20)]
    for line in lines:
        setting.writer.write(line)
    assert setting.writer.blocked
    waiting = setting.writer.bytes_waiting
    assert 0 < waiting < 100_000
    setting.writer.write(b"last")
    assert setting.writer.bytes_waiting == waiting + 4
    got = b""
    while not setting.writer.idle:
        got += setting.read()
        setting.writable()
    got += setting.read()
    assert got == b"".join(lines) + b"last"
    assert setting.drained == 1
    assert setting.loop.writers == {}
    assert setting.writer.bytes_waiting == 0


def test_full_at_its_bound(setting: Setting) -> None:
    setting.writer.put(b"x" * (MAX_REPLY_BACKLOG - 1))
    assert not setting.writer.full
    setting.writer.put(b"x")
    assert setting.writer.full


def test_events_are_accounted_when_they_leave(setting: Setting) -> None:
    for _ in range(3):
        assert setting.writer.backlog.admit(1)
        setting.writer.put(b"e" * 3000, event=True)
    setting.writer.put(b"reply")
    setting.writer.flush()
    assert setting.writer.backlog.waiting > 0
    while not setting.writer.idle:
        setting.read()
        setting.writable()
    assert setting.writer.backlog.waiting == 0


def test_events_of_one_turn_go_out_in_one_send_when_it_ends(setting: Setting) -> None:
    sends = []
    for number in range(3):
        assert setting.writer.backlog.admit(number)
        setting.writer.put(b"event %d\n" % number, event=True)
        setting.writer.flush()
        sends.append(setting.read())
    assert sends == [b"", b"", b""]
    assert len(setting.loop.soon) == 1
    setting.loop.end_turn()
    assert setting.read() == b"event 0\nevent 1\nevent 2\n"
    assert (setting.writer.backlog.waiting, setting.writer.idle, setting.drained) == (0, True, 1)
    assert setting.loop.soon == []


def test_a_reply_takes_the_events_before_it_along(setting: Setting) -> None:
    assert setting.writer.backlog.admit(1)
    setting.writer.put(b"event\n", event=True)
    setting.writer.flush()
    setting.writer.write(b"reply\n")
    assert setting.read() == b"event\nreply\n"
    assert setting.writer.backlog.waiting == 0
    setting.loop.end_turn()
    assert setting.read() == b""
    assert setting.drained == 0


def test_a_long_burst_does_not_wait_for_the_end_of_the_turn(setting: Setting) -> None:
    for number in range(EVENTS_PER_SEND + 1):
        assert setting.writer.backlog.admit(number)
        setting.writer.put(b"e\n", event=True)
        setting.writer.flush()
    assert setting.read() == b"e\n" * (EVENTS_PER_SEND + 1)
    assert setting.writer.backlog.waiting == 0


def test_each_event_of_a_send_that_goes_out_in_parts_is_accounted_when_its_last_byte_leaves(setting: Setting) -> None:
    sizes = [1500, 1, 900, 2500, 3000] * 10
    for number, size in enumerate(sizes):
        assert setting.writer.backlog.admit(number)
        setting.writer.put(bytes([65 + number % 26]) * size, event=True)
        setting.writer.flush()
    setting.loop.end_turn()
    assert setting.writer.blocked
    while True:
        sent, whole = setting.writer.bytes_sent, 0
        while whole < len(sizes) and sum(sizes[: whole + 1]) <= sent:
            whole += 1
        assert setting.writer.backlog.waiting == len(sizes) - whole
        if setting.writer.idle:
            break
        setting.read()
        setting.writable()


def test_events_that_gather_are_dropped_at_the_close(setting: Setting) -> None:
    assert setting.writer.backlog.admit(1)
    setting.writer.put(b"event\n", event=True)
    setting.writer.flush()
    setting.writer.close()
    setting.loop.end_turn()
    assert setting.read() == b""
    assert setting.drained == 0


def test_fds_go_with_the_first_byte_of_their_reply_and_are_closed_here(setting: Setting) -> None:
    fds = [FileDescriptor(os.eventfd(7)), FileDescriptor(os.eventfd(9))]
    setting.writer.put(b"before\n")
    setting.writer.put(b"with\n", fds)
    setting.writer.put(b"after\n")
    setting.writer.flush()
    assert all(fd.closed for fd in fds)
    data, received, _, _ = socket.recv_fds(setting.theirs, 65536, 4)
    with FileDescriptor(received[0]) as first, FileDescriptor(received[1]) as second:
        assert (os.eventfd_read(first.number), os.eventfd_read(second.number)) == (7, 9)
    assert data == b"before\nwith\n"  # a read ends after the message that brought fds
    assert setting.read() == b"after\n"


def test_fds_of_a_reply_that_goes_out_in_parts_are_sent_once(setting: Setting) -> None:
    setting.writer.put(b"y" * 100_000, [FileDescriptor(os.eventfd(1))])
    setting.writer.flush()
    assert setting.writer.blocked
    count, size = 0, 0
    while size < 100_000:
        data, received, _, _ = socket.recv_fds(setting.theirs, 65536, 4)
        for number in received:
            os.close(number)
        count += len(received)
        size += len(data)
        setting.writable()
    assert count == 1


def test_a_peer_that_is_gone_is_said_once_and_fds_are_closed(setting: Setting) -> None:
    setting.theirs.close()
    fd = FileDescriptor(os.eventfd(0))
    setting.writer.put(b"a", [fd])
    setting.writer.flush()
    assert [type(error) for error in setting.errors] == [BrokenPipeError]
    assert fd.closed
    late = FileDescriptor(os.eventfd(0))
    setting.writer.put(b"b", [late])
    setting.writer.write(b"c")
    assert late.closed
    assert len(setting.errors) == 1


def test_closing_drops_what_waits_with_its_fds(setting: Setting) -> None:
    fd = FileDescriptor(os.eventfd(0))
    setting.writer.put(b"z" * 100_000)
    setting.writer.put(b"a", [fd])
    setting.writer.flush()
    setting.writer.close()
    assert fd.closed
    assert setting.loop.writers == {}
    assert setting.writer.bytes_waiting == 0
