"""The real ``qemu.qmp`` client and its shell (PyPI qemu.qmp) against our monitor."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pexpect  # type: ignore[import-untyped]
import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from vfiod.client import Client
from vfiod.client.spawn import OwnServer


def with_qmp(server: OwnServer, test: Callable[[QMPClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = QMPClient("interop")
        await client.connect(str(server.path))
        try:
            await test(client)
        finally:
            await client.disconnect()

    asyncio.run(run())


@pytest.fixture
def ram() -> Iterator[int]:
    number = os.memfd_create("ram")
    os.ftruncate(number, 1 << 16)
    yield number
    os.close(number)


class TestQMPClient:
    def test_execute(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            assert await client.execute("query-name") == {"name": "vm1"}
            version = await client.execute("query-version")
            assert isinstance(version, dict)
            assert isinstance(version["qemu"], dict)
            commands = await client.execute("query-commands")
            assert isinstance(commands, list)
            assert {"name": "device_add"} in commands

        with_qmp(server, test)

    def test_errors(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            with pytest.raises(ExecuteError) as caught:
                await client.execute("device_del", {"id": "zz"})
            assert caught.value.error_class == "DeviceNotFound"
            assert str(caught.value) == "Device 'zz' not found"
            for command, arguments in (("nope", None), ("dma-map", {"iova": "x"}), ("query-name", {"z": 1})):
                with pytest.raises(ExecuteError):
                    await client.execute(command, arguments)
            assert await client.execute("query-name") == {"name": "vm1"}

        with_qmp(server, test)

    def test_out_of_band(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            assert await client.execute("query-name", oob=True) == {"name": "vm1"}
            with pytest.raises(ExecuteError, match="does not support OOB"):
                await client.execute("system_reset", oob=True)

        with_qmp(server, test)

    def test_many_at_once(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            replies = await asyncio.gather(*(client.execute("query-uuid") for _ in range(100)))
            assert all(reply == replies[0] for reply in replies)

        with_qmp(server, test)

    def test_events(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            with client.listener(("DEVICE_ADDED", "DEVICE_DELETED")) as events:
                created = await client.execute("mdev-create", {"parent": "primer", "type": "primer-pci"})
                assert isinstance(created, dict)
                await client.execute("device_add", {"driver": "vfio-pci", "id": "d", "mdev": created["uuid"]})
                await client.execute("device_del", {"id": "d"})
                assert [await _next(events), await _next(events)] == ["DEVICE_ADDED", "DEVICE_DELETED"]

        with_qmp(server, test)

    def test_an_fd(self, server: OwnServer, ram: int) -> None:
        async def test(client: QMPClient) -> None:
            client.send_fd_scm(ram)
            assert await client.execute("getfd", {"fdname": "ram"}) == {"kind": "memfd"}
            mapped = await client.execute("dma-map", {"iova": 0, "size": 65536, "fd": "ram"})
            assert mapped == {"iova": 0, "size": 65536}
            with pytest.raises(ExecuteError, match="No file descriptor supplied via SCM_RIGHTS"):
                await client.execute("getfd", {"fdname": "more"})

        with_qmp(server, test)

    def test_several_fds(self, server: OwnServer, ram: int) -> None:
        """Sent one after the other, named afterwards: QEMU itself would lose all but the last."""

        async def test(client: QMPClient) -> None:
            eventfd = os.eventfd(0)
            for number in (ram, eventfd, ram):
                client.send_fd_scm(number)
            os.close(eventfd)
            kinds = [await client.execute("getfd", {"fdname": f"n{number}"}) for number in range(3)]
            assert kinds == [{"kind": "memfd"}, {"kind": "eventfd"}, {"kind": "memfd"}]

        with_qmp(server, test)

    def test_fd_set(self, server: OwnServer, ram: int) -> None:
        async def test(client: QMPClient) -> None:
            client.send_fd_scm(ram)
            added = await client.execute("add-fd", {"opaque": "guest"})
            assert isinstance(added, dict)
            assert added["fdset-id"] == 0
            await client.execute("remove-fd", {"fdset-id": 0})
            assert await client.execute("query-fdsets") == []

        with_qmp(server, test)

    def test_quit(self, server: OwnServer) -> None:
        async def test(client: QMPClient) -> None:
            with client.listener("SHUTDOWN") as events:
                assert await client.execute("quit") == {}
                assert await _next(events) == "SHUTDOWN"

        with_qmp(server, test)
        assert server.wait() == 0


async def _next(events: EventListener) -> Any:
    return (await asyncio.wait_for(events.get(), 30))["event"]


class TestShell:
    @pytest.fixture
    def shell(self, server: OwnServer) -> Iterator[Callable[..., Any]]:
        children = []

        def start(*options: str) -> Any:
            words = ["-m", "qemu.qmp.qmp_shell", *options, str(server.path)]
            environment = os.environ | {"TERM": "dumb", "HOME": str(server.path.parent)}
            child = pexpect.spawn(sys.executable, words, env=environment, encoding="utf-8", timeout=120)
            children.append(child)
            return child

        yield start
        for child in children:
            child.close(force=True)

    def test_a_session(self, shell: Callable[..., Any]) -> None:
        child = shell()
        child.expect(r"Connected to QEMU 0\.1\.0")
        child.expect(r"\(QEMU\) ")
        child.sendline("query-name")
        child.expect_exact('{"return": {"name": "vm1"}}')
        child.sendline("mdev-create parent=primer type=primer-pci parameters.vectors=8")
        child.expect(r'"uuid": "([0-9a-f-]{36})"')
        uuid = child.match[1]
        child.sendline(f"device_add driver=vfio-pci id=d mdev={uuid}")
        child.expect_exact('{"return": {}}')
        child.sendline("region-read device=d region=bar0 offset=0 size=4")
        child.expect_exact('{"return": {"value": 4044161025}}')
        child.sendline("device_del id=nobody")
        child.expect("DeviceNotFound")
        child.sendline("nope")
        child.expect("CommandNotFound")
        child.expect(r"\(QEMU\) ")  # an end that comes before it reads lines again is lost
        child.sendeof()
        child.expect(pexpect.EOF)

    def test_completion(self, shell: Callable[..., Any]) -> None:
        child = shell()
        child.expect(r"\(QEMU\) ")
        child.send("query-stat\t\t")
        child.expect("query-stats")
        child.expect("query-status")

    def test_human(self, shell: Callable[..., Any], server: OwnServer) -> None:
        with Client.connect(server.path, timeout=30) as client:
            uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
            client.device_add(driver="vfio-pci", id="seen0", mdev=uuid)
        child = shell("-H")
        child.expect(r"\(QEMU\) ")
        child.sendline("info devices")
        child.expect("seen0")
