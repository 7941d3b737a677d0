"""Numbers, sizes and offsets against the kernel's header: as it was when written, and as it lies on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import struct
from pathlib import Path

import pytest
from tests.unit.protocol.vfio.kernel_numbers import LINUX_7_2
from tests.unit.protocol.vfio.probe import STRUCTURES, ask, constants_of_ours

from vfiod.protocol import vfio
from vfiod.protocol.vfio import capabilities, irqs

HEADERS = os.environ.get("VFIOD_LINUX_HEADERS")  # an include directory with a newer <linux/vfio.h>

# Our layouts against the header's structures. "4x" of padding and a flexible array at the end count.
LAYOUTS: dict[str, struct.Struct] = {
    "vfio_info_cap_header": capabilities._HEADER,
    "vfio_group_status": vfio.GroupStatus.LAYOUT,
    "vfio_device_info": vfio.DeviceInfo.WITH_CAPS,
    "vfio_region_info": vfio.RegionInfo.LAYOUT,
    "vfio_region_sparse_mmap_area": vfio.SparseMmap._AREA,
    "vfio_irq_info": vfio.IrqInfo.LAYOUT,
    "vfio_irq_set": irqs.SetIrqs.LAYOUT,
    "vfio_pci_dependent_device": vfio.DependentDevice.LAYOUT,
    "vfio_pci_hot_reset_info": vfio.HotResetInfo.LAYOUT,
    "vfio_pci_hot_reset": vfio.HotReset.LAYOUT,
    "vfio_device_feature": vfio.DeviceFeature.LAYOUT,
    "vfio_iommu_type1_info": vfio.Type1Info.WITH_CAPS,
    "vfio_iova_range": vfio.IovaRanges._RANGE,
    "vfio_iommu_type1_dma_map": vfio.DmaMap.LAYOUT,
    "vfio_iommu_type1_dma_unmap": vfio.DmaUnmap.LAYOUT,
    "vfio_device_bind_iommufd": vfio.BindIommufd.LAYOUT,
    "iommu_destroy": vfio.IommuDestroy.LAYOUT,
    "iommu_ioas_alloc": vfio.IoasAlloc.LAYOUT,
    "iommu_iova_range": vfio.IovaRange.LAYOUT,
    "iommu_ioas_iova_ranges": vfio.IoasIovaRanges.LAYOUT,
    "iommu_ioas_map": vfio.IoasMap.LAYOUT,
    "iommu_ioas_map_file": vfio.IoasMapFile.LAYOUT,
    "iommu_ioas_unmap": vfio.IoasUnmap.LAYOUT,
    "iommu_option": vfio.IommuOption.LAYOUT,
    "iommu_hw_info": vfio.HwInfo.LAYOUT,
}

# Packed without the members a flag would say are there.
SHORT: dict[str, struct.Struct] = {
    "vfio_device_attach_iommufd_pt": vfio.AttachPt.LAYOUT,
    "vfio_device_detach_iommufd_pt": vfio.DetachPt.LAYOUT,
}

# Bodies of capabilities: what comes after the header.
BODIES: dict[str, struct.Struct] = {
    "vfio_region_info_cap_sparse_mmap": vfio.SparseMmap._LAYOUT,
    "vfio_region_info_cap_type": vfio.RegionTypeCap._LAYOUT,
    "vfio_iommu_type1_info_cap_iova_range": vfio.IovaRanges._LAYOUT,
    "vfio_iommu_type1_info_cap_migration": vfio.MigrationInfo._LAYOUT,
    "vfio_iommu_type1_info_dma_avail": vfio.DmaAvailable._LAYOUT,
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the stored ioctl numbers are x86_64's")
def test_every_constant_is_the_kernels() -> None:
    stored = {name: LINUX_7_2.get(name) for name in constants_of_ours()}
    assert constants_of_ours() == stored


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_layout_has_the_kernels_size_and_offsets(name: str) -> None:
    if name in LAYOUTS:
        assert LAYOUTS[name].size == LINUX_7_2[name]
        layout, start = LAYOUTS[name], 0
    elif name in SHORT:
        layout, start = SHORT[name], 0
    else:
        header = capabilities.HEADER_SIZE
        # The kernel's sizeof rounds up to the structure's alignment; bodies need only reach their last member.
        assert header + BODIES[name].size in (LINUX_7_2[name], LINUX_7_2[name] - 4)
        layout, start = BODIES[name], header
    offsets = [LINUX_7_2[f"{name}.{member}"] for member in STRUCTURES[name]]
    wanted = [offset - start for offset in offsets if offset >= start and offset - start < layout.size]
    assert _offsets(layout.format) == wanted


def _offsets(layout: str) -> list[int]:
    """Where each member of a struct format begins."""
    assert layout[0] == "="
    found, position, skip = [], 0, ""
    for code in layout[1:]:
        if code.isdigit():
            skip += code
        elif code == "x":
            position += int(skip or 1)
            skip = ""
        else:
            found.append(position)
            position += struct.calcsize(f"={code}")
    return found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.skipif(not Path("/usr/include/linux/vfio.h").exists() and not HEADERS, reason="no kernel headers")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the stored ioctl numbers are x86_64's")
def test_the_header_of_this_machine_says_the_same() -> None:
    found = ask(HEADERS)
    assert len(found) > 150
    # struct vfio_device_info and vfio_iommu_type1_info got explicit padding in Linux 6.6, of the same meaning.
    grown = {"vfio_device_info", "vfio_iommu_type1_info"}
    differing = {name: value for name, value in found.items() if LINUX_7_2[name] != value and name not in grown}
    assert not differing
    assert all(found[name] <= LINUX_7_2[name] for name in grown)
