"""What may come next in a line of the monitor: commands, arguments, values. No I/O: live names are only asked for."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from vfiod.client.line import members, plain_type
from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.catalogue.words import FdName, IrqName, RegionName

__all__ = ["LOCAL", "Candidate", "Completion", "complete"]

LOCAL: Final = {
    "help": "what commands there are, and what each takes",
    "pass": "pass an open fd under a name: pass NAME=PATH",
    "exit": "leave the monitor; the server stays",
}
"""Words the monitor itself understands."""

REGIONS: Final = ("bar0", "bar1", "bar2", "bar3", "bar4", "bar5", "rom", "config", "vga")
IRQS: Final = ("intx", "msi", "msix")
#: Arguments whose values are names the server knows at this moment: by command and member, or by member.
LIVE: Final = {
    ("device_del", "id"): "devices", ("device-reset", "id"): "devices", ("query-devices", "id"): "devices",
    ("object-del", "id"): "objects", ("mdev-destroy", "uuid"): "mdevs", ("closefd", "fdname"): "fds",
    ("trace-event-get-state", "name"): "traces", ("trace-event-set-state", "name"): "traces",
    ("mdev-create", "parent"): "parents", ("mdev-create", "type"): "types",
    "device": "devices", "memory-backend": "objects", "container": "objects", "mdev": "mdevs",
}  # fmt: skip
FIXED: Final = {"driver": ("vfio-pci",), "typename": ("vfio-pci",)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that may stand here, and what it is."""

    text: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What may replace the last ``len(prefix)`` characters.

    Attributes:
        prefix: what was typed of it.
        candidates: what it may become, as far as the catalogue knows.
        live: the kind of names to ask the server for (``devices``, ``fds``, ...), or None.

    """

    prefix: str
    candidates: tuple[Candidate, ...] = ()
    live: str | None = None


def complete(line: str) -> Completion:
    """For the text before the cursor."""
    words = line.split(" ")
    if line.lstrip().startswith("{"):
        return Completion("")
    if len(words) == 1:
        names = [(name, spec.summary) for name, spec in COMMANDS.items()] + list(LOCAL.items())
        return _matching(words[0], names)
    command, word = words[0], words[-1]
    if command == "help":
        return _matching(word, [(name, spec.summary) for name, spec in COMMANDS.items()])
    spec = COMMANDS.get(command)
    if spec is None:
        return Completion(word)
    known = members(spec.arguments)
    key, equals, value = word.partition("=")
    if equals:
        return _value(command, key, value, known.get(key))
    given = {other.partition("=")[0] for other in words[1:-1]}
    return _matching(word, [(f"{name}=", about(hint)) for name, hint in known.items() if name not in given])


def about(annotation: Any) -> str:
    """The description nearest to the argument."""
    return next(reversed([meta.description for meta in _metas(annotation) if meta.description]), "")


def _matching(prefix: str, names: list[tuple[str, str]]) -> Completion:
    return Completion(prefix, tuple(Candidate(name, text) for name, text in names if name.startswith(prefix)))


def _value(command: str, key: str, value: str, annotation: Any) -> Completion:
    """After ``key=``. In a list, the part after the last comma counts."""
    kind = plain_type(annotation) if annotation is not None else Any
    prefix = value.rpartition(",")[2] if get_origin(kind) is list else value
    live = LIVE.get((command, key)) or LIVE.get(key) or ("fds" if _is(annotation, FdName) else None)
    choices = FIXED.get(key) or tuple(_choices(annotation, kind))
    found = _matching(prefix, [(choice, "") for choice in choices])
    return Completion(prefix, found.candidates, live)


def _choices(annotation: Any, kind: Any) -> Iterator[str]:
    """The values a type allows, where they can be counted."""
    if _is(annotation, RegionName):
        yield from REGIONS
    elif _is(annotation, IrqName):
        yield from IRQS
    elif get_origin(kind) in (typing.Union, types.UnionType):
        for part in get_args(kind):
            yield from _choices(None, part)
    elif get_origin(kind) is list:
        yield from _choices(None, plain_type(get_args(kind)[0]))
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif kind is bool:
        yield from ("on", "off")
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield from (str(member.value) for member in kind)


def _metas(annotation: Any) -> Iterator[msgspec.Meta]:
    if get_origin(annotation) is typing.Annotated:
        inner, *extra = get_args(annotation)
        yield from _metas(inner)
        yield from (meta for meta in extra if isinstance(meta, msgspec.Meta))
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for part in get_args(annotation):
            yield from _metas(part)


def _is(annotation: Any, word: Any) -> bool:
    """Whether an annotation is one of the catalogue's shared words."""
    return any(meta == get_args(word)[1] for meta in _metas(annotation))
