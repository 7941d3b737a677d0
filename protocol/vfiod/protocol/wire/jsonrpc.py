"""JSON-RPC 2.0 messages, both sides (jsonrpc.org/specification). Events are notifications."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import EventData
from vfiod.protocol.errors import VfiodError, WireError
from vfiod.protocol.wire.qmp import Event

__all__ = [
    "Request",
    "Rejected",
    "Single",
    "Batch",
    "Result",
    "Error",
    "Message",
    "decode_request",
    "encode_result",
    "encode_error",
    "encode_batch",
    "encode_notification",
    "encode_request",
    "decode_message",
]


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call, or a notification, which has no ``id`` and gets no answer."""

    command: str = msgspec.field(name="method")
    arguments: Raw | UnsetType = msgspec.field(default=UNSET, name="params")
    id: Raw | UnsetType = UNSET

    @property
    def is_notification(self) -> bool:
        """True when no answer is to be sent, not even an error."""
        return self.id is UNSET


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """No request. Answer with ``encode_error(rejected.error, rejected.id)``; the id is ``null`` when unknown."""

    error: VfiodError
    id: Raw


class Single(msgspec.Struct, frozen=True, gc=False):
    """A text with one request."""

    item: Request | Rejected


class Batch(msgspec.Struct, frozen=True, gc=False):
    """A text with several requests: their answers go out together, in any order, in one array; none, no array."""

    items: tuple[Request | Rejected, ...]


class Result(msgspec.Struct, frozen=True, gc=False):
    """A call was done. ``value`` is its result, still as JSON."""

    value: Raw
    id: Raw


class Error(msgspec.Struct, frozen=True, gc=False):
    """A call was refused or failed."""

    code: int
    desc: str
    error_class: str
    errno: str | None
    id: Raw


Message = Result | Error | Event


def decode_request(text: bytes | WireError) -> Single | Batch:
    """Turn one item of :meth:`JsonStream.receive_data` into requests. Never raises."""
    raise NotImplementedError


def encode_result(value: Any, id: Raw) -> bytes:
    """``{"jsonrpc": "2.0", "result": value, "id"}``, one line."""
    raise NotImplementedError


def encode_error(error: VfiodError, id: Raw | UnsetType = UNSET) -> bytes:
    """``{"jsonrpc": "2.0", "error": {"code", "message", "data": {"class", "errno"?}}, "id"}``; id null when unset."""
    raise NotImplementedError


def encode_batch(replies: Iterable[bytes]) -> bytes:
    """The answers to a batch, each from :func:`encode_result` or :func:`encode_error`; ``b""`` for none."""
    raise NotImplementedError


def encode_notification(data: EventData, seq: int, seconds: int, microseconds: int) -> bytes:
    """``{"jsonrpc", "method": name, "params": {..., "seq", "timestamp": {"seconds", "microseconds"}}}``, one line."""
    raise NotImplementedError


def encode_request(
    command: str,
    arguments: Any = UNSET,
    id: int | str | Raw | UnsetType = UNSET,
) -> bytes:
    """A call, one line; without ``id`` a notification."""
    raise NotImplementedError


def decode_message(text: bytes | WireError) -> list[Message]:
    """What a server sent: one message, or a batch of them. Raises :class:`WireError` when it is neither."""
    raise NotImplementedError
