"""The asyncio client against a real server. What both skins share is tested with the synchronous one."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vfiod.client import AsyncClient, ConnectFailed, ConnectionLost, FileDescriptor, RemoteError, RequestTimedOut
from vfiod.client.errors import ProtocolError
from vfiod.client.spawn import OwnServer
from vfiod.protocol.catalogue.devices import DeviceDeleted

Test = Callable[[AsyncClient], Awaitable[None]]


@pytest.fixture(params=["qmp", "jsonrpc"])
def with_client(server: OwnServer, request: pytest.FixtureRequest) -> Callable[[Test], None]:
    path = server.path if request.param == "qmp" else server.path.parent / "rpc.sock"

    def run(test: Test) -> None:
        async def connected() -> None:
            async with await AsyncClient.connect(path, dialect=request.param, timeout=30) as client:
                await test(client)

        asyncio.run(connected())

    return run


async def make_device(client: AsyncClient, name: str = "dev0") -> str:
    uuid = (await client.mdev_create(parent="primer", type="primer-pci")).uuid
    await client.device_add(driver="vfio-pci", id=name, mdev=uuid)
    return name


def test_many_tasks(with_client: Callable[[Test], None]) -> None:
    async def test(client: AsyncClient) -> None:
        names = await asyncio.gather(*(client.query_name() for _ in range(300)))
        assert {found.name for found in names} == {"vm1"}

    with_client(test)


def test_many_tasks_with_fds(with_client: Callable[[Test], None]) -> None:
    """More fds at once than a server keeps unnamed, each ending up in the mapping it was lent to."""

    async def test(client: AsyncClient) -> None:
        await make_device(client)
        memories = [FileDescriptor(os.memfd_create(f"ram{number}")) for number in range(300)]
        for number, memory in enumerate(memories):
            os.ftruncate(memory.number, 4096)
            os.pwrite(memory.number, number.to_bytes(4, "little"), 0)
        await asyncio.gather(
            *(client.dma_map(iova=number << 12, size=4096, fd=memory) for number, memory in enumerate(memories))
        )
        for memory in memories:
            memory.close()
        await client.region_write(device="dev0", region="config", offset=4, size=2, value=6)
        for number in (0, 1, 150, 252, 253, 299):
            for register, value in ((0x20, number << 12), (0x24, 0), (0x28, 0), (0x2C, 4), (0x30, 1)):
                await client.region_write(device="dev0", region="bar0", offset=register, size=4, value=value)
            assert (await client.region_read(device="dev0", region="bar2", offset=0, size=4)).value == number
        assert not any(fd.owner.startswith("session") for fd in await client.query_fds())

    with_client(test)


def test_fds_out_to_many_tasks(with_client: Callable[[Test], None]) -> None:
    async def test(client: AsyncClient) -> None:
        for number in range(4):
            uuid = (
                await client.mdev_create(parent="primer", type="primer-pci", parameters={"memory": 4096 << number})
            ).uuid
            await client.device_add(driver="vfio-pci", id=f"d{number}", mdev=uuid)

        async def look(number: int) -> None:
            with await client.region_map(device=f"d{number}", region="bar2") as mapped:
                assert os.fstat(mapped.map_fd.number).st_size == 4096 << number
                with mmap.mmap(mapped.map_fd.number, mapped.size) as memory:
                    memory[0] = number

        await asyncio.gather(*(look(number % 4) for number in range(100)))

    with_client(test)


def test_cancelled_calls_leave_nothing(with_client: Callable[[Test], None]) -> None:
    """Cancelled at any moment: the fds of the late answer are closed, the next answers are right."""

    async def test(client: AsyncClient) -> None:
        await make_device(client)
        before = len(os.listdir("/proc/self/fd"))
        for turns in range(12):
            with FileDescriptor(os.eventfd(0)) as eventfd:
                tasks: list[asyncio.Task[Any]] = [
                    asyncio.create_task(client.region_map(device="dev0", region="bar2")),
                    asyncio.create_task(client.object_add(qom_type="memory-backend-fd", id="no", fd=eventfd)),
                ]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    if not isinstance(result, BaseException):
                        result.close()
            assert (await client.query_name()).name == "vm1"
        await client.query_name()
        assert len(os.listdir("/proc/self/fd")) == before
        assert not any(fd.owner.startswith("session") for fd in await client.query_fds())

    with_client(test)


def test_events(with_client: Callable[[Test], None]) -> None:
    async def test(client: AsyncClient) -> None:
        with client.events() as everything, client.events(DeviceDeleted) as deleted:
            await make_device(client)
            await client.device_del(id="dev0")
            event = await deleted.get(timeout=30)
            assert isinstance(event.data, DeviceDeleted)
            assert event.data.device == "dev0"
            names = [found.name for found in everything.pending()]
            assert names.index("DEVICE_ADDED") < names.index("DEVICE_DELETED")
            with pytest.raises(RequestTimedOut):
                await everything.get(timeout=0.01)

    with_client(test)


def test_iteration_ends_with_the_client(server: OwnServer) -> None:
    async def test() -> None:
        client = await AsyncClient.connect(server.path, timeout=30)
        seen: list[str] = []

        async def read() -> None:
            async for event in events:
                seen.append(event.name)

        with client.events() as events:
            reader = asyncio.create_task(read())
            await make_device(client)
            await asyncio.sleep(0)
            await client.close()
            await reader
        assert "DEVICE_ADDED" in seen
        await client.wait_closed()
        with pytest.raises(ConnectionLost):
            await client.query_name()

    asyncio.run(test())


def test_the_server_goes(server: OwnServer) -> None:
    async def test() -> None:
        async with await AsyncClient.connect(server.path) as client:
            with client.events() as events:
                waiting = asyncio.create_task(events.get())
                await asyncio.sleep(0)
                os.kill(server.pid, signal.SIGTERM)
                await asyncio.wait_for(client.wait_closed(), 30)
                result = (await asyncio.gather(waiting, return_exceptions=True))[0]
                assert isinstance(result, ConnectionLost) or getattr(result, "name", "") == "SHUTDOWN"
                with pytest.raises(ConnectionLost):
                    async for _ in events:
                        pass

    asyncio.run(test())
    assert server.wait() == 0


def test_errors_and_time_outs(server: OwnServer) -> None:
    async def test() -> None:
        async with await AsyncClient.connect(server.path, timeout=30) as client:
            with pytest.raises(RemoteError, match="not found"):
                await client.device_del(id="nobody")
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(RequestTimedOut, match="query-uuid"):
                await client.query_uuid(timeout=0.05)
            os.kill(server.pid, signal.SIGCONT)
            assert (await client.query_name()).name == "vm1"

    asyncio.run(test())


def test_more_than_the_socket_takes(server: OwnServer) -> None:
    """Requests of several megabytes while the server stands still: they wait, and go when it moves."""

    async def test() -> None:
        async with await AsyncClient.connect(server.path, timeout=60) as client:
            await make_device(client)
            data = os.urandom(1 << 19)
            os.kill(server.pid, signal.SIGSTOP)
            writes = [
                asyncio.create_task(client.region_write(device="dev0", region="bar2", offset=0, data=data))
                for _ in range(8)
            ]
            await asyncio.sleep(0.05)
            os.kill(server.pid, signal.SIGCONT)
            await asyncio.gather(*writes)
            assert (await client.region_read(device="dev0", region="bar2", offset=0, length=1 << 19)).data == data

    asyncio.run(test())


def test_a_silent_socket_of_the_other_dialect(server: OwnServer) -> None:
    async def test() -> None:
        with pytest.raises(ProtocolError, match="speaks JSON-RPC, not QMP: give --jsonrpc"):
            await AsyncClient.connect(server.path.parent / "rpc.sock")

    asyncio.run(test())


def test_connecting(tmp_path: Path, server: OwnServer) -> None:
    async def test() -> None:
        with pytest.raises(ConnectFailed, match="ENOENT"):
            await AsyncClient.connect(tmp_path / "nobody")
        async with await AsyncClient.connect(f"unix:{server.path}") as client:
            assert (await client.query_name()).name == "vm1"
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(RequestTimedOut, match="greeting"):
            await AsyncClient.connect(ours, timeout=0.05)
        assert ours.fileno() == -1
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(server.path))
        async with await AsyncClient.connect(sock, timeout=30) as client:
            assert (await client.execute("query-name")) == {"name": "vm1"}

    asyncio.run(test())


def test_a_full_accept_queue(tmp_path: Path) -> None:
    """A Unix socket refuses at once (EAGAIN) when its queue is full; the client tries again until its time is up."""

    async def test() -> None:
        path = tmp_path / "busy"
        with socket.socket(socket.AF_UNIX) as busy:
            busy.bind(str(path))
            busy.listen(0)
            with socket.socket(socket.AF_UNIX) as first:
                first.connect(str(path))
                with pytest.raises(RequestTimedOut):
                    await AsyncClient.connect(path, timeout=0.1)

    asyncio.run(test())
