"""What on this host works with a device at this moment: mounted disks, swap, networks, processes that have it open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vfiod.client.host.attributes import read_entries, read_text

__all__ = ["Usage"]

MAX_STACK: Final = 16
"""How many block devices may stand on one another (LVM on crypt on RAID on a partition is four); a loop ends here."""


class Usage:
    """Who uses what.

    Args:
        root: the sysfs tree.
        mountinfo: what is mounted (``proc(5)``); None: nothing.
        proc: for swap, and who has which file open; None: neither.

    """

    def __init__(self, root: Path, mountinfo: Path | None, proc: Path | None) -> None:
        self._root = root
        self._proc = proc
        self._mounts: dict[str, str] = {}
        for fields in _lines(mountinfo):
            if len(fields) > 4:
                # By number; by name too, because btrfs mounts have numbers of their own (and "-" ends the options).
                source = fields[fields.index("-") + 2] if "-" in fields[:-2] else ""
                for key in (fields[2], source.removeprefix("/dev/") if source.startswith("/dev/") else ""):
                    if key and self._mounts.get(key) != "/":  # of several mounts, the one that matters most
                        self._mounts[key] = fields[4]
        self._swaps = {Path(fields[0]).name for fields in _lines(proc / "swaps" if proc else None) if fields}

    def users(self, path: Path) -> Iterator[str]:
        """What on this host would lose the device of this directory, in words."""
        interfaces = []
        for directory, subdirectories, files in os.walk(path):  # links are not followed: this device's own tree
            here = Path(directory)
            if here.parent.name == "net":
                interfaces.append(here.name)
                if read_text(here / "operstate") == "up":
                    yield f"network interface {here.name} (up)"
            if "dev" in files:
                yield from self._block(here, here.name)
            subdirectories.sort()
        if interfaces and self._only_network(path):
            yield f"{', '.join(sorted(interfaces))} is this host's only network card"

    def holders(self, files: frozenset[str]) -> tuple[str, ...]:
        """Processes, other than this one, that have one of these files open, as far as this user may see."""
        found = []
        for process in sorted(_entries(self._proc), key=lambda one: one.name.zfill(10)):
            if not process.name.isdigit() or process.name == str(os.getpid()):
                continue
            for fd in _entries(process / "fd"):
                try:
                    target = str(fd.readlink())
                except OSError:
                    continue
                if target in files:
                    found.append(f"process {process.name} ({read_text(process / 'comm') or '?'}) has {target} open")
                    break
        return tuple(found)

    def _block(self, here: Path, disk: str, depth: int = 0) -> Iterator[str]:
        """A block device, and those that stand on it (``holders``)."""
        on = disk if here.name == disk else f"{disk} (as {here.name})"
        mount = self._mounts.get(read_text(here / "dev") or "") or self._mounts.get(here.name)
        if mount == "/":
            yield f"the root file system is mounted from {on}"
        elif mount is not None:
            yield f"{mount} is mounted from {on}"
        if here.name in self._swaps:
            yield f"{on} is swap"
        if depth < MAX_STACK:
            for holder in _entries(here / "holders"):
                yield from self._block(holder.resolve(), disk, depth + 1)

    def _only_network(self, path: Path) -> bool:
        """Whether every network interface with hardware is this device's."""
        hardware = [one.resolve() for one in _entries(self._root / "class/net") if (one / "device").exists()]
        own = path.resolve()
        return bool(hardware) and all(own in one.parents for one in hardware)


def _lines(path: Path | None) -> list[list[str]]:
    if path is None:
        return []
    try:
        return [line.split() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []


def _entries(path: Path | None) -> list[Path]:
    return [] if path is None else read_entries(path)
