"""The catalogue, told to clients: ``query-qmp-schema`` and property lists (QEMU ``qapi/introspect.json``).

Everything is derived from the declarations; nothing here knows a command by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from vfiod.protocol.catalogue.declare import COMMANDS, EVENTS, CommandSpec
from vfiod.protocol.catalogue.devices import PropertyInfo

__all__ = ["qmp_schema", "argument_properties", "documented_fields", "DocumentedField"]

_BUILTINS = {
    "any": "value",
    "bool": "boolean",
    "dict": "object",
    "int": "int",
    "null": "null",
    "number": "number",
    "str": "string",
}
"""Names of built-in types, and QEMU's ``JSONType`` of each. ``dict`` is vfiod's: members of any name."""


class _Schema:
    """The schema while it is being built: types are added when something refers to them."""

    def __init__(self) -> None:
        self.types: dict[str, dict[str, Any]] = {}
        self._classes: dict[str, type] = {}

    def refer(self, info: inspect.Type) -> str:
        """The name of a type, which is in the schema from here on."""
        info = _bare(info)
        if isinstance(info, inspect.StructType | inspect.EnumType):
            self._declare(info)
            return info.cls.__name__
        if isinstance(info, inspect.ListType | inspect.VarTupleType):
            element = self.refer(info.item_type)
            name = f"[{element}]"
            self.types.setdefault(name, {"name": name, "meta-type": "array", "element-type": element})
            return name
        if isinstance(info, inspect.UnionType):
            members = [self.refer(choice) for choice in info.types]
            name = "|".join(members)
            entity = {"name": name, "meta-type": "alternate", "members": [{"type": member} for member in members]}
            self.types.setdefault(name, entity)
            return name
        name = _builtin(info)
        self.types.setdefault(name, {"name": name, "meta-type": "builtin", "json-type": _BUILTINS[name]})
        return name

    def _declare(self, info: inspect.StructType | inspect.EnumType) -> None:
        name = info.cls.__name__
        if name in self._classes:
            if self._classes[name] is not info.cls:
                raise ValueError(f"Two types of the catalogue are called {name}")
            return
        self._classes[name] = info.cls
        entity: dict[str, Any] = {"name": name}
        self.types[name] = entity
        if isinstance(info, inspect.EnumType):
            words = [str(member.value) for member in info.cls]
            entity |= {"meta-type": "enum", "members": [{"name": word} for word in words], "values": words}
            return
        entity |= {"meta-type": "object", "members": [self._member(field) for field in info.fields]}

    def _member(self, field: inspect.Field) -> dict[str, Any]:
        member: dict[str, Any] = {"name": field.encode_name, "type": self.refer(field.type)}
        if not field.required:
            member["default"] = None  # "optional; what happens without it is not said here"
        if field.encode_name.startswith("x-"):
            member["features"] = ["unstable"]
        return member


def qmp_schema() -> list[dict[str, Any]]:
    """Every command, event and type, as ``query-qmp-schema`` returns it (``SchemaInfo``).

    Every type that is named exists, once. Type names carry no meaning to clients (QEMU says so of its
    own). An event's data have one more member than declared: ``seq``.
    """
    schema = _Schema()
    entities: list[dict[str, Any]] = []
    for name, command in COMMANDS.items():
        entity: dict[str, Any] = {
            "name": name,
            "meta-type": "command",
            "arg-type": schema.refer(inspect.type_info(command.arguments)),
            "ret-type": schema.refer(inspect.type_info(command.returns)),
        }
        if command.allow_oob:
            entity["allow-oob"] = True
        if command.unstable:
            entity["features"] = ["unstable"]
        entities.append(entity)
    for name, event in EVENTS.items():
        arguments = schema.refer(inspect.type_info(event.data))
        members = schema.types[arguments]["members"]
        members.append({"name": "seq", "type": schema.refer(inspect.type_info(int))})
        entities.append({"name": name, "meta-type": "event", "arg-type": arguments})
    return entities + list(schema.types.values())


class DocumentedField(msgspec.Struct, frozen=True):
    """One member of a declared object, as a person wants to know it.

    Attributes:
        name: on the wire.
        type: the schema's name of its type.
        description: what the declaration says of it; "" when it says nothing.
        required: whether it must be given.
        default: what it is without being given; UNSET when there is nothing then.

    """

    name: str
    type: str
    description: str
    required: bool
    default: Any


def documented_fields(declared: type[msgspec.Struct]) -> Iterator[DocumentedField]:
    """The members of a class of the catalogue, in the order of declaration."""
    schema = _Schema()
    info = inspect.type_info(declared)
    assert isinstance(info, inspect.StructType)  # noqa: S101  # every class of the catalogue is one
    for field in info.fields:
        default = msgspec.UNSET if field.default is msgspec.NODEFAULT else field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        yield DocumentedField(
            field.encode_name, schema.refer(field.type), _description(field.type), field.required, default
        )


def argument_properties(spec: CommandSpec) -> list[PropertyInfo]:
    """A command's arguments as ``device-list-properties`` returns them (QEMU's ``ObjectPropertyInfo``)."""
    return [
        PropertyInfo(name=field.name, type=field.type, description=field.description, default_value=field.default)
        for field in documented_fields(spec.arguments)
    ]


def _bare(info: inspect.Type) -> inspect.Type:
    while isinstance(info, inspect.Metadata):
        info = info.type
    if isinstance(info, inspect.UnionType) and len(info.types) == 1:
        return _bare(info.types[0])
    return info


def _description(info: inspect.Type) -> str:
    """The outermost description: what was said of the member goes before what is said of its type."""
    while isinstance(info, inspect.Metadata):
        if text := (info.extra_json_schema or {}).get("description"):
            return str(text)
        info = info.type
    if isinstance(info, inspect.UnionType):
        return next(filter(None, map(_description, info.types)), "")
    return ""


def _builtin(info: inspect.Type) -> str:
    if isinstance(info, inspect.LiteralType):
        return "int" if isinstance(info.values[0], int) else "str"
    for kinds, name in (
        (inspect.BoolType, "bool"),
        (inspect.IntType, "int"),
        (inspect.FloatType, "number"),
        ((inspect.StrType, inspect.BytesType), "str"),
        (inspect.NoneType, "null"),
        (inspect.DictType, "dict"),
        (inspect.AnyType, "any"),
    ):
        if isinstance(info, kinds):
            return name
    raise TypeError(f"The schema has no word for {info}")
