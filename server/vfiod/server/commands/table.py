"""The handler of every command. A test holds it to the catalogue."""

from __future__ import annotations

from typing import Final

from vfiod.protocol.catalogue import command_of
from vfiod.server.commands import (
    ccw,
    devices,
    exports,
    fds,
    human,
    interrupts,
    mediated,
    memory,
    monitor,
    objects,
    regions,
    reset,
    topology,
)
from vfiod.server.commands.call import Handler

__all__ = ["TABLE"]

_FAMILIES: Final = (
    monitor,
    human,
    fds,
    objects,
    devices,
    memory,
    regions,
    interrupts,
    reset,
    ccw,
    mediated,
    topology,
    exports,
)

TABLE: Final[dict[str, Handler]] = {
    command_of(arguments).name: handler for family in _FAMILIES for arguments, handler in family.HANDLERS.items()
}
"""The handler of every command, by the command's name."""
