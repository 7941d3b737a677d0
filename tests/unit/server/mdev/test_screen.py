"""The screen of the 3270-like terminal, by its data streams."""

from __future__ import annotations

import contextlib
import random

import pytest

from vfiod.server.mdev.samples.screen import POSITIONS, BadStream, Screen, address_bytes, address_of

EW, W, EAU = 0x05, 0x01, 0x0F


def at(address: int) -> bytes:
    return b"\x11" + address_bytes(address)


def cells(screen: Screen) -> bytes:
    """Without AID and cursor."""
    return screen.contents()[3:]


def test_addresses_of_both_forms() -> None:
    for address in range(POSITIONS):
        assert address_of(address_bytes(address)) == address
        assert address_of(address.to_bytes(2, "big")) == address
    assert address_bytes(80) == b"\xc1\x50"  # as in the manual's table
    for bad in (b"", b"\x40", POSITIONS.to_bytes(2, "big"), b"\xff\xff"):
        with pytest.raises(BadStream):
            address_of(bad)


def test_what_is_written_is_read_back() -> None:
    screen = Screen()
    assert screen.contents() == b"\x60\x40\x40" + bytes(POSITIONS)
    screen.write(EW, b"\xc3HELLO" + at(80) + b"\x1d\x20fixed\x1d\x00\x13in")
    assert screen.cursor == 80 + 7
    data = cells(screen)
    assert len(data) == POSITIONS + 2  # two attributes, each with SF before it
    assert data[:5] == b"HELLO"
    assert data[80:92] == b"\x1d\x20fixed\x1d\x00in\0"
    # WRITE goes on where the cursor is, and leaves the rest; ERASE/WRITE does not.
    screen.write(W, b"\xc3IN")
    assert cells(screen)[80:91] == b"\x1d\x20fixed\x1d\x00IN"
    screen.write(EW, b"\xc3")
    assert screen.contents() == b"\x60\x40\x40" + bytes(POSITIONS)


def test_filling_and_erasing() -> None:
    screen = Screen()
    screen.write(EW, b"\xc3" + at(1918) + b"\x3c" + address_bytes(2) + b"-")
    assert cells(screen)[:3] == b"--\0" and cells(screen)[-3:] == b"\0--"  # around the end
    screen.write(EW, b"\xc3\x3c" + address_bytes(0) + b"\x08*")
    assert cells(screen) == b"*" * POSITIONS  # to itself: all of it; GE before the character
    screen.write(EW, b"\xc3\x1d\x20AB\x1d\x00CD\x1d\x20EF" + at(0) + b"\x12" + address_bytes(0))
    assert cells(screen)[:12] == b"\x1d\x20AB\x1d\x00\0\0\x1d\x20EF"  # what is unprotected
    screen.write(W, b"\xc3" + at(0) + b"\x05xy")  # program tab: into the first field for input
    assert cells(screen)[:8] == b"\x1d\x20AB\x1d\x00xy"
    screen.write(EAU, b"")
    assert (cells(screen)[4:8], screen.cursor) == (b"\x1d\x00\0\0", 4)


def test_attributes_in_pairs() -> None:
    screen = Screen()
    screen.write(EW, b"\xc3\x29\x02\xc0\x20\x42\xf2A\x28\x42\xf1B")
    assert cells(screen)[:4] == b"\x1d\x20AB"
    screen.write(W, b"\xc3" + at(0) + b"\x2c\x01\xc0\x00")
    assert cells(screen)[:4] == b"\x1d\x00AB"


def test_what_the_operator_enters_is_on_it() -> None:
    screen = Screen()
    screen.entered(b"\x7d" + address_bytes(165) + at(160) + b"name")
    assert screen.contents()[:3] == b"\x7d" + address_bytes(165)
    assert cells(screen)[160:165] == b"name\0"
    screen.entered(b"\x6d")  # CLEAR is an AID alone
    assert screen.aid == 0x6D
    screen.write(W, b"\xc3")
    assert screen.aid == 0x60  # it was answered


def test_streams_that_make_no_sense() -> None:
    for stream in (b"\x11", b"\x11\xff\xff", b"\x1d", b"\x29\x05\xc0", b"\x3c\x40\x40", b"\x05" * 513, b"\x12\x40"):
        with pytest.raises(BadStream):
            Screen().write(EW, b"\xc3" + stream)
    chance = random.Random(3270)
    screen = Screen()
    for _ in range(100):
        stream = bytes(chance.choice((0x11, 0x1D, 0x3C, 0x12, 5, 0x29, 0x40, 0xC1, 3)) for _ in range(40))
        with contextlib.suppress(BadStream):
            screen.write(chance.choice((W, EW)), stream)
        screen.entered(stream)
        assert len(screen.contents()) >= 3 + POSITIONS
        assert 0 <= screen.cursor < POSITIONS
