"""``human-monitor-command``: a line as a person types it, and text as a person reads it.

``info NAME [ID]`` is ``query-NAME``; every other line is a command's name and its arguments::

    info devices
    device_add vfio-pci,id=nic0,host=01:00.0,group-fd=g7
    region-read nic0 bar0 0x10 size=4
    help irq-start

Words without ``=`` fill the arguments a command requires, then the others, in their order. Numbers may be hexadecimal,
switches ``on`` or ``off``, lists comma-separated, and anything may be JSON. An error is text too, as in QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterator
from inspect import cleandoc
from typing import Any, Final

import msgspec
from msgspec import inspect

from vfiod.protocol.catalogue import COMMANDS, CommandSpec, monitor
from vfiod.protocol.catalogue.devices import QueryTopology, Topology, TopologyFormat
from vfiod.protocol.errors import CommandError, InternalError, InvalidArgument
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server.commands.call import Call, Handlers

__all__ = ["HANDLERS", "format_value", "parse_line"]

QUERY: Final = "query-"
NOT_HERE: Final = frozenset({"human-monitor-command", "qmp_capabilities"})

WIDTH: Final = 120
"""Characters of the widest table; what is wider is shown as one block for each object."""

HEXADECIMAL: Final = frozenset({"value", "offset", "iova", "vendor-id", "device-id"})
"""Members a person reads as hexadecimal numbers."""

_NUMBER: Final = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|[0-9]+)")
_WORDS_OF_TRUTH: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def human_monitor_command(call: Call, arguments: monitor.HumanMonitorCommand) -> str | Awaitable[str]:
    """Run one line; what goes wrong is part of the text."""
    # A line of text cannot say which fd is which.
    call.carries_fds = False
    call.arguments = None
    spec: CommandSpec | None = None
    try:
        words = _split(arguments.command_line)
        if not words:
            return ""
        if words[0] in ("help", "?"):
            return _help(words[1:])
        if words[0] == "info" and len(words) == 1:
            return _help(["info"])
        spec, rest = _command(words)
        value = _begin(call, spec, rest)
    except Exception as error:  # noqa: BLE001 - a defect is noted too, and goes on
        return _failed(call, spec, error)
    if hasattr(type(value), "__await__"):
        return _later(call, spec, value)
    _note(call, spec, None)
    return format_value(value)


def _begin(call: Call, spec: CommandSpec, rest: list[str]) -> Any:
    from vfiod.server.commands.table import TABLE  # the table holds this module's command too

    if call.session is not None and not call.session.allows(spec.name):
        raise call.session.refusal(spec.name)
    # What asks the call for its arguments means those of the command: the check of claims, the audit log.
    given = _arguments(spec, rest)
    if spec.arguments is QueryTopology:
        given.setdefault("format", TopologyFormat.TREE.value)  # its nodes and edges are for programs
    call.arguments = decode_arguments(spec, msgspec.Raw(msgspec.json.encode(given)))
    return TABLE[spec.name](call, call.arguments)


async def _later(call: Call, spec: CommandSpec, value: Awaitable[Any]) -> str:
    try:
        result = await value
    except Exception as error:  # noqa: BLE001 - a defect is noted too, and goes on
        return _failed(call, spec, error)
    _note(call, spec, None)
    return format_value(result)


def _failed(call: Call, spec: CommandSpec | None, error: Exception) -> str:
    """What a person reads of an error. Raises what is no CommandError: the dispatcher logs it."""
    known = error if isinstance(error, CommandError) else InternalError("A defect of vfiod; its log has the details")
    if spec is not None:
        _note(call, spec, known)
    if known is not error:
        raise error
    call.fail()  # the names it used stay: to the dispatcher this line succeeded
    return f"Error: {error}\n"


def _note(call: Call, spec: CommandSpec, error: CommandError | None) -> None:
    """Tell the audit log what the line meant: to the dispatcher it is text that came and text that went."""
    if spec.mutates:
        call.server.audited(call, spec.name, error)


# --- the line -------------------------------------------------------------------------------------


def _split(line: str) -> list[str]:
    import shlex  # here: a manager's server never reads a line

    try:
        return shlex.split(line)
    except ValueError as error:
        raise InvalidArgument(f"The line cannot be read: {error}") from error


def parse_line(words: list[str]) -> tuple[CommandSpec, dict[str, Any]]:
    """The command and the arguments a line means. Raises CommandError for an unknown command or a word too many."""
    spec, rest = _command(words)
    return spec, _arguments(spec, rest)


def _command(words: list[str]) -> tuple[CommandSpec, list[str]]:
    """The command that a line names, and the words that are its arguments."""
    name, *rest = words
    if name == "info":
        name, *rest = QUERY + rest[0], *rest[1:]
    spec = COMMANDS.get(name)
    if spec is None or name in NOT_HERE:
        shown = words[1] if words[0] == "info" else name
        raise CommandError(f"unknown command: '{shown}'; try help")
    if name in ("device_add", "object-add") and rest:
        # QEMU's form: everything in one word, with commas.
        rest = [*rest[0].split(","), *rest[1:]]
    return spec, rest


def _arguments(spec: CommandSpec, words: list[str]) -> dict[str, Any]:
    fields = {field.encode_name: field for field in inspect.type_info(spec.arguments).fields}  # type: ignore[attr-defined]
    required = [name for name, field in fields.items() if field.required]
    places = required + [name for name in fields if name not in required]
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            free = [name for name in places if name not in given]
            if not free:
                raise InvalidArgument(f"{spec.name} takes no further argument '{word}'")
            key, text = free[0], word
        field = fields.get(key)
        given[key] = text if field is None else _value(text, field.type)
    return given


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from _alternatives(one)
    elif isinstance(kind, inspect.Metadata):
        yield from _alternatives(kind.type)
    else:
        yield kind


def _value(text: str, kind: inspect.Type) -> Any:
    """A word as the JSON value its argument expects; what does not fit stays text, and the check names it."""
    kinds = list(_alternatives(kind))
    lists = [one for one in kinds if isinstance(one, inspect.ListType)]
    wants_json = lists or any(isinstance(one, inspect.AnyType | inspect.DictType | inspect.StructType) for one in kinds)
    if wants_json and text[:1] in "[{":
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"'{text}' is not JSON: {error}") from error
    if lists:
        return [_value(part, lists[0].item_type) for part in text.split(",")]
    numbers = any(
        isinstance(one, inspect.IntType | inspect.FloatType | inspect.AnyType)
        or (isinstance(one, inspect.LiteralType) and all(isinstance(value, int) for value in one.values))
        for one in kinds
    )
    if numbers and _NUMBER.fullmatch(text):
        return int(text, 16 if "x" in text.lower() else 10)
    if any(isinstance(one, inspect.BoolType | inspect.AnyType) for one in kinds):
        return _WORDS_OF_TRUTH.get(text, text)
    return text


# --- the text -------------------------------------------------------------------------------------


def _help(words: list[str]) -> str:
    if words[:1] == ["info"]:
        names = [(name.removeprefix(QUERY), spec.summary) for name, spec in COMMANDS.items() if name.startswith(QUERY)]
        return "".join(f"info {name:<20} {_plain(summary)}\n" for name, summary in names)
    if words:
        spec = COMMANDS.get(words[0])
        if spec is None:
            raise CommandError(f"unknown command: '{words[0]}'; try help")
        fields = inspect.type_info(spec.arguments).fields  # type: ignore[attr-defined]
        usage = "".join(f" {f.encode_name}=..." if f.required else f" [{f.encode_name}=...]" for f in fields)
        return f"{spec.name}{usage}\n{_plain(cleandoc(spec.arguments.__doc__ or ''))}\n"
    lines = [f"{name:<26} {_plain(spec.summary)}\n" for name, spec in COMMANDS.items() if name not in NOT_HERE]
    return "".join(["info [NAME [ID]]           What query-NAME tells, as text.\n", *lines])


def _plain(text: str) -> str:
    """Without the marks of the source's documentation."""
    return text.replace("``", "")


def format_value(value: Any) -> str:
    """A result as text: a table for a list of objects, lines for an object; ends with a newline unless empty."""
    if isinstance(value, Topology) and isinstance(value.text, str):
        value = value.text
    if isinstance(value, str):
        return value if not value or value.endswith("\n") else value + "\n"
    if isinstance(value, msgspec.Raw):
        value = msgspec.json.decode(value)
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    if plain is None or plain == {}:
        return ""
    return "\n".join(_lines(plain)) + "\n"


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        width = max(map(len, value), default=0)
        for key, one in value.items():
            if _is_deep(one) or isinstance(one, bytes):
                yield f"{indent}{key}:"
                yield from _lines(one, indent + "  ")
            else:
                yield f"{indent}{key:<{width}}  {_cell(one, key)}"
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        yield from _table(value, indent)
    elif isinstance(value, list):
        for one in value or ["(none)"]:
            yield f"{indent}{_cell(one)}"
    elif isinstance(value, bytes):
        for offset in range(0, len(value), 16):
            yield f"{indent}{offset:08x}  {value[offset : offset + 16].hex(' ')}"
    else:
        yield f"{indent}{_cell(value)}"


def _is_deep(value: Any) -> bool:
    """Whether a value needs lines of its own."""
    if isinstance(value, list):
        return any(isinstance(one, dict | list) for one in value)
    return isinstance(value, dict) and bool(value)


def _table(rows: list[dict[str, Any]], indent: str) -> Iterator[str]:
    """Columns for what is short; what holds more (lists of objects) follows its row, indented."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    deep = [key for key in columns if any(isinstance(row.get(key), list) and _is_deep(row[key]) for row in rows)]
    flat = [key for key in columns if key not in deep]
    cells = [[_cell(row[key], key) if key in row else "-" for key in flat] for row in rows]
    widths = [max(len(name), *(len(row[column]) for row in cells)) for column, name in enumerate(flat)]
    if sum(widths) + 2 * len(widths) + len(indent) > WIDTH:
        yield from _records(rows, indent)
        return
    yield indent + "  ".join(f"{name:<{width}}" for name, width in zip(flat, widths, strict=True)).rstrip()
    for row, texts in zip(rows, cells, strict=True):
        yield indent + "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()
        for key in deep:
            if row.get(key):
                yield f"{indent}    {key}:"
                yield from _lines(row[key], indent + "      ")


def _records(rows: list[dict[str, Any]], indent: str) -> Iterator[str]:
    """One block of lines for each object: its first member is the title."""
    for row in rows:
        (title, first), *rest = row.items()
        yield f"{indent}{title} {_cell(first, title)}"
        yield from _lines(dict(rest), indent + "  ")


def _cell(value: Any, key: str = "") -> str:
    """A value in one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key in HEXADECIMAL:
        return hex(value)
    if isinstance(value, dict):
        return (
            " ".join(name if one is True else f"{name}={_cell(one)}" for name, one in value.items() if one is not False)
            or "-"
        )
    if isinstance(value, list):
        return ",".join(_cell(one) for one in value) or "-"
    return str(value)


HANDLERS: Final[Handlers] = {monitor.HumanMonitorCommand: human_monitor_command}
