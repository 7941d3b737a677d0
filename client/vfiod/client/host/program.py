"""``vfiod host``: list, groups, bind, unbind, recover, mdev. Tables for people, ``--json`` for programs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Final

from vfiod.client.host import binding, mdev_program
from vfiod.client.host.assess import Assessment, HostFacts, assess, host_facts
from vfiod.client.host.journal import DEFAULT_PLACE, Journal
from vfiod.client.host.names import PLACES
from vfiod.client.host.others import OtherDevice, other_devices
from vfiod.client.host.show import json_out, table
from vfiod.client.host.sysfs import HostDevice, HostError, HostGroup, Sysfs
from vfiod.client.host.topology import host_topology
from vfiod.client.progress import Progress
from vfiod.protocol.drawing import Graph, draw_dot, draw_svg, draw_tree

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod host", description="This host's devices, IOMMU groups and mediated devices, by sysfs."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--sysfs", metavar="ROOT", default="/sys", help="another sysfs tree (default: /sys)")
    common.add_argument("--json", action="store_true", help="JSON instead of a table")
    verbs = made.add_subparsers(dest="verb", metavar="list | groups | bind | unbind | recover | mdev", required=True)
    listing = verbs.add_parser("list", parents=[common], help="devices: what is assignable, and why not")
    listing.add_argument("--driver", help="only devices bound to this driver")
    listing.add_argument("--all", action="store_true", help="bridges, and platform devices without an IOMMU, too")
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
        change.add_argument("--quiet", action="store_true", help="do not tell what is being done")
        _add_state(change)
        if verb == "bind":
            change.add_argument("--driver", default="vfio-pci", help="default: vfio-pci")
            change.add_argument("--force", action="store_true", help="even when the host is using the device")
        else:
            change.add_argument("--force", action="store_true", help="even when a process has the device open: wait")
    recover = verbs.add_parser("recover", parents=[common], help="end what a crash of bind or unbind has cut short")
    _add_state(recover)
    mdev_program.add_parser(verbs, common)
    return made


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        metavar="DIR",
        default=DEFAULT_PLACE,
        help=f"where each step is noted first (default: {DEFAULT_PLACE})",
    )


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
    everything = {device.address: device for device in sysfs.devices()} if _has_pci(sysfs) else {}
    groups = {group.number: group for group in sysfs.groups()}
    facts = host_facts(sysfs)
    chosen = [
        (device, _assessment(device, everything, groups, facts))
        for device in everything.values()
        if (options.all or not device.bridge) and options.driver in (None, device.driver)
    ]
    others = [one for one in other_devices(sysfs, everything=options.all) if options.driver in (None, one.driver)]
    mates = {number: group.devices for number, group in groups.items()}
    if options.json:
        return json_out(
            [_device_json(device, mates, judged) for device, judged in chosen] + [_kebab(one) for one in others]
        )
    status = table(
        ["Address", "Device", "Class", "Driver", "Group", "With", "Reset", "NUMA", "VFIO", "Assignable"],
        [_row(device, judged, mates, everything) for device, judged in chosen],
        "no PCI devices",
    )
    if others:
        print()
        heads = ["Bus", "Address", "Device", "Driver", "Group", "VFIO", "Assignable"]
        table(heads, [_other_row(one) for one in others], "")
    for line in facts.sentences():
        print(line, file=sys.stderr)
    if sysfs.names.place is None:
        print(f"names: no pci.ids here (looked for {', '.join(PLACES)}): install pci.ids or hwdata", file=sys.stderr)
    return status


def _has_pci(sysfs: Sysfs) -> bool:
    """Whether there is PCI, or at least another bus: then its absence is no error (s390x, boards)."""
    return sysfs.bus.exists() or not any((sysfs.root / "bus" / one).exists() for one in ("platform", "css", "ap"))


def _assessment(
    device: HostDevice, everything: dict[str, HostDevice], groups: dict[int, HostGroup], facts: HostFacts
) -> Assessment:
    group = None if device.group is None else groups.get(device.group)
    members = () if group is None else group.devices
    mates = [everything[one] for one in members if one in everything and one != device.address]
    return assess(device, group, mates, facts)


def _row(
    device: HostDevice, judged: Assessment, mates: dict[int, tuple[str, ...]], everything: dict[str, HostDevice]
) -> list[str]:
    others = [
        f"{one} ({everything[one].driver or '-'})" if one in everything else one for one in _others(device, mates)
    ]
    said = str(judged.verdict) + (": " + "; ".join(judged.reasons) if judged.reasons else "")
    said += f" ({'; '.join(judged.notes)})" if judged.notes else ""
    return [
        device.address,
        device.name,
        device.kind,
        device.driver or "-",
        "-" if device.group is None else str(device.group),
        ", ".join(others) or "-",
        " ".join(device.reset_methods) or "none",
        "-" if device.numa_node is None else str(device.numa_node),
        device.vfio_device or "-",
        said,
    ]


def _other_row(one: OtherDevice) -> list[str]:
    said = one.verdict + (": " + "; ".join(one.reasons) if one.reasons else "")
    group = "-" if one.group is None else str(one.group)
    return [one.bus, one.address, one.kind, one.driver or "-", group, one.vfio_device or "-", said]


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
    def change(address: str) -> binding.Bound:
        return binding.bind(sysfs, address, options.driver, force=options.force, journal=Journal(options.state))

    return _each(sysfs, options, f"binding to {options.driver}", change)


def _unbind(sysfs: Sysfs, options: argparse.Namespace) -> int:
    def change(address: str) -> binding.Bound:
        return binding.unbind(sysfs, address, force=options.force, journal=Journal(options.state))

    return _each(sysfs, options, "giving back", change)


def _recover(sysfs: Sysfs, options: argparse.Namespace) -> int:
    ended = binding.recover(sysfs, Journal(options.state))
    if options.json:
        json_out([_kebab(one) for one in ended])
    for one in ended:
        if one.problem is not None:
            print(f"vfiod host: {one.problem}; it stays in {options.state}, to be tried again", file=sys.stderr)
        elif not options.json:
            print(f"{one.address}: {one.phase} had been cut short; it has {one.driver or 'no driver'} now")
    if not ended and not options.json:
        print("nothing was cut short")
    return 1 if any(one.problem for one in ended) else 0


def _each(sysfs: Sysfs, options: argparse.Namespace, what: str, change: Callable[[str], binding.Bound]) -> int:
    """Change each device; one that fails does not keep the others from theirs."""
    done, failed, progress = [], 0, Progress("vfiod host", quiet=options.quiet)
    for address in _chosen(sysfs, options):
        try:
            with progress.step(f"{address}: {what}"):
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
    "recover": _recover,
}


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


def _device_json(device: HostDevice, mates: dict[int, tuple[str, ...]], judged: Assessment) -> dict[str, Any]:
    return {"bus": "pci"} | _kebab(device) | {"group-mates": _others(device, mates)} | _kebab(judged)


def _kebab(value: Any) -> dict[str, Any]:
    return {name.replace("_", "-"): member for name, member in dataclasses.asdict(value).items()}


def _group_json(group: HostGroup) -> dict[str, Any]:
    return dataclasses.asdict(group) | {"viable": not group.blockers}
