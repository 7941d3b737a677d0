"""Peers that mean no good, or have none: the server stays, others go on, nothing leaks, everything is bounded."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.limits import MAX_EVENT_BACKLOG, MAX_MESSAGE_BYTES, MAX_REPLY_BACKLOG, MAX_SESSIONS

Monitor = Any


def _event(number: int) -> DeviceAdded:
    return DeviceAdded(device=f"d{number}", path=f"/machine/peripheral/d{number}")


@pytest.mark.parametrize("text", [b"", b"{", b'{"execute": "query-st', b'{"execute": "query-status", "id": "', b"[[[["])
def test_a_request_that_never_ends_leaves_nothing(monitor: Monitor, text: bytes) -> None:
    before = monitor.fds()
    for connect in (monitor.qmp, monitor.jsonrpc):
        peer = connect()
        peer.send(text)
        peer.close()
    monitor.until(lambda: monitor.fds() == before and not monitor.server._sessions)


def test_random_bytes(monitor: Monitor) -> None:
    chance = random.Random(20240607)
    before = monitor.fds()
    words = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\xff", b"\x00", b"\\", b"execute", b"jsonrpc", b"1e9", b"\n"]
    for _ in range(60):
        peer = monitor.qmp() if chance.random() < 0.5 else monitor.jsonrpc()
        peer.socket.settimeout(None)
        data = b"".join(
            chance.choice(words) if chance.random() < 0.5 else chance.randbytes(chance.randrange(1, 9))
            for _ in range(chance.randrange(1, 400))
        )
        peer.send(data)
        peer.close()
    assert monitor.qmp().execute("query-status")["return"]["running"] is True
    for peer in monitor.peers:
        peer.close()
    monitor.until(lambda: monitor.fds() == before)


def test_the_wrong_dialect_gets_an_error_each_way(monitor: Monitor) -> None:
    peer = monitor.qmp()
    peer.send({"jsonrpc": "2.0", "method": "query-name", "id": 1})
    assert peer.message()["error"]["class"] == "GenericError"
    peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\xff")
    assert "error" in peer.message()
    monitor_peer = monitor.jsonrpc()
    monitor_peer.send({"execute": "qmp_capabilities"})
    assert monitor_peer.message()["error"]["code"] == -32600


def test_too_long_a_request_is_one_error_and_the_session_goes_on(monitor: Monitor) -> None:
    peer = monitor.qmp()
    peer.send(b'{"execute": "query-name", "id": "' + b"x" * (MAX_MESSAGE_BYTES + 1000) + b'"}\xff')
    errors = 0
    message = peer.message()
    assert "error" in message
    peer.send(b'{"execute": "query-name", "id": 1}')
    while "error" in message:
        errors += 1
        message = peer.message()
    assert message["id"] == 1
    assert errors <= 2  # what was too long, and at most what was left of it


def test_sessions_are_bounded_and_the_refused_are_told(monitor: Monitor) -> None:
    peers = [monitor.qmp(negotiate=False) for _ in range(MAX_SESSIONS)]
    connect = type(peers[0])
    before = monitor.fds()
    for path in (monitor.qmp_path, monitor.jsonrpc_path):
        for _ in range(20):
            refused = connect(path)
            message = refused.message()
            assert f"There are {MAX_SESSIONS} monitor sessions" in str(message["error"])
            assert refused.message() is None
            refused.close()
    monitor.until(lambda: monitor.fds() == before)
    peers[0].close()
    monitor.until(lambda: len(monitor.server._sessions) == MAX_SESSIONS - 1)
    assert monitor.qmp().execute("query-status")["return"]["running"] is True


def test_a_reader_that_does_not_read_loses_events_is_told_and_slows_nobody(monitor: Monitor) -> None:
    slow, quick = monitor.qmp(), monitor.qmp()
    session = monitor.on_loop(lambda: monitor.server._sessions[1])
    count = 0
    while not monitor.on_loop(lambda: session._writer.backlog.lost_total):
        monitor.emit(*(_event(number) for number in range(count, count + 500)))
        for number in range(count, count + 500):
            assert quick.event()["data"]["device"] == f"d{number}"
        count += 500
        assert count < 200_000
    assert quick.execute("query-name") == {"return": {"name": "vm0"}}
    assert monitor.on_loop(lambda: session._writer.backlog.waiting) == MAX_EVENT_BACKLOG
    got = []
    while True:
        event = slow.event()
        if event["event"] == "EVENTS_LOST":
            break
        got.append(event["data"]["seq"])
    assert got == list(range(1, len(got) + 1))  # no gaps before the one that is named
    lost = event["data"]
    assert lost["first-seq"] == len(got) + 1
    assert lost["last-seq"] == count
    assert lost["count"] == lost["last-seq"] - lost["first-seq"] + 1
    assert lost["seq"] == lost["last-seq"]
    monitor.emit(_event(0))
    assert slow.event()["data"]["seq"] == count + 1
    infos = quick.execute("query-machine")["return"]
    assert [one["events-lost"] for one in infos["sessions"]] == [lost["count"], 0]


def test_a_reader_that_does_not_read_replies_is_not_read_and_slows_nobody(monitor: Monitor) -> None:
    slow, quick = monitor.qmp(), monitor.qmp()
    session = monitor.on_loop(lambda: monitor.server._sessions[1])
    slow.socket.setblocking(False)
    sent = 0
    request = b'{"execute":"query-qmp-schema"}'
    data = request * 100
    while True:  # until the server no longer takes any
        try:
            sent += slow.socket.send(data)
        except BlockingIOError:
            if monitor.on_loop(lambda: session._writer.full and not session._reading):
                break
    waiting = monitor.on_loop(lambda: session._writer.bytes_waiting)
    assert waiting < MAX_REPLY_BACKLOG + 2 * 1024 * 1024  # the last reply may pass the bound, one only
    assert quick.execute("query-status")["return"]["running"] is True
    slow.socket.settimeout(20)
    whole, rest = divmod(sent, len(request))
    for _ in range(whole):
        assert slow.line().startswith(b'{"return')
    if rest:
        slow.send(request[rest:])
        assert slow.line().startswith(b'{"return')
    assert slow.execute("query-name") == {"return": {"name": "vm0"}}


def test_a_flood_of_commands_leaves_others_their_turn(monitor: Monitor) -> None:
    flood, other = monitor.qmp(), monitor.qmp()
    flood.send(b'{"execute":"query-name"}' * 4000)
    assert other.execute("query-status")["return"]["running"] is True
    for _ in range(4000):
        assert flood.line()


@pytest.mark.parametrize("times", [1, 30])
def test_gone_in_the_middle_of_a_command(monitor: Monitor, times: int) -> None:
    before = monitor.fds()
    for _ in range(times):
        peer = monitor.jsonrpc()
        peer.send({"jsonrpc": "2.0", "method": "system_reset", "id": 1})
        peer.send({"jsonrpc": "2.0", "method": "device-reset", "params": {"id": "a"}, "id": 2})
        peer.send({"jsonrpc": "2.0", "method": "device-reset", "params": {"id": "a"}, "id": 3})
        assert peer.call("query-name")["id"] == 1
        peer.close()
    monitor.until(lambda: not monitor.server._sessions and monitor.fds() == before)
    assert len(monitor.gate.waiting) == 2 * times  # what had begun goes on; what had not was never begun
    for _ in range(2 * times):
        monitor.release()
    monitor.until(lambda: not monitor.server._tasks)
    assert monitor.gate.order.count("device-reset a") == times


def test_killed_peers_leak_nothing(monitor: Monitor) -> None:
    before = monitor.fds()
    script = textwrap.dedent(
        """
        import os, socket, sys, time
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(sys.argv[1])
        peer.recv(65536)
        peer.sendall(b'{"execute": "qmp_capabilities"}')
        peer.recv(65536)
        fds = [os.eventfd(0) for _ in range(10)]
        socket.send_fds(peer, [b'{"execute": "getfd", "arguments": {"fdname": "a"}}{"execute": "system_'], fds)
        peer.recv(65536)
        print("ready", flush=True)
        time.sleep(1000)
        """
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, monitor.qmp_path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert monitor.fds() > before
            process.kill()
        monitor.until(lambda: not monitor.server._sessions and monitor.fds() == before)


def test_half_closed_peers_end(monitor: Monitor) -> None:
    peer = monitor.qmp()
    peer.send(b'{"execute": "query-name"}')
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.message() == {"return": {"name": "vm0"}}
    assert peer.message() is None


def test_out_of_fds_for_another_session_waits_and_recovers(monitor: Monitor) -> None:
    first = monitor.qmp()
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(20)
    with waiting:
        with monitor.room_for(0):
            waiting.connect(monitor.qmp_path)
            monitor.until(lambda: any(one._retry is not None for one in monitor.server._listeners))
            assert first.execute("query-name") == {"return": {"name": "vm0"}}
        assert waiting.recv(65536).startswith(b'{"QMP"')
