"""The serial card against real ptys and sockets: what flows, what waits, and what wakes the loop."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiod.protocol.vfio import IrqAction, IrqData, SetIrqs
from vfiod.server.mdev.samples.serial import MAX_PORTS, Serial, SerialDevice

if TYPE_CHECKING:
    from tests.unit.server.mdev.conftest import Ground

RBR, IER, FCR, LCR, MCR, LSR, MSR = 0, 1, 2, 3, 4, 5, 6
CONFIG = 7
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


class Card:
    """A card that is open, and its user."""

    def __init__(self, ground: Ground, *where: str, opened: bool = True) -> None:
        self.ground = ground
        self.device = SerialDevice(ground.host, where or ("pty",))
        if opened:
            self.device.open()

    def get(self, register: int, port: int = 0) -> int:
        return self.device.read(port, register, 1)[0]

    def set(self, register: int, value: int, port: int = 0) -> None:
        self.device.write(port, register, bytes([value]))

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.device.read(CONFIG, offset, size), "little")

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something is so; no test says how long that may take."""
        while not condition():
            self.ground.settle()

    def take(self, count: int, port: int = 0) -> bytes:
        """Read so many bytes as a driver does: while there is data."""
        seen = bytearray()
        while len(seen) < count:
            self.until(lambda: bool(self.get(LSR, port) & 1))
            seen.append(self.get(RBR, port))
        return bytes(seen)

    def send(self, data: bytes, port: int = 0) -> None:
        """Write bytes as a driver does: when the transmitter is empty."""
        for value in data:
            self.until(lambda: bool(self.get(LSR, port) & 0x20))
            self.set(RBR, value, port)

    def terminal(self, port: int = 0) -> int:
        path = self.device.attributes()[f"port{port}"]
        return os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        self.device.close()
        self.device.unplug()
        self.ground.settle()


def gather(terminal: int, count: int) -> bytes:
    """So many bytes of a terminal: the kernel hands them over in its own time."""
    poll = select.poll()
    poll.register(terminal, select.POLLIN)
    seen = b""
    while len(seen) < count:
        poll.poll()
        seen += os.read(terminal, count)
    return seen


def listen(card: Card, number: int) -> None:
    card.device.set_irqs(SetIrqs(0, 0, 1, IrqAction.TRIGGER, IrqData.EVENTFD, fds=(number,)))


def unmask(card: Card) -> None:
    card.device.set_irqs(SetIrqs(0, 0, 1, IrqAction.UNMASK, IrqData.NONE))


def test_its_identity_is_mttys(ground: Ground) -> None:
    card = Card(ground, "pty", "pty")
    assert [card.config(at, 4) for at in (0x00, 0x08, 0x2C)] == [0x32534348, 0x07000210, 0x32534348]
    assert (card.config(0x06, 2) & 0x10, card.config(0x34, 1), card.config(0x3D, 1)) == (0, 0, 1)
    for bar in (0x10, 0x14):
        assert card.config(bar, 4) == 1
        card.device.write(CONFIG, bar, b"\xff\xff\xff\xff")
        assert card.config(bar, 4) == 0xFFFFFFF9, "8 bytes of I/O space"
    card.device.write(CONFIG, 0x18, b"\xff\xff\xff\xff")
    assert card.config(0x18, 4) == 0
    card.close()


@pytest.mark.parametrize("ports", [1, 2])
def test_what_regions_there_are(ground: Ground, ports: int) -> None:
    card = Card(ground, *["pty"] * ports)
    assert [card.device.region_info(index).size for index in range(8)] == [8, 8 * (ports - 1), 0, 0, 0, 0, 0, 256]
    with pytest.raises(OSError, match="no region 8"):
        card.device.region_info(8)
    assert [card.device.irq_info(index).count for index in range(3)] == [1, 0, 0]
    card.close()


def test_data_flows_both_ways_through_a_pty(ground: Ground) -> None:
    card = Card(ground)
    terminal = card.terminal()
    every = bytes(range(256))
    card.set(FCR, 0x01)
    card.send(every)
    assert gather(terminal, 256) == every, "raw: no byte means anything to the line"
    os.write(terminal, every)
    assert card.take(256) == every
    os.close(terminal)
    card.close()


def test_a_terminal_that_nobody_has_open_wakes_nobody(ground: Ground) -> None:
    card = Card(ground)
    os.close(card.terminal())
    ground.settle()
    selector = ground.loop._selector  # type: ignore[attr-defined]
    assert selector.select(0) == [], "a hang-up would be ready for ever"
    card.send(b"kept")
    terminal = card.terminal()
    assert gather(terminal, 4) == b"kept"
    os.close(terminal)
    card.close()


def test_what_the_guest_does_not_read_waits_in_the_line(ground: Ground) -> None:
    card = Card(ground)
    card.set(FCR, 0x01)
    terminal = card.terminal()
    os.write(terminal, bytes(200))
    card.until(lambda: bool(card.get(LSR) & 1))
    ground.settle()
    selector = ground.loop._selector  # type: ignore[attr-defined]
    assert selector.select(0) == [], "no busy loop while the receiver is full"
    assert not card.get(LSR) & 2, "no overrun"
    assert len(card.take(200)) == 200
    os.close(terminal)
    card.close()


def test_a_peer_that_does_not_read_holds_the_transmitter(ground: Ground, tmp_path: Path) -> None:
    card = Card(ground, f"socket:{tmp_path}/line")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{tmp_path}/line")
        card.until(lambda: bool(card.get(MSR) & 0x80))
        sent = 0
        while card.get(LSR) & 0x20:
            card.set(RBR, sent & 0xFF)
            sent += 1
        ground.settle()
        assert not card.get(LSR) & 0x20
        card.set(IER, 0x02)
        bell = ground.bell()
        listen(card, bell.number)
        assert not bell.rung(), "no THRE"
        received = bytearray()
        while len(received) < sent:
            received += peer.recv(1 << 20)
            ground.settle()
        assert received == bytes(at & 0xFF for at in range(sent))
        card.until(lambda: bool(bell.rung()))
    card.close()


def test_a_sockets_client_is_the_carrier(ground: Ground, tmp_path: Path) -> None:
    path = tmp_path / "line"
    card = Card(ground, "pty", f"socket:{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert card.get(MSR, 1) == 0
    card.send(b"into the void", 1)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(str(path))
        card.until(lambda: card.get(MSR, 1) & 0xF0 == 0xB0)
        second.connect(str(path))
        first.sendall(b"one")
        assert card.take(3, 1) == b"one"
        second.sendall(b"two")
        first.shutdown(socket.SHUT_RDWR)
        assert card.take(3, 1) == b"two", "its turn came when the first had gone"
        card.send(b"to the second", 1)
        assert second.recv(100) == b"to the second"
        assert first.recv(100) == b""
    card.until(lambda: card.get(MSR, 1) & 0xF0 == 0)
    card.close()
    assert not path.exists()


def test_the_line_interrupt_is_a_level_of_both_ports(ground: Ground) -> None:
    card = Card(ground, "pty", "pty")
    bell = ground.bell()
    listen(card, bell.number)
    for port in (0, 1):
        card.set(IER, 0x02, port)
    assert bell.rung() == 1, "masked since the first"
    unmask(card)
    assert bell.rung() == 1, "still up: fired again"
    assert card.config(0x06, 2) & 0x08
    assert card.get(2, 0) == 0x02
    unmask(card)
    assert bell.rung() == 1, "the other port holds it"
    assert card.get(2, 1) == 0x02
    unmask(card)
    assert bell.rung() == 0
    card.close()


def test_intx_disable_keeps_it_to_itself(ground: Ground) -> None:
    card = Card(ground)
    bell = ground.bell()
    listen(card, bell.number)
    card.device.write(CONFIG, 4, b"\x01\x04")
    card.set(IER, 0x02)
    assert bell.rung() == 0
    card.device.write(CONFIG, 4, b"\x01\x00")
    assert bell.rung() == 1
    card.close()


def test_nothing_is_read_before_a_user_comes_nor_after_he_left(ground: Ground) -> None:
    card = Card(ground, opened=False)
    terminal = card.terminal()
    os.write(terminal, b"early")
    ground.settle()
    card.device.open()
    card.set(FCR, 0x01)
    assert card.take(5) == b"early"
    card.device.close()
    os.write(terminal, b"later")
    ground.settle()
    card.device.open()
    card.set(FCR, 0x01)
    assert card.take(5) == b"later"
    os.close(terminal)
    card.close()


def test_reset_is_power_on_and_keeps_the_line(ground: Ground) -> None:
    card = Card(ground)
    path = card.device.attributes()["port0"]
    card.set(IER, 0x0F)
    card.set(LCR, 0x83)
    card.device.write(CONFIG, 0x3C, b"\x0b")
    card.device.reset()
    assert (card.get(IER), card.get(LCR), card.config(0x3C, 1)) == (0, 0, 0xFF)
    assert card.device.attributes()["port0"] == path
    card.close()


def test_a_link_to_the_pty(ground: Ground, tmp_path: Path) -> None:
    link = tmp_path / "console"
    card = Card(ground, f"pty:{link}")
    assert str(link.readlink()) == card.device.attributes()["port0"]
    with pytest.raises(OSError, match="'port0'") as caught:
        SerialDevice(ground.host, [f"pty:{link}"])
    assert caught.value.errno == errno.EEXIST
    card.close()
    assert not link.is_symlink()


def test_a_wide_access_is_several_narrow_ones(ground: Ground) -> None:
    card = Card(ground)
    card.device.write(0, 3, bytes([0x03, 0x0B]))
    assert card.device.read(0, 3, 2) == bytes([0x03, 0x0B])
    card.close()


@pytest.mark.parametrize(
    ("where", "number", "words"),
    [
        (7, errno.EINVAL, "'port0' is"),
        ("", errno.EINVAL, "'port0' is"),
        ("tcp:/x", errno.EINVAL, "'port0' is"),
        ("socket", errno.EINVAL, "'port0' is"),
        ("socket:", errno.EINVAL, "'port0' is"),
        ("socket:relative", errno.EINVAL, "absolute"),
        ("socket:/a\0b", errno.EINVAL, "'port0' is"),
        ("pty:relative", errno.EINVAL, "absolute"),
        ("socket:/no/such/directory/s", errno.ENOENT, "/no/such/directory/s"),
        ("socket:/" + "x" * 200, errno.EIO, "too long"),
        ("pty:/no/such/directory/l", errno.ENOENT, "'port0'"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(ground: Ground, where: object, number: int, words: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=words) as caught:
        SerialDevice(ground.host, [where])
    assert caught.value.errno == number
    with pytest.raises(OSError, match=words.replace("port0", "port1")):
        SerialDevice(ground.host, ["pty", where])
    ground.settle()
    assert os.listdir("/proc/self/fd") == before


def test_cards_share_the_ports(ground: Ground) -> None:
    parent = Serial()
    one, two = parent.types
    made = parent.create(ground.host, UUID, two, {})
    assert [parent.available_instances(kind) for kind in (one, two)] == [MAX_PORTS - 2, MAX_PORTS // 2 - 1]
    assert parent.attributes()["ports-available"] == str(MAX_PORTS - 2)
    parent.destroy(UUID, made, forced=False)
    assert parent.available_instances(two) == MAX_PORTS // 2
    ground.settle()


def test_a_pty_is_really_raw(ground: Ground) -> None:
    card = Card(ground)
    terminal = card.terminal()
    card.send(b"\r\n\x03\x04")
    assert gather(terminal, 4) == b"\r\n\x03\x04"
    os.close(terminal)
    card.close()
