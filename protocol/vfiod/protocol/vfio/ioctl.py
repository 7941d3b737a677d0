"""The ioctl requests of VFIO, by the kind of fd they belong to.

Numbers from ``include/uapi/linux/vfio.h``. Requests 12 to 14 and 17 mean one thing on a container and another
on a device: hence one enum per kind of fd, and :func:`vfiod.server.kernel.kinds.kind_of` before any of them.
Each member is an ``int`` whose ``name`` is the kernel's own; error texts use it.
"""

from __future__ import annotations

import enum
import os
from typing import Final

__all__ = ["VFIO_BASE", "VFIO_TYPE", "ContainerIoctl", "DeviceIoctl", "GroupIoctl", "Ioctl", "request_number"]

VFIO_TYPE: Final = ord(";")
VFIO_BASE: Final = 100

# <asm/ioctl.h>: these architectures encode "no direction" as 1 in bit 29; all others as 0 (<asm-generic/ioctl.h>).
_ODD_MACHINES: Final = ("ppc", "mips", "sparc", "alpha")
_IOC_NONE: Final = 1 << 29 if os.uname().machine.startswith(_ODD_MACHINES) else 0


def request_number(offset: int) -> int:
    """``_IO(VFIO_TYPE, VFIO_BASE + offset)`` on this machine."""
    return _IOC_NONE | VFIO_TYPE << 8 | (VFIO_BASE + offset)


class Ioctl(enum.IntEnum):
    """A request to the kernel; ``name`` is the kernel's."""


class ContainerIoctl(Ioctl):
    """Requests of ``/dev/vfio/vfio``, type1's among them."""

    VFIO_GET_API_VERSION = request_number(0)
    VFIO_CHECK_EXTENSION = request_number(1)
    VFIO_SET_IOMMU = request_number(2)
    VFIO_IOMMU_GET_INFO = request_number(12)
    VFIO_IOMMU_MAP_DMA = request_number(13)
    VFIO_IOMMU_UNMAP_DMA = request_number(14)
    VFIO_IOMMU_ENABLE = request_number(15)
    VFIO_IOMMU_DISABLE = request_number(16)
    VFIO_IOMMU_DIRTY_PAGES = request_number(17)


class GroupIoctl(Ioctl):
    """Requests of ``/dev/vfio/N``."""

    VFIO_GROUP_GET_STATUS = request_number(3)
    VFIO_GROUP_SET_CONTAINER = request_number(4)
    VFIO_GROUP_UNSET_CONTAINER = request_number(5)
    VFIO_GROUP_GET_DEVICE_FD = request_number(6)


class DeviceIoctl(Ioctl):
    """Requests of a device fd."""

    VFIO_DEVICE_GET_INFO = request_number(7)
    VFIO_DEVICE_GET_REGION_INFO = request_number(8)
    VFIO_DEVICE_GET_IRQ_INFO = request_number(9)
    VFIO_DEVICE_SET_IRQS = request_number(10)
    VFIO_DEVICE_RESET = request_number(11)
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = request_number(12)
    VFIO_DEVICE_PCI_HOT_RESET = request_number(13)
    VFIO_DEVICE_QUERY_GFX_PLANE = request_number(14)
    VFIO_DEVICE_GET_GFX_DMABUF = request_number(15)
    VFIO_DEVICE_IOEVENTFD = request_number(16)
    VFIO_DEVICE_FEATURE = request_number(17)
    VFIO_DEVICE_BIND_IOMMUFD = request_number(18)
    VFIO_DEVICE_ATTACH_IOMMUFD_PT = request_number(19)
    VFIO_DEVICE_DETACH_IOMMUFD_PT = request_number(20)
