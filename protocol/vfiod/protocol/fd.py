"""A file descriptor with exactly one owner.

An fd on the wire is an index into the fds of a message; in the program it is a :class:`FileDescriptor`.
It is closed exactly once: by its owner, or, when the owner forgot, by the garbage collector with a
``ResourceWarning`` (which the tests turn into a failure).
"""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

__all__ = ["FdKind", "FileDescriptor", "rights_of", "close_all"]

# <sys/socket.h>, the same on every Linux architecture: named here so that this package needs no socket module.
SOL_SOCKET: Final = 1
SCM_RIGHTS: Final = 1
MSG_CTRUNC: Final = 0x08
MSG_CMSG_CLOEXEC: Final = 0x4000_0000
FD_BYTES: Final = 4


class FdKind(enum.StrEnum):
    """What an fd is, found by looking at it (``server/vfiod/server/kernel/kinds.py``)."""

    VFIO_CONTAINER = "vfio-container"
    VFIO_GROUP = "vfio-group"
    VFIO_DEVICE = "vfio-device"
    IOMMUFD = "iommufd"
    EVENTFD = "eventfd"
    MEMFD = "memfd"
    SOCKET = "socket"
    LISTENING_SOCKET = "listening-socket"
    PIPE = "pipe"
    FILE = "file"
    DIRECTORY = "directory"
    CHARACTER_DEVICE = "character-device"
    BLOCK_DEVICE = "block-device"
    UNKNOWN = "unknown"


class FileDescriptor:
    """One open file descriptor and the duty to close it.

    Args:
        number: an open fd. The object owns it from here on.

    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError(f"A file descriptor is not negative, got {number}")
        self._number: int = number

    @classmethod
    def duplicate_of(cls, number: int) -> FileDescriptor:
        """A close-on-exec duplicate of an fd that somebody else owns. Raises OSError (EBADF, EMFILE)."""
        return cls(os.dup(number))  # os.dup makes it non-inheritable (PEP 446)

    @property
    def number(self) -> int:
        """The fd, lent: valid while this object lives and is not closed. Raises ValueError once closed."""
        if self._number < 0:
            raise ValueError("This file descriptor is closed or was given away")
        return self._number

    @property
    def closed(self) -> bool:
        """True once it was closed or given away."""
        return self._number < 0

    def fileno(self) -> int:
        """Same as :attr:`number`; lets ``select``, ``mmap`` and ``os.fdopen`` take the object."""
        return self.number

    def duplicate(self) -> FileDescriptor:
        """A second fd on the same open file, with an owner of its own."""
        return FileDescriptor.duplicate_of(self.number)

    def give_away(self) -> int:
        """Hand the number to a new owner: this object no longer closes it."""
        number = self.number
        self._number = -1
        return number

    def close(self) -> None:
        """Close it, once; later calls do nothing. EINTR and EIO are not retried: Linux has freed the number."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<FileDescriptor {self._number}>" if self._number >= 0 else "<FileDescriptor closed>"


def close_all(fds: Iterable[FileDescriptor]) -> None:
    """Close each; an fd that is closed already is passed over."""
    for fd in fds:
        fd.close()


def rights_of(ancillary: Iterable[tuple[int, int, bytes]]) -> list[FileDescriptor]:
    """Take ownership of every fd in the ancillary data of one ``recvmsg``.

    Call it *before* looking at the flags: on ``MSG_CTRUNC`` some fds did arrive and must be closed
    (``cmsg(3)``). ``recvmsg`` must have been given ``MSG_CMSG_CLOEXEC``.
    """
    fds: list[FileDescriptor] = []
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            whole = len(data) - len(data) % FD_BYTES
            view = memoryview(data)[:whole].cast("i")
            fds.extend(FileDescriptor(number) for number in view)
    return fds
