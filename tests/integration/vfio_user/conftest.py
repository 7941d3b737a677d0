"""A real vfiod, and a real vfio-user server beside it."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor, close_all

PATIENCE = 120.0
"""Seconds before a test gives up; no test measures time."""

PROGRAM = Path(__file__).with_name("program.py")

SCRATCH, ADDRESS, COUNT, DMA, ERROR, READ = 0x04, 0x08, 0x10, 0x14, 0x18, 0x1C
SIGNAL, MISBEHAVE, MAPS, EVENTFDS, SETS = 0x20, 0x24, 0x28, 0x2C, 0x30


class Bench:
    """vfiod, and programs that serve devices to it."""

    def __init__(self, server: OwnServer, place: Path) -> None:
        self.server = server
        self.place = place
        self.path = place / "device.sock"
        self.client = Client.connect(server.path, timeout=PATIENCE)
        self.events = self.client.events()
        self.programs: list[subprocess.Popen[bytes]] = []
        self.fds: list[FileDescriptor] = []

    def start(self, *options: str, path: Path | None = None) -> subprocess.Popen[bytes]:
        """A server, once it accepts."""
        path = path or self.path
        path.unlink(missing_ok=True)
        program = subprocess.Popen([sys.executable, str(PROGRAM), f"--socket-path={path}", *options])
        self.programs.append(program)
        while not path.exists():
            assert program.poll() is None, "the program ended"
            time.sleep(0.01)
        return program

    def start_connected(self, *options: str) -> socket.socket:
        """A server on one end of a socket pair; the other end."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, str(PROGRAM), f"--fd={theirs.fileno()}", *options]
        self.programs.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
        theirs.close()
        return ours

    def add(self, **options: Any) -> None:
        if "socket_fd" not in options:
            options.setdefault("socket", str(self.path))
        self.client.device_add(driver=options.pop("driver", "vfio-pci"), id="dev0", **options)

    def get(self, register: int, region: str = "bar0") -> int:
        value = self.client.region_read(device="dev0", region=region, offset=register, size=4).value
        assert isinstance(value, int)
        return value

    def set(self, register: int, value: int, region: str = "bar0") -> None:
        self.client.region_write(device="dev0", region=region, offset=register, size=4, value=value)

    def memory(self, iova: int, size: int, *, readonly: bool = False) -> FileDescriptor:
        """Guest memory at an address; its file."""
        fd = FileDescriptor(os.memfd_create("guest"))
        self.fds.append(fd)
        os.ftruncate(fd.number, size)
        self.client.dma_map(iova=iova, size=size, fd=fd, readonly=readonly)
        return fd

    def dma(self, how: int, iova: int, count: int) -> int:
        """Have the device do DMA; the errno it met."""
        self.set(ADDRESS, iova & 0xFFFF_FFFF)
        self.set(ADDRESS + 4, iova >> 32)
        self.set(COUNT, count)
        self.set(DMA, how)
        return self.get(ERROR)

    def eventfd(self) -> FileDescriptor:
        """Blocking: the tests wait for what it says, however long it takes."""
        self.fds.append(FileDescriptor(os.eventfd(0)))
        return self.fds[-1]

    def config(self, offset: int, value: int, size: Literal[1, 2, 4]) -> None:
        """Write to configuration space, as a guest."""
        self.client.region_write(device="dev0", region="config", offset=offset, size=size, value=value)

    def own_config(self, offset: int, length: int) -> bytes:
        """Configuration space as the device itself has it, without what vfiod shows the guest instead."""
        data = self.client.region_read(device="dev0", region="bar0", offset=0x100 + offset, length=length).data
        assert isinstance(data, bytes)
        return data

    def wait(self, name: str) -> Any:
        """The data of the next event of this name."""
        while (event := self.events.get(PATIENCE)).name != name:
            pass
        return event.data

    def server_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def close(self) -> None:
        self.client.close()
        close_all(self.fds)
        for program in self.programs:
            program.kill()
            program.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with own_server(tmp_path, ["--allow-connect"], name="vm1") as server:
        made = Bench(server, tmp_path)
        yield made
        made.close()
        assert server.stop() == 0, server.messages()
    assert "Traceback" not in server.messages(), server.messages()
    assert "ResourceWarning" not in server.messages(), server.messages()


def rung(fd: FileDescriptor) -> int:
    """Wait for an eventfd, and take its count."""
    assert select.select([fd.number], [], [], PATIENCE)[0], "it was never signalled"
    return os.eventfd_read(fd.number)
