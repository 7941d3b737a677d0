"""A whole server as a description and its fds; and a server made of them.

This is all that a hand-over sends, and all that a store of fds must keep: :func:`describe` looks and changes nothing,
so it may be called at any time while :func:`busy` says nothing; :func:`rebuild` makes a machine of it, in an event loop
that does nothing else until it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.machine.keeping import adopt_machine, keep_machine, needs_of, under_way
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.format import BadState, CannotKeep, State, decode, encode

if TYPE_CHECKING:
    from vfiod.server.machine import Machine

__all__ = ["BadState", "CannotKeep", "Description", "busy", "describe", "rebuild"]


class Description(Struct, frozen=True):
    """A server as it was at one moment.

    Attributes:
        data: the state; JSON, in the version of :mod:`vfiod.server.state.format`.
        fds: what each fd is called, for a person, and its number, lent; in the order in which ``data`` counts them.

    """

    data: bytes
    fds: tuple[tuple[str, int], ...]


def busy(machine: Machine) -> str | None:
    """What is under way, so that the machine cannot be described now, for a person; None: nothing."""
    return under_way(machine)


def describe(machine: Machine) -> Description:
    """Describe a machine. On its loop, while it is not :func:`busy`; nothing is changed.

    Raises CannotKeep: something of it cannot be described; the sentence names it.
    """
    given = Given()
    try:
        state = keep_machine(machine, given)
    except CannotKeep:
        raise
    except CommandError as error:
        raise CannotKeep(f"The machine cannot be handed over: {error}") from error
    whole = State(
        machine=state, program=program_version(), needs=needs_of(state), names=[name for name, _ in given.fds]
    )
    return Description(encode(whole), tuple(given.fds))


async def rebuild(machine: Machine, data: bytes, fds: list[FileDescriptor]) -> State:
    """Make what was described, in a machine that has nothing yet. It sends no events, and tells the kernel nothing.

    Args:
        machine: made in this process's running event loop.
        data: of the description.
        fds: in its order; taken over on every path.

    Raises BadState; CommandError, OSError: then the machine is of no use, and must be left without closing it: what it
    has is another process's.

    """
    taken = Taken(fds)
    try:
        state = decode(data)
        if state.machine.mdevs:
            await machine.mdevs.discover()
        adopt_machine(machine, state.machine, taken)
    finally:
        taken.close()
    return state


def program_version() -> str:
    """Our version, for a person."""
    from vfiod.server.commands.monitor import VERSION

    triple = VERSION.qemu
    return f"{triple.major}.{triple.minor}.{triple.micro}"
