"""The serial card through vfiod: a real server, a real pty, a driver's moves over the monitor."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

if TYPE_CHECKING:
    from tests.integration.mdev.conftest import Manager

RBR, IER, IIR, FCR, LSR = 0, 1, 2, 2, 5


class Port:
    """One port of a card that was added, as a driver works it."""

    def __init__(self, manager: Manager, id: str, region: str = "bar0") -> None:
        self.client = manager.client
        self.id = id
        self.region = region

    def get(self, register: int) -> int:
        value = self.client.region_read(device=self.id, region=self.region, offset=register, size=1).value
        assert isinstance(value, int)
        return value

    def set(self, register: int, value: int) -> None:
        self.client.region_write(device=self.id, region=self.region, offset=register, size=1, value=value)


def attributes(manager: Manager, uuid: str) -> dict[str, str]:
    """What ``query-mdev-types`` shows of one device."""
    devices = [device for told in manager.client.query_mdev_types() for device in told.devices]
    return next(device.attributes for device in devices if device.uuid == uuid)


def wait(number: int) -> int:
    """Wait for an interrupt; how many there were."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    poll.poll()
    return os.eventfd_read(number)


def test_a_conversation_by_interrupts(manager: Manager) -> None:
    client = manager.client
    uuid = client.mdev_create(parent="serial", type="serial-1").uuid
    client.device_add(driver="vfio-pci", id="tty", mdev=uuid)
    path = attributes(manager, uuid)["port0"]
    port = Port(manager, "tty")
    started = client.irq_start(device="tty", index="intx")
    trigger = started.irqs[0].trigger_fd
    assert isinstance(trigger, FileDescriptor)
    port.set(FCR, 0x01)
    port.set(IER, 0x01)
    with FileDescriptor(os.open(path, os.O_RDWR | os.O_NOCTTY)) as terminal:
        heard = bytearray()
        os.write(terminal.number, b"Wie geht es Ihnen, lieber Gast?\n")
        while not heard.endswith(b"\n"):
            wait(trigger.number)
            assert port.get(IIR) & 0x0F in (0x04, 0x0C)
            while port.get(LSR) & 1:
                heard.append(port.get(RBR))
            client.irq_eoi(device="tty", index="intx")
        assert heard == b"Wie geht es Ihnen, lieber Gast?\n"
        for value in b"Gut":
            while not port.get(LSR) & 0x20:
                pass
            port.set(RBR, value)
        answer = b""
        while len(answer) < 3:
            answer += os.read(terminal.number, 10)
        assert answer == b"Gut"
    client.device_reset(id="tty")
    assert port.get(IER) == 0
    trigger.close()
    with client.events("DEVICE_DELETED") as events:
        client.device_del(id="tty")
        events.get(timeout=60)
    assert attributes(manager, uuid)["port0"] == path, "the line stays while the card exists"
    client.mdev_destroy(uuid=uuid)
    assert all(f" {path}" not in str(one) for one in client.query_fds())


def test_two_ports_two_ways(manager: Manager, tmp_path: Path) -> None:
    client = manager.client
    link, path = tmp_path / "console", tmp_path / "line"
    uuid = client.mdev_create(
        parent="serial", type="serial-2", parameters={"port0": f"pty:{link}", "port1": f"socket:{path}"}
    ).uuid
    client.device_add(driver="vfio-pci", id="tty", mdev=uuid)
    first, second = Port(manager, "tty"), Port(manager, "tty", "bar1")
    with socket.socket(socket.AF_UNIX) as peer, FileDescriptor(os.open(link, os.O_RDWR | os.O_NOCTTY)) as terminal:
        peer.connect(str(path))
        first.set(RBR, ord("1"))
        assert os.read(terminal.number, 10) == b"1"
        peer.sendall(b"2")
        while not second.get(LSR) & 1:
            pass
        assert second.get(RBR) == ord("2")
        assert not first.get(LSR) & 1
    before = manager.open_fds()
    client.device_del(id="tty", force=True)
    with client.events("MDEV_REMOVED") as events:
        while True:
            try:
                client.mdev_destroy(uuid=uuid)
                break
            except RemoteError as error:
                assert "in use" in error.desc
        assert events.get(timeout=60).name == "MDEV_REMOVED"
    assert not link.is_symlink()
    assert not path.exists()
    assert manager.open_fds() < before


@pytest.mark.parametrize(
    ("type", "parameters", "words"),
    [
        ("serial-1", {"port0": 7}, r"EINVAL: 'port0' is .*got 7"),
        ("serial-1", {"port0": "tcp:/x"}, r"EINVAL: 'port0' is"),
        ("serial-1", {"port1": "pty"}, r"type 'serial-1' takes port0"),
        ("serial-2", {"port1": "socket:/no/such/s"}, r"ENOENT: 'port1'"),
        ("serial-3", {}, r"no type 'serial-3'; it has serial-1, serial-2"),
    ],
)
def test_what_cannot_be_made(manager: Manager, type: str, parameters: dict[str, object], words: str) -> None:
    before = manager.open_fds() if manager.client.query_mdev_types() else 0
    with pytest.raises(RemoteError, match=words):
        manager.client.mdev_create(parent="serial", type=type, parameters=parameters)
    assert manager.open_fds() == before
