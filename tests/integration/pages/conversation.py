"""A conversation with a monitor, as a page or an example of the catalogue shows it, with a real server.

``-> `` is sent, ``<- `` is received. A line ``// sent with it: WHAT, WHAT`` before a message says which fds go along:
``eventfd``, ``memfd of N bytes`` (``with HEX at OFFSET``), or a path, which is opened.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from tests.integration.pages.matching import differences

PATIENCE: Final = 120.0
"""Seconds until what is awaited must have come: a busy machine is no failure."""

MOST_FDS: Final = 64


class Message(msgspec.Struct, frozen=True):
    """One message. ``with_it``: the fds that are sent along, in words."""

    sent: bool
    value: Any
    with_it: tuple[str, ...] = ()


def messages(text: str) -> Iterator[Message]:
    with_it: tuple[str, ...] = ()
    for part in re.split(r"^(?=->|<-|//)", text, flags=re.MULTILINE):
        if part.startswith("// sent with it: "):
            with_it = tuple(part.strip().removeprefix("// sent with it: ").split(", "))
        elif part.startswith(("->", "<-")):
            yield Message(part.startswith("->"), json.loads(part[2:]), with_it)
            with_it = ()
        else:
            assert not part.strip(), f"neither '->' nor '<-': {part}"


def open_fd(what: str) -> int:
    if what == "eventfd":
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    if size := re.fullmatch(r"memfd of (\d+) bytes(?: with ([0-9a-f]+) at (\d+))?", what):
        fd = os.memfd_create("example", os.MFD_CLOEXEC)
        os.ftruncate(fd, int(size[1]))
        if size[2]:
            os.pwrite(fd, bytes.fromhex(size[2]), int(size[3]))
        return fd
    return os.open(what, os.O_RDWR | os.O_CLOEXEC)


class Line:
    """A connection that has what came: replies in order, events until somebody asks for them."""

    def __init__(self, path: Path, *, qmp: bool = True, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.events: list[Any] = []
        self._bytes = b""
        self._quitting = False
        if qmp:
            self._next()
        if qmp and negotiate:
            self.send(Message(True, {"execute": "qmp_capabilities"}))
            assert self.reply() == {"return": {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.socket.close()

    def send(self, message: Message) -> None:
        self._quitting = message.value.get("execute") == "quit"  # which may hang up before it answers
        fds = [open_fd(what) for what in message.with_it]
        try:
            socket.send_fds(self.socket, [json.dumps(message.value).encode() + b"\n"], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def expect(self, shown: Any) -> list[str]:
        """Wait for what an example shows; what is different."""
        if "event" not in shown and "method" not in shown:
            try:
                return differences(shown, self.reply())
            except (EOFError, ConnectionResetError):
                return [] if self._quitting else ["the server hung up"]
        while True:
            for number, event in enumerate(self.events):
                if not differences(shown, event):
                    del self.events[number]
                    return []
            try:
                self._take()
            except (EOFError, ConnectionResetError):
                return [f"the server hung up, and there was no event like {shown}; came: {self.events}"]
            except TimeoutError:
                return [f"there is no event like {shown}; came: {self.events}"]

    def reply(self) -> Any:
        while True:
            came = self._take()
            if came is not None:
                return came

    def _take(self) -> Any:
        """The next message when it is a reply; an event is put aside, and None."""
        came = self._next()
        if "event" in came or "method" in came:
            self.events.append(came)
            return None
        return came

    def _next(self) -> Any:
        while b"\n" not in self._bytes:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, MOST_FDS)
            for fd in fds:
                os.close(fd)
            if not data:
                raise EOFError(f"the server hung up after {self._bytes!r}")
            self._bytes += data
        text, _, self._bytes = self._bytes.partition(b"\n")
        return json.loads(text)


def converse(path: Path, text: str, place: str) -> None:
    """A whole conversation, on a connection of its own. Events that are not shown do not matter."""
    parts = list(messages(text))
    first = parts[0].value
    with Line(path, qmp="jsonrpc" not in first, negotiate=first.get("execute") != "qmp_capabilities") as line:
        for part in parts:
            if part.sent:
                line.send(part)
            else:
                wrong = line.expect(part.value)
                assert not wrong, f"{place}: {wrong}"
