"""iommufd and the cdev's side of it: ``include/uapi/linux/iommufd.h``, and the last part of ``vfio.h`` (Linux 7.2).

Every structure begins with its own size, and the kernel takes any size it knows: members it does not know must
be zero. Structures that hold addresses name memory of this process; whoever packs one keeps that memory alive.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from vfiod.protocol.vfio.capabilities import BadStructure
from vfiod.protocol.vfio.ioctl import VFIO_TYPE, Ioctl, request_number

__all__ = [
    "AttachPt",
    "BindFlags",
    "BindIommufd",
    "DetachPt",
    "HwCapabilities",
    "HwInfo",
    "HwInfoType",
    "IoasAlloc",
    "IoasIovaRanges",
    "IoasMap",
    "IoasMapFile",
    "IoasMapFlags",
    "IoasUnmap",
    "IommuDestroy",
    "IommuOption",
    "IommufdIoctl",
    "IommufdOption",
    "IommufdOptionOp",
    "IovaRange",
]

IOMMUFD_TYPE: Final = VFIO_TYPE  # ';' both
_IOMMUFD_CMD_BASE: Final = 0x80
_VFIO_BASE: Final = 100


def _number(command: int) -> int:
    """``_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + command)``: as VFIO's, with a base of its own."""
    return request_number(_IOMMUFD_CMD_BASE - _VFIO_BASE + command)


class IommufdIoctl(Ioctl):
    """Requests of ``/dev/iommu``."""

    IOMMU_DESTROY = _number(0x00)
    IOMMU_IOAS_ALLOC = _number(0x01)
    IOMMU_IOAS_ALLOW_IOVAS = _number(0x02)
    IOMMU_IOAS_COPY = _number(0x03)
    IOMMU_IOAS_IOVA_RANGES = _number(0x04)
    IOMMU_IOAS_MAP = _number(0x05)
    IOMMU_IOAS_UNMAP = _number(0x06)
    IOMMU_OPTION = _number(0x07)
    IOMMU_GET_HW_INFO = _number(0x0A)
    IOMMU_IOAS_MAP_FILE = _number(0x0F)
    IOMMU_IOAS_CHANGE_PROCESS = _number(0x12)


class IoasMapFlags(enum.IntFlag):
    """``IOMMU_IOAS_MAP_*``: READABLE and WRITEABLE are the device's."""

    FIXED_IOVA = 1 << 0
    WRITEABLE = 1 << 1
    READABLE = 1 << 2


class IommufdOption(enum.IntEnum):
    """``IOMMU_OPTION_*``."""

    RLIMIT_MODE = 0
    HUGE_PAGES = 1


class IommufdOptionOp(enum.IntEnum):
    """``IOMMU_OPTION_OP_*``."""

    SET = 0
    GET = 1


class HwInfoType(enum.IntEnum):
    """``IOMMU_HW_INFO_TYPE_*``: which kind of IOMMU."""

    NONE = 0
    INTEL_VTD = 1
    ARM_SMMUV3 = 2


class HwCapabilities(enum.IntFlag):
    """``IOMMU_HW_CAP_*``."""

    DIRTY_TRACKING = 1 << 0


class BindFlags(enum.IntFlag):
    """``VFIO_DEVICE_BIND_FLAG_*``."""

    TOKEN = 1 << 0


_NO_BIND_FLAGS = BindFlags(0)


def _fields(layout: struct.Struct, buffer: bytes | bytearray, name: str) -> tuple[int, ...]:
    if len(buffer) < layout.size:
        raise BadStructure(f"struct {name} has {layout.size} bytes, {len(buffer)} came")
    return layout.unpack_from(buffer)


# --- the device's side ---
@dataclass(frozen=True, slots=True)
class BindIommufd:
    """``struct vfio_device_bind_iommufd``: ``token_uuid_ptr`` is the address of 16 bytes, with the flag TOKEN.

    Without a token it is packed as kernels before 6.17 know it, which take no larger one with a token in it.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIiIQ")
    WITHOUT_TOKEN: ClassVar[struct.Struct] = struct.Struct("=IIiI")
    iommufd: int
    out_devid: int = 0
    flags: BindFlags = _NO_BIND_FLAGS
    token_uuid_ptr: int = 0

    def pack(self) -> bytes:
        """With ``argsz``."""
        if not self.flags & BindFlags.TOKEN:
            size = self.WITHOUT_TOKEN.size
            return self.WITHOUT_TOKEN.pack(size, self.flags, self.iommufd, self.out_devid)
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.iommufd, self.out_devid, self.token_uuid_ptr)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, iommufd, devid = _fields(cls.WITHOUT_TOKEN, buffer, "vfio_device_bind_iommufd")
        token = 0
        if flags & BindFlags.TOKEN:
            token = _fields(cls.LAYOUT, buffer, "vfio_device_bind_iommufd")[4]
        return cls(iommufd, devid, BindFlags(flags), token)


@dataclass(frozen=True, slots=True)
class AttachPt:
    """``struct vfio_device_attach_iommufd_pt``, without the PASID: ``pt_id`` is an IOAS; the kernel writes one back."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    pt_id: int

    def pack(self) -> bytes:
        """With ``argsz``."""
        return self.LAYOUT.pack(self.LAYOUT.size, 0, self.pt_id)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        return cls(_fields(cls.LAYOUT, buffer, "vfio_device_attach_iommufd_pt")[2])


@dataclass(frozen=True, slots=True)
class DetachPt:
    """``struct vfio_device_detach_iommufd_pt``, without the PASID."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    def pack(self) -> bytes:
        """With ``argsz``."""
        return self.LAYOUT.pack(self.LAYOUT.size, 0)


# --- the iommufd's side ---
@dataclass(frozen=True, slots=True)
class IommuDestroy:
    """``struct iommu_destroy``: an IOAS that nothing is attached to, or another object."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    id: int

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.id)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        return cls(_fields(cls.LAYOUT, buffer, "iommu_destroy")[1])


@dataclass(frozen=True, slots=True)
class IoasAlloc:
    """``struct iommu_ioas_alloc``: the kernel writes the new IOAS's id."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    out_ioas_id: int = 0

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, 0, self.out_ioas_id)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        return cls(_fields(cls.LAYOUT, buffer, "iommu_ioas_alloc")[2])


@dataclass(frozen=True, slots=True)
class IovaRange:
    """``struct iommu_iova_range``: first and last address, inclusive."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQ")
    start: int
    last: int


@dataclass(frozen=True, slots=True)
class IoasIovaRanges:
    """``struct iommu_ioas_iova_ranges``: ``allowed_iovas`` is the address of room for ``num_iovas`` ranges.

    With EMSGSIZE the kernel writes how many there are into ``num_iovas``.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIIQQ")
    ioas_id: int
    num_iovas: int = 0
    allowed_iovas: int = 0
    out_iova_alignment: int = 0

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(
            self.LAYOUT.size, self.ioas_id, self.num_iovas, 0, self.allowed_iovas, self.out_iova_alignment
        )

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, ioas, count, _, address, alignment = _fields(cls.LAYOUT, buffer, "iommu_ioas_iova_ranges")
        return cls(ioas, count, address, alignment)


@dataclass(frozen=True, slots=True)
class IoasMap:
    """``struct iommu_ioas_map``: ``user_va`` is an address of this process; lengths in bytes."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIIQQQ")
    flags: IoasMapFlags
    ioas_id: int
    user_va: int
    length: int
    iova: int

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.ioas_id, 0, self.user_va, self.length, self.iova)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, ioas, _, address, length, iova = _fields(cls.LAYOUT, buffer, "iommu_ioas_map")
        return cls(IoasMapFlags(flags), ioas, address, length, iova)


@dataclass(frozen=True, slots=True)
class IoasMapFile:
    """``struct iommu_ioas_map_file``: ``start`` is an offset into the file, in bytes."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIiQQQ")
    flags: IoasMapFlags
    ioas_id: int
    fd: int
    start: int
    length: int
    iova: int

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.ioas_id, self.fd, self.start, self.length, self.iova)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, flags, ioas, fd, start, length, iova = _fields(cls.LAYOUT, buffer, "iommu_ioas_map_file")
        return cls(IoasMapFlags(flags), ioas, fd, start, length, iova)


@dataclass(frozen=True, slots=True)
class IoasUnmap:
    """``struct iommu_ioas_unmap``: the kernel writes back how many bytes it unmapped."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQ")
    ioas_id: int
    iova: int
    length: int

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.ioas_id, self.iova, self.length)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, ioas, iova, length = _fields(cls.LAYOUT, buffer, "iommu_ioas_unmap")
        return cls(ioas, iova, length)


@dataclass(frozen=True, slots=True)
class IoasChangeProcess:
    """``struct iommu_ioas_change_process`` (Linux 6.14): locked memory of all mapped files counts for the caller."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, 0)


@dataclass(frozen=True, slots=True)
class IommuOption:
    """``struct iommu_option``: RLIMIT_MODE 1 counts locked memory per process, 0 (the default) per user."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIHHIQ")
    option_id: IommufdOption
    op: IommufdOptionOp
    object_id: int = 0
    val64: int = 0

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(self.LAYOUT.size, self.option_id, self.op, 0, self.object_id, self.val64)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`; ValueError for an option that is not known."""
        _, option, op, _, object_id, value = _fields(cls.LAYOUT, buffer, "iommu_option")
        return cls(IommufdOption(option), IommufdOptionOp(op), object_id, value)


@dataclass(frozen=True, slots=True)
class HwInfo:
    """``struct iommu_hw_info``: what the IOMMU of a bound device is; its own data are left out (``data_len`` 0)."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIIQIB3xQ")
    dev_id: int
    out_data_type: int = 0
    out_max_pasid_log2: int = 0
    out_capabilities: int = 0

    def pack(self) -> bytes:
        """With ``size``."""
        return self.LAYOUT.pack(
            self.LAYOUT.size,
            0,
            self.dev_id,
            0,
            0,
            self.out_data_type,
            self.out_max_pasid_log2,
            self.out_capabilities,
        )

    @classmethod
    def unpack(cls, buffer: bytes | bytearray) -> Self:
        """Raises :class:`BadStructure`."""
        _, _, dev_id, _, _, kind, pasid, capabilities = _fields(cls.LAYOUT, buffer, "iommu_hw_info")
        return cls(dev_id, kind, pasid, capabilities)
