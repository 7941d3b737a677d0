"""A real server process, a manager of it, and a device on the built-in parent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.process import ServerProcess

from vfiod.protocol.fd import FileDescriptor, close_all

PATIENCE = 20.0
"""Seconds before a test gives up; no test measures time."""

Width = Literal[1, 2, 4, 8]

VM = "5c4a1e3e-0000-4000-8000-00000000c0de"


class Manager(ServerProcess):
    """One server process and a session with it."""

    def __init__(self, directory: Path) -> None:
        options = ("--uuid", VM, "--allow-path", str(directory), "--allow-path", "/dev/null")
        super().__init__(directory, *options, patience=PATIENCE)
        self.fds: list[FileDescriptor] = []

    def eventfd(self) -> FileDescriptor:
        self.fds.append(FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)))
        return self.fds[-1]

    def memfd(self, size: int) -> FileDescriptor:
        self.fds.append(FileDescriptor(os.memfd_create("guest")))
        os.ftruncate(self.fds[-1].number, size)
        return self.fds[-1]

    def close(self) -> None:
        """End it, and look at its log: the only tracebacks in it are of a test's own parents."""
        close_all(self.fds)
        log = self.end()
        assert log.count("Traceback") == len(re.findall(r"vfiod\.server\.mdev\.calls E .* raised ", log)), log


class Primer:
    """A primer device that was added."""

    def __init__(self, manager: Manager, id: str = "dev0", parameters: dict[str, Any] | None = None) -> None:
        self.client = manager.client
        self.id = id
        self.uuid = self.client.mdev_create(parent="primer", type="primer-pci", parameters=parameters or {}).uuid
        self.client.device_add(driver="vfio-pci", id=id, mdev=self.uuid)

    def get(self, offset: int, region: str = "bar0", size: Width = 4) -> int:
        value = self.client.region_read(device=self.id, region=region, offset=offset, size=size).value
        assert isinstance(value, int)
        return value

    def set(self, offset: int, value: int, region: str = "bar0", size: Width = 4) -> None:
        self.client.region_write(device=self.id, region=region, offset=offset, size=size, value=value)

    def master(self) -> None:
        self.set(4, self.get(4, "config", 2) | 4, "config", 2)

    def dma(self, address: int, local: int, count: int, command: int) -> int:
        self.set(0x20, address, size=8)
        self.set(0x28, local)
        self.set(0x2C, count)
        self.set(0x30, command)
        return self.get(0x34)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()
