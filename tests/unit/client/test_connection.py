"""The session without I/O, fed with literal bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.connection import MAX_UNCLAIMED, Connection, Dialect, State, Ticket
from vfiod.client.errors import ConnectionLost, ProtocolError
from vfiod.client.methods.values import IrqStartResult, RegionMapResult
from vfiod.protocol.catalogue.devices import DeviceAdd, DeviceAdded, QueryDevices
from vfiod.protocol.catalogue.interrupts import IrqStart
from vfiod.protocol.catalogue.memory import DmaMap, DmaMapResult
from vfiod.protocol.catalogue.monitor import QueryName, Quit
from vfiod.protocol.catalogue.regions import RegionMap
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": ""}, "capabilities": ["oob"]}}\r\n'
)

PIECES = [
    GREETING,
    b'{"return": {}, "id": 1}\r\n',
    b'{"return": {"map-fd": 0, "offset": 0, "size": 1, "areas": []}, "id": 2}\r\n',
    b'{"return": {"map-fd": 1, "offset": 0, "size": 1, "areas": []}, "id": 4}\r\n',
    b'{"jsonrpc": "2.0", "result": {"map-fd": 0, "offset": 0, "size": 1, "areas": []}, "id": 1}\r\n',
    b'{"jsonrpc": "2.0", "result": {"kind": "file"}, "id": 2}\r\n',
    b'{"error": {"class": "GenericError", "desc": "no"}, "id": 3}\r\n',
    b'{"return": {"a-fd": 0, "b": [{"c-fd": 0}]}, "id": 99}\r\n',
    b'{"event": "SHUTDOWN", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}\r\n',
    b'{"return": ',
]


def sent(connection: Connection) -> list[tuple[list[Any], int]]:
    """What is to be sent: the requests of each message, and how many fds go with it. It has gone then."""
    messages = []
    out = connection.data_to_send()
    while out:
        message = out.popleft()
        text = message.data.decode()
        requests = [json.loads(line) for line in text.split("\n") if line.strip()]
        messages.append((requests, len(message.fds)))
        message.close()
    return messages


def answer(connection: Connection, **members: Any) -> None:
    connection.receive_data(json.dumps(members).encode() + b"\r\n")


def pipe_fds(count: int) -> list[FileDescriptor]:
    fds = []
    for _ in range(count):
        reader, writer = os.pipe()
        os.close(writer)
        fds.append(FileDescriptor(reader))
    return fds


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@pytest.fixture
def connection() -> Iterator[Connection]:
    """One that has negotiated; the next id is 2."""
    made = Connection()
    made.receive_data(GREETING)
    assert sent(made) == [([{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}], 0)]
    answer(made, **{"return": {}, "id": 1})
    assert made.state is State.READY
    yield made
    made.fail(ConnectionLost("the test is over"))


class TestNegotiation:
    def test_version_and_bands(self, connection: Connection) -> None:
        assert connection.version is not None
        assert connection.version.qemu.minor == 2
        assert connection.oob_enabled

    def test_byte_by_byte(self) -> None:
        connection = Connection()
        for byte in GREETING:
            connection.receive_data(bytes([byte]))
        assert connection.state is State.NEGOTIATING

    def test_no_oob_offered(self) -> None:
        connection = Connection()
        connection.receive_data(GREETING.replace(b'"oob"', b""))
        assert sent(connection) == [([{"execute": "qmp_capabilities", "id": 1}], 0)]
        answer(connection, **{"return": {}, "id": 1})
        with pytest.raises(ValueError, match="out-of-band"):
            connection.start(QueryName(), oob=True)

    def test_refused(self) -> None:
        connection = Connection()
        connection.receive_data(GREETING)
        answer(connection, error={"class": "GenericError", "desc": "no"}, id=1)
        assert isinstance(connection.error, ProtocolError)

    def test_not_before(self) -> None:
        connection = Connection()
        with pytest.raises(ConnectionLost, match="waiting for the greeting"):
            connection.start(QueryName())

    def test_greeting_twice(self, connection: Connection) -> None:
        connection.receive_data(GREETING)
        assert isinstance(connection.error, ProtocolError)

    @pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\r\n", b'{"hello": 1}\r\n'])
    def test_somebody_else(self, data: bytes) -> None:
        connection = Connection()
        connection.receive_data(data)
        assert isinstance(connection.error, ProtocolError)

    def test_jsonrpc_needs_none(self) -> None:
        connection = Connection(Dialect.JSONRPC)
        ticket = connection.start(QueryName(), oob=True)
        assert sent(connection) == [([{"jsonrpc": "2.0", "method": "query-name", "params": {}, "id": 1}], 0)]
        answer(connection, jsonrpc="2.0", result={"name": "vm"}, id=1)
        assert ticket.result().name == "vm"


class TestCommands:
    def test_typed(self, connection: Connection) -> None:
        ticket = connection.start(DmaMap(iova=4096, size=8192, memory_backend="ram"))
        expected = {
            "execute": "dma-map",
            "arguments": {"iova": 4096, "size": 8192, "memory-backend": "ram"},
            "id": 2,
        }
        assert sent(connection) == [([expected], 0)]
        assert not ticket.done
        answer(connection, **{"return": {"iova": 4096, "size": 8192}, "id": 2})
        assert ticket.result() == DmaMapResult(iova=4096, size=8192)

    def test_by_name(self, connection: Connection) -> None:
        ticket = connection.start("x-unheard-of", {"a": [1, None]}, oob=True)
        assert sent(connection) == [([{"exec-oob": "x-unheard-of", "arguments": {"a": [1, None]}, "id": 2}], 0)]
        answer(connection, **{"return": [True], "id": 2})
        assert ticket.result() == [True]

    def test_out_of_order(self, connection: Connection) -> None:
        first, second = connection.start(QueryName()), connection.start(QueryName(), oob=True)
        answer(connection, **{"return": {"name": "second"}, "id": 3})
        answer(connection, **{"return": {"name": "first"}, "id": 2})
        assert (first.result().name, second.result().name) == ("first", "second")

    def test_error(self, connection: Connection) -> None:
        ticket = connection.start(QueryDevices(id="x"))
        answer(connection, error={"class": "DeviceNotFound", "desc": "Device 'x' not found", "errno": "ENODEV"}, id=2)
        with pytest.raises(RemoteError) as caught:
            ticket.result()
        error = caught.value
        assert (error.command, error.remote_class, error.desc, error.errno) == (
            "query-devices", "DeviceNotFound", "Device 'x' not found", "ENODEV",
        )  # fmt: skip

    def test_not_done_yet(self, connection: Connection) -> None:
        with pytest.raises(RuntimeError, match="under way"):
            connection.start(QueryName()).result()

    def test_result_of_another_version(self, connection: Connection) -> None:
        ticket = connection.start(QueryName())
        answer(connection, **{"return": {"title": "vm"}, "id": 2})
        with pytest.raises(ProtocolError, match="query-name"):
            ticket.result()
        assert connection.error is None, "one answer was not understood; the session is in step"

    def test_unknown_members_are_passed_over(self, connection: Connection) -> None:
        ticket = connection.start(QueryName())
        answer(connection, **{"return": {"name": "vm", "since-next-year": 1}, "id": 2})
        assert ticket.result().name == "vm"

    def test_unknown_id_is_dropped(self, connection: Connection) -> None:
        answer(connection, **{"return": {}, "id": 77})
        answer(connection, **{"return": {}, "id": "mine?"})
        answer(connection, **{"return": {}})
        assert connection.error is None

    def test_error_without_id(self, connection: Connection) -> None:
        ticket = connection.start(QueryName())
        answer(connection, error={"class": "GenericError", "desc": "JSON parse error"})
        with pytest.raises(ProtocolError, match="JSON parse error"):
            ticket.result()

    def test_done_is_told_once(self, connection: Connection) -> None:
        told: list[str] = []
        connection.start(QueryName(), on_done=lambda: told.append("done"))
        answer(connection, **{"return": {"name": "vm"}, "id": 2})
        connection.fail(ConnectionLost("gone"))
        assert told == ["done"]


class TestEnd:
    def test_eof_tells_every_command(self, connection: Connection) -> None:
        tickets = [connection.start(QueryName()), connection.start(QueryDevices())]
        connection.receive_eof()
        for ticket, name in zip(tickets, ("query-name", "query-devices"), strict=True):
            with pytest.raises(ConnectionLost, match=f"before {name} was answered"):
                ticket.result()
        with pytest.raises(ConnectionLost):
            connection.start(QueryName())

    def test_eof_answers_quit(self, connection: Connection) -> None:
        typed, named = connection.start(Quit()), connection.start("quit")
        connection.receive_eof()
        assert typed.result() is not None
        assert named.result() == {}

    def test_nonsense_does_not_answer_quit(self, connection: Connection) -> None:
        ticket = connection.start(Quit())
        connection.receive_data(b"nonsense}\r\n")
        with pytest.raises(ProtocolError):
            ticket.result()

    def test_nothing_after_the_end(self, connection: Connection) -> None:
        ticket = connection.start(QueryName())
        connection.fail(ConnectionLost("gone"))
        (fd,) = pipe_fds(1)
        connection.receive_data(b'{"return": {"name": "late"}, "id": 2}\r\n', [fd])
        assert fd.closed
        with pytest.raises(ConnectionLost):
            ticket.result()


class TestEvents:
    def test_typed(self, connection: Connection) -> None:
        answer(
            connection,
            timestamp={"seconds": 10, "microseconds": 500000},
            event="DEVICE_ADDED",
            data={"device": "nic0", "path": "/machine/peripheral/nic0", "seq": 7},
        )
        (event,) = connection.events_received()
        assert event.data == DeviceAdded(device="nic0", path="/machine/peripheral/nic0")
        assert (event.name, event.seq, event.timestamp, event.local) == ("DEVICE_ADDED", 7, 10.5, False)
        assert connection.events_received() == []

    def test_unknown(self, connection: Connection) -> None:
        answer(connection, timestamp={"seconds": -1, "microseconds": -1}, event="COMET_SEEN", data={"tail": True})
        answer(connection, timestamp={"seconds": 1, "microseconds": 0}, event="STOP")
        comet, stop = connection.events_received()
        assert (comet.data, comet.seq, comet.timestamp) == ({"tail": True}, None, -1)
        assert stop.data == {}

    def test_jsonrpc(self) -> None:
        connection = Connection(Dialect.JSONRPC)
        params = {"device": "a", "path": "/p", "seq": 3, "timestamp": {"seconds": 1, "microseconds": 0}}
        answer(connection, jsonrpc="2.0", method="DEVICE_ADDED", params=params)
        (event,) = connection.events_received()
        assert (event.data, event.seq, event.timestamp) == (DeviceAdded(device="a", path="/p"), 3, 1.0)

    def test_malformed(self, connection: Connection) -> None:
        answer(connection, timestamp={"seconds": 1, "microseconds": 0}, event="DEVICE_ADDED", data={"path": 5})
        assert isinstance(connection.error, ProtocolError)


class TestSendingFds:
    def start(self, connection: Connection, names: list[str]) -> tuple[Ticket, list[FileDescriptor]]:
        fds = pipe_fds(len(names))
        arguments = {"fds": names}
        return connection.start("x-take", arguments, fds=dict(zip(names, fds, strict=True))), fds

    def test_names_first(self, connection: Connection) -> None:
        ticket, fds = self.start(connection, ["a", "b"])
        getfds = [
            {"execute": "getfd", "arguments": {"fdname": "a"}, "id": 2},
            {"execute": "getfd", "arguments": {"fdname": "b"}, "id": 3},
        ]
        assert sent(connection) == [(getfds, 2)]
        assert all(not fd.closed for fd in fds), "fds are lent"
        answer(connection, **{"return": {"kind": "pipe"}, "id": 2})
        assert sent(connection) == []
        answer(connection, **{"return": {"kind": "pipe"}, "id": 3})
        assert sent(connection) == [([{"execute": "x-take", "arguments": {"fds": ["a", "b"]}, "id": 4}], 0)]
        answer(connection, **{"return": {}, "id": 4})
        assert ticket.result() == {}
        assert sent(connection) == [], "the command consumed the names"
        for fd in fds:
            fd.close()

    def test_the_caller_may_close_at_once(self, connection: Connection) -> None:
        _, fds = self.start(connection, ["a"])
        fds[0].close()
        (message,) = connection.data_to_send()
        assert is_open(message.fds[0].number)

    def test_failure_forgets_the_names(self, connection: Connection) -> None:
        ticket, fds = self.start(connection, ["a"])
        answer(connection, **{"return": {"kind": "pipe"}, "id": 2})
        sent(connection)
        answer(connection, error={"class": "GenericError", "desc": "no"}, id=3)
        assert sent(connection) == [([{"execute": "closefd", "arguments": {"fdname": "a"}, "id": 4}], 0)]
        assert not ticket.done, "the caller may open the same file again at once: the server has closed it by then"
        answer(connection, error={"class": "GenericError", "desc": "File descriptor named 'a' not found"}, id=4)
        with pytest.raises(RemoteError):
            ticket.result()
        assert connection.error is None
        fds[0].close()

    def test_a_dry_run_leaves_no_name(self, connection: Connection) -> None:
        (fd,) = pipe_fds(1)
        arguments = DeviceAdd(driver="vfio-pci", host="0000:01:00.0", group_fd="g", x_dry_run=True)
        ticket = connection.start(arguments, fds={"g": fd.number})
        answer(connection, **{"return": {"kind": "pipe"}, "id": 2})
        sent(connection)
        answer(connection, **{"return": {"possible": True, "checks": []}, "id": 3})
        assert sent(connection) == [([{"execute": "closefd", "arguments": {"fdname": "g"}, "id": 4}], 0)]
        answer(connection, **{"return": {}, "id": 4})
        assert ticket.result().possible is True
        fd.close()

    def test_a_name_is_refused(self, connection: Connection) -> None:
        ticket, fds = self.start(connection, ["a", "1b"])
        sent(connection)
        answer(connection, **{"return": {"kind": "pipe"}, "id": 2})
        answer(connection, error={"class": "GenericError", "desc": "not starting with a digit"}, id=3)
        ((closed, _),) = sent(connection)
        assert [request["execute"] for request in closed] == ["closefd", "closefd"]
        for request in closed:
            answer(connection, **{"return": {}, "id": request["id"]})
        with pytest.raises(RemoteError, match="getfd"):
            ticket.result()
        for fd in fds:
            fd.close()

    def test_pending_fds_are_bounded(self, connection: Connection) -> None:
        many = [f"n{number}" for number in range(200)]
        _, first = self.start(connection, many)
        second, more = self.start(connection, ["m" + name for name in many])
        assert [count for _, count in sent(connection)] == [200], "400 would be more than a server keeps"
        for number in range(2, 202):
            answer(connection, **{"return": {"kind": "pipe"}, "id": number})
        assert [count for _, count in sent(connection)] == [0, 200]
        connection.abandon(second)
        for fd in first + more:
            fd.close()

    def test_abandoned_before_it_was_sent(self, connection: Connection) -> None:
        _, first = self.start(connection, [f"n{number}" for number in range(200)])
        second, more = self.start(connection, [f"m{number}" for number in range(100)])
        connection.abandon(second)
        assert second.done
        assert [count for _, count in sent(connection)] == [200]
        for number in range(2, 202):
            answer(connection, **{"return": {"kind": "pipe"}, "id": number})
        assert [count for _, count in sent(connection)] == [0], "the first one's command, and nothing of the second"
        for fd in first + more:
            fd.close()

    def test_abandoned_while_naming(self, connection: Connection) -> None:
        ticket, fds = self.start(connection, ["a"])
        sent(connection)
        connection.abandon(ticket)
        answer(connection, **{"return": {"kind": "pipe"}, "id": 2})
        assert sent(connection) == [([{"execute": "closefd", "arguments": {"fdname": "a"}, "id": 3}], 0)]
        fds[0].close()

    def test_attached(self, connection: Connection) -> None:
        (fd,) = pipe_fds(1)
        with fd:
            connection.start("getfd", {"fdname": "a"}, attach=[fd])
            assert sent(connection) == [([{"execute": "getfd", "arguments": {"fdname": "a"}, "id": 2}], 1)]

    def test_ahead(self, connection: Connection) -> None:
        with pipe_fds(1)[0] as fd:
            connection.send_fds([fd])
        (message,) = connection.data_to_send()
        assert (bytes(message.data), len(message.fds)) == (b" ", 1)

    @pytest.mark.parametrize("count", [254, 1000])
    def test_too_many(self, connection: Connection, count: int) -> None:
        with pytest.raises(ValueError, match="253"):
            connection.start("x", fds=dict.fromkeys(map(str, range(count)), 0))

    def test_not_open(self, connection: Connection) -> None:
        (fd,) = pipe_fds(1)
        number = 1_000_000
        fd.close()
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError, match="fd 1 of the call"):
            connection.start("x", fds={"good": 0, "bad": number})
        with pytest.raises(ValueError, match="closed"):
            connection.start("x", fds={"good": 0, "bad": fd})
        assert sent(connection) == []
        assert len(os.listdir("/proc/self/fd")) == len(before)


class TestReceivingFds:
    def test_typed(self, connection: Connection) -> None:
        ticket = connection.start(RegionMap(device="d", region="bar0"))
        (fd,) = pipe_fds(1)
        value = {"map-fd": 0, "offset": 0, "size": 4096, "areas": [{"offset": 0, "size": 4096}]}
        connection.receive_data(json.dumps({"return": value, "id": 2}).encode() + b"\r\n", [fd])
        with ticket.result() as result:
            assert isinstance(result, RegionMapResult)
            assert result.map_fd is fd
            assert is_open(fd.number)
        assert fd.closed

    def test_earlier_bytes_in_the_same_read(self, connection: Connection) -> None:
        """Linux merges plain bytes before a message with fds into one read: position says nothing."""
        plain = connection.start(QueryName())
        first = connection.start(IrqStart(device="d"))
        second = connection.start(RegionMap(device="d", region="bar0"))
        fds = pipe_fds(3)
        irq = {"device": "d", "index": 0, "vector": 0, "mode": "relayed", "trigger-fd": 1, "resample-fd": 0}
        mapped = {"map-fd": 0, "offset": 0, "size": 1, "areas": []}
        replies = [({"name": "x"}, 2), ({"irqs": [irq]}, 3), (mapped, 4)]
        data = b"".join(json.dumps({"return": value, "id": number}).encode() + b"\r\n" for value, number in replies)
        connection.receive_data(data[:-30], fds)
        connection.receive_data(data[-30:])
        assert plain.result().name == "x"
        with first.result() as started, second.result() as area:
            assert isinstance(started, IrqStartResult)
            assert (started.irqs[0].trigger_fd, started.irqs[0].resample_fd) == (fds[1], fds[0])
            assert area.map_fd is fds[2]

    def test_by_name(self, connection: Connection) -> None:
        ticket = connection.start("x-other")
        fds = pipe_fds(2)
        value = {"list": [{"some-fd": 1}, {"some-fd": 0}], "fd": 7, "share-fd": True}
        connection.receive_data(json.dumps({"return": value, "id": 2}).encode(), fds)
        connection.receive_data(b"\r\n")
        result = ticket.result()
        assert result == {"list": [{"some-fd": fds[1]}, {"some-fd": fds[0]}], "fd": 7, "share-fd": True}
        for fd in fds:
            fd.close()

    def test_abandoned(self, connection: Connection) -> None:
        """A reply nobody waits for takes its fds with it; the next reply gets its own."""
        late = connection.start(RegionMap(device="d", region="bar0"))
        connection.abandon(late)
        wanted = connection.start(RegionMap(device="d", region="bar0"))
        fds = pipe_fds(2)
        for number, fd in zip((2, 3), fds, strict=True):
            value = {"map-fd": 0, "offset": 0, "size": 1, "areas": []}
            connection.receive_data(json.dumps({"return": value, "id": number}).encode() + b"\r\n", [fd])
        assert fds[0].closed
        with wanted.result() as result:
            assert result.map_fd is fds[1]

    def test_abandoned_when_done(self, connection: Connection) -> None:
        ticket = connection.start(RegionMap(device="d", region="bar0"))
        fds = pipe_fds(1)
        value = {"map-fd": 0, "offset": 0, "size": 1, "areas": []}
        connection.receive_data(json.dumps({"return": value, "id": 2}).encode() + b"\r\n", fds)
        connection.abandon(ticket)
        assert fds[0].closed

    def test_unclaimed_are_closed(self, connection: Connection) -> None:
        fds = pipe_fds(2)
        ticket = connection.start(QueryName())
        connection.receive_data(b'{"return": {"name": "x"}, "id": 2}\r\n', fds)
        assert ticket.result().name == "x"
        assert all(fd.closed for fd in fds)

    def test_missing(self, connection: Connection) -> None:
        ticket = connection.start(RegionMap(device="d", region="bar0"))
        answer(connection, **{"return": {"map-fd": 0, "offset": 0, "size": 1, "areas": []}, "id": 2})
        with pytest.raises(ProtocolError, match="0 came with it"):
            ticket.result()
        assert connection.error is not None, "whose the next fd is can no longer be told"

    @pytest.mark.parametrize("indexes", [(0, 0), (-1, 0)])
    def test_one_index_twice(self, connection: Connection, indexes: tuple[int, int]) -> None:
        ticket = connection.start(IrqStart(device="d"))
        (fd,) = pipe_fds(1)
        irqs = [
            {"device": "d", "index": 1, "vector": v, "mode": "direct", "trigger-fd": index}
            for v, index in enumerate(indexes)
        ]
        connection.receive_data(json.dumps({"return": {"irqs": irqs}, "id": 2}).encode() + b"\r\n", [fd])
        with pytest.raises(ProtocolError, match="refers to fd"):
            ticket.result()
        assert fd.closed

    def test_a_huge_index(self, connection: Connection) -> None:
        ticket = connection.start("x")
        answer(connection, **{"return": {"a-fd": 10**15}, "id": 2})
        with pytest.raises(ProtocolError):
            ticket.result()

    def test_of_another_version(self, connection: Connection) -> None:
        """An answer that is not understood still takes its fds."""
        ticket = connection.start(RegionMap(device="d", region="bar0"))
        (fd,) = pipe_fds(1)
        connection.receive_data(b'{"return": {"map-fd": 0, "place": 0}, "id": 2}\r\n', [fd])
        with pytest.raises(ProtocolError):
            ticket.result()
        assert fd.closed
        assert connection.error is None

    def test_truncated(self, connection: Connection) -> None:
        (fd,) = pipe_fds(1)
        connection.receive_data(b"{", [fd], truncated=True)
        assert fd.closed
        assert isinstance(connection.error, ProtocolError)

    def test_a_flood(self, connection: Connection) -> None:
        ends = [os.pipe() for _ in range(2)]
        fds = [FileDescriptor.duplicate_of(0) for _ in range(MAX_UNCLAIMED + 1)]
        for pair in ends:
            os.close(pair[0])
            os.close(pair[1])
        connection.receive_data(b'{"return": ', fds)
        assert isinstance(connection.error, ProtocolError)
        assert all(fd.closed for fd in fds)


class TestNonsense:
    """A server that is broken, or hostile: no exception comes out of the connection, and no fd stays open."""

    @given(
        st.lists(st.tuples(st.one_of(st.binary(max_size=60), st.sampled_from(PIECES)), st.integers(0, 2)), max_size=12),
        st.sampled_from(Dialect),
    )
    def test_any_bytes_and_fds(self, reads: list[tuple[bytes, int]], dialect: Dialect) -> None:
        connection = Connection(dialect)
        tickets: list[Ticket] = []
        given: list[FileDescriptor] = []
        for data, count in reads:
            if connection.state is State.READY:
                tickets.append(connection.start(RegionMap(device="d", region=0)))
                tickets.append(connection.start("x", fds={"a": 0}))
            fds = [FileDescriptor.duplicate_of(0) for _ in range(count)]
            given += fds
            connection.receive_data(data, fds)
            connection.events_received()
            sent(connection)
        connection.receive_eof()
        assert all(ticket.done for ticket in tickets)
        for ticket in tickets:
            connection.abandon(ticket)  # closes what it got, if it got something
        assert all(fd.closed for fd in given)


@pytest.mark.parametrize("depth", [600, 900, 1000, 5000, 100_000])
def test_a_reply_nested_deep(connection: Connection, depth: int) -> None:
    """Understood, or the connection ends, as fds in it could not be told from those of the next reply."""
    ticket = connection.start("x-new")
    connection.receive_data(b'{"return":' + b"[" * depth + b"]" * depth + b',"id":2}\r\n')
    assert ticket.done
    if connection.state is State.READY:
        ticket.result()
    else:
        with pytest.raises(ProtocolError):
            ticket.result()


@pytest.mark.parametrize("depth", [900, 5000])
def test_an_event_nested_deep(connection: Connection, depth: int) -> None:
    stamp = b',"timestamp":{"seconds":1,"microseconds":2}}\r\n'
    connection.receive_data(b'{"event":"X_NEW","data":{"a":' + b"[" * depth + b"]" * depth + b"}" + stamp)
    assert connection.events_received() or connection.state is not State.READY


def test_a_slow_server_that_is_asked_goes_on_as_any() -> None:
    """The question is refused after the greeting, and that is all."""
    connection = Connection(Dialect.QMP)
    connection.ask()
    [([question], _)] = sent(connection)
    assert question["execute"] == "query-version"
    connection.receive_data(GREETING)
    answer(connection, error={"class": "CommandNotFound", "desc": "Expecting capabilities"}, id=question["id"])
    [([negotiation], _)] = sent(connection)
    assert negotiation["execute"] == "qmp_capabilities"
    answer(connection, **{"return": {}}, id=negotiation["id"])
    assert connection.state is State.READY and connection.oob_enabled
    connection.ask()
    assert sent(connection) == []


@pytest.mark.parametrize(
    ("dialect", "heard", "said"),
    [
        (Dialect.QMP, b'{"jsonrpc": "2.0", "error": {"code": -32600, "message": ""}, "id": null}\n', "give --jsonrpc"),
        (Dialect.JSONRPC, GREETING, "speaks QMP, not JSON-RPC: leave out --jsonrpc"),
    ],
)
def test_the_other_dialect_is_named(dialect: Dialect, heard: bytes, said: str) -> None:
    connection = Connection(dialect)
    connection.receive_data(heard)
    assert isinstance(connection.error, ProtocolError) and said in str(connection.error)
