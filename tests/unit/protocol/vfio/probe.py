"""Ask a C compiler what ``<linux/vfio.h>`` and ``<linux/iommufd.h>`` say: each constant, size and offset we claim.

``python -m tests.unit.protocol.vfio.probe INCLUDE_DIRECTORY`` prints them as the table of ``kernel_numbers.py``.
"""

from __future__ import annotations

import enum
import subprocess
import sys
import tempfile
from pathlib import Path

from vfiod.protocol.vfio import constants, ioctl, iommufd

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
    iommufd.BindFlags: "VFIO_DEVICE_BIND_FLAG_{}",
    iommufd.IoasMapFlags: "IOMMU_IOAS_MAP_{}",
    iommufd.IommufdOption: "IOMMU_OPTION_{}",
    iommufd.IommufdOptionOp: "IOMMU_OPTION_OP_{}",
    iommufd.HwInfoType: "IOMMU_HW_INFO_TYPE_{}",
    iommufd.HwCapabilities: "IOMMU_HW_CAP_{}",
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

# Enumerators of <linux/iommufd.h>, which is not everywhere: there once this macro is (Linux 6.13).
IOMMUFD = ("IOMMU_IOAS_MAP_", "IOMMU_OPTION_", "IOMMU_HW_")
IOMMUFD_MARK = "IOMMU_IOAS_MAP_FILE"

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
    "vfio_device_bind_iommufd": ("argsz", "flags", "iommufd", "out_devid", "token_uuid_ptr"),
    "vfio_device_attach_iommufd_pt": ("argsz", "flags", "pt_id", "pasid"),
    "vfio_device_detach_iommufd_pt": ("argsz", "flags", "pasid"),
    "iommu_destroy": ("size", "id"),
    "iommu_ioas_alloc": ("size", "flags", "out_ioas_id"),
    "iommu_iova_range": ("start", "last"),
    "iommu_ioas_iova_ranges": (
        "size",
        "ioas_id",
        "num_iovas",
        "__reserved",
        "allowed_iovas",
        "out_iova_alignment",
    ),
    "iommu_ioas_map": ("size", "flags", "ioas_id", "__reserved", "user_va", "length", "iova"),
    "iommu_ioas_map_file": ("size", "flags", "ioas_id", "fd", "start", "length", "iova"),
    "iommu_ioas_unmap": ("size", "ioas_id", "iova", "length"),
    "iommu_option": ("size", "option_id", "op", "__reserved", "object_id", "val64"),
    "iommu_hw_info": (
        "size",
        "flags",
        "dev_id",
        "data_len",
        "data_uptr",
        "out_data_type",
        "out_max_pasid_log2",
        "out_capabilities",
    ),
}

# Structures an older header does not have, or has with fewer members, and the macro that came with all of them.
GUARDS = {
    "vfio_device_bind_iommufd": "VFIO_DEVICE_BIND_FLAG_TOKEN",
    "vfio_device_attach_iommufd_pt": "VFIO_DEVICE_ATTACH_PASID",
    "vfio_device_detach_iommufd_pt": "VFIO_DEVICE_DETACH_PASID",
} | {name: IOMMUFD_MARK for name in STRUCTURES if name.startswith("iommu_")}
GUARDS["iommu_hw_info"] = "VFIO_DEVICE_ATTACH_PASID"  # out_max_pasid_log2 came with it


# TYPE1_NESTING became reserved in Linux 6.13, and was renamed so that nobody uses it.
RENAMED = {"VFIO_TYPE1_NESTING_IOMMU": "__VFIO_RESERVED_TYPE1_NESTING_IOMMU"}


REQUESTS = {member.name for member in iommufd.IommufdIoctl}


def constants_of_ours() -> dict[str, int]:
    """Every constant by the kernel's name."""
    table = {pattern.format(m.name): int(m) for kind, pattern in PREFIXES.items() for m in kind}
    del table["VFIO_IRQ_INFO_CAPS"]  # of an RFC that no kernel took
    table |= {name: getattr(constants, name) for name in SINGLE}
    return table | {m.name: int(m) for kind in ioctl.Ioctl.__subclasses__() for m in kind}


def ask(include: str | None) -> dict[str, int]:
    """Compile and run the questions; what the header does not define is left out."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/vfio.h>"]
    lines += ["#if __has_include(<linux/iommufd.h>)", "#include <linux/iommufd.h>", "#endif", "int main(void) {"]
    for name in constants_of_ours():
        for spelling in filter(None, (name, RENAMED.get(name))):
            say = f'printf("{name} %lld\\n", (long long)({spelling}));'
            visible = any(mark in name for mark in ENUMERATORS)
            enumerator = name.startswith(IOMMUFD) and name != IOMMUFD_MARK and name not in REQUESTS
            macro = IOMMUFD_MARK if enumerator else spelling
            lines += [say] if visible else [f"#ifdef {macro}", say, "#endif"]
    for structure, members in STRUCTURES.items():
        lines += [f"#ifdef {GUARDS[structure]}"] if structure in GUARDS else []
        lines.append(f'printf("{structure} %zu\\n", sizeof(struct {structure}));')
        lines += [f'printf("{structure}.{m} %zu\\n", offsetof(struct {structure}, {m}));' for m in members]
        lines += ["#endif"] if structure in GUARDS else []
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
