"""fds over the monitor's socket: before or with their command, several, out again; none is ever lost or kept."""

from __future__ import annotations

import array
import os
import socket
from typing import Any

import pytest

from vfiod.protocol.catalogue import COMMANDS, Empty
from vfiod.protocol.catalogue.monitor import NameInfo
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_PENDING_FDS
from vfiod.server.monitor.dispatch import Method

Monitor = Any


@pytest.fixture
def event() -> Any:
    with FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC)) as fd:
        yield fd.number


@pytest.fixture
def memory() -> Any:
    with FileDescriptor(os.memfd_create("guest", os.MFD_CLOEXEC)) as fd:
        yield fd.number


def _result(peer: Any, command: str, *fds: int, **arguments: Any) -> Any:
    reply = peer.execute(command, *fds, **arguments)
    assert "return" in reply, reply
    return reply["return"]


def test_before_their_command_as_qemu_qmp_sends_them(monitor: Monitor, event: int) -> None:
    peer = monitor.qmp()
    peer.send(b" ", event)
    assert _result(peer, "getfd", fdname="a") == {"kind": "eventfd"}
    assert _result(peer, "closefd", fdname="a") == {}


def test_with_their_command(monitor: Monitor, memory: int) -> None:
    peer = monitor.qmp()
    assert _result(peer, "getfd", memory, fdname="a") == {"kind": "memfd"}


def test_several_at_once_and_several_times_in_order(monitor: Monitor, event: int, memory: int) -> None:
    peer = monitor.qmp()
    peer.send(b" ", event, memory)
    peer.send(b" ", memory)
    peer.send(b" ", event)
    kinds = [_result(peer, "getfd", fdname=f"n{index}")["kind"] for index in range(4)]
    assert kinds == ["eventfd", "memfd", "memfd", "eventfd"]
    assert peer.execute("getfd", fdname="n4")["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


def test_what_arrives_is_close_on_exec(monitor: Monitor, event: int) -> None:
    os.set_inheritable(event, True)
    peer = monitor.qmp()
    peer.send(b" ", event)
    _result(peer, "getfd", fdname="a")
    number = next(info["number"] for info in _result(peer, "query-fds") if info.get("name") == "a")
    assert not os.get_inheritable(number)


def test_names_belong_to_their_session(monitor: Monitor, event: int) -> None:
    peer, other = monitor.qmp(), monitor.qmp()
    _result(peer, "getfd", event, fdname="a")
    assert other.execute("closefd", fdname="a")["error"]["desc"] == "File descriptor named 'a' not found"
    owners = [(info["owner"], info.get("name")) for info in _result(other, "query-fds")]
    assert ("session:1", "a") in owners


def test_a_session_that_ends_closes_what_it_sent(monitor: Monitor, event: int, memory: int) -> None:
    before = monitor.fds()
    peer = monitor.qmp()
    _result(peer, "getfd", event, fdname="a")
    peer.send(b" ", event, memory)
    _result(peer, "query-status")
    peer.close()
    monitor.until(lambda: monitor.fds() == before)


def test_sets_outlive_their_session_and_are_the_machines(monitor: Monitor, event: int) -> None:
    peer = monitor.qmp()
    added = _result(peer, "add-fd", event, fdset_id=3, opaque="disk")
    assert (added["fdset-id"], added["kind"]) == (3, "eventfd")
    assert _result(peer, "add-fd", event)["fdset-id"] == 0
    peer.close()
    other = monitor.qmp()
    sets = _result(other, "query-fdsets")
    assert [one["fdset-id"] for one in sets] == [0, 3]
    assert sets[1]["fds"] == [{"fd": added["fd"], "kind": "eventfd", "opaque": "disk"}]
    assert {"owner": "fdset:3", "kind": "eventfd", "number": added["fd"]} in _result(other, "query-fds")
    assert _result(other, "remove-fd", fdset_id=3, fd=added["fd"]) == {}
    assert [one["fdset-id"] for one in _result(other, "query-fdsets")] == [0]
    reply = other.execute("add-fd", event, fdset_id=-1)
    assert reply["error"]["desc"] == "Parameter 'fdset-id' expects a non-negative value"


def test_query_fds_shows_waiting_ones_and_the_servers_own(monitor: Monitor, event: int, memory: int) -> None:
    peer = monitor.qmp()
    peer.send(b" ", event, memory)
    infos = _result(peer, "query-fds")
    waiting = [info for info in infos if info.get("pending")]
    assert [(info["owner"], info["kind"]) for info in waiting] == [("session:1", "eventfd"), ("session:1", "memfd")]
    own = {(info["name"], info["kind"]) for info in infos if info["owner"] == "server"}
    assert own == {
        ("session:1", "socket"),
        (monitor.qmp_path, "listening-socket"),
        (monitor.jsonrpc_path, "listening-socket"),
    }


def test_a_command_that_fails_leaves_the_name_one_that_succeeds_takes_it(monitor: Monitor, memory: int) -> None:
    os.truncate(memory, 8192)
    peer = monitor.qmp()
    _result(peer, "getfd", memory, fdname="ram")
    refused = peer.execute("object-add", **{"qom-type": "vfio-container", "id": "m0", "fd": "ram"})
    assert refused["error"]["desc"] == "Parameter 'fd': fd 'ram' is a memfd, expected vfio-container"
    assert _result(peer, "object-add", **{"qom-type": "memory-backend-fd", "id": "m0", "fd": "ram"}) == {}
    gone = peer.execute("closefd", fdname="ram")
    assert gone["error"]["desc"] == "File descriptor named 'ram' not found"


def test_more_than_may_wait_are_closed_and_said(monitor: Monitor, event: int) -> None:
    peer = monitor.qmp()
    before = monitor.fds()
    peer.send(b" ", *[event] * MAX_PENDING_FDS)
    monitor.until(lambda: monitor.fds() == before + MAX_PENDING_FDS)
    for _ in range(20):  # a flood: each is closed on arrival
        peer.send(b" ", *[event] * 200)
        assert "200 file descriptors were closed" in peer.message()["error"]["desc"]
    monitor.until(lambda: monitor.fds() == before + MAX_PENDING_FDS)
    assert _result(peer, "getfd", fdname="a") == {"kind": "eventfd"}


def test_fds_in_the_middle_of_a_request(monitor: Monitor, event: int) -> None:
    peer = monitor.qmp()
    peer.send(b'{"execute": "getfd", ')
    peer.send(b'"arguments": {"fdn', event)
    peer.send(b'ame": "a"}}')
    assert peer.message() == {"return": {"kind": "eventfd"}}


def test_without_room_for_fds_what_came_is_closed_and_said(monitor: Monitor, event: int) -> None:
    peer = monitor.qmp()
    before = monitor.fds()
    ready = array.array("i", [event] * 8)
    for free in (0, 3):
        with monitor.room_for(free):
            peer.socket.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ready)])
            message = peer.message()
        assert f"File descriptors were lost on arrival, {free} that came were closed" in message["error"]["desc"]
    monitor.until(lambda: monitor.fds() == before)
    assert _result(peer, "getfd", event, fdname="a") == {"kind": "eventfd"}


def _giving(monitor: Monitor, count: int) -> None:
    """``query-name`` now gives fds, and says how many in its name."""

    def give(call: Any, _arguments: Any) -> NameInfo:
        indexes = [call.attach(FileDescriptor(os.eventfd(index))) for index in range(count)]
        return NameInfo(name=",".join(map(str, indexes)))

    monitor.server.role("operator")["query-name"] = Method(COMMANDS["query-name"], give)


def test_replies_carry_fds_with_their_first_byte_alone(monitor: Monitor) -> None:
    _giving(monitor, 2)
    peer = monitor.qmp()
    request = b'{"execute":"%s"}'
    peer.send(request % b"query-status" + request % b"query-name" + request % b"query-status" + request % b"query-name")
    raw: list[tuple[bytes, int]] = []
    while sum(data.count(b"\n") for data, _ in raw) < 4:
        data, ancillary, _, _ = peer.socket.recvmsg(65536, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i", b"".join(part for _, _, part in ancillary))
        for fd in fds:
            os.close(fd)
        raw.append((data, len(fds)))
    # Linux hands out fds with the first byte of the message that brought them, and ends a read after them; what was
    # sent before may come in the same read. So: each read with fds ends in exactly the reply that names them.
    carrying = [data for data, fds in raw if fds]
    assert [fds for _, fds in raw if fds] == [2, 2]
    for data in carrying:
        assert data.rstrip().splitlines()[-1].find(b"0,1") > 0


def test_fds_of_a_dropped_reply_are_closed(monitor: Monitor) -> None:
    peer = monitor.qmp()
    before = monitor.fds()
    peer.send(b'{"execute":"system_reset"}')
    assert monitor.gate.entered.acquire(timeout=20)
    monitor.gate.entered.release()
    peer.close()
    monitor.until(lambda: not monitor.server._sessions)

    def give(call: Any) -> Empty:
        call.attach(FileDescriptor(os.eventfd(0)))
        return Empty()

    monitor.release(give)
    monitor.until(lambda: not monitor.server._tasks)
    monitor.until(lambda: monitor.fds() <= before - 2)  # neither end of the connection, nor the fd


def test_fds_of_a_failed_command_are_closed(monitor: Monitor) -> None:
    def fail(call: Any, _arguments: Any) -> Any:
        call.attach(FileDescriptor(os.eventfd(0)))
        raise RuntimeError("a defect")

    monitor.server.role("operator")["query-name"] = Method(COMMANDS["query-name"], fail)
    peer = monitor.qmp()
    before = monitor.fds()
    assert "error" in peer.execute("query-name")
    assert monitor.fds() == before


def test_unread_replies_with_fds_are_closed_with_their_session(monitor: Monitor) -> None:
    _giving(monitor, 4)
    before = monitor.fds()
    peer = monitor.qmp()
    session = monitor.on_loop(lambda: next(iter(monitor.server._sessions.values())))
    peer.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            peer.send(b'{"execute":"query-name"}' * 64)
            monitor.until(lambda: session._writer.blocked or session._writer.idle)
            if monitor.on_loop(lambda: session._writer.blocked):
                raise TimeoutError
    peer.close()
    monitor.until(lambda: monitor.fds() == before)
