"""The types that many commands share: names, numbers, bytes, with their bounds."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final

from msgspec import UNSET, Meta, UnsetType

from vfiod.protocol.limits import MAX_FD_NAME, MAX_ID, MAX_TIMEOUT_MS, MAX_VECTORS

__all__ = [
    "UNSET",
    "UnsetType",
    "Id",
    "FdName",
    "RegionName",
    "IrqName",
    "Vector",
    "Address",
    "Size",
    "Milliseconds",
    "Force",
    "Uuid",
    "AnyJson",
    "DeviceState",
    "IrqMode",
    "IrqKind",
    "UUID_PATTERN",
    "ID_PATTERN",
]

# Python's "$" also matches before a final newline; "(?!\n)" takes that back, and says nothing new elsewhere.
ID_PATTERN: Final = r"^[A-Za-z][A-Za-z0-9._-]*$(?!\n)"
UUID_PATTERN: Final = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$(?!\n)"

Id = Annotated[
    str,
    Meta(
        pattern=ID_PATTERN,
        max_length=MAX_ID,
        description="An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).",
    ),
]
FdName = Annotated[
    str,
    Meta(
        min_length=1, max_length=MAX_FD_NAME, description="A file descriptor: a name given by getfd, or /dev/fdset/N."
    ),
]
RegionName = Annotated[
    int | str, Meta(description="A region: its VFIO index, or bar0 to bar5, rom, config, vga (PCI), regionN (any).")
]
IrqName = Annotated[
    int | str,
    Meta(description="An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform)."),
]
Vector = Annotated[
    int, Meta(ge=0, lt=MAX_VECTORS, description="An interrupt within its index (VFIO sub-index), from 0.")
]
Address = Annotated[int, Meta(ge=0, description="An I/O virtual address (IOVA), in bytes; below 2**64.")]
Size = Annotated[int, Meta(gt=0, description="A size, in bytes.")]
Milliseconds = Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS, description="A time, in milliseconds.")]
Force = Annotated[
    bool, Meta(description="Do it also while a hypervisor is attached to the device by an export, under its hands.")
]
Uuid = Annotated[str, Meta(pattern=UUID_PATTERN, description="A UUID in its 8-4-4-4-12 form (RFC 9562).")]
AnyJson = Any


class DeviceState(enum.StrEnum):
    """Where a device is in its life. ``unplugging`` ends in ``DEVICE_DELETED`` or ``DEVICE_UNPLUG_ERROR``."""

    REALIZING = "realizing"
    RUNNING = "running"
    UNPLUGGING = "unplugging"
    FAILED = "failed"


class IrqMode(enum.StrEnum):
    """``direct``: the kernel signals the caller's eventfd, vfiod sleeps. ``relayed``: vfiod sees each one."""

    DIRECT = "direct"
    RELAYED = "relayed"


class IrqKind(enum.StrEnum):
    """The kind of interrupt that is active on a device: one at a time on a PCI device; ``platform`` has no others."""

    NONE = "none"
    INTX = "intx"
    MSI = "msi"
    MSIX = "msix"
    PLATFORM = "platform"
