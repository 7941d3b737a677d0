"""The stream splitter against QEMU's lexer and against itself, whatever the input and however it is cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.inputs import json_values, soup
from tests.fuzz.qemu_lexer import Oracle

from vfiod.protocol.errors import WireError
from vfiod.protocol.wire.stream import JsonStream

BLANKS = b" \t\r\n"
TOKEN = re.compile(
    rb"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[{}\[\],:]|[a-z]+"
    rb"|-?0(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?|-?[1-9][0-9]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    re.DOTALL,
)


def summary(items: list[bytes | WireError]) -> list[bytes | None]:
    """Texts without the blanks between their tokens; None for errors."""
    return [None if isinstance(item, WireError) else b" ".join(TOKEN.findall(item)) for item in items]


def retokenized(texts: list[bytes | None]) -> list[bytes | None]:
    return [None if text is None else b" ".join(TOKEN.findall(text)) for text in texts]


def in_pieces(data: bytes, cuts: list[int], **limits: int) -> list[bytes | WireError]:
    stream = JsonStream(**limits)
    items: list[bytes | WireError] = []
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for begin, end in pairwise(edges):
        items += stream.receive_data(data[begin:end])
    return items


@given(soup(), st.lists(st.integers(0, 200), max_size=6))
def test_any_input_in_any_pieces_is_split_as_qemu_splits_it(data: bytes, cuts: list[int]) -> None:
    oracle = Oracle()
    oracle.feed(data)
    assert summary(in_pieces(data, cuts)) == retokenized(oracle.texts)


@given(soup(), st.integers(2, 5))
def test_nesting_limits_are_qemus(data: bytes, levels: int) -> None:
    oracle = Oracle(max_nesting=levels)
    oracle.feed(data)
    assert summary(in_pieces(data, [], max_nesting=levels)) == retokenized(oracle.texts)


@given(soup())
def test_byte_by_byte_and_at_once_say_the_same_words(data: bytes) -> None:
    def words(items: list[bytes | WireError]) -> list[bytes | str]:
        return [str(item) if isinstance(item, WireError) else item.strip(BLANKS) for item in items]

    assert words(in_pieces(data, list(range(len(data))))) == words(in_pieces(data, []))


@given(
    st.lists(st.dictionaries(st.text(), json_values(), max_size=4), min_size=1, max_size=6),
    st.sampled_from([b"", b" ", b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_requests_in_any_layout_come_out_one_by_one(
    values: list[dict[str, Any]], between: bytes, ascii_only: bool, indent: int | None
) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode() for value in values]
    for cuts in ([], [7], list(range(len(between.join(texts))))):
        items = in_pieces(between.join(texts), cuts)
        assert [json.loads(item) for item in items if isinstance(item, bytes)] == values
        assert len(items) == len(values)


@given(soup(), st.lists(st.integers(0, 200), max_size=4), st.integers(1, 40))
def test_nothing_longer_than_the_limit_is_kept_or_given_out(data: bytes, cuts: list[int], most: int) -> None:
    stream = JsonStream(max_message_bytes=most)
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for begin, end in pairwise(edges):
        items = stream.receive_data(data[begin:end])
        assert all(len(item.strip(BLANKS)) <= most for item in items if isinstance(item, bytes))
        assert stream.buffered <= most


@given(soup())
def test_a_client_that_lost_its_place_gets_it_back(data: bytes) -> None:
    request = b'{"execute":"query-version"}'
    for resynchronise in (b"\xff", b"\x01", b"\xff\n"):
        items = in_pieces(data + resynchronise + request, [])
        assert items[-1] == request


@pytest.mark.parametrize(
    "unit", [b"[", b'{"a":', b"[1,", b'"', b"1", b"a", b"-", b"\\", b"'", b"}", b"\xff", b"[]", b"{}"]
)
def test_a_long_run_of_one_thing_ends(unit: bytes) -> None:
    # Possessive patterns must not blow up, in memory or time, whatever is repeated.
    data = unit * (100_000 // len(unit))
    oracle = Oracle()
    oracle.feed(data)
    assert len(in_pieces(data, [])) == len(oracle.texts)
