"""What the host says of itself in sysfs and procfs: devices, IOMMU groups, drivers, abilities. Reads only."""

from __future__ import annotations

import os
import platform
import posixpath
import re
from typing import Final

from msgspec import Struct

from vfiod.protocol.errors import InvalidArgument, errno_name
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["GroupMember", "HostDevice", "InterruptRemapping", "Sysfs", "normalise_address"]

_ADDRESS: Final = re.compile(r"(?:(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):)?([0-9a-fA-F]{1,2})\.([0-7])")
_ADDRESS_FORM: Final = "[[DDDD:]BB:]DD.F in hexadecimal, such as 0000:01:00.0"
_LAST_SLOT: Final = 0x1F
_NAME_MAX: Final = 255
_PATH_MAX: Final = 4096
_NOIOMMU_GROUP: Final = "vfio-noiommu"  # drivers/vfio/group.c, vfio_noiommu_group_alloc

# Drivers with driver_managed_dma: they leave the group's DMA to whoever claims it (drivers/pci/pci-stub.c,
# drivers/pci/pcie/portdrv.c, every VFIO driver). VFIO's variant drivers all have "vfio" in their name.
_STUBS: Final = frozenset({"pci-stub", "pcieport"})


def normalise_address(text: str) -> str | None:
    """``01:00.0`` becomes ``0000:01:00.0``; None when it is not ``[[DDDD:]BB:]DD.F``."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return None
    domain, bus, slot, function = (int(part or "0", 16) for part in found.groups())
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function}" if slot <= _LAST_SLOT else None


def _path_bytes(text: str) -> int | None:
    """Length in bytes of what shall be part of a path; None when no path can hold it (a NUL, half a surrogate pair)."""
    try:
        return None if "\0" in text else len(text.encode())
    except UnicodeEncodeError:
        return None


class GroupMember(Struct, frozen=True):
    """One device of an IOMMU group."""

    name: str
    driver: str | None

    @property
    def blocks(self) -> bool:
        """Whether its driver keeps the group from being viable."""
        return self.driver is not None and self.driver not in _STUBS and "vfio" not in self.driver

    def __str__(self) -> str:
        return f"{self.name} ({f'driver {self.driver}' if self.driver else 'no driver'})"


class HostDevice(Struct, frozen=True):
    """A device of the host.

    Attributes:
        name: as the kernel knows it: a PCI address, a platform device's name, a UUID.
        bus: ``pci``, ``platform``, ``mdev``, ...; empty when sysfs is not readable.
        path: its directory in sysfs; empty when sysfs is not readable.
        driver: bound to it; None: none, or not known.
        group: its IOMMU group; None: it has none, or it is not known.
        device_api: of a mediated device: what it looks like (``vfio-pci``).

    """

    name: str
    bus: str = ""
    path: str = ""
    driver: str | None = None
    group: int | None = None
    device_api: str = ""


class InterruptRemapping(Struct, frozen=True):
    """Whether type1 will let a device raise messages (``iommu_group_has_isolated_msi``), as far as can be seen."""

    ok: bool
    detail: str


class Sysfs:
    """Facts from /sys and /proc.

    Args:
        calls: the system calls.

    """

    __slots__ = ("_calls",)

    def __init__(self, calls: Syscalls) -> None:
        self._calls = calls

    @property
    def readable(self) -> bool:
        """Whether there is a sysfs to ask: in a sandbox there may be none, and the kernel alone decides."""
        return self._calls.exists("/sys/bus") and self._calls.exists("/sys/kernel/iommu_groups")

    # --- devices ---
    def find(self, *, host: str | None, sysfsdev: str | None) -> HostDevice:
        """Find a device by ``host`` (``[[DDDD:]BB:]DD.F`` or a platform device's name) or by ``sysfsdev``.

        Raises:
            InvalidArgument: neither a form of either, or no such device (ENOENT).

        """
        if (host is None) == (sysfsdev is None):
            raise InvalidArgument("Parameters 'host' and 'sysfsdev': exactly one of them names the host device")
        if sysfsdev is not None:
            return self._at(sysfsdev)
        return self._named(host or "")

    def _named(self, host: str) -> HostDevice:
        size = _path_bytes(host)
        if size is None or "/" in host or host in ("", ".", ".."):
            raise InvalidArgument(f"Parameter 'host': {host!r} is not the name of a device", errno="EINVAL")
        if size > _NAME_MAX:
            raise InvalidArgument(f"Parameter 'host' is longer than {_NAME_MAX} bytes", errno="ENAMETOOLONG")
        address = normalise_address(host)
        if not self.readable:
            return HostDevice(address or host)
        if address is not None:
            path = f"/sys/bus/pci/devices/{address}"
            if not self._calls.exists(path):
                raise InvalidArgument(f"Parameter 'host': there is no host device {address} ({path})", errno="ENOENT")
            return self._describe(address, path)
        path = f"/sys/bus/platform/devices/{host}"
        if self._calls.exists(path):
            return self._describe(host, path)
        raise InvalidArgument(
            f"Parameter 'host': '{host}' is neither a PCI address ({_ADDRESS_FORM}) nor a platform device of this host",
            errno="ENOENT",
        )

    def _at(self, sysfsdev: str) -> HostDevice:
        size = _path_bytes(sysfsdev)
        if size is None or not sysfsdev.startswith("/"):
            raise InvalidArgument(
                f"Parameter 'sysfsdev' expects the absolute path of a device in sysfs, got {sysfsdev!r}", errno="EINVAL"
            )
        if size >= _PATH_MAX:
            raise InvalidArgument(f"Parameter 'sysfsdev' is longer than {_PATH_MAX - 1} bytes", errno="ENAMETOOLONG")
        if not self.readable:
            return HostDevice(posixpath.basename(sysfsdev.rstrip("/")))
        try:
            path = self._calls.real_path(sysfsdev)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            name = errno_name(error.errno or 0) if isinstance(error, OSError) else "ELOOP"
            raise InvalidArgument(f"Parameter 'sysfsdev': {sysfsdev} cannot be found ({name})", errno=name) from error
        if not path.startswith("/sys/") or not self._calls.exists(f"{path}/subsystem"):
            raise InvalidArgument(f"Parameter 'sysfsdev': {sysfsdev} is not a device in sysfs", errno="ENODEV")
        return self._describe(posixpath.basename(path), path)

    def behind_cdev(self, cdev: str, number: int) -> HostDevice:
        """The device behind a cdev, by its device number; known by the cdev's name when sysfs does not say."""
        link = f"/sys/dev/char/{os.major(number)}:{os.minor(number)}/device"
        try:
            path = self._calls.real_path(link)
        except (OSError, RuntimeError):
            return HostDevice(cdev)
        return self._describe(posixpath.basename(path), path)

    def cdev_of(self, device: HostDevice) -> str | None:
        """``vfio3``: the name of a device's cdev; None: it has none, or it is not known."""
        try:
            names = self._calls.list_directory(f"{device.path}/vfio-dev") if device.path else ()
        except OSError:
            return None
        return names[0] if names else None

    def _describe(self, name: str, path: str) -> HostDevice:
        group = self._link_name(f"{path}/iommu_group")
        api = self._text(f"{path}/mdev_type/device_api")
        return HostDevice(
            name=name,
            bus=self._link_name(f"{path}/subsystem") or "",
            path=path,
            driver=self._link_name(f"{path}/driver"),
            group=int(group) if group is not None and group.isdecimal() else None,
            device_api=api or "",
        )

    def reset_methods(self, device: HostDevice) -> str | None:
        """How the kernel would reset a PCI device: ``flr bus``; empty: it cannot; None: not known."""
        methods = self._text(f"{device.path}/reset_method")  # since Linux 5.15
        if methods is not None:
            return methods
        if device.bus != "pci" or not device.path:
            return None
        return "some method" if self._calls.exists(f"{device.path}/reset") else ""

    def compatible(self, name: str) -> tuple[str, ...] | None:
        """What a platform device is, best first, by the device tree; None: no node there is seen."""
        text = self._text(f"/sys/bus/platform/devices/{name}/of_node/compatible")
        return None if text is None else tuple(one for one in text.split("\0") if one)

    def is_virtual_function(self, address: str) -> bool:
        """Whether a PCI function is a virtual one of SR-IOV, as far as sysfs says."""
        return self._calls.exists(f"/sys/bus/pci/devices/{address}/physfn")

    # --- groups ---
    def members(self, group: int) -> tuple[GroupMember, ...]:
        """Return the devices of an IOMMU group and their drivers; empty when sysfs does not say."""
        base = f"/sys/kernel/iommu_groups/{group}/devices"
        try:
            names = self._calls.list_directory(base)
        except OSError:
            return ()
        return tuple(GroupMember(name, self._link_name(f"{base}/{name}/driver")) for name in names)

    def culprits(self, group: int) -> tuple[GroupMember, ...]:
        """Return the devices whose host drivers keep a group from being viable."""
        return tuple(member for member in self.members(group) if member.blocks)

    def is_noiommu(self, group: int) -> bool:
        """Whether VFIO made this group for a device that no IOMMU covers."""
        return self._text(f"/sys/kernel/iommu_groups/{group}/name") == _NOIOMMU_GROUP

    # --- abilities ---
    def interrupt_remapping(self) -> InterruptRemapping:
        """Whether messages of devices are isolated from each other.

        The kernel has no file that says so. x86 names its interrupt chips with the prefix ``IR-`` when remapping
        is on (``drivers/iommu/intel/irq_remapping.c``, ``drivers/iommu/amd/iommu.c``); elsewhere the interrupt
        controllers isolate messages.
        """
        if platform.machine() not in ("x86_64", "i686"):
            return InterruptRemapping(True, "the interrupt controllers of this architecture isolate messages")
        if self._text("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") == "Y":
            return InterruptRemapping(True, "vfio_iommu_type1 allows unsafe interrupts (allow_unsafe_interrupts=Y)")
        interrupts = self._text("/proc/interrupts")
        if interrupts is None:
            return InterruptRemapping(True, "not known: /proc/interrupts cannot be read")
        if " IR-" in interrupts:
            return InterruptRemapping(True, "interrupt remapping is on")
        return InterruptRemapping(
            False,
            "interrupt remapping is off, VFIO_SET_IOMMU would fail with EPERM: switch it on in the firmware, or load "
            "vfio_iommu_type1 with allow_unsafe_interrupts=1 if every guest is trusted",
        )

    def mapping_limit(self) -> str | None:
        """``dma_entry_limit`` of type1: how many mappings a container takes."""
        return self._text("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")

    # --- reading ---
    def _text(self, path: str) -> str | None:
        try:
            return self._calls.read_text(path).strip()
        except OSError:
            return None

    def _link_name(self, path: str) -> str | None:
        """Return the last component of where a link points."""
        try:
            return posixpath.basename(self._calls.read_link(path))
        except OSError:
            return None
