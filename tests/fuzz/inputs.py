"""Inputs for the fuzz tests: JSON, nearly JSON, and what clients send by mistake."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

PIECES: list[bytes] = [
    *(b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b"\t", b"\r\n"),
    *(b'"a"', b"'b'", b'"execute"', b'"id"', b'"arguments"', b'"query-name"', b'"exec-oob"'),
    *(b"0", b"1", b"-", b"1.5", b".", b"e", b"E", b"+", b"01", b"-0.5e+3", b"123456789012345678901234567890"),
    *(b"true", b"null", b"fo", b"NaN", b"Infinity", b"%s", b"//"),
    *(
        b'"',
        b"'",
        b"\\",
        b'\\"',
        b'"\\u00e9"',
        b'"\\ud800"',
        b'"\\x"',
        b'"\\\\"',
        b"\xc3\xa9",
        b"\xc3",
        b"\xf0\x9f\x98\x80",
    ),
    *(b"\x00", b"\x01", b"\x1f", b"\x7f", b"\xfe", b"\xff", b"\xef\xbb\xbf"),
    *(b'{"execute":"query-name","id":1}', b'{"a":{"b":[1,{"c":2}]}}', b"{'x':'y'}", b'{"a":1}\n{"b":2}\n', b"[[[]]]"),
]


def soup() -> st.SearchStrategy[bytes]:
    """Tokens, halves of tokens and stray bytes in any order; and mutations of requests."""
    return st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join),
        st.binary(max_size=60),
        st.tuples(st.sampled_from(PIECES[-5:]), st.integers(0, 40), st.sampled_from(PIECES)).map(
            lambda mutation: mutation[0][: mutation[1]] + mutation[2] + mutation[0][mutation[1] :]
        ),
    )


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, as Python has it; no NaN, no lone surrogates."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )


def json_texts() -> st.SearchStrategy[bytes]:
    """Any JSON value, as bytes."""
    return json_values().map(lambda value: json.dumps(value).encode())
