"""The address space of a container: what the kernel refuses, and what is said of it.

Rules are those of behaviour.md, sections 1 and 2.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from tests.unit.server.backends.conftest import PAGE, Host

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.server.backends.base import AddressSpace, Backend, Mapping
from vfiod.server.kernel.memory import SharedMemory


@pytest.fixture
def device(host: Host) -> Iterator[Backend]:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    yield backend
    backend.close()


@pytest.fixture
def space(device: Backend) -> AddressSpace:
    assert device.address_space is not None
    return device.address_space


def test_what_it_can_do(host: Host, space: AddressSpace) -> None:
    assert space.name == "container:0"
    assert space.page_size == 4096
    assert space.iova_ranges() == host.kernel.iova_ranges


def test_a_kernel_that_does_not_say_ranges(host: Host) -> None:
    host.kernel.iova_ranges = ()
    device = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert device.address_space is not None
    assert device.address_space.iova_ranges() == ()
    device.close()


def test_map_and_unmap_reach_the_kernel(host: Host, space: AddressSpace, memory: SharedMemory) -> None:
    space.map(Mapping(0x10000, 2 * PAGE, memory, PAGE, readonly=True))
    (container,) = host.kernel.containers()
    assert container.mappings == {0x10000: (2 * PAGE, memory.address() + PAGE, vfio.DmaMapFlags.READ)}
    space.map(Mapping(0x20000, PAGE, memory, 0, readonly=False))
    assert container.mappings[0x20000][2] == vfio.DmaMapFlags.READ | vfio.DmaMapFlags.WRITE
    space.unmap(0x10000, 2 * PAGE)
    space.unmap(0x20000, PAGE)
    assert container.mappings == {}


def test_one_unmap_may_cover_several(host: Host, space: AddressSpace, memory: SharedMemory) -> None:
    for n in range(4):
        space.map(Mapping(n * PAGE, PAGE, memory, n * PAGE, readonly=False))
    space.unmap(0, 4 * PAGE)
    assert host.kernel.containers()[0].mappings == {}


def test_a_memory_lock_limit_too_low_is_named_with_its_value_and_the_need(
    host: Host, space: AddressSpace, memory: SharedMemory
) -> None:
    host.kernel.memory_lock = 3 * PAGE
    space.map(Mapping(0, 2 * PAGE, memory, 0, readonly=False))
    with pytest.raises(OperationFailed) as caught:
        space.map(Mapping(0x10000, 2 * PAGE, memory, 0, readonly=False))
    assert caught.value.errno == "ENOMEM"
    assert str(caught.value) == (
        "VFIO_IOMMU_MAP_DMA on container:0 (IOVA 0x10000, size 0x2000) failed with ENOMEM: RLIMIT_MEMLOCK is 12288 "
        "bytes, of which 8192 are used, and this mapping needs 8192 more: raise the limit to 16384 or above (ulimit "
        "-l, LimitMEMLOCK= of the service)"
    )
    host.kernel.ipc_lock = True
    space.map(Mapping(0x10000, 2 * PAGE, memory, 0, readonly=False))


@pytest.mark.parametrize("unlimited", ["no limit", "CAP_IPC_LOCK"])
def test_enomem_without_a_limit_does_not_blame_it(
    host: Host, space: AddressSpace, memory: SharedMemory, unlimited: str
) -> None:
    if unlimited == "CAP_IPC_LOCK":
        host.kernel.memory_lock, host.kernel.ipc_lock = PAGE, True
    host.kernel.fail("VFIO_IOMMU_MAP_DMA", errno.ENOMEM)
    with pytest.raises(OperationFailed, match="the host has no memory left to pin"):
        space.map(Mapping(0, PAGE, memory, 0, readonly=False))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "takes 65535 mappings"),
        (errno.EEXIST, "overlaps a mapping"),
        (errno.EINVAL, "whole pages of 4096 bytes within the IOMMU's ranges"),
        (errno.EFAULT, "the file has no memory there"),
        (errno.EIO, "EIO$"),
    ],
)
def test_other_refusals(host: Host, space: AddressSpace, memory: SharedMemory, number: int, words: str) -> None:
    host.kernel.fail("VFIO_IOMMU_MAP_DMA", number)
    with pytest.raises(OperationFailed, match=words):
        space.map(Mapping(0, PAGE, memory, 0, readonly=False))
    assert host.kernel.containers()[0].mappings == {}


def test_unmapping_what_is_not_mapped_or_a_part(space: AddressSpace, memory: SharedMemory) -> None:
    with pytest.raises(OperationFailed, match="ENOENT: 0x0 bytes were unmapped"):
        space.unmap(0, PAGE)
    space.map(Mapping(0, 2 * PAGE, memory, 0, readonly=False))
    with pytest.raises(OperationFailed, match=r"VFIO_IOMMU_UNMAP_DMA on container:0 \(IOVA 0x0, size 0x1000\).*EINVAL"):
        space.unmap(0, PAGE)
    space.unmap(0, 2 * PAGE)


def test_a_mapping_the_kernel_keeps_does_not_hold_up_the_end(
    host: Host, device: Backend, space: AddressSpace, memory: SharedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    space.map(Mapping(0, PAGE, memory, 0, readonly=False))
    host.kernel.fail("VFIO_IOMMU_UNMAP_DMA", errno.EIO)
    assert device.close()
    assert "VFIO_IOMMU_UNMAP_DMA on container:0" in caplog.text
