"""What the catalogue's annotations say to who writes methods from them: declarations, constraints, where fds are."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator
from typing import Any, Final, get_args, get_origin

import msgspec
from msgspec import UnsetType

from vfiod.protocol.catalogue.words import FdName

__all__ = [
    "FD_META",
    "all_parts",
    "hints",
    "is_fd",
    "is_fd_index",
    "is_fd_list",
    "lends",
    "metas",
    "owns",
    "parts",
    "structs",
]

FD_META: Final[msgspec.Meta] = get_args(FdName)[1]  # what every fd argument is annotated with


def hints(kind: type) -> dict[str, Any]:
    """A declaration's members with their annotations, in order."""
    everything = typing.get_type_hints(kind, include_extras=True)
    return {name: everything[name] for name in kind.__struct_fields__}  # type: ignore[attr-defined]


def metas(annotation: Any) -> Iterator[msgspec.Meta]:
    """Every constraint of an annotation, outermost last, through optional unions."""
    if get_origin(annotation) is typing.Annotated:
        inner, *extra = get_args(annotation)
        yield from metas(inner)
        yield from (meta for meta in extra if isinstance(meta, msgspec.Meta))
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for part in get_args(annotation):
            yield from metas(part)


def is_fd(annotation: Any) -> bool:
    """Whether an argument names an fd."""
    return any(meta == FD_META for meta in metas(annotation))


def is_fd_list(annotation: Any) -> bool:
    """Whether an argument is a list of names of fds."""
    if get_origin(annotation) is list:
        return is_fd(get_args(annotation)[0])
    return any(is_fd_list(part) for part in get_args(annotation))


def parts(annotation: Any) -> Iterator[type]:
    """Every declaration and enumeration that an annotation mentions."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, msgspec.Struct | enum.Enum) and annotation is not UnsetType:
            yield annotation
        return
    for part in get_args(annotation):
        yield from parts(part)


def structs(annotation: Any) -> Iterator[type[msgspec.Struct]]:
    """Every declaration that an annotation mentions."""
    return (part for part in parts(annotation) if issubclass(part, msgspec.Struct))


def lends(kind: type) -> bool:
    """Whether an argument's part names fds."""
    return any(is_fd(hint) or any(lends(part) for part in structs(hint)) for hint in hints(kind).values())


def is_fd_index(name: str, annotation: Any) -> bool:
    """Whether a result's member is an fd index: an integer named ``..._fd`` (``share_fd`` is a bool, and is not)."""
    return name.endswith("_fd") and int in (annotation, *get_args(annotation))


def owns(annotation: Any) -> bool:
    """Whether a result, or a part of it, has members that are fd indexes."""
    return any(
        any(is_fd_index(name, hint) or owns(hint) for name, hint in hints(part).items()) for part in structs(annotation)
    )


def all_parts(annotation: Any) -> Iterator[type[msgspec.Struct]]:
    """Every declaration an annotation mentions, the deepest first."""
    for part in structs(annotation):
        for hint in hints(part).values():
            yield from all_parts(hint)
        yield part
