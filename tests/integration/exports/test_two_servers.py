"""One vfiod exports a device, another attaches to it, and exports it again: both ends of the protocol are ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Server, eventually
from .hypervisor import eventfd, memfd, rung


@pytest.fixture
def middle(tmp_path: Path) -> Iterator[Server]:
    directory = tmp_path / "middle"
    directory.mkdir()
    made = Server(directory)
    yield made
    made.close()


def test_a_device_through_two_servers(server: Server, middle: Server) -> None:
    path = server.primer()
    client = middle.client
    again = middle.directory / "again.sock"
    client.device_add(driver="vfio-pci", id="far", socket=str(path), export=str(again))
    [info] = client.query_devices()
    assert (info.vendor_id, info.device_id, info.reset) == (0x1234, 0xF10D, True)
    assert server.client.query_device_exports()[0].state == "attached"
    hypervisor = middle.attach(again)
    assert hypervisor.read(0, 0) == 0xF10D_0001
    with memfd(1 << 16, b"through two") as memory, eventfd() as trigger:
        hypervisor.map(0, 1 << 16, memory.number)
        hypervisor.trigger(1, trigger.number)
        hypervisor.master()
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1
        assert hypervisor.dma(0, 64, 11, 1) == 1
        assert hypervisor.bytes(2, 64, 11) == b"through two"
        hypervisor.unmap(0, 1 << 16)
        assert hypervisor.dma(0, 64, 11, 1) == 0x202
        assert server.client.query_dma() == []
    hypervisor.close()
    eventually(lambda: middle.client.query_device_exports()[0].state == "listening")
    client.device_del(id="far")
    assert server.event("DEVICE_EXPORT_DETACHED")["id"] == "e-dev0"
    eventually(lambda: server.client.query_device_exports()[0].state == "listening")
