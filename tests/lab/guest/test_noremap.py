"""A machine without interrupt remapping: what is refused there, and a host that grants one MSI vector of sixteen.

Rules are those of behaviour.md, by section.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab.guest import nics, pci
from tests.lab.guest.nics import WAYS, added, config, fired, set_config
from tests.lab.guest.resets import add_iommufd, forget_names
from tests.lab.guest.vm import Vm, opened, opened_group, trigger_of
from tests.lab.topologies import EDU_PORT, XHCI_PORT, XHCI_VECTORS

from vfiod.protocol.errors import RemoteError

MACHINE = "noremap"

UNSAFE = [
    Path(f"/sys/module/{module}/parameters/allow_unsafe_interrupts") for module in ("vfio_iommu_type1", "iommufd")
]


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = nics.vfiods(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    return next(vms)


@contextmanager
def unsafe() -> Iterator[None]:
    """Have the kernel accept devices whose interrupts nothing holds back, for a block."""
    for parameter in UNSAFE:
        parameter.write_text("Y")
    try:
        yield
    finally:
        for parameter in UNSAFE:
            parameter.write_text("N")


def test_a_group_is_refused_and_the_way_out_is_named(vm: Vm) -> None:
    """Section 1: ``SET_IOMMU`` says EPERM; "failure anywhere unwinds everything done before it"."""
    with vm.bound(EDU_PORT):
        fds = vm.fds()
        with opened_group(EDU_PORT) as group:
            # The host tells before it is tried.
            checks = vm.client.device_add(driver="vfio-pci", id="n0", host=EDU_PORT, group_fd=group, x_dry_run=True)
            (remapping,) = [check for check in checks.checks or [] if check.name == "interrupt-remapping"]
            assert not remapping.ok
            with pytest.raises(RemoteError, match=r"interrupt remapping.*allow_unsafe_interrupts") as refused:
                vm.client.device_add(driver="vfio-pci", id="n0", host=EDU_PORT, group_fd=group)
            assert refused.value.errno == errno.errorcode[errno.EPERM]
        assert vm.client.query_devices() == []
        assert vm.client.query_machine().containers == []
        forget_names(vm)
        assert vm.fds() == fds, "nothing is left but what was there"
        with unsafe():
            vm.add(EDU_PORT, "n0")
            assert vm.read("n0", pci.EDU_ID) == pci.EDU_IDENTITY
            assert vm.remove("n0")


def test_a_cdev_is_refused_and_the_way_out_is_named(vm: Vm) -> None:
    """Section 1, "Modern path": the refusal of the attachment, or of the bind, is named the same."""
    with vm.bound(EDU_PORT):
        add_iommufd(vm)
        with opened(str(pci.vfio_cdev(EDU_PORT))) as fd:
            with pytest.raises(RemoteError, match=r"interrupt remapping.*allow_unsafe_interrupts") as refused:
                vm.client.device_add(driver="vfio-pci", id="n0", fd=fd, iommufd="i0")
            assert refused.value.errno == errno.errorcode[errno.EPERM]
            assert vm.client.query_devices() == []
            with unsafe():
                # The same open file, which the kernel may have bound by then.
                vm.client.device_add(driver="vfio-pci", id="n0", fd=fd, iommufd="i0")
        assert vm.read("n0", pci.EDU_ID) == pci.EDU_IDENTITY
        forget_names(vm)
        assert vm.remove("n0")
        vm.client.object_del(id="i0")


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_says_how_many_vectors_it_has(vm: Vm, way: str) -> None:
    """Section 4, MSI: "a positive return says how many": without remapping x86 gives one message of sixteen."""
    with unsafe(), added(vm, XHCI_PORT, way):
        (irq,) = [irq for irq in vm.client.query_irqs(device="dev") if irq.name == "msi"]
        assert irq.count == XHCI_VECTORS
        with pytest.raises(RemoteError, match="16 vectors were asked for, the host has 1") as refused:
            vm.client.irq_start(device="dev", index="msi", vectors=list(range(XHCI_VECTORS)))
        print(refused.value)
        assert vm.client.query_devices()[0].irq_kind == "none"
        # The guest allocates sixteen and switches MSI on: it gets one, and reads so.
        control = nics.find(vm, "dev", nics.MSI_ID) + 2
        set_config(vm, "dev", control, 2, 4 << 4 | 1)
        assert config(vm, "dev", control, 2) & 0x71 == 1, "enabled, and the logarithm of one"
        (irq,) = [irq for irq in vm.client.query_irqs(device="dev") if irq.name == "msi"]
        assert [vector.vector for vector in irq.vectors] == [0]
        with vm.client.irq_start(device="dev", index="msi", vectors=[0]) as started:
            vm.client.irq_trigger(device="dev", index="msi", vector=0)
            assert fired(trigger_of(started)) >= 1
        set_config(vm, "dev", control, 2, 0)
        assert config(vm, "dev", control, 2) & 0x71 == 0, "disabling sets the field to 0"
