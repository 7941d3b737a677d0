"""The bus against a real server: calls in msgpack over ZeroMQ, events by topic, and peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import msgspec
import pytest
import zmq
from tests.integration.terminal.screen import PROGRAM

from vfiod.client.bus import AsyncBus, Bus, EventReader
from vfiod.client.errors import RequestTimedOut
from vfiod.client.events import Event
from vfiod.client.serve import server_command
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.catalogue.monitor import EventsLost
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.limits import BUS_QUEUE, MAX_BUS_FRAMES, MAX_BUS_IN_FLIGHT
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine.root import Machine
from vfiod.server.monitor.bus import FRAMES_IN_TURN, EventBus
from vfiod.server.monitor.bus_socket import Address
from vfiod.server.monitor.server import MonitorServer
from vfiod.server.sockets.access import Access

PATIENCE = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    tmp_path.chmod(0o700)
    arguments = ["--bus", f"ipc:{tmp_path}/bus", "--events", f"ipc:{tmp_path}/events"]
    with own_server(tmp_path, arguments, name="vm1") as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()
    assert not (tmp_path / "bus").exists()
    assert not (tmp_path / "events").exists()


def bus_of(server: OwnServer) -> str:
    return f"ipc:{server.path.parent}/bus"


def events_of(server: OwnServer) -> str:
    return f"ipc:{server.path.parent}/events"


def add(bus: Bus, name: str) -> None:
    bus.device_add(driver="vfio-pci", id=name, mdev=bus.mdev_create(parent="primer", type="primer-pci").uuid)


def test_what_the_bus_refuses_is_in_the_audit_log(tmp_path: Path) -> None:
    """Before it began, too: as at the monitor's sockets."""
    tmp_path.chmod(0o700)
    arguments = ["--bus", f"ipc:{tmp_path}/bus", "--audit", str(tmp_path / "audit")]
    with own_server(tmp_path, arguments, name="vm1") as server, Bus(bus_of(server)) as bus:
        with pytest.raises(RemoteError):
            bus.execute("device_del", {"id": 5})
        with pytest.raises(RemoteError):
            bus.execute("query-devices", {"id": 5})  # changes nothing
        assert "Error" in bus.human_monitor_command(command_line="device_del nope")
    said = [msgspec.json.decode(line) for line in (tmp_path / "audit").read_text().splitlines()]
    noted = [(one["command"], one["ok"]) for one in said if one["dialect"] == "bus"]
    assert noted == [("device_del", False), ("device_del", False)]


def test_every_kind_of_answer(server: OwnServer) -> None:
    """Results typed, bytes as bytes, errors with their class and errno, the schema that is kept as JSON."""
    with Bus(bus_of(server)) as bus:
        assert bus.query_name().name == "vm1"
        add(bus, "n0")
        bus.region_write(device="n0", region="bar2", offset=16, data=b"\x00\xff\x80bus")
        assert bus.region_read(device="n0", region="bar2", offset=16, length=6).data == b"\x00\xff\x80bus"
        assert bus.execute("region-read", {"device": "n0", "region": "bar0", "offset": 0, "size": 4}) == {
            "value": 0xF10D0001
        }
        assert len(bus.execute("query-qmp-schema")) > 100
        with pytest.raises(RemoteError, match="Device 'zz' not found") as caught:
            bus.device_del(id="zz")
        assert caught.value.remote_class == "DeviceNotFound"
        with pytest.raises(RemoteError, match="expected: integer"):
            bus.execute("dma-unmap", {"iova": "x", "size": 4096})
        with pytest.raises(RemoteError, match="The command nope has not been found"):
            bus.execute("nope")
        with pytest.raises(RemoteError, match="Parameter 'z' is unexpected"):
            bus.execute("query-name", {"z": 1})


def test_memory_comes_by_fd_set(server: OwnServer, tmp_path: Path) -> None:
    """fds go over the Unix socket, and the bus refers to them."""
    memory = os.memfd_create("guest")
    os.ftruncate(memory, 1 << 20)
    try:
        with Client.connect(server.path) as client, Bus(bus_of(server)) as bus:
            with pytest.raises(RemoteError, match="this connection carries no fds"):
                bus.execute("dma-map", {"iova": 0, "size": 4096, "fd": "memory"})
            number = client.execute("add-fd", attach=[memory])["fdset-id"]
            bus.execute("dma-map", {"iova": 0, "size": 1 << 20, "fd": f"/dev/fdset/{number}"})
            assert [one.size for one in bus.query_dma()] == [1 << 20]
    finally:
        os.close(memory)


def test_many_calls_in_flight(server: OwnServer) -> None:
    """Four devices at once, sixty calls each; those for one device run in their order."""

    async def scenario() -> None:
        async with AsyncBus(bus_of(server)) as bus:
            for index in range(4):
                uuid = (await bus.mdev_create(parent="primer", type="primer-pci")).uuid
                await bus.device_add(driver="vfio-pci", id=f"n{index}", mdev=uuid)

            async def storm(device: str) -> None:
                calls = []
                for value in range(12):
                    calls.append(bus.region_write(device=device, region="bar2", offset=0, data=bytes([value]) * 8192))
                await asyncio.gather(*calls)
                data = (await bus.region_read(device=device, region="bar2", offset=0, length=8192)).data
                assert data == b"\x0b" * 8192

            await asyncio.gather(*(storm(f"n{index}") for index in range(4)))

    asyncio.run(scenario())


def until_heard(bus: Bus, *readers: EventReader) -> None:
    """A subscription takes effect when it arrives, and ZeroMQ gives no sign of that: events until one comes.

    All of them are of device ``probe``, which nothing else in the test touches: :func:`following` passes them over.
    """
    deadline = time.monotonic() + PATIENCE
    for reader in readers:
        while True:
            assert time.monotonic() < deadline
            bus.device_reset(id="probe")
            with contextlib.suppress(RequestTimedOut):
                reader.get_now(timeout=0.1)
                break


def following(reader: EventReader) -> Event:
    """The next event that is not of ``probe``."""
    while True:
        event = reader.get_now(timeout=PATIENCE)
        if getattr(event.data, "device", None) != "probe":
            return event


def test_events_by_topic(server: OwnServer) -> None:
    """A reader of one topic gets that one; a reader of all gets each, numbered without a gap."""
    with (
        Bus(bus_of(server)) as bus,
        EventReader(events_of(server), "DEVICE_ADDED/n1", "DEVICE_RESET/probe") as some,
        EventReader(events_of(server)) as every,
    ):
        add(bus, "probe")
        until_heard(bus, some, every)
        for name in ("n0", "n1"):
            add(bus, name)
        event = following(some)
        assert (event.name, event.data) == ("DEVICE_ADDED", DeviceAdded(device="n1", path="/machine/peripheral/n1"))
        seqs = [following(every).seq for _ in range(2)]
        assert None not in seqs and seqs[1] == event.seq
        with pytest.raises(RequestTimedOut):
            some.get_now(timeout=0.05)


def monitor_of(server: OwnServer, *words: str) -> list[str]:
    return [*PROGRAM, "monitor", bus_of(server), *words]


def test_the_monitor_in_a_pipe_shows_events(server: OwnServer) -> None:
    """Answers and events, a line of JSON each."""
    with Bus(bus_of(server)) as bus:
        add(bus, "n0")
    command = monitor_of(server, "-e", "--bus-events", events_of(server))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdin is not None
        assert monitor.stdout is not None
        heard: list[str] = []
        while "DEVICE_RESET" not in heard:  # a subscription takes effect when it arrives
            monitor.stdin.write("device-reset id=n0\n")
            monitor.stdin.flush()
            while "return" not in (line := json.loads(monitor.stdout.readline())):
                heard.append(line["event"])
        monitor.stdin.close()
        assert monitor.wait(PATIENCE) == 0
        assert set(heard) == {"DEVICE_RESET"}


def test_the_monitor_says_where_events_of_a_bus_are(server: OwnServer) -> None:
    done = subprocess.run(monitor_of(server, "-e"), input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vfiod monitor: A bus has its events elsewhere: with -e, add --bus-events ADDRESS")


def test_the_monitor_says_that_nobody_publishes(server: OwnServer, tmp_path: Path) -> None:
    nowhere = f"ipc:{tmp_path}/nowhere"
    done = subprocess.run(
        monitor_of(server, "-e", "--bus-events", nowhere), input="query-name\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vfiod monitor: Nobody publishes on {nowhere}; 'vfiod serve --events {nowhere}' does\n"


def test_a_reader_that_missed_some_is_told(server: OwnServer) -> None:
    """What is missing between two numbers is named."""
    with EventReader(events_of(server)) as every, zmq.Context() as context, context.socket(zmq.XPUB) as other:
        other.bind(f"ipc://{server.path.parent}/other")
        every._socket.connect(f"ipc://{server.path.parent}/other")
        assert other.recv() == b"\x01", "the subscription to everything"
        for seq in (5, 9):
            stamp = {"seconds": 1, "microseconds": 0}
            params = {"path": "/p", "seq": seq, "timestamp": stamp}
            message = {"jsonrpc": "2.0", "method": "DEVICE_ADDED", "params": params}
            other.send_multipart([b"DEVICE_ADDED/", msgpack.packb(message)])
        assert every.get_now(timeout=PATIENCE).seq == 5
        lost = every.get_now(timeout=PATIENCE)
        assert (lost.local, lost.data) == (True, EventsLost(count=3, first_seq=6, last_seq=8))
        assert every.get_now(timeout=PATIENCE).seq == 9


def test_a_reader_that_stops_costs_itself_alone(tmp_path: Path) -> None:
    """Its queue fills, what follows is dropped for it, and it is told; another reader gets each event."""
    tmp_path.chmod(0o700)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        hub = EventHub(loop.call_later)
        machine = Machine("vm0", hub=hub)
        door = EventBus(MonitorServer(loop, machine, hub, Access(), kind_of, TABLE), Address(path=f"{tmp_path}/events"))
        address = door.name
        with EventReader(address) as every, EventReader(address) as asleep:
            publish_until_heard(hub, every, asleep)
            count = BUS_QUEUE
            while not publish(hub, every, asleep, count):
                count *= 2  # it had room for all of them
        door.close()
        assert await machine.close() == []

    asyncio.run(scenario())


def publish_until_heard(hub: EventHub, *readers: EventReader) -> None:
    for reader in readers:
        while True:
            hub.emit(DeviceAdded(path="/probe", device="probe"))
            with contextlib.suppress(RequestTimedOut):
                reader.get_now(timeout=0.1)
                break


def publish(hub: EventHub, every: EventReader, asleep: EventReader, count: int) -> bool:
    """So many events, of which one reader takes each as it comes; whether the other, looking then, has lost some."""
    for _ in range(count):
        hub.emit(DeviceAdded(path="/machine/peripheral/" + "n" * 200, device="n0"))
        while (event := every.get_now(timeout=PATIENCE)).seq != hub.seq:
            assert not event.local
        assert not event.local
    last = hub.seq
    while True:
        try:
            event = asleep.get_now(timeout=0.1)
        except RequestTimedOut:  # the end of the queue; whether something is missing there, the next event shows
            hub.emit(DeviceAdded(path="/probe", device="probe"))
            continue
        if event.local:
            return True
        assert event.seq is not None
        if event.seq >= last:
            return False


GARBAGE = [
    b"",
    b"\xc1",
    b"\x93\x01",
    b"\xdf\xff\xff\xff\xff",
    b"\x91" * 5000,
    b"\xd6\x05aaaa",
    msgpack.packb([1, 2]),
    msgpack.packb({"method": "query-name", "id": 1}),
    msgpack.packb({"jsonrpc": "2.0", "method": 5, "id": 1}),
    msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": [1]}),
    msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": 1, "more": 1}),
    msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "params": [1], "id": 1}),
    msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": 1})[:-1],
    b"\x82\xa6method\xa1x\xa6method\xa1y",
    msgpack.packb({1: 2}),
]


def test_garbage_gets_an_error_and_costs_nothing(server: OwnServer) -> None:
    """Each wrong message is answered with an error; the next call works; so does everybody else's."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, Bus(bus_of(server)) as bus:
        dealer.connect(f"ipc://{server.path.parent}/bus")
        for garbage in GARBAGE:
            dealer.send(garbage)
            assert dealer.poll(120_000), garbage
            answer = msgpack.unpackb(dealer.recv())
            assert answer["error"]["code"] < 0, (garbage, answer)
        dealer.send_multipart([b"a", b"b", b"c"])
        assert msgpack.unpackb(dealer.recv())["error"]["message"].startswith("A call is one frame")
        dealer.send(msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": "x"}))
        assert msgpack.unpackb(dealer.recv()) == {"jsonrpc": "2.0", "result": {"name": "vm1"}, "id": "x"}
        assert bus.query_name().name == "vm1"


@pytest.mark.parametrize("more", [-1, 0, 1, FRAMES_IN_TURN - 1, FRAMES_IN_TURN, 50_000])
def test_a_message_of_many_frames_is_dropped_as_it_comes(server: OwnServer, more: int) -> None:
    """It is answered with an error when its end is there; what follows it is read as if it had not been."""
    count = MAX_BUS_FRAMES + more  # with the identity one more
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, Bus(bus_of(server)) as bus:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.connect(f"ipc://{server.path.parent}/bus")
        for _ in range(2):
            dealer.send_multipart([b"x"] * count)
            dealer.send(msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": 7}))
        for _ in range(2):
            assert dealer.poll(120_000)
            refused = msgpack.unpackb(dealer.recv())["error"]["message"]
            assert refused.startswith("A call is one frame of msgpack"), refused
            assert ("more than" in refused) is (count >= MAX_BUS_FRAMES)
            assert dealer.poll(120_000)
            assert msgpack.unpackb(dealer.recv()) == {"jsonrpc": "2.0", "result": {"name": "vm1"}, "id": 7}
        assert bus.query_name().name == "vm1"


def test_req_sockets_and_notifications(server: OwnServer) -> None:
    """A REQ socket's empty frame comes back; a notification is carried out and not answered."""
    with zmq.Context() as context, context.socket(zmq.REQ) as req, context.socket(zmq.DEALER) as dealer:
        req.connect(f"ipc://{server.path.parent}/bus")
        req.send(msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": None}))
        assert msgpack.unpackb(req.recv())["result"] == {"name": "vm1"}
        dealer.connect(f"ipc://{server.path.parent}/bus")
        dealer.send(msgpack.packb({"jsonrpc": "2.0", "method": "nope"}))
        dealer.send(msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": 2}))
        assert msgpack.unpackb(dealer.recv())["id"] == 2


def test_a_client_that_never_reads_slows_nobody(server: OwnServer) -> None:
    """Its replies are dropped once its queue is full, and counted."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf, Bus(bus_of(server)) as bus:
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.RCVBUF, 4096)
        deaf.connect(f"ipc://{server.path.parent}/bus")
        call = msgpack.packb({"jsonrpc": "2.0", "method": "query-qmp-schema", "id": 1})
        deadline = time.monotonic() + PATIENCE

        def dropped() -> int:
            stats = bus.execute("query-stats", {"target": "session"})
            [found] = [
                one
                for one in stats
                if one.get("qom-path", "").startswith("/bus/ipc:") and one["stats"][0]["name"] == "bus-calls"
            ]
            return next(int(one["value"]) for one in found["stats"] if one["name"] == "bus-replies-dropped")

        while not dropped():
            assert time.monotonic() < deadline
            for _ in range(100):
                deaf.send(call)
            assert bus.query_name(timeout=PATIENCE).name == "vm1"
        deaf.setsockopt(zmq.LINGER, 0)


def test_one_client_cannot_fill_the_bus(server: OwnServer) -> None:
    """More calls in flight than one client may have are refused; the others are carried out."""
    with Bus(bus_of(server)) as bus:
        add(bus, "n0")
    with zmq.Context() as context, context.socket(zmq.DEALER) as greedy:
        greedy.connect(f"ipc://{server.path.parent}/bus")
        count = MAX_BUS_IN_FLIGHT * 3
        params = {"device": "n0", "region": "bar2", "offset": 0, "length": 1 << 20}
        for number in range(count):
            greedy.send(msgpack.packb({"jsonrpc": "2.0", "method": "region-read", "params": params, "id": number}))
        answers = [msgpack.unpackb(greedy.recv()) for _ in range(count)]
        errors = [one["error"]["message"] for one in answers if "error" in one]
        assert errors and all("calls in flight" in one for one in errors)
        assert len(answers) - len(errors) >= MAX_BUS_IN_FLIGHT


def test_sockets_are_private(server: OwnServer, tmp_path: Path) -> None:
    """Mode 0600; and a directory that others can enter is refused."""
    assert stat.S_IMODE(os.lstat(tmp_path / "bus").st_mode) == 0o600
    with Client.connect(server.path) as client:
        kinds = {fd.name: fd.kind for fd in client.query_fds() if fd.owner == "server"}
        assert kinds
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o755)
    done = subprocess.run(
        server_command(["--name", "x", "--bus", f"ipc:{public}/bus"]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "can be entered by others (mode 0755)" in done.stderr
    assert list(public.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_is_not_let_in() -> None:
    """Even one who can reach the socket file: the kernel says who connects, and ZeroMQ looks."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own directories are closed to others
    try:
        probe = (
            "import os, sys, zmq\n"
            "socket = zmq.Context().socket(zmq.DEALER)\n"
            "os.setuid(4321)\n"
            "socket.linger = 0\n"
            f"socket.connect('ipc://{directory}/bus')\n"
            "socket.send(b'\\x80')\n"
            "sys.exit(7 if socket.poll(1000) else 3)\n"
        )
        with own_server(directory, ["--bus", f"ipc:{directory}/bus"]):
            directory.chmod(0o711)
            (directory / "bus").chmod(0o666)
            assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 3
            with Bus(f"ipc:{directory}/bus") as bus:
                assert bus.query_name().name == "own"
    finally:
        shutil.rmtree(directory)


def test_who_uses_no_bus_pays_nothing(tmp_path: Path) -> None:
    """Neither ZeroMQ nor msgpack is loaded."""
    with own_server(tmp_path) as server:
        maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "zmq" not in maps
    assert "msgpack" not in maps
