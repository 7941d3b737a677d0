"""vfiod is killed, and a real device does not notice: mappings and an armed interrupt are the kernel's all the time.

By group and by cdev, under ``vfiod keeper``. The keeper is stopped while the device is looked at with no vfiod alive.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.exports.hypervisor import memfd
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_GID, UNPRIVILEGED_UID, unprivileged
from tests.lab.guest.vm import MEMLOCK, opened, opened_group, told
from tests.lab.topologies import EDU_PORT

from vfiod.client.errors import ClientError
from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.catalogue.monitor import MachineRestored
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.memory import RegionWindow
from vfiod.server.kernel.syscalls import Syscalls

MACHINE = "edu"

IOVA, SIZE = 0x10_0000, 1 << 20
TEXT = b"from the guest's memory"
SECONDS = 180.0
TEST_SECONDS = 600
"""Two Pythons start three times, and a lab beside others is slow."""


class Keeper:
    """An unprivileged keeper, and the vfiod under it."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(dir="/tmp"))
        os.chown(self.place, UNPRIVILEGED_UID, UNPRIVILEGED_GID)
        self.path = self.place / "qmp"
        command = [sys.executable, "-m", "vfiod.client.program", "keeper", "--", "--name", "lab"]
        self.process = unprivileged([*command, "--qmp", f"unix:{self.path}"], memlock=MEMLOCK)
        self.dead = 0
        self.pid = 0

    def serves(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                self.pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return False
        return self.pid != self.dead

    def client(self) -> Client:
        pci.wait_until(self.serves, "vfiod serves", SECONDS)
        return Client.connect(self.path, timeout=SECONDS)

    def kill(self) -> None:
        """Vfiod dies; the keeper sees nothing of it before :meth:`go_on`."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self.dead = self.pid
        os.kill(self.pid, signal.SIGKILL)
        state = Path(f"/proc/{self.pid}/stat")
        pci.wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "vfiod is dead", SECONDS)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    with pci.bound(EDU_PORT):
        try:
            yield made
        finally:
            os.kill(made.process.pid, signal.SIGCONT)
            made.process.terminate()
            assert made.process.wait(SECONDS) == 0


def add(client: Client, interface: str) -> None:
    if interface == "group":
        with opened_group(EDU_PORT) as group, opened("/dev/vfio/vfio") as container:
            client.device_add(driver="vfio-pci", id="edu", host=EDU_PORT, group_fd=group, container_fd=container)
    else:
        with opened("/dev/iommu") as iommu, opened(str(pci.vfio_cdev(EDU_PORT))) as cdev:
            client.object_add(qom_type="iommufd", id="iommufd0", fd=iommu)
            client.device_add(driver="vfio-pci", id="edu", fd=cdev, iommufd="iommufd0")


@contextmanager
def bar_of(client: Client) -> Iterator[RegionWindow]:
    with client.region_map(device="edu", region="bar0") as reply:
        assert isinstance(reply.map_fd, FileDescriptor)
        window = RegionWindow(Syscalls(), reply.map_fd.number, reply.offset, reply.size, readable=True, writable=True)
        try:
            yield window
        finally:
            window.close()
            with contextlib.suppress(ClientError):  # it may be dead
                client.region_unmap(device="edu", region="bar0")


def transfer(bar: RegionWindow, source: int, destination: int, command: int = 0) -> None:
    for register, value in (
        (pci.EDU_DMA_SOURCE, source),
        (pci.EDU_DMA_DESTINATION, destination),
        (pci.EDU_DMA_COUNT, len(TEXT)),
        (pci.EDU_DMA_COMMAND, command | pci.EDU_DMA_START),
    ):
        bar.store(register, 8, value)
    pci.wait_until(lambda: not bar.load(pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "the transfer ended", SECONDS)


def rung(fd: FileDescriptor) -> int:
    assert select.select([fd.number], [], [], SECONDS)[0], "it was never signalled"
    return int.from_bytes(os.read(fd.number, 8), "little")


def register(client: Client, offset: int, value: int | None = None) -> Any:
    if value is None:
        return client.region_read(device="edu", region="bar0", offset=offset, size=4).value
    return client.region_write(device="edu", region="bar0", offset=offset, size=4, value=value)


@pytest.mark.parametrize("interface", ["group", "cdev"])
def test_dma_and_interrupt_survive_a_kill(keeper: Keeper, interface: str) -> None:
    with memfd(SIZE, TEXT) as memory, FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as trigger:
        with keeper.client() as client:
            add(client, interface)
            client.dma_map(iova=IOVA, size=SIZE, fd=memory)
            client.region_write(device="edu", region="config", offset=4, size=2, value=6)
            client.irq_start(device="edu", index="msi", mode="direct", eventfds=[VectorFds(vector=0, trigger=trigger)])
            register(client, pci.EDU_LIVENESS, 0x1234_5678)
            with bar_of(client) as bar:
                keeper.kill()
                # Nobody serves the device now.
                transfer(bar, IOVA, pci.EDU_BUFFER)
                transfer(bar, pci.EDU_BUFFER, IOVA + 4096, pci.EDU_DMA_TO_RAM | pci.EDU_DMA_RAISE_IRQ)
                assert os.pread(memory.number, len(TEXT), 4096) == TEXT
                assert rung(trigger) == 1
                bar.store(pci.EDU_IRQ_ACK, 4, pci.EDU_DMA_IRQ)
        keeper.go_on()
        with keeper.client() as client:
            assert client.query_machine().restored == MachineRestored(devices=["edu"], lost=[])
            assert register(client, pci.EDU_LIVENESS) == 0x1234_5678 ^ 0xFFFF_FFFF, "it was not reset"
            register(client, pci.EDU_IRQ_RAISE, 1)
            assert rung(trigger) == 1
            register(client, pci.EDU_IRQ_ACK, 1)
            with bar_of(client) as bar:
                transfer(bar, pci.EDU_BUFFER, IOVA + 8192, pci.EDU_DMA_TO_RAM)
            assert os.pread(memory.number, len(TEXT), 8192) == TEXT
            client.dma_unmap(iova=IOVA, size=SIZE)
            with client.events("DEVICE_DELETED") as events:
                client.device_del(id="edu")
                assert told(events.get(SECONDS), DeviceDeleted).released, "the store has let go of it, too"
            if interface == "cdev":
                client.object_del(id="iommufd0")
        pci.unbind(EDU_PORT)  # would hang if anything still held it


def test_a_line_that_was_up_fires_again(keeper: Keeper) -> None:
    """A relayed INTx whose completion was on its way: nobody knows, so it is completed, and heard once more."""
    with FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as trigger:
        with keeper.client() as client:
            add(client, "group")
            client.region_write(device="edu", region="config", offset=4, size=2, value=6)
            client.irq_start(device="edu", mode="relayed", eventfds=[VectorFds(vector=0, trigger=trigger)])
            register(client, pci.EDU_IRQ_RAISE, 1)
            assert rung(trigger) == 1
            keeper.kill()
        keeper.go_on()
        with keeper.client() as client:
            assert rung(trigger) >= 1
            register(client, pci.EDU_IRQ_ACK, 1)
            client.irq_eoi(device="edu", index="intx")
            register(client, pci.EDU_IRQ_RAISE, 2)
            assert rung(trigger) >= 1
            register(client, pci.EDU_IRQ_ACK, 2)
            client.device_del(id="edu", force=True)
            pci.wait_until(lambda: not client.query_devices(), "it is gone", SECONDS)
