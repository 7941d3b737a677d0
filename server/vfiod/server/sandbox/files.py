"""Which paths the server still needs once it serves: what it may read, where it may make sockets, what it may open."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from typing import Final

import vfiod
from vfiod.server.sandbox.landlock import KEEP, MAKE, READ, USE_DEVICE, Rule

__all__ = [
    "for_configuration",
    "for_devices",
    "for_names",
    "for_paths",
    "for_python",
    "for_sockets",
    "is_shared",
]

HOST_FACTS: Final = (
    "/sys/bus",
    "/sys/class",
    "/sys/dev",
    "/sys/devices",
    "/sys/firmware/devicetree",
    "/sys/kernel/iommu_groups",
    "/sys/module",
    "/proc/self",
    "/proc/interrupts",
    "/proc/sys/kernel/overflowuid",
    "/etc/localtime",
)
"""What diagnostics read. /proc/self is this process, and no other."""

LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
"""Where extensions that are imported later find the libraries they want."""

DEVICES: Final = ("/dev/ptmx", "/dev/pts", "/dev/vfio/vfio")
"""The lines of mediated serial ports and displays are pseudo-terminals unless told otherwise. A container of VFIO is
opened for a group that came without one; alone it is nothing, and everybody may open it (``container``)."""

DEVICE_NODES: Final = ("/dev/vfio", "/dev/iommu")
"""With ``--allow-open``."""

_SHARED: Final = frozenset({"/dev/shm", "/var/lib", "/var/run", "/var/tmp", "/run/lock", "/run/user", "/usr/lib"})  # noqa: S108


def for_python() -> list[Rule]:
    """Read the interpreter, its extensions and our sources: most things here are imported when they are needed."""
    # The first entry of the path is where we happened to be started, unless -P or -I left it out.
    entries = sys.path if sys.flags.safe_path else sys.path[1:]
    places = dict.fromkeys([os.path.dirname(os.__file__), *vfiod.__path__, *entries, *LIBRARIES, *HOST_FACTS])
    if sys.pycache_prefix is not None:
        places[sys.pycache_prefix] = None
    return [Rule(place, READ) for place in places if place not in ("", "/")]


def for_devices(*, allow_open: bool) -> list[Rule]:
    """Device nodes."""
    places = DEVICES + (DEVICE_NODES if allow_open else ())
    return [Rule(place, USE_DEVICE) for place in places]


def for_sockets(paths: Iterable[str], *, shared: bool = False) -> list[Rule]:
    """Where our own sockets are: others may be made beside them, and all removed. In shared ones only if told."""
    directories = dict.fromkeys(os.path.dirname(path) or "." for path in paths)
    return [Rule(directory, MAKE) for directory in directories if shared or not is_shared(directory)]


def for_names() -> list[Rule]:
    """Find the address of a host that is given by its name."""
    return [Rule(f"/etc/{name}", READ) for name in ("hosts", "host.conf", "nsswitch.conf", "resolv.conf", "gai.conf")]


def for_paths(paths: Iterable[str]) -> list[Rule]:
    """What ``--allow-path`` names: files, sockets, links may be read, written, made, removed. ``ro:PATH``: read."""
    return [Rule(path.removeprefix("ro:"), READ) if path.startswith("ro:") else Rule(path, KEEP) for path in paths]


def for_configuration(path: str) -> list[Rule]:
    """A file that is read again: with its directory, since editors put another in its place. In shared ones alone."""
    directory = os.path.dirname(os.path.realpath(path))
    return [Rule(path if is_shared(directory) else directory, READ)]


def is_shared(directory: str) -> bool:
    """Whether others keep their files here too: then removing files beneath is too much to be allowed."""
    real = os.path.realpath(directory)
    if real in _SHARED or real.count("/") < 2:  # /, /run, /tmp, /etc, /root, ...
        return True
    try:
        return bool(os.stat(real).st_mode & stat.S_ISVTX)
    except OSError:
        return False
