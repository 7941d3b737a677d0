"""Who was restarted finds everything as docs/restarts.md says: a manager, `vfiod run`, the program of a device.

What other files test is named in that page's tables.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.integration.exports.hypervisor import Hypervisor, memfd

from vfiod.client.methods.values import VectorFds
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor

PATIENCE = 120.0
MiB = 1 << 20
RAISE, ACKNOWLEDGE = 0x14, 0x18

MANAGER = """
import os, signal, sys
from vfiod.client.sync import Client
from vfiod.client.methods.values import VectorFds

path, trigger, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
client = Client.connect(path)
uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
client.device_add(driver="vfio-pci", id="dev0", mdev=uuid)
client.region_write(device="dev0", region="config", offset=4, size=2, value=6)
client.object_add(qom_type="memory-backend-fd", id="ram0", fd=memory)
client.dma_map(iova=0, size=1 << 20, memory_backend="ram0")
client.irq_start(device="dev0", mode="relayed", eventfds=[VectorFds(vector=0, trigger=trigger)])
client.send_fds([memory])
client.add_fd(fdset_id=5, opaque="spare")
client.send_fds([memory])
client.getfd(fdname="mine")
client.region_map(device="dev0", region="bar2")
print(client.query_machine().seq, flush=True)
signal.pause()
"""


def until(check: Callable[[], bool]) -> None:
    """Wait until something is so. Patience is for a machine that hangs; no test measures time."""
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.01)


def test_a_manager_that_was_killed_finds_all_of_it_again(tmp_path: Path) -> None:
    """Devices, memory, interrupts and fd sets are the machine's; names, and what it had mapped, were the session's."""
    with (
        own_server(tmp_path, name="vm1") as server,
        FileDescriptor(os.eventfd(0)) as trigger,
        memfd(MiB) as memory,
    ):
        arguments = [str(server.path), str(trigger.number), str(memory.number)]
        manager = subprocess.Popen(
            [sys.executable, "-c", MANAGER, *arguments], stdout=subprocess.PIPE, text=True,
            pass_fds=[trigger.number, memory.number],
        )  # fmt: skip
        assert manager.stdout is not None
        with manager.stdout as said:
            last = int(said.readline())
        manager.kill()
        manager.wait()
        with Client.connect(server.path, timeout=PATIENCE) as client:
            until(lambda: not client.query_devices()[0].held_by)  # the dead session's mapping of bar2
            picture = client.query_machine()
            assert picture.seq >= last, "one count for all sessions: what is above the last one seen was missed"
            assert [(one.id, one.state) for one in picture.devices] == [("dev0", "running")]
            assert [(one.iova, one.size) for one in client.query_dma()] == [(0, MiB)]
            assert [one.fdset_id for one in client.query_fdsets()] == [5]
            assert "mine" not in {one.name for one in client.query_fds()}
            client.region_write(device="dev0", region="bar0", offset=RAISE, size=4, value=1)
            assert os.eventfd_read(trigger.number) == 1, "the hypervisor hears its interrupts all the time"
            client.region_write(device="dev0", region="bar0", offset=ACKNOWLEDGE, size=4, value=1)
            client.irq_eoi(device="dev0", index="intx")
            with client.irq_start(device="dev0") as started:  # asked for again: the same eventfds
                client.region_write(device="dev0", region="bar0", offset=RAISE, size=4, value=2)
                again = started.irqs[0].trigger_fd
                assert isinstance(again, FileDescriptor)
                assert os.eventfd_read(again.number) == 1
            client.dma_unmap(iova=0, size=MiB)
            client.object_del(id="ram0")
            client.remove_fd(fdset_id=5)


def test_vfiod_run_is_killed_and_both_go_on(tmp_path: Path) -> None:
    """What it had started is found by its socket, and ended by its monitor."""
    script = 'echo "$0 $1 $$"; exec sleep 3600'
    command = ["run", "--quiet", "--mdev", "primer-pci,id=dev0", "--", "sh", "-c", script, "{qmp}", "{export}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vfiod.client.program", *command],
        env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    hypervisor = 0
    with process.stdout as said:
        qmp, export, text = said.readline().split()
        hypervisor = int(text)
        try:
            process.kill()
            process.wait()
            os.kill(hypervisor, 0)  # it is there
            with Client.connect(Path(qmp), timeout=PATIENCE) as client:
                assert [one.id for one in client.query_devices()] == ["dev0"]
                with Hypervisor(Path(export)) as attached:
                    assert attached.read(0, 0) == 0xF10D_0001
                client.quit()
        finally:
            os.kill(hypervisor, signal.SIGKILL)
    until(lambda: not Path(qmp).exists() or not accepts(Path(qmp)))


def accepts(path: Path) -> bool:
    from vfiod.client.spawn import accepts as asked

    return asked(path)


def served(path: Path) -> subprocess.Popen[bytes]:
    """A built-in device as a program of its own, once it accepts."""
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", "--type=primer-pci"]
    program = subprocess.Popen([*command, f"--socket-path={path}"])
    until(lambda: accepts(path) or program.poll() is not None)
    assert program.poll() is None
    return program


def test_a_device_whose_program_was_killed_is_used_again(tmp_path: Path) -> None:
    """`vfiod mdev serve`, killed and started again: memory, configuration space and interrupts are there."""
    door = tmp_path / "device.sock"
    program = served(door)
    try:
        with own_server(tmp_path, ["--allow-connect"], name="vm1") as server:
            use_again(server, door, program)
    finally:
        program.kill()
        program.wait()


def use_again(server: OwnServer, door: Path, program: subprocess.Popen[bytes]) -> None:
    with (
        Client.connect(server.path, timeout=PATIENCE) as client,
        client.events("DEVICE_ERROR", "DEVICE_RECONNECTED") as events,
        FileDescriptor(os.eventfd(0)) as trigger,
        memfd(MiB) as memory,
    ):
        client.dma_map(iova=0, size=MiB, fd=memory)
        client.device_add(driver="vfio-pci", id="dev0", socket=str(door), reconnect_ms=20)
        client.region_write(device="dev0", region="config", offset=4, size=2, value=6)
        client.irq_start(device="dev0", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
        program.kill()
        program.wait()
        assert events.get(PATIENCE).name == "DEVICE_ERROR"
        again = served(door)
        try:
            while events.get(PATIENCE).name != "DEVICE_RECONNECTED":
                pass
            os.pwrite(memory.number, b"guest memory", 0)
            for offset, value in ((0x20, 0), (0x24, 0), (0x28, 0), (0x2C, 12), (0x30, 1)):
                client.region_write(device="dev0", region="bar0", offset=offset, size=4, value=value)
            data = client.region_read(device="dev0", region="bar2", offset=0, length=12).data
            assert data == b"guest memory", "it masters its bus, and reaches guest memory"
            client.region_write(device="dev0", region="bar0", offset=RAISE, size=4, value=1)
            assert os.eventfd_read(trigger.number) == 1
        finally:
            again.kill()
            again.wait()
