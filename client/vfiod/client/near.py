"""What somebody meant who mistyped a name. The server's own words stay as QEMU's are; this goes behind them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vfiod.client.line import members
from vfiod.protocol.catalogue import COMMANDS

__all__ = ["did_you_mean", "meant"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` where something is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def meant(command: str, arguments: Iterable[str] = (), more: Iterable[str] = ()) -> str:
    """The same of a command that was refused: of its name, or of the first argument that it does not know.

    Args:
        command: its name.
        arguments: the names of the arguments it was given.
        more: names that count as commands besides those of the catalogue.

    """
    spec = COMMANDS.get(command)
    if spec is None:
        return did_you_mean(command, [*COMMANDS, *more])
    known = members(spec.arguments)
    return next((hint for name in arguments if name not in known and (hint := did_you_mean(name, known))), "")
