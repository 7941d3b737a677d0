"""``vfiod monitor``: the command line."""

from __future__ import annotations

import argparse
import sys

from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError

__all__ = ["main"]

EPILOG = """\
At a terminal: Tab completes commands, arguments, values and the ids of what there is; 'help COMMAND' explains;
events appear above the prompt; history is kept; a lost connection is made again. In a pipe: one command a line in,
one JSON object a line out, and the exit status is 1 when one of them was an error.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod monitor", description="Talk to a server.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("path", metavar="PATH", help="the monitor's socket")
    made.add_argument("-H", "--human", action="store_true", help="human commands: info devices, ...")
    made.add_argument("-v", "--verbose", action="store_true", help="show what is sent")
    made.add_argument("-e", "--events", action="store_true", help="in a pipe: events too, as lines of JSON")
    made.add_argument("--jsonrpc", action="store_true", help="the socket speaks JSON-RPC 2.0")
    return made


def main(argv: list[str]) -> int:
    """Run it. The exit status."""
    options = parser().parse_args(argv)
    dialect = Dialect.JSONRPC if options.jsonrpc else Dialect.QMP
    try:
        if sys.stdin.isatty():
            from vfiod.client.monitor.interactive import run_interactive  # a line editor is slow to import

            return run_interactive(options.path, dialect, human=options.human, verbose=options.verbose)
        from vfiod.client.monitor.filter import run_filter
        from vfiod.client.sync import Client

        with Client.connect(options.path, dialect=dialect) as client:
            return run_filter(client, human=options.human, verbose=options.verbose, events=options.events)
    except ClientError as error:
        print(f"vfiod monitor: {error}", file=sys.stderr)
        return 1
