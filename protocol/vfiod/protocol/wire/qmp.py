"""QMP messages, both sides (QEMU ``docs/interop/qmp-spec.rst``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import EventData, event_of
from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.errors import CommandError, InvalidRequest, JsonSyntaxError, VfiodError, WireError
from vfiod.protocol.wire.text import (
    encode_json,
    encode_line,
    encode_plain,
    escaped,
    is_unambiguous,
    members_of,
    one_line,
)
from vfiod.protocol.wire.text import members as read_members

__all__ = [
    "Request",
    "OobRequest",
    "Rejected",
    "Greeting",
    "Return",
    "Error",
    "Event",
    "Message",
    "decode_plain",
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

_decode_in_band = msgspec.json.Decoder(Request).decode
_OPENING_BRACE: Final = ord("{")


# --- the server's side ------------------------------------------------------------------------------------
def decode_plain(text: bytes) -> Request | None:
    """A text that nobody has looked at yet, when it is one plain in-band request, as nearly all are.

    None says nothing about it but that :class:`JsonStream` and :func:`decode_request` have to look; for what this
    takes they come to the same. Blanks before a text are the stream's to skip.
    """
    try:
        request = _decode_in_band(text)
        names = 1 if request.id is UNSET else 2
        if request.arguments is not UNSET:
            names += 1 + len(members_of(request.arguments))
    except (ValueError, RecursionError):
        return None
    # As many colons as names: no name is there twice, and no colon stands in a string or deeper inside.
    if text.count(b":") == names and b"\\" not in text and text.isascii() and text[0] == _OPENING_BRACE:
        return request
    return None


def decode_request(text: bytes | WireError, *, oob_enabled: bool) -> Request | Rejected:
    """Turn one item of :meth:`JsonStream.receive_data` into a request.

    Never raises. ``oob_enabled`` says whether the session has negotiated the capability ``oob``; without it
    ``exec-oob`` is an unexpected member. A rejected text carries its id when it had one (QEMU
    ``qapi/qmp-dispatch.c``, ``qmp_dispatch_check_obj``).
    """
    if isinstance(text, bytes):
        try:
            request = _decode_in_band(text)
            arguments = request.arguments
            if arguments is UNSET or memoryview(arguments)[0] == _OPENING_BRACE:
                members = 1 + (arguments is not UNSET) + (request.id is not UNSET)
                if is_unambiguous(text, members, arguments):
                    return request
        except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError are ValueErrors
            pass  # wrong, out of band, lenient, or nested deeply: the careful reader knows
        return _decode_carefully(text, oob_enabled)
    return Rejected(text)


def _decode_carefully(text: bytes, oob_enabled: bool) -> Request | Rejected:
    try:
        found = read_members(text)
    except WireError as error:
        return Rejected(error)
    if found is None:
        return Rejected(InvalidRequest("QMP input must be a JSON object"))
    id = found.get("id", UNSET)
    for name, value in found.items():
        first = bytes(memoryview(value)[:1])
        if name == "execute" or (name == "exec-oob" and oob_enabled):
            if first != b'"':
                return Rejected(InvalidRequest(f"QMP input member '{name}' must be a string"), id)
        elif name == "arguments":
            if first != b"{":
                return Rejected(InvalidRequest("QMP input member 'arguments' must be an object"), id)
        elif name != "id":
            return Rejected(InvalidRequest(f"QMP input member '{name}' is unexpected"), id)
    if "execute" in found and "exec-oob" in found:
        return Rejected(InvalidRequest("QMP input member 'execute' clashes with 'exec-oob'"), id)
    kind: type[Request] = OobRequest if "exec-oob" in found else Request
    command = found.get("exec-oob", found.get("execute"))
    if command is None:
        return Rejected(InvalidRequest("QMP input lacks member 'execute'"), id)
    return kind(command=msgspec.json.decode(command, type=str), arguments=found.get("arguments", UNSET), id=id)


def encode_greeting(version: VersionInfo, capabilities: Sequence[str] = ("oob",)) -> bytes:
    """The server's first line."""
    return encode_line(encode_json({"QMP": {"version": version, "capabilities": capabilities}}))


def encode_return(value: Any, id: Raw | UnsetType = UNSET) -> bytes:
    """``{"return": value, "id"?}``, one line; ``value`` is a :class:`Result`, or anything msgspec encodes."""
    # encode_json and encode_line without their calls: this is on every command's way.
    try:
        body = encode_plain(value)
    except UnicodeEncodeError:
        body = encode_json(value)
    line = b'{"return":%b}\r\n' % body if id is UNSET else b'{"return":%b,"id":%b}\r\n' % (body, one_line(id))
    return line if line.isascii() else escaped(line)


def encode_error(error: VfiodError, id: Raw | UnsetType = UNSET) -> bytes:
    """``{"id"?, "error": {"class", "desc", "errno"?}}``, one line.

    ``errno`` is vfiod's addition: the name of the errno behind the error, when there is one.
    """
    body: dict[str, str] = {"class": error.error_class, "desc": str(error)}
    if isinstance(error, CommandError) and error.errno is not None:
        body["errno"] = error.errno
    if isinstance(id, Raw):
        return encode_line(b'{"id":%b,"error":%b}' % (one_line(id), encode_json(body)))
    return encode_line(b'{"error":%b}' % encode_json(body))


def encode_event(data: EventData, seq: int, seconds: int, microseconds: int) -> bytes:
    """``{"timestamp", "event", "data": {..., "seq"}}``, one line; the name comes from the catalogue.

    Args:
        data: an instance of a class declared with ``@event``.
        seq: the event's place among all events of the machine, from 1.
        seconds: since the epoch; -1 when the clock failed (QMP specification, "Asynchronous events").
        microseconds: 0 to 999,999, or -1.

    """
    return encode_line(
        b'{"timestamp":{"seconds":%d,"microseconds":%d},"event":"%b","data":%b}'
        % (seconds, microseconds, event_of(data).name.encode(), with_seq(data, seq))
    )


# --- the client's side ------------------------------------------------------------------------------------
def encode_request(
    command: str,
    arguments: Any = UNSET,
    id: int | str | Raw | UnsetType = UNSET,
    *,
    oob: bool = False,
) -> bytes:
    """A request, one line; ``arguments`` is an :class:`Arguments`, a mapping, or absent."""
    request: dict[str, Any] = {"exec-oob" if oob else "execute": command}
    if arguments is not UNSET:
        request["arguments"] = arguments
    if id is not UNSET:
        request["id"] = id
    return encode_line(encode_json(request))


class _GreetingBody(msgspec.Struct):
    version: VersionInfo
    capabilities: tuple[str, ...]


class _ErrorBody(msgspec.Struct):
    error_class: str = msgspec.field(name="class")
    desc: str
    errno: str | None = None


class _Timestamp(msgspec.Struct, frozen=True):
    seconds: int
    microseconds: int


class _Incoming(msgspec.Struct):
    """Any message of a server; which one it is, its members tell."""

    greeting: _GreetingBody | UnsetType = msgspec.field(default=UNSET, name="QMP")
    value: Raw | UnsetType = msgspec.field(default=UNSET, name="return")
    error: _ErrorBody | UnsetType = UNSET
    event: str | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    timestamp: _Timestamp | UnsetType = UNSET
    id: Raw | UnsetType = UNSET


class _Numbered(msgspec.Struct):
    seq: Any = None


_decode_incoming = msgspec.json.Decoder(_Incoming).decode
_decode_numbered = msgspec.json.Decoder(_Numbered).decode


def decode_message(text: bytes | WireError) -> Message:
    """What a server sent: vfiod, or any QMP server.

    Raises:
        WireError: it is not QMP.

    """
    if not isinstance(text, bytes):
        raise text
    try:
        incoming = _decode_incoming(text)
        if incoming.value is not UNSET:
            return Return(incoming.value, incoming.id)
        if incoming.event is not UNSET:
            stamp = incoming.timestamp or _Timestamp(-1, -1)
            return Event(incoming.event, incoming.data, seq_of(incoming.data), stamp.seconds, stamp.microseconds)
        if incoming.error is not UNSET:
            error = incoming.error
            return Error(error.error_class, error.desc, error.errno, incoming.id)
        if incoming.greeting is not UNSET:
            return Greeting(incoming.greeting.version, incoming.greeting.capabilities)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The server sent a message that is not QMP: {error}") from None
    except (ValueError, RecursionError) as error:
        raise JsonSyntaxError(f"The server sent a message that is not JSON: {error}") from None
    raise InvalidRequest("The server sent a message without QMP, return, error or event")


# --- shared with JSON-RPC ---------------------------------------------------------------------------------
def with_seq(data: EventData, seq: int) -> bytes:
    """An event's data as a JSON object, with its sequence number."""
    body = encode_json(data)
    return b'{"seq":%d}' % seq if body == b"{}" else b'%b,"seq":%d}' % (body[:-1], seq)


def seq_of(data: Raw | UnsetType) -> int | None:
    """The sequence number in an event's data; None when a foreign server sent none."""
    if data is UNSET:
        return None
    seq = _decode_numbered(data).seq
    return seq if type(seq) is int else None
