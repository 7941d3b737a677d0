"""The state of a server that was: what a hand-over sends, or what lies in the store, damaged or from somebody else.

The first byte: 0, the rest is a description; else the rest is the content of two memory files of the store, cut where
the next two bytes say.
"""

from __future__ import annotations

import os

from tests.fuzz.target import Target, lines

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.state.format import BadState, decode, encode
from vfiod.server.store.places import name_of, place_of
from vfiod.server.store.slots import Slots

__all__ = ["TARGETS"]


def _state(data: bytes) -> None:
    if data[:1] == b"\0":
        _description(data[1:])
    elif len(data) > 3:
        cut = int.from_bytes(data[1:3], "little")
        _slots((data[3 : 3 + cut], data[3 + cut :]))


def _description(data: bytes) -> None:
    try:
        state = decode(data)
    except BadState as error:
        assert str(error)
    else:
        assert encode(decode(encode(state))) == encode(state), "it says something else when it is said again"
    place = place_of(data.decode(errors="replace"))
    assert place is None or place_of(name_of(place)) == place


def _slots(contents: tuple[bytes, bytes]) -> None:
    files = [FileDescriptor(os.memfd_create("slot")) for _ in contents]
    for fd, content in zip(files, contents, strict=True):
        os.write(fd.number, content)
    slots = Slots(files)
    try:
        slots.read()
        slots.try_again()
        slots.write(b"text")
        assert slots.read() == b"text", "what was there before hides what was written"
        assert slots.try_again() == 1
    finally:
        slots.close()


TARGETS = (
    Target(
        "state",
        _state,
        lambda: lines("state"),
        ("vfiod.server.state", "vfiod.server.store.slots", "vfiod.server.store.places"),
        "a state, or BadState; whatever lies in the store, what is written into it is what is read",
        250,
    ),
)
