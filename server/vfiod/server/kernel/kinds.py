"""What an fd is, found by looking at it. The caller's word counts for nothing.

Numbers of ioctls mean different things on different fds (``vfiod.protocol.vfio.ioctl``), so nothing is done to an
fd before its kind is known, and the kind comes from what nobody can forge: the inode's type, the device number
that sysfs gives a name to, the kernel's own name of an anonymous inode.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from typing import Final

from msgspec import Struct

from vfiod.protocol.fd import FdKind
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["Cdev", "cdev_of_fd", "device_node", "group_of_fd", "kind_of"]

_CONTAINER_DEVICE: Final = os.makedev(10, 196)
"""Misc device, ``VFIO_MINOR`` (``<linux/miscdevice.h>``): the one VFIO file whose number never changes."""

_GROUP_NODE: Final = re.compile(r"vfio/(noiommu-)?([0-9]{1,9})")
_CDEV_NODE: Final = re.compile(r"vfio/devices/(vfio[0-9]{1,9})")

_FIRST_DYNAMIC_MAJOR: Final = 234
_MISC_MAJOR: Final = 10
"""Majors below 234 are assigned for ever (``Documentation/admin-guide/devices.txt``; ``CHRDEV_MAJOR_DYN_END`` of
``<linux/fs.h>``). VFIO's groups and cdevs have dynamic ones (``alloc_chrdev_region``), and /dev/iommu a dynamic minor
of the misc devices. So of any other assigned major nothing need be asked. What a dynamic number means is asked each
time and never kept: once the last file is closed, the kernel gives the number to something else."""

_ANONYMOUS: Final = "anon_inode:"
_ANONYMOUS_KINDS: Final = {"anon_inode:[eventfd]": FdKind.EVENTFD, "anon_inode:[vfio-device]": FdKind.VFIO_DEVICE}
_KINDS: Final = {stat.S_IFIFO: FdKind.PIPE, stat.S_IFDIR: FdKind.DIRECTORY, stat.S_IFBLK: FdKind.BLOCK_DEVICE}

_real: Final = Syscalls()


def kind_of(fd: int, calls: Syscalls = _real) -> FdKind:
    """Look at an open fd. Raises OSError (EBADF) when it is not open."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return FdKind.UNKNOWN  # the name of a file, not an open one: nothing can be done with it (open(2))
    # Eventfds first, because most fds are: all anonymous inodes look the same to fstat, and it need not be asked.
    link = calls.link_of(fd)
    if link.startswith(_ANONYMOUS):
        return _ANONYMOUS_KINDS.get(link, FdKind.UNKNOWN)
    status = calls.fstat(fd)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        return FdKind.MEMFD if link.startswith("/memfd:") and status.st_nlink == 0 else FdKind.FILE
    if kind == stat.S_IFSOCK:
        return _kind_of_socket(fd)
    if kind == stat.S_IFCHR:
        return _kind_of_device(calls, fd, status.st_rdev, link)
    return _KINDS.get(kind, FdKind.UNKNOWN)


def _kind_of_socket(fd: int) -> FdKind:
    # Given its family, the object asks the kernel nothing by itself; it borrows the fd and never closes it.
    borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        listening = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    finally:
        borrowed.detach()
    return FdKind.LISTENING_SOCKET if listening else FdKind.SOCKET


def _kind_of_device(calls: Syscalls, fd: int, device: int, link: str) -> FdKind:
    if device == _CONTAINER_DEVICE:
        # iommufd may stand in for it behind the same number (CONFIG_IOMMUFD_VFIO_CONTAINER); it answers alike.
        return FdKind.VFIO_CONTAINER if _is_container(calls, fd) else FdKind.CHARACTER_DEVICE
    major = os.major(device)
    if major < _FIRST_DYNAMIC_MAJOR and major != _MISC_MAJOR:
        return FdKind.CHARACTER_DEVICE
    node = device_node(calls, device, link)
    if _GROUP_NODE.fullmatch(node):
        return FdKind.VFIO_GROUP
    if _CDEV_NODE.fullmatch(node):
        return FdKind.VFIO_DEVICE
    return FdKind.IOMMUFD if node == "iommu" else FdKind.CHARACTER_DEVICE


def _is_container(calls: Syscalls, fd: int) -> bool:
    from vfiod.protocol.vfio import VFIO_API_VERSION, ContainerIoctl  # later: see Machine

    try:
        return calls.ioctl(fd, ContainerIoctl.VFIO_GET_API_VERSION) >= VFIO_API_VERSION
    except OSError:
        return False


def device_node(calls: Syscalls, device: int, link: str) -> str:
    """The kernel's own name of a character device, below /dev: ``vfio/7``, ``iommu``; empty when unknown.

    Args:
        calls: the system calls.
        device: ``st_rdev``.
        link: what /proc says the file was opened as: used only where sysfs is not there to ask.

    """
    try:
        text = calls.read_text(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/uevent")
    except OSError:
        return link.removeprefix("/dev/") if link.startswith("/dev/") else ""
    for line in text.splitlines():
        if line.startswith("DEVNAME="):
            return line.removeprefix("DEVNAME=")
    return ""


def group_of_fd(fd: int, calls: Syscalls) -> tuple[int, bool] | None:
    """The number of the group an fd opens, and whether it is a noiommu group; None when it is not a group."""
    status = calls.fstat(fd)
    if not stat.S_ISCHR(status.st_mode):
        return None
    found = _GROUP_NODE.fullmatch(device_node(calls, status.st_rdev, calls.link_of(fd)))
    return (int(found[2]), found[1] is not None) if found else None


class Cdev(Struct, frozen=True):
    """A VFIO device's own file.

    Attributes:
        name: ``vfio3``.
        number: its device number (``st_rdev``).

    """

    name: str
    number: int


def cdev_of_fd(fd: int, calls: Syscalls) -> Cdev | None:
    """The cdev an fd opens; None when it is not one (a device fd that came out of a group is none)."""
    status = calls.fstat(fd)
    if not stat.S_ISCHR(status.st_mode):
        return None
    found = _CDEV_NODE.fullmatch(device_node(calls, status.st_rdev, calls.link_of(fd)))
    return Cdev(found[1], status.st_rdev) if found else None
