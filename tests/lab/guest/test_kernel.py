"""Is the lab what it claims to be? Raw VFIO system calls on real devices, and no vfiod.

What fails here fails in the lab, or in our reading of <linux/vfio.h>, and not in vfiod. The
numbers are written out on purpose: sharing vfiod's constants would hide a mistake in them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.machine import SOURCE_ROOTS, UNPRIVILEGED_UID, qemu, unprivileged_python
from tests.lab.topologies import (
    EDU_FUNCTIONS,
    EDU_IDS,
    EDU_PAIR,
    EDU_PORT,
    EDU_ROOT,
    EDU_SHARED,
    SHARED_NEIGHBOUR,
)

MACHINE = "edu"

# <linux/vfio.h>: _IO(';', 100 + n)
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU = 0x3B64, 0x3B65, 0x3B66
GROUP_GET_STATUS, GROUP_SET_CONTAINER, GROUP_GET_DEVICE_FD = 0x3B67, 0x3B68, 0x3B6A
DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO = 0x3B6B, 0x3B6C, 0x3B6D
DEVICE_SET_IRQS, DEVICE_RESET = 0x3B6E, 0x3B6F
GET_PCI_HOT_RESET_INFO, PCI_HOT_RESET = 0x3B70, 0x3B71
IOMMU_MAP_DMA, IOMMU_UNMAP_DMA = 0x3B71, 0x3B72
TYPE1V2 = 3
GROUP_VIABLE = 1
DEVICE_FLAG_RESET, DEVICE_FLAG_PCI = 1, 2
DMA_READ, DMA_WRITE = 1, 2
SET_DATA_NONE, SET_DATA_EVENTFD = 1, 4
SET_ACTION_UNMASK, SET_ACTION_TRIGGER = 1 << 4, 1 << 5
INTX, MSI = 0, 1
BAR0, CONFIG = 0, 7
COMMAND = 4  # config space; bit 2 is bus master, without it neither MSI nor DMA leave the device
COMMAND_MEMORY_AND_MASTER = 0x6


def group_status(group: int) -> int:
    data = bytearray(struct.pack("=II", 8, 0))
    fcntl.ioctl(group, GROUP_GET_STATUS, data)
    flags: int = struct.unpack("=II", data)[1]
    return flags


@contextmanager
def opened(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Device:
    """One device's fd and what the tests do with it."""

    def __init__(self, fd: int, group: int, container: int) -> None:
        self.fd, self.group, self.container = fd, group, container

    def info(self) -> tuple[int, int, int]:
        data = bytearray(struct.pack("=IIIIII", 24, 0, 0, 0, 0, 0))
        fcntl.ioctl(self.fd, DEVICE_GET_INFO, data)
        _, flags, regions, irqs, _, _ = struct.unpack("=IIIIII", data)
        return flags, regions, irqs

    def region(self, index: int) -> tuple[int, int]:
        data = bytearray(struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, data)
        _, _, _, _, size, offset = struct.unpack("=IIIIQQ", data)
        return size, offset

    def read(self, register: int, width: int = 4) -> int:
        data = os.pread(self.fd, width, self.region(BAR0)[1] + register)
        assert len(data) == width
        return int.from_bytes(data, "little")

    def write(self, register: int, value: int, width: int = 4) -> None:
        offset = self.region(BAR0)[1] + register
        assert os.pwrite(self.fd, value.to_bytes(width, "little"), offset) == width

    def enable(self) -> None:
        offset = self.region(CONFIG)[1] + COMMAND
        os.pwrite(self.fd, struct.pack("<H", COMMAND_MEMORY_AND_MASTER), offset)

    def set_irq(self, index: int, flags: int, eventfd: int | None = None) -> None:
        data = struct.pack("=IIIII", 20, flags, index, 0, 1)
        if eventfd is not None:
            data = struct.pack("=IIIIIi", 24, flags, index, 0, 1, eventfd)
        fcntl.ioctl(self.fd, DEVICE_SET_IRQS, data)

    def disable_irq(self, index: int) -> None:
        fcntl.ioctl(
            self.fd, DEVICE_SET_IRQS, struct.pack("=IIIII", 20, SET_DATA_NONE | SET_ACTION_TRIGGER, index, 0, 0)
        )


@contextmanager
def vfio(*addresses: str) -> Iterator[list[Device]]:
    """Bind the devices of one group to vfio-pci, open them through a type1v2 container, undo it all."""
    with ExitStack() as stack:
        stack.enter_context(pci.bound(*addresses))
        container = stack.enter_context(opened("/dev/vfio/vfio"))
        group = stack.enter_context(opened(f"/dev/vfio/{pci.group_of(addresses[0])}"))
        fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("=i", container))
        fcntl.ioctl(container, SET_IOMMU, TYPE1V2)
        devices = []
        for address in addresses:
            fd = get_device_fd(group, address)
            stack.callback(os.close, fd)
            devices.append(Device(fd, group, container))
        yield devices


def get_device_fd(group: int, address: str) -> int:
    # fcntl.ioctl with a buffer does give back the call's result, if the buffer is mutable.
    fd: int = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    return fd


@contextmanager
def event() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fired(eventfd: int, seconds: float = 20.0) -> int:
    """Return the eventfd's count, waiting for it to be more than nothing; 0 when the time is over."""
    ready, _, _ = select.select([eventfd], [], [], seconds)
    return os.eventfd_read(eventfd) if ready else 0


# -- the machine itself -------------------------------------------------------------------


def test_every_device_is_where_the_topology_says() -> None:
    for address, name in EDU_IDS.items():
        device = pci.device_path(address)
        assert device.is_dir(), f"{name} is not at {address}"
        if name.startswith("edu"):
            assert int((device / "vendor").read_text(), 16) == pci.EDU_VENDOR
            assert int((device / "device").read_text(), 16) == pci.EDU_DEVICE


def test_the_kernel_offers_type1v2_and_cdev() -> None:
    with opened("/dev/vfio/vfio") as container:
        assert fcntl.ioctl(container, GET_API_VERSION) == 0
        assert fcntl.ioctl(container, CHECK_EXTENSION, TYPE1V2) == 1
    with pci.bound(EDU_ROOT):
        assert pci.vfio_cdev(EDU_ROOT).is_char_device()
    assert Path("/dev/iommu").is_char_device()


def test_qemu_monitor_from_inside() -> None:
    assert qemu().execute("query-status")["running"] is True
    names = {
        device["qdev_id"]
        for bus in qemu().execute("query-pci")
        for entry in bus["devices"]
        for device in [entry, *entry.get("pci_bridge", {}).get("devices", [])]
    }
    assert set(EDU_IDS.values()) <= names


# -- groups -------------------------------------------------------------------------------


def test_groups_are_shared_as_the_topology_says() -> None:
    assert pci.group_members(EDU_ROOT) == [EDU_ROOT]
    assert pci.group_members(EDU_PORT) == [EDU_PORT]
    assert set(EDU_PAIR) <= set(pci.group_members(EDU_PAIR[0]))
    assert set(EDU_FUNCTIONS) <= set(pci.group_members(EDU_FUNCTIONS[0]))
    assert {EDU_SHARED, SHARED_NEIGHBOUR} <= set(pci.group_members(EDU_SHARED))
    singles = (EDU_ROOT, EDU_PORT, EDU_PAIR[0], EDU_FUNCTIONS[0], EDU_SHARED)
    assert len({pci.group_of(address) for address in singles}) == len(singles)


def test_two_devices_of_one_group_open_through_one_group_fd() -> None:
    with vfio(*EDU_PAIR) as (first, second):
        first.write(pci.EDU_LIVENESS, 0x11111111)
        second.write(pci.EDU_LIVENESS, 0x22222222)
        assert first.read(pci.EDU_LIVENESS) == 0xEEEEEEEE
        assert second.read(pci.EDU_LIVENESS) == 0xDDDDDDDD


def test_group_is_not_viable_while_a_neighbour_keeps_its_driver() -> None:
    assert pci.driver_of(SHARED_NEIGHBOUR) == "virtio-pci"
    with pci.bound(EDU_SHARED):
        path = f"/dev/vfio/{pci.group_of(EDU_SHARED)}"
        with opened(path) as group, opened("/dev/vfio/vfio") as container:
            assert group_status(group) & GROUP_VIABLE == 0
            with pytest.raises(OSError) as refusal:
                fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("=i", container))
            assert refusal.value.errno == errno.EPERM
        pci.unbind(SHARED_NEIGHBOUR)
        try:
            with opened(path) as group:
                assert group_status(group) & GROUP_VIABLE
        finally:
            pci.release(SHARED_NEIGHBOUR)
    assert pci.driver_of(SHARED_NEIGHBOUR) == "virtio-pci"


# -- one device ---------------------------------------------------------------------------


def test_group_is_viable_and_device_describes_itself() -> None:
    with vfio(EDU_PORT) as (device,):
        assert group_status(device.group) & GROUP_VIABLE
        flags, regions, irqs = device.info()
        assert flags & DEVICE_FLAG_PCI
        assert (regions, irqs) == (9, 5)
        assert device.region(BAR0)[0] == pci.EDU_BAR_SIZE
        assert device.region(CONFIG)[0] in (256, 4096)


def test_bar0_is_an_edu() -> None:
    with vfio(EDU_ROOT) as (device,):
        assert device.read(pci.EDU_ID) == pci.EDU_IDENTITY
        device.write(pci.EDU_LIVENESS, 0x12345678)
        assert device.read(pci.EDU_LIVENESS) == ~0x12345678 & 0xFFFFFFFF


@pytest.mark.parametrize("address", [EDU_ROOT, EDU_PORT, EDU_PAIR[1], EDU_FUNCTIONS[1]])
def test_msi_fires_an_eventfd(address: str) -> None:
    others = EDU_PAIR if address in EDU_PAIR else EDU_FUNCTIONS if address in EDU_FUNCTIONS else (address,)
    with vfio(*others) as devices, event() as trigger:
        device = devices[others.index(address)]
        device.enable()
        device.set_irq(MSI, SET_DATA_EVENTFD | SET_ACTION_TRIGGER, trigger)
        device.write(pci.EDU_IRQ_RAISE, 1)
        assert fired(trigger) == 1
        assert device.read(pci.EDU_IRQ_STATUS) == 1
        device.write(pci.EDU_IRQ_ACK, 1)
        device.disable_irq(MSI)


@pytest.mark.parametrize("address", [EDU_ROOT, EDU_PORT])
def test_intx_fires_masks_itself_and_fires_again(address: str) -> None:
    with vfio(address) as (device,), event() as trigger:
        device.enable()
        device.set_irq(INTX, SET_DATA_EVENTFD | SET_ACTION_TRIGGER, trigger)
        device.write(pci.EDU_IRQ_RAISE, 1)
        assert fired(trigger) == 1
        # Level: still asserted, but vfio masked it; unmasking before the ack fires at once.
        assert fired(trigger, 0.2) == 0
        device.set_irq(INTX, SET_DATA_NONE | SET_ACTION_UNMASK)
        assert fired(trigger) == 1
        device.write(pci.EDU_IRQ_ACK, 1)
        device.set_irq(INTX, SET_DATA_NONE | SET_ACTION_UNMASK)
        assert fired(trigger, 0.2) == 0
        device.disable_irq(INTX)


def test_dma_out_and_back() -> None:
    iova, half = 0x100000, 256
    with vfio(EDU_PORT) as (device,), event() as trigger, mmap.mmap(-1, 4096) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        del anchor  # or the mapping cannot be closed
        fcntl.ioctl(
            device.container,
            IOMMU_MAP_DMA,
            struct.pack("=IIQQQ", 32, DMA_READ | DMA_WRITE, address, iova, 4096),
        )
        memory[:half] = bytes(range(256))
        device.enable()
        device.set_irq(MSI, SET_DATA_EVENTFD | SET_ACTION_TRIGGER, trigger)
        transfers = (
            (iova, pci.EDU_BUFFER, 0),
            (pci.EDU_BUFFER, iova + half, pci.EDU_DMA_TO_RAM),
        )
        for source, destination, direction in transfers:
            device.write(pci.EDU_DMA_SOURCE, source, 8)
            device.write(pci.EDU_DMA_DESTINATION, destination, 8)
            device.write(pci.EDU_DMA_COUNT, half, 8)
            device.write(pci.EDU_DMA_COMMAND, pci.EDU_DMA_START | pci.EDU_DMA_RAISE_IRQ | direction, 8)
            assert fired(trigger) == 1
            device.write(pci.EDU_IRQ_ACK, pci.EDU_DMA_IRQ)
        assert memory[half : 2 * half] == bytes(range(256))
        device.disable_irq(MSI)
        unmap = bytearray(struct.pack("=IIQQ", 24, 0, iova, 4096))
        fcntl.ioctl(device.container, IOMMU_UNMAP_DMA, unmap)
        assert struct.unpack("=IIQQ", unmap)[3] == 4096


# -- reset --------------------------------------------------------------------------------


def test_reset_behind_the_root_port() -> None:
    with vfio(EDU_PORT) as (device,):
        assert device.info()[0] & DEVICE_FLAG_RESET
        device.write(pci.EDU_LIVENESS, 5)
        fcntl.ioctl(device.fd, DEVICE_RESET)
        device.enable()
        assert device.read(pci.EDU_ID) == pci.EDU_IDENTITY


def test_no_reset_on_the_root_bus() -> None:
    with vfio(EDU_ROOT) as (device,):
        assert not device.info()[0] & DEVICE_FLAG_RESET
        with pytest.raises(OSError) as refusal:
            fcntl.ioctl(device.fd, DEVICE_RESET)
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(OSError) as refusal:
            fcntl.ioctl(device.fd, GET_PCI_HOT_RESET_INFO, bytearray(struct.pack("=III", 12, 0, 0)))
        assert refusal.value.errno == errno.ENODEV


def test_hot_reset_takes_both_functions_of_a_slot() -> None:
    with vfio(*EDU_FUNCTIONS) as (first, _):
        info = bytearray(12 + 8 * 4)
        struct.pack_into("=III", info, 0, len(info), 0, 0)
        fcntl.ioctl(first.fd, GET_PCI_HOT_RESET_INFO, info)
        assert struct.unpack_from("=III", info)[2] == 2
        affected = [struct.unpack_from("=IHBB", info, 12 + 8 * number) for number in range(2)]
        assert [(group, bus, devfn) for group, _, bus, devfn in affected] == [
            (pci.group_of(EDU_FUNCTIONS[0]), 4, 0),
            (pci.group_of(EDU_FUNCTIONS[1]), 4, 1),
        ]
        fcntl.ioctl(first.fd, PCI_HOT_RESET, struct.pack("=IIIi", 16, 0, 1, first.group))
        first.enable()
        assert first.read(pci.EDU_ID) == pci.EDU_IDENTITY


# -- processes without rights ---------------------------------------------------------------


def test_an_unprivileged_process_runs_the_projects_python() -> None:
    done = unprivileged_python(
        "import os, sys, resource, msgspec\n"
        "print(os.getuid(), msgspec.json.decode(b'[1]'), resource.getrlimit(resource.RLIMIT_MEMLOCK))\n"
        "print(*sys.path, sep='\\n')\n"
        "print(*(sorted(os.listdir(p)) for p in sys.path[1:4]))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('CapBnd')))",
        memlock=65536,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{UNPRIVILEGED_UID} [1] (65536, 65536)"
    assert lines[2:5] == list(SOURCE_ROOTS)
    assert int(lines[-2].split()[1], 16) == 0


def test_an_unprivileged_process_sees_nothing_it_should_not() -> None:
    done = unprivileged_python("import os; os.open('/etc/vfiod-lab-secret', os.O_RDONLY)")
    assert done.returncode != 0
    Path("/etc/vfiod-lab-secret").write_text("secret")
    Path("/etc/vfiod-lab-secret").chmod(0o600)
    done = unprivileged_python("import os; os.open('/etc/vfiod-lab-secret', os.O_RDONLY)")
    assert "PermissionError" in done.stderr
    done = unprivileged_python(f"import os; os.open('/dev/vfio/{pci.group_of(EDU_ROOT)}', os.O_RDWR)")
    assert done.returncode != 0
