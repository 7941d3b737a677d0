"""kill -9 of a real server under a real keeper: devices, memory and interrupts are there again."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd
from tests.integration.takeover.test_mediated import FCR, KINDS, RBR, Guest, connected, received

from vfiod.client.errors import ConnectFailed, ConnectionLost
from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client, EventStream
from vfiod.protocol.catalogue.monitor import MachineRestored
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

PATIENCE = 120.0
MiB = 1 << 20
RAISE, ACKNOWLEDGE, SCRATCH = 0x14, 0x18, 0x04


class Kept:
    """A vfiod under a keeper."""

    def __init__(self, place: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.path = place / "qmp.sock"
        self.place = place
        self._log = (place / "log").open("w+")
        self.keeper = subprocess.Popen(
            [
                *(sys.executable, "-m", "vfiod.client.program", "keeper", "--restarts", "1000", "--"),
                *("--name", "vm1", "--qmp", f"unix:{self.path}", *options),
            ],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env=environment,
        )
        self.dead: set[int] = set()
        self.pid = self.wait_new()

    def wait_new(self) -> int:
        """The process of a server that has not been seen dead, once it accepts."""
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.keeper.poll() is None and time.monotonic() < deadline, self.log()
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(self.path))
                    pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                    if pid not in self.dead:
                        return int(pid)
            except OSError:
                pass
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9, and the next one serves."""
        self.dead.add(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        self.pid = self.wait_new()

    def client(self) -> Client:
        return Client.connect(self.path, timeout=PATIENCE)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def forget(self) -> None:
        """The keeper is dead already."""
        self._log.close()

    def close(self) -> None:
        self.keeper.terminate()
        status = self.keeper.wait(PATIENCE)
        log = self.log()
        self._log.close()
        assert status == 0, log
        assert "Traceback" not in log, log
        assert "ResourceWarning" not in log, log


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.close()


def until(check: Callable[[], bool]) -> None:
    """Wait until something is so. Patience is for a machine that hangs; no test measures time."""
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.01)


def rung(fd: FileDescriptor) -> int:
    assert select.select([fd.number], [], [], PATIENCE)[0], "it was never signalled"
    return os.eventfd_read(fd.number)


def add(client: Client, id: str) -> str:
    uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
    client.device_add(driver="vfio-pci", id=id, mdev=uuid)
    client.region_write(device=id, region="config", offset=4, size=2, value=6)
    return uuid


def put(client: Client, id: str, register: int, value: int) -> None:
    client.region_write(device=id, region="bar0", offset=register, size=4, value=value)


def get(client: Client, id: str, register: int) -> int:
    value = client.region_read(device=id, region="bar0", offset=register, size=4).value
    assert isinstance(value, int)
    return value


def test_everything_is_there_again(kept: Kept) -> None:
    with eventfd() as line, eventfd() as message, memfd(MiB) as memory:
        with kept.client() as client:
            add(client, "a")
            add(client, "b")
            client.object_add(qom_type="memory-backend-fd", id="ram0", fd=memory)
            client.dma_map(iova=0, size=MiB, memory_backend="ram0")
            client.send_fds([memory.number])
            client.add_fd(fdset_id=3)
            client.irq_start(device="a", mode="relayed", eventfds=[VectorFds(vector=0, trigger=line)])
            client.irq_start(device="b", index="msi", eventfds=[VectorFds(vector=0, trigger=message)])
            client.region_map(device="b", region="bar2").close()
            before = client.query_machine()
        for _ in range(3):
            kept.kill()
            with kept.client() as client:
                after = client.query_machine()
                assert [(one.id, one.state) for one in after.devices] == [("a", "running"), ("b", "running")]
                assert restored(client) == MachineRestored(devices=["a", "b"], lost=[])
                assert after.seq > before.seq
                assert [one.held_by for one in after.devices] == [[], []], "sessions that are gone hold nothing"
                assert (after.mappings, after.objects, after.uuid) == (before.mappings, before.objects, before.uuid)
                assert [one.fdset_id for one in after.fdsets] == [3]
                put(client, "a", RAISE, 1)
                assert rung(line) >= 1
                put(client, "a", ACKNOWLEDGE, 1)
                client.irq_eoi(device="a", index="intx")
                put(client, "b", RAISE, 1)
                assert rung(message) >= 1, "and perhaps once more: what was up when the server died is up again"
                put(client, "b", ACKNOWLEDGE, 1)
                os.pwrite(memory.number, b"guest memory", 0)
                for offset, value in ((0x20, 0), (0x24, 0), (0x28, 0), (0x2C, 12), (0x30, 1)):
                    put(client, "b", offset, value)
                assert client.region_read(device="b", region="bar2", offset=0, length=12).data == b"guest memory"
                before = client.query_machine()
        with kept.client() as client:
            client.device_del(id="a")
            client.dma_unmap(iova=0, size=MiB)
            client.object_del(id="ram0")
        kept.kill()
        with kept.client() as client:
            assert [one.id for one in client.query_devices()] == ["b"]
            assert client.query_dma() == [] and client.query_objects() == []


def test_every_built_in_device_goes_on(tmp_path: Path) -> None:
    """The same as after a take-over, but for what was under way in the last 20 ms: here that is waited for."""
    (tmp_path / "disk").write_bytes(bytes(64 * 512))
    parameters = {
        "serial": {"port0": f"pty:{tmp_path}/tty", "port1": f"socket:{tmp_path}/port1"},
        "fba": {"file": f"{tmp_path}/disk"},
        "terminal3270": {"line": f"socket:{tmp_path}/screen"},
        "matrix": {"control": f"socket:{tmp_path}/control"},
    }
    with contextlib.ExitStack() as ends, memfd(MiB) as memory:
        kept = Kept(tmp_path, "--allow-path", str(tmp_path))
        ends.callback(kept.close)
        with kept.client() as client:
            client.dma_map(iova=0, size=MiB, fd=memory)
            for parent, kind, driver in KINDS:
                uuid = client.mdev_create(parent=parent, type=kind, parameters=parameters.get(parent, {})).uuid
                client.device_add(driver=driver, id=parent, mdev=uuid)
        guest_memory = FileDescriptor.duplicate_of(memory.number)
        ends.enter_context(guest_memory)
        terminal = ends.enter_context(FileDescriptor(os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)))
        peer, operator, control = (
            ends.enter_context(connected(f"{tmp_path}/{name}")) for name in ("port1", "screen", "control")
        )
        with kept.client() as client:
            guest = Guest(client, guest_memory)
            until(lambda: guest.register("bar1", 6) & 0x80 != 0)
            until(lambda: guest.attributes("terminal3270")["connected"] == "true")
            control.sendall(b"assign_domain 1\n")
            assert received(control.fileno(), 3) == b"ok\n"
            client.object_add(qom_type="memory-backend-fd", id="m", fd=memory)  # whoever has connected is stored now
            guest.memory.close()
        for turn in range(2):
            kept.kill()
            with kept.client() as client:
                assert restored(client) == MachineRestored(devices=[one[0] for one in KINDS], lost=[])
                guest = Guest(client, guest_memory)
                until(lambda guest=guest: guest.register("bar1", 6) & 0x80 != 0)  # type: ignore[misc]
                until(lambda guest=guest: guest.attributes("terminal3270")["connected"] == "true")  # type: ignore[misc]
                for region in ("bar0", "bar1"):
                    guest.set(region, FCR, 1)
                os.write(terminal.number, b"in by the pty")
                peer.sendall(b"in by the socket")
                assert (guest.take("bar0", 13), guest.take("bar1", 16)) == (b"in by the pty", b"in by the socket")
                guest.set("bar1", RBR, 0x41 + turn)
                assert received(peer.fileno(), 1) == b"AB"[turn : turn + 1]
                assert guest.blocks(6, 1) == bytes(512) if turn == 0 else b"0" * 512
                guest.blocks(5, 1, b"%d" % turn * 512)
                guest.show(b"turn %d" % turn)
                shown = b"\x01\xc3turn %d\xff\xef" % turn
                assert received(operator.fileno(), len(shown)) == shown
                control.sendall(b"assign_domain 1\nassign_adapter %d\n" % turn)
                assert received(control.fileno(), 6) == b"ok\nok\n"
                # What it tells by an event is in the state soon after; a command's answer leaves after it.
                client.object_add(qom_type="memory-backend-fd", id=f"m{turn}", fd=memory)
                assert guest.matrix() == " ".join(f"{adapter:02x}.0001" for adapter in range(turn + 1))
                guest.memory.close()
        kept.kill()
        with kept.client() as client:
            assert restored(client).lost == []
            for parent, _, _ in KINDS:
                client.device_del(id=parent)
            until(lambda: client.query_devices() == [])


class Load(threading.Thread):
    """A manager at work until its server dies, and its account: what was answered, and what was asked last."""

    def __init__(self, kept: Kept, dice: random.Random, devices: set[str], maps: set[int]) -> None:
        super().__init__()
        self.kept, self.dice = kept, dice
        self.devices, self.maps = devices, maps
        self.doubtful: str | int | None = None
        self.done = 0
        self.problem: Exception | None = None
        self.begun = threading.Event()

    def run(self) -> None:
        try:
            with self.kept.client() as client, client.events("DEVICE_DELETED") as gone, memfd(MiB) as memory:
                while True:
                    self.step(client, gone, memory)
                    self.done += 1
                    self.begun.set()
        except (ConnectionLost, ConnectFailed):
            pass
        except Exception as problem:
            self.problem = problem
        finally:
            self.begun.set()

    def step(self, client: Client, gone: EventStream, memory: FileDescriptor) -> None:
        put(client, "base", SCRATCH, self.done & 0xFFFF)
        if self.dice.random() < 0.5:
            iova = self.dice.randrange(1, 6) * MiB
            self.doubtful = iova
            if iova in self.maps:
                client.dma_unmap(iova=iova, size=MiB)
                self.maps.remove(iova)
            else:
                client.dma_map(iova=iova, size=MiB, fd=memory)
                self.maps.add(iova)
        else:
            id = f"d{self.dice.randrange(3)}"
            if id in self.devices:
                self.doubtful = id
                client.device_del(id=id)
                gone.get(PATIENCE)
                self.devices.remove(id)
            else:
                uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
                self.doubtful = id
                client.device_add(driver="vfio-pci", id=id, mdev=uuid)
                self.devices.add(id)
        self.doubtful = None


def gone_for_good(client: Client, id: str) -> None:
    until(lambda: id not in {one.id for one in client.query_devices()})


def restored(client: Client) -> MachineRestored:
    told = client.query_machine().restored
    assert isinstance(told, MachineRestored)
    return told


def open_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


KILLS = int(os.environ.get("VFIOD_KILLS", "20"))


def test_killed_at_random_moments_nothing_that_was_answered_is_lost(kept: Kept) -> None:
    """``VFIOD_KILLS=500`` for a long run; ``VFIOD_SEED`` for one that was."""
    seed = int(os.environ.get("VFIOD_SEED", "0")) or random.randrange(1 << 32)
    print("VFIOD_SEED", seed)
    dice = random.Random(seed)
    devices: set[str] = set()
    maps: set[int] = set()
    done = 0
    with eventfd() as message, memfd(MiB) as memory:
        with kept.client() as client:
            add(client, "base")
            client.dma_map(iova=0, size=MiB, fd=memory)
            client.irq_start(device="base", index="msi", eventfds=[VectorFds(vector=0, trigger=message)])
            held = len(client.query_fds())
        at_rest = open_fds(kept.keeper.pid)
        for _ in range(KILLS):
            load = Load(kept, dice, devices, maps)
            load.start()
            load.begun.wait(PATIENCE)
            time.sleep(dice.random() * 0.05)
            kept.kill()
            load.join(PATIENCE)
            assert load.problem is None, load.problem
            done += load.done
            with kept.client() as client:
                machine = client.query_machine()
                assert restored(client).lost == []
                there = {one.id for one in machine.devices} - {"base"}
                assert there ^ devices <= {load.doubtful}, (there, devices, load.doubtful)
                mapped = {one.iova for one in machine.mappings} - {0}
                assert mapped ^ maps <= {load.doubtful}, (mapped, maps, load.doubtful)
                if load.doubtful in there:
                    # A removal that had begun goes on; one that had not is asked for again.
                    with contextlib.suppress(RemoteError):
                        client.device_del(id=str(load.doubtful))
                    gone_for_good(client, str(load.doubtful))
                devices = {one.id for one in client.query_devices()} - {"base"}
                maps = mapped
                put(client, "base", RAISE, 1)
                assert rung(message) >= 1
                put(client, "base", ACKNOWLEDGE, 1)
        with kept.client() as client:
            with client.events("DEVICE_DELETED") as gone:
                for id in devices:
                    client.device_del(id=id)
                    gone.get(PATIENCE)
            for iova in maps:
                client.dma_unmap(iova=iova, size=MiB)
            for uuid in client.query_machine().mdevs:
                with contextlib.suppress(RemoteError):  # but that of the base
                    client.mdev_destroy(uuid=uuid)
            until(lambda: len(client.query_fds()) == held)
            until(lambda: open_fds(kept.keeper.pid) == at_rest)
    print(f"{KILLS} kills, {done} steps in between")


def test_a_hypervisor_attaches_again(kept: Kept) -> None:
    """Its connection dies with the server; the socket does not, and whoever comes meanwhile waits in it."""
    door = kept.place / "door.sock"
    with kept.client() as client, memfd(MiB) as memory, eventfd() as trigger:
        add(client, "a")
        client.device_export_add(id="e0", type="vfio-user", device="a", path=str(door))
        with Hypervisor(door) as hypervisor:
            hypervisor.map(0, MiB, memory.number)
            hypervisor.trigger(1, trigger.number)
            hypervisor.master()
            hypervisor.write(0, SCRATCH, 5)
            kept.kill()
            assert hypervisor.gone()
    with kept.client() as client:
        machine = client.query_machine()
        assert any("it attaches again" in one for one in restored(client).lost), restored(client)
        assert machine.mappings == []
        assert not any(one.active for one in client.query_irqs(device="a"))
        with Hypervisor(door) as hypervisor, memfd(MiB) as memory, eventfd() as trigger:
            assert not hypervisor.read(7, 4, 2) & 4, "bus mastering is off"
            hypervisor.map(0, MiB, memory.number)
            hypervisor.trigger(1, trigger.number)
            hypervisor.master()
            hypervisor.write(0, RAISE, 1)
            assert rung(trigger) >= 1


def test_what_cannot_be_restored_is_said(tmp_path: Path) -> None:
    """A device of another program is left out, the others are there; so is the word of it."""
    kept = Kept(tmp_path, "--allow-connect")
    door = tmp_path / "device.sock"
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", "--type=primer-pci"]
    program = subprocess.Popen([*command, f"--socket-path={door}"])
    try:
        until(door.exists)
        with kept.client() as client:
            add(client, "mine")
            client.device_add(driver="vfio-pci", id="theirs", socket=str(door))
        kept.kill()
        with kept.client() as client:
            machine = client.query_machine()
            assert [one.id for one in machine.devices] == ["mine"]
            [sentence] = restored(client).lost
            assert "device 'theirs'" in sentence and "another program" in sentence
            client.device_add(driver="vfio-pci", id="theirs", socket=str(door))
    finally:
        program.kill()
        program.wait()
        kept.close()


def test_a_clean_end_leaves_nothing_and_another_vm_takes_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with kept.client() as client:
        add(client, "a")
        client.quit()
    assert kept.keeper.wait(PATIENCE) == 0
    kept.close()


def test_the_death_of_the_keeper_is_said_and_no_more(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with kept.client() as client:
        add(client, "a")
        kept.keeper.kill()
        kept.keeper.wait()
        add(client, "b")
        assert [one.id for one in client.query_devices()] == ["a", "b"]
        until(lambda: "From now on a crash of this server loses its devices" in kept.log())
        client.quit()
    until(lambda: not kept.path.exists())
    kept.forget()


def test_a_state_that_kills_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Servers that die while they begin: each is counted in the state's memory, and the fourth begins with nothing."""
    place = tmp_path / "parent"
    place.mkdir()
    (place / "deadly.py").write_text(DEADLY)
    about = place / "deadly-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vfiod.mdev_parents]\ndeadly = deadly:Deadly\n")
    environment = os.environ | {"PYTHONPATH": ":".join([str(place), *filter(None, sys.path)]), "DEADLY": str(place)}
    kept = Kept(tmp_path, "--sandbox", "off", environment=environment)
    try:
        with kept.client() as client:
            uuid = client.mdev_create(parent="deadly", type="primer-pci").uuid
            client.device_add(driver="vfio-pci", id="a", mdev=uuid)
        (place / "kill").touch()
        kept.dead.add(kept.pid)
        os.kill(kept.pid, signal.SIGKILL)
        kept.pid = kept.wait_new()
        with kept.client() as client:
            assert client.query_devices() == []
            [sentence] = restored(client).lost
            assert sentence == "everything: 3 servers have died while they began with it"
        assert kept.log().count("vfiod was killed by signal 9: starting it again") == 4
    finally:
        kept.close()


DEADLY = """
import os
import signal
from pathlib import Path

from vfiod.server.mdev.samples.pci import Primer


class Deadly(Primer):
    name = "deadly"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        if (Path(os.environ["DEADLY"]) / "kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
"""
