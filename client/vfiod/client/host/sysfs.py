"""What sysfs says about PCI devices and their IOMMU groups.

Sources: ``Documentation/ABI/testing/sysfs-bus-pci`` (driver_override, reset_method, sriov_*),
``sysfs-kernel-iommu_groups``, ``Documentation/driver-api/vfio.rst`` (viability).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vfiod.client.errors import ClientError
from vfiod.client.host.attributes import read_link, read_names, read_text
from vfiod.client.host.names import PciNames, system_names
from vfiod.client.host.usage import Usage
from vfiod.protocol.errors import errno_name

__all__ = ["HostDevice", "HostError", "HostGroup", "Sysfs", "normal_address"]

ADDRESS: Final = re.compile(r"^(?:(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):)?([0-9a-fA-F]{1,2})\.([0-7])$")
#: Drivers that leave a group viable (drivers/vfio/vfio_main.c, and bridges' port driver).
HARMLESS: Final = frozenset({"pci-stub", "pcieport", "shpchp"})
BRIDGE: Final = 0x06
ADVICE: Final = {
    "EACCES": "this needs root",
    "EPERM": "this needs root, and a kernel that is not locked down",
    "EROFS": "sysfs is mounted read-only here: run it on the host, not in a container",
    "ENODEV": "the driver refuses the device",
    "EBUSY": "the device is in use",
}


class HostError(ClientError):
    """The host does not have it, or does not let us. The text says what to do."""


def normal_address(text: str) -> str:
    """``[[DDDD:]BB:]DD.F`` as sysfs writes it: ``0000:03:00.0``. Raises HostError."""
    match = ADDRESS.match(text.strip())
    if match is None or int(match[3], 16) > 0x1F:
        raise HostError(f"A PCI address is [[DDDD:]BB:]DD.F in hexadecimal, such as 0000:03:00.0; got '{text}'")
    domain, bus, slot, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{int(bus or '0', 16):02x}:{int(slot, 16):02x}.{function}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDevice:
    """One PCI function.

    Attributes:
        address: ``DDDD:BB:DD.F``.
        vendor_id, device_id: 16 bits. kind: the class, in words. name: vendor and device, in words or numbers.
        bridge: a bridge of any kind: it is never given to VFIO, and does not make its group unviable.
        driver: what it is bound to; None: nothing.
        override: ``driver_override``; None: none.
        group: IOMMU group; None: no IOMMU stands before it.
        iommu: the IOMMU's name (``dmar0``), where the kernel tells.
        reset_methods: how the kernel can reset it alone (``flr``, ``bus``, ...); empty: it cannot.
        numa_node: None when there is one node only.
        vfio_device: the name under ``/dev/vfio/devices``, once bound to VFIO.
        physical_function: for a virtual function, the address it belongs to.
        virtual_functions: of a physical function, how many are enabled; None: it has no SR-IOV.
        max_virtual_functions: how many it could have.
        vf_token: whether adding it takes a VF token: it, or its physical function, is VFIO's and shares state.
        used_by: what on this host would lose it: ``network interface eth0 (up)``, ``/home is mounted from sda1``.

    """

    address: str
    vendor_id: int
    device_id: int
    kind: str
    name: str
    bridge: bool
    driver: str | None
    override: str | None
    group: int | None
    iommu: str | None
    reset_methods: tuple[str, ...]
    numa_node: int | None
    vfio_device: str | None
    physical_function: str | None
    virtual_functions: int | None
    max_virtual_functions: int | None
    vf_token: bool
    used_by: tuple[str, ...]

    @property
    def blocks_group(self) -> bool:
        """Whether its driver keeps the group from VFIO."""
        return (
            not self.bridge and self.driver is not None and not vfio_driver(self.driver) and self.driver not in HARMLESS
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGroup:
    """One IOMMU group: what VFIO gives away as a whole.

    Attributes:
        number: the group's; its VFIO file is ``/dev/vfio/NUMBER`` (``noiommu-NUMBER`` without an IOMMU).
        type: the kernel's default domain (``DMA``, ``identity``), where readable.
        devices: the addresses in it.
        blockers: ``address (driver)`` of the devices that make it unviable.
        noiommu: made by vfio's unsafe no-IOMMU mode.

    """

    number: int
    type: str | None
    devices: tuple[str, ...]
    blockers: tuple[str, ...]
    noiommu: bool


def vfio_driver(name: str) -> bool:
    """Whether a driver is one of VFIO's: ``vfio-pci``, or a variant such as ``mlx5_vfio_pci``."""
    return name.startswith(("vfio-", "vfio_")) or name.endswith(("-vfio-pci", "_vfio_pci", "_vfio"))


class Sysfs:
    """One sysfs tree.

    Args:
        root: ``/sys``, or a copy of one.
        names: names for ids; default: the host's ``pci.ids``.
        mountinfo: what is mounted (``proc(5)``); consulted for the real ``/sys`` only, unless given.
        proc: who has what open; the same.

    """

    def __init__(
        self,
        root: Path | str = "/sys",
        *,
        names: PciNames | None = None,
        mountinfo: Path | None = None,
        proc: Path | None = None,
    ) -> None:
        self.root = Path(root)
        self.names = names or system_names()
        real = self.root.resolve() == Path("/sys")
        proc = proc or (Path("/proc") if real else None)
        self._usage = Usage(self.root, mountinfo or (proc / "self/mountinfo" if proc else None), proc)

    @property
    def bus(self) -> Path:
        """The PCI bus."""
        return self.root / "bus/pci"

    def path(self, address: str) -> Path:
        """A device's directory. Raises HostError when there is no such device."""
        address = normal_address(address)
        path = self.bus / "devices" / address
        if not path.exists():
            raise HostError(f"There is no PCI device {address} ({path} does not exist); 'vfiod host list' shows them")
        return path

    def devices(self) -> Iterator[HostDevice]:
        """Every PCI function, lowest address first. Those that vanish meanwhile are passed over."""
        try:
            addresses = sorted(path.name for path in (self.bus / "devices").iterdir())
        except OSError as error:
            raise HostError(f"Cannot read {self.bus / 'devices'}: {errno_name(error.errno or 0)}") from error
        for address in addresses:
            try:
                yield self.device(address)
            except (HostError, ValueError):
                continue

    def device(self, address: str) -> HostDevice:
        """One PCI function. Raises HostError."""
        path = self.path(address)
        vendor, device = (_hexadecimal(path / name) for name in ("vendor", "device"))
        code = _hexadecimal(path / "class")
        vendor_name = self.names.vendor(vendor)
        device_name = self.names.device(vendor, device)
        node = read_text(path / "numa_node")
        group = read_link(path / "iommu_group")
        methods = read_text(path / "reset_method")
        driver, parent = read_link(path / "driver"), read_link(path / "physfn")
        enabled, possible = (_number(path / name) for name in ("sriov_numvfs", "sriov_totalvfs"))
        sharer = read_link(path / "physfn/driver") if parent else driver if enabled else None
        return HostDevice(
            address=path.name,
            vendor_id=vendor,
            device_id=device,
            kind=self.names.kind(code),
            name=" ".join([vendor_name or f"{vendor:04x}", device_name or f"{device:04x}"]),
            bridge=code >> 16 == BRIDGE,
            driver=driver,
            override=_override(path),
            group=int(group) if group is not None and group.isdigit() else None,
            iommu=read_link(path / "iommu"),
            reset_methods=tuple((methods or "").split()) or (("unknown",) if _needs_method(path, methods) else ()),
            numa_node=int(node) if node is not None and node.isdigit() else None,
            vfio_device=next(iter(read_names(path / "vfio-dev")), None),
            physical_function=parent,
            virtual_functions=enabled,
            max_virtual_functions=possible,
            vf_token=sharer is not None and vfio_driver(sharer),
            used_by=tuple(self._usage.users(path)),
        )

    def holders(self, device: HostDevice) -> tuple[str, ...]:
        """Processes, other than this one, that have a device open by its VFIO group or its cdev."""
        if not vfio_driver(device.driver or ""):
            return ()
        names = [f"/dev/vfio/{prefix}{device.group}" for prefix in ("", "noiommu-") if device.group is not None]
        names += [f"/dev/vfio/devices/{device.vfio_device}"] if device.vfio_device else []
        return self._usage.holders(frozenset(names))

    def write(self, path: Path, text: str) -> None:
        """One write to an attribute that exists. Raises HostError with the errno's name and what to do."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)  # never creates: a typo must not become a file
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            name = errno_name(error.errno or 0)
            advice = f": {ADVICE[name]}" if name in ADVICE else ""
            raise HostError(f"Writing '{text.strip()}' to {path} failed with {name}{advice}") from error

    def bridge_above(self, address: str) -> str | None:
        """The bridge that leads to a function, by its address; None: it stands on a root bus. Raises HostError."""
        above = self.path(address).resolve().parent.name
        return above if ADDRESS.match(above) else None

    def groups(self) -> Iterator[HostGroup]:
        """Every IOMMU group, by number."""
        for number in sorted(int(name) for name in read_names(self.root / "kernel/iommu_groups") if name.isdigit()):
            yield self.group(number)

    def group(self, number: int) -> HostGroup:
        """One IOMMU group. Members that are no PCI devices (platform) are listed, and cannot be judged."""
        path = self.root / "kernel/iommu_groups" / str(number)
        if not path.exists():
            raise HostError(f"There is no IOMMU group {number} ({path} does not exist); is an IOMMU enabled?")
        members = tuple(sorted(read_names(path / "devices")))
        blockers = []
        for member in members:
            try:
                device = self.device(member)
            except (HostError, ValueError):
                continue
            if device.blocks_group:
                blockers.append(f"{device.address} ({device.driver})")
        return HostGroup(
            number=number,
            type=read_text(path / "type"),
            devices=members,
            blockers=tuple(blockers),
            noiommu=read_text(path / "name") == "vfio-noiommu",
        )


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.isdigit() else None


def _hexadecimal(path: Path) -> int:
    text = read_text(path)
    if text is None:
        raise HostError(f"Cannot read {path}: the device has gone, or this is no sysfs")
    return int(text, 16)


def _override(path: Path) -> str | None:
    text = read_text(path / "driver_override")
    return None if text in (None, "", "(null)") else text


def _needs_method(path: Path, methods: str | None) -> bool:
    """Kernels before 5.15 have a ``reset`` file, and do not say how."""
    return methods is None and (path / "reset").exists()
