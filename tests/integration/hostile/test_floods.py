"""Peers that want the server for themselves: slow ones, many at once, with many fds, too large, too deep, deaf.

What holds each time: those who behave are served while it goes on (so many requests, never so fast), what is kept of
the others is bounded, and when they are gone nothing is left of them.
"""

from __future__ import annotations

import resource
import socket

import msgpack
import pytest
import zmq
from tests.fuzz.target import lines

from vfiod.protocol.limits import (
    BUS_SURGE,
    MAX_BUS_CLIENTS,
    MAX_FDS_PER_MESSAGE,
    MAX_MESSAGE_BYTES,
    MAX_NAMED_FDS,
    MAX_NESTING,
    MAX_PENDING_FDS,
    MAX_SCRAPER_CONNECTIONS,
    MAX_SESSIONS,
)
from vfiod.protocol.vfio_user import OURS, Command, Header, Version

from .conftest import DOORS, PATIENCE, Fortress

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.1 (RFC 37), which the other side answers with its own."""

_VERSION = Version(0, 0, OURS).pack()

SAID = {
    "qmp": b'{"execute": "qmp_capabilities", "id": 1}',
    "jsonrpc": b'{"jsonrpc": "2.0", "method": "query-name", "id": 1}',
    "bus": GREETING,
    "events": GREETING,
    "metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "export": Header(1, Command.VERSION, 16 + len(_VERSION)).pack() + _VERSION,
}
"""A whole first message for each door."""

ANSWER = {
    "qmp": b'"id": 1}',
    "jsonrpc": b'"name":"fortress"',
    "bus": b"\x7f\x03",
    "events": b"\x7f\x03",
    "metrics": b"HTTP/1.1 200 OK",
    "export": b"max_msg_fds",
}
"""A part of its answer."""


def hears(peer: socket.socket, wanted: bytes) -> None:
    heard = b""
    while wanted.replace(b" ", b"") not in heard.replace(b" ", b""):
        data = peer.recv(65536)
        assert data, heard
        heard += data


@pytest.mark.parametrize("door", DOORS)
def test_byte_by_byte(fortress: Fortress, door: str) -> None:
    before = fortress.fds()
    peers = [fortress.connect(door) for _ in range(1 if door == "export" else 3)]
    text = SAID[door]
    for number, byte in enumerate(text[:-1]):
        for peer in peers:
            peer.sendall(bytes([byte]))
        if number % 8 == 0:
            fortress.serves()
    finishes, *others = peers
    finishes.sendall(text[-1:])
    hears(finishes, ANSWER[door])
    for peer in others:  # these never finish
        peer.close()
    finishes.close()
    fortress.eventually(lambda: fortress.fds() <= before)


@pytest.mark.parametrize("door", DOORS)
def test_fds_without_a_command(fortress: Fortress, door: str) -> None:
    before = fortress.fds()
    peers = [fortress.connect(door) for _ in range(1 if door == "export" else 2)]
    fortress.serves()
    most = before + len(peers) * (1 + MAX_PENDING_FDS) + 8
    for _ in range(20):
        for peer in peers:
            try:
                socket.send_fds(peer, [SAID[door][:1]], [0] * MAX_FDS_PER_MESSAGE)
            except (BrokenPipeError, ConnectionResetError):
                continue  # hung up on, which is right
        fortress.serves()
        assert fortress.fds() <= most
    for peer in peers:
        peer.close()
    fortress.eventually(lambda: fortress.fds() <= before)


LIMITS = {
    "qmp": (200, MAX_SESSIONS),
    "jsonrpc": (200, MAX_SESSIONS),
    "bus": (MAX_BUS_CLIENTS + 300, MAX_BUS_CLIENTS),
    "events": (MAX_BUS_CLIENTS + 300, MAX_BUS_CLIENTS),
    "metrics": (400, MAX_SCRAPER_CONNECTIONS),
    "export": (400, 1),
}
"""How many come, and how many are let in."""


@pytest.mark.parametrize("door", DOORS)
def test_more_than_there_is_room_for(fortress: Fortress, door: str) -> None:
    before = fortress.fds()
    come, limit = LIMITS[door]
    surge = {"bus": BUS_SURGE, "events": BUS_SURGE, "metrics": 100}.get(door, 16)  # accepted, and not yet looked at
    peers = []
    for number in range(come):
        peers.append(fortress.connect(door))
        if number % 20 == 0:
            fortress.serves()
            assert fortress.fds() <= before + limit + surge
    fortress.eventually(lambda: fortress.fds() <= before + limit + 1)
    for peer in peers:
        peer.close()
    fortress.eventually(lambda: fortress.fds() <= before)
    one = fortress.connect(door)
    one.sendall(SAID[door])
    hears(one, ANSWER[door])


def test_a_crowd_that_says_nothing_keeps_no_scraper_out(fortress: Fortress) -> None:
    for _ in range(3):
        for _ in range(MAX_SCRAPER_CONNECTIONS):
            fortress.connect("metrics")
        one = fortress.connect("metrics")
        one.sendall(SAID["metrics"])
        hears(one, ANSWER["metrics"])


@pytest.mark.parametrize("door", ["bus", "events"])
def test_more_connections_than_open_files(fortress: Fortress, door: str) -> None:
    """ZeroMQ ends the process when it finds no file to accept with: it must never come so far."""
    before = fortress.fds()
    few = 2 * (MAX_BUS_CLIENTS + BUS_SURGE)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < few + 500:
        pytest.skip("so many connections are not possible here (RLIMIT_NOFILE)")
    with fortress.open_files(few):
        peers = []
        for number in range(few + 300):
            peers.append(fortress.connect(door))
            if number % 100 == 0:
                fortress.serves()
        fortress.eventually(lambda: fortress.fds() <= before + MAX_BUS_CLIENTS + 1)
        for peer in peers:
            peer.close()
        fortress.eventually(lambda: fortress.fds() <= before)


BIG = b"x" * (MAX_MESSAGE_BYTES + 1)
DEEP = 200_000

GIANTS = {
    "one string": b'{"execute": "query-name", "id": "' + BIG + b'"}',
    "one name": b'{"execute": "' + BIG[: MAX_MESSAGE_BYTES - 100] + b'"}',
    "one number": b'{"execute": "query-name", "arguments": {"a": ' + b"9" * 1_000_000 + b"}}",
    "many members": b'{"execute": "query-name", "arguments": {'
    + b",".join(b'"%d":[]' % number for number in range(300_000))
    + b"}}",
    "many lists": b'{"execute": "query-name", "arguments": {"a": [' + b"[]," * 1_000_000 + b"1]}}",
    "deep": b'{"execute": "query-name", "arguments": {"a": ' + b"[" * DEEP,
    "deep and whole": b'{"execute": "query-name", "id": ' + b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1) + b"}",
    "blanks": b" " * 3 * MAX_MESSAGE_BYTES,
}

MOST_MEMORY = 256 << 20
"""Bytes by which a giant may make the server grow: what its largest message is as Python's objects."""


@pytest.mark.parametrize("giant", list(GIANTS))
@pytest.mark.parametrize("door", ["qmp", "jsonrpc"])
def test_giants(fortress: Fortress, door: str, giant: str) -> None:
    before = fortress.memory()
    text = GIANTS[giant]
    if door == "jsonrpc":
        text = text.replace(b'"execute":', b'"jsonrpc": "2.0", "method":').replace(b'"arguments"', b'"params"')
    peer = fortress.connect(door)
    view = memoryview(text)
    for at in range(0, len(view), 1 << 18):
        peer.sendall(view[at : at + (1 << 18)])
        if at % (1 << 20) == 0:
            fortress.serves()
    peer.sendall(b"\xff" + SAID[door])
    hears(peer, ANSWER[door])
    assert fortress.memory() < before + MOST_MEMORY


FRAMES = {
    "too large": BIG,
    "many lists": b"\x84\xa2id\x01\xa7jsonrpc\xa32.0\xa6method\xaaquery-name\xa6params\x81\xa1a\xdd\x00\x0f\x00\x00"
    + b"\x90" * 0xF0000,
    "many members": b"\xdf\x00\x03\x00\x00"
    + b"".join(bytes(msgpack.packb(f"{number}")) + b"\x90" for number in range(0x30000)),
    "deep": b"\x91" * DEEP,
    "deep maps": b"\x81\xa1a" * DEEP,
    "headers of arrays": b"\xdd\xff\xff\xff\xff" * 100_000,
    "headers of maps": b"\xdf\xff\xff\xff\xff" * 100_000,
}


@pytest.mark.parametrize("giant", list(FRAMES))
def test_giants_on_the_bus(fortress: Fortress, giant: str) -> None:
    before = fortress.memory()
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(f"ipc://{fortress.path('bus')}")
        for _ in range(2):
            peer.send(FRAMES[giant])
            fortress.serves(3)
        if giant != "too large":  # ZeroMQ itself hangs up on that
            assert peer.poll(int(PATIENCE) * 1000)
            assert "error" in msgpack.unpackb(peer.recv())
    assert fortress.memory() < before + MOST_MEMORY


def test_frames_that_lie(fortress: Fortress) -> None:
    """The fuzzer's corpus, at the real door; and messages of many frames."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(f"ipc://{fortress.path('bus')}")
        frames = lines("bus-server")
        for frame in frames:
            peer.send(frame)
            fortress.serves()
        for parts in ([b""], [b"", b""], [b"a"] * 100, [b""] * 1000):
            peer.send_multipart(parts)
            fortress.serves()
        assert peer.poll(int(PATIENCE) * 1000)


def test_events_that_nobody_reads(fortress: Fortress) -> None:
    """A session and a subscriber that stop reading: memory is bounded, and who reads misses nothing."""
    deaf = fortress.connect("qmp")
    deaf.sendall(SAID["qmp"])
    before = fortress.memory()
    events = fortress.client.events()
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.setsockopt(zmq.LINGER, 0)
        sub.setsockopt(zmq.RCVHWM, 1)
        sub.subscribe(b"")
        sub.connect(f"ipc://{fortress.path('events')}")
        last = 0
        for number in range(1500):
            fortress.client.device_reset(id="d0")
            event = events.get(PATIENCE)
            assert event.seq is not None
            assert last in (0, event.seq - 1), "an event is missing"
            last = event.seq
            if number % 100 == 0:
                fortress.serves()
    assert fortress.memory() < before + (64 << 20)


def test_fds_end_before_they_are_reserved(fortress: Fortress) -> None:
    """Who fills the server with fds starves himself; others come in, and the bus goes on."""
    before = fortress.fds()
    few = 2 * MAX_NAMED_FDS  # half of it is reserved
    refused = 0
    call = b'{"jsonrpc":"2.0","method":"getfd","params":{"fdname":"f%d"},"id":%d}'
    with fortress.open_files(few):
        greedy = [fortress.connect("jsonrpc") for _ in range(2)]
        for number in range(2 * MAX_NAMED_FDS):
            peer = greedy[number % len(greedy)]
            socket.send_fds(peer, [call % (number, number)], [0])
            refused += b"too many open files" in peer.recv(65536)
            if number % 100 == 0:
                fortress.serves()
                assert fortress.fds() <= few // 2 + 16
        assert refused > 100
        one = fortress.connect("bus")
        one.sendall(GREETING)
        hears(one, ANSWER["bus"])
        for peer in (*greedy, one):
            peer.close()
        fortress.eventually(lambda: fortress.fds() <= before)
