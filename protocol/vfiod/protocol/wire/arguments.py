"""A command's arguments and results, between JSON and the catalogue's classes.

The fast path is one :mod:`msgspec` decode into the class that the catalogue declares. When it refuses, the
arguments are read a second time and compared with the declaration member by member, to say in QEMU's words
(``qapi/qobject-input-visitor.c``) which one is wrong, what it is and what is expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import EVENTS, Arguments, CommandSpec, EventData
from vfiod.protocol.catalogue.devices import SECRET, DeviceAdd, Driver
from vfiod.protocol.errors import CommandError, InvalidArgument, InvalidRequest
from vfiod.protocol.limits import MAX_COLLECTIONS

if TYPE_CHECKING:
    from msgspec import inspect

__all__ = ["convert_arguments", "decode_arguments", "decode_event_data", "decode_result"]

_EMPTY: Final = b"{}"
_SHOWN: Final = 80
"""Characters of a wrong value that an error shows."""


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    return msgspec.json.Decoder(kind).decode


def decode_arguments(spec: CommandSpec, raw: Raw | bytes | UnsetType = UNSET) -> Arguments[Any]:
    """Check and decode a command's arguments.

    Args:
        spec: the command's declaration.
        raw: a JSON object, as a request carries it; absent is the same as empty.

    Raises:
        InvalidArgument: a member is missing, unexpected, of the wrong type or out of its range; also when
            a string is no Unicode. Nothing has been done yet.

    """
    try:
        arguments: Arguments[Any] = _decoder(spec.arguments)(_EMPTY if raw is UNSET else raw)
    except (ValueError, RecursionError) as error:
        raise _complaint(spec, _EMPTY if raw is UNSET else raw, error) from None
    return arguments


def convert_arguments(spec: CommandSpec, values: dict[str, Any] | UnsetType = UNSET) -> Arguments[Any]:
    """As :func:`decode_arguments`, from values that were read already (the bus). Bytes may come as they are."""
    given = {} if values is UNSET else values
    try:
        arguments: Arguments[Any] = msgspec.convert(given, spec.arguments)
    except (ValueError, RecursionError) as error:
        raise _complaint_of(spec, _in_json(given), error) from None
    return arguments


def _in_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON would carry them, where that can be said."""
    try:
        plain: dict[str, Any] = msgspec.to_builtins(values)
    except (TypeError, ValueError, RecursionError):
        return values
    return plain


def decode_result(spec: CommandSpec, raw: Raw | bytes) -> Any:
    """Decode a reply's value into the type the catalogue gives.

    Raises:
        InvalidRequest: the server sent something else; the text says what and where.

    """
    try:
        return _decoder(spec.returns)(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The reply to {spec.name} is not what the catalogue declares: {error}") from None


def decode_event_data(name: str, raw: Raw | bytes | UnsetType) -> EventData | None:
    """Decode an event's data; None for an event that the catalogue does not know.

    Raises:
        InvalidRequest: the catalogue knows the event, but the data are not what it declares.

    """
    spec = EVENTS.get(name)
    if spec is None:
        return None
    try:
        data: EventData = _decoder(spec.data)(_EMPTY if raw is UNSET else raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The data of {name} are not what the catalogue declares: {error}") from None
    return data


# --- the slow path: what is wrong -------------------------------------------------------------------------
def _complaint(spec: CommandSpec, raw: Raw | bytes, error: Exception) -> CommandError:
    if bytes(raw).lstrip()[:1] != b"{":
        return InvalidArgument(f"The arguments of {spec.name} have names: pass an object")
    text = bytes(raw)
    # Counted before they are made. What stands in strings counts, too: base64 has none of them.
    if len(text) > MAX_COLLECTIONS and text.count(b"[") + text.count(b"{") > MAX_COLLECTIONS:
        return InvalidArgument(f"The arguments of {spec.name} hold more than {MAX_COLLECTIONS} lists and objects")
    try:
        values = _decoder(dict[str, Any])(raw)
    except RecursionError:
        return InvalidArgument(f"The arguments of {spec.name} are nested too deeply")
    except ValueError as unreadable:
        return InvalidArgument(f"The arguments of {spec.name} cannot be read: {unreadable}")
    return _complaint_of(spec, values, error)


def _complaint_of(spec: CommandSpec, values: dict[str, Any], error: Exception) -> CommandError:
    if spec.arguments is DeviceAdd and (refusal := _device_refusal(values)):
        return refusal
    wrong = next(_wrong_with_object(_members_of(spec.arguments), values, ""), None)
    return InvalidArgument(wrong or f"The arguments of {spec.name} are not what it takes: {error}")


@functools.cache
def _members_of(kind: type[Arguments[Any]]) -> Any:
    """What a class takes. Found out once: it is most of what an error costs, and who errs once errs again."""
    from msgspec import inspect  # on the way to an error only

    return inspect.type_info(kind)


def _device_refusal(values: dict[str, Any]) -> InvalidArgument | None:
    """What ``device_add`` says before others speak of parameters (QEMU ``system/qdev-monitor.c``)."""
    driver = values.get("driver")
    if not isinstance(driver, str):
        return None
    if driver not in set(Driver):
        return InvalidArgument(f"'{driver}' is not a valid device model name")
    known = {field.encode_name for field in msgspec.structs.fields(DeviceAdd)}
    for name in values:
        if name not in known:
            return InvalidArgument(f"Property '{driver}.{name}' not found")
    return None


def _wrong_with_object(info: Any, values: dict[str, Any], path: str) -> Iterator[str]:
    """Sentences on what is wrong with an object; members in the order of declaration, then strangers, as in QEMU."""
    prefix = f"{path}." if path else ""
    for field in info.fields:
        name = prefix + field.encode_name
        if field.encode_name in values:
            yield from _wrong_with(field.type, values[field.encode_name], name)
        elif field.required:
            yield f"Parameter '{name}' is missing"
    if info.forbid_unknown_fields:
        known = {field.encode_name for field in info.fields}
        for name in values:
            if name not in known:
                yield f"Parameter '{prefix}{name}' is unexpected"


def _wrong_with(info: inspect.Type, value: Any, path: str) -> Iterator[str]:
    """Sentences on what is wrong with one value. Nothing, when nothing is."""
    from msgspec import inspect

    described = ""
    while isinstance(info, inspect.Metadata):
        described = (info.extra_json_schema or {}).get("description", described)
        info = info.type
    if isinstance(info, inspect.UnionType):
        choices = list(info.types)  # msgspec leaves UnsetType out
        if len(choices) > 1:
            fitting = [choice for choice in choices if _json_type(_bare(choice)) in _json_types_of(value)]
            if not fitting:
                expected = " or ".join(_json_type(_bare(choice)) for choice in choices)
                yield f"Invalid parameter type for '{path}', expected: {expected}"
                return
            choices = fitting
        yield from _wrong_with(choices[0], value, path)
        return
    expected = _json_type(info)
    if expected not in _json_types_of(value):
        yield f"Invalid parameter type for '{path}', expected: {expected}"
    elif isinstance(info, inspect.StructType):
        yield from _wrong_with_object(info, value, path)
    elif isinstance(info, inspect.ListType):
        for place, item in enumerate(value):
            yield from _wrong_with(info.item_type, item, f"{path}[{place}]")
        yield from _wrong_length(info, value, path, "items")
    elif isinstance(info, inspect.DictType):
        for key, item in value.items():
            yield from _wrong_with(info.value_type, item, f"{path}.{key}")
    elif isinstance(info, inspect.EnumType):
        words = [member.value for member in info.cls]
        if value not in words:
            yield f"Parameter '{path}' does not accept value {_show(value)}; it takes {_one_of(words)}"
    elif isinstance(info, inspect.LiteralType):
        if value not in info.values:
            yield f"Parameter '{path}' expects {_one_of(info.values)}, not {_show(value)}"
    elif isinstance(info, inspect.IntType | inspect.FloatType):
        yield from _wrong_range(info, value, path)
    elif isinstance(info, inspect.StrType):
        yield from _wrong_string(info, value, path, described)
    elif isinstance(info, inspect.BytesType):
        try:
            octets = msgspec.convert(value, bytes)
        except msgspec.ValidationError:
            yield f"Parameter '{path}' expects bytes in base64, not {_show(value)}"
        else:
            yield from _wrong_length(info, octets, path, "bytes")


def _wrong_range(info: inspect.IntType | inspect.FloatType, value: float, path: str) -> Iterator[str]:
    low = info.ge if info.ge is not None else None if info.gt is None else info.gt + 1
    high = info.le if info.le is not None else None if info.lt is None else info.lt - 1
    if (low is None or value >= low) and (high is None or value <= high):
        return
    if low == 0 and value < 0:
        yield f"Parameter '{path}' expects a non-negative value"
    elif low is not None and high is not None:
        yield f"Parameter '{path}' expects a value from {low} to {high}, not {_show(value)}"
    elif low is not None:
        yield f"Parameter '{path}' expects a value of at least {low}, not {_show(value)}"
    else:
        yield f"Parameter '{path}' expects a value of at most {high}, not {_show(value)}"


def _wrong_string(info: inspect.StrType, value: str, path: str, described: str) -> Iterator[str]:
    import re

    if info.pattern is not None and not re.search(info.pattern, value):
        expected = described.rstrip(".") or f"text that matches {info.pattern}"
        yield f"Parameter '{path}' expects {expected[:1].lower()}{expected[1:]}; it is {_known(path, value)}"
    yield from _wrong_length(info, value, path, "characters")


def _wrong_length(info: Any, value: Any, path: str, unit: str) -> Iterator[str]:
    if info.min_length is not None and len(value) < info.min_length:
        yield f"Parameter '{path}' expects at least {info.min_length} {unit}, not {len(value)}"
    if info.max_length is not None and len(value) > info.max_length:
        yield f"Parameter '{path}' expects at most {info.max_length} {unit}, not {len(value)}"


def _bare(info: inspect.Type) -> inspect.Type:
    from msgspec import inspect

    while isinstance(info, inspect.Metadata):
        info = info.type
    return info


def _json_type(info: inspect.Type) -> str:
    """QEMU's name (``qapi/introspect.json``, ``JSONType``) of what a declared type is in JSON; "value" for any."""
    from msgspec import inspect

    if isinstance(info, inspect.LiteralType):
        return "integer" if isinstance(info.values[0], int) else "string"
    for kinds, name in (
        (inspect.IntType, "integer"),
        (inspect.FloatType, "number"),
        (inspect.BoolType, "boolean"),
        (inspect.NoneType, "null"),
        ((inspect.StrType, inspect.EnumType, inspect.BytesType, inspect.UUIDType), "string"),
        ((inspect.ListType, inspect.VarTupleType, inspect.TupleType), "array"),
        ((inspect.StructType, inspect.DictType), "object"),
    ):
        if isinstance(info, kinds):
            return name
    return "value"


def _json_types_of(value: Any) -> tuple[str, ...]:
    """The names in QEMU's terms that fit a value: an integer is a number, too; everything is a value."""
    if isinstance(value, bool):
        return ("boolean", "value")
    if isinstance(value, int):
        return ("integer", "number", "value")
    for kind, name in ((float, "number"), (str, "string"), (list, "array"), (dict, "object")):
        if isinstance(value, kind):
            return (name, "value")
    return ("null", "value")


def _show(value: Any) -> str:
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _known(path: str, value: Any) -> str:
    """As :func:`_show`, unless it may be a secret: errors are logged, and a token with a slip is nearly the token."""
    return "not one (it is not shown)" if path in SECRET else _show(value)


def _one_of(words: Any) -> str:
    *others, last = [str(word) for word in words]
    return f"{', '.join(others)} or {last}" if others else last
