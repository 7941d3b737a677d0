"""Capability chains of the INFO ioctls (``struct vfio_info_cap_header``).

A chain comes from the kernel, but just as well from a mediated device or a vfio-user peer: it is walked as
coming from an enemy. A loop, an offset that points back, out of the buffer or into the fixed part, and a body
that is too short for its kind are :class:`BadStructure`.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.vfio.constants import AtomicCompletion, DeviceInfoCap, IrqInfoCap, RegionInfoCap, Type1InfoCap

__all__ = [
    "Area",
    "BadStructure",
    "Capability",
    "DmaAvailable",
    "IovaRanges",
    "IrqTypeCap",
    "MigrationInfo",
    "MsiDescs",
    "MsiMessage",
    "MsixMappable",
    "PciAtomicCompletion",
    "RegionTypeCap",
    "SparseMmap",
    "UnknownCapability",
    "pack_chain",
    "walk_chain",
]

_HEADER: Final = struct.Struct("=HHI")
HEADER_SIZE: Final = _HEADER.size
MAX_CAPABILITIES: Final = 64
"""Capabilities in one chain: the kernel defines fewer than ten per structure."""


class BadStructure(ValueError):
    """Bytes that do not hold the structure they should; the text says what is wrong."""


class Capability(Struct, frozen=True):
    """One capability; the subclasses know their body."""

    ID: ClassVar[int] = -1
    VERSION: ClassVar[int] = 1

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header. Raises :class:`BadStructure`."""
        raise NotImplementedError

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        raise NotImplementedError

    @property
    def id(self) -> int:
        """The number in the header."""
        return self.ID

    @property
    def version(self) -> int:
        """The version in the header."""
        return self.VERSION


class UnknownCapability(Capability, frozen=True):
    """A capability this program has no name for, or of a version it does not know: kept as it came."""

    number: int
    number_version: int
    body: bytes

    @property
    def id(self) -> int:
        """The number in the header."""
        return self.number

    @property
    def version(self) -> int:
        """The version in the header."""
        return self.number_version

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self.body


def _fixed(layout: struct.Struct, body: bytes, what: str) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise BadStructure(f"Capability {what} has {len(body)} bytes after its header, it takes {layout.size}")
    return layout.unpack_from(body)


class Area(Struct, frozen=True):
    """``struct vfio_region_sparse_mmap_area``: a piece of a region that can be mapped, in bytes of the region."""

    offset: int
    size: int


class SparseMmap(Capability, frozen=True):
    """``struct vfio_region_info_cap_sparse_mmap``: only these areas may be mapped; none at all is allowed."""

    ID: ClassVar[int] = RegionInfoCap.SPARSE_MMAP
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    _AREA: ClassVar[struct.Struct] = struct.Struct("=QQ")

    areas: tuple[Area, ...]

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        count, _ = _fixed(cls._LAYOUT, body, "SPARSE_MMAP")
        need = cls._LAYOUT.size + count * cls._AREA.size
        if len(body) < need:
            raise BadStructure(f"Capability SPARSE_MMAP says {count} areas, its {len(body)} bytes do not hold them")
        return cls(tuple(Area(*pair) for pair in cls._AREA.iter_unpack(body[cls._LAYOUT.size : need])))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(len(self.areas), 0) + b"".join(self._AREA.pack(a.offset, a.size) for a in self.areas)


class RegionTypeCap(Capability, frozen=True):
    """``struct vfio_region_info_cap_type``: what a region beyond the fixed indexes is."""

    ID: ClassVar[int] = RegionInfoCap.TYPE
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    type: int
    subtype: int

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        kind, subtype = _fixed(cls._LAYOUT, body, "TYPE")
        return cls(kind, subtype)

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(self.type, self.subtype)


class MsixMappable(Capability, frozen=True):
    """``VFIO_REGION_INFO_CAP_MSIX_MAPPABLE``: the whole BAR may be mapped, the MSI-X table included. Header only."""

    ID: ClassVar[int] = RegionInfoCap.MSIX_MAPPABLE

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header: there are none to read."""
        del body
        return cls()

    def pack(self) -> bytes:
        """The bytes that follow the header: none."""
        return b""


class PciAtomicCompletion(Capability, frozen=True):
    """``struct vfio_device_info_cap_pci_atomic_comp``."""

    ID: ClassVar[int] = DeviceInfoCap.PCI_ATOMIC_COMP
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    flags: AtomicCompletion

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        flags, _ = _fixed(cls._LAYOUT, body, "PCI_ATOMIC_COMP")
        return cls(AtomicCompletion(flags))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(self.flags, 0)


class IovaRanges(Capability, frozen=True):
    """``struct vfio_iommu_type1_info_cap_iova_range``: (first, last) inclusive; nothing else can be mapped."""

    ID: ClassVar[int] = Type1InfoCap.CAP_IOVA_RANGE
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    _RANGE: ClassVar[struct.Struct] = struct.Struct("=QQ")

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        count, _ = _fixed(cls._LAYOUT, body, "IOVA_RANGE")
        need = cls._LAYOUT.size + count * cls._RANGE.size
        if len(body) < need:
            raise BadStructure(f"Capability IOVA_RANGE says {count} ranges, its {len(body)} bytes do not hold them")
        pairs = cls._RANGE.iter_unpack(body[cls._LAYOUT.size : need])
        return cls(tuple((first, last) for first, last in pairs))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(len(self.ranges), 0) + b"".join(self._RANGE.pack(*pair) for pair in self.ranges)


class MigrationInfo(Capability, frozen=True):
    """``struct vfio_iommu_type1_info_cap_migration``: dirty page tracking. Sizes in bytes."""

    ID: ClassVar[int] = Type1InfoCap.CAP_MIGRATION
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=I4xQQ")

    flags: int
    pgsize_bitmap: int
    max_dirty_bitmap_size: int

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        return cls(*_fixed(cls._LAYOUT, body, "MIGRATION"))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(self.flags, self.pgsize_bitmap, self.max_dirty_bitmap_size)


class DmaAvailable(Capability, frozen=True):
    """``struct vfio_iommu_type1_info_dma_avail``: how many more mappings the container takes."""

    ID: ClassVar[int] = Type1InfoCap.DMA_AVAIL
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=I")

    avail: int

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        return cls(*_fixed(cls._LAYOUT, body, "DMA_AVAIL"))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(self.avail)


class IrqTypeCap(Capability, frozen=True):
    """``struct vfio_irq_info_cap_type`` (RFC): what an interrupt index beyond the device's own IRQs is."""

    ID: ClassVar[int] = IrqInfoCap.TYPE
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    type: int
    subtype: int

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header."""
        kind, subtype = _fixed(cls._LAYOUT, body, "TYPE")
        return cls(kind, subtype)

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(self.type, self.subtype)


class MsiMessage(Struct, frozen=True):
    """``struct vfio_irq_msi_msg`` (RFC): what a source writes, and where, to fire. 64 and 32 bits."""

    address: int
    data: int


class MsiDescs(Capability, frozen=True):
    """``struct vfio_irq_info_cap_msi`` (RFC): the message of each vector, in their order; there only while they exist.

    Two layouts are about: with a reserved word after the count, which the review asked for (v3), and without (v2).
    :meth:`pack` writes the first. A body that is long enough for both has the reserved word if that word is zero: in
    the other layout it is the low half of the first message's address, and no doorbell stands at 0.
    """

    ID: ClassVar[int] = IrqInfoCap.MSI_DESCS
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    _COUNT: ClassVar[struct.Struct] = struct.Struct("=I")
    _MESSAGE: ClassVar[struct.Struct] = struct.Struct("=III")

    messages: tuple[MsiMessage, ...]

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From the bytes that follow the header, in either layout."""
        (count,) = _fixed(cls._COUNT, body, "MSI_DESCS")
        size = count * cls._MESSAGE.size
        if len(body) < cls._COUNT.size + size:
            raise BadStructure(f"Capability MSI_DESCS says {count} messages, its {len(body)} bytes do not hold them")
        start = cls._COUNT.size
        if len(body) >= cls._LAYOUT.size + size and not cls._LAYOUT.unpack_from(body)[1]:
            start = cls._LAYOUT.size
        words = cls._MESSAGE.iter_unpack(body[start : start + size])
        return cls(tuple(MsiMessage(low | high << 32, data) for low, high, data in words))

    def pack(self) -> bytes:
        """The bytes that follow the header."""
        return self._LAYOUT.pack(len(self.messages), 0) + b"".join(
            self._MESSAGE.pack(one.address & 0xFFFF_FFFF, one.address >> 32, one.data) for one in self.messages
        )


DEVICE_CAPABILITIES: Final[tuple[type[Capability], ...]] = (PciAtomicCompletion,)
REGION_CAPABILITIES: Final[tuple[type[Capability], ...]] = (SparseMmap, RegionTypeCap, MsixMappable)
IRQ_CAPABILITIES: Final[tuple[type[Capability], ...]] = (IrqTypeCap, MsiDescs)
TYPE1_CAPABILITIES: Final[tuple[type[Capability], ...]] = (IovaRanges, MigrationInfo, DmaAvailable)


def walk_chain(
    buffer: bytes, first: int, fixed_size: int, known: tuple[type[Capability], ...]
) -> tuple[Capability, ...]:
    """Read every capability of a chain.

    Args:
        buffer: the whole INFO structure as it was returned, fixed part included.
        first: ``cap_offset``: where the first capability starts, in bytes from the structure's start; 0: no chain.
        fixed_size: bytes of the fixed part, into which no capability may reach.
        known: the classes that belong to this structure: ids are per structure.

    Raises:
        BadStructure: the chain has a loop, leaves the buffer, or a body is too short.

    """
    found: list[tuple[int, int, int]] = []  # offset, id, version
    offset = first
    while offset:
        if offset < fixed_size or offset + HEADER_SIZE > len(buffer):
            raise BadStructure(
                f"A capability at offset {offset} lies outside the {fixed_size} to {len(buffer)} bytes of its structure"
            )
        if any(offset == seen for seen, _, _ in found):
            raise BadStructure(f"The capability chain comes back to offset {offset}")
        if len(found) == MAX_CAPABILITIES:
            raise BadStructure(f"The capability chain has more than {MAX_CAPABILITIES} capabilities")
        number, version, following = _HEADER.unpack_from(buffer, offset)
        found.append((offset, number, version))
        offset = following
    # A body ends where the next capability starts, in the order of the buffer, which need not be the chain's.
    starts = [*sorted(offset for offset, _, _ in found), len(buffer)]
    return tuple(
        _capability(number, version, buffer[offset + HEADER_SIZE : starts[starts.index(offset) + 1]], known)
        for offset, number, version in found
    )


def _capability(number: int, version: int, body: bytes, known: tuple[type[Capability], ...]) -> Capability:
    for kind in known:
        # A later version only appends (vfio.h, "version specific to the capability ID"); an earlier one is not ours.
        if number == kind.ID and version >= kind.VERSION:
            return kind.unpack(bytes(body))
    return UnknownCapability(number, version, bytes(body))


def pack_chain(capabilities: tuple[Capability, ...], start: int) -> bytes:
    """Lay out a chain that starts ``start`` bytes into its structure, each capability aligned to 8 bytes."""
    out = bytearray()
    for position, capability in enumerate(capabilities):
        body = capability.pack()
        padding = -(HEADER_SIZE + len(body)) % 8
        following = start + len(out) + HEADER_SIZE + len(body) + padding
        last = position == len(capabilities) - 1
        out += _HEADER.pack(capability.id, capability.version, 0 if last else following) + body + bytes(padding)
    return bytes(out)
