"""Ask a C compiler what ``<linux/vfio.h>`` says: every constant, size and offset that vfiod.protocol.vfio claims.

``python -m tests.unit.protocol.vfio.probe INCLUDE_DIRECTORY`` prints them as the table of ``kernel_numbers.py``.
"""

from __future__ import annotations

import enum
import subprocess
import sys
import tempfile
from pathlib import Path

from vfiod.protocol.vfio import constants, ioctl

# Enum of ours -> how the kernel spells its members.
PREFIXES: dict[type[enum.IntEnum] | type[enum.IntFlag], str] = {
    constants.Extension: "VFIO_{}",
    constants.GroupFlags: "VFIO_GROUP_FLAGS_{}",
    constants.DeviceFlags: "VFIO_DEVICE_FLAGS_{}",
    constants.DeviceInfoCap: "VFIO_DEVICE_INFO_CAP_{}",
    constants.AtomicCompletion: "VFIO_PCI_ATOMIC_{}",
    constants.RegionFlags: "VFIO_REGION_INFO_FLAG_{}",
    constants.RegionInfoCap: "VFIO_REGION_INFO_CAP_{}",
    constants.RegionType: "VFIO_REGION_TYPE_{}",
    constants.IrqFlags: "VFIO_IRQ_INFO_{}",
    constants.IrqSetFlags: "VFIO_IRQ_SET_{}",
    constants.PciRegion: "VFIO_PCI_{}_REGION_INDEX",
    constants.PciIrq: "VFIO_PCI_{}_IRQ_INDEX",
    constants.HotResetFlags: "VFIO_PCI_HOT_RESET_FLAG_{}",
    constants.FeatureFlags: "VFIO_DEVICE_FEATURE_{}",
    constants.Feature: "VFIO_DEVICE_FEATURE_{}",
    constants.MigrationFlags: "VFIO_MIGRATION_{}",
    constants.Type1Flags: "VFIO_IOMMU_INFO_{}",
    constants.Type1InfoCap: "VFIO_IOMMU_TYPE1_INFO_{}",
    constants.DmaMapFlags: "VFIO_DMA_MAP_FLAG_{}",
    constants.DmaUnmapFlags: "VFIO_DMA_UNMAP_FLAG_{}",
}

SINGLE = (
    "VFIO_API_VERSION",
    "VFIO_DEVICE_FEATURE_MASK",
    "VFIO_PCI_DEVID_OWNED",
    "VFIO_PCI_DEVID_NOT_OWNED",
    "VFIO_PCI_NUM_REGIONS",
    "VFIO_PCI_NUM_IRQS",
    "VFIO_REGION_TYPE_PCI_VENDOR_MASK",
)

# Members that are enumerators in C, which #ifdef cannot see; they are as old as the header.
ENUMERATORS = ("_REGION_INDEX", "_IRQ_INDEX", "VFIO_PCI_NUM_")

# Structure -> its members in order. A flexible array counts as the size of the whole.
STRUCTURES = {
    "vfio_info_cap_header": ("id", "version", "next"),
    "vfio_group_status": ("argsz", "flags"),
    "vfio_device_info": ("argsz", "flags", "num_regions", "num_irqs", "cap_offset"),
    "vfio_region_info": ("argsz", "flags", "index", "cap_offset", "size", "offset"),
    "vfio_region_sparse_mmap_area": ("offset", "size"),
    "vfio_region_info_cap_sparse_mmap": ("header", "nr_areas", "reserved", "areas"),
    "vfio_region_info_cap_type": ("header", "type", "subtype"),
    "vfio_irq_info": ("argsz", "flags", "index", "count"),
    "vfio_irq_set": ("argsz", "flags", "index", "start", "count", "data"),
    "vfio_pci_dependent_device": ("group_id", "segment", "bus", "devfn"),
    "vfio_pci_hot_reset_info": ("argsz", "flags", "count", "devices"),
    "vfio_pci_hot_reset": ("argsz", "flags", "count", "group_fds"),
    "vfio_device_feature": ("argsz", "flags", "data"),
    "vfio_iommu_type1_info": ("argsz", "flags", "iova_pgsizes", "cap_offset"),
    "vfio_iova_range": ("start", "end"),
    "vfio_iommu_type1_info_cap_iova_range": ("header", "nr_iovas", "reserved", "iova_ranges"),
    "vfio_iommu_type1_info_cap_migration": ("header", "flags", "pgsize_bitmap", "max_dirty_bitmap_size"),
    "vfio_iommu_type1_info_dma_avail": ("header", "avail"),
    "vfio_iommu_type1_dma_map": ("argsz", "flags", "vaddr", "iova", "size"),
    "vfio_iommu_type1_dma_unmap": ("argsz", "flags", "iova", "size", "data"),
}


# TYPE1_NESTING became reserved in Linux 6.13, and was renamed so that nobody uses it.
RENAMED = {"VFIO_TYPE1_NESTING_IOMMU": "__VFIO_RESERVED_TYPE1_NESTING_IOMMU"}


def constants_of_ours() -> dict[str, int]:
    """Every constant by the kernel's name."""
    table = {pattern.format(m.name): int(m) for kind, pattern in PREFIXES.items() for m in kind}
    table |= {name: getattr(constants, name) for name in SINGLE}
    return table | {m.name: int(m) for kind in ioctl.Ioctl.__subclasses__() for m in kind}


def ask(include: str | None) -> dict[str, int]:
    """Compile and run the questions; what the header does not define is left out."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/vfio.h>", "int main(void) {"]
    for name in constants_of_ours():
        for spelling in filter(None, (name, RENAMED.get(name))):
            say = f'printf("{name} %lld\\n", (long long)({spelling}));'
            visible = any(mark in name for mark in ENUMERATORS)
            lines += [say] if visible else [f"#ifdef {spelling}", say, "#endif"]
    for structure, members in STRUCTURES.items():
        lines.append(f'printf("{structure} %zu\\n", sizeof(struct {structure}));')
        lines += [f'printf("{structure}.{m} %zu\\n", offsetof(struct {structure}, {m}));' for m in members]
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "probe.c"), Path(directory, "probe")
        source.write_text("\n".join([*lines, "return 0; }"]))
        search = ["-isystem", include] if include else []
        subprocess.run(["gcc", *search, "-o", program, source], check=True)
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


if __name__ == "__main__":
    for key, number in ask(sys.argv[1] if len(sys.argv) > 1 else None).items():
        print(f'    "{key}": {number},')
