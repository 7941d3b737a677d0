"""The files that clients of exports map: each opened once, however often it is mapped; and memory that has no file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_CLIENT_FILES
from vfiod.server.backends.base import GuestFile
from vfiod.server.dma.files import open_memory
from vfiod.server.dma.ranges import END_OF_SPACE

if TYPE_CHECKING:
    from vfiod.server.kernel.memory import SharedMemory
    from vfiod.server.kernel.pins import PinnedMemory

__all__ = ["ClientFiles", "Unreachable"]

FileKey = tuple[int, int, bool]
"""Device and inode of a file (``stat(2)``), and whether it is only read."""


class _File(Struct, eq=False):
    """A client's file, opened once for all its mappings."""

    memory: SharedMemory
    users: int = 0


class ClientFiles:
    """The files of all clients of one machine."""

    def __init__(self) -> None:
        self._files: dict[FileKey, _File] = {}

    def open(self, client: str, fd: FileDescriptor, readonly: bool, end: int) -> SharedMemory:
        """The memory of a client's file, opened once however often it is mapped. Blocks. The fd stays the caller's.

        Every fd is looked at, also when the file is known: what it may do is a property of the fd.
        """
        duplicate = _duplicate(fd, client)
        try:
            fresh = open_memory(duplicate, size=None, readonly=readonly, name=f"memory of {client}")
        except CommandError as error:
            duplicate.close()
            raise InvalidArgument(
                f"The file of {client} cannot be its memory: {error}", errno=error.errno or "EINVAL"
            ) from error
        status = os.fstat(duplicate.number)
        if end > fresh.size:
            fresh.close()
            raise InvalidArgument(
                f"The file of {client} has {fresh.size:#x} bytes, the mapping ends at {end:#x}", errno="EINVAL"
            )
        key: FileKey = (status.st_dev, status.st_ino, readonly)
        known = self._files.get(key)
        if known is not None and end <= known.memory.size:
            fresh.close()
            known.users += 1
            return known.memory
        if len(self._files) >= MAX_CLIENT_FILES:
            fresh.close()
            raise InvalidArgument(
                f"{MAX_CLIENT_FILES} files of clients are mapped, no more are allowed", errno="ENOSPC"
            )
        if known is not None:
            # It has grown since. Who mapped it before keeps the smaller one; new mappings share the larger.
            self._files[(-1, id(known), readonly)] = known
        self._files[key] = _File(fresh, 1)
        return fresh

    def close(self, memory: GuestFile) -> None:
        """One mapping of a file less."""
        for key, file in self._files.items():
            if file.memory is memory:
                file.users -= 1
                if not file.users:
                    del self._files[key]
                    file.memory.close()
                return

    def __iter__(self) -> Iterator[SharedMemory]:
        """Every open file, for ``query-fds``."""
        return (file.memory for file in tuple(self._files.values()))


class Unreachable:
    """Memory that came without a file, for a device that cannot ask for it."""

    readonly = False
    closed = False
    asks = False
    is_mapped = False
    size = END_OF_SPACE

    def __init__(self, client: str) -> None:
        self.name = f"memory of {client} that came without a file"

    @property
    def number(self) -> int:
        """Refuse. OperationFailed."""
        raise self._nothing()

    def address(self) -> int:
        """Refuse. OperationFailed."""
        raise self._nothing()

    def unmap(self) -> None:
        """Nothing is mapped."""

    def read(self, offset: int, length: int) -> bytes:
        """Refuse. OperationFailed."""
        raise self._nothing()

    def write(self, offset: int, data: bytes) -> None:
        """Refuse. OperationFailed."""
        raise self._nothing()

    def pin(self, offset: int, length: int, *, writable: bool) -> PinnedMemory:
        """Refuse. OperationFailed."""
        raise self._nothing()

    def close(self) -> None:
        """Nothing is open."""

    def _nothing(self) -> OperationFailed:
        return OperationFailed("map", self.name, errno="ENOTSUP", advice="share the guest's memory (QEMU: share=on)")


def _duplicate(fd: FileDescriptor, client: str) -> FileDescriptor:
    try:
        return fd.duplicate()
    except OSError as error:
        raise OperationFailed(
            "dup",
            f"memory of {client}",
            errno=error.errno or 0,
            advice="the open-file limit (RLIMIT_NOFILE) may be too low",
        ) from error
