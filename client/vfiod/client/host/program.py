"""``vfiod host``: list, groups, bind, unbind, mdev. Tables for people, ``--json`` for programs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Final

from vfiod.client.host import binding, mdev_program
from vfiod.client.host.show import json_out, table
from vfiod.client.host.sysfs import HostDevice, HostError, HostGroup, Sysfs
from vfiod.client.host.topology import host_topology
from vfiod.protocol.drawing import Graph, draw_dot, draw_svg, draw_tree

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod host", description="This host's PCI devices, IOMMU groups and mediated devices, by sysfs."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--sysfs", metavar="ROOT", default="/sys", help="another sysfs tree (default: /sys)")
    common.add_argument("--json", action="store_true", help="JSON instead of a table")
    verbs = made.add_subparsers(dest="verb", metavar="list | groups | bind | unbind | mdev", required=True)
    listing = verbs.add_parser("list", parents=[common], help="PCI devices: driver, group, reset, IOMMU")
    listing.add_argument("--driver", help="only devices bound to this driver")
    listing.add_argument("--all", action="store_true", help="bridges too")
    groups = verbs.add_parser(
        "groups", parents=[common], help="IOMMU groups: their devices, and whether VFIO can have them; reset domains"
    )
    drawn = groups.add_mutually_exclusive_group()
    drawn.add_argument("--tree", action="store_true", help="a tree, with the reset domains")
    drawn.add_argument("--dot", action="store_true", help="a graph for Graphviz, with the reset domains")
    drawn.add_argument("--svg", action="store_true", help="a picture, with the reset domains")
    for verb, about in (("bind", "give devices to VFIO"), ("unbind", "give devices back to the kernel's own drivers")):
        change = verbs.add_parser(verb, parents=[common], help=about)
        change.add_argument("addresses", metavar="ADDRESS", nargs="+", help="[[DDDD:]BB:]DD.F")
        change.add_argument("--group", action="store_true", help="the whole IOMMU group of each")
        if verb == "bind":
            change.add_argument("--driver", default="vfio-pci", help="default: vfio-pci")
            change.add_argument("--force", action="store_true", help="even when the host is using the device")
    mdev_program.add_parser(verbs, common)
    return made


def main(argv: list[str]) -> int:
    """Run it. 0: done; 1: refused or failed, standard error says why."""
    options = parser().parse_args(argv)
    try:
        if options.verb == "mdev":
            return mdev_program.run(options)
        return VERBS[options.verb](Sysfs(options.sysfs), options)
    except HostError as error:
        print(f"vfiod host: {error}", file=sys.stderr)
        return 1


def _list(sysfs: Sysfs, options: argparse.Namespace) -> int:
    devices = [
        device
        for device in sysfs.devices()
        if (options.all or not device.bridge) and (options.driver is None or device.driver == options.driver)
    ]
    mates = _mates(sysfs)
    if options.json:
        return json_out([_device_json(device, mates) for device in devices])
    rows = [
        [
            device.address,
            device.name,
            device.kind,
            device.driver or "-",
            "-" if device.group is None else str(device.group),
            " ".join(_others(device, mates)) or "-",
            " ".join(device.reset_methods) or "none",
            device.iommu or ("yes" if device.group is not None else "none"),
        ]
        for device in devices
    ]
    return table(["Address", "Device", "Class", "Driver", "Group", "With", "Reset", "IOMMU"], rows, "no PCI devices")


def _groups(sysfs: Sysfs, options: argparse.Namespace) -> int:
    if options.tree or options.dot or options.svg:
        return _draw(sysfs, options)
    groups = list(sysfs.groups())
    if options.json:
        return json_out([_group_json(group) for group in groups])
    rows = [
        [
            str(group.number),
            "no-IOMMU" if group.noiommu else group.type or "-",
            "\n".join(_member(sysfs, address) for address in group.devices),
            "viable" if not group.blockers else "not viable: " + ", ".join(group.blockers),
        ]
        for group in groups
    ]
    empty = "no IOMMU groups: the host has no IOMMU, or it is off (intel_iommu=on, or the firmware's setting)"
    return table(["Group", "Type", "Devices", "For VFIO"], rows, empty)


def _draw(sysfs: Sysfs, options: argparse.Namespace) -> int:
    if options.json:
        raise HostError("--json and a drawing exclude each other: give one of --json, --tree, --dot, --svg")
    graph, title = Graph(*host_topology(sysfs)), "IOMMU groups and reset domains of this host"
    text = draw_tree(graph) if options.tree else draw_dot(graph, title) if options.dot else draw_svg(graph, title)
    sys.stdout.write(text)
    return 0


def _bind(sysfs: Sysfs, options: argparse.Namespace) -> int:
    return _each(sysfs, options, lambda address: binding.bind(sysfs, address, options.driver, force=options.force))


def _unbind(sysfs: Sysfs, options: argparse.Namespace) -> int:
    return _each(sysfs, options, lambda address: binding.unbind(sysfs, address))


def _each(sysfs: Sysfs, options: argparse.Namespace, change: Callable[[str], binding.Bound]) -> int:
    """Change each device; one that fails does not keep the others from theirs."""
    done, failed = [], 0
    for address in _chosen(sysfs, options):
        try:
            done.append(change(address))
        except HostError as error:
            failed += 1
            print(f"vfiod host: {error}", file=sys.stderr)
    if options.json:
        json_out([dataclasses.asdict(bound) for bound in done])
    else:
        for bound in done:
            before, after = (driver or "no driver" for driver in (bound.before, bound.after))
            print(f"{bound.address}: {after} already" if before == after else f"{bound.address}: {before} -> {after}")
    return 1 if failed else 0


def _chosen(sysfs: Sysfs, options: argparse.Namespace) -> list[str]:
    chosen: dict[str, None] = {}
    for address in options.addresses:
        device = sysfs.device(address)
        chosen[device.address] = None
        if options.group and device.group is not None:
            mates = (sysfs.device(mate) for mate in sysfs.group(device.group).devices)
            chosen |= {mate.address: None for mate in mates if not mate.bridge}
    return list(chosen)


VERBS: Final[dict[str, Callable[[Sysfs, argparse.Namespace], int]]] = {
    "list": _list,
    "groups": _groups,
    "bind": _bind,
    "unbind": _unbind,
}


def _mates(sysfs: Sysfs) -> dict[int, tuple[str, ...]]:
    return {group.number: group.devices for group in sysfs.groups()}


def _others(device: HostDevice, mates: dict[int, tuple[str, ...]]) -> list[str]:
    if device.group is None:
        return []
    return [address for address in mates.get(device.group, ()) if address != device.address]


def _member(sysfs: Sysfs, address: str) -> str:
    try:
        device = sysfs.device(address)
    except (HostError, ValueError):
        return address
    return f"{device.address}  {device.name}  [{device.driver or 'no driver'}]"


def _device_json(device: HostDevice, mates: dict[int, tuple[str, ...]]) -> dict[str, Any]:
    text = {name.replace("_", "-"): value for name, value in dataclasses.asdict(device).items()}
    return text | {"group-mates": _others(device, mates)}


def _group_json(group: HostGroup) -> dict[str, Any]:
    return dataclasses.asdict(group) | {"viable": not group.blockers}
