"""``vfiod host mdev``: types, list, create, destroy. Tables for people, ``--json`` for programs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Final

from vfiod.client.host.mdev import DEFINITIONS, KernelMdevs
from vfiod.client.host.show import json_out, table
from vfiod.client.host.sysfs import HostError

__all__ = ["add_parser", "run"]


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add ``mdev`` and its verbs to those of ``vfiod host``."""
    mdev = verbs.add_parser("mdev", help="mediated devices of the kernel: types, list, create, destroy")
    inner = mdev.add_subparsers(dest="mdev_verb", metavar="types | list | create | destroy", required=True)
    defined = argparse.ArgumentParser(add_help=False)
    defined.add_argument(
        "--definitions", metavar="DIR", default=str(DEFINITIONS), help="mdevctl's (default: %(default)s)"
    )
    both = [common, defined]
    types = inner.add_parser("types", parents=both, help="what can be made, by which parent")
    types.add_argument("--parent", help="of this one only")
    listing = inner.add_parser("list", parents=both, help="the devices there are")
    listing.add_argument("--defined", action="store_true", help="mdevctl's definitions instead")
    create = inner.add_parser(
        "create", parents=both, help="make a device; of mdevctl's definition when only --uuid is given"
    )
    create.add_argument("--parent", help="the parent device: mtty, 0000:00:02.0, 0.0.0313")
    create.add_argument("--type", help="one of its types")
    create.add_argument("--uuid", help="the device's name (default: a random one)")
    create.add_argument(
        "--attr", metavar="NAME=VALUE", action="append", default=[], help="write this into its directory; repeatable"
    )
    destroy = inner.add_parser("destroy", parents=both, help="remove devices")
    destroy.add_argument("uuids", metavar="UUID", nargs="+")
    destroy.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="for its user to let go (default: 10)"
    )


def run(options: argparse.Namespace) -> int:
    """Run it. 0: done; 1: one of several failed. Raises HostError."""
    mdevs = KernelMdevs(options.sysfs, definitions=options.definitions)
    return VERBS[options.mdev_verb](mdevs, options)


def _types(mdevs: KernelMdevs, options: argparse.Namespace) -> int:
    types = list(mdevs.types(options.parent))
    if options.json:
        return json_out([_json(one) for one in types])
    rows = [
        [one.parent, one.type, one.name or "-", one.device_api, str(one.available_instances), str(len(one.devices))]
        for one in types
    ]
    empty = "no mdev parents: no driver that makes mediated devices is loaded"
    return table(["Parent", "Type", "Name", "Device API", "Available", "Devices"], rows, empty)


def _list(mdevs: KernelMdevs, options: argparse.Namespace) -> int:
    if options.defined:
        return _defined(mdevs, options)
    devices = list(mdevs.devices())
    if options.json:
        return json_out([_json(one) for one in devices])
    rows = [
        [
            one.uuid,
            one.parent,
            one.type,
            one.device_api,
            one.driver or "-",
            "-" if one.group is None else str(one.group),
            one.vfio_device or "-",
            "yes" if one.defined else "no",
        ]
        for one in devices
    ]
    heads = ["UUID", "Parent", "Type", "Device API", "Driver", "Group", "cdev", "Defined"]
    return table(heads, rows, "no mediated devices")


def _defined(mdevs: KernelMdevs, options: argparse.Namespace) -> int:
    definitions = list(mdevs.definitions())
    if options.json:
        return json_out([_json(one) | {"attributes": [list(pair) for pair in one.attributes]} for one in definitions])
    rows = [
        [one.uuid, one.parent, one.type, one.start, "yes" if one.active else "no",
         "\n".join(f"{name}={value}" for name, value in one.attributes) or "-"]
        for one in definitions
    ]  # fmt: skip
    empty = f"no definitions in {mdevs.definitions_path}"
    return table(["UUID", "Parent", "Type", "Start", "Active", "Attributes"], rows, empty)


def _create(mdevs: KernelMdevs, options: argparse.Namespace) -> int:
    attributes = tuple(_pair(text) for text in options.attr)
    if options.type is None:
        if options.uuid is None:
            raise HostError("Say what to make: --parent and --type, or the --uuid of one of mdevctl's definitions")
        if attributes:
            raise HostError("--attr goes with --parent and --type; a definition has its own")
        made = mdevs.start(options.uuid, options.parent)
    else:
        if options.parent is None:
            having = sorted({one.parent for one in mdevs.types() if one.type == options.type})
            raise HostError(f"--parent is missing; type '{options.type}' is of {', '.join(having) or 'none'}")
        made = mdevs.create(options.parent, options.type, options.uuid, attributes=attributes)
    if options.json:
        return json_out(_json(made))
    print(made.uuid)
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise HostError(f"--attr takes NAME=VALUE, got '{text}'")
    return name, value


def _destroy(mdevs: KernelMdevs, options: argparse.Namespace) -> int:
    done, problems = [], []
    for uuid in options.uuids:
        try:
            done.append(mdevs.destroy(uuid, timeout_s=options.timeout))
        except HostError as error:
            problems.append(str(error))
    if options.json:
        json_out([_json(one) for one in done])
    else:
        for one in done:
            print(f"{one.uuid}: removed from {one.parent}")
    if problems:
        raise HostError("; ".join(problems))
    return 0


def _json(value: Any) -> dict[str, Any]:
    return {name.replace("_", "-"): member for name, member in dataclasses.asdict(value).items()}


VERBS: Final[dict[str, Callable[[KernelMdevs, argparse.Namespace], int]]] = {
    "types": _types,
    "list": _list,
    "create": _create,
    "destroy": _destroy,
}
