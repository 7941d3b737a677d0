"""The screen of a 3270-like terminal: what data streams in both directions leave on it. Sans-I/O.

24 rows of 80, in the machine's own code (EBCDIC or whatever is sent: it is only kept). A field attribute takes a
position of its own. Structured fields, colours and the alternate size are passed over.

Source: IBM 3270 Data Stream Programmer's Reference (GA23-0059): orders, buffer addresses, READ BUFFER.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

__all__ = ["POSITIONS", "BadStream", "Screen", "address_bytes", "address_of"]

POSITIONS: Final = 24 * 80

WRITE, ERASE_WRITE, ERASE_WRITE_ALTERNATE, ERASE_UNPROTECTED = 0x01, 0x05, 0x0D, 0x0F
SBA, EUA, IC, PT, SF, SA, SFE, MF, RA, GE = 0x11, 0x12, 0x13, 0x05, 0x1D, 0x28, 0x29, 0x2C, 0x3C, 0x08
FIELD: Final = 0xC0
"""Type of the pair that is the field attribute itself, in SFE and MF."""
PROTECTED: Final = 0x20
MAX_SCANS: Final = 512
"""Orders of one stream that look through the whole screen (PT, EUA): several for each field of a full form."""
NO_AID: Final = 0x60

_GRAPHIC: Final = bytes.fromhex(
    "40c1c2c3c4c5c6c7c8c94a4b4c4d4e4f 50d1d2d3d4d5d6d7d8d95a5b5c5d5e5f"
    "6061e2e3e4e5e6e7e8e96a6b6c6d6e6f f0f1f2f3f4f5f6f7f8f97a7b7c7d7e7f"
)
"""Six bits as a character that every line carries."""


class BadStream(ValueError):
    """An order without its operands, or an address beyond the screen: an operation check."""


def address_bytes(address: int) -> bytes:
    """A buffer address in its 12-bit form."""
    return bytes((_GRAPHIC[address >> 6], _GRAPHIC[address & 0x3F]))


def address_of(data: bytes) -> int:
    """A buffer address: 14 bits, or 12 bits in two characters. Raises BadStream beyond the screen."""
    if len(data) != 2:
        raise BadStream("an address has two bytes")
    high, low = data
    address = high << 8 | low if high < 0x40 else (high & 0x3F) << 6 | low & 0x3F
    if address >= POSITIONS:
        raise BadStream(f"address {address} is not below {POSITIONS}")
    return address


class Screen:
    """What is on it.

    Attributes:
        cursor: where the cursor is, 0 to 1919.
        aid: what the operator pressed last; 60: nothing.

    """

    def __init__(self) -> None:
        self.cursor = 0
        self.aid = NO_AID
        self._cells = bytearray(POSITIONS)
        self._fields: dict[int, int] = {}  # attributes, by position

    def contents(self) -> bytes:
        """What READ BUFFER gives: AID, cursor, every position; attributes with SF before them."""
        out = bytearray((self.aid,)) + address_bytes(self.cursor)
        for position in range(POSITIONS):
            attribute = self._fields.get(position)
            if attribute is None:
                out.append(self._cells[position])
            else:
                out += bytes((SF, attribute))
        return bytes(out)

    def save(self) -> dict[str, Any]:
        """Every position, the cursor, and the AID."""
        fields = sorted(self._fields.items())
        return {"cursor": self.cursor, "aid": self.aid, "cells": self._cells.hex(), "fields": fields}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Be as saved."""
        self.cursor, self.aid = saved["cursor"], saved["aid"]
        self._cells = bytearray.fromhex(saved["cells"])
        self._fields = dict(saved["fields"])

    # --- from the program -----------------------------------------------------------------------------

    def write(self, command: int, stream: bytes) -> None:
        """A write command with its data: the write-control character, then orders and characters.

        Raises BadStream; what came before the mistake is on the screen, as on a real one.
        """
        self.aid = NO_AID
        if command == ERASE_UNPROTECTED:
            inputs = self._inputs()
            self._erase(range(POSITIONS), inputs)
            self.cursor = next((at for at in range(POSITIONS) if inputs[at]), 0)
            return
        if command in (ERASE_WRITE, ERASE_WRITE_ALTERNATE):
            self._cells, self._fields, self.cursor = bytearray(POSITIONS), {}, 0
        self._orders(stream[1:], self.cursor)

    def _orders(self, stream: bytes, at: int) -> None:
        rest = iter(stream)
        scans = 0
        for code in rest:
            scans += code in (PT, EUA)
            if scans > MAX_SCANS:
                raise BadStream(f"more than {MAX_SCANS} orders look through the whole screen")
            match code:
                case 0x11:
                    at = address_of(_take(rest, 2))
                case 0x13:
                    self.cursor = at
                case 0x1D:
                    at = self._field(at, _take(rest, 1)[0])
                case 0x29:
                    at = self._field(at, _pairs(rest).get(FIELD, 0))
                case 0x2C:
                    pairs = _pairs(rest)
                    if at in self._fields:
                        self._fields[at] = pairs.get(FIELD, self._fields[at])
                    at = (at + 1) % POSITIONS
                case 0x28:
                    _take(rest, 2)
                case 0x05:
                    inputs = self._inputs()
                    at = next((one for one in range(at, POSITIONS) if inputs[one] and one - 1 in self._fields), 0)
                case 0x12:
                    end = address_of(_take(rest, 2))
                    self._erase(_after(at, end), self._inputs())
                    at = end
                case 0x3C:
                    end = address_of(_take(rest, 2))
                    character = _take(rest, 1)[0]
                    if character == GE:
                        character = _take(rest, 1)[0]
                    self._fill(at, end, character)
                    at = end
                case 0x08:
                    at = self._put(at, _take(rest, 1)[0])
                case _:
                    at = self._put(at, code)

    def _put(self, at: int, character: int) -> int:
        self._fields.pop(at, None)
        self._cells[at] = character
        return (at + 1) % POSITIONS

    def _field(self, at: int, attribute: int) -> int:
        self._cells[at] = 0
        self._fields[at] = attribute
        return (at + 1) % POSITIONS

    def _fill(self, at: int, end: int, character: int) -> None:
        for first, last in ((at, end),) if at < end else ((at, POSITIONS), (0, end)):
            self._cells[first:last] = bytes((character,)) * (last - first)
            self._fields = {one: kind for one, kind in self._fields.items() if not first <= one < last}

    def _erase(self, positions: Iterable[int], inputs: list[bool]) -> None:
        for at in positions:
            if inputs[at]:
                self._cells[at] = 0

    def _inputs(self) -> list[bool]:
        """Where the operator can type: no attribute is there, and the field is not protected."""
        attribute = self._fields[max(self._fields)] if self._fields else 0  # the last field goes on at the top
        found: list[bool] = []
        for at in range(POSITIONS):
            attribute = self._fields.get(at, attribute)
            found.append(at not in self._fields and not attribute & PROTECTED)
        return found

    # --- from the operator ----------------------------------------------------------------------------

    def entered(self, record: bytes) -> None:
        """What the operator sent: AID, cursor, and fields (SBA, address, characters). What makes no sense is left."""
        self.aid = record[0] if record else NO_AID
        try:
            self.cursor = address_of(record[1:3])
            at = self.cursor
            rest = iter(record[3:])
            for code in rest:
                at = address_of(_take(rest, 2)) if code == SBA else self._put(at, code)
        except BadStream:
            return  # an AID alone (CLEAR, PA keys), or a program at the line that sends what it likes


def _after(at: int, end: int) -> Iterator[int]:
    """The positions from one up to, without, another; around the end; all of them when they are the same."""
    length = (end - at) % POSITIONS or POSITIONS
    return ((at + one) % POSITIONS for one in range(length))


def _take(rest: Iterator[int], count: int) -> bytes:
    found = bytes(islice(rest, count))
    if len(found) != count:
        raise BadStream("an order lacks its operands")
    return found


def _pairs(rest: Iterator[int]) -> dict[int, int]:
    """Types and values of attributes."""
    data = _take(rest, 2 * _take(rest, 1)[0])
    return dict(zip(data[::2], data[1::2], strict=True))
