"""The command reference, written from the catalogue: ``python -m vfiod.protocol.reference > docs/commands.md``."""

from __future__ import annotations

import enum
import inspect as python_inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import inspect

from vfiod.protocol.catalogue.declare import COMMANDS, EVENTS, CommandSpec, EventSpec, Family
from vfiod.protocol.examples import of_command, of_event
from vfiod.protocol.introspection import documented_fields

__all__ = ["markdown", "types_in_words"]

TEST: Final = "tests/integration/pages/test_commands.py::test_every_example"
_EVENT_NAMES: Final = {event.data.__name__: event.name for event in EVENTS.values()}
LAB_TEST: Final = "tests/lab/guest/test_reset.py::test_the_examples_of_the_reference"

_INTRODUCTION = """\
# Commands and events

Written from the catalogue (`protocol/vfiod/protocol/catalogue`) by `make docs`: do not edit.

Over QMP a command is `{"execute": NAME, "arguments": {...}, "id": ANY}`, over JSON-RPC 2.0
`{"jsonrpc": "2.0", "method": NAME, "params": {...}, "id": ID}`. Names, arguments and results are the same.

- **oob**: may be executed out of band (`exec-oob`), and then always answers at once.
- **slow**: may wait for the kernel or a peer; other sessions go on meanwhile.
- **reads**: changes nothing.
- A member that may be left out is marked *optional*, or with what it is when it is left out.
- A member of a result whose name ends in `-fd` is the index of that fd among the fds attached to the reply.
- The data of every event have one more member: `seq`, the event's place among all events of the machine.
- Examples are run by the tests: `->` is sent, `<-` comes, events too; `"..."` is another each time, or goes on.
"""


def markdown() -> str:
    """All of the reference, ending in one newline."""
    return "\n".join(_lines()).rstrip("\n") + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for family in Family:
        commands = [command for command in COMMANDS.values() if command.family is family]
        events = [event for event in EVENTS.values() if event.family is family]
        if not commands and not events:
            continue
        yield f"## {family.value.capitalize()}\n"
        for name in (*(command.name for command in commands), *(event.name for event in events)):
            yield f"- [`{name}`](#{name.lower()})"
        yield ""
        for command in commands:
            yield from _command(command)
        for event in events:
            yield from _event(event)
    yield "## Types\n"
    for declared in sorted(_types(), key=lambda kind: kind.__name__):
        yield from _type(declared)


def _command(spec: CommandSpec) -> Iterator[str]:
    marks = [
        word
        for word, applies in (
            ("oob", spec.allow_oob),
            ("slow", spec.slow),
            ("reads", not spec.mutates),
            ("unstable", spec.unstable),
        )
        if applies
    ]
    yield f"### {spec.name}\n"
    if marks:
        yield ", ".join(f"**{mark}**" for mark in marks) + "\n"
    yield _text(spec.arguments) + "\n"
    yield from _members(spec.arguments, "Arguments")
    yield f"Returns {_link(inspect.type_info(spec.returns))}.\n"
    for example in of_command(spec.name):
        if example.lab:
            yield "With a device of the kernel:\n"
        yield _fenced(example.text, LAB_TEST if example.lab else TEST)


def _event(spec: EventSpec) -> Iterator[str]:
    yield f"### {spec.name}\n"
    if spec.rate_key is not None:
        of = " of each " + " and ".join(f"`{member}`" for member in spec.rate_key) if spec.rate_key else ""
        yield f"Event; rate limited: at most one{of} per second, the last one is never lost.\n"
    else:
        yield "Event.\n"
    yield _text(spec.data) + "\n"
    yield from _members(spec.data, "Data")
    if (text := of_event(spec.name)) is not None:
        yield _fenced(text, TEST)


def _fenced(text: str, test: str) -> str:
    return f"```json run-by={test}\n{text}\n```\n"


def _type(declared: type) -> Iterator[str]:
    yield f"### {declared.__name__}\n"
    yield _text(declared) + "\n"
    if issubclass(declared, enum.Enum):
        yield "One of " + ", ".join(f"`{member.value}`" for member in declared) + ".\n"
    elif issubclass(declared, msgspec.Struct):
        yield from _members(declared, "Members")


def _members(declared: type[msgspec.Struct], title: str) -> Iterator[str]:
    fields = {field.encode_name: field.type for field in inspect.type_info(declared).fields}  # type: ignore[attr-defined]
    documented = list(documented_fields(declared))
    if not documented:
        return
    yield f"| {title} | | |"
    yield "|---|---|---|"
    for field in documented:
        notes = [field.description.rstrip(".")] if field.description else []
        notes.extend(_bounds(fields[field.name]))
        if not field.required:
            absent = field.default is msgspec.UNSET
            notes.append("*optional*" if absent else f"default `{msgspec.json.encode(field.default).decode()}`")
        yield f"| `{field.name}` | {_link(fields[field.name])} | {'; '.join(notes).replace('|', chr(92) + '|')} |"
    yield ""


def _bounds(info: inspect.Type) -> Iterator[str]:
    """The range or length that a declaration gives, in words."""
    info = _bare(info)
    if isinstance(info, inspect.IntType | inspect.FloatType):
        low = info.ge if info.ge is not None else None if info.gt is None else info.gt + 1
        high = info.le if info.le is not None else None if info.lt is None else info.lt - 1
        unit = ""
    elif isinstance(info, inspect.StrType | inspect.BytesType):
        low, high = info.min_length, info.max_length
        unit = " bytes" if isinstance(info, inspect.BytesType) else " characters"
    else:
        return
    if low is not None and high is not None:
        yield f"{low} to {high}{unit}"
    elif low is not None:
        yield f"at least {low}{unit}"
    elif high is not None:
        yield f"at most {high}{unit}"


def _bare(info: inspect.Type) -> inspect.Type:
    while isinstance(info, inspect.Metadata):
        info = info.type
    return info


def _link(info: inspect.Type) -> str:
    """A type in words, with a link when it has a chapter of its own."""
    info = _bare(info)
    if isinstance(info, inspect.StructType | inspect.EnumType):
        if isinstance(info, inspect.StructType) and not info.fields:
            return "`{}`"
        name = info.cls.__name__
        if name in _EVENT_NAMES:
            return f"[the data of {_EVENT_NAMES[name]}](#{_EVENT_NAMES[name].lower()})"
        return f"[{name}](#{name.lower()})"
    if isinstance(info, inspect.ListType | inspect.VarTupleType):
        return f"a list of {_link(info.item_type)}"
    if isinstance(info, inspect.UnionType):
        return " or ".join(_link(choice) for choice in info.types)
    if isinstance(info, inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in info.values)
    for kinds, name in (
        (inspect.BoolType, "boolean"),
        (inspect.IntType, "integer"),
        (inspect.FloatType, "number"),
        (inspect.StrType, "string"),
        (inspect.BytesType, "string (base64)"),
        (inspect.DictType, "object"),
        (inspect.NoneType, "null"),
    ):
        if isinstance(info, kinds):
            return name
    return "any value"


def types_in_words(declared: type[msgspec.Struct]) -> dict[str, str]:
    """The type of each member, by its name on the wire, in words with no links; for the manual pages."""
    fields = inspect.type_info(declared).fields  # type: ignore[attr-defined]
    return {
        field.encode_name: re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", _link(field.type)).replace("`", "")
        for field in fields
    }


def _types() -> set[type]:
    """Every class and enumeration that commands and events refer to, but are not."""
    found: set[type] = set()

    def visit(info: inspect.Type) -> None:
        info = _bare(info)
        if isinstance(info, inspect.EnumType):
            found.add(info.cls)
        elif isinstance(info, inspect.StructType):
            if info.cls in found or not info.fields:
                return
            found.add(info.cls)
            for field in info.fields:
                visit(field.type)
        elif isinstance(info, inspect.ListType | inspect.VarTupleType):
            visit(info.item_type)
        elif isinstance(info, inspect.DictType):
            visit(info.value_type)
        elif isinstance(info, inspect.UnionType):
            for choice in info.types:
                visit(choice)

    own: set[Any] = {command.arguments for command in COMMANDS.values()} | {event.data for event in EVENTS.values()}
    for command in COMMANDS.values():
        visit(inspect.type_info(command.arguments))
        visit(inspect.type_info(command.returns))
    for event in EVENTS.values():
        visit(inspect.type_info(event.data))
    return found - own


def _text(declared: type) -> str:
    """A docstring as Markdown: double backquotes become single ones."""
    return (python_inspect.getdoc(declared) or "").replace("``", "`")


if __name__ == "__main__":
    sys.stdout.write(markdown())
