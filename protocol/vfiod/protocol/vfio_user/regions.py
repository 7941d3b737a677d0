"""A device's regions: what they are, reading and writing them, several writes at once, ioeventfds.

Source: QEMU ``docs/interop/vfio-user.rst``. Sizes and offsets in bytes of the region; data in the device's byte order.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Self

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.limits import VFIO_USER_MAX_INFO, VFIO_USER_MAX_WRITES
from vfiod.protocol.vfio.structs import argsz_of
from vfiod.protocol.vfio_user.header import BadMessage
from vfiod.protocol.vfio_user.payload import SPECIFIED, Wire, fields_of, sized_data

__all__ = [
    "GetRegionInfo",
    "GetRegionIoFds",
    "IoFdFlags",
    "IoFdType",
    "OneWrite",
    "RegionData",
    "RegionInfoReply",
    "RegionIoFds",
    "RegionRead",
    "RegionWrite",
    "RegionWritten",
    "SubRegion",
    "WriteMulti",
    "WroteMulti",
]

_ACCESS = struct.Struct("=QII")  # offset, region, count: struct vfio_user_region_access


class GetRegionInfo(Struct, frozen=True):
    """Ask for a region's information.

    Attributes:
        index: which region.
        argsz: bytes of a reply payload the client takes: 32 without capabilities.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIIIQQ")

    index: int
    argsz: int = 32

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """32 bytes."""
        del wire
        return self.LAYOUT.pack(self.argsz, 0, self.index, 0, 0, 0)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage, also when not even the fixed part of a reply may be sent."""
        del wire
        argsz, _, index, *_ = fields_of(cls.LAYOUT, body, "DEVICE_GET_REGION_INFO")
        if argsz < cls.LAYOUT.size:
            raise BadMessage(f"DEVICE_GET_REGION_INFO has argsz {argsz}, a reply has at least {cls.LAYOUT.size} bytes")
        return cls(index, argsz)


class RegionInfoReply(Struct, frozen=True):
    """A region's information: ``struct vfio_region_info`` and its capabilities; beside it one fd, if it can be mapped.

    Attributes:
        info: the region. Its ``offset`` is where to map it in the fd.
        limit: what the client said it takes, in bytes. A reply that needs more carries the fixed part alone
            and says in ``argsz`` how much it needs.
        needed: ``argsz`` of a reply that came; more than ``limit``: ask again with this.

    """

    info: vfio.RegionInfo
    limit: int = VFIO_USER_MAX_INFO
    needed: int = 0

    @property
    def complete(self) -> bool:
        """Whether a reply that came has all its capabilities, or one to be sent will."""
        return self.needed <= self.limit

    @classmethod
    def answering(cls, request: GetRegionInfo, info: vfio.RegionInfo) -> Self:
        """The reply to a request. Send the fd only when it is :attr:`complete`: a client asks again otherwise."""
        return cls(info, request.argsz, len(info.pack()))

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """The structure, whole or without its capabilities."""
        del wire
        whole = self.info.pack()
        return whole if len(whole) <= self.limit else whole[: vfio.RegionInfo.LAYOUT.size]

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: cut short, or a capability chain that goes wrong."""
        del wire
        fields_of(vfio.RegionInfo.LAYOUT, body, "The reply to DEVICE_GET_REGION_INFO")
        needed = argsz_of(body)
        if needed > len(body):
            # Only the fixed part is to be trusted; its flag CAPS speaks of what is not there.
            _, flags, index, _, size, offset = vfio.RegionInfo.LAYOUT.unpack_from(body)
            return cls(vfio.RegionInfo(index, vfio.RegionFlags(flags), size, offset), len(body), needed)
        try:
            info = vfio.RegionInfo.unpack(body)
        except vfio.BadStructure as error:
            raise BadMessage(str(error)) from None
        return cls(info, len(body), needed)


class RegionRead(Struct, frozen=True):
    """Read ``count`` bytes from ``offset`` of a region."""

    region: int
    offset: int
    count: int

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return _ACCESS.pack(self.offset, self.region, self.count)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage; E2BIG above the transfer limit."""
        offset, region, count = fields_of(_ACCESS, body, "REGION_READ")
        if count > wire.max_transfer:
            raise BadMessage(f"REGION_READ of {count} bytes: at most {wire.max_transfer} at once", "E2BIG")
        return cls(region, offset, count)


class RegionData(Struct, frozen=True):
    """The reply to REGION_READ; fewer bytes than asked for: the region has no more (a ROM)."""

    region: int
    offset: int
    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes and the data."""
        del wire
        return _ACCESS.pack(self.offset, self.region, len(self.data)) + self.data

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        offset, region, count = fields_of(_ACCESS, body, "The reply to REGION_READ")
        return cls(region, offset, sized_data(body, _ACCESS.size, count, "The reply to REGION_READ", wire))


class RegionWrite(Struct, frozen=True):
    """Write ``data`` at ``offset`` of a region. Often with NO_REPLY: a posted write."""

    region: int
    offset: int
    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes and the data."""
        del wire
        return _ACCESS.pack(self.offset, self.region, len(self.data)) + self.data

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: data that is missing, or more than was announced."""
        offset, region, count = fields_of(_ACCESS, body, "REGION_WRITE")
        data = sized_data(body, _ACCESS.size, count, "REGION_WRITE", wire)
        if len(body) != _ACCESS.size + count:
            raise BadMessage(f"REGION_WRITE says it has {count} bytes of data, {len(body) - _ACCESS.size} came")
        return cls(region, offset, data)


class RegionWritten(Struct, frozen=True):
    """The reply to REGION_WRITE."""

    region: int
    offset: int
    count: int

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return _ACCESS.pack(self.offset, self.region, self.count)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        del wire
        offset, region, count = fields_of(_ACCESS, body, "The reply to REGION_WRITE")
        return cls(region, offset, count)


class OneWrite(Struct, frozen=True):
    """One of several writes; ``data`` is 1 to 8 bytes."""

    region: int
    offset: int
    data: bytes


class WriteMulti(Struct, frozen=True):
    """Several small writes in one message, done in order."""

    COUNT: ClassVar[struct.Struct] = struct.Struct("=Q")
    ENTRY: ClassVar[struct.Struct] = struct.Struct("=QII8s")

    writes: tuple[OneWrite, ...]

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes, and 24 for each write."""
        del wire
        return self.COUNT.pack(len(self.writes)) + b"".join(
            self.ENTRY.pack(one.offset, one.region, len(one.data), one.data) for one in self.writes
        )

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: more writes than are there, or one of more than 8 bytes."""
        del wire
        (count,) = fields_of(cls.COUNT, body, "REGION_WRITE_MULTI")
        if count > VFIO_USER_MAX_WRITES:
            raise BadMessage(f"REGION_WRITE_MULTI of {count} writes: at most {VFIO_USER_MAX_WRITES} at once", "E2BIG")
        end = cls.COUNT.size + count * cls.ENTRY.size
        if len(body) < end:
            raise BadMessage(f"REGION_WRITE_MULTI says it has {count} writes, its {len(body)} bytes do not hold them")
        writes: list[OneWrite] = []
        for number, (offset, region, size, data) in enumerate(cls.ENTRY.iter_unpack(body[cls.COUNT.size : end])):
            if not 1 <= size <= len(data):
                raise BadMessage(f"Write {number} of REGION_WRITE_MULTI has {size} bytes: 1 to {len(data)}")
            writes.append(OneWrite(region, offset, data[:size]))
        return cls(tuple(writes))


class WroteMulti(Struct, frozen=True):
    """The reply to REGION_WRITE_MULTI: how many of the writes were done."""

    count: int

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """8 bytes."""
        del wire
        return WriteMulti.COUNT.pack(self.count)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        del wire
        return cls(*fields_of(WriteMulti.COUNT, body, "The reply to REGION_WRITE_MULTI"))


class IoFdType(enum.IntEnum):
    """How an fd hears of accesses to a sub-region."""

    IOEVENTFD = 0
    IOREGIONFD = 1
    IOEVENTFD_SHADOW = 2  # libvfio-user, with a patched KVM


class IoFdFlags(enum.IntFlag):
    """KVM's flags of an ioeventfd (``include/uapi/linux/kvm.h``)."""

    DATAMATCH = 1
    PIO = 2
    VIRTIO_CCW_NOTIFY = 8


class SubRegion(Struct, frozen=True):
    """A piece of a region whose accesses an fd hears of.

    Attributes:
        offset: where in the region.
        size: 0 (any width), 1, 2, 4 or 8 for an ioeventfd.
        fd_index: which of the reply's fds; several may share one.
        type: an :class:`IoFdType`.
        flags: of its type.
        datamatch: the value that fires it, with DATAMATCH; an ioregionfd's ``user_data``.
        extra: padding; libvfio-user's shadow ioeventfd has an fd index there.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQIIIIQ")

    offset: int
    size: int
    fd_index: int
    type: int = IoFdType.IOEVENTFD
    flags: int = 0
    datamatch: int = 0
    extra: int = 0


class GetRegionIoFds(Struct, frozen=True):
    """Ask for a region's ioeventfds."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIII")

    index: int
    argsz: int = 16

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes."""
        del wire
        return self.LAYOUT.pack(self.argsz, 0, self.index, 0)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: reserved fields that are not zero (libvfio-user refuses them too), too small an argsz."""
        del wire
        argsz, flags, index, count = fields_of(cls.LAYOUT, body, "DEVICE_GET_REGION_IO_FDS")
        if flags or count:
            raise BadMessage(f"DEVICE_GET_REGION_IO_FDS takes flags and count 0, got 0x{flags:x} and {count}")
        if argsz < cls.LAYOUT.size:
            raise BadMessage(
                f"DEVICE_GET_REGION_IO_FDS has argsz {argsz}, a reply has at least {cls.LAYOUT.size} bytes"
            )
        return cls(index, argsz)


class RegionIoFds(Struct, frozen=True):
    """A region's ioeventfds.

    The specification lays entries out at ``(argsz - 32) / count`` while its own header has 16 bytes: a reader takes
    the entry's size from what came, ``(argsz - 16) / count``; today both sides have 40. libvfio-user's entries have 48
    (a shadow offset before the datamatch); they are told from ours by that size.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIII")
    SHADOWED: ClassVar[struct.Struct] = struct.Struct("=QQIIIIQQ")

    index: int
    sub_regions: tuple[SubRegion, ...] = ()
    limit: int = VFIO_USER_MAX_INFO
    needed: int = 0

    @property
    def fits(self) -> bool:
        """Whether the client takes all of it; if not, send no fds: it asks again."""
        return self.LAYOUT.size + SubRegion.LAYOUT.size * len(self.sub_regions) <= self.limit

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes, and 40 for each entry if the client takes them all; else ``argsz`` says how many bytes it needs."""
        del wire
        entries = b"".join(
            SubRegion.LAYOUT.pack(s.offset, s.size, s.fd_index, s.type, s.flags, s.extra, s.datamatch)
            for s in self.sub_regions
        )
        needed = self.LAYOUT.size + len(entries)
        head = self.LAYOUT.pack(needed, 0, self.index, len(self.sub_regions))
        return head + entries if needed <= self.limit else head

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: entries that are not there, or of a size nobody knows."""
        del wire
        needed, _, index, count = fields_of(cls.LAYOUT, body, "The reply to DEVICE_GET_REGION_IO_FDS")
        if needed > len(body):
            return cls(index, (), len(body), needed)
        room = needed - cls.LAYOUT.size
        if not count:
            return cls(index, (), len(body), needed)
        each = room // count if room > 0 else 0
        if each not in (SubRegion.LAYOUT.size, cls.SHADOWED.size):
            raise BadMessage(f"{count} ioeventfds in {room} bytes: an entry has {SubRegion.LAYOUT.size} bytes")
        rows = body[cls.LAYOUT.size : cls.LAYOUT.size + count * each]
        if each == SubRegion.LAYOUT.size:
            entries = [
                SubRegion(offset, size, fd, kind, flags, match, extra)
                for offset, size, fd, kind, flags, extra, match in SubRegion.LAYOUT.iter_unpack(rows)
            ]
        else:
            entries = [
                SubRegion(offset, size, fd, kind, flags, match, extra)
                for offset, size, fd, kind, flags, extra, _, match in cls.SHADOWED.iter_unpack(rows)
            ]
        return cls(index, tuple(entries), len(body), needed)
