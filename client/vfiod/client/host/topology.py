"""This host's IOMMU groups and reset domains as a graph, for ``vfiod host groups --tree``, ``--dot`` and ``--svg``.

A reset domain is what one bus reset reaches (``pci_reset_bus``, ``drivers/pci/pci.c``): every function behind one
bridge, and the domains of the bridges among them. What stands on a root bus is in none.
"""

from __future__ import annotations

from vfiod.client.host.sysfs import HostDevice, HostError, HostGroup, Sysfs
from vfiod.protocol.catalogue.devices import TopologyEdge, TopologyNode

__all__ = ["host_topology", "reset_domains"]


def reset_domains(sysfs: Sysfs) -> dict[str, tuple[str, ...]]:
    """The functions right behind each bridge, by the bridge's address, lowest first; bridges among them too."""
    found: dict[str, list[str]] = {}
    for device in sysfs.devices():
        bridge = sysfs.bridge_above(device.address)
        if bridge is not None:
            found.setdefault(bridge, []).append(device.address)
    return {bridge: tuple(found[bridge]) for bridge in sorted(found)}


def host_topology(sysfs: Sysfs) -> tuple[list[TopologyNode], list[TopologyEdge]]:
    """Nodes and edges: the host, its groups, their functions; and the reset domains."""
    nodes = [_node("host", "host", "IOMMU groups of this host")]
    edges = []
    shown: set[str] = set()
    for group in sysfs.groups():
        name = f"group:{group.number}"
        nodes.append(_group(name, group))
        edges.append(TopologyEdge(parent="host", child=name))
        for address in group.devices:
            nodes.append(_function(sysfs, address))
            shown.add(address)
            edges.append(TopologyEdge(parent=name, child=f"host:{address}"))
    domains = reset_domains(sysfs)
    for bridge, addresses in domains.items():
        nodes.append(_node(f"reset:{bridge}", "reset-domain", f"reset of the bus behind {bridge}"))
        for address in addresses:
            # A bridge's own function has no state that a reset would lose to anybody; what is behind it has.
            if address in domains:
                edges.append(TopologyEdge(parent=f"reset:{bridge}", child=f"reset:{address}"))
                continue
            if address not in shown:
                nodes.append(_function(sysfs, address))
            edges.append(TopologyEdge(parent=f"reset:{bridge}", child=f"host:{address}"))
    return nodes, edges


def _node(id: str, kind: str, label: str, **attributes: str | None) -> TopologyNode:
    facts = {key.replace("_", "-"): value for key, value in attributes.items() if value}
    return TopologyNode(id=id, kind=kind, label=label, attributes=facts)


def _group(name: str, group: HostGroup) -> TopologyNode:
    verdict = "no: " + ", ".join(group.blockers) if group.blockers else "yes"
    return _node(name, "group", name, type="no-IOMMU" if group.noiommu else group.type, viable=verdict)


def _function(sysfs: Sysfs, address: str) -> TopologyNode:
    device = _look(sysfs, address)
    if device is None:
        return _node(f"host:{address}", "function", address)
    return _node(
        f"host:{address}",
        "function",
        address,
        device=device.name,
        driver=device.driver or "none",
        reset=None if device.bridge else " ".join(device.reset_methods) or "only with its bus",
    )


def _look(sysfs: Sysfs, address: str) -> HostDevice | None:
    try:
        return sysfs.device(address)
    except (HostError, ValueError):
        return None  # a platform device; or it has just gone
