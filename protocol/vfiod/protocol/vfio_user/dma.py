"""The client's memory: DMA_MAP and DMA_UNMAP, and DMA_READ and DMA_WRITE for servers that cannot map it.

Source: QEMU ``docs/interop/vfio-user.rst``; ``hw/vfio-user/protocol.h`` for what QEMU really sends
(:class:`~vfiod.protocol.vfio_user.payload.CountWidth`); libvfio-user ``include/vfio-user.h`` for flags beyond the
specification. Addresses are those that devices use (IOVA); sizes in bytes.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.vfio_user.header import BadMessage
from vfiod.protocol.vfio_user.payload import SPECIFIED, CountWidth, Wire, fields_of, sized_data

__all__ = ["DmaData", "DmaFlags", "DmaMap", "DmaRead", "DmaUnmap", "DmaWrite", "DmaWritten"]


class DmaFlags(enum.IntFlag):
    """What the server may do with a mapping."""

    READ = 1
    WRITE = 2
    MMAP = 4  # libvfio-user: "the fd can be mapped"; not in the specification
    FILE_IO = 8  # libvfio-user: "use pread and pwrite"; not in the specification


# As integers, because every mapping is asked: a flag's own "&" takes Python 3.11 some microseconds.
_READ: Final = int(DmaFlags.READ)
_WRITE: Final = int(DmaFlags.WRITE)


class DmaMap(Struct, frozen=True):
    """Memory of the client at an address; with one fd when the server may map it, at ``offset`` of the file."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQ")

    address: int
    size: int
    offset: int = 0
    flags: int = _READ | _WRITE

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """32 bytes; ``argsz`` is their number, because there is no reply payload."""
        del wire
        return self.LAYOUT.pack(self.LAYOUT.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: cut short, of no size, or beyond the last address."""
        del wire
        argsz, flags, offset, address, size = fields_of(cls.LAYOUT, body, "DMA_MAP")
        if argsz < cls.LAYOUT.size:
            raise BadMessage(f"DMA_MAP has argsz {argsz}, its structure has {cls.LAYOUT.size} bytes")
        _check_range("DMA_MAP", address, size)
        if offset + size > 1 << 63:
            raise BadMessage(f"DMA_MAP of {size} bytes at file offset 0x{offset:x} ends beyond what a file can hold")
        return cls(address, size, offset, flags)

    @property
    def readable(self) -> bool:
        """The device may read it."""
        return self.flags & _READ != 0

    @property
    def writable(self) -> bool:
        """The device may write it."""
        return self.flags & _WRITE != 0


class DmaUnmap(Struct, frozen=True):
    """Take a mapping back; address and size are exactly those of one DMA_MAP. The reply is the same again.

    Attributes:
        address: where it begins.
        size: how much.
        flags: 0. libvfio-user knows 1 (with a dirty bitmap, gone) and 2 (everything, address and size 0).
        argsz: bytes of a reply payload the client takes; 24 is all of it.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQ")
    ALL: ClassVar[int] = 2

    address: int
    size: int
    flags: int = 0
    argsz: int = 24

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """24 bytes."""
        del wire
        return self.LAYOUT.pack(self.argsz, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        del wire
        argsz, flags, address, size = fields_of(cls.LAYOUT, body, "DMA_UNMAP")
        if flags & cls.ALL:
            if address or size:
                raise BadMessage(f"DMA_UNMAP of all takes address and size 0, got 0x{address:x} and {size}")
        else:
            _check_range("DMA_UNMAP", address, size)
        return cls(address, size, flags, argsz)

    @property
    def everything(self) -> bool:
        """All mappings at once (libvfio-user)."""
        return bool(self.flags & self.ALL)


class DmaRead(Struct, frozen=True):
    """The server reads the client's memory."""

    address: int
    count: int

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """16 bytes whatever the width: QEMU's padding makes its structure as long as the specification's."""
        return _fixed(self.address, self.count, wire, padded=True)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage; E2BIG above the transfer limit."""
        address, count, _ = _access(body, "DMA_READ", wire)
        if count > wire.max_transfer:
            raise BadMessage(f"DMA_READ of {count} bytes: at most {wire.max_transfer} at once", "E2BIG")
        _check_range("DMA_READ", address, count, empty=True)
        return cls(address, count)


class DmaData(Struct, frozen=True):
    """The reply to DMA_READ."""

    address: int
    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """Address, count, data."""
        return _with_data(self.address, self.data, wire)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        address, count, start = _access(body, "The reply to DMA_READ", wire)
        return cls(address, sized_data(body, start, count, "The reply to DMA_READ", wire))


class DmaWrite(Struct, frozen=True):
    """The server writes the client's memory."""

    address: int
    data: bytes

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """Address, count, data."""
        return _with_data(self.address, self.data, wire)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage."""
        address, count, start = _access(body, "DMA_WRITE", wire)
        data = sized_data(body, start, count, "DMA_WRITE", wire)
        _check_range("DMA_WRITE", address, count, empty=True)
        return cls(address, data)


class DmaWritten(Struct, frozen=True):
    """The reply to DMA_WRITE.

    Attributes:
        address: as in the request; None: the client sent a header alone, which is what QEMU does.
        count: bytes written; None as well.

    """

    address: int | None = None
    count: int | None = None

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """Address and count; the specification's table gives the count 4 bytes, libvfio-user takes 8."""
        if self.address is None or self.count is None:
            return b""
        return _fixed(self.address, self.count, wire, padded=False)

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """A header alone is taken, and a count of 4 or 8 bytes. Raises BadMessage for less."""
        if not body:
            return cls()
        narrow = len(body) < _U64.size or wire.count is CountWidth.U32
        address, count = fields_of(_U32 if narrow else _U64, body, "The reply to DMA_WRITE")
        return cls(address, count)


_U64 = struct.Struct("=QQ")
_U32 = struct.Struct("=QI")
_PADDING = bytes(_U64.size - _U32.size)


def _fixed(address: int, count: int, wire: Wire, *, padded: bool) -> bytes:
    if wire.count is CountWidth.U64:
        return _U64.pack(address, count)
    return _U32.pack(address, count) + (_PADDING if padded else b"")


def _with_data(address: int, data: bytes, wire: Wire) -> bytes:
    if wire.count is CountWidth.U64:
        return _U64.pack(address, len(data)) + data
    # QEMU compares the count with what is behind its padded structure: the padding moves to the end.
    return _U32.pack(address, len(data)) + data + _PADDING


def _access(body: bytes, name: str, wire: Wire) -> tuple[int, int, int]:
    """Address, count, and where data starts."""
    fields_of(_U64, body, name)
    layout = _U64 if wire.count is CountWidth.U64 else _U32
    address, count = layout.unpack_from(body)
    return address, count, layout.size


def _check_range(name: str, address: int, size: int, *, empty: bool = False) -> None:
    if not size and not empty:
        raise BadMessage(f"{name} of no bytes at 0x{address:x}")
    if address + size > 1 << 64:
        raise BadMessage(f"{name} of {size} bytes at 0x{address:x} ends beyond the last address")
