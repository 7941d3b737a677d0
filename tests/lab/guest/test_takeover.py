"""A new vfiod takes the place of a running one, and real devices do not notice: none is closed, or reset.

One by group and one by cdev, in the same server. The test stands between the two processes, and stops them where
neither serves anybody; the devices are looked at there, through their BARs, mapped here.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import pytest
from tests.integration.exports.hypervisor import memfd
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_UID, unprivileged
from tests.lab.guest.resets import add_cdev, add_iommufd
from tests.lab.guest.test_crash import IOVA, SECONDS, SIZE, TEXT, rung, transfer
from tests.lab.guest.vm import MEMLOCK, Vm, told
from tests.lab.topologies import EDU_PORT, EDU_ROOT

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.kernel.memory import RegionWindow
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.takeover.conversation import Ready, Whole
from vfiod.server.takeover.wire import Wire

MACHINE = "edu"

# Who listens is who the taker believes to be the giver: it waits for that process to end.
LISTEN = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen()"


class Line:
    """Unprivileged servers that follow each other."""

    def __init__(self, directory: Path) -> None:
        os.chown(directory, UNPRIVILEGED_UID, -1)
        self.directory = directory
        self.path = directory / "qmp"
        self.hand = directory / "hand-over"
        self.processes: list[subprocess.Popen[bytes]] = []
        hand = ("--hand-over", f"unix:{self.hand}")
        self._start("--name", "lab", "--qmp", f"unix:{self.path}", *hand)

    def _start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "vfiod.server", *arguments, "--allow-path", str(self.directory)]
        with (self.directory / f"log{len(self.processes)}").open("wb") as log:
            self.processes.append(unprivileged(command, memlock=MEMLOCK, stderr=log))

    def logs(self) -> str:
        return "".join((self.directory / f"log{one}").read_text() for one in range(len(self.processes)))

    def connect(self) -> Client:
        pci.wait_until(self._serves, "vfiod serves", SECONDS)
        return Client.connect(self.path, timeout=SECONDS)

    def _serves(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.path))
            return True
        return False

    def next(self, moment: Callable[[], None]) -> None:
        """Another takes the last one's place; at ``moment()``, it has made everything and neither of them serves."""
        before = self.processes[-1]
        between = self.directory / f"between{len(self.processes)}"
        with ExitStack() as stack:
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(between))
            between.chmod(0o666)
            listen = [sys.executable, "-I", "-S", "-c", LISTEN, str(listening.fileno())]
            subprocess.run(listen, check=True, pass_fds=[listening.fileno()])
            self._start("--take-over", f"unix:{between}")
            assert select.select([listening], [], [], SECONDS)[0], "nobody takes over"
            taking = stack.enter_context(listening.accept()[0])
            giving = stack.enter_context(socket.socket(socket.AF_UNIX))
            giving.connect(str(self.hand))
            for one in (taking, giving):
                one.settimeout(SECONDS)
            taker, giver = Wire(taking), Wire(giving)
            giver.send(taker.receive())  # Hello
            taker.send(giver.receive())  # Welcome
            giver.send(taker.receive())  # Begin
            whole = giver.receive()
            assert isinstance(whole, Whole), whole
            taker.send(whole)
            data, fds = giver.receive_whole(whole)
            taker.send_whole(data, [fd.number for fd in fds])
            close_all(fds)
            ready = taker.receive()
            assert isinstance(ready, Ready), ready
            moment()
            giver.send(ready)
            taker.send(giver.receive())  # Commit
            giver.send(taker.receive())  # Owned
        assert before.wait(SECONDS) == 0

    def locked(self) -> tuple[int, int]:
        """Bytes that count as pinned for the one that serves: by type1 (``VmLck``) and by iommufd (``VmPin``)."""
        status = Path(f"/proc/{self.processes[-1].pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * int(fields["VmLck"].split()[0]), 1024 * int(fields["VmPin"].split()[0])


@pytest.fixture
def line() -> Iterator[Line]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, pci.bound(EDU_PORT, EDU_ROOT):
        made = Line(Path(directory))
        try:
            yield made
        finally:
            for one in made.processes:
                one.terminate()
            ended = [one.wait(SECONDS) for one in made.processes]
            print(made.logs())
        assert ended == [0] * len(ended)
        assert "Traceback" not in made.logs()


class Real:
    """A device of the server, driven by a guest's means: its BAR, mapped here, and an eventfd."""

    def __init__(self, vm: Vm, name: str, bar: RegionWindow, memory: FileDescriptor, trigger: FileDescriptor) -> None:
        self.vm = vm
        self.name = name
        self.bar = bar
        self.memory = memory
        self.trigger = trigger
        self.results = 0x1000 if name == "group" else 0x4_0000

    def arm(self, mode: Literal["direct", "relayed"]) -> None:
        vectors = [VectorFds(vector=0, trigger=self.trigger)]
        self.vm.client.irq_start(device=self.name, index="msi", mode=mode, eventfds=vectors)

    def rings(self, bits: int = 1) -> None:
        assert rung(self.trigger) == 1
        self.bar.store(pci.EDU_IRQ_ACK, 4, bits)

    def silent(self) -> bool:
        return not select.select([self.trigger.number], [], [], 0)[0]

    def reaches_memory(self, command: int = 0) -> None:
        """What it took from the guest's memory, at a new place there."""
        self.results += 0x1000
        transfer(self.bar, pci.EDU_BUFFER, IOVA + self.results, pci.EDU_DMA_TO_RAM | command)
        assert os.pread(self.memory.number, len(TEXT), self.results) == TEXT

    def goes_on(self) -> None:
        """What the server finds that serves it now is what its predecessor left."""
        assert self.vm.read(self.name, pci.EDU_LIVENESS) == 0x1234_5678 ^ 0xFFFF_FFFF, "it was not reset"
        command = self.vm.client.region_read(device=self.name, region="config", offset=4, size=2).value
        assert isinstance(command, int)
        assert command & 6 == 6, "nor closed"
        self.reaches_memory()
        self.vm.write(self.name, pci.EDU_IRQ_RAISE, 1)
        self.rings()


@contextmanager
def real(vm: Vm, name: str, memory: FileDescriptor) -> Iterator[Real]:
    vm.let_it_work(name)
    vm.write(name, pci.EDU_LIVENESS, 0x1234_5678)
    with (
        FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as trigger,
        vm.client.region_map(device=name, region="bar0") as reply,
    ):
        assert isinstance(reply.map_fd, FileDescriptor)
        bar = RegionWindow(Syscalls(), reply.map_fd.number, reply.offset, reply.size, readable=True, writable=True)
        try:
            transfer(bar, IOVA, pci.EDU_BUFFER)
            yield Real(vm, name, bar, memory, trigger)
        finally:
            bar.close()


def test_real_devices_go_on(line: Line) -> None:
    with line.connect() as client, memfd(SIZE, TEXT) as memory:
        vm = Vm(line.processes[0], client, line.path)
        client.dma_map(iova=IOVA, size=SIZE, fd=memory)
        vm.add(EDU_PORT, "group")
        add_iommufd(vm)
        add_cdev(vm, EDU_ROOT, "cdev")
        with real(vm, "group", memory) as group, real(vm, "cdev", memory) as cdev:
            assert min(line.locked()) >= SIZE
            for direct, relayed in ((group, cdev), (cdev, group)):
                direct.arm("direct")
                relayed.arm("relayed")

                def nobody_serves(direct: Real = direct, relayed: Real = relayed) -> None:
                    relayed.bar.store(pci.EDU_IRQ_RAISE, 4, 1)
                    direct.reaches_memory(pci.EDU_DMA_RAISE_IRQ)
                    direct.rings(pci.EDU_DMA_IRQ)
                    relayed.reaches_memory()
                    assert relayed.silent()

                line.next(nobody_serves)
                relayed.rings()  # it was kept for the successor
                for one in (group, cdev):
                    one.goes_on()
                    client.irq_stop(device=one.name, index="msi")
                assert min(line.locked()) >= SIZE, "what is locked counts for it"
                assert "locked memory" not in line.logs()
            # The successor may change what it was given.
            client.dma_unmap(iova=IOVA, size=SIZE)
            assert line.locked() == (0, 0)
            client.dma_map(iova=IOVA, size=SIZE, fd=memory)
            assert min(line.locked()) >= SIZE
            group.reaches_memory()
            cdev.reaches_memory()
            for one in (group, cdev):  # whose session, too, is the one that mapped it
                client.region_unmap(device=one.name, region="bar0")
        for name in ("group", "cdev"):
            with client.events("DEVICE_DELETED") as events:
                client.device_del(id=name)
                assert told(events.get(SECONDS), DeviceDeleted).released
        client.object_del(id="i0")
