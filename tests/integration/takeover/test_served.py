"""Devices that other programs serve go along: the program notices nothing, and what it does is not lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd, rung
from tests.integration.vfio_user.conftest import (
    ADDRESS,
    COUNT,
    DMA,
    ERROR,
    EVENTFDS,
    MAPS,
    MISBEHAVE,
    PROGRAM,
    READ,
    SCRATCH,
    SETS,
    SIGNAL,
)

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.exports import DeviceExportDetached
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

from .conftest import PATIENCE, House, until
from .test_deaths import BETWEEN, STEPS, take
from .test_replaced import MODES, get, put
from .test_replaced import rung as heard

RAM: Final = 0x1000_0000
MiB: Final = 1 << 20


class Programs:
    """Programs that serve devices, and end with the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> Path:
        """One at a path, once it accepts."""
        path = self._directory / f"{name}.sock"
        path.unlink(missing_ok=True)
        program = subprocess.Popen([sys.executable, *command, f"--socket-path={path}"])
        self._all.append(program)
        until(lambda: path.exists() or program.poll() is not None)
        assert program.poll() is None
        return path

    def plain(self, name: str = "p0", *options: str) -> Path:
        """The tests' own."""
        return self.start(name, str(PROGRAM), *options)

    def passed(self, *options: str) -> socket.socket:
        """The tests' own, connected; the other end."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(PROGRAM), f"--fd={theirs.fileno()}", *options]
            self._all.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
        return ours

    def mdev(self, name: str, kind: str = "primer-pci", *options: str) -> Path:
        """A built-in device as one of its own."""
        return self.start(name, "-m", "vfiod.client.program", "mdev", "serve", f"--type={kind}", *options)

    def kill(self) -> None:
        """The last that was started."""
        self._all[-1].kill()
        self._all[-1].wait()

    def close(self) -> None:
        for one in self._all:
            one.kill()
            one.wait()


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    made = Programs(tmp_path)
    yield made
    made.close()


def dma(client: Client, how: int, iova: int, count: int, id: str = "n0") -> int:
    """Have the tests' device do DMA; the errno it met."""
    put(client, ADDRESS, iova, id=id)
    put(client, ADDRESS + 4, 0, id=id)
    put(client, COUNT, count, id=id)
    put(client, DMA, how, id=id)
    return get(client, ERROR, id=id)


@pytest.mark.parametrize("options", [(), ("--twin",), ("--no-fds",)])
def test_the_program_notices_nothing(house: House, programs: Programs, options: tuple[str, ...]) -> None:
    """Registers, mappings, eventfds, DMA by messages and by fd: as before, and the program was told nothing."""
    house.first("--allow-connect")
    path = programs.plain("p0", *options)
    with_fds = options != ("--no-fds",)
    with house.connect() as client, memfd(MiB, b"guest") as memory, eventfd() as bell:
        client.dma_map(iova=RAM, size=MiB, fd=memory)
        client.device_add(driver="vfio-pci", id="n0", socket=str(path))
        put(client, 4, 0x0006, "config")
        if with_fds:
            client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=3, trigger=bell)])
        put(client, SCRATCH, 7)
        told = [get(client, one) for one in (MAPS, EVENTFDS, SETS)]
        for _ in range(2):
            house.next("--allow-connect")
            assert get(client, SCRATCH) == 7
            assert [get(client, one) for one in (MAPS, EVENTFDS, SETS)] == told
            assert get(client, 4, "config") & 0xFFFF == 0x0006
            assert dma(client, 1, RAM, 4) == 0
            assert get(client, READ) == int.from_bytes(b"gues", "little")
            if with_fds:
                put(client, SIGNAL, 3)
                assert rung(bell) == 1
                assert dma(client, 3, RAM, 8) == 0
                assert os.pread(memory.number, 8, 0) == bytes(range(8))
                os.pwrite(memory.number, b"guest", 0)
        # What it was told can be taken back, and more be told.
        client.dma_unmap(iova=RAM, size=MiB)
        assert get(client, MAPS) == 0
        if with_fds:
            client.irq_stop(device="n0", index="msix")
            assert get(client, EVENTFDS) == told[1] - 1
        client.device_del(id="n0")
        until(lambda: client.query_devices() == [])
        # It lets go of one client, and has the next.
        client.device_add(driver="vfio-pci", id="n1", socket=str(path))
        assert get(client, MAPS, id="n1") == 0


def test_a_passed_connection_goes_along(house: House, programs: Programs) -> None:
    house.first()
    with house.connect() as client:
        with programs.passed() as sock:
            client.device_add(driver="vfio-pci", id="n0", socket_fd=sock)
        put(client, SCRATCH, 7)
        house.next()
        assert get(client, SCRATCH) == 7
        [device] = client.query_devices()
        assert (device.backend, device.state) == ("vfio-user", "running")


def test_under_load_no_access_fails_and_no_interrupt_is_lost(house: House, programs: Programs) -> None:
    """Three built-in devices in programs of their own: two by the monitor, one by a hypervisor."""
    house.first("--allow-connect")
    door = house.directory / "door.sock"
    done = threading.Event()
    failures: list[BaseException] = []
    counts = [0, 0, 0]

    def load(number: int) -> None:
        try:
            with house.connect() as client:
                while not done.is_set():
                    value = counts[number] + 1
                    put(client, 0x04, value, id=f"n{number}")
                    assert get(client, 0x04, id=f"n{number}") == value ^ 0xFFFF_FFFF
                    put(client, 0x14, 1, id=f"n{number}")
                    counts[number] = value
        except BaseException as error:
            failures.append(error)

    bells = [FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2)]
    with house.connect() as client, bells[0], bells[1], eventfd() as trigger, memfd(MiB, b"guest") as memory:
        for number in range(3):
            client.device_add(driver="vfio-pci", id=f"n{number}", socket=str(programs.mdev(f"p{number}")))
        for number, mode in enumerate(MODES):
            put(client, 4, 0x0006, "config", f"n{number}")
            eventfds = [VectorFds(vector=0, trigger=bells[number])]
            client.irq_start(device=f"n{number}", index="msix", eventfds=eventfds, mode=mode)
        client.device_export_add(id="e0", type="vfio-user", device="n2", path=str(door))
        with Hypervisor(door) as hypervisor:
            hypervisor.map(0, MiB, memory.number)
            hypervisor.trigger(2, trigger.number)
            hypervisor.master()

            def load_by_export() -> None:
                try:
                    while not done.is_set():
                        value = counts[2] + 1
                        hypervisor.write(0, 0x04, value)
                        assert hypervisor.read(0, 0x04) == value ^ 0xFFFF_FFFF
                        hypervisor.write(0, 0x14, 1)
                        assert rung(trigger) == 1
                        assert hypervisor.dma(0, 64, 5, 1) == 1
                        assert hypervisor.read(2, 64) == int.from_bytes(b"gues", "little")
                        counts[2] = value
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
            threads.append(threading.Thread(target=load_by_export))
            for thread in threads:
                thread.start()

            def all_went_on() -> None:
                before = list(counts)
                until(lambda: failures != [] or all(a > b for a, b in zip(counts, before, strict=True)))

            for _ in range(3):
                all_went_on()
                house.next("--allow-connect")
            all_went_on()
            done.set()
            for thread in threads:
                thread.join(PATIENCE)
            assert failures == []
            assert [one.process.poll() for one in house.servers] == [0, 0, 0, None]
        total = [0, 0]

        def all_heard() -> bool:
            for number, bell in enumerate(bells):
                total[number] += heard(bell)
            return total == counts[:2]

        until(all_heard)


def test_a_hypervisor_stays_and_is_told_when_the_program_goes(house: House, programs: Programs) -> None:
    """What its client had mapped is remembered: another program in its place has other memory."""
    house.first("--allow-connect")
    path = programs.plain()
    door = house.directory / "door.sock"
    with house.connect() as client, memfd(MiB) as memory:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path), reconnect_ms=20)
        client.device_export_add(id="e0", type="vfio-user", device="n0", path=str(door))
        with Hypervisor(door) as hypervisor, eventfd() as vector, eventfd() as error:
            hypervisor.map(RAM, MiB, memory.number)
            hypervisor.trigger(2, vector.number)
            hypervisor.trigger(3, error.number)
            hypervisor.master()
            info, fd = hypervisor.region(2)
            assert fd is not None
            fd.close()
            assert info.mappable
            house.next("--allow-connect")
            hypervisor.write(0, ADDRESS, RAM, 8)
            hypervisor.write(0, COUNT, 8)
            hypervisor.write(0, DMA, 3)
            assert os.pread(memory.number, 8, 0) == bytes(range(8))
            hypervisor.write(0, SIGNAL, 0)
            assert rung(vector) == 1
            events = client.events()
            programs.kill()
            programs.plain()
            while (event := events.get(PATIENCE)).name != "DEVICE_EXPORT_DETACHED":
                pass
            assert isinstance(event.data, DeviceExportDetached)
            assert "attach again" in event.data.reason
            assert rung(error) == 1
            assert hypervisor.gone()


@pytest.mark.parametrize("step", STEPS)
def test_a_taker_that_dies_leaves_the_connection_where_it_was(house: House, programs: Programs, step: str) -> None:
    server = house.first("--allow-connect")
    path = programs.mdev("p0")
    needs = ["backend:vfio-user", "device:vfio-pci"]
    with house.connect() as client, eventfd() as bell:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path))
        put(client, 4, 0x0006, "config")
        client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=0, trigger=bell)])
        put(client, 0x04, 7)
        take(house.hand, step, needs)
        assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF
        put(client, 0x14, 1)
        assert rung(bell) == 1
        assert server.process.poll() is None
        house.next("--allow-connect")
        assert server.ended() == 0
        assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF
        put(client, 0x14, 1)
        assert rung(bell) == 1


def test_a_program_that_does_not_answer_is_named_and_nothing_moves(house: House, programs: Programs) -> None:
    server = house.first("--allow-connect")
    path = programs.plain()
    with house.connect() as client:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path), x_msg_timeout=100)
        put(client, MISBEHAVE, 1)
        with pytest.raises(RemoteError, match="not answered within 100 ms"):
            get(client, SCRATCH)
        second = house.next("--allow-connect")
        assert second.ended() == 1
        assert f"REGION_READ, which {path} has not answered" in second.log()
        assert server.process.poll() is None
        assert client.query_devices()[0].id == "n0"
        # Without it there is nothing in the way.
        client.device_del(id="n0")
        until(lambda: client.query_devices() == [])
        house.next("--allow-connect")
        assert server.ended() == 0


def test_one_that_is_away_is_found_again_by_the_next_process(house: House, programs: Programs) -> None:
    server = house.first("--allow-connect")
    path = programs.plain()
    with house.connect() as client, memfd(MiB) as memory, eventfd() as bell:
        client.dma_map(iova=RAM, size=MiB, fd=memory)
        client.device_add(driver="vfio-pci", id="n0", socket=str(path), reconnect_ms=20)
        put(client, 4, 0x0006, "config")
        client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=3, trigger=bell)])
        events = client.events()
        programs.kill()
        while events.get(PATIENCE).name != "DEVICE_ERROR":
            pass
        house.next("--allow-connect")
        assert server.ended() == 0
        with pytest.raises(RemoteError, match="the server is gone"):
            get(client, SCRATCH)
        programs.plain()
        while events.get(PATIENCE).name != "DEVICE_RECONNECTED":
            pass
        assert get(client, MAPS) == 1
        put(client, SIGNAL, 3)
        assert rung(bell) == 1
        assert dma(client, 3, RAM, 8) == 0
        assert os.pread(memory.number, 8, 0) == bytes(range(8))
        assert client.query_device_exports() == []
        assert client.query_devices()[0].group is UNSET


def test_a_line_that_waits_to_be_completed_goes_along(house: House, programs: Programs) -> None:
    house.first("--allow-connect")
    path = programs.plain()
    with house.connect() as client, eventfd() as line:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path))
        client.irq_start(device="n0", mode="relayed", eventfds=[VectorFds(vector=0, trigger=line)])
        put(client, SIGNAL, 0x8000_0000)
        assert rung(line) == 1
        house.next("--allow-connect")
        client.irq_eoi(device="n0", index="intx")
        put(client, SIGNAL, 0x8000_0000)
        assert rung(line) == 1
        client.irq_eoi(device="n0", index="intx")
        put(client, SIGNAL, 0x8000_0000)
        assert rung(line) == 1


@pytest.mark.parametrize("step", ["whole", "made", "commit"])
def test_a_giver_that_dies_when_all_is_given_leaves_the_connection_to_the_taker(
    house: House, programs: Programs, step: str
) -> None:
    server = house.first("--allow-connect")
    path = house.directory / "between"
    device = programs.plain()
    with house.connect() as client, eventfd() as bell:
        client.device_add(driver="vfio-pci", id="n0", socket=str(device))
        client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=0, trigger=bell)])
        put(client, SCRATCH, 7)
        command = [sys.executable, "-c", BETWEEN, str(house.hand), str(path), str(server.process.pid), step]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as between:
            assert between.stdout is not None
            assert between.stdout.readline() == b"listening\n"
            house.start("--take-over", f"unix:{path}", "--allow-path", str(house.directory), "--allow-connect")
            assert server.ended() == -9
        assert get(client, SCRATCH) == 7
        put(client, SIGNAL, 0)
        assert rung(bell) == 1


def test_a_serial_card_of_a_program_goes_along(house: House, programs: Programs) -> None:
    """Another device than the others: ports, INTx alone, no memory to map."""
    first = house.first("--allow-connect")
    path = programs.mdev("p0", "serial-2")
    with house.connect() as client:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path))
        client.region_write(device="n0", region="bar0", offset=7, size=1, value=0x5A)
        before = client.query_regions(device="n0"), client.query_irqs(device="n0"), client.query_devices()
        house.next("--allow-connect")
        assert first.ended() == 0
        assert (client.query_regions(device="n0"), client.query_irqs(device="n0"), client.query_devices()) == before
        assert client.region_read(device="n0", region="bar0", offset=7, size=1).value == 0x5A
        client.device_reset(id="n0")


def test_no_fd_is_left_of_a_device_that_came_along(house: House, programs: Programs) -> None:
    house.first("--allow-connect")
    path = programs.plain("p0", "--twin")

    def taken_over(client: Client) -> int:
        pid = house.next("--allow-connect").process.pid
        assert client.query_status().running is True  # it serves: what the take-over itself needed is closed
        return pid

    with house.connect() as client, eventfd() as bell:
        bare = kinds_of_fds(taken_over(client))
        client.device_add(driver="vfio-pci", id="n0", socket=str(path))
        client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=3, trigger=bell)])
        pid = taken_over(client)
        assert kinds_of_fds(pid)["anon_inode"] > bare["anon_inode"]
        assert kinds_of_fds(pid)["socket"] == bare["socket"] + 2
        client.device_del(id="n0")
        until(lambda: client.query_devices() == [])
        until(lambda: kinds_of_fds(pid)["socket"] == bare["socket"])
        assert {kind: count for kind, count in kinds_of_fds(pid).items() if bare[kind] != count} == {}


def kinds_of_fds(process: int) -> Counter[str]:
    """How many fds of each kind a process has: ``socket``, ``anon_inode``, ``pipe``, files by name without number."""
    here = Path(f"/proc/{process}/fd")
    return Counter(str(one.readlink()).partition(":")[0].rstrip("0123456789") for one in here.iterdir())


def test_a_sandbox_that_lets_it_connect_nowhere_says_so(house: House, programs: Programs) -> None:
    """The connection goes along; found again it is only by a process that may connect."""
    house.first("--allow-connect")
    path = programs.plain()
    with house.connect() as client:
        client.device_add(driver="vfio-pci", id="n0", socket=str(path), reconnect_ms=20)
        put(client, SCRATCH, 7)
        house.next()
        assert get(client, SCRATCH) == 7
        events = client.events()
        programs.kill()
        programs.plain()
        reasons: list[str] = []
        while not any("only with --allow-connect" in one for one in reasons):
            event = events.get(PATIENCE)
            if isinstance(event.data, DeviceError):
                reasons.append(event.data.reason)
        assert "is gone" in reasons[0]
        house.next("--allow-connect")
        while events.get(PATIENCE).name != "DEVICE_RECONNECTED":
            pass
