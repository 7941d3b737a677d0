"""``vfiod serve``: becomes the server. The client's code and memory are gone then."""

from __future__ import annotations

import os
import sys

__all__ = ["main", "server_command"]


def server_command(arguments: list[str]) -> list[str]:
    """The command line of a server. ``-P``: never import from the current directory, which may be anybody's."""
    return [sys.executable, "-P", "-m", "vfiod.server", *arguments]


def main(argv: list[str]) -> int:
    """Become the server. Returns only if that cannot be."""
    command = server_command(argv)
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell, by intention
    except OSError as error:
        print(f"vfiod serve: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 1
