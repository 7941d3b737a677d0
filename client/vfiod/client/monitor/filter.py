"""The monitor in a pipe: commands in, one line of JSON out for each; nothing a terminal would need."""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from vfiod.client.errors import ConnectionLost
from vfiod.client.line import InvalidLine, parse_line
from vfiod.client.render import plain
from vfiod.client.sync import Client, EventStream
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor, close_all

__all__ = ["run_filter"]


def run_filter(client: Client, *, human: bool, verbose: bool, events: bool) -> int:
    """Answer every line of standard input. 0: all were results; 1: at least one was an error."""
    status = 0
    with client.events() as stream:
        for line in _lines(client, stream if events else None):
            status |= _answer(client, line, human=human, verbose=verbose)
            if events:
                _print_events(stream)
            if client.fileno() < 0:
                break
    return status


def _lines(client: Client, stream: EventStream | None) -> Iterator[str]:
    """Lines of standard input; while none come, events are printed."""
    pending = b""
    while True:
        watched: list[Any] = [sys.stdin.buffer.raw if hasattr(sys.stdin.buffer, "raw") else sys.stdin.buffer]
        if stream is not None and client.fileno() >= 0:
            watched.append(client)
        ready = select.select(watched, [], [])[0]
        if client in ready and stream is not None:
            _print_events(stream)
        if watched[0] not in ready:
            continue
        chunk = watched[0].read(65536)
        pending += chunk or b""
        *complete, pending = pending.split(b"\n")
        if not chunk and pending:
            complete, pending = [pending], b""
        for line in complete:
            text = line.decode(errors="replace").strip()
            if text and not text.startswith("#"):
                yield text
        if not chunk:
            return


def _answer(client: Client, text: str, *, human: bool, verbose: bool) -> int:
    fds: list[tuple[str, FileDescriptor]] = []
    if verbose:
        print(f"-> {text}", file=sys.stderr)
    try:
        if human:
            print(client.human_monitor_command(command_line=text), end="", flush=True)
            return 0
        line = parse_line(text)
        result = plain(client.execute(line.command, line.arguments, oob=line.oob), fds)
        print(json.dumps({"return": result}), flush=True)
    except RemoteError as error:
        print(json.dumps({"error": {"class": error.remote_class, "desc": error.desc}}), flush=True)
        return 1
    except ConnectionLost as error:
        print(f"vfiod monitor: {error}", file=sys.stderr)
        return 1
    except (InvalidLine, ValueError) as error:
        print(json.dumps({"error": {"class": "GenericError", "desc": str(error)}}), flush=True)
        return 1
    finally:
        close_all(fd for _, fd in fds)
    return 0


def _print_events(stream: EventStream) -> None:
    for event in stream.pending():
        text = {"event": event.name, "data": msgspec.to_builtins(event.data), "seq": event.seq}
        print(json.dumps(text | {"timestamp": event.timestamp}), flush=True)
