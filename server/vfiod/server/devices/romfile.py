"""A file that stands in for a device's ROM (``romfile``)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.devices.rom import MAX_ROM

__all__ = ["RomFile"]

T = TypeVar("T")


class RomFile:
    """One file, checked, and read when the device is opened. Owns the fd.

    Args:
        name: as it was given, for messages.
        fd: the file; the object owns it from here on, whatever the constructor raises.

    Raises:
        InvalidArgument: no plain file, an empty one, or one that no ROM can be.

    """

    def __init__(self, name: str, fd: FileDescriptor) -> None:
        self.name = name
        self._fd: FileDescriptor | None = fd
        self._image: bytes | None = None
        found = os.fstat(fd.number)
        wrong = None
        if not stat.S_ISREG(found.st_mode):
            wrong = "is no plain file"
        elif not 0 < found.st_size <= MAX_ROM:
            wrong = f"has {found.st_size} bytes; a ROM has 1 to {MAX_ROM}"
        if wrong:
            fd.close()
            raise InvalidArgument(f"Parameter 'romfile': '{name}' {wrong}")
        self.size = found.st_size

    @classmethod
    def of(cls, name: str, image: bytes) -> RomFile:
        """One that was read already, by another process."""
        made = cls.__new__(cls)
        made.name, made.size, made._fd, made._image = name, len(image), None, image
        return made

    @property
    def image(self) -> bytes:
        """Its bytes, once they are read."""
        if self._image is None:
            raise RuntimeError("A romfile is read before it is used")
        return self._image

    def read(self) -> None:
        """Read it, and close it. Blocks; in a worker. OperationFailed."""
        if self._fd is None:
            return
        parts: list[bytes] = []
        done = 0
        try:
            while done < self.size and (part := os.pread(self._fd.number, self.size - done, done)):
                parts.append(part)
                done += len(part)
        except OSError as error:
            raise OperationFailed("read", f"romfile '{self.name}'", errno=error.errno or 0) from error
        finally:
            self.close()
        self._image = b"".join(parts)

    def before(self, action: Callable[[str], T], otherwise: Callable[[], None]) -> Callable[[str], T]:
        """What reads the file and then acts; when reading fails, ``otherwise`` is called and the failure raised."""

        def both(argument: str) -> T:
            try:
                self.read()
            except BaseException:
                otherwise()
                raise
            return action(argument)

        return both

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        if self._fd is not None:
            self._fd.close()
