"""PCI devices of a guest, from sysfs: binding to drivers, groups; and the registers of QEMU's ``edu``.

Addresses are ``DDDD:BB:DD.F``, as sysfs writes them. Nothing here uses vfiod: it is what a
manager would do before it hands file descriptors on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PCI = Path("/sys/bus/pci")

# --- edu (QEMU's docs/specs/edu.rst), offsets in BAR 0 ------------------------------------
EDU_VENDOR, EDU_DEVICE = 0x1234, 0x11E8
EDU_BAR_SIZE = 1 << 20
EDU_ID = 0x00  # u32, reads EDU_IDENTITY
EDU_LIVENESS = 0x04  # u32, reads the inverse of what was written
EDU_FACTORIAL = 0x08  # u32, write n, read n! when EDU_STATUS is no longer busy
EDU_STATUS = 0x20  # u32
EDU_IRQ_STATUS = 0x24  # u32, what was raised and not acknowledged
EDU_IRQ_RAISE = 0x60  # u32, sets bits of EDU_IRQ_STATUS and interrupts
EDU_IRQ_ACK = 0x64  # u32, clears bits; at zero, INTx falls
EDU_DMA_SOURCE = 0x80  # u64
EDU_DMA_DESTINATION = 0x88  # u64
EDU_DMA_COUNT = 0x90  # u64
EDU_DMA_COMMAND = 0x98  # u64
EDU_IDENTITY = 0x010000ED
EDU_STATUS_BUSY = 0x01
EDU_STATUS_IRQ_AFTER_FACTORIAL = 0x80
EDU_DMA_START = 1
EDU_DMA_TO_RAM = 2  # absent: from RAM to the device
EDU_DMA_RAISE_IRQ = 4
EDU_DMA_IRQ = 0x100  # the bit of EDU_IRQ_STATUS a finished DMA sets
EDU_BUFFER = 0x40000  # the device's own memory, as DMA source and destination name it
EDU_BUFFER_SIZE = 4096
#: edu drives 28 address lines: IOVAs at and above this are cut off.
EDU_IOVA_LIMIT = 1 << 28


def device_path(address: str) -> Path:
    """Return the sysfs directory of the device."""
    return PCI / "devices" / address


def driver_of(address: str) -> str | None:
    """Return the name of the driver that holds the device, or None."""
    link = device_path(address) / "driver"
    return link.resolve().name if link.exists() else None


def group_of(address: str) -> int:
    """Return the number of the device's IOMMU group."""
    return int((device_path(address) / "iommu_group").resolve().name)


def group_members(address: str) -> list[str]:
    """Return the addresses of all devices in the device's IOMMU group, itself among them, sorted."""
    return sorted(path.name for path in (device_path(address) / "iommu_group" / "devices").iterdir())


def unbind(address: str) -> None:
    """Take the device from its driver; nothing happens when it has none."""
    if driver_of(address) is not None:
        (device_path(address) / "driver" / "unbind").write_text(address)


def bind(address: str, driver: str = "vfio-pci") -> None:
    """Bind the device to ``driver`` through driver_override, taking it from another; returns when it is there."""
    if driver_of(address) == driver:
        return
    unbind(address)
    (device_path(address) / "driver_override").write_text(driver)
    (PCI / "drivers_probe").write_text(address)
    wait_until(lambda: driver_of(address) == driver, f"{address} bound to {driver}")


def release(address: str) -> None:
    """Undo ``bind``: no override, and the driver the kernel itself would choose, if there is one."""
    unbind(address)
    (device_path(address) / "driver_override").write_text("\n")
    (PCI / "drivers_probe").write_text(address)


@contextmanager
def bound(*addresses: str, driver: str = "vfio-pci") -> Iterator[None]:
    """Have the devices bound to ``driver`` for the length of a block."""
    try:
        for address in addresses:
            bind(address, driver)
        yield
    finally:
        for address in addresses:
            release(address)


def vfio_cdev(address: str) -> Path:
    """Return the device's own file, /dev/vfio/devices/vfioN; it is there while vfio-pci holds the device."""
    (entry,) = (device_path(address) / "vfio-dev").iterdir()
    return Path("/dev/vfio/devices") / entry.name


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait until ``condition()`` holds; TimeoutError names ``what`` did not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.01)
