"""What a real QEMU 10.0.2 answered (``-machine none``, after negotiation without ``oob``), recorded case by case.

Each case: the bytes sent, followed by one 0xFF; then the answers, as ``(desc, or None for a return, id as JSON, or
None)``. ``tests/interop`` asks a real QEMU again where one is installed.

Where vfiod is different on purpose: it echoes integers beyond 64 bits exactly (QEMU gives a float), refuses the
overlong NUL ``C0 80`` as invalid UTF-8, and names the first unexpected member, not the first in hash order.
"""

from __future__ import annotations

from typing import Final

Answer = tuple[str | None, str | None]
ANSWERS: Final[list[tuple[bytes, list[Answer]]]] = [
    (b'{"execute":"query-name"}', [(None, None), ("JSON parse error, stray '�'", None)]),
    (b'{"execute":"query-name","id":null}', [(None, "null"), ("JSON parse error, stray '�'", None)]),
    (b'{"execute":"query-name","id":{"a":[1]}}', [(None, '{"a": [1]}'), ("JSON parse error, stray '�'", None)]),
    (b'{"execute":"nope"}', [("The command nope has not been found", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"execute":"query-name","bogus":1}',
        [("QMP input member 'bogus' is unexpected", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"execute":"query-name","arguments":[]}',
        [("QMP input member 'arguments' must be an object", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"execute":"query-name","arguments":5}',
        [("QMP input member 'arguments' must be an object", None), ("JSON parse error, stray '�'", None)],
    ),
    (b"{}", [("QMP input lacks member 'execute'", None), ("JSON parse error, stray '�'", None)]),
    (b'{"id":1}', [("QMP input lacks member 'execute'", "1"), ("JSON parse error, stray '�'", None)]),
    (
        b'{"exec-oob":"query-name"}',
        [("QMP input member 'exec-oob' is unexpected", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"exec-oob":"x","execute":"query-name"}',
        [("QMP input member 'exec-oob' is unexpected", None), ("JSON parse error, stray '�'", None)],
    ),
    (b"[1,2]", [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b"5 ", [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b"5", [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b'"x"', [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b"{'execute':'query-name','id':'a\\'b\"c'}", [(None, '"a\'b\\"c"'), ("JSON parse error, stray '�'", None)]),
    (b'{"execute":"que', [("JSON parse error, stray '\"que�'", None)]),
    (
        b'{"execute":"que\x01{"execute":"query-name"}',
        [("JSON parse error, stray '\"que\x01'", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
    (b"\x01", [("JSON parse error, stray '\x01'", None), ("JSON parse error, stray '�'", None)]),
    (
        b"\x01\x01",
        [
            ("JSON parse error, stray '\x01'", None),
            ("JSON parse error, stray '\x01'", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (
        b"\xff\xfe",
        [
            ("JSON parse error, stray '�'", None),
            ("JSON parse error, stray '�'", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b" \t\r\n", [("JSON parse error, stray '�'", None)]),
    (b"\x00", [("JSON parse error, stray ''", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"a":01}',
        [
            ("JSON parse error, stray '01'", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b"[-]", [("JSON parse error, stray '-]'", None), ("JSON parse error, stray '�'", None)]),
    (b"[1.]", [("JSON parse error, stray '1.]'", None), ("JSON parse error, stray '�'", None)]),
    (b"[1.5e]", [("JSON parse error, stray '1.5e]'", None), ("JSON parse error, stray '�'", None)]),
    (b"[1e5,1E+5,0.5e-3,-0,-1.0]", [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b"[0e1]", [("JSON parse error, expected separator in list", None), ("JSON parse error, stray '�'", None)]),
    (
        b"[NaN]",
        [
            ("JSON parse error, stray 'N'", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (
        b"[Infinity]",
        [
            ("JSON parse error, stray 'I'", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (
        b"[-Infinity]",
        [
            ("JSON parse error, stray '-I'", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b"nan ", [("JSON parse error, invalid keyword 'nan'", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a":tru}', [("JSON parse error, invalid keyword 'tru'", None), ("JSON parse error, stray '�'", None)]),
    (b"[}", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (
        b"[}]",
        [
            ("JSON parse error, expecting value", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b"{[}]", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"{]", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"}", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"]", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b",", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b":", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a"]', [("JSON parse error, missing : in object pair", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a":1]', [("JSON parse error, expected separator in dict", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a":1,}', [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"[1,]", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"[,]", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"{,}", [("JSON parse error, expecting value", None), ("JSON parse error, stray '�'", None)]),
    (b"{1:2}", [("JSON parse error, key is not a string in object", None), ("JSON parse error, stray '�'", None)]),
    (b"{null:2}", [("JSON parse error, key is not a string in object", None), ("JSON parse error, stray '�'", None)]),
    (b"{[1]:2}", [("JSON parse error, key is not a string in object", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a" 1}', [("JSON parse error, missing : in object pair", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a":1 "b":2}', [("JSON parse error, expected separator in dict", None), ("JSON parse error, stray '�'", None)]),
    (b"[1 2]", [("JSON parse error, expected separator in list", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"execute":"a","execute":"b"}',
        [("JSON parse error, duplicate key", None), ("JSON parse error, stray '�'", None)],
    ),
    (b'{"id":{"a":1,"a":2}}', [("JSON parse error, duplicate key", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"a":"\\ud800"}',
        [("JSON parse error, \\ud800 is not a valid Unicode character", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\\ud800\\u0041"}',
        [("JSON parse error, \\ud800 is not a valid Unicode character", None), ("JSON parse error, stray '�'", None)],
    ),
    (b'{"a":"\\ud83d\\ude00"}', [("QMP input member 'a' is unexpected", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"a":"\\udc00"}',
        [("JSON parse error, \\udc00 is not a valid Unicode character", None), ("JSON parse error, stray '�'", None)],
    ),
    (b'{"a":"\\u0000"}', [("QMP input member 'a' is unexpected", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"a":"\\x41"}',
        [("JSON parse error, invalid escape sequence in string", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\\u12"}',
        [('JSON parse error, \\u12" is not a valid Unicode character', None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\\u12G4"}',
        [("JSON parse error, \\u12G4 is not a valid Unicode character", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\xc3("}',
        [("JSON parse error, invalid UTF-8 sequence in string", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\xed\xa0\x80"}',
        [("JSON parse error, invalid UTF-8 sequence in string", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\xf4\x90\x80\x80"}',
        [("JSON parse error, invalid UTF-8 sequence in string", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\xef\xbf\xbf"}',
        [("JSON parse error, invalid UTF-8 sequence in string", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"a":"\\uffff"}',
        [("JSON parse error, \\uffff is not a valid Unicode character", None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'\xef\xbb\xbf{"execute":"query-name"}',
        [("JSON parse error, stray '�'", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"execute":"query-name","id":"\xc3\xa9\xf0\x9f\x98\x80"}',
        [(None, '"\\u00e9\\ud83d\\ude00"'), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"execute":"query-name","id":18446744073709551615}',
        [(None, "18446744073709551615"), ("JSON parse error, stray '�'", None)],
    ),
    (b'{"execute":"query-name","id":1.5}', [(None, "1.5"), ("JSON parse error, stray '�'", None)]),
    (
        b'{"execute":5,"id":1}',
        [("QMP input member 'execute' must be a string", "1"), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'{"execute":"query-name","arguments":null,"id":2}',
        [("QMP input member 'arguments' must be an object", "2"), ("JSON parse error, stray '�'", None)],
    ),
    (b"%s", [("JSON parse error, stray '%'", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"a":%d}',
        [
            ("JSON parse error, stray '%'", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b'"\x7f"', [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b'"a\nb"', [("JSON parse error, stray '\"a\n'", None), ("JSON parse error, stray '�'", None)]),
    (b'"a\tb"', [("JSON parse error, stray '\"a\t'", None), ("JSON parse error, stray '�'", None)]),
    (
        b"// c\n{}",
        [
            ("JSON parse error, stray '/'", None),
            ("QMP input lacks member 'execute'", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (
        b'{"a":@,"b":1}\n',
        [
            ("JSON parse error, stray '@'", None),
            ("JSON parse error, expecting value", None),
            ("QMP input must be a JSON object", None),
            ("JSON parse error, expecting value", None),
            ("QMP input must be a JSON object", None),
            ("JSON parse error, expecting value", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (
        b'abc{"execute":"query-name"}',
        [("JSON parse error, invalid keyword 'abc'", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'ABC{"execute":"query-name"}',
        [("JSON parse error, stray 'A'", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b'ABC"{"execute":"query-name"}',
        [("JSON parse error, stray 'A'", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
    (
        b"tRue ",
        [
            ("JSON parse error, invalid keyword 't'", None),
            ("JSON parse error, stray 'R'", None),
            ("JSON parse error, stray '�'", None),
        ],
    ),
    (b'"\\', [("JSON parse error, stray '\"\\�'", None)]),
    (b"'a\"b'", [("QMP input must be a JSON object", None), ("JSON parse error, stray '�'", None)]),
    (b'{"a":\'b"c\'}', [("QMP input member 'a' is unexpected", None), ("JSON parse error, stray '�'", None)]),
    (
        b'{"execute":"query-name"}\x00{"execute":"query-name"}',
        [(None, None), ("JSON parse error, stray ''", None), (None, None), ("JSON parse error, stray '�'", None)],
    ),
]
