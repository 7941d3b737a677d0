"""The synchronous client against a real server: every way in and out of it, and what happens when things end."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client import (
    Client,
    ConnectFailed,
    ConnectionLost,
    FileDescriptor,
    ProtocolError,
    RemoteError,
    RequestTimedOut,
    VectorFds,
)
from vfiod.client.spawn import OwnServer
from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceDeleted
from vfiod.protocol.catalogue.memory import DmaMap


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=["qmp", "jsonrpc"])
def client(server: OwnServer, request: pytest.FixtureRequest) -> Iterator[Client]:
    path = server.path if request.param == "qmp" else server.path.parent / "rpc.sock"
    with Client.connect(path, dialect=request.param, timeout=30) as connected:
        yield connected


@pytest.fixture
def device(client: Client) -> str:
    uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
    client.device_add(driver="vfio-pci", id="dev0", mdev=uuid)
    return "dev0"


@pytest.fixture
def ram() -> Iterator[FileDescriptor]:
    with FileDescriptor(os.memfd_create("ram", os.MFD_CLOEXEC)) as memory:
        os.ftruncate(memory.number, 1 << 16)
        yield memory


class TestCommands:
    def test_typed(self, client: Client) -> None:
        assert client.query_name().name == "vm1"
        assert client.query_status(oob=True).running

    def test_by_name(self, client: Client) -> None:
        assert client.execute("query-name") == {"name": "vm1"}

    def test_errors(self, client: Client) -> None:
        with pytest.raises(RemoteError) as caught:
            client.region_read(device="nobody", region="bar0", offset=0, size=4)
        assert (caught.value.remote_class, caught.value.desc) == ("DeviceNotFound", "Device 'nobody' not found")
        with pytest.raises(RemoteError) as caught:
            client.execute("x-nothing")
        assert caught.value.remote_class == "CommandNotFound"
        assert client.query_name().name == "vm1", "the session goes on"

    def test_many(self, client: Client) -> None:
        assert {client.query_name().name for _ in range(500)} == {"vm1"}

    def test_large(self, client: Client, device: str) -> None:
        """A megabyte each way: neither side may wait for the other to read first."""
        data = os.urandom(1 << 20)
        client.region_write(device=device, region="bar2", offset=0, data=data)
        assert client.region_read(device=device, region="bar2", offset=0, length=len(data)).data == data


class TestFds:
    def test_lent(self, client: Client, ram: FileDescriptor) -> None:
        before = open_fds()
        client.object_add(qom_type="memory-backend-fd", id="ram0", fd=ram)
        assert open_fds() == before
        assert not ram.closed
        (made,) = client.query_objects()
        assert made.size == 1 << 16
        assert not any(fd.owner.startswith("session") for fd in client.query_fds()), "success consumes the name"

    def test_a_failure_leaves_nothing(self, client: Client, ram: FileDescriptor) -> None:
        with pytest.raises(RemoteError):
            client.dma_map(iova=1, size=4096, fd=ram)  # not at a page
        assert not any(fd.owner.startswith("session") for fd in client.query_fds())

    def test_under_names_of_ones_own(self, client: Client, ram: FileDescriptor) -> None:
        assert client.call(DmaMap(iova=0, size=1 << 16, fd="mine"), fds={"mine": ram}).size == 1 << 16

    def test_name_first_use_later(self, client: Client, ram: FileDescriptor) -> None:
        assert client.getfd(fdname="ram", fd=ram).kind == "memfd"
        assert client.dma_map(iova=0, size=4096, fd="ram").size == 4096

    def test_fd_set(self, client: Client, ram: FileDescriptor) -> None:
        added = client.add_fd(fd=ram, opaque="the guest's")
        client.dma_map(iova=0, size=4096, fd=f"/dev/fdset/{added.fdset_id}")
        (found,) = client.query_fdsets()
        assert found.fds[0].opaque == "the guest's"

    def test_ahead(self, client: Client, ram: FileDescriptor) -> None:
        client.send_fds([ram, ram])
        assert [client.getfd(fdname=name).kind for name in "ab"] == ["memfd", "memfd"]
        with pytest.raises(RemoteError, match="No file descriptor supplied via SCM_RIGHTS"):
            client.getfd(fdname="c")

    def test_files_and_numbers(self, client: Client, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(8192))
        with path.open("r+b") as file:
            client.dma_map(iova=0, size=4096, fd=file)
            client.dma_map(iova=4096, size=4096, offset=4096, fd=file.fileno())
        assert client.dma_unmap(iova=0, size=8192).size == 8192

    def test_253_at_once(self, client: Client) -> None:
        fds = {f"e{number}": os.eventfd(0) for number in range(253)}
        try:
            with pytest.raises(RemoteError, match="nobody"):
                client.execute("device_del", {"id": "nobody"}, fds=fds)
            assert not any(fd.owner.startswith("session") for fd in client.query_fds())
        finally:
            for number in fds.values():
                os.close(number)

    def test_out(self, client: Client, device: str) -> None:
        before = open_fds()
        with client.region_map(device=device, region="bar2") as mapped:
            with mmap.mmap(mapped.map_fd.number, mapped.size, offset=mapped.offset) as memory:
                memory[100:104] = b"here"
            assert not os.get_inheritable(mapped.map_fd.number)
        assert client.region_read(device=device, region="bar2", offset=100, length=4).data == b"here"
        raw = client.execute("region-map", {"device": device, "region": "bar2"})
        assert os.fstat(raw["map-fd"].number).st_size == 1 << 20
        raw["map-fd"].close()
        assert open_fds() == before

    def test_many_out(self, client: Client) -> None:
        uuid = client.mdev_create(parent="primer", type="primer-pci", parameters={"vectors": 32}).uuid
        client.device_add(driver="vfio-pci", id="dev32", mdev=uuid)
        with client.irq_start(device="dev32", index="msi", vectors=list(range(32))) as started:
            for vector in (0, 17, 31):
                client.irq_trigger(device="dev32", index="msi", vector=vector)
            signalled = []
            for irq in started.irqs:
                assert isinstance(irq.trigger_fd, FileDescriptor)
                os.set_blocking(irq.trigger_fd.number, False)
                try:
                    signalled.append((irq.vector, os.eventfd_read(irq.trigger_fd.number)))
                except BlockingIOError:
                    continue
        assert signalled == [(0, 1), (17, 1), (31, 1)], "each fd is the vector's it is said to be"

    def test_eventfds_in(self, client: Client, device: str) -> None:
        eventfds = [FileDescriptor(os.eventfd(0)) for _ in range(2)]
        pairs = [VectorFds(vector=number, trigger=fd) for number, fd in enumerate(eventfds)]
        client.irq_start(device=device, index="msi", vectors=[0, 1], eventfds=pairs)
        client.irq_trigger(device=device, index="msi", vector=1)
        assert os.eventfd_read(eventfds[1].number) == 1
        for fd in eventfds:
            fd.close()


class TestEvents:
    def test_one_by_one(self, client: Client) -> None:
        with client.events(DeviceAdded, "DEVICE_DELETED") as events:
            uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
            client.device_add(driver="vfio-pci", id="d", mdev=uuid)
            client.device_del(id="d")
            added, deleted = events.get(timeout=30), events.get(timeout=30)
        assert added.data == DeviceAdded(device="d", path="/machine/peripheral/d")
        assert isinstance(deleted.data, DeviceDeleted)
        assert deleted.data.released
        assert isinstance(added.seq, int)
        assert isinstance(deleted.seq, int)
        assert added.seq < deleted.seq
        assert abs(deleted.timestamp - time.time()) < 3600

    def test_pending(self, client: Client, device: str) -> None:
        with client.events() as events:
            assert events.pending() == []
            client.device_reset(id=device)
            names = []
            while "DEVICE_RESET" not in names:
                names += [event.name for event in events.pending()]

    def test_time_out(self, client: Client) -> None:
        with client.events() as events, pytest.raises(RequestTimedOut, match="event"):
            events.get(timeout=0.01)

    def test_loss_in_the_client(self, client: Client, device: str) -> None:
        with client.events(limit=2) as events:
            for _ in range(5):
                client.device_reset(id=device)
            client.query_name()
            seen = events.pending()
            while sum(getattr(event.data, "count", 1) for event in seen) < 5:
                seen += events.pending()
        lost = [event for event in seen if event.name == "EVENTS_LOST"]
        assert lost
        assert all(event.local for event in lost)

    def test_iteration_ends_with_the_client(self, server: OwnServer) -> None:
        client = Client.connect(server.path, timeout=30)
        events = client.events()
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="d", mdev=uuid)
        names = []
        for event in events:
            names.append(event.name)
            client.close()
        assert names[0] == "DEVICE_ADDED"

    def test_iteration_tells_of_a_loss(self, server: OwnServer) -> None:
        with Client.connect(server.path, timeout=30) as client, client.events() as events:
            os.kill(server.pid, signal.SIGTERM)
            with pytest.raises(ConnectionLost):
                list(events)
        assert server.wait() == 0


class TestEnds:
    def test_quit(self, server: OwnServer) -> None:
        with Client.connect(server.path, timeout=30) as client:
            client.quit()
            assert server.wait() == 0
            with pytest.raises(ConnectionLost):
                client.query_name()

    def test_server_killed(self, server: OwnServer) -> None:
        with Client.connect(server.path) as client:
            os.kill(server.pid, signal.SIGSTOP)  # so that the command is under way when it dies
            killer = threading.Timer(0.3, os.kill, (server.pid, signal.SIGKILL))
            killer.start()
            with pytest.raises(ConnectionLost, match="query-name"):
                client.query_name()
            killer.join()
        server.process.wait()
        server.process.returncode = 0  # the fixture expects an orderly end, and this test does not

    def test_time_out(self, server: OwnServer) -> None:
        """A late answer is not taken for the next one's."""
        with Client.connect(server.path, timeout=30) as client:
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(RequestTimedOut, match=r"query-uuid within 0\.05 s"):
                client.query_uuid(timeout=0.05)
            os.kill(server.pid, signal.SIGCONT)
            assert client.query_name().name == "vm1"

    def test_closed_here(self, server: OwnServer) -> None:
        before = open_fds()
        client = Client.connect(server.path, timeout=30)
        client.close()
        client.close()
        assert client.fileno() == -1
        assert open_fds() == before
        with pytest.raises(ConnectionLost, match="This client was closed"):
            client.query_name()


class TestConnecting:
    def test_by_socket(self, server: OwnServer) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(server.path))
        with Client.connect(sock, timeout=30) as client:
            assert client.query_name().name == "vm1"
        assert sock.fileno() == -1, "the client owns it"

    def test_by_the_name_that_the_server_s_options_have(self, server: OwnServer) -> None:
        with Client.connect(f"unix:{server.path}", timeout=30) as client:
            assert client.query_name().name == "vm1"

    def test_versions(self, server: OwnServer) -> None:
        with Client.connect(server.path, timeout=30) as client:
            assert client.version == client.query_version()

    @pytest.mark.parametrize(
        ("kind", "said"),
        [("absent", "ENOENT"), ("dead", "ECONNREFUSED"), ("file", "ECONNREFUSED|ENOTSOCK"), ("long", "ENAMETOOLONG")],
    )
    def test_nobody(self, tmp_path: Path, kind: str, said: str) -> None:
        path = tmp_path / ("x" * 120 if kind == "long" else "sock")
        if kind == "dead":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        elif kind == "file":
            path.touch()
        with pytest.raises(ConnectFailed, match=said):
            Client.connect(path)

    def test_datagram(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, pytest.raises(ConnectFailed, match="stream"):
            Client.connect(sock)

    def test_silence(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(RequestTimedOut, match="greeting"):
            Client.connect(ours, timeout=0.05)
        assert ours.fileno() == -1

    def test_somebody_else(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(b"220 mail.example ESMTP\r\n")
            with pytest.raises((ConnectionLost, ProtocolError)):
                Client.connect(ours, timeout=30)

    def test_turned_away(self) -> None:
        """A server that says why before it closes is heard, although our own first bytes cannot be sent."""
        ours, theirs = socket.socketpair()
        theirs.sendall(b'{"error": {"class": "GenericError", "desc": "uid 7 may not come in"}}\r\n')
        theirs.close()
        with pytest.raises((ConnectionLost, ProtocolError), match="uid 7 may not come in"):
            Client.connect(ours, timeout=30)
