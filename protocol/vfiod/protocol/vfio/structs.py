"""The structures of ``include/uapi/linux/vfio.h``, with the kernel's field names.

``pack()`` gives bytes in host order with ``argsz`` set; ``unpack()`` takes them back. Byte order is the host's,
because these never leave the machine (vfio-user, which does, says little-endian and runs on such hosts only).
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final, Self, TypeVar

from msgspec import Struct, field

from vfiod.protocol.vfio import capabilities as caps
from vfiod.protocol.vfio.capabilities import BadStructure, Capability
from vfiod.protocol.vfio.constants import (
    VFIO_DEVICE_FEATURE_MASK,
    DeviceFlags,
    DmaMapFlags,
    DmaUnmapFlags,
    FeatureFlags,
    GroupFlags,
    HotResetFlags,
    IrqFlags,
    RegionFlags,
    Type1Flags,
)

__all__ = [
    "DependentDevice",
    "DeviceFeature",
    "DeviceInfo",
    "DmaMap",
    "DmaUnmap",
    "GroupStatus",
    "HotReset",
    "HotResetInfo",
    "IrqInfo",
    "RegionInfo",
    "Type1Info",
    "argsz_of",
]

C = TypeVar("C", bound=Capability)
_ARGSZ = struct.Struct("=I")
_NO_GROUP_FLAGS = GroupFlags(0)
_NO_DEVICE_FLAGS = DeviceFlags(0)
_NO_REGION_FLAGS = RegionFlags(0)
_NO_IRQ_FLAGS = IrqFlags(0)
_NO_HOT_RESET_FLAGS = HotResetFlags(0)
_NO_TYPE1_FLAGS = Type1Flags(0)
_NO_DMA_UNMAP_FLAGS = DmaUnmapFlags(0)


def argsz_of(buffer: bytes | bytearray) -> int:
    """The ``argsz`` every structure begins with: after an INFO ioctl, the size the whole answer needs, in bytes."""
    if len(buffer) < _ARGSZ.size:
        raise BadStructure(f"A structure of {len(buffer)} bytes has no argsz")
    argsz: int = _ARGSZ.unpack_from(buffer)[0]
    return argsz


def _fields(layout: struct.Struct, buffer: bytes, name: str) -> tuple[int, ...]:
    if len(buffer) < layout.size:
        raise BadStructure(f"struct {name} has {layout.size} bytes, {len(buffer)} came")
    return layout.unpack_from(buffer)


def _find(capabilities: tuple[Capability, ...], kind: type[C]) -> C | None:
    return next((capability for capability in capabilities if isinstance(capability, kind)), None)


class GroupStatus(Struct, frozen=True):
    """``struct vfio_group_status``."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    flags: GroupFlags = _NO_GROUP_FLAGS

    def pack(self) -> bytes:
        """With ``argsz`` set."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags)

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure` when the buffer is too short."""
        _, flags = _fields(cls.LAYOUT, buffer, "vfio_group_status")
        return cls(GroupFlags(flags))


class DeviceInfo(Struct, frozen=True):
    """``struct vfio_device_info``: the last region and interrupt index a device has, each plus one."""

    # Up to num_irqs: what every kernel knows. cap_offset came with the flag CAPS.
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIII")
    WITH_CAPS: ClassVar[struct.Struct] = struct.Struct("=IIIII4x")
    flags: DeviceFlags = _NO_DEVICE_FLAGS
    num_regions: int = 0
    num_irqs: int = 0
    capabilities: tuple[Capability, ...] = ()

    def pack(self) -> bytes:
        """With ``argsz``, and the chain when there are capabilities."""
        chain = caps.pack_chain(self.capabilities, self.WITH_CAPS.size)
        flags = self.flags | DeviceFlags.CAPS if chain else self.flags & ~DeviceFlags.CAPS
        size = self.WITH_CAPS.size
        return (
            self.WITH_CAPS.pack(size + len(chain), flags, self.num_regions, self.num_irqs, size * bool(chain)) + chain
        )

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, regions, irqs = _fields(cls.LAYOUT, buffer, "vfio_device_info")
        chain: tuple[Capability, ...] = ()
        if flags & DeviceFlags.CAPS:
            first = _fields(struct.Struct("=IIIII"), buffer, "vfio_device_info")[4]
            chain = caps.walk_chain(buffer, first, 20, caps.DEVICE_CAPABILITIES)
        return cls(DeviceFlags(flags), regions, irqs, chain)

    @property
    def can_reset(self) -> bool:
        """Whether ``VFIO_DEVICE_RESET`` works."""
        return bool(self.flags & DeviceFlags.RESET)


# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_READ: Final = int(RegionFlags.READ)
_WRITE: Final = int(RegionFlags.WRITE)
_MMAP: Final = int(RegionFlags.MMAP)


class RegionInfo(Struct, frozen=True):
    """``struct vfio_region_info``: size in bytes; offset from the start of the device fd, in bytes."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIIQQ")
    index: int
    flags: RegionFlags = _NO_REGION_FLAGS
    size: int = 0
    offset: int = 0
    capabilities: tuple[Capability, ...] = ()

    def pack(self) -> bytes:
        """With ``argsz``, and the chain when there are capabilities."""
        chain = caps.pack_chain(self.capabilities, self.LAYOUT.size)
        flags = self.flags | RegionFlags.CAPS if chain else self.flags & ~RegionFlags.CAPS
        fixed = self.LAYOUT.size
        return (
            self.LAYOUT.pack(fixed + len(chain), flags, self.index, fixed * bool(chain), self.size, self.offset) + chain
        )

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, index, first, size, offset = _fields(cls.LAYOUT, buffer, "vfio_region_info")
        chain: tuple[Capability, ...] = ()
        if flags & RegionFlags.CAPS:
            chain = caps.walk_chain(buffer, first, cls.LAYOUT.size, caps.REGION_CAPABILITIES)
        return cls(index, RegionFlags(flags), size, offset, chain)

    @property
    def present(self) -> bool:
        """A region of size zero is absent."""
        return self.size > 0

    @property
    def readable(self) -> bool:
        """Whether it can be read."""
        return int.__and__(self.flags, _READ) != 0

    @property
    def writable(self) -> bool:
        """Whether it can be written."""
        return int.__and__(self.flags, _WRITE) != 0

    @property
    def mappable(self) -> bool:
        """Whether any of it may be mapped."""
        return int.__and__(self.flags, _MMAP) != 0

    @property
    def sparse_areas(self) -> tuple[caps.Area, ...] | None:
        """The areas that may be mapped; None: the whole region."""
        sparse = _find(self.capabilities, caps.SparseMmap)
        return None if sparse is None else sparse.areas

    @property
    def areas(self) -> tuple[caps.Area, ...]:
        """What may be mapped, as areas: none without the flag MMAP, the whole region without a sparse capability."""
        if not self.mappable or not self.present:
            return ()
        sparse = self.sparse_areas
        return (caps.Area(0, self.size),) if sparse is None else sparse

    @property
    def msix_mappable(self) -> bool:
        """Whether the page with the MSI-X table may be mapped as well."""
        return _find(self.capabilities, caps.MsixMappable) is not None

    @property
    def type(self) -> caps.RegionTypeCap | None:
        """What a region beyond the fixed indexes is."""
        return _find(self.capabilities, caps.RegionTypeCap)


class IrqInfo(Struct, frozen=True):
    """``struct vfio_irq_info``: how many interrupts an index has, and what they can do.

    ``cap_offset`` and the capabilities are an RFC's (:class:`~vfiod.protocol.vfio.constants.IrqFlags`, CAPS).
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIII")
    WITH_CAPS: ClassVar[struct.Struct] = struct.Struct("=IIIII")
    index: int
    flags: IrqFlags = _NO_IRQ_FLAGS
    count: int = 0
    capabilities: tuple[Capability, ...] = ()

    def pack(self) -> bytes:
        """With ``argsz``, and the chain when there are capabilities."""
        if not self.capabilities:
            return self.LAYOUT.pack(self.LAYOUT.size, self.flags & ~IrqFlags.CAPS, self.index, self.count)
        size = self.WITH_CAPS.size
        chain = caps.pack_chain(self.capabilities, size)
        return self.WITH_CAPS.pack(size + len(chain), self.flags | IrqFlags.CAPS, self.index, self.count, size) + chain

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, index, count = _fields(cls.LAYOUT, buffer, "vfio_irq_info")
        chain: tuple[Capability, ...] = ()
        if flags & IrqFlags.CAPS:
            first = _fields(cls.WITH_CAPS, buffer, "vfio_irq_info")[4]
            chain = caps.walk_chain(buffer, first, cls.WITH_CAPS.size, caps.IRQ_CAPABILITIES)
        return cls(index, IrqFlags(flags), count, chain)

    @property
    def type(self) -> caps.IrqTypeCap | None:
        """What an index beyond the device's own IRQs is."""
        return _find(self.capabilities, caps.IrqTypeCap)

    @property
    def messages(self) -> tuple[caps.MsiMessage, ...]:
        """The message of each vector that was granted; none before."""
        found = _find(self.capabilities, caps.MsiDescs)
        return () if found is None else found.messages

    @property
    def maskable(self) -> bool:
        """Whether it can be masked and unmasked."""
        return bool(self.flags & IrqFlags.MASKABLE)

    @property
    def automasked(self) -> bool:
        """Whether the host masks it when it fires (a level interrupt)."""
        return bool(self.flags & IrqFlags.AUTOMASKED)

    @property
    def resizable(self) -> bool:
        """Whether vectors may be added to an enabled index (no ``NORESIZE``)."""
        return not self.flags & IrqFlags.NORESIZE


class DeviceFeature(Struct, frozen=True):
    """``struct vfio_device_feature``: get, set or probe one feature."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    feature: int
    flags: FeatureFlags
    data: bytes = b""

    def pack(self) -> bytes:
        """With ``argsz``."""
        return self.LAYOUT.pack(self.LAYOUT.size + len(self.data), self.flags | self.feature) + self.data

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        argsz, flags = _fields(cls.LAYOUT, buffer, "vfio_device_feature")
        mask = VFIO_DEVICE_FEATURE_MASK
        return cls(flags & mask, FeatureFlags(flags & ~mask), bytes(buffer[cls.LAYOUT.size : argsz]))


class DependentDevice(Struct, frozen=True):
    """``struct vfio_pci_dependent_device``: a function that a hot reset affects.

    ``group_id`` holds the devid instead when the structure's flag ``DEV_ID`` is set.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IHBB")
    group_id: int
    segment: int
    bus: int
    devfn: int

    @property
    def address(self) -> str:
        """``0000:01:00.0``."""
        return f"{self.segment:04x}:{self.bus:02x}:{self.devfn >> 3:02x}.{self.devfn & 7}"

    @property
    def devid(self) -> int:
        """``group_id`` read as the signed devid it is with the flag ``DEV_ID``; -1: not owned."""
        return self.group_id - (1 << 32) if self.group_id >> 31 else self.group_id


class HotResetInfo(Struct, frozen=True):
    """``struct vfio_pci_hot_reset_info``."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    flags: HotResetFlags = _NO_HOT_RESET_FLAGS
    devices: tuple[DependentDevice, ...] = ()

    def pack(self) -> bytes:
        """With ``argsz`` and ``count``."""
        size = self.LAYOUT.size + len(self.devices) * DependentDevice.LAYOUT.size
        return self.LAYOUT.pack(size, self.flags, len(self.devices)) + b"".join(
            DependentDevice.LAYOUT.pack(d.group_id, d.segment, d.bus, d.devfn) for d in self.devices
        )

    @classmethod
    def count_in(cls, buffer: bytes) -> int:
        """``count`` alone: after ENOSPC it says how many devices to make room for."""
        return _fields(cls.LAYOUT, buffer, "vfio_pci_hot_reset_info")[2]

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`, also when ``count`` exceeds the buffer."""
        _, flags, count = _fields(cls.LAYOUT, buffer, "vfio_pci_hot_reset_info")
        end = cls.LAYOUT.size + count * DependentDevice.LAYOUT.size
        if len(buffer) < end:
            raise BadStructure(f"struct vfio_pci_hot_reset_info says {count} devices, {len(buffer)} bytes came")
        rows = DependentDevice.LAYOUT.iter_unpack(buffer[cls.LAYOUT.size : end])
        return cls(HotResetFlags(flags), tuple(DependentDevice(*row) for row in rows))


class HotReset(Struct, frozen=True):
    """``struct vfio_pci_hot_reset``: fds of every affected group; none with cdevs."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    group_fds: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """With ``argsz`` and ``count``."""
        count = len(self.group_fds)
        return self.LAYOUT.pack(self.LAYOUT.size + 4 * count, 0, count) + struct.pack(f"={count}i", *self.group_fds)

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, _, count = _fields(cls.LAYOUT, buffer, "vfio_pci_hot_reset")
        if len(buffer) < cls.LAYOUT.size + 4 * count:
            raise BadStructure(f"struct vfio_pci_hot_reset says {count} fds, {len(buffer)} bytes came")
        return cls(struct.unpack_from(f"={count}i", buffer, cls.LAYOUT.size))


class Type1Info(Struct, frozen=True):
    """``struct vfio_iommu_type1_info``: page sizes as a bitmap, and the capability chain."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQ")
    WITH_CAPS: ClassVar[struct.Struct] = struct.Struct("=IIQI4x")
    flags: Type1Flags = _NO_TYPE1_FLAGS
    iova_pgsizes: int = 0
    capabilities: tuple[Capability, ...] = field(default=())

    def pack(self) -> bytes:
        """With ``argsz``, and the chain when there are capabilities."""
        chain = caps.pack_chain(self.capabilities, self.WITH_CAPS.size)
        flags = self.flags | Type1Flags.CAPS if chain else self.flags & ~Type1Flags.CAPS
        size = self.WITH_CAPS.size
        return self.WITH_CAPS.pack(size + len(chain), flags, self.iova_pgsizes, size * bool(chain)) + chain

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, pgsizes = _fields(cls.LAYOUT, buffer, "vfio_iommu_type1_info")
        chain: tuple[Capability, ...] = ()
        if flags & Type1Flags.CAPS:
            first = _fields(struct.Struct("=IIQI"), buffer, "vfio_iommu_type1_info")[3]
            chain = caps.walk_chain(buffer, first, 20, caps.TYPE1_CAPABILITIES)
        return cls(Type1Flags(flags), pgsizes, chain)

    @property
    def page_size(self) -> int | None:
        """The smallest page, in bytes; None when the kernel does not say."""
        if not self.flags & Type1Flags.PGSIZES or not self.iova_pgsizes:
            return None
        return self.iova_pgsizes & -self.iova_pgsizes

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) inclusive, in bytes; empty when the kernel does not say."""
        found = _find(self.capabilities, caps.IovaRanges)
        return () if found is None else found.ranges


class DmaMap(Struct, frozen=True):
    """``struct vfio_iommu_type1_dma_map``: ``vaddr`` is an address of this process; sizes in bytes."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQ")
    flags: DmaMapFlags
    vaddr: int
    iova: int
    size: int

    def pack(self) -> bytes:
        """With ``argsz``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.vaddr, self.iova, self.size)

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, vaddr, iova, size = _fields(cls.LAYOUT, buffer, "vfio_iommu_type1_dma_map")
        return cls(DmaMapFlags(flags), vaddr, iova, size)


class DmaUnmap(Struct, frozen=True):
    """``struct vfio_iommu_type1_dma_unmap``: the kernel writes back how many bytes it unmapped."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQ")
    iova: int
    size: int
    flags: DmaUnmapFlags = _NO_DMA_UNMAP_FLAGS

    def pack(self) -> bytes:
        """With ``argsz``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.iova, self.size)

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, iova, size = _fields(cls.LAYOUT, buffer, "vfio_iommu_type1_dma_unmap")
        return cls(iova, size, DmaUnmapFlags(flags))
