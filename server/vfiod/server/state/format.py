"""The format of a description: its name and version, its bytes, and what whoever takes it must know.

The version changes when a reader of the one before would do wrong: a reader takes exactly its own. What is new and can
be told apart is a *need*: a name of what a description contains (``pci``, ``mdev:primer``). A reader that lacks one
says so before anything moves.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct, field

from vfiod.protocol.errors import CommandError, VfiodError
from vfiod.server.state.doors import DoorsState, MonitorState, StoreState
from vfiod.server.state.machine import MachineState

__all__ = ["FORMAT", "VERSION", "BadState", "CannotKeep", "State", "decode", "encode"]

FORMAT: Final = "vfiod-state"
VERSION: Final = 1


class BadState(VfiodError):
    """A description that cannot be read: what is wrong with it."""


class CannotKeep(CommandError):
    """Something that no description can hold, by name."""


class State(Struct, frozen=True, kw_only=True):
    """Everything of one server.

    Attributes:
        format: always :data:`FORMAT`.
        version: of the format.
        program: vfiod's version, for a person.
        needs: what a reader must know.
        names: what each fd is, for a person, by place.
        machine: the machine.
        doors: exports, and their clients.
        monitor: sessions, and listening sockets; None: they are not part of it.
        store: of fds, which the reader goes on with; None: there is none, or the description is in it.
        left_out: what there was besides, and why it is not here, a sentence each.

    """

    machine: MachineState
    program: str
    needs: list[str]
    names: list[str]
    format: str = FORMAT
    version: int = VERSION
    doors: DoorsState = field(default_factory=DoorsState)
    monitor: MonitorState | None = None
    store: StoreState | None = None
    left_out: list[str] = field(default_factory=list)


class _Head(Struct):
    format: str = FORMAT
    version: int = VERSION


_encoder: Final = msgspec.json.Encoder()


def encode(state: State) -> bytes:
    """The bytes of a description: JSON."""
    return _encoder.encode(state)


def decode(data: bytes) -> State:
    """A description from its bytes. Raises BadState: another format, another version, or damaged."""
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError) as error:
        raise BadState(f"This is no state of vfiod: {error}") from error
    if head.format != FORMAT:
        raise BadState(f"This is no state of vfiod: its format is '{head.format}'")
    if head.version != VERSION:
        raise BadState(f"The state has version {head.version}, this vfiod reads version {VERSION}")
    try:
        return msgspec.json.decode(data, type=State)
    except (ValueError, RecursionError) as error:
        raise BadState(f"The state is damaged: {error}") from error
