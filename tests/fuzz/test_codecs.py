"""The codecs never raise on what comes in, and what goes out comes back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw, UnsetType
from tests.fuzz.inputs import json_texts, json_values, soup

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.errors import CommandError, InvalidArgument, WireError
from vfiod.protocol.wire import jsonrpc, qmp
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.protocol.wire.stream import JsonStream
from vfiod.protocol.wire.text import members


def is_one_ascii_line(line: bytes) -> bool:
    return line.isascii() and line.endswith(b"\r\n") and line.count(b"\n") == 1 == line.count(b"\r")


def body(raw: Raw | UnsetType) -> bytes:
    assert isinstance(raw, Raw)
    return bytes(raw)


@given(soup(), st.booleans())
def test_qmp_answers_anything(data: bytes, oob_enabled: bool) -> None:
    for item in JsonStream().receive_data(data + b"\xff"):
        request = qmp.decode_request(item, oob_enabled=oob_enabled)
        error = request.error if isinstance(request, qmp.Rejected) else CommandError("x")
        line = qmp.encode_error(error, request.id)
        assert is_one_ascii_line(line)
        json.loads(line)


@given(soup())
def test_jsonrpc_answers_anything(data: bytes) -> None:
    for item in JsonStream().receive_data(data + b"\xff"):
        decoded = jsonrpc.decode_request(item)
        for request in (decoded.item,) if isinstance(decoded, jsonrpc.Single) else decoded.items:
            error = request.error if isinstance(request, jsonrpc.Rejected) else CommandError("x")
            line = jsonrpc.encode_error(error, request.id)
            assert is_one_ascii_line(line)
            json.loads(line)


def told(message: Any) -> Any:
    """All that a decoded message says, to be compared."""
    if isinstance(message, msgspec.Struct):
        return type(message), [told(getattr(message, name)) for name in message.__struct_fields__]
    if isinstance(message, tuple):
        return [told(item) for item in message]
    return bytes(message) if isinstance(message, Raw) else repr(message)


PLAIN = [
    b'{"execute":"query-name"}',
    b'{"execute":"query-name","id":7}\n',
    b' {"execute":"a","arguments":{"b":[1,"c"]},"id":"x"}\r\n',
    b'{"execute":"a","arguments":{"b":{"c":1,"c":2}}}',
    b'{"execute":"a","execute":"b"}',
    b'{"execute":"a:b"}',
    b'{"exec-oob":"a","id":0}',
    b'{"jsonrpc":"2.0","method":"query-name","id":1}',
    b'{"jsonrpc":"2.0","method":"a","params":{"b":1},"id":null}\n',
    b'{"jsonrpc":"2.0","method":"a","params":[],"id":[]}',
    b'{"jsonrpc":"2.0","method":"a"}',
]


@given(
    st.one_of(
        st.lists(st.sampled_from(PLAIN) | soup() | json_texts(), max_size=4).map(b"".join),
        st.tuples(st.sampled_from(PLAIN), st.integers(0, 40), soup()).map(
            lambda mutation: mutation[0][: mutation[1]] + mutation[2][:4] + mutation[0][mutation[1] :]
        ),
    ),
    st.booleans(),
)
def test_a_first_look_changes_nothing(data: bytes, oob_enabled: bool) -> None:
    for decode_plain, decode_request, decoded in (
        (qmp.decode_plain, lambda item: qmp.decode_request(item, oob_enabled=oob_enabled), qmp.Request),
        (jsonrpc.decode_plain, jsonrpc.decode_request, jsonrpc.Single),
    ):
        quick, slow = JsonStream(), JsonStream()
        for part in (data, b"\xff", data):
            items: list[Any] = quick.receive(part, decode_plain)
            messages = [told(item if isinstance(item, decoded) else decode_request(item)) for item in items]
            assert messages == [told(decode_request(item)) for item in slow.receive_data(part)]
            assert quick.between == slow.between


def test_a_first_look_takes_what_is_plain() -> None:
    assert [told(qmp.decode_plain(text)) for text in PLAIN[:2]] == [
        told(qmp.decode_request(text, oob_enabled=False)) for text in PLAIN[:2]
    ]
    assert not any(qmp.decode_plain(text) for text in PLAIN[2:])
    assert sum(jsonrpc.decode_plain(text) is not None for text in PLAIN) == 3


@given(soup() | json_texts())
def test_the_clients_raise_wire_errors_only(data: bytes) -> None:
    for item in JsonStream().receive_data(data + b"\xff"):
        for decode in (qmp.decode_message, jsonrpc.decode_message):
            try:
                decode(item)
            except WireError as error:
                assert str(error)


@given(st.dictionaries(st.text(), json_values(), max_size=5), json_values(), st.booleans())
def test_requests_come_through(arguments: dict[str, Any], id: Any, indented: bool) -> None:
    text = json.dumps(
        {"execute": "a", "arguments": arguments, "id": id}, ensure_ascii=indented, indent=3 if indented else None
    )
    if any(0xFFFE <= ord(character) <= 0xFFFF or 0xFDD0 <= ord(character) <= 0xFDEF for character in text):
        return  # noncharacters are refused, as by QEMU
    request = qmp.decode_request(text.encode(), oob_enabled=False)
    if isinstance(request, qmp.Rejected):
        assert "not a valid Unicode character" in str(request.error) or "UTF-8" in str(request.error)
        return
    assert json.loads(body(request.arguments)) == arguments
    reply = qmp.encode_return(arguments, request.id)
    assert is_one_ascii_line(reply)
    assert json.loads(reply) == {"return": arguments, "id": id}


@given(json_texts())
def test_the_careful_reader_agrees_with_the_fast_one(text: bytes) -> None:
    value = json.loads(text)
    try:
        found = members(text)
    except WireError as error:
        assert "Unicode character" in str(error)
        return
    if isinstance(value, dict):
        assert found is not None
        assert {name: json.loads(bytes(raw)) for name, raw in found.items()} == value
    else:
        assert found is None


@pytest.mark.parametrize("quote", ['"', "'"])
@given(content=st.text(max_size=20))
def test_single_quoted_strings_mean_what_they_say(quote: str, content: str) -> None:
    if any(0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE for character in content):
        return
    inner = json.dumps(content, ensure_ascii=False)[1:-1].replace('\\"', '"').replace(quote, "\\" + quote)
    found = members(f"{{{quote}k{quote}:{quote}{inner}{quote}}}".encode())
    assert found is not None and json.loads(bytes(found["k"])) == content


@given(st.sampled_from(list(COMMANDS)), st.data())
def test_arguments_are_taken_or_named(command: str, data: st.DataObject) -> None:
    spec = COMMANDS[command]
    known = st.sampled_from([*spec.arguments.__struct_encode_fields__, "strange"])
    arguments = data.draw(st.dictionaries(known, json_values() | st.integers(-5, 5000) | st.just("bar0"), max_size=5))
    try:
        taken = decode_arguments(spec, json.dumps(arguments).encode())
    except InvalidArgument as error:
        assert "not what it takes" not in str(error)
    else:
        assert msgspec.to_builtins(taken).keys() <= arguments.keys()


@given(
    st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.text()
)
def test_whatever_goes_out_is_one_ascii_line(value: Any, text: str) -> None:
    for line in (
        qmp.encode_return(value, Raw(msgspec.json.encode(text))),
        qmp.encode_error(CommandError(text)),
        jsonrpc.encode_result(value, Raw(msgspec.json.encode(text))),
        jsonrpc.encode_batch([jsonrpc.encode_error(CommandError(text)), jsonrpc.encode_result(value, Raw(b"1"))]),
        qmp.encode_request("a", {"k": value}, text),
    ):
        assert is_one_ascii_line(line)
    assert json.loads(qmp.encode_return(value, UNSET)) == {"return": value}
