"""A command as a person types it: ``dma-map iova=0 size=64K fd=ram readonly=on``.

``key=value``, with dots into what is nested (``parameters.size=4K``, ``eventfds.0.trigger=ev``). What a value is comes
from the catalogue: numbers in any base and with K, M, G, T (powers of 1024); ``on``/``off`` for booleans; lists with
commas; bytes in base64 or as ``hex:0011``. Anything may be JSON. A whole line may be JSON too.
"""

from __future__ import annotations

import base64
import enum
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import UnsetType

from vfiod.client.errors import ClientError
from vfiod.protocol.catalogue import COMMANDS

__all__ = ["InvalidLine", "Line", "arguments_from", "is_unfinished", "members", "parse_line", "plain_type"]

NUMBER: Final = re.compile(r"^([+-]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9][0-9_]*))([KMGT]?)$")
STRING: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"')
MULTIPLE: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
BOOLEANS: Final = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
MAX_INDEX: Final = 4096
"""The highest list index of a dotted key: more than any command takes."""


class InvalidLine(ClientError):
    """What was typed is not a command. The text says what it could be."""


@dataclass(frozen=True, slots=True)
class Line:
    """One command, ready for :meth:`execute`."""

    command: str
    arguments: dict[str, Any]
    oob: bool = False


def plain_type(annotation: Any) -> Any:
    """An annotation without constraints and without "may be absent": ``int``, a union, a class."""
    if get_origin(annotation) is typing.Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = tuple(plain_type(part) for part in get_args(annotation) if part is not UnsetType)
        return typing.Union[kinds]  # noqa: UP007 - of a tuple
    return annotation


def members(kind: Any) -> dict[str, Any]:
    """The members of a declaration by their names on the wire, with their full annotations."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return {}
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}


def parse_line(text: str) -> Line:
    """One line: words, or JSON (``{"execute": ..., "arguments": {...}}``). Raises InvalidLine."""
    text = text.strip()
    if text.startswith("{"):
        return _from_json(text)
    try:
        words = shlex.split(text, posix=True)
    except ValueError as error:
        raise InvalidLine(f"{error} in: {text}") from error
    if not words:
        raise InvalidLine("An empty line is no command")
    return Line(words[0], arguments_from(words[0], words[1:]))


def is_unfinished(text: str) -> bool:
    """Whether a line begins a JSON object and more lines must follow: brackets are open, and no string is.

    A string cannot go over a line's end, so one that is open is a mistake, which ``parse_line`` tells.
    """
    if not text.lstrip().startswith("{"):
        return False
    bare = STRING.sub("", text)
    return '"' not in bare and sum(map(bare.count, "{[")) > sum(map(bare.count, "}]"))


def _from_json(text: str) -> Line:
    try:
        request = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidLine(f"Not JSON: {error}") from error
    oob = "exec-oob" in request
    command = request.pop("exec-oob" if oob else "execute", None)
    arguments = request.pop("arguments", {})
    request.pop("id", None)
    if not isinstance(command, str) or not isinstance(arguments, dict) or request:
        raise InvalidLine('A JSON line is {"execute": "COMMAND", "arguments": {...}}; "arguments" may be absent')
    return Line(command, arguments, oob)


def arguments_from(command: str, words: Iterable[str]) -> dict[str, Any]:
    """``key=value`` words as the command's arguments on the wire.

    Args:
        command: in the catalogue, or not: then values are JSON where they can be, else text.
        words: what was typed after it.

    Raises:
        InvalidLine: not ``key=value``, given twice, or a value that cannot be what the argument is.

    """
    spec = COMMANDS.get(command)
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            known = ", ".join(members(spec.arguments)) if spec else ""
            raise InvalidLine(
                f"Arguments are key=value, got '{word}'" + (f"; {command} takes: {known}" if known else "")
            )
        _put(arguments, key, value, spec.arguments if spec else Any, command)
    return {key: _lists(value) for key, value in arguments.items()}


def _put(into: dict[str, Any], key: str, text: str, kind: Any, command: str) -> None:
    """Put one value where its dotted key says; lists are mappings with numbers until all is read."""
    *path, last = key.split(".")
    for step in path:
        step, kind = _step(kind, step)
        into = into.setdefault(step, {})
        if not isinstance(into, dict):
            raise InvalidLine(f"Argument '{key}' of {command} goes into something that was given as a value")
    last, kind = _step(kind, last)
    if last in into:
        raise InvalidLine(f"Argument '{key}' of {command} was given twice")
    into[last] = _value(text, kind, f"Argument '{key}' of {command}")


def _step(kind: Any, name: str) -> tuple[str, Any]:
    """One step into a type: the member's name on the wire, and its type (Any when it is not known)."""
    kind = plain_type(kind)
    if get_origin(kind) is list and name.isdigit():
        return name, get_args(kind)[0]
    if get_origin(kind) is dict:
        return name, get_args(kind)[1]
    known = members(kind)
    kebab = name if name in known else name.replace("_", "-") if name.replace("_", "-") in known else name
    return kebab, known.get(kebab, Any)


def _lists(value: Any) -> Any:
    """Mappings whose keys are 0, 1, 2, ... were lists."""
    if not isinstance(value, dict):
        return value
    items = {key: _lists(item) for key, item in value.items()}
    if items and all(key.isdigit() and int(key) < MAX_INDEX for key in items):
        order = sorted(items, key=int)
        if [int(key) for key in order] != list(range(len(order))):
            raise InvalidLine(f"List items are numbered from 0 without gaps, got {', '.join(order)}")
        return [items[key] for key in order]
    return items


def _value(text: str, kind: Any, what: str) -> Any:
    """A value of a type from text. Raises InvalidLine that names what it is for."""
    kind = plain_type(kind)
    if get_origin(kind) in (typing.Union, types.UnionType):
        for part in sorted(get_args(kind), key=lambda part: part is str):  # text is what nothing else is
            try:
                return _value(text, part, what)
            except InvalidLine:
                continue
        raise InvalidLine(f"{what} takes {_named(kind)}, got '{text}'")
    try:
        return _read(text, kind, what)
    except (ValueError, KeyError, msgspec.MsgspecError) as error:
        raise InvalidLine(f"{what} takes {_named(kind)}, got '{text}'") from error


def _read(text: str, kind: Any, what: str) -> Any:
    origin = get_origin(kind)
    if kind is bool:
        return BOOLEANS[text.lower()]
    if kind is int:
        return _integer(text)
    if kind is float:
        return float(text)
    if kind is str:
        return text
    if kind is bytes:
        return base64.b64encode(bytes.fromhex(text[4:])).decode() if text.startswith("hex:") else text
    if origin is Literal:
        choices = get_args(kind)
        value = _integer(text) if all(isinstance(choice, int) for choice in choices) else text
        return {choice: choice for choice in choices}[value]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(text).value
    if origin is list:
        if text.startswith("["):
            return msgspec.json.decode(text, type=list[Any])
        return [_value(part, get_args(kind)[0], what) for part in text.split(",")] if text else []
    if origin is dict or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return msgspec.json.decode(text, type=dict[str, Any])
    if NUMBER.match(text):
        return _integer(text)
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text


def _integer(text: str) -> int:
    match = NUMBER.match(text)
    if match is None:
        raise ValueError(text)
    digits, multiple = match.groups()
    try:
        return int(digits, 0) * MULTIPLE[multiple]
    except ValueError:  # 007: a decimal with zeroes in front, which int(..., 0) refuses
        return int(digits, 10) * MULTIPLE[multiple]


def _named(kind: Any) -> str:
    """A type in words."""
    names: Mapping[Any, str] = {
        int: "an integer (0x10, 64K)", bool: "on or off", str: "text", bytes: "base64 or hex:...", float: "a number"
    }  # fmt: skip
    if kind in names:
        return names[kind]
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_named(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if get_origin(kind) is list:
        return f"a list ([...], or values with commas), each {_named(plain_type(get_args(kind)[0]))}"
    return "a JSON object"
