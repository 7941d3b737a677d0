"""QMP messages, both sides (QEMU ``docs/interop/qmp-spec.rst``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import EventData
from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.errors import VfiodError, WireError

__all__ = [
    "Request",
    "OobRequest",
    "Rejected",
    "Greeting",
    "Return",
    "Error",
    "Event",
    "Message",
    "decode_request",
    "encode_greeting",
    "encode_return",
    "encode_error",
    "encode_event",
    "encode_request",
    "decode_message",
]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One in-band request: ``{"execute": command, "arguments"?, "id"?}``."""

    oob: ClassVar[bool] = False

    command: str = msgspec.field(name="execute")
    arguments: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET


class OobRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One out-of-band request: ``{"exec-oob": command, "arguments"?, "id"?}``."""

    oob: ClassVar[bool] = True

    command: str = msgspec.field(name="exec-oob")


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """A text that is no request. Answer with ``encode_error(rejected.error, rejected.id)``."""

    error: VfiodError
    id: Raw | UnsetType = UNSET


class Greeting(msgspec.Struct, frozen=True, gc=False):
    """The server's first message."""

    version: VersionInfo
    capabilities: tuple[str, ...]


class Return(msgspec.Struct, frozen=True, gc=False):
    """A command was done. ``value`` is its result, still as JSON."""

    value: Raw
    id: Raw | UnsetType = UNSET


class Error(msgspec.Struct, frozen=True, gc=False):
    """A command was refused or failed. ``error_class`` is a QMP class, as text; ``errno`` a name (``EBUSY``)."""

    error_class: str
    desc: str
    errno: str | None = None
    id: Raw | UnsetType = UNSET


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something happened. ``data`` is still JSON; -1 for a clock that failed; ``seq`` None from a foreign server."""

    name: str
    data: Raw | UnsetType
    seq: int | None
    seconds: int
    microseconds: int


Message = Greeting | Return | Error | Event


def decode_request(text: bytes | WireError, *, oob_enabled: bool) -> Request | Rejected:
    """Turn one item of :meth:`JsonStream.receive_data` into a request. Never raises."""
    raise NotImplementedError


def encode_greeting(version: VersionInfo, capabilities: Sequence[str] = ("oob",)) -> bytes:
    """The server's first line."""
    raise NotImplementedError


def encode_return(value: Any, id: Raw | UnsetType = UNSET) -> bytes:  # noqa: A002
    """``{"return": value, "id"?}``, one line; ``value`` is a :class:`Result`, or anything msgspec encodes."""
    raise NotImplementedError


def encode_error(error: VfiodError, id: Raw | UnsetType = UNSET) -> bytes:  # noqa: A002
    """``{"id"?, "error": {"class", "desc", "errno"?}}``, one line."""
    raise NotImplementedError


def encode_event(data: EventData, seq: int, seconds: int, microseconds: int) -> bytes:
    """``{"timestamp", "event", "data": {..., "seq"}}``, one line; the name comes from the catalogue."""
    raise NotImplementedError


def encode_request(
    command: str,
    arguments: Any = UNSET,
    id: int | str | Raw | UnsetType = UNSET,  # noqa: A002
    *,
    oob: bool = False,
) -> bytes:
    """A request, one line; ``arguments`` is an :class:`Arguments`, a mapping, or absent."""
    raise NotImplementedError


def decode_message(text: bytes | WireError) -> Message:
    """What a server sent. Raises :class:`WireError` when it is not QMP."""
    raise NotImplementedError
