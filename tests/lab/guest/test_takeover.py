"""An unprivileged vfiod is replaced while it holds a real device: DMA mappings, MSI and the device's state stay.

Rules are those of behaviour.md, sections 1 and 2: nothing is closed, reset, unmapped or disarmed by a hand-over.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_UID, unprivileged
from tests.lab.guest.vm import MEMLOCK, Vm, opened
from tests.lab.topologies import EDU_ROOT

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor

MACHINE = "edu"

IOVA = 0x100000
SIZE = 1 << 20
TEXT = b"there and back again" * 8


class Line:
    """Servers that follow each other."""

    def __init__(self, directory: Path) -> None:
        os.chown(directory, UNPRIVILEGED_UID, -1)
        self.hand = directory / "hand-over"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vfiod.server", *arguments]
        self.processes.append(unprivileged(command, pass_fds=list(fds), memlock=MEMLOCK))
        return self.processes[-1]

    def next(self) -> None:
        """The next one takes the last one's place."""
        before = self.processes[-1]
        made = self.start("--take-over", f"unix:{self.hand}", "--allow-path", str(self.hand.parent))
        pci.wait_until(lambda: before.poll() is not None or made.poll() is not None, "the hand-over", 120)
        assert (before.poll(), made.poll()) == (0, None)


@contextmanager
def line_of_servers(directory: Path) -> Iterator[tuple[Line, Client]]:
    line = Line(directory)
    path = directory / "monitor.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        number = listener.fileno()
        hand = ("--hand-over", f"unix:{line.hand}", "--allow-path", str(directory))
        line.start("--name", "lab", "--qmp", f"fd={number}", *hand, fds=(number,))
    try:
        with Client.connect(path, timeout=120) as client:
            yield line, client
    except BaseException:
        for process in line.processes:
            process.kill()
        raise
    finally:
        line.processes[-1].terminate()
        for process in line.processes:
            process.wait(timeout=120)
    assert line.processes[-1].returncode == 0


def dma(vm: Vm, source: int, destination: int, command: int) -> None:
    vm.write("edu", pci.EDU_DMA_SOURCE, source, 8)
    vm.write("edu", pci.EDU_DMA_DESTINATION, destination, 8)
    vm.write("edu", pci.EDU_DMA_COUNT, len(TEXT), 8)
    vm.write("edu", pci.EDU_DMA_COMMAND, command | pci.EDU_DMA_START, 8)
    pci.wait_until(lambda: not vm.read("edu", pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "the DMA")


def rung(bell: FileDescriptor) -> bool:
    try:
        return os.eventfd_read(bell.number) > 0
    except BlockingIOError:
        return False


@pytest.mark.parametrize("mode", ["direct", "relayed"])
@pytest.mark.parametrize("origin", ["group", "cdev"])
def test_a_real_device_goes_on(origin: str, mode: str) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vfiod-", dir="/tmp") as folder,
        pci.bound(EDU_ROOT),
        line_of_servers(Path(folder)) as (line, client),
        FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as bell,
        FileDescriptor(os.memfd_create("guest")) as memory,
    ):
        vm = Vm(line.processes[0], client, Path(folder))
        os.ftruncate(memory.number, SIZE)
        os.pwrite(memory.number, TEXT, 0x1000)
        client.dma_map(iova=IOVA, size=SIZE, fd=memory)
        if origin == "group":
            vm.add(EDU_ROOT, "edu")
        else:
            with opened("/dev/iommu") as iommu, opened(str(pci.vfio_cdev(EDU_ROOT))) as cdev:
                client.object_add(qom_type="iommufd", id="iommufd0", fd=iommu)
                client.device_add(driver="vfio-pci", id="edu", fd=cdev, iommufd="iommufd0")
        vm.let_it_work("edu")
        eventfds = [VectorFds(vector=0, trigger=bell)]
        client.irq_start(device="edu", index="msi", eventfds=eventfds, mode="direct" if mode == "direct" else "relayed")
        vm.write("edu", pci.EDU_LIVENESS, 0x1234_5678)
        dma(vm, IOVA + 0x1000, pci.EDU_BUFFER, 0)
        for _ in range(2):
            line.next()
            # A device that was closed or reset masters its bus no more; one without its IOMMU reaches nothing.
            command = client.region_read(device="edu", region="config", offset=4, size=2).value
            assert isinstance(command, int)
            assert command & 6 == 6
            assert vm.read("edu", pci.EDU_LIVENESS) == 0x1234_5678 ^ 0xFFFF_FFFF
            os.pwrite(memory.number, bytes(len(TEXT)), 0x2000)
            dma(vm, pci.EDU_BUFFER, IOVA + 0x2000, pci.EDU_DMA_TO_RAM)
            assert os.pread(memory.number, len(TEXT), 0x2000) == TEXT
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            pci.wait_until(lambda: rung(bell), "the interrupt")
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
        # It is the new process's to change: unmapped, mapped again, removed.
        client.dma_unmap(iova=IOVA, size=SIZE)
        client.dma_map(iova=IOVA, size=SIZE, fd=memory)
        dma(vm, pci.EDU_BUFFER, IOVA + 0x3000, pci.EDU_DMA_TO_RAM)
        assert os.pread(memory.number, len(TEXT), 0x3000) == TEXT
        assert vm.remove("edu")
