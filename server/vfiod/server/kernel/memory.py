"""Memory that two parties see: files of guest memory, and windows onto device regions.

Guest memory may be read and written in any way. Device memory may not: a register wants exactly one load or
store of the right width, and only a memoryview cast to that width makes it (``reference/performance.md``).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import sys
from typing import Final

from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.pins import PinnedMemory
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

__all__ = ["ACCESS_SIZES", "RegionWindow", "SharedMemory"]

ACCESS_SIZES: Final = (1, 2, 4, 8)
"""Bytes one access to a device region may have."""


class SharedMemory:
    """A file of guest memory: a memfd, a hugetlbfs file, a shared file.

    Args:
        fd: the file. The object owns it from here on; a failing constructor leaves it to the caller.
        size: bytes of it to use, from its start; None: all of it.
        readonly: only ever read it, whatever the fd allows.
        name: for messages.
        calls: the system calls.

    Raises:
        InvalidArgument: it is not a file of at least ``size`` bytes, or not open for what is wanted.

    """

    asks = False

    def __init__(
        self,
        fd: FileDescriptor,
        *,
        size: int | None = None,
        readonly: bool = False,
        name: str = "memory",
        calls: Syscalls | None = None,
    ) -> None:
        self.name = name
        self.readonly = readonly
        self._calls = calls or Syscalls()
        self.size = self._usable_size(fd, size)
        status = os.fstat(fd.number)
        # munmap of hugetlbfs takes whole huge pages, which are the file's blocks; anything else it refuses.
        self._map_size = min(-(-self.size // status.st_blksize) * status.st_blksize, status.st_size)
        self._fd = fd
        self._map: mmap.mmap | None = None

    def _usable_size(self, fd: FileDescriptor, size: int | None) -> int:
        status = os.fstat(fd.number)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"{self.name} is not memory: expected a memfd, a hugetlbfs file or a regular file")
        mode = fcntl.fcntl(fd.number, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_WRONLY or (mode == os.O_RDONLY and not self.readonly):
            raise InvalidArgument(
                f"{self.name} is open for {'writing' if mode == os.O_WRONLY else 'reading'} only: "
                "open it for reading and writing, or declare it readonly and open it for reading"
            )
        if size is None:
            size = status.st_size
        if size <= 0 or size > status.st_size:
            raise InvalidArgument(f"{self.name} has {status.st_size} bytes, of which {size} cannot be used")
        return size

    @property
    def number(self) -> int:
        """The file's fd, lent."""
        return self._fd.number

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd.closed

    def _mapped(self) -> mmap.mmap:
        # Two threads may be here at once only if two lanes use one memory: only the topology lane does.
        if self._map is None:
            try:
                self._map = self._calls.map(self._fd.number, 0, self._map_size, writable=not self.readonly)
            except OSError as error:
                raise OperationFailed("mmap", self.name, errno=error.errno or 0) from error
            # The guest's memory does not belong into this process's core dumps.
            self._map.madvise(mmap.MADV_DONTDUMP)
        return self._map

    def address(self) -> int:
        """Where the whole of it is mapped in this process, in bytes; maps it when called first. OperationFailed."""
        from vfiod.server.kernel.address import address_of  # here: it needs ctypes, and only the kernel's DMA needs it

        return address_of(self._mapped())

    @property
    def is_mapped(self) -> bool:
        """Whether it is mapped in this process."""
        return self._map is not None

    def unmap(self) -> None:
        """Take the mapping in this process back, if there is one; the next use makes another.

        Nobody may need its address any more: no kernel's IOMMU has a part of it.
        """
        mapped, self._map = self._map, None
        if mapped is None:
            return
        try:
            mapped.close()
        except BufferError:  # a view is held
            self._map = mapped

    def view(self) -> memoryview:
        """The whole of it as bytes; maps it when called first. Release the view before :meth:`close`.

        Touching a page that the file no longer has (its owner truncated it) ends this process with SIGBUS. What
        comes from a peer is read and written by :meth:`read` and :meth:`write`.
        """
        view = memoryview(self._mapped())[: self.size]
        return view.toreadonly() if self.readonly else view

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; never SIGBUS, whatever the owner does to the file.

        Raises:
            OperationFailed: out of range (EFAULT), or the file has become too short (EFAULT).

        """
        self._check(offset, length, "read")
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self._calls.pread(self._fd.number, length - len(parts), offset + len(parts))
            except OSError as error:
                raise OperationFailed("pread", self._where(offset, length), errno=error.errno or 0) from error
            if not part:
                raise OperationFailed("pread", self._where(offset, length), errno="EFAULT", advice="the file was cut")
            parts += part
        return bytes(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it; never SIGBUS. A file that was cut grows back, it is not ours to judge.

        Raises:
            OperationFailed: out of range, read-only, or the kernel refused.

        """
        self._check(offset, len(data), "write")
        if self.readonly:
            raise OperationFailed("write", self._where(offset, len(data)), errno="EACCES", advice="it is read-only")
        done = 0
        while done < len(data):
            try:
                done += self._calls.pwrite(self._fd.number, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise OperationFailed("pwrite", self._where(offset, len(data)), errno=error.errno or 0) from error
                # hugetlbfs has no write(2) (fs/hugetlbfs/inode.c); its files cannot be written but through a mapping.
                with self.view() as view:
                    view[offset + done : offset + len(data)] = data[done:]
                return

    def pin(self, offset: int, length: int, *, writable: bool) -> PinnedMemory:
        """A part of it in this process's memory, for long, until it is taken back. OperationFailed.

        EPERM: its owner could cut the file (no F_SEAL_SHRINK), and a touch of what is gone would be the end of this
        process (SIGBUS).
        """
        self._check(offset, length, "pin")
        if writable and self.readonly:
            raise OperationFailed("pin", self._where(offset, length), errno="EACCES", advice="it is read-only")
        try:
            sealed = fcntl.fcntl(self._fd.number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed:
            advice = "its owner could cut the file: seal it against shrinking (F_SEAL_SHRINK)"
            raise OperationFailed("pin", self._where(offset, length), errno="EPERM", advice=advice)
        try:
            return PinnedMemory(self._calls, self._fd.number, offset, length, writable=writable)
        except OSError as error:
            raise OperationFailed("mmap", self._where(offset, length), errno=error.errno or 0) from error

    def _check(self, offset: int, length: int, operation: str) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OperationFailed(
                operation, self._where(offset, length), errno="EFAULT", advice=f"it has {self.size} bytes"
            )

    def _where(self, offset: int, length: int) -> str:
        return f"{self.name} (offset 0x{offset:x}, {length} bytes)"

    def close(self) -> None:
        """Unmap and close it, once; later calls do nothing. BufferError while a view is held."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._fd.close()

    def __repr__(self) -> str:
        return f"<SharedMemory {self.name!r} {self.size} bytes{' readonly' if self.readonly else ''}>"


class RegionWindow:
    """A mapped area of a device region: every access is exactly one load or store of its width.

    Args:
        calls: the system calls.
        fd: lent: the fd that maps the region. (Python's mmap keeps a duplicate until :meth:`close`.)
        offset: where the area starts in the fd, in bytes; a multiple of the page size.
        size: bytes; a multiple of the page size.
        readable: whether loads are allowed.
        writable: whether stores are allowed.

    Raises:
        OSError: from ``mmap(2)``.
        ValueError: offset or size are not whole pages.

    """

    __slots__ = ("_map", "_view", "_views", "size")

    def __init__(
        self, calls: Syscalls, fd: int, offset: int, size: int, *, readable: bool = True, writable: bool = True
    ) -> None:
        if offset % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"A window takes whole pages of {PAGE_SIZE} bytes, got offset {offset}, size {size}")
        self.size = size
        self._map: mmap.mmap = calls.map(fd, offset, size, readable=readable, writable=writable)
        self._view = memoryview(self._map)
        view = self._view
        self._views: dict[int, memoryview] = {
            1: view.cast("B"),
            2: view.cast("H"),
            4: view.cast("I"),
            8: view.cast("Q"),
        }

    def load(self, offset: int, size: int) -> int:
        """One load of ``size`` (1, 2, 4, 8) bytes at a multiple of it, little-endian.

        Raises KeyError for another size, IndexError out of range; ValueError misaligned, or once closed.
        """
        view = self._views[size]
        # A negative index would count from the end. (The remainder is one step of the interpreter, a mask two.)
        if offset % size or offset < 0:
            raise ValueError(f"An access of {size} bytes at offset 0x{offset:x} is not aligned")
        return view[offset // size] if _LITTLE else _swapped(view[offset // size], size)

    def store(self, offset: int, size: int, value: int) -> None:
        """One store of ``size`` (1, 2, 4, 8) bytes at a multiple of it, little-endian. Raises as :meth:`load`."""
        view = self._views[size]
        if offset % size or offset < 0:
            raise ValueError(f"An access of {size} bytes at offset 0x{offset:x} is not aligned")
        view[offset // size] = value if _LITTLE else _swapped(value, size)

    def close(self) -> None:
        """Unmap it, once; later calls do nothing."""
        for view in self._views.values():
            view.release()
        self._view.release()
        self._map.close()


_LITTLE: Final = sys.byteorder == "little"


def _swapped(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "big"), "little")
