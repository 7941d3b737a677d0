"""JSON-RPC 2.0 messages in msgpack, for the bus: the same members as in JSON, bytes as they are instead of base64.

A message is one msgpack map with text keys, each once (msgpack/spec.md). The bus sends results, errors, and events
as notifications. :mod:`msgpack` reads with limits that follow from the message's own size, so that a length that lies
costs nothing; its types beyond JSON's (extensions, timestamps) are refused.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack
import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import COMMANDS, EventData, event_of
from vfiod.protocol.errors import (
    CommandError,
    ErrorClass,
    InvalidRequest,
    JsonSyntaxError,
    LimitExceeded,
    VfiodError,
    WireError,
)
from vfiod.protocol.limits import MAX_COLLECTIONS, MAX_MESSAGE_BYTES

__all__ = [
    "Answer",
    "Call",
    "Failure",
    "Notice",
    "Refused",
    "decode_answer",
    "decode_call",
    "decode_notice",
    "decode_result",
    "encode_call",
    "encode_error",
    "encode_notice",
    "encode_result",
    "topic_of",
]

Id = str | int | float | None

_VERSION: Final = "2.0"
_MEMBERS: Final = frozenset({"jsonrpc", "method", "params", "id"})
_IDS: Final = frozenset({str, int, float, type(None)})
_SHOWN: Final = 80
"""Characters of a wrong value that an error shows."""


class Call(msgspec.Struct, frozen=True):
    """One call, or a notification, which has no id and gets no answer.

    Attributes:
        command: its name.
        arguments: by name; UNSET: none came.
        id: comes back with the answer; UNSET: a notification.

    """

    command: str
    arguments: dict[str, Any] | UnsetType
    id: Id | UnsetType


class Refused(msgspec.Struct, frozen=True):
    """No call. Answer with ``encode_error(refused.error, refused.id)``."""

    error: VfiodError
    id: Id = None


class Answer(msgspec.Struct, frozen=True):
    """A call was done."""

    value: Any
    id: Id


class Failure(msgspec.Struct, frozen=True):
    """A call was refused or failed."""

    code: int
    desc: str
    error_class: str
    errno: str | None
    id: Id


class Notice(msgspec.Struct, frozen=True):
    """An event. Times are -1 when it has none."""

    name: str
    data: dict[str, Any]
    seq: int
    seconds: int
    microseconds: int


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise InvalidRequest(f"A key must be text, not {str(key)[:_SHOWN]!r}")
        if key in members:
            raise InvalidRequest(f"The member '{key[:_SHOWN]}' is there twice")
        members[key] = value
    return members


def _no_extension(code: int, _data: bytes) -> Any:
    raise InvalidRequest(f"The extension type {code} is none of JSON's types")


class _Counting:
    """Reads a call's lists and maps, as long as they are not too many."""

    def __init__(self) -> None:
        self._left = MAX_COLLECTIONS

    def pairs(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        self.items(pairs)
        return _pairs(pairs)

    def items(self, items: list[Any]) -> list[Any]:
        self._left -= 1
        if self._left < 0:
            raise LimitExceeded(f"A call holds at most {MAX_COLLECTIONS} lists and maps")
        return items


def _read(payload: bytes, **hooks: Any) -> Any:
    """Raises WireError: it is no msgpack, or holds what JSON has no type for."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise LimitExceeded(f"A message has at most {MAX_MESSAGE_BYTES} bytes, not {len(payload)}")
    hooks = hooks or {"object_pairs_hook": _pairs}
    try:
        return msgpack.unpackb(payload, strict_map_key=False, ext_hook=_no_extension, timestamp=0, **hooks)
    except msgpack.exceptions.StackError:
        raise LimitExceeded("Nesting depth limit exceeded") from None
    except RecursionError:
        raise LimitExceeded("Nesting depth limit exceeded") from None
    except ValueError as error:
        raise JsonSyntaxError(f"The message is no msgpack: {error}") from None


# --- the server's side ------------------------------------------------------------------------------------
def decode_call(payload: bytes) -> Call | Refused:
    """Turn one message into a call. Never raises."""
    counting = _Counting()
    try:
        message = _read(payload, object_pairs_hook=counting.pairs, list_hook=counting.items)
    except WireError as error:
        return Refused(error)
    if not isinstance(message, dict):
        return Refused(InvalidRequest("A request must be a map"))
    id, method, params = message.get("id", UNSET), message.get("method"), message.get("params", UNSET)
    if (
        message.get("jsonrpc") == _VERSION
        and type(method) is str
        and (params is UNSET or type(params) is dict)
        and (id is UNSET or type(id) in _IDS)
        and len(message) == 2 + (id is not UNSET) + (params is not UNSET)
    ):
        return Call(method, params, id)
    if id is not UNSET and type(id) not in _IDS:
        return Refused(InvalidRequest("The member 'id' must be a string, a number or null"))
    return Refused(InvalidRequest(_wrong_with(message)), None if id is UNSET else id)


def _wrong_with(message: dict[str, Any]) -> str:
    """What is wrong with a message that is no call."""
    strangers = message.keys() - _MEMBERS
    if strangers:
        return f"Not a JSON-RPC 2.0 request: it has the unexpected member '{min(strangers)[:_SHOWN]}'"
    if message.get("jsonrpc") != _VERSION:
        return "Not a JSON-RPC 2.0 request: the member 'jsonrpc' must be '2.0'"
    if not isinstance(message.get("method"), str):
        return "Not a JSON-RPC 2.0 request: the member 'method' must be a string"
    return "The member 'params' must be an object"


_encode: Final = msgspec.msgpack.Encoder().encode
"""Our own values, structures and bytes among them: what we send needs none of msgpack's care for what others send."""

_FIXMAP: Final = 0x80
_FIXMAP_MOST: Final = 15
"""A map of up to so many members begins with one byte, 0x80 and their number (msgpack/spec.md, "map format family")."""


def encode_result(value: Any, id: Id) -> bytes:
    """``{"jsonrpc", "result", "id"}``."""
    if isinstance(value, Raw):  # the schema is kept as JSON
        value = msgspec.json.decode(value)
    return _encode({"jsonrpc": _VERSION, "result": value, "id": id})


def encode_error(error: VfiodError, id: Id = None) -> bytes:
    """``{"jsonrpc", "error": {"code", "message", "data": {"class", "errno"?}}, "id"}``."""
    data: dict[str, str] = {"class": error.error_class}
    if isinstance(error, CommandError) and error.errno is not None:
        data["errno"] = error.errno
    body = {"code": error.jsonrpc_code, "message": str(error), "data": data}
    return bytes(msgpack.packb({"jsonrpc": _VERSION, "error": body, "id": id}, unicode_errors="replace"))


def topic_of(data: EventData) -> bytes:
    """What a reader subscribes to, by its beginning: ``NAME/device``; ``NAME/`` for what belongs to no device."""
    device = getattr(data, "device", UNSET)
    return f"{event_of(data).name}/{device if isinstance(device, str) else ''}".encode(errors="replace")


def encode_notice(data: EventData, seq: int, seconds: int, microseconds: int) -> bytes:
    """``{"jsonrpc", "method": name, "params": {..., "seq", "timestamp": {"seconds", "microseconds"}}}``."""
    members = _encode(data)
    more = _encode({"seq": seq, "timestamp": {"seconds": seconds, "microseconds": microseconds}})
    count = members[0] + more[0] - 2 * _FIXMAP
    assert members[0] & 0xF0 == _FIXMAP and count <= _FIXMAP_MOST  # noqa: S101 - no event has so many members
    head = _HEADS.get(type(data))
    if head is None:
        head = _HEADS[type(data)] = _encode({"jsonrpc": _VERSION, "method": event_of(data).name, "params": 0})[:-1]
    return b"".join((head, (_FIXMAP + count).to_bytes(), members[1:], more[1:]))


_HEADS: Final[dict[type[EventData], bytes]] = {}
"""Of each sort of event: a notification up to the value of its last member."""


# --- the client's side ------------------------------------------------------------------------------------
def encode_call(command: str, arguments: Any = UNSET, id: Id | UnsetType = UNSET) -> bytes:
    """A call; without ``id`` a notification."""
    message: dict[str, Any] = {"jsonrpc": _VERSION, "method": command}
    if arguments is not UNSET:
        message["params"] = arguments
    if id is not UNSET:
        message["id"] = id
    return _encode(message)


def decode_answer(payload: bytes) -> Answer | Failure:
    """What a server answered. Raises WireError: it is no answer."""
    message = _read(payload)
    if isinstance(message, dict) and "id" in message:
        if "result" in message:
            return Answer(message["result"], message["id"])
        error = message.get("error")
        if isinstance(error, dict):
            data = error.get("data")
            data = data if isinstance(data, dict) else {}
            errno = data.get("errno")
            return Failure(
                code=_whole(error.get("code", 0)),
                desc=str(error.get("message", "")),
                error_class=str(data.get("class", ErrorClass.GENERIC)),
                errno=None if errno is None else str(errno),
                id=message["id"],
            )
    raise InvalidRequest("The server sent a message without result or error")


def decode_result(command: str, value: Any) -> Any:
    """An answer's value as the catalogue's type; as it came, for a command that the catalogue does not know.

    Raises InvalidRequest: the server sent something else.
    """
    spec = COMMANDS.get(command)
    if spec is None or spec.returns is Any or spec.returns is Raw:
        return value
    try:
        return msgspec.convert(value, spec.returns)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The reply to {command} is not what the catalogue declares: {error}") from None


def decode_notice(payload: bytes) -> Notice:
    """What a server published. Raises WireError: it is no event."""
    message = _read(payload)
    if not isinstance(message, dict) or not isinstance(message.get("method"), str):
        raise InvalidRequest("The server published a message that is no event")
    params = message.get("params")
    data: dict[str, Any] = dict(params) if isinstance(params, dict) else {}
    seq, stamp = data.pop("seq", 0), data.pop("timestamp", None)
    stamp = stamp if isinstance(stamp, dict) else {}
    if not isinstance(seq, int):
        raise InvalidRequest("The server published an event without a number")
    return Notice(message["method"], data, seq, _whole(stamp.get("seconds", -1)), _whole(stamp.get("microseconds", -1)))


def _whole(value: Any) -> int:
    """A number as the server sent it. Raises InvalidRequest: it is none, or no whole one."""
    if isinstance(value, int):
        return value
    raise InvalidRequest(f"The server sent {str(value)[:_SHOWN]!r} where a whole number belongs")
