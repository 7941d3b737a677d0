"""A machine without an IOMMU: noiommu groups, "only when asked for" (behaviour.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.nics import fired
from tests.lab.guest.resets import forget_names
from tests.lab.guest.vm import opened, running_vm, trigger_of
from tests.lab.topologies import EDU_PORT, EDU_ROOT

from vfiod.protocol.errors import RemoteError

MACHINE = "noiommu"

MODE = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """What the host's administrator does; without it vfio-pci takes no device that has no IOMMU."""
    MODE.write_text("Y")
    yield
    MODE.write_text("N")


@contextmanager
def noiommu_group(address: str) -> Iterator[int]:
    """Open the device's group, which is named after what it lacks."""
    with opened(f"/dev/vfio/noiommu-{pci.group_of(address)}") as fd:
        yield fd.number


def test_refused_unless_asked_for(tmp_path: Path) -> None:
    """Section 1: "NOIOMMU only when asked for"."""
    with running_vm(tmp_path, root=True) as vm, vm.bound(EDU_ROOT):
        fds = vm.fds()
        with noiommu_group(EDU_ROOT) as group:
            with pytest.raises(RemoteError, match="x-noiommu=true") as refused:
                vm.client.device_add(driver="vfio-pci", id="n0", host=EDU_ROOT, group_fd=group)
            assert refused.value.errno in ("EPERM", "EACCES")
        assert vm.client.query_devices() == []
        forget_names(vm)
        assert vm.fds() == fds


def test_asked_for_it_serves(tmp_path: Path) -> None:
    """Registers, interrupts and reset work; there is no address space, so nothing is mapped for it."""
    with running_vm(tmp_path, root=True) as vm, vm.bound(EDU_ROOT, EDU_PORT):
        for address, name in ((EDU_ROOT, "n0"), (EDU_PORT, "n1")):
            with noiommu_group(address) as group:
                vm.client.device_add(driver="vfio-pci", id=name, host=address, group_fd=group, x_noiommu=True)
        (container,) = vm.client.query_machine().containers
        assert container.iommu == "noiommu"
        assert sorted(container.groups) == sorted([pci.group_of(EDU_ROOT), pci.group_of(EDU_PORT)])
        assert all(device.group is not None for device in vm.client.query_devices())
        for name in ("n0", "n1"):
            assert vm.read(name, pci.EDU_ID) == pci.EDU_IDENTITY
            vm.let_it_work(name)
            with vm.client.irq_start(device=name, index="msi") as started:
                vm.write(name, pci.EDU_IRQ_RAISE, 1)
                assert fired(trigger_of(started)) == 1
                vm.write(name, pci.EDU_IRQ_ACK, 1)
        vm.client.device_reset(id="n1")
        assert vm.read("n1", pci.EDU_ID) == pci.EDU_IDENTITY
        assert vm.remove("n0")
        assert vm.remove("n1")
        assert vm.client.query_machine().containers == []


def test_without_the_capability_the_refusal_names_it(tmp_path: Path) -> None:
    with running_vm(tmp_path) as vm, vm.bound(EDU_ROOT):
        with noiommu_group(EDU_ROOT) as group:
            with pytest.raises(RemoteError, match="CAP_SYS_RAWIO") as refused:
                vm.client.device_add(driver="vfio-pci", id="n0", host=EDU_ROOT, group_fd=group, x_noiommu=True)
            assert refused.value.errno == "EPERM"
        assert vm.client.query_devices() == []
        assert vm.client.query_machine().containers == []
