"""Where a device of a cdev comes from: what ``device_add`` was told, and what the host says to that.

Everything here looks and opens; nothing here changes who is bound to what (:mod:`vfiod.server.backends.cdev`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.errors import InvalidArgument, PermissionRefused
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.ioctls import Advice, failed
from vfiod.server.backends.origin import check_bus
from vfiod.server.kernel.kinds import cdev_of_fd
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs

__all__ = ["CdevOrigin", "IommufdSource", "find_cdev", "is_bound", "open_cdev"]

CDEV_FOLDER: Final = "/dev/vfio/devices"


@dataclass(frozen=True, slots=True)
class IommufdSource:
    """The ``iommufd`` object to bind to.

    Attributes:
        object_id: its id.
        fd: its fd, lent: the object stays while devices refer to it.

    """

    object_id: str
    fd: FileDescriptor


class CdevOrigin(Struct, frozen=True):
    """What ``device_add`` was told.

    Attributes:
        driver: ``vfio-pci``.
        iommufd: what to bind to.
        fd: a duplicate of the cdev's fd; None: opened here, found by ``host`` or ``sysfsdev``.
        host: as for groups.
        sysfsdev: as for groups.
        vf_token: the secret of a physical function and its virtual functions.

    """

    driver: str
    iommufd: IommufdSource
    fd: FileDescriptor | None = None
    host: str | None = None
    sysfsdev: str | None = None
    vf_token: UUID | None = None

    def fds(self) -> Iterator[FileDescriptor]:
        """Every fd that came with it."""
        if self.fd is not None:
            yield self.fd


def find_cdev(calls: Syscalls, sysfs: Sysfs, origin: CdevOrigin) -> HostDevice:
    """The host device behind a cdev, or named. Raises InvalidArgument.

    Without sysfs a cdev is known by its own name (``vfio3``) only.
    """
    if origin.fd is None:
        device = sysfs.find(host=origin.host, sysfsdev=origin.sysfsdev)
    else:
        cdev = cdev_of_fd(origin.fd.number, calls)
        if cdev is None:
            raise InvalidArgument(
                "Parameter 'fd' is not the fd of a cdev: expected /dev/vfio/devices/vfioN, opened by the manager (a "
                "device fd that came out of a group cannot be bound to an iommufd: pass the group, by 'group-fd')"
            )
        device = sysfs.behind_cdev(cdev.name, cdev.number)
    check_bus(origin.driver, device)
    return device


def is_bound(calls: Syscalls, fd: FileDescriptor) -> bool:
    """Whether a cdev's open file is bound to an iommufd: before that, the device tells nothing (EINVAL)."""
    layout = vfio.DeviceInfo.LAYOUT
    try:
        calls.ioctl(fd.number, vfio.DeviceIoctl.VFIO_DEVICE_GET_INFO, bytearray(layout.pack(layout.size, 0, 0, 0)))
    except OSError:
        return False
    return True


def open_cdev(calls: Syscalls, sysfs: Sysfs, device: HostDevice, *, allowed: bool) -> FileDescriptor:
    """Open the cdev of a device here.

    Raises PermissionRefused when that is not allowed, InvalidArgument, OperationFailed.
    """
    name = sysfs.cdev_of(device)
    if name is None:
        raise InvalidArgument(
            f"Host device {device.name} has no cdev: bind it to vfio-pci (its driver: {device.driver or 'none'}), on a "
            "kernel with CONFIG_VFIO_DEVICE_CDEV; a device without an IOMMU has none",
            errno="ENODEV",
        )
    path = f"{CDEV_FOLDER}/{name}"
    if not allowed:
        raise PermissionRefused(
            f"Host device {device.name} has the cdev {path}: pass 'fd' with an fd of it, or start the server with "
            "--allow-open",
            errno="EACCES",
        )
    advice: Advice = {
        errno.ENOENT: "the host has no such file: is /dev the host's?",
        errno.EACCES: "this server may not open it: give its user the file, or pass 'fd'",
    }
    try:
        return FileDescriptor(calls.open(path))
    except OSError as error:
        raise failed("open", path, error, advice) from error
