"""``vfiod monitor``: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from vfiod.client.busargs import BUS_HELP, add_bus_options, is_bus, keys_of
from vfiod.client.call import open_fds
from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError
from vfiod.client.line import InvalidLine
from vfiod.protocol.errors import VfiodError
from vfiod.protocol.fd import FileDescriptor, close_all

if TYPE_CHECKING:
    from vfiod.client.monitor.overbus import BusClient

__all__ = ["main"]

BUS_PATIENCE: Final = 5.0
"""Seconds to wait for who publishes: ZeroMQ does not say that nobody is there."""

LAST_EVENTS: Final = 0.2
"""Seconds for the last events of a bus to come: by a socket of their own, so they may be later than the last reply."""

EPILOG = """\
At a terminal: Tab completes commands, arguments, values and the ids of what there is; 'help COMMAND' (or F1) explains;
JSON may go over several lines; events appear above the prompt; history is kept; a lost connection is made again.
Ctrl-C cancels the line, or the wait for a reply; twice leaves, as Ctrl-D does.
In a pipe: one command a line in (or JSON), one JSON object a line out. The first error ends it with status 1;
with --keep-going the rest is run too, and the status is still 1.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod monitor", description="Talk to a server.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("path", metavar="PATH", help=f"the monitor's socket; {BUS_HELP}")
    made.add_argument("-H", "--human", action="store_true", help="human commands: info devices, ...")
    made.add_argument("-v", "--verbose", action="store_true", help="show what is sent")
    made.add_argument("-e", "--events", action="store_true", help="in a pipe: events too, as lines of JSON")
    made.add_argument("-k", "--keep-going", action="store_true", help="in a pipe: an error does not end it")
    made.add_argument(
        "--fd", metavar="NAME=PATH", action="append", default=[],
        help="open PATH and pass it under NAME first; NAME=fd:N passes the inherited fd N; may be repeated",
    )  # fmt: skip
    made.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="at a terminal; auto: unless NO_COLOR is set",
    )  # fmt: skip
    made.add_argument("--jsonrpc", action="store_true", help="the socket speaks JSON-RPC 2.0")
    add_bus_options(made)
    return made


def main(argv: list[str]) -> int:
    """Run it. The exit status."""
    options = parser().parse_args(argv)
    fds: dict[str, FileDescriptor] = {}
    try:
        fds = open_fds(options.fd)
        if sys.stdin.isatty() and sys.stdout.isatty():
            return _at_a_terminal(options, fds)
        return _in_a_pipe(options, fds)
    except InvalidLine as error:
        print(f"vfiod monitor: {error}", file=sys.stderr)
        return 2
    except (VfiodError, ValueError) as error:
        print(f"vfiod monitor: {error}", file=sys.stderr)
        return 1
    finally:
        close_all(fds.values())


def _dialect(options: argparse.Namespace) -> Dialect:
    return Dialect.JSONRPC if options.jsonrpc or is_bus(options.path) else Dialect.QMP


def _at_a_terminal(options: argparse.Namespace, fds: dict[str, FileDescriptor]) -> int:
    from vfiod.client.aio import AsyncClient
    from vfiod.client.monitor.interactive import run_interactive  # a line editor is slow to import

    path, dialect = options.path, _dialect(options)

    async def connect() -> AsyncClient | BusClient:
        if not is_bus(options.path):
            return await AsyncClient.connect(path, dialect=dialect)
        from vfiod.client.monitor.overbus import BusClient  # only whoever names a bus pays for ZeroMQ

        return await BusClient.connect(path, events=options.bus_events, keys=keys_of(options))

    colour = options.color == "always" or (options.color == "auto" and not os.environ.get("NO_COLOR"))
    return run_interactive(path, dialect, connect, human=options.human, verbose=options.verbose, fds=fds, colour=colour)


def _in_a_pipe(options: argparse.Namespace, fds: dict[str, FileDescriptor]) -> int:
    from vfiod.client.monitor.filter import run_filter

    if is_bus(options.path):
        if options.events and not options.bus_events:
            raise ClientError(
                "A bus has its events elsewhere: with -e, add --bus-events ADDRESS, that of 'vfiod serve --events'"
            )
        from vfiod.client.bus import Bus, EventReader

        with ExitStack() as open_:
            bus = open_.enter_context(Bus(options.path, keys=keys_of(options)))
            reader = None
            if options.events:
                reader = EventReader(options.bus_events, keys=keys_of(options), patience=BUS_PATIENCE)
                open_.enter_context(reader)
            return run_filter(bus, reader, options, fds, linger_s=LAST_EVENTS)
    from vfiod.client.sync import Client

    with Client.connect(options.path, dialect=_dialect(options)) as client, client.events() as stream:
        return run_filter(client, stream, options, fds)
