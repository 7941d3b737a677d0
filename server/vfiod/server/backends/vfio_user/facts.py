"""What a vfio-user server says its device is: asked once, when connected, and believed only as far as it goes."""

from __future__ import annotations

import logging
import os
import stat
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import VFIO_USER_MAX_INFO, VFIO_USER_MAX_IRQS, VFIO_USER_MAX_REGIONS
from vfiod.protocol.vfio.ccw import SCHIB_REGION_SIZE, CcwSubtype
from vfiod.protocol.vfio_user import (
    DeviceInfoReply,
    GetDeviceInfo,
    GetIrqInfo,
    GetRegionInfo,
    IrqInfoReply,
    RegionData,
    RegionInfoReply,
    RegionRead,
)
from vfiod.server.backends.vfio_user.link import Link
from vfiod.server.kernel.syscalls import PAGE_SIZE

__all__ = ["Facts", "look"]

_log: Final = logging.getLogger(__name__)

_FIRST_ASK: Final = 4096
"""Bytes of a region's information asked for at first: enough for any that is known; a longer one is asked for again."""

_IDENTITY: Final = ((0x00, 4), (0x08, 4), (0x2C, 4))
"""What of configuration space says which device it is: ids, revision and class, subsystem (PCI 3.0, 6.2.1)."""

_DEVICE_NUMBER: Final = (6, 2)
"""Of a subchannel, where its device number is in the SCHIB: in the PMCW, behind the parameter and the flags."""


class Facts(Struct, frozen=True, eq=False):
    """A device as its server describes it.

    Attributes:
        info: of the device.
        regions: by index; what the server said no to is an OperationFailed.
        irqs: by index; likewise.
        files: fds that map regions, by index; owned.
        identity: the bytes of configuration space that say which device it is; of a subchannel its device number.

    """

    info: vfio.DeviceInfo
    regions: tuple[vfio.RegionInfo | OperationFailed, ...]
    irqs: tuple[vfio.IrqInfo | OperationFailed, ...]
    files: dict[int, FileDescriptor]
    identity: bytes

    def differs(self, other: Facts) -> str | None:
        """How another device differs from this one, as far as a guest can tell; None: it does not."""
        if self.identity != other.identity:
            if self.info.flags & vfio.DeviceFlags.CCW and other.info.flags == self.info.flags:
                return f"its device number is {other.identity.hex()}, it was {self.identity.hex()}"
            return f"its ids are {other.identity.hex()}, they were {self.identity.hex()}"
        if self.info != other.info:
            return f"it is {other.info}, it was {self.info}"
        for mine, its in (
            *zip(map(_shape, self.regions), map(_shape, other.regions), strict=True),
            *zip(map(_plain, self.irqs), map(_plain, other.irqs), strict=True),
        ):
            if mine != its:
                return f"it has {its}, it had {mine}"
        return None

    def other_files(self, other: Facts) -> list[int]:
        """The regions whose memory the other one has somewhere else: another file, or another place in it."""
        return [
            index
            for index, fd in self.files.items()
            if (theirs := other.files.get(index)) is None
            or _place(fd, self.regions[index]) != _place(theirs, other.regions[index])
        ]

    def close(self) -> None:
        """Close the regions' fds."""
        for fd in self.files.values():
            fd.close()


def _shape(region: vfio.RegionInfo | OperationFailed) -> object:
    """Of a region, what a guest can tell: which page of its file it begins on is the server's affair."""
    return None if isinstance(region, OperationFailed) else replace(region, offset=region.offset % PAGE_SIZE)


def _place(fd: FileDescriptor, region: vfio.RegionInfo | OperationFailed) -> tuple[int, int, int]:
    """Where a region's memory is: device, inode, offset in bytes."""
    status = os.fstat(fd.number)
    return status.st_dev, status.st_ino, -1 if isinstance(region, OperationFailed) else region.offset


def _plain(irq: vfio.IrqInfo | OperationFailed) -> object:
    return None if isinstance(irq, OperationFailed) else irq


def look(link: Link, *, takes_fds: bool) -> Facts:
    """Ask for everything. Blocks. Raises OperationFailed; leaves no fd open then.

    Args:
        link: after the handshake.
        takes_fds: the server takes fds. One that does not can signal no interrupt: its device has none.

    """
    info = link.ask_for(GetDeviceInfo(), DeviceInfoReply).info
    if info.num_regions > VFIO_USER_MAX_REGIONS or info.num_irqs > VFIO_USER_MAX_IRQS:
        raise _wrong(
            link,
            "DEVICE_GET_INFO",
            f"it says it has {info.num_regions} regions and {info.num_irqs} interrupt indexes: at most "
            f"{VFIO_USER_MAX_REGIONS} and {VFIO_USER_MAX_IRQS}",
        )
    files: dict[int, FileDescriptor] = {}
    try:
        regions = tuple(_region(link, index, files) for index in range(info.num_regions))
        irqs = tuple(_irq(link, index, usable=takes_fds) for index in range(info.num_irqs))
        return Facts(info, regions, irqs, files, _identity(link, info, regions))
    except BaseException:
        for fd in files.values():
            fd.close()
        raise


def _region(link: Link, index: int, files: dict[int, FileDescriptor]) -> vfio.RegionInfo | OperationFailed:
    try:
        info, fd = _ask_region(link, index)
    except OperationFailed as error:
        if error.errno in _DEADLY:
            raise
        return error
    if fd is not None and not info.mappable:
        fd.close()
        fd = None
    if info.mappable:
        problem = "it sent no fd to map it" if fd is None else _why_not(fd, info)
        if problem is None and fd is not None:
            files[index] = fd
        else:
            # It works without: every access is a message.
            _log.warning("%s: region %d cannot be mapped: %s", link.what, index, problem)
            if fd is not None:
                fd.close()
            info = replace(info, flags=info.flags & ~vfio.RegionFlags.MMAP)
    return info


_DEADLY: Final = frozenset({"ENOTCONN", "ETIMEDOUT", "EPROTO"})
"""Failures that are not about one region or interrupt."""


def _ask_region(link: Link, index: int) -> tuple[vfio.RegionInfo, FileDescriptor | None]:
    needed = _FIRST_ASK
    for _ in range(2):
        reply = link.ask(GetRegionInfo(index, needed))
        try:
            told = reply.payload
            if not isinstance(told, RegionInfoReply) or told.info.index != index:
                raise _wrong(link, "DEVICE_GET_REGION_INFO", f"it answers for another region than {index}")
            if told.complete:
                if told.info.size >= 1 << 63:
                    raise _wrong(link, "DEVICE_GET_REGION_INFO", f"region {index} has {told.info.size} bytes")
                return told.info, reply.fds.pop(0) if reply.fds else None
            needed = told.needed
        finally:
            reply.close()
        if needed > VFIO_USER_MAX_INFO:
            break
    raise _wrong(
        link,
        "DEVICE_GET_REGION_INFO",
        f"what it has to say of region {index} takes {needed} bytes, and never comes whole",
    )


def _why_not(fd: FileDescriptor, info: vfio.RegionInfo) -> str | None:
    """Why what came cannot be mapped as the region; None: it can."""
    try:
        status = os.fstat(fd.number)
    except OSError as error:
        return f"its fd cannot be looked at ({error.strerror})"
    if stat.S_ISREG(status.st_mode):
        end = max((area.offset + area.size for area in info.areas), default=0)
        if info.offset + end > status.st_size:
            return f"its fd has {status.st_size} bytes, {info.offset + end} are needed"
        return None
    return None if stat.S_ISCHR(status.st_mode) else "its fd is neither a file nor a device"


def _irq(link: Link, index: int, *, usable: bool) -> vfio.IrqInfo | OperationFailed:
    try:
        info = link.ask_for(GetIrqInfo(index), IrqInfoReply).info
    except OperationFailed as error:
        if error.errno in _DEADLY:
            raise
        return error
    if info.index != index:
        raise _wrong(link, "DEVICE_GET_IRQ_INFO", f"it answers for another index than {index}")
    if info.count and not usable:
        _log.warning("%s: interrupt index %d cannot be used: the server takes no fds (max_msg_fds)", link.what, index)
    return info if usable else vfio.IrqInfo(index)


def _identity(link: Link, info: vfio.DeviceInfo, regions: tuple[vfio.RegionInfo | OperationFailed, ...]) -> bytes:
    """Empty for what has neither configuration space nor SCHIB."""
    if info.flags & vfio.DeviceFlags.CCW:
        return _device_number(link, regions)
    config = int(vfio.PciRegion.CONFIG)
    region = regions[config] if info.flags & vfio.DeviceFlags.PCI and config < len(regions) else None
    if not isinstance(region, vfio.RegionInfo) or region.size < 64 or not region.readable:
        return b""
    return b"".join(link.ask_for(RegionRead(config, offset, size), RegionData).data for offset, size in _IDENTITY)


def _device_number(link: Link, regions: tuple[vfio.RegionInfo | OperationFailed, ...]) -> bytes:
    kind = (int(vfio.RegionType.CCW), int(CcwSubtype.SCHIB))
    for region in regions:
        if isinstance(region, vfio.RegionInfo) and region.type is not None and region.size == SCHIB_REGION_SIZE:
            if (region.type.type, region.type.subtype) != kind:
                continue
            # Whole, as the machine stores it.
            data = link.ask_for(RegionRead(region.index, 0, SCHIB_REGION_SIZE), RegionData).data
            first, size = _DEVICE_NUMBER
            return data[first : first + size]
    return b""


def _wrong(link: Link, operation: str, why: str) -> OperationFailed:
    return OperationFailed(f"VFIO_USER_{operation}", link.what, errno="EPROTO", advice=why)
