"""The iommufd half of the fake kernel: ``drivers/iommu/iommufd`` and ``drivers/vfio/device_cdev.c``, in small."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass, field
from typing import Any

from tests.unit.server.fake_device import FakeDevice, refuse

from vfiod.protocol import vfio

PAGE = mmap.PAGESIZE
FIRST_ID = 1


@dataclass
class FakePages:
    """What one mapping reaches: an address of this process, or a file the kernel holds."""

    size: int
    flags: vfio.IoasMapFlags
    address: int
    held: tuple[Any, ...] = ()
    by_file: bool = False

    def drop(self) -> None:
        if self.held:
            area, anchor = self.held
            self.held = ()
            del anchor
            area.close()


@dataclass
class FakeIoas:
    """An IOAS."""

    mappings: dict[int, FakePages] = field(default_factory=dict)
    devices: list[FakeDevice] = field(default_factory=list)

    @property
    def locked(self) -> int:
        return sum(pages.size for pages in self.mappings.values()) if self.devices else 0

    def translate(self, iova: int, size: int, write: bool) -> int:
        for start, pages in self.mappings.items():
            if start <= iova and iova + size <= start + pages.size:
                if write and not pages.flags & vfio.IoasMapFlags.WRITEABLE:
                    break
                return pages.address + iova - start
        raise refuse(errno.EFAULT)

    def clear(self) -> None:
        for pages in self.mappings.values():
            pages.drop()
        self.mappings.clear()


@dataclass
class FakeIommufd:
    """An open ``/dev/iommu``."""

    inode: int
    objects: dict[int, FakeIoas | FakeDevice] = field(default_factory=dict)
    per_process: bool = False

    def allocate(self, thing: FakeIoas | FakeDevice) -> int:
        """The lowest free id, as ``xa_alloc``."""
        number = next(number for number in range(FIRST_ID, 1 << 31) if number not in self.objects)
        self.objects[number] = thing
        return number

    def ioas(self, number: int) -> FakeIoas:
        found = self.objects.get(number)
        if not isinstance(found, FakeIoas):
            raise refuse(errno.ENOENT)
        return found

    def id_of(self, device: FakeDevice) -> int | None:
        return next((number for number, thing in self.objects.items() if thing is device), None)

    def ioases(self) -> list[FakeIoas]:
        return [thing for thing in self.objects.values() if isinstance(thing, FakeIoas)]

    def close(self) -> None:
        for ioas in self.ioases():
            ioas.clear()
        self.objects.clear()


@dataclass
class FakeCdevFile:
    """One open file of a cdev."""

    device: FakeDevice
    iommufd: FakeIommufd | None = None
    ioas: FakeIoas | None = None

    def detach(self) -> None:
        if self.ioas is not None:
            self.ioas.devices.remove(self.device)
            self.ioas = None
            self.device.dma = _nowhere

    def close(self) -> None:
        """The last fd of it is gone."""
        if self.iommufd is None:
            return
        self.detach()
        number = self.iommufd.id_of(self.device)
        if number is not None:
            del self.iommufd.objects[number]
        self.iommufd = None
        self.device.close()


def _nowhere(iova: int, size: int, write: bool) -> int:
    raise refuse(errno.EFAULT)


def attach(file: FakeCdevFile, ioas: FakeIoas) -> None:
    file.detach()
    file.ioas = ioas
    ioas.devices.append(file.device)
    file.device.dma = ioas.translate


def map_address(ioas: FakeIoas, request: vfio.IoasMap) -> None:
    ioas.mappings[request.iova] = FakePages(request.length, request.flags, request.user_va)


def map_file(ioas: FakeIoas, request: vfio.IoasMapFile, *, shared_only: bool) -> None:
    """``memfd_pin_folios`` takes shared memory and hugetlbfs only, and nothing beyond the end of the file."""
    link = os.readlink(f"/proc/self/fd/{request.fd}")
    if shared_only and not link.startswith(("/memfd:", "/dev/shm/")):
        raise refuse(errno.EINVAL)
    if request.start + request.length > os.fstat(request.fd).st_size:
        raise refuse(errno.EINVAL)
    area = mmap.mmap(request.fd, request.length, offset=request.start)
    anchor = ctypes.c_char.from_buffer(area)
    pages = FakePages(request.length, request.flags, ctypes.addressof(anchor), (area, anchor), by_file=True)
    ioas.mappings[request.iova] = pages


def unmap(ioas: FakeIoas, iova: int, length: int) -> int:
    """``iopt_unmap_iova``: whole mappings; nothing there is a success of 0 bytes."""
    if not length:
        raise refuse(errno.EINVAL)
    end = iova + length
    hit = [start for start, pages in ioas.mappings.items() if start < end and iova < start + pages.size]
    if any(start < iova or start + ioas.mappings[start].size > end for start in hit):
        raise refuse(errno.ENOENT)
    done = 0
    for start in hit:
        pages = ioas.mappings.pop(start)
        done += pages.size
        pages.drop()
    return done
