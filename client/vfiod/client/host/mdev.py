"""The kernel's mediated devices: parents, types, devices, and mdevctl's definitions.

Sources: ``Documentation/driver-api/vfio-mediated-device.rst`` (sysfs), ``drivers/vfio/mdev/mdev_sysfs.c``; mdevctl's
manual for its definitions: ``/etc/mdevctl.d/PARENT/UUID``, JSON with ``mdev_type``, ``start`` and ``attrs``. mdevctl's
call-out scripts are its own business, and not run here.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vfiod.client.host.attributes import read_link, read_names, read_text
from vfiod.client.host.sysfs import HostError
from vfiod.protocol.errors import errno_name

__all__ = ["Definition", "HostMdev", "KernelMdevs", "MdevType", "normal_uuid"]

DEFINITIONS: Final = Path("/etc/mdevctl.d")

UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

WRITER: Final = """
import os, sys
try:
    fd = os.open(sys.argv[1], os.O_WRONLY)
    os.write(fd, sys.argv[2].encode())
except OSError as error:
    os._exit(min(error.errno or 5, 255))
"""
"""A program that writes its second argument to the attribute named by its first; its status is the errno."""

ADVICE: Final = {
    "EACCES": "this needs root",
    "EPERM": "this needs root, and a kernel that is not locked down",
    "EROFS": "sysfs is mounted read-only here: run it on the host, not in a container",
    "EEXIST": "a mediated device has this UUID already",
    "ENOSPC": "the parent has no room for another device of this type",
    "EUSERS": "the parent has no room for another device of this type",
    "EINVAL": "the parent's driver does not take it",
    "EAGAIN": "the device or its parent is just going",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MdevType:
    """What a parent can make.

    Attributes:
        parent: the parent device's name in sysfs (``mtty``, ``0000:00:02.0``, ``0.0.0313``).
        type: its name in sysfs (``mtty-2``).
        name: for people, where the driver has one.
        description: where the driver has one.
        device_api: ``vfio-pci``, ``vfio-ccw``, ``vfio-ap``.
        available_instances: how many more can be made.
        devices: the UUIDs of those that exist.

    """

    parent: str
    type: str
    name: str | None
    description: str | None
    device_api: str
    available_instances: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMdev:
    """One mediated device that exists.

    Attributes:
        uuid: its name.
        parent, type, device_api: as of its type.
        driver: what it is bound to (``vfio_mtty``).
        group: its IOMMU group: ``/dev/vfio/GROUP``.
        vfio_device: the name under ``/dev/vfio/devices``.
        sysfsdev: its directory, as ``device_add`` takes it.
        defined: mdevctl has a definition of it.

    """

    uuid: str
    parent: str
    type: str
    device_api: str
    driver: str | None
    group: int | None
    vfio_device: str | None
    sysfsdev: str
    defined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One of mdevctl's definitions.

    Attributes:
        uuid, parent, type: what is to be made.
        start: ``auto``: when the parent appears; ``manual``: when asked for.
        attributes: what is then written into its directory, in order.
        active: it exists.

    """

    uuid: str
    parent: str
    type: str
    start: str
    attributes: tuple[tuple[str, str], ...]
    active: bool


def normal_uuid(text: str) -> str:
    """A UUID as sysfs writes it, in lower case. Raises HostError."""
    if UUID.fullmatch(text) is None:
        raise HostError(f"A mediated device is named by a UUID in its 8-4-4-4-12 form, got '{text}'")
    return text.lower()


class KernelMdevs:
    """The mediated devices of one sysfs tree.

    Args:
        root: ``/sys``, or a copy of one.
        definitions: mdevctl's.

    """

    def __init__(self, root: Path | str = "/sys", *, definitions: Path | str = DEFINITIONS) -> None:
        self.root = Path(root)
        self.definitions_path = Path(definitions)

    # --- looking ------------------------------------------------------------------------------------

    def parents(self) -> tuple[str, ...]:
        """The devices that can make some."""
        return tuple(read_names(self.root / "class/mdev_bus"))

    def types(self, parent: str | None = None) -> Iterator[MdevType]:
        """Every type of every parent, or of one. Raises HostError for an unknown one."""
        for one in self.parents() if parent is None else (self._parent(parent),):
            for name in read_names(self._types(one)):
                yield self._type(one, name)

    def devices(self) -> Iterator[HostMdev]:
        """Every device, by UUID. One that vanishes meanwhile is passed over."""
        for name in read_names(self.root / "bus/mdev/devices"):
            try:
                yield self.device(name)
            except HostError:
                continue

    def device(self, uuid: str) -> HostMdev:
        """One device. Raises HostError."""
        uuid = normal_uuid(uuid)
        path = self._path(uuid)
        type_path = path / "mdev_type"
        if not type_path.exists():
            raise HostError(
                f"There is no mediated device {uuid} ({path} does not exist); 'vfiod host mdev list' shows them"
            )
        where = path.resolve()
        parent = where.parent.name
        group = read_link(path / "iommu_group")
        return HostMdev(
            uuid=uuid,
            parent=parent,
            type=type_path.resolve().name,
            device_api=read_text(type_path / "device_api") or "",
            driver=read_link(path / "driver"),
            group=int(group) if group is not None and group.isdigit() else None,
            vfio_device=next(iter(read_names(path / "vfio-dev")), None),
            sysfsdev=str(where),
            defined=any(one.name == uuid for one in self._files()),
        )

    def definitions(self) -> Iterator[Definition]:
        """Mdevctl's definitions, by parent and UUID. Raises HostError for one that cannot be read."""
        for path in self._files():
            yield self._definition(path)

    # --- changing -----------------------------------------------------------------------------------

    def create(
        self,
        parent: str,
        type_name: str,
        uuid: str | None = None,
        *,
        attributes: tuple[tuple[str, str], ...] = (),
    ) -> HostMdev:
        """Make a device.

        Args:
            parent: who makes it.
            type_name: what it is to be.
            uuid: its name; None: a random one.
            attributes: what is written into its directory then, in order; when one fails, the device is removed again.

        Raises HostError: refused before anything was done, or by the kernel; then there is no such device.

        """
        uuid = normal_uuid(uuid) if uuid is not None else str(uuids.uuid4())
        parent = self._parent(parent)
        kind = self._known_type(parent, type_name)
        if self._path(uuid).exists():
            raise HostError(f"There is a mediated device {uuid} already, of parent {self.device(uuid).parent}")
        for name, _ in attributes:
            _inside(name)
        if kind.available_instances < 1:
            there = ", ".join(kind.devices) or "none of this type; others may use its room"
            raise HostError(f"Parent {parent} has no room for another {type_name}; there is {there}")
        _write(self._types(parent) / type_name / "create", uuid)
        try:
            for name, value in attributes:
                _write(self._path(uuid) / _inside(name), value)
            return self.device(uuid)
        except HostError as error:
            try:
                _write(self._path(uuid) / "remove", "1")
            except HostError as second:
                raise HostError(f"{error}. Removing it again failed too: {second}") from error
            raise HostError(f"{error}. The device was removed again") from error

    def start(self, uuid: str, parent: str | None = None) -> HostMdev:
        """Make a device as mdevctl has it defined. Raises HostError; see :meth:`create`."""
        uuid = normal_uuid(uuid)
        found = [one for one in self._files() if one.name == uuid and parent in (None, one.parent.name)]
        if not found:
            of = "" if parent is None else f" of parent {parent}"
            raise HostError(
                f"mdevctl has no definition of {uuid}{of} in {self.definitions_path}: give --parent and --type"
            )
        if len(found) > 1:
            raise HostError(
                f"mdevctl has several definitions of {uuid}: choose by --parent "
                + " or ".join(one.parent.name for one in found)
            )
        wanted = self._definition(found[0])
        return self.create(wanted.parent, wanted.type, uuid, attributes=wanted.attributes)

    def destroy(self, uuid: str, *, timeout_s: float = 10.0) -> HostMdev:
        """Remove a device, and give what it was.

        The kernel asks whoever has it open for it (REQ), and waits until he lets go, for ever: so a child does the
        writing. Raises HostError; when the time is over, the removal goes on, and the text says so.
        """
        device = self.device(uuid)
        problem = _write_in_child(self._path(device.uuid) / "remove", "1", timeout_s)
        if problem is not None:
            raise HostError(problem)
        return device

    # --- inside -------------------------------------------------------------------------------------

    def _path(self, uuid: str) -> Path:
        return self.root / "bus/mdev/devices" / uuid

    def _types(self, parent: str) -> Path:
        return self.root / "class/mdev_bus" / parent / "mdev_supported_types"

    def _parent(self, name: str) -> str:
        parents = self.parents()
        if name not in parents:
            there = ", ".join(parents) or "none: no driver that makes mediated devices is loaded"
            raise HostError(f"There is no mdev parent '{name}'; there is {there}")
        return name

    def _known_type(self, parent: str, name: str) -> MdevType:
        types = read_names(self._types(parent))
        if name not in types:
            raise HostError(f"Parent {parent} has no type '{name}'; it has {', '.join(types) or 'none'}")
        return self._type(parent, name)

    def _type(self, parent: str, name: str) -> MdevType:
        path = self._types(parent) / name
        room = read_text(path / "available_instances")
        return MdevType(
            parent=parent,
            type=name,
            name=read_text(path / "name"),
            description=read_text(path / "description"),
            device_api=read_text(path / "device_api") or "",
            available_instances=int(room) if room is not None and room.isdigit() else 0,
            devices=tuple(read_names(path / "devices")),
        )

    def _files(self) -> list[Path]:
        return [
            path
            for parent in read_names(self.definitions_path)
            for path in sorted((self.definitions_path / parent).glob("*"))
            if UUID.fullmatch(path.name)
        ]

    def _definition(self, path: Path) -> Definition:
        try:
            told: Any = json.loads(path.read_text())
        except OSError as error:
            raise HostError(f"Reading {path} failed with {errno_name(error.errno or 0)}") from error
        except ValueError as error:
            raise HostError(f"{path} is not JSON: {error}") from error
        kind = told.get("mdev_type") if isinstance(told, dict) else None
        start = told.get("start", "manual") if isinstance(told, dict) else None
        attributes = told.get("attrs", []) if isinstance(told, dict) else None
        if (
            not isinstance(kind, str)
            or start not in ("auto", "manual")
            or not isinstance(attributes, list)
            or not all(
                isinstance(one, dict) and all(isinstance(text, str) for text in one.values()) for one in attributes
            )
        ):
            raise HostError(
                f"{path} is no definition of mdevctl: it has 'mdev_type', a text, 'start', \"auto\" or \"manual\", "
                "and 'attrs', a list of {name: value}"
            )
        return Definition(
            uuid=path.name.lower(),
            parent=path.parent.name,
            type=kind,
            start=start,
            attributes=tuple(pair for one in attributes for pair in one.items()),
            active=self._path(path.name.lower()).exists(),
        )


def _inside(name: str) -> str:
    """An attribute's name, which stays within the device's directory. Raises HostError."""
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise HostError(f"An attribute is a file in the device's own directory, such as 'assign_adapter'; got '{name}'")
    return name


def _failed(path: Path, text: str, number: int) -> str:
    name = errno_name(number)
    advice = f": {ADVICE[name]}" if name in ADVICE else ""
    return f"Writing '{text}' to {path} failed with {name}{advice}"


def _write(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never creates: a typo must not become a file
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(_failed(path, text, error.errno or 5)) from error


def _write_in_child(path: Path, text: str, timeout_s: float) -> str | None:
    """Write in a child, which may wait in the kernel without end; what went wrong, or None."""
    child = os.posix_spawn(sys.executable, [sys.executable, "-ISc", WRITER, str(path), text], os.environ)
    watch = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return (
                f"{path.parent.name} is in use: the kernel has asked its user for it, and waits. "
                "It is removed when he closes it (device_del)"
            )
    finally:
        os.close(watch)
    _, status = os.waitpid(child, 0)
    number = os.waitstatus_to_exitcode(status)
    return None if number == 0 else _failed(path, text, abs(number))
