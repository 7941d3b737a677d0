"""Which files, ports, sockets and processes stay reachable: Landlock's rights (``<linux/landlock.h>``), as values.

Whatever a kernel can forbid is forbidden, and what is needed then allowed again, path by path. Files that are open
already, and those that arrive by a socket, are not affected: that is how the manager gives this process its devices.
"""

from __future__ import annotations

import struct
from typing import Final

from msgspec import Struct

__all__ = ["BIND_TCP", "KEEP", "MAKE", "READ", "READ_WRITE", "Rule", "USE_DEVICE", "file_rights", "ruleset"]

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE_FILE: Final = 1 << 5
_MAKE_FILE: Final = 1 << 8
_MAKE_SOCK: Final = 1 << 9
_MAKE_SYM: Final = 1 << 12
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15

READ: Final = _READ_FILE | _READ_DIR
"""Read files and directories; execute none."""

READ_WRITE: Final = READ | _WRITE_FILE
"""Write existing files too."""

KEEP: Final = READ_WRITE | _TRUNCATE | _MAKE_FILE | _MAKE_SOCK | _MAKE_SYM | _REMOVE_FILE
"""Read, write, make and remove files, sockets and symbolic links."""

MAKE: Final = _READ_DIR | _REMOVE_FILE | _MAKE_SOCK | _MAKE_SYM
"""Make sockets and symbolic links, and remove them."""

USE_DEVICE: Final = READ_WRITE | _IOCTL_DEV
"""Open device nodes, and make their ioctls."""

BIND_TCP: Final = 1 << 0
"""LANDLOCK_ACCESS_NET_BIND_TCP."""

_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""The rights that a rule for a single file may name."""

_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1

# Rights to files per ABI version: 1 has 13, REFER, TRUNCATE, IOCTL_DEV came later.
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NOW: Final = 16
_NET_ABI: Final = 4
_SCOPE_ABI: Final = 6


class Rule(Struct, frozen=True):
    """What stays allowed at a path and everything beneath it."""

    path: str
    rights: int


def ruleset(abi: int) -> bytes:
    """``struct landlock_ruleset_attr`` that forbids all this version of the ABI can."""
    attributes = struct.pack("=Q", (1 << _FS_BITS.get(abi, _FS_BITS_NOW)) - 1)
    if abi >= _NET_ABI:
        attributes += struct.pack("=Q", 0b11)
    if abi >= _SCOPE_ABI:
        attributes += struct.pack("=Q", _ABSTRACT_SOCKETS | _SIGNALS)
    return attributes


def file_rights(rights: int, abi: int, *, directory: bool) -> int:
    """Return those of the rights that this ABI version knows, and that a file, or a directory, can have."""
    known = rights & (1 << _FS_BITS.get(abi, _FS_BITS_NOW)) - 1
    return known if directory else known & _OF_FILES
