"""What tests of resets have in common: cdevs by an unprivileged vfiod, and what a report says."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.lab.guest import pci
from tests.lab.guest.vm import Vm, opened, running_vm

from vfiod.client.sync import EventStream
from vfiod.protocol.catalogue.reset import DeviceResetDone, HotResetReport


def running_vms(directories: pytest.TempPathFactory) -> Generator[Vm, None, None]:
    """One vfiod for as long as it lives, as starting it takes long here; a new one when a test has ended it."""
    with ExitStack() as stack:
        vm: Vm | None = None
        while True:
            if vm is None or vm.process.poll() is not None:
                vm = stack.enter_context(running_vm(directories.mktemp("vm")))
            yield vm


def add_member(vm: Vm, address: str, name: str) -> None:
    """Add another device of a group that vfiod has. Nobody can open that group again meanwhile: EBUSY."""
    vm.client.device_add(driver="vfio-pci", id=name, host=address)


def forget_names(vm: Vm) -> None:
    """Close what a refused command may have left under its names: a group that it holds cannot be opened again."""
    for info in vm.client.query_fds():
        if isinstance(info.name, str) and info.name.startswith("client-"):
            vm.client.closefd(fdname=info.name)


def add_iommufd(vm: Vm, name: str = "i0") -> None:
    with opened("/dev/iommu") as fd:
        vm.client.object_add(qom_type="iommufd", id=name, fd=fd)


def add_cdev(vm: Vm, address: str, name: str, iommufd: str = "i0") -> None:
    with opened(str(pci.vfio_cdev(address))) as fd:
        vm.client.device_add(driver="vfio-pci", id=name, fd=fd, iommufd=iommufd)


def held(report: HotResetReport) -> dict[str, object]:
    """What each affected function is held as; its reason when it stands in the way; None: neither."""
    return {
        one.address: one.reason
        if isinstance(one.reason, str)
        else one.held_as
        if isinstance(one.held_as, str)
        else None
        for one in report.affected
    }


def resets(events: EventStream) -> list[tuple[str, str]]:
    """The resets that were told since, by device."""
    return sorted((e.data.device, e.data.method) for e in events.pending() if isinstance(e.data, DeviceResetDone))


@contextmanager
def told_resets(vm: Vm) -> Iterator[EventStream]:
    with vm.client.events("DEVICE_RESET", "DEVICE_ERROR") as events:
        yield events
