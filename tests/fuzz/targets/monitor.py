"""The monitor's stream, both dialects, both ends; and the line a person types.

The first byte says how the stream is cut, by its upper seven bits: 0 whole, else into pieces of so many bytes; the
lowest is QMP's: whether out-of-band execution was agreed on.
"""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz.target import Target, lines

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.errors import CommandError, VfiodError, WireError
from vfiod.protocol.limits import MAX_COMMAND_LINE, MAX_MESSAGE_BYTES
from vfiod.protocol.wire import jsonrpc, qmp
from vfiod.protocol.wire.arguments import decode_arguments, decode_event_data, decode_result
from vfiod.protocol.wire.stream import JsonStream
from vfiod.server.commands.human import _split, parse_line

__all__ = ["TARGETS"]


def _streamed(data: bytes, decode: Any = None) -> list[Any]:
    """What comes out of the stream, cut as the first byte says. Little is kept, and nothing longer than allowed."""
    stream = JsonStream()
    width = data[0] >> 1 or max(1, len(data))
    items: list[Any] = []
    for at in range(1, len(data), width):
        part = data[at : at + width]
        items += stream.receive(part, decode) if decode is not None else stream.receive_data(part)
        assert stream.buffered <= min(MAX_MESSAGE_BYTES, len(data)), "it keeps more than came"
    return items


def _told(message: Any) -> Any:
    return message.error if hasattr(message, "error") else (message.command, _bytes(message.arguments))


def _bytes(raw: Any) -> bytes | None:
    return bytes(raw) if isinstance(raw, bytes | memoryview) or type(raw).__name__ == "Raw" else None


def _is_line(line: bytes) -> None:
    assert line.isascii() and line.endswith(b"\r\n") and line.count(b"\n") == 1, "no line of ASCII"
    json.loads(line)


def _carried_out(request: Any) -> VfiodError | None:
    """Check its arguments, as a session does; the refusal."""
    if isinstance(request, qmp.Rejected | jsonrpc.Rejected):
        return request.error
    spec = COMMANDS.get(request.command)
    if spec is None:
        return None
    try:
        decode_arguments(spec, request.arguments)
    except CommandError as error:
        return error
    return None


def _qmp(data: bytes) -> None:
    if not data:
        return
    decoded = [qmp.decode_request(item, oob_enabled=bool(data[0] & 1)) for item in _streamed(data)]
    for request in decoded:
        error = _carried_out(request)
        _is_line(qmp.encode_return({}, request.id) if error is None else qmp.encode_error(error, request.id))
    for one, other in zip(_streamed(data, qmp.decode_plain), decoded, strict=True):
        if isinstance(one, qmp.Request):  # what is plain at the first look is the same at the second
            assert _told(one) == _told(other)


def _jsonrpc(data: bytes) -> None:
    if not data:
        return
    for item in _streamed(data):
        decoded = jsonrpc.decode_request(item)
        for request in (decoded.item,) if isinstance(decoded, jsonrpc.Single) else decoded.items:
            error = _carried_out(request)
            if error is not None:
                _is_line(jsonrpc.encode_error(error, request.id))
            elif isinstance(request.id, type(None)):
                raise AssertionError("an id that is None")


def _replies(data: bytes) -> None:
    if not data:
        return
    for item in _streamed(data):
        for decode in (qmp.decode_message, jsonrpc.decode_message):
            try:
                found: Any = decode(item)
            except WireError as error:
                assert str(error)
                continue
            for message in found if isinstance(found, list) else [found]:
                _looked_into(message)


def _looked_into(message: Any) -> None:
    """As a client does: results as the catalogue's types, events as theirs."""
    value, name = getattr(message, "value", None), getattr(message, "name", None)
    try:
        if value is not None:
            for command in ("query-version", "query-irqs", "region-read", "query-dma"):
                decode_result(COMMANDS[command], value)
        if name is not None:
            decode_event_data(name, message.data)
    except WireError as error:
        assert str(error)


def _human(data: bytes) -> None:
    text = data.decode("utf-8", "replace")[:MAX_COMMAND_LINE]
    try:
        words = _split(text)
        if words and words != ["info"]:  # that is help
            spec, given = parse_line(words)
            decode_arguments(spec, json.dumps(given).encode())
    except CommandError as error:
        assert str(error)


_WIRE = ("vfiod.protocol.wire", "vfiod.protocol.errors")

TARGETS = (
    Target(
        "monitor-qmp",
        _qmp,
        lambda: lines("monitor-qmp"),
        _WIRE,
        "every text is a request or a refusal; each reply is one line of ASCII JSON; no more is kept than came",
        150,
    ),
    Target(
        "monitor-jsonrpc",
        _jsonrpc,
        lambda: lines("monitor-jsonrpc"),
        _WIRE,
        "every text is requests or refusals; each reply is one line of ASCII JSON",
        150,
    ),
    Target(
        "monitor-client",
        _replies,
        lambda: lines("monitor-client"),
        _WIRE,
        "a client that is lied to gets a WireError, and nothing else",
        150,
    ),
    Target(
        "monitor-human",
        _human,
        lambda: lines("monitor-human"),
        ("vfiod.server.commands.human", "vfiod.protocol.wire.arguments"),
        "a line is a command with its arguments, or a CommandError",
        150,
    ),
)
