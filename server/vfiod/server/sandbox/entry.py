"""The way into the sandbox, for every program of ours: what it wants to keep, and when which door closes.

Two steps, as ``process`` says: :func:`confine` before the first thread, :func:`restrict` when all is ready. What the
kernel lacks is warned of, or refused (``required``).
"""

from __future__ import annotations

import logging
import os
from typing import Final

from msgspec import Struct

from vfiod.protocol.errors import VfiodError
from vfiod.server.sandbox import limits

__all__ = ["SandboxError", "Wanted", "confine", "restrict"]

_log: Final = logging.getLogger("vfiod")


class SandboxError(VfiodError):
    """The sandbox was required, and the kernel lacks something."""


class Wanted(Struct, frozen=True):
    """What a program keeps.

    Attributes:
        mode: ``--sandbox``: ``on`` goes on with what the kernel has, ``required`` does not, ``off`` keeps all.
        sockets: paths of files it makes and removes itself: sockets, the pidfile. Others may be made beside them.
        sockets_to_come: they are not there yet, so their directories stay writable even when others use them, too.
        paths: of ``--allow-path``, with or without ``ro:``.
        configuration: the file that is read again by SIGHUP.
        ports: TCP ports that may still be bound.
        host_devices: device nodes of VFIO are opened here.
        connect: Unix sockets may be connected.
        gid: the group that sockets are given to; None: our own.
        bus: ZeroMQ is in use.

    """

    mode: str
    sockets: tuple[str, ...] = ()
    sockets_to_come: bool = False
    paths: tuple[str, ...] = ()
    configuration: str | None = None
    ports: tuple[int, ...] = ()
    host_devices: bool = False
    connect: bool = False
    gid: int | None = None
    bus: bool = False


def confine(wanted: Wanted) -> None:
    """Give up privileges and files, and look at the limits. Raises SandboxError."""
    if wanted.mode != "off":
        _close(wanted)
    limits.check(host_devices=wanted.host_devices)


def _close(wanted: Wanted) -> None:
    from vfiod.server.sandbox import files, process  # who wants no sandbox does not pay for it

    for directory in dict.fromkeys(os.path.dirname(path) or "." for path in wanted.sockets):
        if not wanted.sockets_to_come and files.is_shared(directory):
            _log.warning(
                "What this server makes in '%s' stays there when it ends: others keep files there too, and the sandbox "
                "removes none of them. Give the sockets a directory of their own",
                directory,
            )
    rules = [
        *files.for_python(),
        *files.for_devices(allow_open=wanted.host_devices),
        *files.for_sockets(wanted.sockets, shared=wanted.sockets_to_come),
        *files.for_paths(wanted.paths),
        *([] if wanted.configuration is None else files.for_configuration(wanted.configuration)),
        *(files.for_names() if wanted.ports else []),
    ]
    _judge(wanted.mode, process.confine(rules, ports=wanted.ports, gid=wanted.gid))


def restrict(wanted: Wanted) -> None:
    """Give up the system calls that are not needed any more. Raises SandboxError."""
    if wanted.mode == "off":
        return
    from vfiod.server.sandbox import process

    gids = [os.getegid()] if wanted.gid is None else [os.getegid(), wanted.gid]
    _judge(wanted.mode, process.restrict(connect=wanted.connect, gids=gids, bus=wanted.bus))


def _judge(mode: str, problems: list[str]) -> None:
    """Say what the sandbox lacks; refuse to go on when it was required."""
    if problems and mode == "required":
        raise SandboxError(f"--sandbox required: {'; '.join(problems)}")
    for problem in problems:
        _log.warning("The sandbox is incomplete: %s", problem)
