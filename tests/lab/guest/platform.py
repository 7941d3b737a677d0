"""Platform devices of a guest: binding, noiommu groups; and the registers of virtio-mmio transports.

Nothing here uses vfiod: it is what a manager would do before it hands file descriptors on. Registers: virtio 1.2,
4.2.2 and 4.2.4; the layout of QEMU's ``hw/virtio/virtio-mmio.c``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest.pci import wait_until

PLATFORM = Path("/sys/bus/platform")
NOIOMMU = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
DRIVER = "vfio-platform"

REGION_SIZE = 0x200  # one transport
MAGIC, MAGIC_VALUE = 0x000, b"virt"
VERSION = 0x004  # 1: legacy, 2: modern
DEVICE_ID = 0x008
HOST_FEATURES, HOST_FEATURES_SELECT = 0x010, 0x014
INTERRUPT_STATUS, INTERRUPT_ACK = 0x060, 0x064
STATUS = 0x070
CONFIG = 0x100
RNG, BALLOON = 4, 5  # device ids
CONFIG_CHANGED = 2  # a bit of INTERRUPT_STATUS
ACKNOWLEDGE, HAS_DRIVER, DRIVER_OK = 1, 2, 4  # bits of STATUS
BALLOON_PAGES = CONFIG  # how many pages of 4 KiB the host wants


def device_path(name: str) -> Path:
    """Return the sysfs directory of the device."""
    return PLATFORM / "devices" / name


def driver_of(name: str) -> str | None:
    """Return the name of the driver that holds the device, or None."""
    link = device_path(name) / "driver"
    return link.resolve().name if link.exists() else None


def group_of(name: str) -> int:
    """Return the number of the device's group; vfio makes it when it binds, as there is no IOMMU."""
    return int((device_path(name) / "iommu_group").resolve().name)


def group_path(name: str) -> Path:
    """Return the file of the device's group."""
    return Path(f"/dev/vfio/noiommu-{group_of(name)}")


@contextmanager
def noiommu() -> Iterator[None]:
    """Let vfio take devices without an IOMMU, for the length of a block."""
    NOIOMMU.write_text("Y")
    try:
        yield
    finally:
        NOIOMMU.write_text("N")


def rebind(name: str, driver: str) -> None:
    """Bind the device to ``driver``, taking it from another; empty: to whichever the kernel chooses."""
    if driver_of(name) is not None:
        (device_path(name) / "driver" / "unbind").write_text(name)
    (device_path(name) / "driver_override").write_text(f"{driver}\n")
    (PLATFORM / "drivers_probe").write_text(name)


@contextmanager
def bound(*names: str) -> Iterator[None]:
    """Have the devices bound to vfio-platform for the length of a block."""
    try:
        for name in names:
            rebind(name, DRIVER)
            wait_until(lambda name=name: driver_of(name) == DRIVER, f"{name} bound to {DRIVER}")  # type: ignore[misc]
        yield
    finally:
        for name in names:
            rebind(name, "")
