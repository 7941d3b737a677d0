"""A new vfiod takes the place of a running one, and a real device does not notice: it is never closed, nor reset.

By group and by cdev. The test stands between the two processes, and stops them where neither serves anybody; the
device is looked at there, through its BAR, mapped here.
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
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import memfd
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_UID, unprivileged
from tests.lab.guest.test_crash import IOVA, SECONDS, SIZE, TEXT, add, bar_of, register, rung, transfer
from tests.lab.guest.vm import MEMLOCK, told
from tests.lab.topologies import EDU_PORT

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.fd import FileDescriptor, close_all
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

    def locked(self) -> int:
        """Bytes that count as pinned for the one that serves: ``VmLck`` by type1, ``VmPin`` by iommufd."""
        status = Path(f"/proc/{self.processes[-1].pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * max(int(fields[name].split()[0]) for name in ("VmLck", "VmPin"))


@pytest.fixture
def line() -> Iterator[Line]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, pci.bound(EDU_PORT):
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


@pytest.mark.parametrize("interface", ["group", "cdev"])
def test_a_real_device_goes_on(line: Line, interface: str) -> None:
    with (
        memfd(SIZE, TEXT) as memory,
        FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as trigger,
        line.connect() as client,
    ):
        vectors = [VectorFds(vector=0, trigger=trigger)]
        add(client, interface)
        client.dma_map(iova=IOVA, size=SIZE, fd=memory)
        client.region_write(device="edu", region="config", offset=4, size=2, value=6)
        client.irq_start(device="edu", index="msi", mode="direct", eventfds=vectors)
        register(client, pci.EDU_LIVENESS, 0x1234_5678)
        assert line.locked() >= SIZE

        def goes_on() -> None:
            """What the server that now serves finds is what its predecessor left."""
            assert register(client, pci.EDU_LIVENESS) == 0x1234_5678 ^ 0xFFFF_FFFF, "it was not reset"
            command = client.region_read(device="edu", region="config", offset=4, size=2).value
            assert isinstance(command, int)
            assert command & 6 == 6, "nor closed"
            register(client, pci.EDU_IRQ_RAISE, 1)
            assert rung(trigger) == 1
            register(client, pci.EDU_IRQ_ACK, 1)
            assert line.locked() >= SIZE, "what is locked counts for it"
            assert "locked memory" not in line.logs()

        with bar_of(client) as bar:

            def by_the_kernel_alone() -> None:
                transfer(bar, IOVA, pci.EDU_BUFFER)
                transfer(bar, pci.EDU_BUFFER, IOVA + 4096, pci.EDU_DMA_TO_RAM | pci.EDU_DMA_RAISE_IRQ)
                assert os.pread(memory.number, len(TEXT), 4096) == TEXT
                assert rung(trigger) == 1
                bar.store(pci.EDU_IRQ_ACK, 4, pci.EDU_DMA_IRQ)

            def nobody_hears_it() -> None:
                bar.store(pci.EDU_IRQ_RAISE, 4, 1)
                assert not select.select([trigger.number], [], [], 0)[0]

            line.next(by_the_kernel_alone)
            goes_on()
            client.irq_stop(device="edu", index="msi")
            client.irq_start(device="edu", index="msi", mode="relayed", eventfds=vectors)
            line.next(nobody_hears_it)
            assert rung(trigger) == 1, "it was kept for the successor"
            bar.store(pci.EDU_IRQ_ACK, 4, 1)
            goes_on()
            # The successor may change what it was given.
            client.dma_unmap(iova=IOVA, size=SIZE)
            assert line.locked() == 0
            client.dma_map(iova=IOVA, size=SIZE, fd=memory)
            transfer(bar, pci.EDU_BUFFER, IOVA + 8192, pci.EDU_DMA_TO_RAM)
            assert os.pread(memory.number, len(TEXT), 8192) == TEXT
        with client.events("DEVICE_DELETED") as events:
            client.device_del(id="edu")
            assert told(events.get(SECONDS), DeviceDeleted).released
        if interface == "cdev":
            client.object_del(id="iommufd0")
