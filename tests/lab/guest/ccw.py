"""Subchannels of an s390x guest: binding to vfio_ccw, mediated devices, injected reports, the terminal's keyboard.

Devices have two names: the subchannel's (``0.0.0000``, where vfio_ccw binds) and the device number behind it
(``0.0.1000``, which topologies give). Nothing here uses vfiod: it is what a manager does before it hands on.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest.machine import stream
from tests.lab.guest.pci import wait_until

CSS = Path("/sys/bus/css")
CCW = Path("/sys/bus/ccw")
MDEV = Path("/sys/bus/mdev/devices")
MDEV_TYPE = "vfio_ccw-io"
_INJECT = Path("/sys/kernel/debug/s390/cio")

_subchannels: dict[str, str] = {}


def subchannel_of(device: str) -> str:
    """Return the subchannel a device is behind. Kept: the device itself goes when vfio_ccw takes the subchannel."""
    if device not in _subchannels:
        _subchannels[device] = (CCW / "devices" / device).resolve().parent.name
    return _subchannels[device]


def driver_of(subchannel: str) -> str | None:
    """Return the name of the driver that holds the subchannel, or None."""
    link = CSS / "devices" / subchannel / "driver"
    return link.resolve().name if link.exists() else None


def bind(subchannel: str, driver: str = "vfio_ccw") -> None:
    """Bind a subchannel to ``driver`` through driver_override, taking it from another."""
    if driver_of(subchannel) == driver:
        return
    (CSS / "devices" / subchannel / "driver_override").write_text(driver)
    if driver_of(subchannel) is not None:
        (CSS / "devices" / subchannel / "driver" / "unbind").write_text(subchannel)
    (CSS / "drivers" / driver / "bind").write_text(subchannel)
    wait_until(lambda: driver_of(subchannel) == driver, f"{subchannel} bound to {driver}")


def create_mdev(subchannel: str, name: str) -> None:
    """Make the subchannel's one mediated device."""
    (CSS / "devices" / subchannel / "mdev_supported_types" / MDEV_TYPE / "create").write_text(name)
    wait_until((MDEV / name / "vfio-dev").exists, f"the device {name}")


def remove_mdev(name: str) -> None:
    """Remove a mediated device; the kernel waits for its user to let go. Nothing happens when it is gone."""
    if (MDEV / name).exists():
        (MDEV / name / "remove").write_text("1")


_made: dict[str, str] = {}


def mediated(device: str) -> str:
    """Return the UUID of the device's mediated device: made at the first call, and left.

    Not undone after each test, on purpose: Linux 7.2 oopses in ``vfio_ccw_sch_remove`` when a subchannel
    was taken from vfio_ccw a few times.
    """
    name = _made.get(device)
    if name is None or not (MDEV / name).exists():
        subchannel = subchannel_of(device)
        bind(subchannel)
        name = _made[device] = str(uuid.uuid4())
        create_mdev(subchannel, name)
    return name


def group_of(name: str) -> int:
    """Return the number of a mediated device's IOMMU group."""
    return int((MDEV / name / "iommu_group").resolve().name)


def cdev_of(name: str) -> Path:
    """Return a mediated device's own file, /dev/vfio/devices/vfioN."""
    (entry,) = (MDEV / name / "vfio-dev").iterdir()
    return Path("/dev/vfio/devices") / entry.name


def inject_crw(*, rsc: int, erc: int, rsid: int, slct: int = 0, oflw: int = 0, chn: int = 0, anc: int = 0) -> None:
    """Have the kernel handle a channel report as if the machine had made it (CONFIG_CIO_INJECT)."""
    (_INJECT / "enable_inject").write_text("1")
    (_INJECT / "crw_inject").write_text(f"{slct:x} {oflw:x} {chn:x} {rsc:x} {anc:x} {erc:x} {rsid:x}")


@contextmanager
def terminal() -> Iterator[socket.socket]:
    """Switch the 3270 on: connect its keyboard and screen for the length of a block.

    Both ends are a device end without being asked: the subchannel gets an interrupt.
    """
    with stream("terminal") as connection:
        connection.settimeout(60)
        # What QEMU takes for the end of Telnet's negotiation (hw/char/terminal3270.c; RFC 1091): without,
        # the device takes no data.
        connection.sendall(bytes([IAC, SB, TERMINAL_TYPE, 0]) + b"IBM-3278-2-E" + bytes([IAC, SE]))
        yield connection


IAC, EOR, SB, SE, TERMINAL_TYPE = 255, 239, 250, 240, 24


def read_record(connection: socket.socket) -> bytes:
    """Return what the screen was sent, one record without its end mark."""
    record = b""
    while not record.endswith(bytes([IAC, EOR])):
        data = connection.recv(4096)
        assert data, "QEMU hung up"
        record += data
    return record[:-2].replace(bytes([IAC, IAC]), bytes([IAC]))


def type_record(connection: socket.socket, record: bytes) -> None:
    """Send what a key sends: attention identifier, cursor, fields; QEMU makes an attention interrupt of it."""
    connection.sendall(record.replace(bytes([IAC]), bytes([IAC, IAC])) + bytes([IAC, EOR]))
