"""A device's ROM: read once from the device, or a file in its place.

Follows QEMU ``hw/vfio/pci.c`` (``vfio_pci_load_rom``): it is read until it is full or nothing more comes; what is
missing reads as ones, as an erased chip does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from vfiod.protocol.errors import OperationFailed
from vfiod.server.backends.base import Backend

__all__ = ["MAX_ROM", "Rom", "read_rom"]

_log: Final = logging.getLogger(__name__)

MAX_ROM: Final = 16 << 20
"""Bytes of a file that stands in for a ROM. PCI 3.0, 6.2.5.2: no device may ask for more than 16 MiB."""

_CHUNK: Final = 1 << 16
_TRIES: Final = 100
_PAUSE_S: Final = 0.01
"""A device that says EAGAIN is asked again for a second in all: longer and it is not going to answer."""

_AGAIN: Final = frozenset({"EINTR", "EAGAIN"})


class Rom:
    """What the guest reads of a ROM.

    Args:
        size: bytes of it.
        source: gives its bytes, called once, when they are first needed; may block, and raise OperationFailed.

    """

    def __init__(self, size: int, source: Callable[[], bytes]) -> None:
        self.size = size
        self._source = source
        self._image: bytes | None = None

    @property
    def loaded(self) -> bool:
        """Whether its bytes are here."""
        return self._image is not None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of it. The first time it may block: in a worker. OperationFailed: nothing of it can be read now."""
        if self._image is None:
            self._image = self._source().ljust(self.size, b"\xff")
        return self._image[offset : offset + length]


def read_rom(backend: Backend, index: int, size: int) -> bytes:
    """Read a ROM until it is full or nothing more comes. Raises OperationFailed when it cannot be read at all."""
    parts: list[bytes] = []
    done = tries = 0
    while done < size:
        try:
            part = backend.region_read_some(index, done, min(_CHUNK, size - done))
        except OperationFailed as error:
            tries += 1
            if error.errno in _AGAIN and tries < _TRIES:
                time.sleep(_PAUSE_S)
                continue
            if not done:
                raise
            _log.warning("%s: its ROM ends at byte %d of %d: %s", backend.name, done, size, error)
            break
        if not part:
            break
        tries = 0
        parts.append(part)
        done += len(part)
    return b"".join(parts)
