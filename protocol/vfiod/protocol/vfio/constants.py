"""The numbers of ``include/uapi/linux/vfio.h`` that are not ioctl requests.

Member names are the kernel's without the prefix that each docstring gives. Unknown flag bits are kept.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = [
    "VFIO_API_VERSION",
    "VFIO_DEVICE_FEATURE_MASK",
    "VFIO_PCI_DEVID_NOT_OWNED",
    "VFIO_PCI_DEVID_OWNED",
    "VFIO_REGION_TYPE_PCI_VENDOR_MASK",
    "VFIO_REGION_TYPE_PCI_VENDOR_TYPE",
    "AtomicCompletion",
    "DeviceFlags",
    "DeviceInfoCap",
    "DmaMapFlags",
    "DmaUnmapFlags",
    "Extension",
    "Feature",
    "FeatureFlags",
    "GroupFlags",
    "HotResetFlags",
    "IrqFlags",
    "IrqInfoCap",
    "IrqSetFlags",
    "IrqType",
    "MigrationFlags",
    "PciIrq",
    "PciRegion",
    "RegionFlags",
    "RegionInfoCap",
    "RegionType",
    "Type1Flags",
    "Type1InfoCap",
]

VFIO_API_VERSION: Final = 0
VFIO_DEVICE_FEATURE_MASK: Final = 0xFFFF
VFIO_PCI_DEVID_OWNED: Final = 0
VFIO_PCI_DEVID_NOT_OWNED: Final = -1
VFIO_REGION_TYPE_PCI_VENDOR_TYPE: Final = 1 << 31
VFIO_REGION_TYPE_PCI_VENDOR_MASK: Final = 0xFFFF


class Extension(enum.IntEnum):
    """``VFIO_*``: what ``VFIO_CHECK_EXTENSION`` asks for, and what ``VFIO_SET_IOMMU`` sets."""

    TYPE1_IOMMU = 1
    SPAPR_TCE_IOMMU = 2
    TYPE1v2_IOMMU = 3
    DMA_CC_IOMMU = 4
    EEH = 5
    TYPE1_NESTING_IOMMU = 6
    SPAPR_TCE_v2_IOMMU = 7
    NOIOMMU_IOMMU = 8
    UNMAP_ALL = 9
    UPDATE_VADDR = 10


class GroupFlags(enum.IntFlag):
    """``VFIO_GROUP_FLAGS_*``."""

    VIABLE = 1 << 0
    CONTAINER_SET = 1 << 1


class DeviceFlags(enum.IntFlag):
    """``VFIO_DEVICE_FLAGS_*``."""

    RESET = 1 << 0
    PCI = 1 << 1
    PLATFORM = 1 << 2
    AMBA = 1 << 3
    CCW = 1 << 4
    AP = 1 << 5
    FSL_MC = 1 << 6
    CAPS = 1 << 7
    CDX = 1 << 8


class DeviceInfoCap(enum.IntEnum):
    """``VFIO_DEVICE_INFO_CAP_*``."""

    ZPCI_BASE = 1
    ZPCI_GROUP = 2
    ZPCI_UTIL = 3
    ZPCI_PFIP = 4
    PCI_ATOMIC_COMP = 5


class AtomicCompletion(enum.IntFlag):
    """``VFIO_PCI_ATOMIC_*``: widths of AtomicOp completion to the root bus."""

    COMP32 = 1 << 0
    COMP64 = 1 << 1
    COMP128 = 1 << 2


class RegionFlags(enum.IntFlag):
    """``VFIO_REGION_INFO_FLAG_*``."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class RegionInfoCap(enum.IntEnum):
    """``VFIO_REGION_INFO_CAP_*``."""

    SPARSE_MMAP = 1
    TYPE = 2
    MSIX_MAPPABLE = 3
    NVLINK2_SSATGT = 4
    NVLINK2_LNKSPD = 5


class RegionType(enum.IntEnum):
    """``VFIO_REGION_TYPE_*``."""

    GFX = 1
    CCW = 2
    MIGRATION_DEPRECATED = 3


class IrqFlags(enum.IntFlag):
    """``VFIO_IRQ_INFO_*``."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3
    CAPS = 1 << 4
    """RFC only ("vfio/platform: add support for msi", v3, 2020): no kernel has it."""


class IrqInfoCap(enum.IntEnum):
    """``VFIO_IRQ_INFO_CAP_*`` of the same RFC."""

    TYPE = 3
    MSI_DESCS = 4


class IrqType(enum.IntEnum):
    """``VFIO_IRQ_TYPE_*`` of the same RFC: what an index beyond a device's own IRQs is."""

    MSI = 1


class IrqSetFlags(enum.IntFlag):
    """``VFIO_IRQ_SET_*``: one DATA and one ACTION."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class PciRegion(enum.IntEnum):
    """``VFIO_PCI_*_REGION_INDEX``. Indexes from ``VFIO_PCI_NUM_REGIONS`` on are named by their type capability."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


VFIO_PCI_NUM_REGIONS: Final = 9


class PciIrq(enum.IntEnum):
    """``VFIO_PCI_*_IRQ_INDEX``."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


VFIO_PCI_NUM_IRQS: Final = 5


class HotResetFlags(enum.IntFlag):
    """``VFIO_PCI_HOT_RESET_FLAG_*``."""

    DEV_ID = 1 << 0
    DEV_ID_OWNED = 1 << 1


class FeatureFlags(enum.IntFlag):
    """``VFIO_DEVICE_FEATURE_*``: what to do with the feature in the low 16 bits."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class Feature(enum.IntEnum):
    """``VFIO_DEVICE_FEATURE_*``: the features."""

    PCI_VF_TOKEN = 0
    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    LOW_POWER_ENTRY = 3
    LOW_POWER_ENTRY_WITH_WAKEUP = 4
    LOW_POWER_EXIT = 5
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    BUS_MASTER = 10
    DMA_BUF = 11
    MIG_PRECOPY_INFOv2 = 12


class MigrationFlags(enum.IntFlag):
    """``VFIO_MIGRATION_*``."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class Type1Flags(enum.IntFlag):
    """``VFIO_IOMMU_INFO_*``."""

    PGSIZES = 1 << 0
    CAPS = 1 << 1


class Type1InfoCap(enum.IntEnum):
    """``VFIO_IOMMU_TYPE1_INFO_*``."""

    CAP_IOVA_RANGE = 1
    CAP_MIGRATION = 2
    DMA_AVAIL = 3


class DmaMapFlags(enum.IntFlag):
    """``VFIO_DMA_MAP_FLAG_*``: READ and WRITE are the device's."""

    READ = 1 << 0
    WRITE = 1 << 1
    VADDR = 1 << 2


class DmaUnmapFlags(enum.IntFlag):
    """``VFIO_DMA_UNMAP_FLAG_*``."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1
    VADDR = 1 << 2
