"""A text in shared memory that is there whole, the old or the new one, whenever its writer is killed.

Two memory files, written in turn; each begins with a page of its own::

    offset  bytes
         0      8  magic
         8      8  number of the text: the higher of two valid ones counts
        16      8  bytes of the text, which begins at offset 4096
        24      4  CRC-32 of number, length and text
        28      4  how often a server has tried to begin with it

A text is written below an invalid head, then its head. Whoever dies in between leaves the other one. Native byte order:
they never leave the machine, nor outlive its kernel.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Final

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.fd import FileDescriptor

__all__ = ["COUNT", "Slots", "SlotError"]

COUNT: Final = 2
"""Files of a text."""

MOST_BYTES: Final = 64 << 20
"""Of one text: a state of 4,096 devices takes a tenth of it."""

TRIED_ENOUGH: Final = (1 << 32) - 2
"""Tries are counted so far."""

_NEVER: Final = 1 << 63
"""A number that no server comes to: what bears it was not written by one, and the next would not fit."""

_MAGIC: Final = b"vfiodst1"
_HEAD: Final = struct.Struct("=8sQQII")
_SEALED: Final = struct.Struct("=QQ")
_TRIES_AT: Final = 28
_TRIES: Final = struct.Struct("=I")
_TEXT_AT: Final = 4096


class SlotError(VfiodError):
    """Memory that came from elsewhere is none of this kind, or could not be written."""


class Slots:
    """Two memory files. They belong to the object; :meth:`close` closes them.

    Args:
        files: both, or none: then they are made. Raises SlotError; OSError (EMFILE, ENOMEM).

    """

    def __init__(self, files: list[FileDescriptor] | None = None) -> None:
        if files is None:
            files = []
            try:
                for number in range(COUNT):
                    files.append(FileDescriptor(os.memfd_create(f"vfiod-state-{number}", os.MFD_CLOEXEC)))
            except BaseException:
                for made in files:
                    made.close()
                raise
        if len(files) != COUNT:
            for one in files:
                one.close()
            raise SlotError(f"A state has {COUNT} files, {len(files)} came")
        self.files: Final = tuple(files)
        self._place: int | None = None
        self._number = 0
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> None:
        for place in range(COUNT):
            found = self._read(place)
            if found is not None and (self._place is None or found[0] > self._number):
                self._place, self._number = place, found[0]

    def _read(self, place: int) -> tuple[int, bytes] | None:
        """Number and text of a file; None: it has none that is whole."""
        fd = self.files[place].number
        head = _pread(fd, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            return None
        magic, number, length, check, _ = _HEAD.unpack(head)
        if magic != _MAGIC or length > MOST_BYTES or number >= _NEVER:
            return None
        text = _pread(fd, length, _TEXT_AT)
        if len(text) != length or _check(number, text) != check:
            return None
        return number, text

    def read(self) -> bytes | None:
        """The last text that was written whole; None: there is none. Raises SlotError."""
        found = None if self._place is None else self._read(self._place)
        return None if found is None else found[1]

    def write(self, text: bytes) -> None:
        """Replace it: who is killed in between leaves the former one. Raises SlotError; then that stays, too."""
        if len(text) > MOST_BYTES:
            raise SlotError(f"A state of {len(text)} bytes is too long: at most {MOST_BYTES}")
        place = 0 if self._place is None else 1 - self._place
        number = self._number + 1
        fd = self.files[place].number
        try:
            os.pwrite(fd, bytes(_HEAD.size), 0)
            done = 0
            while done < len(text):
                done += os.pwrite(fd, memoryview(text)[done:], _TEXT_AT + done)
            os.pwrite(fd, _HEAD.pack(_MAGIC, number, len(text), _check(number, text), 0), 0)
        except OSError as error:
            raise SlotError(f"The state cannot be written: {os.strerror(error.errno or 0)}") from error
        self._place, self._number = place, number

    def clear(self) -> None:
        """There is none any more. Never raises: memory that is there can be overwritten."""
        for one in self.files:
            os.pwrite(one.number, bytes(_HEAD.size), 0)
        self._place = None

    def try_again(self) -> int:
        """Note that a server begins with the text there is. Returns how often one has, this one included. SlotError."""
        if self._place is None:
            return 0
        fd = self.files[self._place].number
        (tries,) = _TRIES.unpack(_pread(fd, _TRIES.size, _TRIES_AT))
        tries = min(int(tries), TRIED_ENOUGH) + 1
        try:
            os.pwrite(fd, _TRIES.pack(tries), _TRIES_AT)
        except OSError as error:
            raise SlotError(f"The state cannot be written: {os.strerror(error.errno or 0)}") from error
        return tries

    def close(self) -> None:
        """Close both files; in a store they live on."""
        for one in self.files:
            one.close()


def _pread(fd: int, length: int, offset: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:  # no memory to bring back what was swapped out, or the swap is broken
        raise SlotError(f"The state cannot be read: {os.strerror(error.errno or 0)}") from error


def _check(number: int, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(_SEALED.pack(number, len(text))))
