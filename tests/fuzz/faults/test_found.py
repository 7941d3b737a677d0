"""The defects that the sweep found: each by the fault that showed it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from tests.fuzz.faults.injector import Call, Fault, installed
from tests.fuzz.faults.operations import OPERATIONS
from tests.fuzz.faults.sweep import good_run, starve, sweep_one

_BY_NAME = {operation.name: operation for operation in OPERATIONS}

FOUND = {
    "a file that could not be mapped into the container stayed mapped here, and open": (
        "dma-map fd, two spaces", "VFIO_IOMMU_MAP_DMA", 1, errno.ENOMEM,
    ),
    "a file that could not be mapped into the IOAS stayed mapped here, and open": (
        "dma-map fd, two spaces", "IOMMU_IOAS_MAP_FILE", 1, errno.ENOMEM,
    ),
    "guest memory stayed mapped here when a new address space did not take all of it": (
        "device_add group", "VFIO_IOMMU_MAP_DMA", 2, errno.ENOMEM,
    ),
    "guest memory stayed mapped here when the first device could not be opened": (
        "device_add group", "VFIO_DEVICE_GET_INFO", 1, errno.EIO,
    ),
    "the device kept the MSI enable bit of a guest's write that was refused": (
        "config write enables MSI", "VFIO_DEVICE_SET_IRQS", 2, errno.EBUSY,
    ),
    "the device lost the MSI enable bit by a guest's write that was refused": (
        "config write disables MSI", "VFIO_DEVICE_SET_IRQS", 1, errno.EBUSY,
    ),
    "interrupts stayed armed with the eventfds of a client that was gone": (
        "client goes, group", "VFIO_DEVICE_SET_IRQS", 1, errno.EBUSY,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def wrapped() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.parametrize("name", FOUND)
def test_it_is_as_it_was(name: str) -> None:
    operation, call, nth, number = FOUND[name]
    one = _BY_NAME[operation]
    good = good_run(one)
    assert Call(call, nth) in good.calls
    assert sweep_one(one, good, Fault(Call(call, nth), number)).complaints == []


def test_a_file_that_is_not_mapped_for_want_of_an_fd_is_closed() -> None:
    one = _BY_NAME["dma-map fd, two spaces"]
    assert starve(one, good_run(one), 0).complaints == []


def test_a_device_that_cannot_be_read_masters_the_bus_no_more_after_its_client() -> None:
    """It read the BARs before it switched DMA off, and gave up when one could not be read."""
    one = _BY_NAME["client goes, group"]
    good = good_run(one)
    for call in good.calls:
        if call.name == "pread":
            after = sweep_one(one, good, Fault(call, errno.EIO)).after
            assert not bytes.fromhex(after["kernel"]["devices"]["0000:01:00.0"]["config"])[4] & 4, call
