"""``vfiod call``: one command from a shell."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from vfiod.client.busargs import BUS_HELP, add_bus_options, is_bus, keys_of
from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError
from vfiod.client.line import InvalidLine, arguments_from
from vfiod.client.render import describe_fd, json_text, plain
from vfiod.client.sync import Client
from vfiod.protocol.errors import RemoteError, errno_name
from vfiod.protocol.fd import FileDescriptor, close_all

if TYPE_CHECKING:
    from vfiod.client.bus import Bus

__all__ = ["main", "open_fd"]

EPILOG = """\
examples:
  vfiod call vm1.sock query-devices
  vfiod call vm1.sock device_add driver=vfio-pci id=nic0 host=0000:03:00.0 group-fd=g --fd g=/dev/vfio/12
  vfiod call vm1.sock dma-map iova=0 size=64K fd=ram --fd ram=/dev/shm/guest
  vfiod call vm1.sock region-read device=nic0 region=bar0 offset=0x10 size=4

The exit status is 0 for a result, 1 for an error reply or no reply, 2 for a command line that makes no sense.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod call", description="Run one command. The result is JSON on standard output, an error on standard error.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("path", metavar="PATH", help=f"the monitor's socket; {BUS_HELP}")
    made.add_argument("command", metavar="COMMAND", help="such as query-devices; query-commands lists them")
    made.add_argument("arguments", metavar="key=value", nargs="*", help="nested with dots: parameters.size=4K")
    made.add_argument(
        "--fd", metavar="NAME=PATH", action="append", default=[],
        help="open PATH and pass it under NAME; NAME=fd:N passes the inherited fd N; may be repeated",
    )  # fmt: skip
    made.add_argument("--json", metavar="OBJECT", help="all arguments as one JSON object")
    made.add_argument("--oob", action="store_true", help="run out of band (commands that allow it)")
    made.add_argument("--jsonrpc", action="store_true", help="the socket speaks JSON-RPC 2.0")
    add_bus_options(made, events=False)
    made.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after this; default: never; on a bus 30"
    )
    made.add_argument("--compact", action="store_true", help="the result on one line")
    made.add_argument(
        "--run", metavar="COMMAND",
        help="run this shell command with the result on its standard input and the fds of the result open: "
        "...-fd members are then its fd numbers",
    )  # fmt: skip
    return made


def open_fd(path: str) -> FileDescriptor:
    """Open what ``--fd`` names, for reading and writing where that is allowed. Raises InvalidLine."""
    try:
        if path.startswith("fd:"):
            return FileDescriptor.duplicate_of(int(path[3:]))
        try:
            return FileDescriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except (PermissionError, IsADirectoryError):
            return FileDescriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except ValueError as error:
        raise InvalidLine(f"--fd NAME=fd:N takes the number of an open fd, got '{path}'") from error
    except OSError as error:
        raise InvalidLine(f"Cannot open {path}: {errno_name(error.errno or 0)}") from error


def open_fds(options: list[str]) -> dict[str, FileDescriptor]:
    """Every ``--fd``, by name."""
    paths: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not name or not path:
            raise InvalidLine(f"--fd takes NAME=PATH, got '{option}'")
        if name in paths:
            raise InvalidLine(f"--fd {name} was given twice")
        paths[name] = path
    opened: dict[str, FileDescriptor] = {}
    try:
        for name, path in paths.items():
            opened[name] = open_fd(path)
    except BaseException:
        close_all(opened.values())
        raise
    return opened


def main(argv: list[str]) -> int:
    """Run it. The exit status."""
    options = parser().parse_intermixed_args(argv)
    try:
        arguments = _arguments(options)
        fds = open_fds(options.fd)
    except InvalidLine as error:
        print(f"vfiod call: {error}", file=sys.stderr)
        return 2
    result_fds: list[tuple[str, FileDescriptor]] = []
    try:
        with _connected(options) as client:
            result = plain(_call(client, options, arguments, fds), result_fds)
            return _show(result, result_fds, options)
    except RemoteError as error:
        from vfiod.client.near import meant

        errno = f" [{error.errno}]" if error.errno else ""
        hint = meant(options.command, arguments)
        print(f"vfiod call: {error.remote_class}: {error}{errno}{hint}", file=sys.stderr)
        return 1
    except (ClientError, ValueError) as error:
        print(f"vfiod call: {error}", file=sys.stderr)
        return 1
    finally:
        close_all([*fds.values(), *(fd for _, fd in result_fds)])


def _connected(options: argparse.Namespace) -> Client | Bus:
    if is_bus(options.path):
        from vfiod.client.bus import DEFAULT_TIMEOUT, Bus  # only who names a bus pays for ZeroMQ

        return Bus(options.path, keys=keys_of(options), timeout=options.timeout or DEFAULT_TIMEOUT)
    dialect = Dialect.JSONRPC if options.jsonrpc else Dialect.QMP
    return Client.connect(options.path, dialect=dialect, timeout=options.timeout)


def _call(
    client: Client | Bus, options: argparse.Namespace, arguments: dict[str, Any], fds: dict[str, FileDescriptor]
) -> Any:
    if not isinstance(client, Client):
        if fds:
            raise ValueError(
                "A bus carries no fds: send them over a Unix socket with add-fd, and name /dev/fdset/N here"
            )
        return client.execute(options.command, arguments)
    if options.command in ("getfd", "add-fd"):  # these name what travels with them
        return client.execute(options.command, arguments, attach=tuple(fds.values()), oob=options.oob)
    return client.execute(options.command, arguments, fds=fds, oob=options.oob)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    arguments = arguments_from(options.command, options.arguments)
    if options.json is not None:
        import msgspec  # seldom needed

        try:
            arguments = msgspec.json.decode(options.json, type=dict[str, Any]) | arguments
        except msgspec.MsgspecError as error:
            raise InvalidLine(f"--json takes a JSON object: {error}") from error
    return arguments


def _show(result: Any, fds: list[tuple[str, FileDescriptor]], options: argparse.Namespace) -> int:
    if options.run is None:
        print(json_text(result, compact=options.compact))
        for index, (path, fd) in enumerate(fds):
            print(f"vfiod call: {path} = {index}: {describe_fd(fd)}; closed now (--run keeps it)", file=sys.stderr)
        return 0
    text = json_text(_numbered(result, [fd.number for _, fd in fds]), compact=options.compact)
    child = subprocess.run(
        ["/bin/sh", "-c", options.run], input=text + "\n", text=True, check=False, pass_fds=[fd.number for _, fd in fds]
    )
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _numbered(value: Any, numbers: list[int]) -> Any:
    """Indexes of fds replaced by the numbers the child has them under."""
    if isinstance(value, dict):
        return {
            name: numbers[item] if name.endswith("-fd") and type(item) is int else _numbered(item, numbers)
            for name, item in value.items()
        }
    return [_numbered(item, numbers) for item in value] if isinstance(value, list) else value
