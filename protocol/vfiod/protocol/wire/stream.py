"""Splits a byte stream into JSON texts, exactly where QEMU's monitor does.

QMP input is a stream, not lines: ``qemu.qmp`` ends its requests with nothing at all. QEMU 10.0.2 reads
it with a table-driven lexer (``qobject/json-lexer.c``) and counts brackets
(``qobject/json-streamer.c``); both are followed here to the letter, because what happens *after* bad input is
part of the protocol: a client that lost its place sends 0xFF or a control character, and goes on.

Three speeds, the same result:

1. a read that is one whole text, or whole lines: taken by the caller's own decoder, so that nothing is read twice,
   or else checked by msgspec's skipper, about 0.2 us each;
2. texts one after the other without line ends: one regular expression per text;
3. anything else, and everything that is split over reads: the lexer's table, with long runs (string
   bodies, digits, blanks) skipped by regular expressions. No byte is ever looked at twice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from vfiod.protocol.errors import JsonSyntaxError, LimitExceeded, WireError
from vfiod.protocol.limits import MAX_MESSAGE_BYTES, MAX_NESTING

__all__ = ["JsonStream"]

# --- the lexer's states and outcomes (enum json_lexer_state; the names are QEMU's without "IN_") ----------
(
    START,
    RECOVERY,
    DQ_STRING_ESCAPE,
    DQ_STRING,
    SQ_STRING_ESCAPE,
    SQ_STRING,
    ZERO,
    EXP_DIGITS,
    EXP_SIGN,
    EXP_E,
    MANTISSA,
    MANTISSA_DIGITS,
    DIGITS,
    SIGN,
    KEYWORD,
) = range(15)
(
    ERROR,  # this byte cannot stand here; it is consumed
    TOKEN,  # this byte ends a token and belongs to it
    TOKEN_BEFORE,  # the token ended before this byte, which is looked at again
    START_BEFORE,  # recovery ends before this byte, which is looked at again
    LEFT_BRACE,
    RIGHT_BRACE,
    LEFT_BRACKET,
    RIGHT_BRACKET,
) = range(15, 23)
_FIRST_OUTCOME: Final = ERROR


def _row(otherwise: int, *rules: tuple[bytes, int]) -> bytes:
    """One state's row of the table: what each byte leads to."""
    row = bytearray([otherwise]) * 256
    for characters, outcome in rules:
        for character in characters:
            row[character] = outcome
    return bytes(row)


_DIGIT: Final = b"0123456789"
_LOWER: Final = b"abcdefghijklmnopqrstuvwxyz"
_TEXT: Final = bytes(range(0x20, 0xFE))
"""What a string may hold. 0xFE and 0xFF never occur in UTF-8: clients send them to be sure of their place."""

_TABLE: Final[tuple[bytes, ...]] = (
    _row(
        ERROR,
        (b'"', DQ_STRING),
        (b"'", SQ_STRING),
        (b"0", ZERO),
        (b"123456789", DIGITS),
        (b"-", SIGN),
        (b"{", LEFT_BRACE),
        (b"}", RIGHT_BRACE),
        (b"[", LEFT_BRACKET),
        (b"]", RIGHT_BRACKET),
        (b",:", TOKEN),
        (_LOWER, KEYWORD),
        (b" \t\r\n", START),
    ),
    # Structural characters and line ends are promising places to go on; so is what clients send on purpose.
    _row(RECOVERY, (bytes(set(range(0x20)) - {0x09}) + b"\xfe\xff[]{}:,", START_BEFORE)),
    _row(ERROR, (_TEXT, DQ_STRING)),
    _row(ERROR, (_TEXT, DQ_STRING), (b"\\", DQ_STRING_ESCAPE), (b'"', TOKEN)),
    _row(ERROR, (_TEXT, SQ_STRING)),
    _row(ERROR, (_TEXT, SQ_STRING), (b"\\", SQ_STRING_ESCAPE), (b"'", TOKEN)),
    _row(TOKEN_BEFORE, (_DIGIT, ERROR), (b".", MANTISSA)),
    _row(TOKEN_BEFORE, (_DIGIT, EXP_DIGITS)),
    _row(ERROR, (_DIGIT, EXP_DIGITS)),
    _row(ERROR, (b"+-", EXP_SIGN), (_DIGIT, EXP_DIGITS)),
    _row(ERROR, (_DIGIT, MANTISSA_DIGITS)),
    _row(TOKEN_BEFORE, (_DIGIT, MANTISSA_DIGITS), (b"eE", EXP_E)),
    _row(TOKEN_BEFORE, (_DIGIT, DIGITS), (b"eE", EXP_E), (b".", MANTISSA)),
    _row(ERROR, (b"0", ZERO), (b"123456789", DIGITS)),
    _row(TOKEN_BEFORE, (_LOWER, KEYWORD)),
)

# --- runs: what can be skipped at once without leaving the state ------------------------------------------
_DIGITS_RUN: Final = re.compile(rb"[0-9]*+")
_RUNS: Final[dict[int, re.Pattern[bytes]]] = {
    RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*+"),
    DQ_STRING: re.compile(rb"[ !#-\[\]-\xfd]*+"),
    SQ_STRING: re.compile(rb"[ -&(-\[\]-\xfd]*+"),
    EXP_DIGITS: _DIGITS_RUN,
    MANTISSA_DIGITS: _DIGITS_RUN,
    DIGITS: _DIGITS_RUN,
    KEYWORD: re.compile(rb"[a-z]*+"),
}
_PLAIN: Final = bytes(set(_TEXT) - set(b'"\\'))
"""What may stand in a double-quoted string and ends nothing."""
_BLANKS: Final = re.compile(rb"[ \t\r\n]*+")

# Complete tokens that change no bracket. Only numbers and words whose end is certain; the rest is the table's.
_FLAT: Final = (
    rb"(?:"
    rb'"[ !#-\[\]-\xfd]*+(?:\\[ -\xfd][ !#-\[\]-\xfd]*+)*+"[ \t\r\n,:]*+'
    rb"|(?:-?(?:0|[1-9][0-9]*+)|[a-z]++)(?=[ \t\r\n,\]}])[ \t\r\n,]*+"
    rb"|[ \t\r\n,:]++"
    rb")*+"
)
_PAIR: Final = rb"(?:\{" + _FLAT + rb"\}|\[" + _FLAT + rb"\])"
_PAIRS: Final = _FLAT + rb"(?:" + _PAIR + _FLAT + rb")*+"


@functools.cache
def _patterns() -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """What runs on between brackets, and a whole object with one level in it, as nearly every request is.

    Quantifiers are possessive, so that a text that is cut off costs one pass and no backtracking. Compiled when a
    stream first needs the lexer: many never do, and at start it would cost as much as a package of ours.
    """
    return re.compile(_PAIRS), re.compile(rb"\{" + _PAIRS + rb"\}")


_skip = msgspec.json.Decoder(msgspec.Raw).decode

T = TypeVar("T")

_OPENING: Final = frozenset((b"{", b"["))
_SHOWN: Final = 64
"""Bytes of a stray token that an error shows. QEMU shows all of it, which may be 64 MiB."""


class JsonStream:
    """The splitter of one session's input.

    Args:
        max_message_bytes: of one text, from its first byte to its last.
        max_nesting: levels of ``[`` and ``{`` together; at least 2.

    Attributes:
        between: nothing of a text, or of bad input, is half read.
        sure_bytes: a text that is no longer keeps both limits, whatever is in it.

    """

    __slots__ = (
        "_braces",
        "_brackets",
        "_discarding",
        "_kept",
        "_max_bytes",
        "_max_nesting",
        "_size",
        "_state",
        "_token",
        "between",
        "sure_bytes",
    )

    def __init__(self, *, max_message_bytes: int = MAX_MESSAGE_BYTES, max_nesting: int = MAX_NESTING) -> None:
        if max_nesting < 2:
            raise ValueError(f"A request nests two levels, so max_nesting is at least 2, not {max_nesting}")
        self._max_bytes = max_message_bytes
        self._max_nesting = max_nesting
        self.sure_bytes = min(max_message_bytes, max_nesting)
        self.between = True
        self._state = START
        self._braces = 0
        self._brackets = 0
        self._kept = bytearray()  # what earlier reads gave of the text that is not complete
        self._size = 0  # bytes of it, counted even when they are discarded
        self._token = b""  # the beginning of the token that earlier reads left unfinished
        self._discarding = False  # the text is too long and was refused; its end is still being looked for

    @property
    def buffered(self) -> int:
        """Bytes kept of a text that is not complete; at most ``max_message_bytes``."""
        return 0 if self._discarding else self._size

    @property
    def unread(self) -> bytes | None:
        """What was received of a text that is not complete: another stream that receives it stands where this one does.

        None: there is no such thing, in the middle of what was refused.
        """
        if self._discarding or self._state == RECOVERY:
            return None
        return bytes(self._kept)

    def receive_data(self, data: bytes) -> list[bytes | WireError]:
        """Take what one read gave.

        Returns:
            The texts that are complete now, in order, with errors in their place. A text is lexically sound
            and its brackets are closed; whether it is a request, the dialect's decoder says. A scalar
            outside brackets is a text of its own, as in QEMU. Blanks between texts give nothing.

        A text longer than ``max_message_bytes`` gives one :class:`LimitExceeded` when it becomes too long.
        Its rest is read and dropped until its brackets close, or a byte ends it that can stand in no text
        (0xFF, a control character), so that what follows it is understood.

        """
        return self.receive(data, _undecided)

    def receive(self, data: bytes, decode: Callable[[bytes], T | None]) -> list[bytes | WireError | T]:
        """As :meth:`receive_data`, for a caller that decodes plain texts anyway.

        Args:
            data: what one read gave.
            decode: tried on what may be one whole text: what it gives takes the text's place, None leaves it to the
                stream. It must take nothing but one JSON object, in ASCII.

        """
        items: list[bytes | WireError | T] = []
        position = 0
        if self.between:
            if (len(data) <= self.sure_bytes or self._is_within(data)) and (item := decode(data)) is not None:
                return [item]
            if data[:1] in _OPENING and data.isascii():
                if self._is_whole(data):
                    return [data]
                position = self._take_lines(data, items, decode)
        if position < len(data):
            self._lex(data, position, items)
        return items

    def _take_lines(self, data: bytes, items: list[bytes | WireError | T], decode: Callable[[bytes], T | None]) -> int:
        """Pipelined texts, one per line. Returns how far it came."""
        position = 0
        sure_bytes = self.sure_bytes
        while end := data.find(b"\n", position) + 1:
            line = data[position:end]
            if (len(line) <= sure_bytes or self._is_within(line)) and (item := decode(line)) is not None:
                items.append(item)
            # Scalars go the long way: "5" is not complete before the byte that follows it.
            elif line[:1] in _OPENING and self._is_whole(line):
                items.append(line)
            else:
                break
            position = end
        return position

    def _is_whole(self, text: bytes) -> bool:
        """Whether this is exactly one text, by the fast reader."""
        if not self._is_within(text):
            return False
        try:
            _skip(text)
        except (msgspec.DecodeError, RecursionError):
            return False  # several texts, a part of one, lenient JSON, or no JSON at all
        return True

    def _is_within(self, text: bytes) -> bool:
        """Whether a text surely keeps the limits. With many brackets the lexer counts how deep they are."""
        return len(text) <= self._max_bytes and (
            len(text) <= self._max_nesting or text.count(b"[") + text.count(b"{") <= self._max_nesting
        )

    def _lex(self, data: bytes, position: int, items: list[bytes | WireError | T]) -> None:
        """The other two speeds: run the lexer over ``data`` from ``position``."""
        state, braces, brackets, length = self._state, self._braces, self._brackets, len(data)
        pairs_run, whole_object = _patterns()
        begin = token = position  # where the text that is being read, and its newest token, begin in `data`
        if state == DQ_STRING:
            # A long string goes on: one look at the whole read, several times faster than the pattern.
            end = data.find(b'"')
            body = data if end < 0 else data[:end]
            if not body.translate(None, _PLAIN):
                position = len(body)
        while position < length:
            if state == START:
                if 0 < braces + brackets < self._max_nesting:
                    position = pairs_run.match(data, position).end()  # type: ignore[union-attr]  # matches nothing, too
                elif not braces and not brackets:
                    begin = position = _BLANKS.match(data, position).end()  # type: ignore[union-attr]
                    if (whole := whole_object.match(data, position)) and whole.end() - position <= self._max_bytes:
                        items.append(whole.group())
                        begin = position = whole.end()
                        continue
                token, self._token = position, b""
            elif state in _RUNS:
                position = _RUNS[state].match(data, position).end()  # type: ignore[union-attr]
            if position == length:
                break
            outcome = _TABLE[state][data[position]]
            if outcome < _FIRST_OUTCOME:
                state = outcome
                position += 1
                continue
            if outcome != TOKEN_BEFORE and outcome != START_BEFORE:
                position += 1
            state = START
            if outcome == START_BEFORE:
                continue
            if outcome == ERROR:
                state = RECOVERY
                ended: bytes | WireError = self._stray(data[token:position])
            else:
                if outcome == LEFT_BRACE:
                    braces += 1
                elif outcome == RIGHT_BRACE:
                    braces -= 1
                elif outcome == LEFT_BRACKET:
                    brackets += 1
                elif outcome == RIGHT_BRACKET:
                    brackets -= 1
                if braces + brackets > self._max_nesting:
                    # The rest of the text is read as if a new one began: QEMU 10.0 does so.
                    ended = LimitExceeded("JSON nesting depth limit exceeded")
                # Braces and brackets are counted apart: "{[}" goes on until a "]", and is no JSON then.
                elif (braces > 0 or brackets > 0) and braces >= 0 and brackets >= 0:
                    continue
                else:
                    ended = self._complete(data[begin:position])
            if not self._discarding:
                items.append(ended)
            braces = brackets = self._size = 0
            self._kept.clear()
            self._discarding = False
            begin = position
        self._state, self._braces, self._brackets = state, braces, brackets
        if braces or brackets or state not in (START, RECOVERY):
            self._keep(data, begin, token, items)
        self.between = state == START and not self._size

    def _complete(self, last: bytes) -> bytes | WireError:
        """The text that ends with ``last``."""
        if self._size + len(last) > self._max_bytes:
            return self._too_long()
        return bytes(self._kept + last) if self._kept else last

    def _keep(self, data: bytes, begin: int, token: int, items: list[bytes | WireError | T]) -> None:
        """Put aside what this read gave of a text that is not complete."""
        if self._state != START and len(self._token) < _SHOWN:
            self._token += data[token : token + _SHOWN]
        self._size += len(data) - begin
        if self._discarding:
            return
        if self._size > self._max_bytes:
            items.append(self._too_long())
            self._discarding = True
            self._kept.clear()
        else:
            self._kept += data[begin:]

    def _too_long(self) -> LimitExceeded:
        return LimitExceeded(f"JSON token size limit exceeded: a request has at most {self._max_bytes} bytes")

    def _stray(self, last: bytes) -> JsonSyntaxError:
        """QEMU's words for a token that went wrong with its last byte."""
        token = self._token + last
        text = token[:_SHOWN].decode(errors="replace") + ("..." if len(token) > _SHOWN else "")
        return JsonSyntaxError(f"JSON parse error, stray '{text}'")


def _undecided(_text: bytes) -> None:
    """The decoder of a caller who wants texts."""
