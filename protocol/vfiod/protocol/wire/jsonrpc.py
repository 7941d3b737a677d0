"""JSON-RPC 2.0 messages, both sides (jsonrpc.org/specification). Events are notifications."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import EventData, event_of
from vfiod.protocol.errors import (
    CommandError,
    ErrorClass,
    InvalidRequest,
    JsonSyntaxError,
    LimitExceeded,
    VfiodError,
    WireError,
)
from vfiod.protocol.limits import MAX_BATCH
from vfiod.protocol.wire.qmp import Event, seq_of, with_seq
from vfiod.protocol.wire.text import EOL, encode_json, encode_line, has_unique_keys, is_unambiguous, one_line
from vfiod.protocol.wire.text import members as read_members

__all__ = [
    "Request",
    "Rejected",
    "Single",
    "Batch",
    "Result",
    "Error",
    "Event",
    "Message",
    "decode_plain",
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

_NULL: Final = Raw(b"null")


class _Incoming(Request, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A request as it comes: the specification's members and no others."""

    jsonrpc: Literal["2.0"]


_decode_single = msgspec.json.Decoder(_Incoming).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_members = msgspec.json.Decoder(dict[str, Raw]).decode


# --- the server's side ------------------------------------------------------------------------------------
def decode_plain(text: bytes) -> Single | None:
    """A text that nobody has looked at yet, when it is one plain request, as nearly all are.

    None says nothing about it but that :class:`JsonStream` and :func:`decode_request` have to look; for what this
    takes they come to the same. Blanks before a text are the stream's to skip.
    """
    try:
        request = _decode_single(text)
        names = 2
        if request.id is not UNSET:
            if not _may_be_id(request.id):
                return None
            names = 3
        if request.arguments is not UNSET:
            names += 1 + len(_decode_members(request.arguments))
    except (ValueError, RecursionError):
        return None
    # As many colons as names: no name is there twice, and no colon stands in a string or deeper inside.
    if text.count(b":") == names and b"\\" not in text and text.isascii() and text[0] == _BRACE:
        return Single(request)
    return None


def decode_request(text: bytes | WireError) -> Single | Batch:
    """Turn one item of :meth:`JsonStream.receive_data` into requests.

    Never raises. A notification is answered by nothing at all, even when it fails; what is no request is
    answered, with id null when the id could not be read (section 5). JSON-RPC is strict JSON: no single
    quotes. Arguments have names; ``[]`` is taken as none, other arrays are refused with the arguments.
    """
    if not isinstance(text, bytes):
        return Single(Rejected(text, _NULL))
    try:
        if text[:1] == b"[":
            return _decode_batch(text)
        request = _decode_single(text)
        params = request.arguments
        has_names = params is not UNSET and memoryview(params)[0] == _BRACE
        members = 2 + (params is not UNSET) + (request.id is not UNSET)
        if is_unambiguous(text, members, params if has_names else UNSET):
            return Single(_checked(request))
        return Single(Rejected(_unreadable(text), _NULL))
    except msgspec.ValidationError as error:
        return Single(_rejected(text, str(error)))
    except (ValueError, RecursionError):
        return Single(Rejected(_unreadable(text), _NULL))


def _decode_batch(text: bytes) -> Single | Batch:
    items = _decode_list(text)
    if not items:
        return Single(Rejected(InvalidRequest("A batch has at least one request"), _NULL))
    if len(items) > MAX_BATCH:
        refusal = LimitExceeded(f"A batch has at most {MAX_BATCH} requests, not {len(items)}")
        return Single(Rejected(refusal, _NULL))
    if not has_unique_keys(text):
        return Single(Rejected(_unreadable(text), _NULL))
    requests: list[Request | Rejected] = []
    for item in items:
        try:
            requests.append(_checked(_decode_single(item)))
        except msgspec.ValidationError as error:
            requests.append(_rejected(item, str(error)))
    return Batch(tuple(requests))


def _checked(request: Request) -> Request | Rejected:
    """What the types cannot say: which JSON values an id and params may be."""
    if request.id is not UNSET and not _may_be_id(request.id):
        return Rejected(InvalidRequest("The member 'id' must be a string, a number or null"), _NULL)
    if request.arguments is not UNSET and (first := memoryview(request.arguments)[0]) != _BRACE:
        if first != _BRACKET:
            id = _NULL if request.id is UNSET else request.id
            return Rejected(InvalidRequest("The member 'params' must be an object"), id)
        if not _decode_list(request.arguments):
            return Request(command=request.command, id=request.id)
    return request


_BRACE: Final = ord("{")
_BRACKET: Final = ord("[")
_WORDS: Final = (
    ("Object missing required field", "it lacks member"),
    ("Object contains unknown field", "it has the unexpected member"),
    ("`", "'"),
)
_MAY_BEGIN_ID: Final = frozenset(b'"-0123456789n')


def _may_be_id(id: Raw) -> bool:
    return memoryview(id)[0] in _MAY_BEGIN_ID


def _rejected(text: bytes | Raw, reason: str) -> Rejected:
    """JSON, but no request; with its id, when it has one."""
    if not has_unique_keys(bytes(text)):
        return Rejected(_unreadable(bytes(text)), _NULL)
    try:
        id = _decode_members(text).get("id", _NULL)
    except ValueError:
        return Rejected(InvalidRequest("A request must be a JSON object"), _NULL)
    for theirs, ours in _WORDS:
        reason = reason.replace(theirs, ours)
    return Rejected(InvalidRequest(f"Not a JSON-RPC 2.0 request: {reason}"), id if _may_be_id(id) else _NULL)


def _unreadable(text: bytes) -> WireError:
    """Why a text is no JSON."""
    try:
        read_members(text)
    except WireError as error:
        return error
    try:
        _decode_members(text)
    except RecursionError:
        return LimitExceeded("JSON nesting depth limit exceeded")
    except ValueError:
        pass
    return JsonSyntaxError("JSON parse error, JSON-RPC has strings in double quotes only")


def encode_result(value: Any, id: Raw) -> bytes:
    """``{"jsonrpc": "2.0", "result": value, "id"}``, one line."""
    return encode_line(b'{"jsonrpc":"2.0","result":%b,"id":%b}' % (encode_json(value), one_line(id)))


def encode_error(error: VfiodError, id: Raw | UnsetType = UNSET) -> bytes:
    """``{"jsonrpc": "2.0", "error": {"code", "message", "data": {"class", "errno"?}}, "id"}``; id null when unset."""
    data: dict[str, str] = {"class": error.error_class}
    if isinstance(error, CommandError) and error.errno is not None:
        data["errno"] = error.errno
    body = {"code": error.jsonrpc_code, "message": str(error), "data": data}
    return encode_line(
        b'{"jsonrpc":"2.0","error":%b,"id":%b}' % (encode_json(body), one_line(_NULL if id is UNSET else id))
    )


def encode_batch(replies: Iterable[bytes]) -> bytes:
    """The answers to a batch, each from :func:`encode_result` or :func:`encode_error`; ``b""`` for none.

    A batch of notifications only is answered by nothing, not by an empty array (section 6).
    """
    answers = [reply.removesuffix(EOL) for reply in replies]
    return b"[" + b",".join(answers) + b"]" + EOL if answers else b""


def encode_notification(data: EventData, seq: int, seconds: int, microseconds: int) -> bytes:
    """``{"jsonrpc", "method": name, "params": {..., "seq", "timestamp": {"seconds", "microseconds"}}}``, one line.

    The arguments are those of :func:`vfiod.protocol.wire.qmp.encode_event`.
    """
    return encode_line(
        b'{"jsonrpc":"2.0","method":"%b","params":%b,"timestamp":{"seconds":%d,"microseconds":%d}}}'
        % (event_of(data).name.encode(), with_seq(data, seq)[:-1], seconds, microseconds)
    )


# --- the client's side ------------------------------------------------------------------------------------
def encode_request(
    command: str,
    arguments: Any = UNSET,
    id: int | str | Raw | UnsetType = UNSET,
) -> bytes:
    """A call, one line; without ``id`` a notification."""
    request: dict[str, Any] = {"jsonrpc": "2.0", "method": command}
    if arguments is not UNSET:
        request["params"] = arguments
    if id is not UNSET:
        request["id"] = id
    return encode_line(encode_json(request))


class _ErrorData(msgspec.Struct):
    error_class: str = msgspec.field(default=ErrorClass.GENERIC, name="class")
    errno: str | None = None


class _ErrorBody(msgspec.Struct):
    code: int
    message: str
    data: _ErrorData | UnsetType = UNSET


class _Timestamp(msgspec.Struct, frozen=True):
    seconds: int = -1
    microseconds: int = -1


class _EventParams(msgspec.Struct):
    timestamp: _Timestamp = _Timestamp()


class _Answer(msgspec.Struct):
    """Any message of a server; which one it is, its members tell."""

    jsonrpc: Literal["2.0"]
    value: Raw | UnsetType = msgspec.field(default=UNSET, name="result")
    error: _ErrorBody | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    method: str | UnsetType = UNSET
    params: Raw | UnsetType = UNSET


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_params = msgspec.json.Decoder(_EventParams).decode


def decode_message(text: bytes | WireError) -> list[Message]:
    """What a server sent: one message, or a batch of them.

    Raises:
        WireError: it is not JSON-RPC 2.0.

    """
    if not isinstance(text, bytes):
        raise text
    try:
        return [_message(part) for part in (_decode_list(text) if text[:1] == b"[" else [text])]
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The server sent a message that is not JSON-RPC 2.0: {error}") from None
    except (ValueError, RecursionError) as error:
        raise JsonSyntaxError(f"The server sent a message that is not JSON: {error}") from None


def _message(text: bytes | Raw) -> Message:
    answer = _decode_answer(text)
    if answer.method is not UNSET:
        stamp = _decode_params(answer.params).timestamp if isinstance(answer.params, Raw) else _Timestamp()
        return Event(answer.method, answer.params, seq_of(answer.params), stamp.seconds, stamp.microseconds)
    if isinstance(answer.id, Raw):
        if isinstance(answer.value, Raw):
            return Result(answer.value, answer.id)
        if answer.error is not UNSET:
            error, data = answer.error, answer.error.data or _ErrorData()
            return Error(error.code, error.message, data.error_class, data.errno, answer.id)
    raise InvalidRequest("The server sent a message without method, result or error")
