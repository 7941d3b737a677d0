"""A real server process with a primer device in it, and the registers of that device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor, close_all

PATIENCE = 30.0
"""Seconds before a test gives up on the server; no test measures time."""

IRQ_RAISE, IRQ_ACK = 0x14, 0x18


class Device:
    """``dev0``, a client of its server, and a hypervisor's eventfds."""

    def __init__(self, server: OwnServer) -> None:
        self.server = server
        self.client = self.connect()
        self.eventfds: list[FileDescriptor] = []

    def connect(self) -> Client:
        return Client.connect(self.server.path, timeout=PATIENCE)

    def add(self, **options: Any) -> None:
        uuid = self.client.mdev_create(parent="primer", type="primer-pci").uuid
        self.client.device_add(driver="vfio-pci", id="dev0", mdev=uuid, **options)
        self.client.region_write(device="dev0", region="config", offset=4, size=2, value=0b110)

    def set(self, register: int, value: int, client: Client | None = None) -> None:
        (client or self.client).region_write(device="dev0", region="bar0", offset=register, size=4, value=value)

    def eventfd(self) -> FileDescriptor:
        """Blocking: the tests wait for what it says, however long it takes."""
        self.eventfds.append(FileDescriptor(os.eventfd(0)))
        return self.eventfds[-1]

    def irq(self, name: str = "intx") -> Any:
        return next(one for one in self.client.query_irqs(device="dev0") if one.name == name)

    def server_fds(self) -> int:
        return len([fd for fd in self.client.query_fds() if fd.owner.startswith("device:")])


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with own_server(tmp_path, [], name="vm1") as server:
        made = Device(server)
        yield made
        close_all(made.eventfds)
        made.client.close()
        assert server.stop() == 0, server.messages()
    assert "Traceback" not in server.messages(), server.messages()
