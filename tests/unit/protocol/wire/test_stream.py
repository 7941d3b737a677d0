"""The stream splitter: limits, resynchronisation, and that its shortcuts change nothing.

QEMU's own answers are in test_golden.
"""

from __future__ import annotations

import pytest

from vfiod.protocol.errors import JsonSyntaxError, LimitExceeded
from vfiod.protocol.limits import MAX_MESSAGE_BYTES, MAX_NESTING
from vfiod.protocol.wire.stream import JsonStream

REQUEST = b'{"execute":"query-version"}'


def test_a_request_without_line_end_is_complete_at_its_last_brace() -> None:
    # qemu.qmp sends no line end at all.
    stream = JsonStream()
    assert stream.receive_data(REQUEST) == [REQUEST]
    assert stream.buffered == 0


def test_blanks_alone_give_nothing() -> None:
    # qemu.qmp sends one blank to carry an fd.
    stream = JsonStream()
    assert stream.receive_data(b" ") == []
    assert stream.receive_data(b" \t\r\n") == []
    assert stream.buffered == 0
    assert stream.receive_data(b" " + REQUEST) == [REQUEST]


@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n", b"  \n\t"])
def test_pipelined_requests_come_out_in_order(between: bytes) -> None:
    requests = [b'{"execute":"a","arguments":{"b":[{"c":"}]"}]},"id":%d}' % number for number in range(200)]
    items = JsonStream().receive_data(between.join(requests))
    assert [item.strip() for item in items if isinstance(item, bytes)] == requests


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":"\\"}"}',
        b"{'a':'\\'}'}",
        b'{"a":"\\\\"}',
        b'{"a":"]","b":[[{}]]}',
        '{"é😀":"ß"}'.encode(),
        b'{"a":-0.5e+10,"b":[true,false,null]}',
        b'"}"',
        b"[[],{}]",
    ],
)
def test_every_split_position_gives_the_same(text: bytes) -> None:
    for position in range(len(text) + 1):
        stream = JsonStream()
        items = (
            stream.receive_data(text[:position]) + stream.receive_data(text[position:]) + stream.receive_data(REQUEST)
        )
        assert items == [text, REQUEST], position


def test_a_scalar_is_complete_with_the_byte_after_it() -> None:
    stream = JsonStream()
    assert stream.receive_data(b"12") == []
    assert stream.buffered == 2
    assert stream.receive_data(b"3 ") == [b"123"]


def test_a_half_text_waits_and_is_counted() -> None:
    stream = JsonStream()
    assert stream.receive_data(REQUEST[:10]) == []
    assert stream.buffered == 10
    assert stream.receive_data(REQUEST[10:]) == [REQUEST]
    assert stream.buffered == 0


@pytest.mark.parametrize("byte", [b"\xff", b"\xfe", b"\x00", b"\x01", b"\x1f"])
def test_resynchronisation_gives_one_error_for_what_was_cut_off(byte: bytes) -> None:
    for half in (b'{"execute":"qu', b'{"execute"', b"[1, 2", b'"\\', b"[tru"):
        first, *rest = JsonStream().receive_data(half + byte + REQUEST)
        assert isinstance(first, JsonSyntaxError), half
        assert rest == [REQUEST], half


def test_a_stray_token_is_shown_in_part() -> None:
    stream = JsonStream()
    for _ in range(10):
        assert stream.receive_data(b'"' + b"x" * 1000 if not stream.buffered else b"x" * 1000) == []
    (error,) = stream.receive_data(b"\xff")
    assert str(error) == "JSON parse error, stray '\"" + "x" * 63 + "...'"


# --- limits ---------------------------------------------------------------------------------------------------
def long_request(length: int) -> bytes:
    frame = b'{"execute":"x","arguments":{"data":""}}'
    return frame[:-3] + b"A" * (length - len(frame)) + frame[-3:]


@pytest.mark.parametrize("chunk", [MAX_MESSAGE_BYTES * 2, 65536, 4093])
def test_a_text_of_the_largest_size_is_taken(chunk: int) -> None:
    text, stream = long_request(MAX_MESSAGE_BYTES), JsonStream()
    items = [item for at in range(0, len(text), chunk) for item in stream.receive_data(text[at : at + chunk])]
    assert items == [text]


@pytest.mark.parametrize("chunk", [MAX_MESSAGE_BYTES * 2, 65536, 4093])
def test_a_longer_one_gives_one_error_and_the_next_is_understood(chunk: int) -> None:
    data, stream = long_request(MAX_MESSAGE_BYTES + 1) + REQUEST, JsonStream()
    items = []
    for at in range(0, len(data), chunk):
        items += stream.receive_data(data[at : at + chunk])
        assert stream.buffered <= MAX_MESSAGE_BYTES
    assert isinstance(items[0], LimitExceeded)
    assert str(MAX_MESSAGE_BYTES) in str(items[0])
    assert items[1:] == [REQUEST]


@pytest.mark.parametrize("end", [b"}}", b"]", b"\xff", b"\x01"])
def test_what_ends_a_refused_text(end: bytes) -> None:
    stream = JsonStream(max_message_bytes=20)
    refused = b'{"a":{"b":"' + b"x" * 40 + b'"'
    first, *rest = stream.receive_data(refused)
    assert isinstance(first, LimitExceeded) and not rest
    assert stream.buffered == 0
    assert stream.receive_data(b',"c":"y' + b"z" * 100 + b'"') == []
    assert stream.receive_data(end) == []  # no second error for the same text
    assert stream.receive_data(b'{"a":1}') == [b'{"a":1}']


def test_a_short_text_after_a_refused_one_in_the_same_read() -> None:
    items = JsonStream(max_message_bytes=10).receive_data(b'{"a":"0123456789"}{"b":1}\n{"c":"0123456789"}\n{"d":1}')
    assert [item if isinstance(item, bytes) else type(item) for item in items] == [
        LimitExceeded,
        b'{"b":1}',
        LimitExceeded,
        b'{"d":1}',
    ]


def test_nesting_up_to_the_limit() -> None:
    deepest = b"[" * MAX_NESTING + b"]" * MAX_NESTING
    assert JsonStream().receive_data(deepest) == [deepest]
    first, *_ = JsonStream().receive_data(b"[" + deepest + b"]")
    assert isinstance(first, LimitExceeded)
    assert str(first) == "JSON nesting depth limit exceeded"


def test_nesting_counts_both_kinds_together() -> None:
    text = b'[{"a":[{"a":[{'
    assert JsonStream(max_nesting=6).receive_data(text) == []
    (error,) = JsonStream(max_nesting=5).receive_data(text)
    assert isinstance(error, LimitExceeded)


def test_a_flat_text_with_many_brackets_is_not_nested() -> None:
    text = b"[" + b",".join([b"{}"] * (MAX_NESTING * 2)) + b"]"
    assert JsonStream().receive_data(text) == [text]


def test_max_nesting_has_a_floor() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        JsonStream(max_nesting=1)
