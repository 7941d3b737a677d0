"""The careful reader: every value in RFC 8259's form, every mistake in QEMU's words."""

from __future__ import annotations

import json

import pytest

from vfiod.protocol.errors import JsonSyntaxError
from vfiod.protocol.wire.text import CAREFUL_BYTES, encode_line, has_unique_keys, members


def read(text: bytes) -> dict[str, object] | None:
    found = members(text)
    return None if found is None else {name: json.loads(bytes(value)) for name, value in found.items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b' { "a" : 1 , "b" : [ ] , "c" : { "d" : [ 1 , { } ] } }\r\n', {"a": 1, "b": [], "c": {"d": [1, {}]}}),
        (b"{'a':'b\"c','d':'e\\'f',\"g\":\"h\\'i\"}", {"a": 'b"c', "d": "e'f", "g": "h'i"}),
        (b"{'\\u0061\\n':'\\\\'}", {"a\n": "\\"}),
        (b'{"a":-0.5e+3,"b":1E2,"c":-0,"d":0.0}', {"a": -500.0, "b": 100.0, "c": 0, "d": 0.0}),
        (b'{"a":true,"b":false,"c":null}', {"a": True, "b": False, "c": None}),
        ('{"é":"😀"}'.encode(), {"é": "😀"}),
        (b"[1,2]", None),
        (b"[{}]", None),
        (b"5", None),
        (b"'x'", None),
        (b"null", None),
    ],
)
def test_what_is_read(text: bytes, value: dict[str, object] | None) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a" 1}', "missing : in object pair"),
        (b'{"a"}', "missing : in object pair"),
        (b'{"a":1 "b":2}', "expected separator in dict"),
        (b'{"a":1]', "expected separator in dict"),
        (b"[1 2]", "expected separator in list"),
        (b"[1}", "expected separator in list"),
        (b"[1:2]", "expected separator in list"),
        (b"[,]", "expecting value"),
        (b"[1,]", "expecting value"),
        (b'{"a":}', "expecting value"),
        (b'{"a":1,}', "expecting value"),
        (b"}", "expecting value"),
        (b":", "expecting value"),
        (b"{1:2}", "key is not a string in object"),
        (b"{[1,{}]:2}", "key is not a string in object"),
        (b"{null:2}", "key is not a string in object"),
        (b'{"a":nul}', "invalid keyword 'nul'"),
        (b"{fo:2}", "invalid keyword 'fo'"),
        (b"[", "premature EOI"),
        (b'{"a":1', "premature EOI"),
        (b"[0e1]", "expected separator in list"),
        (b"{} {}", "expecting value"),
        (b"{'a':1,\"a\":2}", "duplicate key"),
        (b'{"a":{"b":1,"b":2}}', "duplicate key"),
        (b'{"a":"\\q"}', "invalid escape sequence in string"),
        (b'{"a":"\\u12"}', '\\u12" is not a valid Unicode character'),
        (b'{"a":"\\ud800x"}', "\\ud800 is not a valid Unicode character"),
        (b'{"a":"\xc3("}', "invalid UTF-8 sequence in string"),
        ('{"a":"\uffff"}'.encode(), "invalid UTF-8 sequence in string"),
    ],
)
def test_what_is_wrong(text: bytes, words: str) -> None:
    with pytest.raises(JsonSyntaxError) as caught:
        members(text)
    assert str(caught.value) == f"JSON parse error, {words}"


def test_nesting_needs_no_stack() -> None:
    depth = CAREFUL_BYTES // 2 - 10
    found = members(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    assert found is not None and len(bytes(found["a"])) == 2 * depth


def test_long_texts_have_to_be_plain() -> None:
    long = b"x" * CAREFUL_BYTES
    assert members(b'{"a":"' + long + b'"}') is not None
    assert members(b'["' + long + b'"]') is None
    with pytest.raises(JsonSyntaxError, match="byte 1"):
        members(b"{'a':\"" + long + b'"}')
    with pytest.raises(JsonSyntaxError, match="duplicate key"):
        members(b'{"a":1,"a":"' + long + b'"}')
    with pytest.raises(JsonSyntaxError, match="UTF-8"):
        members(b'{"a":"\xff' + long + b'"}')
    with pytest.raises(JsonSyntaxError, match="nested too deeply"):
        members(b'{"a":"' + long + b'","b":' + b"[" * 2000 + b"]" * 2000 + b"}")


@pytest.mark.parametrize(
    ("text", "unique"),
    [
        (b"{}", True),
        (b'{"a":"a"}', True),
        (b'{"a":1,"a":1}', False),
        (b'{"a":1,"\\u0061":1}', False),
        (b'[{"a":1},{"a":1}]', True),
        (b'[{"a":1},{"a":1,"b":[{"c":1,"c":1}]}]', False),
        (b'{"a":"\xff"}', False),
        (b'{"a":"\\ud800"}', False),
        (b'{"a":"\\\\ud800"}', True),
        (b'{"' + b"k" * 2000 + b'":1,"' + b"k" * 2000 + b'":2}', False),
    ],
)
def test_unique_keys(text: bytes, unique: bool) -> None:
    assert has_unique_keys(text) is unique


def test_lines_that_go_out_are_ascii() -> None:
    assert encode_line('"é€😀"'.encode()) == b'"\\u00e9\\u20ac\\ud83d\\ude00"\r\n'
    assert json.loads(encode_line('"é€😀"'.encode())) == "é€😀"
