"""What may come next in a line of the monitor: commands, arguments, values. No I/O: live names are only asked for."""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from vfiod.client.annotations import metas
from vfiod.client.line import members, plain_type
from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.catalogue.words import FdName, IrqName, RegionName

__all__ = ["LOCAL", "Candidate", "Completion", "command_in", "complete", "complete_human", "readable"]

LOCAL: Final = {
    "help": "what commands there are, and what each takes",
    "pass": "pass an open fd under a name: pass NAME=PATH (getfd NAME=PATH does the same)",
    "json": "the reply of a command as JSON, where it would be a table: json query-devices",
    "exit": "leave the monitor; the server stays",
}
"""Words the monitor itself understands."""

REGIONS: Final = ("bar0", "bar1", "bar2", "bar3", "bar4", "bar5", "rom", "config", "vga")
IRQS: Final = ("intx", "msi", "msix")
#: Arguments whose values are names the server knows at this moment: by command and member, or by member.
LIVE: Final[dict[tuple[str, str] | str, str]] = {
    ("device_del", "id"): "devices", ("device-reset", "id"): "devices", ("query-devices", "id"): "devices",
    ("query-hot-reset", "id"): "devices", ("hot-reset", "id"): "devices",
    ("object-del", "id"): "objects", ("device-export-del", "id"): "exports", ("closefd", "fdname"): "fds",
    ("mdev-destroy", "uuid"): "mdevs", ("mdev-start", "uuid"): "mdevs", ("mdev-shutdown", "uuid"): "mdevs",
    ("trace-event-get-state", "name"): "traces", ("trace-event-set-state", "name"): "traces",
    ("mdev-create", "parent"): "parents", ("mdev-create", "type"): "types",
    "device": "devices", "memory-backend": "objects", "container": "objects", "iommufd": "objects", "mdev": "mdevs",
}  # fmt: skip
DRIVERS: Final = tuple(driver.value for driver in Driver)
SWITCHES: Final = ("on", "off")
FIXED: Final = {"driver": DRIVERS, "typename": DRIVERS}

QUERY: Final = "query-"
WITH_COMMAS: Final = ("device_add", "object-add")
"""Human commands that take QEMU's form too: everything in one word, with commas."""

_COMMAND: Final = re.compile(r'"(?:execute|exec-oob)"\s*:\s*"([^"]*)("?)')
_OPEN_KEY: Final = re.compile(r'[{,]\s*"([^":{}]*)$')
_OPEN_VALUE: Final = re.compile(r'"([^"]+)"\s*:\s*("?)([^",:{}\[\]\s]*)$')
_REQUEST: Final = (("execute", "the command"), ("exec-oob", "the command, out of band"), ("arguments", ""), ("id", ""))


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
        quotes: what stands around each live name.

    """

    prefix: str
    candidates: tuple[Candidate, ...] = ()
    live: str | None = None
    quotes: tuple[str, str] = ("", "")


def complete(line: str) -> Completion:
    """For the text before the cursor."""
    if line.lstrip().startswith("{"):
        return _json(line)
    words = line.removeprefix("json ").split(" ")
    if len(words) == 1:
        return _matching(words[0], [*_summaries(), *LOCAL.items()])
    command, word = words[0], words[-1]
    if command == "help":
        return _matching(word, _summaries())
    spec = COMMANDS.get(command)
    if spec is None:
        return Completion(word)
    known = members(spec.arguments)
    key, equals, value = word.partition("=")
    if equals:
        return _value(command, key, value, known.get(key))
    if command == "getfd" and "/" in word:
        return Completion(word)
    given = {other.partition("=")[0] for other in words[1:-1]}
    return _matching(word, [(f"{name}=", about(hint)) for name, hint in known.items() if name not in given])


def complete_human(line: str) -> Completion:
    """For the text before the cursor, of a human command: ``info devices``, ``device_add vfio-pci,id=nic0``."""
    words = line.split(" ")
    if len(words) == 1:
        return _matching(words[0], [("info", "what the server tells"), *_summaries()])
    if words[0] == "help":
        return _matching(words[-1], [("info", "what the server tells"), *_summaries()])
    if words[0] == "info" and len(words) == 2:
        queries = [(name.removeprefix(QUERY), text) for name, text in _summaries() if name.startswith(QUERY)]
        return _matching(words[1], queries)
    command, *rest = [QUERY + words[1], *words[2:]] if words[0] == "info" else words
    if command in WITH_COMMAS:
        rest = [part for word in rest for part in word.split(",")]
    spec, word = COMMANDS.get(command), rest[-1]
    if spec is None:
        return Completion(word)
    known = members(spec.arguments)
    key, equals, value = word.partition("=")
    if equals:
        return _value(command, key, value, known.get(key))
    needed = [field.encode_name for field in msgspec.structs.fields(spec.arguments) if field.required]
    free = [*needed, *(name for name in known if name not in needed)]
    for other in rest[:-1]:  # a word without a key is the next argument that has no value
        name, equals, _ = other.partition("=")
        given = name if equals else next(iter(free), "")
        free = [name for name in free if name != given]
    keys = _matching(word, [(f"{name}=", about(known[name])) for name in free])
    if not free:
        return keys
    values = _value(command, free[0], word, known[free[0]])
    return Completion(word, values.candidates + keys.candidates, values.live)


def command_in(line: str) -> str:
    """The command a line is about, as far as it is typed; empty: none yet."""
    if line.lstrip().startswith("{"):
        named = _COMMAND.search(line)
        return named[1] if named else ""
    words = line.removeprefix("json ").split()
    return "".join(words[:1]) if words[:1] != ["info"] else QUERY + "".join(words[1:2])


def _json(line: str) -> Completion:
    """In a request as QMP has it. What is nested in the arguments is not completed."""
    named = _COMMAND.search(line)
    if named is not None and not named[2]:
        return _quoted(_matching(named[1], _summaries()), '"')
    spec = COMMANDS.get(named[1]) if named else None
    outer, inside, arguments = line.partition('"arguments"')
    known = members(spec.arguments) if spec and inside else {}
    if inside and _depth(arguments) != 1:
        return Completion("")
    if value := _OPEN_VALUE.search(arguments):
        key, quote, text = value.groups()
        if key not in known:
            return Completion(text)
        found = _value(spec.name if spec else "", key, text, known[key])
        if quote:
            return _quoted(found, '"')
        if SWITCHES[0] in _choices(known[key], plain_type(known[key])):
            return _matching(text, [("true", ""), ("false", "")])
        numbers = all(choice.text.isdigit() for choice in found.candidates)
        return found if numbers and not found.live else _quoted(found, '"', '"') if not text else Completion(text)
    if opened := _OPEN_KEY.search(arguments if inside else outer):
        given = set(re.findall(r'"([^"]+)"\s*:', line))
        keys = [(name, about(hint)) for name, hint in known.items()] if inside else list(_REQUEST)
        return _quoted(_matching(opened[1], [(name, text) for name, text in keys if name not in given]), '": ')
    return Completion("")


def _depth(text: str) -> int:
    """How many braces and brackets are open at the end of it."""
    bare = re.sub(r'"[^"]*"', "", text)
    return sum(bare.count(char) for char in "{[") - sum(bare.count(char) for char in "}]")


def _quoted(found: Completion, after: str, before: str = "") -> Completion:
    candidates = tuple(Candidate(before + one.text + after, one.about) for one in found.candidates)
    return Completion(found.prefix, candidates, found.live, (before, after))


def _summaries() -> list[tuple[str, str]]:
    return [(name, readable(spec.summary)) for name, spec in COMMANDS.items()]


def about(annotation: Any) -> str:
    """The description nearest to the argument."""
    return next(reversed([readable(meta.description) for meta in metas(annotation) if meta.description]), "")


def readable(text: str) -> str:
    """Without the marks of the source's documentation."""
    return text.replace("``", "")


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
        yield from SWITCHES
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield from (str(member.value) for member in kind)


def _is(annotation: Any, word: Any) -> bool:
    """Whether an annotation is one of the catalogue's shared words."""
    return any(meta == get_args(word)[1] for meta in metas(annotation))
