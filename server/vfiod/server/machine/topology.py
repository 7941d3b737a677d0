"""The machine as a graph: containers, address spaces, groups, devices, and the reset domains across them.

:func:`build` is pure. The ids are those of the catalogue (``container:0``, ``group:7``, ``device:nic0``,
``host:0000:01:00.1``, ``reset:0``); the drawing is :mod:`vfiod.protocol.drawing`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vfiod.protocol.catalogue.devices import ContainerInfo, DeviceInfo, Driver, TopologyEdge, TopologyNode
from vfiod.protocol.catalogue.reset import AffectedFunction, HotResetReport
from vfiod.protocol.catalogue.words import UNSET
from vfiod.server.backends.cdev import IoasInfo
from vfiod.server.kernel.sysfs import GroupMember

__all__ = ["Facts", "build"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is.

    Attributes:
        name: of the machine.
        mappings: how many there are.
        mapped_bytes: how much guest memory they map.
        containers: of the kernel groups.
        ioases: of the cdevs.
        devices: all of them.
        members: of each group held here, by its number, as far as sysfs tells.
        domains: what a hot reset of a device would reach, by the device's name.

    """

    name: str
    mappings: int
    mapped_bytes: int
    containers: Sequence[ContainerInfo]
    ioases: Sequence[IoasInfo]
    devices: Sequence[DeviceInfo]
    members: Mapping[int, Sequence[GroupMember]]
    domains: Mapping[str, HotResetReport]


class _Drawing:
    """Nodes and edges that gather."""

    def __init__(self) -> None:
        self.nodes: dict[str, TopologyNode] = {}
        self.edges: dict[tuple[str, str], TopologyEdge] = {}

    def add(self, id: str, kind: str, label: str, parent: str | None = None, **attributes: str | None) -> str:
        facts = {key.replace("_", "-"): value for key, value in attributes.items() if value}
        self.nodes.setdefault(id, TopologyNode(id=id, kind=kind, label=label, attributes=facts))
        if parent is not None:
            self.join(parent, id)
        return id

    def join(self, parent: str, child: str) -> None:
        self.edges.setdefault((parent, child), TopologyEdge(parent=parent, child=child))


def build(facts: Facts) -> tuple[list[TopologyNode], list[TopologyEdge]]:
    """Nodes and edges, parents before children, in the order the machine has them. Pure."""
    drawing = _Drawing()
    mapped = f"{facts.mapped_bytes / (1 << 20):g} MiB in {facts.mappings} mappings" if facts.mappings else None
    machine = drawing.add("machine", "machine", f"machine {facts.name}", memory=mapped)
    by_host = {device.host: f"device:{device.id}" for device in facts.devices if device.host is not UNSET}
    for container in facts.containers:
        name = f"container:{container.id}"
        passed = "by the manager" if container.passed else None
        drawing.add(name, "container", name, machine, iommu=container.iommu, passed=passed)
        for group in container.groups:
            drawing.add(f"group:{group}", "group", f"group:{group}", name)
    for ioas in facts.ioases:
        drawing.add(ioas.name, "ioas", ioas.name, machine, iommufd=ioas.iommufd)
    spaces = {host: ioas.name for ioas in facts.ioases for host in ioas.devices}
    for device in facts.devices:
        drawing.add(f"device:{device.id}", "device", device.id, _above(drawing, device, spaces), **_words(device))
    for group, members in facts.members.items():
        for member in members:
            if member.name not in by_host:
                driver = member.driver or "none"
                drawing.add(f"host:{member.name}", "function", member.name, f"group:{group}", driver=driver)
    _add_domains(drawing, facts.domains, by_host)
    return list(drawing.nodes.values()), list(drawing.edges.values())


def _above(drawing: _Drawing, device: DeviceInfo, spaces: Mapping[str, str]) -> str:
    """What a device stands under: its group, its IOAS, its own space, or only the machine."""
    if device.group is not UNSET:
        return f"group:{device.group.id}"
    if device.host is UNSET:
        return "machine"
    if device.backend == "mdev":
        return drawing.add(f"mdev:{device.host}", "space", f"mdev:{device.host}", "machine")
    return spaces.get(device.host, "machine")


def _words(device: DeviceInfo) -> dict[str, str | None]:
    known = device.vendor_id is not UNSET and device.device_id is not UNSET
    return {
        "host": None if device.host is UNSET or device.backend == "mdev" else device.host,
        "pci_id": f"{device.vendor_id:04x}:{device.device_id:04x}" if known else None,
        "backend": device.backend,
        "state": str(device.state),
        "interrupts": str(device.irq_kind),
        "reset": "yes" if device.reset else "only with its bus" if device.driver is Driver.VFIO_PCI else "no",
    }


def _add_domains(drawing: _Drawing, domains: Mapping[str, HotResetReport], by_host: Mapping[str, str]) -> None:
    """Devices that reset each other are one domain, whichever of them was asked."""
    found: dict[frozenset[str], tuple[str, HotResetReport]] = {}
    for name, report in domains.items():
        if report.affected:
            found.setdefault(frozenset(one.address for one in report.affected), (name, report))
    for number, (name, report) in enumerate(found.values()):
        reason = None if report.reason is UNSET else report.reason
        verdict = "possible" if report.possible else "refused"
        label = f"reset of {_extent([one.address for one in report.affected])}"
        domain = drawing.add(f"reset:{number}", "reset-domain", label, hot_reset=verdict, reason=reason)
        drawing.join(domain, f"device:{name}")
        for one in report.affected:
            drawing.join(domain, _reached(drawing, one, by_host))


def _reached(drawing: _Drawing, one: AffectedFunction, by_host: Mapping[str, str]) -> str:
    if one.held_as is not UNSET:
        return f"device:{one.held_as}"
    if one.address in by_host:
        return by_host[one.address]
    return drawing.add(f"host:{one.address}", "function", one.address)


def _extent(addresses: Sequence[str]) -> str:
    """What the kernel resets there, in words: as far as the functions have their addresses in common."""
    slots = {address.rpartition(".")[0] for address in addresses}
    buses = {slot.rpartition(":")[0] for slot in slots}
    if len(slots) == 1:
        return f"slot {min(slots)}"
    if len(buses) == 1:
        return f"bus {min(buses)}"
    return f"buses {posixpath.commonprefix(sorted(buses))}* ({len(buses)})"
