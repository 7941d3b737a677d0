"""QEMU 10.0's JSON lexer and streamer, one byte at a time, as plainly as can be: the oracle of the stream's fuzz tests.

Written from ``qobject/json-lexer.c`` and ``qobject/json-streamer.c``, apart from ``stream.py`` and without its
tables and shortcuts. What it says agrees with a real QEMU 10.0.2 (tests/interop).
"""

from __future__ import annotations

STRUCTURE = b"{}[],:"
BLANKS = b" \t\r\n"
DIGITS = b"0123456789"
LOWER = bytes(range(ord("a"), ord("z") + 1))


class Oracle:
    """Feed it bytes; ``texts`` fills with what QEMU would parse, and None where it would report an error."""

    def __init__(self, max_nesting: int = 1024) -> None:
        self.max_nesting = max_nesting
        self.texts: list[bytes | None] = []
        self.token = b""  # the unfinished token
        self.tokens: list[bytes] = []
        self.braces = 0
        self.brackets = 0
        self.recovering = False

    def feed(self, data: bytes) -> None:
        for value in data:
            self.byte(bytes([value]))

    def byte(self, byte: bytes) -> None:
        if self.recovering:
            if byte in STRUCTURE_OR_CONTROL:
                self.recovering = False
            else:
                return
        if self.token:
            verdict = continues(self.token, byte)
            if verdict == "token before":
                self.emit(self.token)
                self.byte(byte)
            elif verdict == "error":
                self.fail()
            elif verdict == "end":
                self.emit(self.token + byte)
            else:
                self.token += byte
        elif byte in BLANKS_SET:
            return
        elif byte in STRUCTURE_SET:
            self.emit(byte)
        elif byte in STARTS_SET:
            self.token = byte
        else:
            self.fail()

    def fail(self) -> None:
        self.recovering = True
        self.finish(None)

    def emit(self, token: bytes) -> None:
        self.token = b""
        self.braces += (token == b"{") - (token == b"}")
        self.brackets += (token == b"[") - (token == b"]")
        if self.braces + self.brackets > self.max_nesting:
            self.finish(None)
            return
        self.tokens.append(token)
        if (self.braces > 0 or self.brackets > 0) and self.braces >= 0 and self.brackets >= 0:
            return
        self.finish(b" ".join(self.tokens))

    def finish(self, text: bytes | None) -> None:
        self.texts.append(text)
        self.token, self.tokens, self.braces, self.brackets = b"", [], 0, 0


STRUCTURE_OR_CONTROL = {bytes([c]) for c in STRUCTURE} | {bytes([c]) for c in range(32) if c != 9} | {b"\xfe", b"\xff"}
BLANKS_SET = {bytes([c]) for c in BLANKS}
STRUCTURE_SET = {bytes([c]) for c in STRUCTURE}
STARTS_SET = {bytes([c]) for c in b"\"'-" + DIGITS + LOWER}


def continues(token: bytes, byte: bytes) -> str:
    """What a byte is to an unfinished token: "more" of it, its "end", beyond it ("token before"), or an "error"."""
    quote = token[:1]
    if quote in (b'"', b"'"):
        if byte[0] < 0x20 or byte[0] > 0xFD:
            return "error"
        return "end" if byte == quote and not ends_escaped(token) else "more"
    if token[0] in LOWER:
        return "more" if byte[0] in LOWER else "token before"
    return continues_number(token, byte)


def ends_escaped(string: bytes) -> bool:
    """Whether the string ends in the first half of an escape sequence."""
    body = string[1:]
    return (len(body) - len(body.rstrip(b"\\"))) % 2 == 1


def continues_number(token: bytes, byte: bytes) -> str:
    digit = byte[0] in DIGITS
    body = token.removeprefix(b"-")
    mantissa, _, exponent = body.replace(b"E", b"e").partition(b"e")
    if b"e" in body.replace(b"E", b"e"):
        if exponent == b"":
            return "more" if digit or byte in (b"+", b"-") else "error"
        if exponent in (b"+", b"-"):
            return "more" if digit else "error"
        return "more" if digit else "token before"
    if b"." in mantissa:
        if mantissa.endswith(b"."):
            return "more" if digit else "error"
        return "more" if digit or byte in (b"e", b"E") else "token before"
    if body == b"":
        return "more" if digit else "error"
    if body == b"0":
        return "error" if digit else "more" if byte == b"." else "token before"
    return "more" if digit or byte in (b".", b"e", b"E") else "token before"
