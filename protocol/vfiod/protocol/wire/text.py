"""JSON as QMP takes and gives it: the careful reader, and what every line that goes out needs.

The fast readers (:mod:`msgspec`) say yes or no. When they say no, or cannot be sure, the careful reader here
takes over: it knows QMP's single quotes, refuses duplicate keys, and says what is wrong in the words of QEMU
10.0 (``qobject/json-parser.c``). It keeps no recursion, so nesting is bounded by the stream's limit alone.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from vfiod.protocol.errors import JsonSyntaxError

__all__ = [
    "EOL",
    "encode_json",
    "encode_line",
    "encode_plain",
    "escaped",
    "one_line",
    "has_unique_keys",
    "is_unambiguous",
    "members",
    "members_of",
]

EOL: Final = b"\r\n"
"""Ends every message that goes out (QMP specification, "General Definitions")."""

CAREFUL_BYTES: Final = 64 * 1024
"""Bytes of a text that is read carefully, at about a microsecond per token. A longer one has to be plain
JSON with unique keys, and is told less exactly what is wrong with it."""

_LONG_STRING: Final = 1024
"""Bytes from which strings are not compared with each other: hashing them would cost more than reading them."""


# --- out --------------------------------------------------------------------------------------------------
encode_plain: Final = msgspec.json.Encoder().encode
"""Any value msgspec encodes, as UTF-8 JSON. Raises UnicodeEncodeError for text that is no Unicode."""
_FIRST_BRACKET: Final = ord("[")  # and "{" is beyond it
_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def encode_json(value: Any) -> bytes:
    """Any value msgspec encodes, as UTF-8 JSON.

    Text that is no Unicode, as a file name may be, is shown with its bytes in hexadecimal.
    """
    try:
        return encode_plain(value)
    except UnicodeEncodeError:
        return encode_plain(_presentable(msgspec.to_builtins(value)))


def _presentable(value: Any) -> Any:
    """The same value, lone surrogates replaced by what a person can read."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_presentable(key): _presentable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_presentable(item) for item in value]
    return value


def one_line(raw: msgspec.Raw) -> bytes:
    """A JSON value that came in, fit to go out again: strings hold no line ends, so all of them are blanks."""
    text = bytes(raw)
    if text[0] < _FIRST_BRACKET:
        return text  # a string or a number, as nearly every id is
    if b"\n" in text or b"\r" in text:
        return text.replace(b"\n", b" ").replace(b"\r", b" ")
    return text


def encode_line(text: bytes) -> bytes:
    """End a message. Only ASCII goes out (QMP specification): other characters, all in strings, are escaped."""
    return (text if text.isascii() else escaped(text)) + EOL


def escaped(text: bytes) -> bytes:
    """JSON in ASCII alone."""
    return _BEYOND_ASCII.sub(_escaped, text.decode()).encode("ascii")


# --- in ---------------------------------------------------------------------------------------------------
class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise _DuplicateKeyError


members_of: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
"""The members of an object, by the fast reader: of two with one name the last."""


def is_unambiguous(text: bytes, members: int, inner: msgspec.Raw | msgspec.UnsetType) -> bool:
    """As :func:`has_unique_keys`, at half the price for the usual request.

    Args:
        text: an object that msgspec has accepted.
        members: how many different members the object has.
        inner: the one among them that is an object.

    """
    if inner is not msgspec.UNSET:
        members += len(members_of(inner))
    # As many colons as names: no name is there twice, and no colon stands in a string or deeper inside.
    return (text.count(b":") == members and b"\\" not in text and text.isascii()) or has_unique_keys(text)


def has_unique_keys(text: bytes) -> bool:
    """Whether a text that msgspec has accepted is Unicode throughout and names no member twice.

    msgspec keeps the last of two members with one name, and does not look into what it skips.
    """
    plain = b"\\" not in text and text.isascii()
    if plain:
        # Without escapes every other piece is a string. No two alike: no two keys alike.
        strings = text.split(b'"')[1::2]
        count = len(strings)
        if len(text) > _LONG_STRING:
            strings = [string for string in strings if len(string) < _LONG_STRING]
        if len(set(strings)) == len(strings) > count - 2:
            return True
    import json  # most sessions never need it

    try:
        unicode = text.decode()
        if not plain and _may_be_no_character().search(unicode):
            for token in _STRING_TOKEN.findall(text):
                _string(token)
        json.loads(unicode, object_pairs_hook=_unique)
    except (_DuplicateKeyError, JsonSyntaxError, RecursionError, ValueError):
        return False
    return True


_TOKEN: Final = re.compile(
    rb"[ \t\r\n]*+(?:"
    rb"""("(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+')"""  # 1: a string
    rb"|([{}\[\],:])"  # 2: structure
    rb"|(-?(?:0(?:\.[0-9]++(?:[eE][+-]?[0-9]++)?)?"  # 3: a number; no exponent right after the zero, as in QEMU
    rb"|[1-9][0-9]*+(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?))"
    rb"|([a-z]++)"  # 4: a keyword
    rb")",
    re.DOTALL,
)
_STRING, _STRUCTURE, _NUMBER, _KEYWORD = range(1, 5)
# Unicode's noncharacters and surrogates, which QEMU refuses (``util/unicode.c``).
_NO_CHARACTERS: Final = (
    "[\\ud800-\\udfff\\ufdd0-\\ufdef" + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(0x11)) + "]"
)


# Compiled when a text first needs them: at start they would cost as much as a package of ours.
@functools.cache
def _no_character() -> re.Pattern[str]:
    return re.compile(_NO_CHARACTERS)


@functools.cache
def _may_be_no_character() -> re.Pattern[str]:
    return re.compile(_NO_CHARACTERS + r"|\\u(?:[fF][dD][dDeE]|[fF]{3}[eEfF]|[dD][89a-fA-F])")


_STRING_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SIMPLE_ESCAPES: Final = {
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
_UNQUOTED: Final = re.compile(rb"\\(.)|\"", re.DOTALL)


def _syntax(what: str) -> JsonSyntaxError:
    return JsonSyntaxError(f"JSON parse error, {what}")


def _string(token: bytes) -> str:
    """The value of a string token (QEMU ``parse_string``)."""
    try:
        body = token[1:-1].decode()
    except UnicodeDecodeError:
        raise _syntax("invalid UTF-8 sequence in string") from None
    if _no_character().search(body):
        raise _syntax("invalid UTF-8 sequence in string")
    if "\\" not in body:
        return body
    pieces, position = [], 0
    while match := _ESCAPE.search(body, position):
        pieces.append(body[position : match.start()])
        position = match.end()
        if match[1] is None:
            if match[2] not in _SIMPLE_ESCAPES:
                if match[2] == "u":
                    six = (body + token[:1].decode())[match.start() : match.start() + 6]
                    raise _syntax(f"{six} is not a valid Unicode character")
                raise _syntax("invalid escape sequence in string")
            pieces.append(_SIMPLE_ESCAPES[match[2]])
            continue
        code = int(match[1], 16)
        if 0xD800 <= code < 0xDC00 and (low := _ESCAPE.match(body, position)) and low[1]:
            trailing = int(low[1], 16)
            if 0xDC00 <= trailing < 0xE000:
                code = 0x10000 + ((code & 0x3FF) << 10) + (trailing & 0x3FF)
                position = low.end()
        if _no_character().match(chr(code)):
            raise _syntax(f"{body[match.start() : position]} is not a valid Unicode character")
        pieces.append(chr(code))
    pieces.append(body[position:])
    return "".join(pieces)


def _double_quoted(token: bytes) -> bytes:
    """The same string in RFC 8259's form."""
    if token[:1] == b"'" or rb"\'" in token:

        def requote(match: re.Match[bytes]) -> bytes:
            if match[1] is None:
                return b'\\"'
            return b"'" if match[1] == b"'" else match[0]

        return b'"' + _UNQUOTED.sub(requote, token[1:-1]) + b'"'
    return token


class _Want(enum.Enum):
    """What may come next in an object or array."""

    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    KEY = enum.auto()
    KEY_OR_END = enum.auto()
    COLON = enum.auto()
    SEPARATOR = enum.auto()


def members(text: bytes) -> dict[str, msgspec.Raw] | None:
    """Read a text that :class:`JsonStream` gave, carefully.

    Returns:
        The members of the object, each in RFC 8259's form without blanks; None when it is JSON, but no object.

    Raises:
        JsonSyntaxError: it is no JSON, in QEMU's words.

    """
    if len(text) > CAREFUL_BYTES:
        return _members_of_long(text)
    found: dict[str, msgspec.Raw] = {}
    stack: list[set[str] | None] = []  # the keys of each open object; None for an open array
    value: list[bytes] = []  # the tokens of the member of the outermost object that is being read
    name = ""
    wrong_key = 0  # depth of an object or array that stands where a key should: QEMU reads it first, then complains
    want = _Want.VALUE
    outermost_is_object = done = False
    for kind, token in _tokens(text):
        if done:
            raise _syntax("expecting value")
        if kind == _STRING:
            _expect_separator(want, stack)
            string = _string(token)
            token = _double_quoted(token)
            if want in (_Want.KEY, _Want.KEY_OR_END):
                keys = stack[-1]
                if keys is None or string in keys:
                    raise _syntax("duplicate key")
                keys.add(string)
                want = _Want.COLON
                if len(stack) == 1:
                    name = string
                    value.clear()
                    continue
            else:
                want = _Want.SEPARATOR
        elif token in (b"{", b"["):
            _expect_separator(want, stack)
            if want in (_Want.KEY, _Want.KEY_OR_END):
                wrong_key = wrong_key or len(stack) + 1
            outermost_is_object = outermost_is_object or (not stack and token == b"{")
            stack.append(set() if token == b"{" else None)
            want = _Want.KEY_OR_END if token == b"{" else _Want.VALUE_OR_END
        elif token in (b"}", b"]"):
            closes = bool(stack) and (stack[-1] is None) == (token == b"]")
            if not closes or want not in (_Want.SEPARATOR, _Want.KEY_OR_END, _Want.VALUE_OR_END):
                _expect_separator(want, stack)
                raise _syntax("expecting value")
            if len(stack) == wrong_key:
                raise _syntax("key is not a string in object")
            stack.pop()
            if not stack:
                if outermost_is_object and want is _Want.SEPARATOR:
                    found[name] = msgspec.Raw(b"".join(value))
                done = True
            want = _Want.SEPARATOR
        elif token == b"," and want is _Want.SEPARATOR and stack:
            want = _Want.VALUE if stack[-1] is None else _Want.KEY
            if len(stack) == 1:
                if outermost_is_object:
                    found[name] = msgspec.Raw(b"".join(value))
                continue
        elif token == b":" and want is _Want.COLON:
            want = _Want.VALUE
            if len(stack) == 1:
                continue
        else:
            if kind == _KEYWORD and token not in (b"true", b"false", b"null"):
                _expect_separator(want, stack)
                raise _syntax(f"invalid keyword '{token.decode()}'")
            if kind == _STRUCTURE:
                _expect_separator(want, stack)
                raise _syntax("expecting value")
            _expect_value(want, stack)
            want = _Want.SEPARATOR
        done = done or not stack
        value.append(token)
    if not done:
        raise _syntax("premature EOI")
    return found if outermost_is_object else None


def _tokens(text: bytes) -> Iterator[tuple[int, bytes]]:
    position, end = 0, len(text.rstrip(b" \t\r\n"))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastindex is None:
            raise _syntax("expecting value")  # the stream lets no such text through
        yield match.lastindex, match[match.lastindex]
        position = match.end()


def _expect_value(want: _Want, stack: list[set[str] | None]) -> None:
    """A value has come: raise, in QEMU's words, when something else had to."""
    _expect_separator(want, stack)
    if want in (_Want.KEY, _Want.KEY_OR_END):
        raise _syntax("key is not a string in object")


def _expect_separator(want: _Want, stack: list[set[str] | None]) -> None:
    """A token has come that is neither comma, colon nor the right end: raise when one of these had to."""
    if want is _Want.COLON:
        raise _syntax("missing : in object pair")
    if want is _Want.SEPARATOR:
        raise _syntax(f"expected separator in {'list' if stack[-1] is None else 'dict'}")


def _members_of_long(text: bytes) -> dict[str, msgspec.Raw] | None:
    """As :func:`members`, by readers written in C, which know neither QEMU's extensions nor its words."""
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return None
    except RecursionError:
        raise _syntax("nested too deeply for a text of this length") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _syntax(str(error).removeprefix("JSON is malformed: ")) from None
    if not has_unique_keys(text):
        raise _syntax("duplicate key, or invalid UTF-8 sequence in string")
    return found
