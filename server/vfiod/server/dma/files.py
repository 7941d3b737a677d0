"""What may serve as guest memory: a memfd, a hugetlbfs file, a regular file that is shared."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.kernel.memory import SharedMemory

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import MemoryState

__all__ = ["MEMORY_KINDS", "keep_memory", "open_memory", "take_memory"]

MEMORY_KINDS: Final = (FdKind.MEMFD, FdKind.FILE)
"""Kinds of fd that hold memory. A hugetlbfs file is a file; both kinds are mapped shared."""

F_GET_SEALS: Final = 1034  # fcntl(2); Python 3.11 has it, its typing stubs only on Linux
F_SEAL_WRITE: Final = 0x0008
F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1


def open_memory(fd: FileDescriptor, *, size: int | None, readonly: bool, name: str) -> SharedMemory:
    """Look at a file and take it over as guest memory.

    Args:
        fd: the file; the memory owns it when this succeeds, and the caller keeps it when it fails.
        size: bytes of it to use; None: all.
        readonly: devices may read it only.
        name: for error texts.

    Raises InvalidArgument: no file that can be mapped, opened or sealed against writing without ``readonly``, or
    too small. Nothing is mapped yet.

    """
    status = os.fstat(fd.number)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument("Parameter 'fd' expects a memfd, a hugetlbfs file or a regular file")
    _check_access(fd, readonly)
    if status.st_size == 0:
        raise InvalidArgument("Parameter 'fd': the file is empty; give it its size (ftruncate) before it is passed")
    if size is not None and size > status.st_size:
        raise InvalidArgument(f"Parameter 'size' expects at most the file's {status.st_size:#x} bytes, got {size:#x}")
    return SharedMemory(fd, size=status.st_size if size is None else size, readonly=readonly, name=name)


def _check_access(fd: FileDescriptor, readonly: bool) -> None:
    access = fcntl.fcntl(fd.number, fcntl.F_GETFL) & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise InvalidArgument("Parameter 'fd': the file is open for writing only; open it for reading and writing")
    if readonly:
        return
    if access == os.O_RDONLY:
        raise InvalidArgument(
            "Parameter 'readonly' expects true: the file is open for reading only, and devices could not write to it"
        )
    try:
        seals = fcntl.fcntl(fd.number, F_GET_SEALS)
    except OSError:
        return  # EINVAL: a file that cannot be sealed
    if seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        raise InvalidArgument(
            "Parameter 'readonly' expects true: the memfd is sealed against writing, and devices could not write to it"
        )


def keep_memory(memory: SharedMemory, given: Given) -> MemoryState:
    """Describe a file of guest memory."""
    from vfiod.server.state.machine import MemoryState

    place = given.give(memory.number, f"memory {memory.name}")
    return MemoryState(fd=place, size=memory.size, name=memory.name, readonly=memory.readonly)


def take_memory(state: MemoryState, taken: Taken) -> SharedMemory:
    """Make it again. It is mapped anew when its address is needed: the pages are the file's."""
    fd = taken.take(state.fd)
    try:
        return SharedMemory(fd, size=state.size, readonly=state.readonly, name=state.name)
    except BaseException:
        fd.close()
        raise
