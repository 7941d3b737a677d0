"""Configuration space as the guest sees it: behaviour.md, section 5, rule by rule.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol.catalogue.words import IrqKind
from vfiod.server.devices.config.capabilities import walk
from vfiod.server.devices.config.space import Guest, VirtualConfig
from vfiod.server.devices.config.table import MsixTable

MSI, EXPRESS, MSIX = 0x50, 0x70, 0xB0
BARS = {0: 4096, 2: 1 << 33, 4: 32, 5: 0}


def image(size: int = 4096) -> bytearray:
    """A device: a memory BAR, a 64-bit one, an I/O one; MSI with masks, Express, MSI-X in BAR 0."""
    config = bytearray(size)
    struct.pack_into("<HHHHI", config, 0, 0x1234, 0x11E8, 6, 0x10, 0xFF000001)
    config[0x0E] = 0x80  # the host's is multifunction
    struct.pack_into("<IIIIII", config, 0x10, 0xFEB00000, 0, 0xC, 0x38, 0xE001, 0xDEAD0000)
    struct.pack_into("<I", config, 0x30, 0xFEA00001)
    config[0x34] = MSI
    config[0x3C:0x3E] = b"\x0b\x01"
    struct.pack_into("<BBHIIHHI", config, MSI, 0x05, EXPRESS, 0x1A4 | 2 << 1 | 1, 0xFEE00000, 1, 0x4021, 0, 0)
    struct.pack_into("<BBH", config, EXPRESS, 0x10, MSIX, 2)
    struct.pack_into("<BBHII", config, MSIX, 0x11, 0, 0xC000 | 4, 0x800, 0xC00)
    if size == 4096:
        struct.pack_into("<I", config, 0x100, 0x148 << 20 | 2 << 16 | 1)
        struct.pack_into("<I", config, 0x148, 0 << 20 | 1 << 16 | 3)
    return config


class Space:
    """A device and the guest's view of it."""

    def __init__(self, own: bytearray | None = None, **more: object) -> None:
        self.own = image() if own is None else own
        self.config = VirtualConfig(bytes(self.own), **{"bars": BARS, "rom": 65536, **more})  # type: ignore[arg-type]

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config.merge(offset, bytes(self.own[offset : offset + size])), "little")

    def set(self, offset: int, size: int, value: int) -> None:
        self.config.write(offset, value.to_bytes(size, "little"))


def test_what_is_not_virtualised_is_the_devices() -> None:
    """ "Reads come from the device except what is virtualised"."""
    space = Space()
    assert space.get(0, 4) == 0x11E8_1234
    space.own[4:6] = b"\x47\x05"
    assert space.get(4, 2) == 0x0547
    assert space.get(0x100, 4) == 0x1482_0001


@pytest.mark.parametrize(
    ("at", "size", "flags", "mask"),
    [
        (0x10, 4, 0x0, 0xFFFF_F000),
        (0x14, 4, 0x0, 0x0),
        (0x18, 8, 0xC, 0xFFFF_FFFE_0000_0000),  # "A 64-bit BAR takes two slots"
        (0x20, 4, 0x1, 0xFFFF_FFE0),
        (0x24, 4, 0x0, 0x0),
        (0x30, 4, 0x0, 0xFFFF_0001),
    ],
)
def test_bars_and_rom_are_sized_by_write_ones_and_host_addresses_never_show(
    at: int, size: int, flags: int, mask: int
) -> None:
    """ "BARs and ROM address (sized by write-ones; host addresses never show)"."""
    space = Space()
    assert space.get(at, size) == flags
    space.set(at, size, (1 << 8 * size) - 1)
    assert space.get(at, size) == mask | flags
    space.set(at, size, 0x5555_5555_5555_5555 & (1 << 8 * size) - 1)
    assert space.get(at, size) == 0x5555_5555_5555_5555 & mask | flags
    for byte in range(size):  # any width
        space.set(at + byte, 1, 0)
    assert space.get(at, size) == flags


def test_without_a_rom_there_is_none() -> None:
    """ "`rombar=off`": no address, and no enable bit."""
    space = Space(rom=0)
    space.set(0x30, 4, 0xFFFF_FFFF)
    assert space.get(0x30, 4) == 0


@pytest.mark.parametrize("host", [0x00, 0x80])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_multifunction_bit_is_the_propertys(host: int, wanted: bool) -> None:
    """ "the multifunction bit (set or cleared by property, whatever the host has)"."""
    own = image()
    own[0x0E] = host
    space = Space(own, multifunction=wanted)
    space.set(0x0E, 1, 0xFF)
    assert space.get(0x0E, 1) == 0x80 * wanted


def test_intx_pin_and_line() -> None:
    """ "INTx pin": the device's, none when its INTx cannot be used; the line is the guest's to write."""
    space = Space()
    space.set(0x3C, 2, 0x0205)
    assert space.get(0x3C, 2) == 0x0105
    assert Space(intx=False).get(0x3D, 1) == 0


def test_msi_is_the_guests() -> None:
    """ "the MSI ... capabilities" are virtualised: off at first, the host's message never shows."""
    space = Space()
    assert space.get(MSI + 2, 2) == 0x1A4 & ~0x70 | 2 << 1
    assert (space.get(MSI + 4, 8), space.get(MSI + 12, 2)) == (0, 0)
    space.set(MSI + 2, 2, 0x0071)  # 128 vectors: it has 4
    assert space.config.guest == Guest(msi=4)
    assert space.get(MSI + 2, 2) >> 4 & 7 == 2
    space.set(MSI + 4, 4, 0xFEE0_1003)
    assert space.get(MSI + 4, 4) == 0xFEE0_1000
    space.own[MSI + 20] = 0xF  # pending bits are the device's
    assert space.get(MSI + 20, 1) == 0xF


def test_msix_is_the_guests() -> None:
    """The enable bit and the function mask are the guest's, the place of the table is the device's."""
    space = Space()
    assert space.get(MSIX + 2, 2) == 4
    space.set(MSIX + 2, 2, 0xFFFF)
    assert space.get(MSIX + 2, 2) == 0xC004
    assert space.config.guest == Guest(msix=True, masked=True)
    assert space.get(MSIX + 4, 8) == 0xC00 << 32 | 0x800
    place = space.config.msix
    assert place is not None
    assert (place.vectors, place.table_bar, place.table_offset, place.pba_offset) == (5, 0, 0x800, 0xC00)


def test_who_ever_changes_the_kind_the_enable_bits_show_it() -> None:
    """ "write its logarithm to the guest's enabled-messages field. Disabling sets the field to 0"."""
    space = Space()
    space.set(MSI + 2, 2, 0x20)  # allocated, not yet enabled
    space.config.sync(IrqKind.INTX, 1)
    assert space.get(MSI + 2, 2) >> 4 & 7 == 2
    space.config.sync(IrqKind.MSI, 3)
    assert (space.get(MSI + 2, 2) & 1, space.get(MSI + 2, 2) >> 4 & 7) == (1, 2)
    space.config.sync(IrqKind.MSIX, 5)
    assert (space.get(MSI + 2, 2) & 0x71, space.config.guest) == (0, Guest(msix=True))
    space.config.sync(IrqKind.NONE, 0)
    assert space.config.guest == Guest()


def test_a_write_can_be_taken_back() -> None:
    space = Space()
    before = space.get(0, 256)
    old = space.config.write(0x10, b"\xff" * 200)
    space.config.undo(0x10, old)
    assert space.get(0, 256) == before


# --- "The capability chain keeps the device's order; each capability's size is bounded by the next; a chain with a loop
# --- or out of range is cut, with a warning" ------------------------------------------------------------------------


def test_both_chains_in_order_and_bounded() -> None:
    chains = walk(bytes(image()))
    assert [(one.id, one.offset, one.size) for one in chains.standard] == [
        (0x05, MSI, 0x20),
        (0x10, EXPRESS, 0x40),
        (0x11, MSIX, 0x50),
    ]
    assert [(one.id, one.offset, one.size, one.version) for one in chains.extended] == [
        (1, 0x100, 0x48, 2),
        (3, 0x148, 0x1000 - 0x148, 1),
    ]
    assert not chains.cuts
    assert not chains.warnings


def test_the_order_is_the_devices_not_that_of_the_places() -> None:
    own = image()
    own[0x34], own[MSIX + 1], own[EXPRESS + 1] = MSIX, MSI, 0
    chains = walk(bytes(own))
    assert [one.offset for one in chains.standard] == [MSIX, MSI, EXPRESS]
    assert [one.size for one in chains.standard] == [0x50, 0x20, 0x40]


@pytest.mark.parametrize(
    ("at", "value", "left", "words"),
    [
        (MSIX + 1, MSI, 3, "0xb1: the pointer there, 0x50, leads back"),
        (MSIX + 1, MSIX, 3, "leads back"),
        (EXPRESS + 1, 0x3C, 2, "leaves the space"),
        (0x34, 0x10, 0, "0x34: .*leaves the space"),
    ],
)
def test_a_standard_chain_is_cut_and_the_guest_sees_it_end(at: int, value: int, left: int, words: str) -> None:

    own = image()
    own[at] = value
    space = Space(own)
    assert len(space.config.chains.standard) == left
    (warning,) = space.config.warnings
    assert re.search(words, warning)
    assert space.get(at, 1) == 0
    assert walk(space.get(0, 4096).to_bytes(4096, "little")).warnings == ()


@pytest.mark.parametrize(("target", "words"), [(0x100, "leads back"), (0x040, "leaves the space"), (0x200, "no capab")])
def test_an_extended_chain_is_cut_and_the_guest_sees_it_end(target: int, words: str) -> None:
    own = image()
    struct.pack_into("<I", own, 0x148, target << 20 | 1 << 16 | 3)
    space = Space(own)
    assert [one.offset for one in space.config.chains.extended] == [0x100, 0x148]
    assert words in space.config.warnings[0]
    assert space.get(0x148, 4) == 1 << 16 | 3


def test_a_capability_that_has_no_room_is_left_alone() -> None:
    own = image()
    own[MSI + 1] = MSI + 8
    own[MSI + 8 : MSI + 10] = bytes((0x09, EXPRESS))
    space = Space(own)
    assert "The MSI capability at 0x50 needs" in space.config.warnings[0]
    space.set(MSI + 2, 2, 1)
    assert space.config.guest == Guest()


def test_an_msix_table_outside_its_bar_is_not_virtualised() -> None:
    own = image()
    struct.pack_into("<I", own, MSIX + 4, 0xFF8)
    space = Space(own)
    assert space.config.msix is None
    assert "are not within BAR 0" in space.config.warnings[0]


@given(st.binary(min_size=256, max_size=256), st.data())
def test_nothing_a_device_says_breaks_it(start: bytes, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from((256, 4096)))
    own = bytearray(start.ljust(size, data.draw(st.binary(min_size=1, max_size=1))))
    space = Space(own)
    once = space.get(0, size).to_bytes(size, "little")
    assert walk(once).warnings == (), "what the guest sees can be walked"
    for _ in range(4):
        at = data.draw(st.integers(0, size - 1))
        space.config.write(at, data.draw(st.binary(min_size=1, max_size=min(8, size - at))))
        assert space.config.guest.msi in (0, 1, 2, 4, 8, 16, 32, 64, 128)


# --- the MSI-X table -----------------------------------------------------------------------------------------------


def test_the_table_begins_masked_and_keeps_what_is_written_in_any_width() -> None:
    table = MsixTable(3)
    assert table.read(0, 48) == (bytes(12) + b"\1\0\0\0") * 3
    assert table.write(16, b"\x07\x10\xe0\xfe\x01\0\0\0")[0] == frozenset()
    assert table.read(16, 8) == b"\x04\x10\xe0\xfe\x01\0\0\0", "messages are whole dwords"
    assert table.write(28, b"\xfe\xff")[0] == {1}
    assert table.unmasked() == {1}
    assert table.read(28, 4) == bytes(4), "only the mask bit can be written"
    changed, old = table.write(0, bytes(48))
    assert changed == {0, 2}
    table.undo(0, old)
    assert table.unmasked() == {1}


def test_pending_bits_are_shown_for_masked_vectors_only() -> None:
    table = MsixTable(10)
    table.write(12, bytes(4))
    assert table.pending(0, b"\xff\xff\xff") == b"\xfe\x03\x00"
    assert table.pending(1, b"\xff") == b"\x03"
    assert table.pending(0, b"\x01", all_masked=True) == b"\x01"
