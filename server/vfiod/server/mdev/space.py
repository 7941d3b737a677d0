"""Guest memory as one mediated device sees it: addresses on one side, pieces of files on the other.

Reads and writes come from the device, on the loop's thread or a worker's; mappings change in the topology lane. The
lock makes an unmap final: when it returns, no access that began before it is still going on.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right, insort
from typing import Protocol

from msgspec import Struct

from vfiod.protocol.errors import OperationFailed
from vfiod.server.mdev.parent import DmaFault, Pin

__all__ = ["MemoryFile", "Piece", "Translation"]


class MemoryFile(Protocol):
    """The file behind guest memory (:class:`~vfiod.server.kernel.memory.SharedMemory` is one)."""

    @property
    def asks(self) -> bool:
        """Whether another program is asked for what is in it, and waited for."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or OperationFailed: the file was cut."""

    def write(self, offset: int, data: bytes) -> None:
        """All of it, or OperationFailed."""

    def pin(self, offset: int, length: int, *, writable: bool) -> Pin:
        """A part of it, mapped, until it is released; OperationFailed."""


class Piece(Struct, frozen=True):
    """A mapped piece: ``size`` bytes from address ``iova`` are those from ``offset`` of the file."""

    iova: int
    size: int
    memory: MemoryFile
    offset: int
    readonly: bool


class Translation:
    """The pieces of one device, sorted, without overlaps."""

    __slots__ = ("_far", "_lock", "_pieces", "_pins", "_starts")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._pieces: list[Piece] = []
        self._far = 0  # pieces that another program is asked for
        self._pins: list[tuple[int, int, Pin]] = []  # first and last address

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Piece) -> None:
        """Make a piece reachable. Raises OperationFailed with EEXIST when it overlaps another."""
        with self._lock:
            at = bisect_right(self._starts, piece.iova)
            before = self._pieces[at - 1] if at else None
            after = self._pieces[at] if at < len(self._pieces) else None
            if (before is not None and before.iova + before.size > piece.iova) or (
                after is not None and piece.iova + piece.size > after.iova
            ):
                raise OperationFailed("map", f"0x{piece.iova:x} ({piece.size} bytes)", errno="EEXIST")
            insort(self._starts, piece.iova)
            self._pieces.insert(at, piece)
            self._far += piece.memory.asks

    def remove(self, iova: int, size: int) -> None:
        """Take back the pieces that lie within a range. Raises OperationFailed with EINVAL rather than split one."""
        with self._lock:
            first = bisect_right(self._starts, iova)
            if first and self._pieces[first - 1].iova + self._pieces[first - 1].size > iova:
                first -= 1
            last = bisect_right(self._starts, iova + size - 1)
            inside = self._pieces[first:last]
            if inside and (inside[0].iova < iova or inside[-1].iova + inside[-1].size > iova + size):
                raise OperationFailed(
                    "unmap", f"0x{iova:x} ({size} bytes)", errno="EINVAL", advice="it would split a mapping"
                )
            del self._starts[first:last], self._pieces[first:last]
            self._far -= sum(piece.memory.asks for piece in inside)
            self._unpin(iova, iova + size - 1)

    def clear(self) -> None:
        """Take everything back."""
        with self._lock:
            self._starts.clear()
            self._pieces.clear()
            self._far = 0
            self._unpin(0, 1 << 64)

    @property
    def at_hand(self) -> bool:
        """Whether no other program is asked for any of it."""
        return not self._far

    def pin(self, iova: int, size: int, *, writable: bool) -> Pin:
        """See :meth:`Host.pin`. It is released when any of it is removed."""
        if size <= 0:
            raise OSError(errno.EINVAL, f"{size} bytes cannot be pinned")
        with self._lock:
            piece, skip = self._at(iova, 0, write=writable)
            if skip + size > piece.size:
                self._at(piece.iova + piece.size, piece.size - skip, write=writable)
                end = piece.iova + piece.size
                raise OSError(errno.EINVAL, f"a mapping ends at 0x{end:x}: what is pinned lies in one mapping")
            try:
                pin = piece.memory.pin(piece.offset + skip, size, writable=writable)
            except OperationFailed as error:
                raise OSError(getattr(errno, error.errno or "EIO", errno.EIO), error.advice) from error
            # Those that the device gave back itself are forgotten with the next one.
            self._pins = [one for one in self._pins if not one[2].released]
            self._pins.append((iova, iova + size - 1, pin))
            return pin

    @property
    def pins(self) -> int:
        """How many are pinned now."""
        return sum(not pin.released for _, _, pin in self._pins)

    def _unpin(self, first: int, last: int) -> None:
        kept = []
        for one in self._pins:
            if one[0] <= last and one[1] >= first:
                one[2].release()
            else:
                kept.append(one)
        self._pins = kept

    def read(self, iova: int, length: int) -> bytes:
        """DMA read. Raises DmaFault."""
        parts: list[bytes] = []
        done = 0
        with self._lock:
            while done < length:
                piece, skip = self._at(iova + done, done, write=False)
                chunk = min(length - done, piece.size - skip)
                try:
                    parts.append(piece.memory.read(piece.offset + skip, chunk))
                except OperationFailed as error:
                    # The file behind it was cut by whoever owns it: for the device, nothing is there any more.
                    raise DmaFault(iova + done, done, write=False) from error
                done += chunk
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, iova: int, data: memoryview) -> None:
        """DMA write. Raises DmaFault."""
        data = data.cast("B")
        done = 0
        with self._lock:
            while done < len(data):
                piece, skip = self._at(iova + done, done, write=True)
                chunk = min(len(data) - done, piece.size - skip)
                try:
                    piece.memory.write(piece.offset + skip, bytes(data[done : done + chunk]))
                except OperationFailed as error:
                    raise DmaFault(iova + done, done, write=True) from error
                done += chunk

    def _at(self, iova: int, done: int, *, write: bool) -> tuple[Piece, int]:
        at = bisect_right(self._starts, iova) - 1
        if at >= 0:
            piece = self._pieces[at]
            skip = iova - piece.iova
            if skip < piece.size:
                if write and piece.readonly:
                    raise DmaFault(iova, done, write=True, readonly=True)
                return piece, skip
        raise DmaFault(iova, done, write=write)
