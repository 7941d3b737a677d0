"""Memory that is mapped for somebody who may keep it, and taken back whatever he does with it.

A ``memoryview`` cannot be revoked: slices and casts of it live on. So what is taken back is the mapping below them:
empty pages come in its place (``mmap(2)``, MAP_FIXED), and whoever still has a view reads zeroes and writes to nothing.
"""

from __future__ import annotations

import mmap
import threading

from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

__all__ = ["PinnedMemory"]


class PinnedMemory:
    """A part of a file, mapped shared.

    Args:
        calls: the system calls.
        fd: lent: the file.
        offset: where the part starts, in bytes; any.
        size: bytes, 1 or more.
        writable: whether it may be written.

    Raises OSError: from ``mmap(2)``.

    """

    __slots__ = ("_calls", "_lock", "_map", "size", "view", "writable")

    def __init__(self, calls: Syscalls, fd: int, offset: int, size: int, *, writable: bool) -> None:
        skip = offset % PAGE_SIZE
        self._calls = calls
        self.size = size
        self.writable = writable
        self._map: mmap.mmap | None = calls.map(fd, offset - skip, skip + size, writable=writable)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._lock = threading.Lock()
        self.view = memoryview(self._map)[skip : skip + size]
        """The part as bytes. Of no use once it was released."""

    @property
    def released(self) -> bool:
        """Whether it was taken back."""
        return self._map is None

    def release(self) -> None:
        """Take it back, once; later calls do nothing. From any thread; views that somebody kept show empty pages."""
        with self._lock:
            mapped, self._map = self._map, None
        if mapped is None:
            return
        try:
            self.view.release()
            mapped.close()
        except BufferError:  # somebody kept a slice or a cast: it goes with that
            from vfiod.server.kernel.address import address_of  # here: it needs ctypes

            self._calls.blank(address_of(mapped), len(mapped))
