"""kill -9 of a server that has devices of other programs: they are there, and are found again by their sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd
from tests.integration.vfio_user.conftest import (
    ADDRESS,
    COUNT,
    DMA,
    ERROR,
    EVENTFDS,
    MAPS,
    PROGRAM,
    SIGNAL,
)

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.monitor import MachineRestored
from vfiod.protocol.errors import RemoteError

from .test_crash import PATIENCE, RAISE, Kept, get, put, restored, rung, until

RAM: Final = 0x1000_0000
MiB: Final = 1 << 20


class Program:
    """The tests' own device, in a program of its own."""

    def __init__(self, place: Path, *options: str) -> None:
        self.path = place / "device.sock"
        self._options = options
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, str(PROGRAM), f"--socket-path={self.path}", *self._options])
        until(lambda: self.path.exists() or process.poll() is not None)
        assert process.poll() is None
        return process

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, "--allow-connect")
    yield made
    made.close()


def found(client: Client, id: str = "d") -> None:
    """Wait until a device's program is connected again."""

    def answers() -> bool:
        try:
            get(client, id, 0)
        except RemoteError as error:
            assert error.errno == "ENOTCONN", error
            return False
        return True

    until(answers)


def command(client: Client, value: int | None = None) -> int:
    """The command register of the device; or set it."""
    if value is not None:
        client.region_write(device="d", region="config", offset=4, size=2, value=value)
    # The device has its configuration space in BAR 0 too, as nobody else shows it.
    return get(client, "d", 0x104) & 0xFFFF


def dma(client: Client, how: int, iova: int, count: int) -> int:
    for register, value in ((ADDRESS, iova), (ADDRESS + 4, 0), (COUNT, count), (DMA, how)):
        put(client, "d", register, value)
    return get(client, "d", ERROR)


def test_it_is_found_again_and_told_everything(kept: Kept, program: Program) -> None:
    """The same device with mappings, eventfds and configuration space; what it is asked meanwhile says why not."""
    with eventfd() as message, memfd(MiB) as memory:
        with kept.client() as client:
            client.dma_map(iova=RAM, size=MiB, fd=memory)
            client.device_add(driver="vfio-pci", id="d", socket=str(program.path), reconnect_ms=20)
            command(client, 6)
            client.irq_start(device="d", index="msix", eventfds=[VectorFds(vector=3, trigger=message)])
            told = get(client, "d", MAPS), get(client, "d", EVENTFDS)
            before = client.query_irqs(device="d")
        for _ in range(2):
            kept.kill()
            with kept.client() as client:
                assert restored(client) == MachineRestored(devices=["d"], lost=[])
                assert [(one.id, one.state, one.backend) for one in client.query_devices()] == [
                    ("d", "running", "vfio-user")
                ]
                found(client)
                assert (get(client, "d", MAPS), get(client, "d", EVENTFDS)) == told
                assert command(client) == 6
                put(client, "d", SIGNAL, 3)
                assert rung(message) >= 1
                assert dma(client, 3, RAM, 8) == 0
                assert os.pread(memory.number, 8, 0) == bytes(range(8))
                assert [one.active for one in client.query_irqs(device="d")] == [one.active for one in before]
        with kept.client() as client:
            client.irq_stop(device="d", index="msix")
            assert get(client, "d", EVENTFDS) == told[1] - 1
            client.dma_unmap(iova=RAM, size=MiB)
            assert get(client, "d", MAPS) == 0
            client.device_del(id="d")
            until(lambda: client.query_devices() == [])


def test_a_built_in_device_in_a_program_of_its_own(kept: Kept) -> None:
    door = kept.place / "primer.sock"
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", "--type=primer-pci"]
    with subprocess.Popen([*command, f"--socket-path={door}"]) as program, eventfd() as message:
        try:
            until(door.exists)
            with kept.client() as client:
                client.device_add(driver="vfio-pci", id="d", socket=str(door), reconnect_ms=20)
                client.region_write(device="d", region="config", offset=4, size=2, value=6)
                client.irq_start(device="d", index="msix", eventfds=[VectorFds(vector=0, trigger=message)])
            kept.kill()
            with kept.client() as client:
                assert restored(client) == MachineRestored(devices=["d"], lost=[])
                found(client)
                assert get(client, "d", 0) == 0xF10D_0001
                put(client, "d", RAISE, 1)
                assert rung(message) >= 1
        finally:
            program.kill()


def test_a_level_interrupt_goes_on(kept: Kept, program: Program) -> None:
    with eventfd() as line:
        with kept.client() as client:
            client.device_add(driver="vfio-pci", id="d", socket=str(program.path), reconnect_ms=20)
            client.irq_start(device="d", mode="relayed", eventfds=[VectorFds(vector=0, trigger=line)])
            put(client, "d", SIGNAL, 0x8000_0000)
            assert rung(line) >= 1
        kept.kill()
        with kept.client() as client:
            found(client)
            put(client, "d", SIGNAL, 0x8000_0000)
            assert rung(line) >= 1, "nobody completed the last one, and it is not waited for"
            client.irq_eoi(device="d", index="intx")
            put(client, "d", SIGNAL, 0x8000_0000)
            assert rung(line) >= 1


def test_one_that_is_gone_as_well_is_waited_for(kept: Kept, program: Program) -> None:
    """It stays, and shows that nobody is there; mappings change meanwhile; then it is found."""
    with memfd(MiB) as memory:
        with kept.client() as client:
            client.dma_map(iova=RAM, size=MiB, fd=memory)
            client.device_add(driver="vfio-pci", id="d", socket=str(program.path), reconnect_ms=20)
        os.kill(program.process.pid, signal.SIGSTOP)  # it notices nothing: neither the end, nor who comes
        kept.kill()
        program.close()
        with kept.client() as client:
            assert restored(client) == MachineRestored(devices=["d"], lost=[])
            with pytest.raises(RemoteError, match="started again after a crash, and tries to reach it every 20 ms"):
                get(client, "d", 0)
            client.dma_unmap(iova=RAM, size=MiB)
            client.dma_map(iova=2 * RAM, size=MiB, fd=memory)
            # And once more, as it is now.
        kept.kill()
        with kept.client() as client:
            assert restored(client) == MachineRestored(devices=["d"], lost=[])
            program.process = program.start()
            found(client)
            assert get(client, "d", MAPS) == 1
            assert dma(client, 3, 2 * RAM, 8) == 0
            assert os.pread(memory.number, 8, 0) == bytes(range(8))


def test_what_a_hypervisor_had_is_not_given_again(kept: Kept, program: Program) -> None:
    """Its memory and its eventfds are not the device's any more, and the device masters its bus no more."""
    door = kept.place / "door.sock"
    with kept.client() as client, memfd(MiB) as memory, eventfd() as trigger:
        client.device_add(driver="vfio-pci", id="d", socket=str(program.path), reconnect_ms=20)
        bare = get(client, "d", EVENTFDS)
        client.device_export_add(id="e0", type="vfio-user", device="d", path=str(door))
        with Hypervisor(door) as hypervisor:
            hypervisor.map(RAM, MiB, memory.number)
            hypervisor.trigger(2, trigger.number)
            hypervisor.master()
            assert hypervisor.read(0, 0x104, 2) & 4
            kept.kill()
            assert hypervisor.gone()
    with kept.client() as client:
        assert any("it attaches again" in one for one in restored(client).lost), restored(client)
        found(client)
        assert (get(client, "d", MAPS), get(client, "d", EVENTFDS)) == (0, bare)
        assert not command(client) & 4
        with Hypervisor(door) as hypervisor, memfd(MiB) as memory, eventfd() as trigger:
            hypervisor.map(RAM, MiB, memory.number)
            hypervisor.trigger(2, trigger.number)
            hypervisor.master()
            hypervisor.write(0, SIGNAL, 0)
            assert rung(trigger) >= 1


def test_another_device_in_its_place_is_refused(kept: Kept, program: Program) -> None:
    with kept.client() as client:
        client.device_add(driver="vfio-pci", id="d", socket=str(program.path), reconnect_ms=20)
    program.close()
    program._options = ("--id=0x43",)
    program.process = program.start()
    kept.kill()
    with kept.client() as client:
        assert restored(client) == MachineRestored(devices=["d"], lost=[])

        def refused() -> bool:
            with pytest.raises(RemoteError) as caught:
                get(client, "d", 0)
            return "another device answers" in str(caught.value)

        until(refused)
        client.device_del(id="d")
        until(lambda: client.query_devices() == [])


def test_a_passed_connection_and_one_that_is_for_once_are_said(tmp_path: Path, program: Program) -> None:
    """What cannot be connected to again is left out, by name."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(PROGRAM), f"--fd={theirs.fileno()}"]
    passed = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    kept = Kept(tmp_path, "--allow-connect")
    try:
        with kept.client() as client:
            with ours:
                client.device_add(driver="vfio-pci", id="passed", socket_fd=ours)
            client.device_add(driver="vfio-pci", id="once", socket=str(program.path))
        kept.kill()
        with kept.client() as client:
            assert client.query_devices() == []
            first, second = restored(client).lost
            assert "device 'passed'" in first and "socket-fd" in first, first
            assert "device 'once'" in second and "reconnect-ms is 0" in second, second
        # The program heard that its client is gone: no store holds the connection.
        assert passed.wait(PATIENCE) == 0
    finally:
        kept.close()
        passed.kill()
        passed.wait()
