"""The monitor in a pipe: commands in, one line of JSON out for each; nothing a terminal would need."""

from __future__ import annotations

import argparse
import json
import select
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from vfiod.client.errors import ClientError, ConnectionLost
from vfiod.client.line import is_unfinished, parse_line
from vfiod.client.monitor.local import open_named
from vfiod.client.render import plain
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor, close_all

if TYPE_CHECKING:
    from vfiod.client.bus import Bus, EventReader
    from vfiod.client.sync import Client, EventStream

__all__ = ["run_filter"]


def run_filter(
    client: Client | Bus,
    stream: EventStream | EventReader | None,
    options: argparse.Namespace,
    fds: Mapping[str, FileDescriptor],
    *,
    linger_s: float = 0.0,
) -> int:
    """Answer every line of standard input, to the first error unless told otherwise.

    Args:
        client: connected.
        stream: its events: those of a Unix socket, which tell when the connection ends; or of the bus's other socket.
        options: of the command line: ``human``, ``verbose``, ``events``, ``keep_going``.
        fds: passed first, under their names.
        linger_s: seconds without an event after the last reply, before no more are waited for.

    Returns:
        0: all were results; 1: at least one was an error.

    """
    status = 0
    for name, fd in fds.items():
        client.getfd(fdname=name, fd=fd)
    for line in _lines(stream if options.events else None):
        failed, lost = _answer(client, line, options)
        if options.events and stream is not None and not lost:
            _print_events(stream)
        status |= failed
        if lost or (failed and not options.keep_going):
            break
    if options.events and stream is not None and linger_s:
        _print_events(stream)
        while select.select([stream], [], [], linger_s)[0]:
            _print_events(stream)
    return status


def _lines(stream: EventStream | EventReader | None) -> Iterator[str]:
    """Commands from standard input, JSON over several lines as one; while none come, events are printed."""
    unfinished = ""
    for text in _raw_lines(stream):
        if not unfinished and (not text or text.startswith("#")):
            continue
        unfinished += f"\n{text}" if unfinished else text
        if not is_unfinished(unfinished):
            yield unfinished
            unfinished = ""
    if unfinished:
        yield unfinished


def _raw_lines(stream: EventStream | EventReader | None) -> Iterator[str]:
    pending = b""
    source = sys.stdin.buffer.raw if hasattr(sys.stdin.buffer, "raw") else sys.stdin.buffer
    while True:
        watched: list[Any] = [source] if stream is None else [source, stream]
        ready = select.select(watched, [], [])[0]
        if stream is not None and stream in ready:
            _print_events(stream)
        if source not in ready:
            continue
        chunk = source.read(65536)
        pending += chunk or b""
        *complete, pending = pending.split(b"\n")
        if not chunk and pending:
            complete, pending = [pending], b""
        for line in complete:
            yield line.decode(errors="replace").strip()
        if not chunk:
            return


def _answer(client: Client | Bus, text: str, options: argparse.Namespace) -> tuple[int, bool]:
    """Whether it failed (1), and whether the server is gone."""
    fds: list[tuple[str, FileDescriptor]] = []
    if options.verbose:
        print(f"-> {text}", file=sys.stderr)
    try:
        if options.human:
            said = client.human_monitor_command(command_line=text)
            print(said, end="", flush=True)
            return int(said.startswith("Error: ")), False  # as QEMU, the server tells errors as text
        named = open_named(text)
        if named is not None:
            with named[1] as fd:
                result = plain(client.getfd(fdname=named[0], fd=fd))
        else:
            line = parse_line(text.removeprefix("json "))
            result = plain(client.execute(line.command, line.arguments, oob=line.oob), fds)
        print(json.dumps({"return": result}), flush=True)
    except RemoteError as error:
        print(json.dumps({"error": {"class": error.remote_class, "desc": error.desc}}), flush=True)
        return 1, False
    except ConnectionLost as error:
        print(f"vfiod monitor: {error}", file=sys.stderr)
        return 1, True
    except (ClientError, ValueError) as error:
        print(json.dumps({"error": {"class": "GenericError", "desc": str(error)}}), flush=True)
        return 1, False
    finally:
        close_all(fd for _, fd in fds)
    return 0, False


def _print_events(stream: EventStream | EventReader) -> None:
    for event in stream.pending():
        text = {"event": event.name, "data": msgspec.to_builtins(event.data), "seq": event.seq}
        print(json.dumps(text | {"timestamp": event.timestamp}), flush=True)
