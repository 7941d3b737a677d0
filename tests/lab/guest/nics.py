"""Devices with MSI-X, by either of the kernel's two interfaces; configuration space as a guest's driver walks it."""

from __future__ import annotations

import os
import select
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from tests.lab.guest import pci
from tests.lab.guest.vm import Vm, opened, opened_group, running_vm

from vfiod.client.methods.values import IrqStartResult
from vfiod.protocol.fd import FileDescriptor

WAYS = ("group", "cdev")
MSI_ID, MSIX_ID = 0x05, 0x11
MSIX_ENABLE, MSIX_MASK_ALL = 1 << 15, 1 << 14
COMMAND, MEMORY_AND_MASTER = 4, 0x6


def vfiods(directories: pytest.TempPathFactory) -> Generator[Vm, None, None]:
    """Running vfiods: one for all tests of a module, as starting it takes long here; a new one when a test ended it."""
    with ExitStack() as stack:
        vm: Vm | None = None
        while True:
            if vm is None or vm.process.poll() is not None:
                if vm is not None:
                    with suppress(AssertionError):  # it was killed, and the test that did it has said so
                        stack.close()
                vm = stack.enter_context(running_vm(directories.mktemp("vm")))
            yield vm


@contextmanager
def added(vm: Vm, address: str, way: str, name: str = "dev") -> Iterator[None]:
    """Have the device in vfiod for a block, decoding memory and mastering the bus."""
    with vm.bound(address):
        if way == "group":
            vm.add(address, name)
        else:
            with opened("/dev/iommu") as iommufd, opened(str(pci.vfio_cdev(address))) as fd:
                vm.client.object_add(qom_type="iommufd", id="iommufd0", fd=iommufd)
                vm.client.device_add(driver="vfio-pci", id=name, fd=fd, iommufd="iommufd0")
        set_config(vm, name, COMMAND, 2, MEMORY_AND_MASTER)
        yield
        assert vm.remove(name)
        if way == "cdev":
            vm.client.object_del(id="iommufd0")


def add_group(vm: Vm, address: str, name: str, **properties: Any) -> None:
    """Add a device by its group, with further properties."""
    with opened_group(address) as group, opened("/dev/vfio/vfio") as container:
        vm.client.device_add(
            driver="vfio-pci", id=name, host=address, group_fd=group, container_fd=container, **properties
        )


@contextmanager
def memfd(data: bytes) -> Iterator[FileDescriptor]:
    """A file of these bytes."""
    with FileDescriptor(os.memfd_create("file")) as fd:
        os.pwrite(fd.number, data, 0)
        yield fd


def config(vm: Vm, name: str, offset: int, size: int) -> int:
    value = vm.client.region_read(device=name, region="config", offset=offset, size=size).value  # type: ignore[arg-type]
    assert isinstance(value, int)
    return value


def set_config(vm: Vm, name: str, offset: int, size: int, value: int) -> None:
    vm.client.region_write(device=name, region="config", offset=offset, size=size, value=value)  # type: ignore[arg-type]


def find(vm: Vm, name: str, wanted: int) -> int:
    """Where a capability is, found as a driver finds it; 0: nowhere."""
    at = config(vm, name, 0x34, 1)
    for _ in range(48):
        if not at or config(vm, name, at, 1) == wanted:
            return at
        at = config(vm, name, at + 1, 1)
    raise AssertionError("the chain does not end")


def msix_bar(vm: Vm, name: str) -> tuple[str, int]:
    """The BAR and the offset of the MSI-X table."""
    table = config(vm, name, find(vm, name, MSIX_ID) + 4, 4)
    return f"bar{table & 7}", table & ~7


def set_entry(vm: Vm, name: str, vector: int, *, masked: bool) -> None:
    """Program one entry of the MSI-X table, as a guest driver does: message, then mask bit."""
    bar, table = msix_bar(vm, name)
    at = table + 16 * vector
    for offset, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x4000 + vector), (12, int(masked))):
        vm.client.region_write(device=name, region=bar, offset=at + offset, size=4, value=value)


def fired(eventfd: int, seconds: float = 20.0) -> int:
    """How often an eventfd was signalled; 0 when it was not in time."""
    ready, _, _ = select.select([eventfd], [], [], seconds)
    return int.from_bytes(os.read(eventfd, 8), "little") if ready else 0


def quiet(eventfd: int) -> bool:
    """Whether an eventfd stays silent for a while that is long for an interrupt."""
    return not select.select([eventfd], [], [], 0.3)[0]


def triggers(started: IrqStartResult) -> dict[int, int]:
    """The trigger eventfds that came with an answer, by vector."""
    found = {}
    for irq in started.irqs:
        assert isinstance(irq.trigger_fd, FileDescriptor), irq
        found[irq.vector] = irq.trigger_fd.number
    return found
