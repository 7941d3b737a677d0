"""Where a device of the kernel comes from: what ``device_add`` was told, and what the host says to that.

Everything here looks and opens; nothing here changes who is in what (that is :mod:`vfiod.server.backends.group`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final
from uuid import UUID

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.errors import Busy, InvalidArgument, PermissionRefused
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.ioctls import Advice, call, failed
from vfiod.server.kernel.kinds import group_of_fd
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs

__all__ = [
    "CONTAINER_PATH",
    "ContainerSource",
    "GroupOrigin",
    "check_bus",
    "check_class",
    "check_status",
    "find_device",
    "group_of",
    "group_path",
    "group_status",
    "open_container",
    "open_group",
    "refuse_noiommu",
    "why_not_viable",
]

NO_VM: Final = (
    "a vfio-ap device opens only once the hypervisor has associated its VM with it (KVM_DEV_VFIO_GROUP_ADD or "
    "KVM_DEV_VFIO_FILE_ADD with its group or cdev): let it do that first"
)
"""What EINVAL means when a vfio-ap device is opened (``vfio_ap_mdev_open_device``: no kvm)."""

CONTAINER_PATH: Final = "/dev/vfio/vfio"


class _DeviceClass(Struct, frozen=True):
    """What a driver takes."""

    flag: vfio.DeviceFlags
    bus: str
    words: str


_CLASSES: Final = {
    "vfio-pci": _DeviceClass(vfio.DeviceFlags.PCI, "pci", "PCI devices"),
    "vfio-platform": _DeviceClass(vfio.DeviceFlags.PLATFORM, "platform", "platform devices"),
    # Mediated devices of the kernel's: subchannels and adapters themselves (buses css, ap) are no VFIO devices.
    "vfio-ccw": _DeviceClass(vfio.DeviceFlags.CCW, "", "subchannels (mediated devices of type vfio-ccw)"),
    "vfio-ap": _DeviceClass(vfio.DeviceFlags.AP, "", "AP matrices (mediated devices of type vfio-ap)"),
}


def group_path(group: int, *, noiommu: bool) -> str:
    """``/dev/vfio/7``, ``/dev/vfio/noiommu-7``."""
    return f"/dev/vfio/{'noiommu-' if noiommu else ''}{group}"


class ContainerSource(Struct, frozen=True):
    """A container that the manager passed.

    Attributes:
        fd: a duplicate; whoever is given the source owns it.
        name: what it was called: the fd's name, or the id of the ``vfio-container`` object.
        object_id: the id, when it is an object.

    """

    fd: FileDescriptor
    name: str
    object_id: str | None = None


class GroupOrigin(Struct, frozen=True):
    """What ``device_add`` was told.

    Attributes:
        driver: ``vfio-pci``, ``vfio-platform``, ``vfio-ccw``, ``vfio-ap``.
        host: ``[[DDDD:]BB:]DD.F``, or a platform device's name; exactly one of ``host`` and ``sysfsdev``.
        sysfsdev: the device's directory in sysfs.
        group_fd: a duplicate of the group's fd, for the first device of a group.
        container: the manager's own container.
        noiommu: ``x-noiommu``: a group without an IOMMU is accepted.
        vf_token: the secret of a physical function and its virtual functions.

    """

    driver: str
    host: str | None = None
    sysfsdev: str | None = None
    group_fd: FileDescriptor | None = None
    container: ContainerSource | None = None
    noiommu: bool = False
    vf_token: UUID | None = None

    def fds(self) -> Iterator[FileDescriptor]:
        """Every fd that came with it."""
        if self.group_fd is not None:
            yield self.group_fd
        if self.container is not None:
            yield self.container.fd


# --- the device ---
def find_device(sysfs: Sysfs, origin: GroupOrigin) -> HostDevice:
    """The host device, of the class the driver takes as far as sysfs knows. Raises InvalidArgument."""
    device = sysfs.find(host=origin.host, sysfsdev=origin.sysfsdev)
    check_bus(origin.driver, device)
    return device


def check_bus(driver: str, device: HostDevice) -> None:
    """Check that the driver takes devices of this bus, as far as sysfs knows. Raises InvalidArgument."""
    wanted = _CLASSES.get(driver)
    if wanted is None:
        raise InvalidArgument(f"'{driver}' is not a valid device model name")
    if device.bus in ("", wanted.bus) or (device.bus == "mdev" and device.device_api == driver):
        return
    found = f"{device.bus} device" + (f" of type {device.device_api}" if device.device_api else "")
    raise InvalidArgument(
        f"Host device {device.name} is a {found}: driver '{driver}' takes {wanted.words}", errno="EINVAL"
    )


def check_class(driver: str, name: str, info: vfio.DeviceInfo) -> None:
    """Check what the opened device says of itself. Raises InvalidArgument."""
    wanted = _CLASSES[driver]
    if not info.flags & wanted.flag:
        flags = info.flags.name or "none"
        raise InvalidArgument(
            f"Host device {name} has the flags {flags}: driver '{driver}' takes {wanted.words}",
            errno="EINVAL",
        )


# --- the group ---
def group_of(calls: Syscalls, sysfs: Sysfs, passed: FileDescriptor | None, device: HostDevice) -> tuple[int, bool]:
    """The number of the device's group, and whether it is a noiommu group. Raises InvalidArgument."""
    found = None
    if passed is not None:
        found = group_of_fd(passed.number, calls)
        if found is None:
            raise InvalidArgument(
                "Parameter 'group-fd' is not the fd of a VFIO group: expected /dev/vfio/N, opened by the manager"
            )
    if device.group is None:
        if device.path:
            raise InvalidArgument(
                f"Host device {device.name} is in no IOMMU group: no IOMMU covers it (is one switched on in the "
                "firmware and on the kernel's command line?), and it is not bound to a vfio driver that does without",
                errno="ENODEV",
            )
        if found is None:
            raise InvalidArgument(
                f"The group of host device {device.name} is not known, because sysfs cannot be read: pass group-fd"
            )
        return found
    if found is not None and found[0] != device.group:
        raise InvalidArgument(
            f"Parameter 'group-fd' is group {found[0]}, but host device {device.name} is in group {device.group}"
        )
    return device.group, found[1] if found is not None else sysfs.is_noiommu(device.group)


def refuse_noiommu(group: int, device: HostDevice) -> PermissionRefused:
    """Say why a noiommu group is not taken just so."""
    return PermissionRefused(
        f"Group {group} of {device.name} has no IOMMU, the device could reach all memory of the host: pass "
        "x-noiommu=true to accept that",
        errno="EPERM",
    )


def open_group(calls: Syscalls, group: int, device: HostDevice, *, noiommu: bool, allowed: bool) -> FileDescriptor:
    """Open the group here. Raises PermissionRefused when that is not allowed, OperationFailed."""
    path = group_path(group, noiommu=noiommu)
    if not allowed:
        raise PermissionRefused(
            f"Host device {device.name} is in group {group}, which is not held here: pass group-fd with an fd of "
            f"{path}, or start the server with --allow-open",
            errno="EACCES",
        )
    vfio_driver = "vfio-platform" if device.bus == "platform" else "vfio-pci"
    unbound = f"bind {device.name} to {vfio_driver} first (its driver: {device.driver or 'none'})"
    advice: Advice = {
        errno.ENOENT: unbound,
        errno.ENODEV: unbound,
        errno.EBUSY: "another process holds the group",
        errno.EACCES: "this server may not open it: give its user the file, or pass group-fd",
        errno.EPERM: "a noiommu group needs CAP_SYS_RAWIO",
    }
    try:
        return FileDescriptor(calls.open(path))
    except OSError as error:
        raise failed("open", path, error, advice) from error


def group_status(calls: Syscalls, fd: FileDescriptor, group: int) -> vfio.GroupFlags:
    """``VFIO_GROUP_GET_STATUS``. Raises OperationFailed."""
    argument = bytearray(vfio.GroupStatus().pack())
    advice = {errno.ENODEV: "its devices are gone from the host"}
    call(calls, fd.number, vfio.GroupIoctl.VFIO_GROUP_GET_STATUS, argument, f"group {group}", advice)
    return vfio.GroupStatus.unpack(bytes(argument)).flags


def check_status(sysfs: Sysfs, status: vfio.GroupFlags, group: int) -> None:
    """Check that a group which came from outside can be used. Raises Busy."""
    if status & vfio.GroupFlags.CONTAINER_SET:
        raise Busy(
            f"Group {group} is in a container that is not this machine's: pass a group that is in none "
            "(VFIO_GROUP_UNSET_CONTAINER takes it out)"
        )
    if not status & vfio.GroupFlags.VIABLE:
        raise Busy(why_not_viable(sysfs, group))


def why_not_viable(sysfs: Sysfs, group: int) -> str:
    """A sentence that names the devices which keep a group from being viable."""
    culprits = sysfs.culprits(group)
    if culprits:
        return (
            f"Group {group} is not viable: bound to host drivers: {', '.join(map(str, culprits))}; unbind them, or "
            "bind them to vfio-pci or pci-stub"
        )
    return (
        f"Group {group} is not viable, though sysfs names no host driver in it: somebody else uses it, by a cdev "
        "(/dev/vfio/devices) or in another container"
    )


# --- the container ---
def open_container(calls: Syscalls) -> FileDescriptor:
    """Open a fresh container; anyone may, it is harmless alone. Raises OperationFailed."""
    none = "load the module vfio, or pass container-fd"
    denied = "this server may not open it: pass container-fd"
    advice = {errno.ENOENT: none, errno.ENODEV: none, errno.EACCES: denied, errno.EPERM: denied}
    try:
        return FileDescriptor(calls.open(CONTAINER_PATH))
    except OSError as error:
        raise failed("open", CONTAINER_PATH, error, advice) from error
