"""The property ``romfile`` of ``device_add``."""

from __future__ import annotations

import os

from vfiod.protocol.errors import InvalidArgument, OperationFailed, PermissionRefused
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.commands.call import FDSET_PREFIX, Call
from vfiod.server.devices.romfile import RomFile
from vfiod.server.kernel import confinement

__all__ = ["open_romfile"]


def open_romfile(call: Call, name: str) -> RomFile:
    """Open what ``romfile`` names: an fd by its ``getfd`` name, ``/dev/fdset/N``, or, with ``--allow-open``, a path.

    A path is this process's to open: without ``--allow-open`` a monitor could read through the device's ROM whatever
    vfiod may read. Raises InvalidArgument, PermissionRefused, OperationFailed.
    """
    if not name.startswith("/") or name.startswith(FDSET_PREFIX):
        return RomFile(name, call.fd("romfile", name, FdKind.FILE, FdKind.MEMFD))
    if not call.machine.allow_open:
        raise PermissionRefused(
            f"Parameter 'romfile': '{name}' is a path, and this server opens none (it was started without "
            "--allow-open): pass the file as an fd, and give its getfd name or /dev/fdset/N"
        )
    try:
        # Neither a terminal nor a FIFO may keep vfiod waiting.
        number = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise InvalidArgument(f"Parameter 'romfile': {name!r} can be no path: {error}") from error
    except OSError as error:
        advice = confinement.advice(error.errno).removeprefix("; ")
        raise OperationFailed("open", f"romfile '{name}'", errno=error.errno or 0, advice=advice) from error
    return RomFile(name, FileDescriptor(number))
