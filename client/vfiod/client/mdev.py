"""``vfiod mdev serve``: becomes a vfio-user program. The client's code and memory are gone then."""

from __future__ import annotations

import os
import sys

from vfiod.client.serve import server_command

__all__ = ["main"]

USAGE = """usage: vfiod mdev serve --type T (--socket-path PATH | --fd FDNUM) ...

One mediated device as a vfio-user program; 'vfiod mdev serve --help' tells more."""


def main(argv: list[str]) -> int:
    """Become the program. Returns only if that cannot be: 2: no such command line; 1: it cannot be run."""
    if argv[:1] != ["serve"]:
        print(USAGE, file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    command = server_command(["mdev-serve", *argv[1:]])
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell, by intention
    except OSError as error:
        print(f"vfiod mdev serve: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 1
