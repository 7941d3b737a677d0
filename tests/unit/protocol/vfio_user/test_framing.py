"""Cutting a stream into messages, and fds to the messages they belong to."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import VFIO_USER_MAX_FDS, VFIO_USER_MAX_MESSAGE
from vfiod.protocol.vfio_user import Command, Flags, FrameError, Framer, Header, Message


def message(id: int, body: bytes = b"", *, flags: int = 0, command: int = Command.REGION_READ) -> bytes:
    return Header(id, command, 16 + len(body), flags).pack() + body


def some_fds(count: int) -> list[FileDescriptor]:
    return [FileDescriptor(os.eventfd(0)) for _ in range(count)]


def taken(found: list[Message | FrameError]) -> list[tuple[int, bytes, int]]:
    """(id, body, number of fds) of each; the fds are closed."""
    out = []
    for one in found:
        assert isinstance(one, Message), one
        out.append((one.header.id, one.body, len(one.fds)))
        one.close()
    return out


def test_a_header_is_sixteen_bytes_in_the_hosts_order() -> None:
    little = bytes.fromhex("0102 0b00 20000000 31000000 16000000")
    big = bytes.fromhex("0201 000b 00000020 00000031 00000016")
    header = Header(0x0201, Command.DMA_READ, 32, Flags.NO_REPLY | Flags.ERROR | 1, 22)
    assert header.pack() == (little if struct.pack("=H", 1) == b"\1\0" else big)
    assert Header.unpack(header.pack()) == header
    assert header.is_reply
    assert header.no_reply
    assert header.is_error
    assert header.known is Command.DMA_READ
    assert Header(1, 14, 16).known is None  # DIRTY_PAGES, which is gone
    assert Header(1, 14, 16).title == "command 14 1"


def test_whole_messages_come_out_however_they_are_cut() -> None:
    stream = message(1, b"abc") + message(2) + message(3, b"defg")
    wanted = [(1, b"abc", 0), (2, b"", 0), (3, b"defg", 0)]
    for step in (1, 2, 15, 16, 17, len(stream)):
        framer = Framer()
        found = []
        for at in range(0, len(stream), step):
            found += framer.receive_data(stream[at : at + step])
        assert taken(found) == wanted
        assert framer.pending == 0


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_no_cut_loses_anything(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(message(n, body) for n, body in enumerate(bodies))
    framer, found, at = Framer(), [], 0
    while at < len(stream):
        step = cuts[at % len(cuts)]
        found += framer.receive_data(stream[at : at + step])
        at += step
    assert taken(found) == [(n, body, 0) for n, body in enumerate(bodies)]


def test_fds_go_to_the_last_message_that_begins_in_their_data() -> None:
    framer = Framer()
    assert taken(framer.receive_data(message(1) + message(2, b"x"), some_fds(2))) == [(1, b"", 0), (2, b"x", 2)]
    # The end of one message, and the beginning of the next, with which the fds came.
    assert taken(framer.receive_data(message(3, b"abcd")[:18])) == []
    assert taken(framer.receive_data(b"cd" + message(4, b"ef")[:7], some_fds(1))) == [(3, b"abcd", 0)]
    assert taken(framer.receive_data(message(4, b"ef")[7:])) == [(4, b"ef", 1)]


def test_fds_in_the_middle_of_a_message_are_its_own() -> None:
    framer = Framer()
    assert framer.receive_data(message(1, b"abcd")[:17]) == []
    assert framer.receive_data(b"b", some_fds(1)) == []
    assert taken(framer.receive_data(b"cd", some_fds(1))) == [(1, b"abcd", 2)]


def test_too_many_fds_refuse_the_message_and_not_the_stream() -> None:
    framer = Framer(max_fds=2)
    fds = some_fds(3)
    [error, after] = framer.receive_data(message(1, b"x") + message(2), []) and framer.receive_data(
        message(3), fds
    ) + framer.receive_data(message(4))
    assert isinstance(error, FrameError)
    assert (error.errno, error.fatal, error.header and error.header.id) == ("EINVAL", False, 3)
    assert "came with 3 fds, at most 2" in error.desc
    assert all(fd.closed for fd in fds)
    assert taken([after]) == [(4, b"", 0)]


def test_too_many_fds_in_two_goes() -> None:
    framer = Framer(max_fds=2)
    first, second = some_fds(2), some_fds(1)
    framer.receive_data(message(1, b"abc")[:16], first)
    [error] = framer.receive_data(b"abc", second)
    assert isinstance(error, FrameError)
    assert "3 fds" in error.desc
    assert all(fd.closed for fd in first + second)


@pytest.mark.parametrize(
    ("header", "errno", "words"),
    [
        (Header(1, 9, 15), "EINVAL", "its header alone has 16"),
        (Header(1, 9, 0), "EINVAL", "its header alone has 16"),
        (Header(1, 9, VFIO_USER_MAX_MESSAGE + 1), "E2BIG", "at most"),
        (Header(1, 9, 0xFFFF_FFFF), "E2BIG", "at most"),
        (Header(1, 9, 16, 2), "EINVAL", "neither a command nor a reply"),
    ],
)
def test_a_size_that_cannot_be_ends_the_stream(header: Header, errno: str, words: str) -> None:
    framer = Framer()
    fds = some_fds(2)
    [before, error] = framer.receive_data(message(0) + header.pack() + b"whatever", fds)
    assert taken([before]) == [(0, b"", 0)]
    assert isinstance(error, FrameError)
    assert (error.errno, error.fatal) == (errno, True)
    assert words in error.desc
    assert framer.broken
    more = some_fds(1)
    assert framer.receive_data(message(2), more) == []
    assert all(fd.closed for fd in fds + more)


def test_a_stream_that_ends_leaves_no_fd() -> None:
    framer = Framer()
    fds = some_fds(VFIO_USER_MAX_FDS)
    framer.receive_data(message(1, b"abc")[:5], fds)
    assert framer.pending == 5
    framer.close()
    assert all(fd.closed for fd in fds)


def test_the_largest_message_is_taken() -> None:
    body = bytes(VFIO_USER_MAX_MESSAGE - 16)
    framer = Framer()
    assert framer.receive_data(message(1, body)[:-1]) == []
    assert taken(framer.receive_data(b"\0")) == [(1, body, 0)]
