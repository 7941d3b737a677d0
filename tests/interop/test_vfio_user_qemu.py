"""A real QEMU attaches to a device that vfiod exports; a Linux guest in it uses the device from inside.

Nothing of QEMU or of the guest is ours to change: ``-device vfio-user-pci`` as the distribution builds it, the lab's
kernel, and a program that drives the device through sysfs and vfio-pci (``tests/lab/small/init.c``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab.places import REPO, find_kernel
from tests.lab.qmp import QmpError
from tests.lab.small.guest import (
    SEEN,
    WAIT_SECONDS,
    Finding,
    SmallGuest,
    build_initrd,
    find_program,
    unavailable_reason,
    vfio_user,
)

from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.exports import ExportState
from vfiod.server.sandbox.files import is_shared

pytestmark = pytest.mark.qemu

REQUIRED = os.environ.get("VFIOD_LAB_REQUIRED", "") not in ("", "0")
MASTER = 1 << 2
COMMAND = 4
PORT = "pcie-root-port,id=port1,bus=pcie.0,addr=0x11,chassis=1,slot=1"


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = unavailable_reason()
    if reason is not None:
        (pytest.fail if REQUIRED else pytest.skip)(f"no guest with vfio-user here: {reason}")
    return build_initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture
def directory() -> Iterator[Path]:
    # Short: a Unix socket's path may have 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="vfiod-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(directory: Path) -> Iterator[OwnServer]:
    with own_server(directory, name="vm1") as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()


@pytest.fixture
def client(server: OwnServer) -> Iterator[Client]:
    with Client.connect(server.path, timeout=60) as connected:
        yield connected


def offer(client: Client, directory: Path, name: str = "d0", parameters: dict[str, Any] | None = None) -> Path:
    """Make the built-in PCI device, add it, and export it; returns the socket."""
    uuid = client.mdev_create(parent="primer", type="primer-pci", parameters=parameters or {}).uuid
    client.device_add(driver="vfio-pci", id=name, mdev=uuid)
    path = directory / f"{name}.sock"
    client.device_export_add(id=f"x-{name}", type="vfio-user", device=name, path=str(path))
    return path


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def all_well(findings: list[Finding], rounds: int = 1) -> None:
    assert [one for one in findings if not one.ok] == []
    names = [one.name for one in findings if one.name in SEEN]
    assert names == list(SEEN) * rounds


def memory_word(client: Client, name: str = "d0") -> int:
    """The first word of BAR2, which each run of the guest makes one more through its mapping."""
    value = client.region_read(device=name, region="bar2", offset=0, size=4).value
    assert isinstance(value, int)
    return value


def at_rest(client: Client, name: str = "d0") -> None:
    """Nobody is attached: no memory of the hypervisor's, no interrupt, no bus mastering is left."""
    until(lambda: client.query_device_exports()[0].state is ExportState.LISTENING, "the export is free again")
    assert client.query_dma() == []
    assert [irq.name for irq in client.query_irqs(device=name) if irq.active and not irq.reserved] == []
    command = client.region_read(device=name, region="config", offset=COMMAND, size=2).value
    assert isinstance(command, int) and not command & MASTER


@pytest.mark.parametrize("behind", ["root", "port"])
def test_a_guest_uses_the_device(client: Client, directory: Path, initrd: Path, behind: str) -> None:
    """Registers, mapped memory, MSI, INTx, DMA to and from guest memory; then QEMU ends and nothing is left."""
    path = offer(client, directory)
    place = {"bus": "port1"} if behind == "port" else {"addr": "0x10"}
    with (
        client.events("DEVICE_EXPORT_ATTACHED", "DEVICE_EXPORT_DETACHED") as events,
        SmallGuest(directory, initrd, [PORT, vfio_user(path, **place)]) as guest,
    ):
        all_well(guest.wait_done())
        assert events.get(timeout=60).name == "DEVICE_EXPORT_ATTACHED"
        guest.wait_ended()
        assert events.get(timeout=60).name == "DEVICE_EXPORT_DETACHED"
    at_rest(client)


def test_the_memory_is_the_same_on_both_sides(client: Client, directory: Path, initrd: Path) -> None:
    """What the guest wrote through its mapping of BAR2 is what the monitor reads; the monitor works meanwhile."""
    path = offer(client, directory)
    with SmallGuest(directory, initrd, [vfio_user(path)], then="wait") as guest:
        all_well(guest.wait_done())
        [export] = client.query_device_exports()
        assert (export.state, export.device) == (ExportState.ATTACHED, "d0")
        assert guest.process is not None and export.client and export.client.pid == guest.process.pid
        assert export.client.mapped_bytes >= 128 << 20
        assert client.query_devices(id="d0")[0].held_by
        # A transfer's 256 bytes, then nothing: DMA went over the first word.
        assert memory_word(client) == int.from_bytes(bytes((i * 7 + 1) & 0xFF for i in range(4)), "little")
    at_rest(client)


def test_a_guest_reboots(client: Client, directory: Path, initrd: Path) -> None:
    """Three times through the firmware, in one QEMU and one attachment."""
    path = offer(client, directory)
    with SmallGuest(directory, initrd, [vfio_user(path)], then="reboot") as guest:
        all_well(guest.wait_done(3)[: 3 * 7], rounds=3)
        assert client.query_device_exports()[0].attached == 1
        with guest.monitor() as monitor:
            monitor.execute("quit")
        guest.wait_ended()
    at_rest(client)


def test_qemu_is_killed_and_started_again(client: Client, server: OwnServer, directory: Path, initrd: Path) -> None:
    """kill -9 in the middle of everything; the next QEMU attaches to the same device, which kept its memory."""
    path = offer(client, directory)
    fds = len(os.listdir(f"/proc/{server.pid}/fd"))
    for time_round in range(3):
        with SmallGuest(directory, initrd, [vfio_user(path)], then="wait") as guest:
            until(lambda: client.query_device_exports()[0].state is ExportState.ATTACHED, "attached")
            if time_round == 2:
                all_well(guest.wait_done())
        at_rest(client)
        assert client.query_device_exports()[0].attached == time_round + 1
        assert len(os.listdir(f"/proc/{server.pid}/fd")) == fds
    assert client.query_devices(id="d0")[0].state == "running"


def test_hotplug_and_unplug(client: Client, directory: Path, initrd: Path) -> None:
    """QEMU's ``device_add`` and ``device_del`` with the guest running, twice on the same export.

    Without MSI-X: QEMU 11.1 aborts when a vfio-user device with MSI-X is unplugged (see the next test).
    """
    path = offer(client, directory, parameters={"msix-vectors": 0})
    with SmallGuest(directory, initrd, [PORT], rounds=2, then="wait") as guest, guest.monitor() as monitor:
        for count in (1, 2):
            socket = {"type": "unix", "path": str(path)}
            monitor.execute("device_add", driver="vfio-user-pci", id="hot", bus="port1", socket=socket)
            findings = guest.wait_done(count)
            monitor.execute("device_del", id="hot")
            monitor.wait_event("DEVICE_DELETED")
            at_rest(client)
            assert [one for one in findings if not one.ok] == []
        until(lambda: sum(one.name == "gone" for one in guest.findings()) == 2, "gone, twice")
        all_well(guest.findings(), rounds=2)


def test_unplug_of_a_device_with_msix(client: Client, directory: Path, initrd: Path) -> None:
    """Whether QEMU survives that or not: the device is at rest, and can be had again.

    QEMU 11.1.3 takes its PBA region out of a BAR that has let go of it already (``vfio_user_msix_teardown`` runs when
    the object is finalized), and aborts.
    """
    path = offer(client, directory)
    for _ in range(2):
        with SmallGuest(directory, initrd, [PORT], rounds=1, then="wait") as guest:
            with guest.monitor() as monitor, contextlib.suppress(QmpError):
                socket = {"type": "unix", "path": str(path)}
                monitor.execute("device_add", driver="vfio-user-pci", id="hot", bus="port1", socket=socket)
                all_well(guest.wait_done())
                monitor.execute("device_del", id="hot")
                monitor.wait_event("DEVICE_DELETED")
            at_rest(client)


def test_two_devices_of_one_vm(client: Client, directory: Path, initrd: Path) -> None:
    """Both have the guest's memory, which is mapped once for each; either may go first."""
    paths = [offer(client, directory, name) for name in ("d0", "d1")]
    with SmallGuest(directory, initrd, [vfio_user(path, id=path.stem) for path in paths], then="wait") as guest:
        all_well(guest.wait_done())
        assert [one.state for one in client.query_device_exports()] == [ExportState.ATTACHED] * 2
    until(lambda: client.query_dma() == [], "no memory is left")


def heard(fd: int, ending: bytes) -> bytes:
    """What comes from a line's other end, until it ends so."""
    said = b""
    while not said.endswith(ending):
        assert select.select([fd], [], [], WAIT_SECONDS)[0], said
        said += os.read(fd, 4096)
    return said


def test_the_guests_own_driver_uses_the_serial_card(client: Client, directory: Path, initrd: Path) -> None:
    """8250_pci of the guest finds the 16550s, and talks by interrupts: a pseudo-terminal and a socket are the others.

    Much more than a FIFO of 16 bytes goes each way.
    """
    there = directory / "line"
    parameters = {"port0": f"pty:{directory / 'pty'}", "port1": f"socket:{there}"}
    uuid = client.mdev_create(parent="serial", type="serial-2", parameters=parameters).uuid
    client.device_add(driver="vfio-pci", id="s0", mdev=uuid)
    path = directory / "s0.sock"
    client.device_export_add(id="x-s0", type="vfio-user", device="s0", path=str(path))
    lines = [f"Line {number}: The Quick Brown Fox jumps".encode() for number in range(40)]
    pty = os.open(directory / "pty", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(pty)
    with socket.socket(socket.AF_UNIX) as other, SmallGuest(directory, initrd, [vfio_user(path)], serial=2) as guest:
        other.connect(str(there))
        for port, fd in enumerate((pty, other.fileno())):
            assert heard(fd, b"\n") == f"port {port} of 2\n".encode()
            for line in lines:
                os.write(fd, line + b"\n")
                assert heard(fd, b"\n") == line.swapcase() + b"\n"
            os.write(fd, b"end\n")
            assert heard(fd, b"\n") == b"END\n"
        findings = guest.wait_done()
        assert [one for one in findings if not one.ok] == []
        assert [one.name for one in findings] == ["found", *("tty", "echoed", "interrupts") * 2]
        guest.wait_ended()
    os.close(pty)
    at_rest(client, "s0")


def script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_the_guide_is_true(directory: Path, initrd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``docs/vfio-user.md``, as somebody new would type it; only places, the memory's size and the guest are ours.

    What stands for ``/run`` is shared as ``/run`` is: the sandbox lets nobody make sockets there later.
    """
    directory.chmod(0o1777)
    assert is_shared("/run") and is_shared(str(directory))
    text = (REPO / "docs" / "vfio-user.md").read_text()
    blocks = re.findall(r"^```sh run-by=\S*test_the_guide_is_true\n(.*?)^```", text, re.M | re.S)
    typed = [one.replace("/run/", f"{directory}/") for one in blocks]
    serve, make, start, look, end, mdev_serve = typed
    programs = directory / "bin"
    programs.mkdir()
    script(programs / "vfiod", f'exec {sys.executable} -m vfiod.client.program "$@"')
    guest = SmallGuest(directory, initrd, [], then="wait")
    ours = f"-accel tcg -nodefaults -display none -serial file:{guest.console}"
    ours += f" -qmp unix:{guest.qmp_path},server=on,wait=off"
    boot = f"-kernel {find_kernel()} -initrd {initrd} -append 'console=ttyS0 panic=-1 quiet vfiod.then=wait'"
    script(programs / "qemu-system-x86_64", f'exec {find_program()} "$@" {ours} {boot}')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    guest.arguments = ["sh", "-ec", "exec " + start.replace("1G", "160M")]

    def run(lines: str) -> list[Any]:
        return [
            json.loads(
                subprocess.run(["sh", "-ec", line], check=True, capture_output=True, timeout=WAIT_SECONDS).stdout
            )
            for line in lines.splitlines()
        ]

    own = directory / "vm1"
    vfiod = subprocess.Popen(["sh", "-ec", serve.replace("vfiod serve", "exec vfiod serve")])
    try:
        until((own / "qmp").exists, "vfiod serves")
        run(make)
        with guest:
            all_well(guest.wait_done())
            [[export], mappings] = run(look)
            assert (export["state"], export["device"]) == ("attached", "d0")
            assert max(one["size"] for one in mappings) > 128 << 20
            with guest.monitor() as monitor:
                monitor.execute("quit")
            guest.wait_ended()
        run(end)
        assert vfiod.wait(WAIT_SECONDS) == 0
    finally:
        vfiod.kill()
        vfiod.wait()
    assert list(own.iterdir()) == []
    program = subprocess.Popen(["sh", "-ec", "exec " + mdev_serve])
    try:
        until((own / "d0.sock").exists, "the program serves")
    finally:
        program.terminate()
        assert program.wait(WAIT_SECONDS) == 0
