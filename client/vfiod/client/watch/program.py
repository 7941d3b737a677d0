"""``vfiod watch``: the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfiod.client.busargs import BUS_HELP, add_bus_options, is_bus, keys_of
from vfiod.client.dialects import Dialect
from vfiod.protocol.errors import VfiodError

if TYPE_CHECKING:
    from vfiod.client.aio import AsyncClient
    from vfiod.client.monitor.overbus import BusClient

__all__ = ["main"]

PIPE_WIDTH: Final = 160
"""Columns where there is no terminal."""

FASTEST: Final = 0.05
"""Seconds between two looks, at least."""

EPILOG = """\
At a terminal the picture moves, and keys drive it: '?' lists them. In a pipe, or with --once, it is printed once.
--all looks for QMP sockets only where their names match --pattern: other sockets there (exports) serve one client at
a time, and are not for knocking at.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod watch", description="Devices, interrupts, DMA maps, exports and events of servers, live.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("paths", metavar="PATH", nargs="*", help=f"a monitor's socket; {BUS_HELP}")
    made.add_argument("--all", metavar="DIR", type=Path, help="all VMs whose sockets are in DIR, or in DIR/VM")
    made.add_argument("--pattern", default="*qmp*", help="what their sockets are called; default: %(default)s")
    made.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between looks; default 1")
    made.add_argument("--once", action="store_true", help="one picture, and exit")
    made.add_argument(
        "--sample", type=float, default=0.0, metavar="SECONDS", help="with --once: look twice, so that there are rates"
    )
    made.add_argument("--topology", action="store_true", help="with --once: the topology too")
    made.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="auto: at a terminal, unless NO_COLOR is set",
    )  # fmt: skip
    made.add_argument("--jsonrpc", action="store_true", help="the sockets speak JSON-RPC 2.0")
    add_bus_options(made)
    return made


def main(argv: list[str]) -> int:
    """Run it until the person leaves. 0; 1 when there is no server to begin with."""
    made = parser()
    options = made.parse_args(argv)
    if not options.paths and options.all is None:
        made.error("give a PATH, or --all DIR")
    if options.bus_events and (len(options.paths) != 1 or options.all is not None or not is_bus(options.paths[0])):
        made.error("--bus-events is for one bus alone")
    if options.all is not None and not options.all.is_dir():
        print(f"vfiod watch: --all takes a directory, and {options.all} is none", file=sys.stderr)
        return 1
    import asyncio  # nothing below is light: whoever asks for help does not wait for it

    from rich.console import Console

    from vfiod.client.watch.live import ANSWER_SECONDS, Watch, once, sockets_in

    def find() -> list[str]:
        return [*options.paths, *(sockets_in(options.all, options.pattern) if options.all is not None else [])]

    dialect = Dialect.JSONRPC if options.jsonrpc else Dialect.QMP

    async def connect(path: str) -> AsyncClient | BusClient:
        if not is_bus(path):
            from vfiod.client.aio import AsyncClient

            return await AsyncClient.connect(path, dialect=dialect, timeout=ANSWER_SECONDS)
        from vfiod.client.monitor.overbus import BusClient  # only whoever names a bus pays for ZeroMQ

        return await BusClient.connect(path, events=options.bus_events, keys=keys)

    at_terminal = sys.stdout.isatty()
    no_colour = {"auto": None, "always": False, "never": True}[options.color]
    console = Console(
        width=None if at_terminal else PIPE_WIDTH, no_color=no_colour, highlight=False,
        force_terminal=True if options.color == "always" else None,
    )  # fmt: skip
    try:
        keys = keys_of(options)
        if options.once or not at_terminal:
            paths = find()
            if not paths:
                print(f"vfiod watch: no socket in {options.all} is called {options.pattern}", file=sys.stderr)
                return 1
            return asyncio.run(once(paths, connect, console, topology=options.topology, seconds=options.sample))
        more = find if options.all is not None else None
        interval = max(options.interval, FASTEST)

        async def watch() -> None:
            await Watch(options.paths, more, connect, interval, console).run()

        asyncio.run(watch())
    except KeyboardInterrupt:
        return 0
    except (VfiodError, ValueError) as error:
        print(f"vfiod watch: {error}", file=sys.stderr)
        return 1
    return 0
