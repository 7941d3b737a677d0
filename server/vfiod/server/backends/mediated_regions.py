"""The regions of a mediated device, in the kernel's words: what its parent says of them, checked.

What the parent gives back decides what is mapped by whom: a wrong answer must be the parent's failure, and not vfiod's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.server.kernel.syscalls import PAGE_SIZE
from vfiod.server.mdev.calls import guarded
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.parent import Area, MapRequest, RegionInfo

__all__ = ["MediatedRegions", "wrong"]

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")


def wrong(callback: str, what: str, detail: str) -> OperationFailed:
    """The error for an answer that cannot be."""
    return OperationFailed(callback, what, errno=errno.EIO, advice=f"the parent's answer cannot be: {detail}")


class MediatedRegions:
    """The regions of one device."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._device = instance.device

    def info(self, index: int) -> vfio.RegionInfo:
        """``VFIO_DEVICE_GET_REGION_INFO`` of one region. Raises OperationFailed."""
        told = self._call("region_info", lambda: self._device.region_info(index), index)
        return guarded("region_info", self._what(index), self._region, index, told)

    def _call(self, operation: str, function: Callable[[], T], index: int) -> T:
        return self._instance.call(operation, function, of=self._what(index))

    def _what(self, index: int) -> str:
        return f"{self._instance.what} region {index}"

    def _region(self, index: int, told: RegionInfo) -> vfio.RegionInfo:
        what = self._what(index)
        if not isinstance(told, RegionInfo) or not 0 <= told.size < 1 << 63:
            raise wrong("region_info", what, f"it gave {told!r}")
        flags = vfio.RegionFlags.READ if told.readable else vfio.RegionFlags(0)
        flags |= vfio.RegionFlags.WRITE if told.writable else vfio.RegionFlags(0)
        # As the kernel: an index's region begins at its number times 2**40 of the device fd.
        offset = index << 40
        capabilities: tuple[vfio.Capability, ...] = ()
        if told.type is not None:
            if not isinstance(told.type, vfio.RegionTypeCap):
                raise wrong("region_info", what, f"its type is {told.type!r}")
            capabilities = (told.type,)
        if not told.size or not told.areas:
            return vfio.RegionInfo(index, flags if told.size else vfio.RegionFlags(0), told.size, offset, capabilities)
        granted, offset = self._granted(index, told)
        if not granted:
            return vfio.RegionInfo(index, flags, told.size, offset, capabilities)
        flags |= vfio.RegionFlags.MMAP
        if granted != (Area(0, told.size),):
            capabilities = (vfio.SparseMmap(granted), *capabilities)
        return vfio.RegionInfo(index, flags, told.size, offset, capabilities)

    def file(self, index: int) -> int | None:
        """The fd of the file behind a region, lent; None: it has none."""
        number = self._call("region_fd", lambda: self._device.region_fd(index), index)
        if number is not None and (not isinstance(number, int) or number < 0):
            raise wrong("region_fd", self._what(index), f"it gave {number!r}")
        return number

    def _file_length(self, index: int) -> int:
        """Bytes that can be mapped of the file behind a region; a file whose end can move is refused."""
        what = self._what(index)
        number = self.file(index)
        if number is None:
            raise wrong("region_fd", what, "it says that the region can be mapped, and has no file")
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                return 1 << 63  # a real device's file: its driver looks after its end
            seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
        except OSError as error:
            raise wrong("region_fd", what, f"{number} is no memfd that can be sealed: {error.strerror}") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            # Whoever gets it by region-map could cut it, and the next access here would be SIGBUS.
            raise wrong("region_fd", what, "its file must be sealed against shrinking (F_SEAL_SHRINK)")
        return status.st_size

    def _granted(self, index: int, told: RegionInfo) -> tuple[tuple[Area, ...], int]:
        """What may be mapped of a region, as the device's ``validate_map_request`` leaves it, and where in its file."""
        what = self._what(index)
        length = self._file_length(index)
        areas: list[Area] = []
        base: int | None = None
        for area in told.areas:
            asked = MapRequest(index, area.offset, area.size, file_offset=area.offset)
            try:
                granted = self._call("validate_map_request", partial(self._device.validate_map_request, asked), index)
            except CommandError as error:
                _log.info("%s; it is left out of what may be mapped", error)
                continue
            if (
                not isinstance(granted, MapRequest)
                or granted.region != index
                or granted.size <= 0
                or granted.offset % PAGE_SIZE
                or granted.size % PAGE_SIZE
                or granted.file_offset % PAGE_SIZE
                or granted.offset < area.offset
                or granted.offset + granted.size > min(area.offset + area.size, told.size)
                or granted.file_offset < granted.offset
                or granted.file_offset + granted.size > length
            ):
                raise wrong("validate_map_request", what, f"asked for {asked}, it granted {granted}")
            # One offset for the whole region: struct vfio_region_info has room for one.
            if base is not None and granted.file_offset - granted.offset != base:
                raise wrong("validate_map_request", what, "areas of one region were moved by different distances")
            base = granted.file_offset - granted.offset
            areas.append(Area(granted.offset, granted.size))
        return tuple(areas), base or 0
