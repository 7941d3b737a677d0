"""The options of programs that may talk over a bus: where it is, and with which keys."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfiod.client.bus import Keys

__all__ = ["BUS_HELP", "add_bus_options", "is_bus", "keys_of"]

BUS_HELP = "or the bus, ipc:PATH or tcp:HOST:PORT"


def add_bus_options(parser: argparse.ArgumentParser, *, events: bool = True) -> None:
    """Add ``--key`` and ``--server-key``; and ``--bus-events`` where there are events to show."""
    add = parser.add_argument
    if events:
        add("--bus-events", metavar="ADDRESS", default="", help="with a bus: where its events are")
    add("--key", metavar="FILE", help="with tcp: our own pair of keys, *.key_secret")
    add("--server-key", metavar="FILE", help="with tcp: the server's public key, *.key")


def is_bus(path: str) -> bool:
    """Whether it is a bus's address, and not a Unix socket's path."""
    return path.startswith(("ipc:", "tcp:"))


def keys_of(options: argparse.Namespace) -> Keys | None:
    """The keys of the command line. Raises ValueError when only one of the two is given."""
    if options.key is None and options.server_key is None:
        return None
    if options.key is None or options.server_key is None:
        raise ValueError("--key and --server-key go together: our own pair, and the server's public key")
    from vfiod.client.bus import Keys  # only who has keys pays for ZeroMQ

    return Keys(own=options.key, server=options.server_key)
