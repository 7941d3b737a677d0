"""A device's configuration space that lies, and a guest that writes what it likes into what it is shown.

The input: a byte of options, the BARs' sizes (six bytes, powers of two), how many bytes of script follow (two bytes),
the script, and the device's own configuration space from offset 0; what is missing of it is zero. The script's records
are offset (two bytes), length (one) and bytes.
"""

from __future__ import annotations

from tests.fuzz.target import Target, lines

from vfiod.protocol.catalogue.words import IrqKind
from vfiod.server.devices.config import layout as at
from vfiod.server.devices.config.capabilities import walk
from vfiod.server.devices.config.space import VirtualConfig
from vfiod.server.devices.config.table import MsixTable
from vfiod.server.mdev.samples.config_space import ConfigSpace

__all__ = ["TARGETS"]

_HEAD = 9
_KINDS = (IrqKind.NONE, IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX)


def _records(script: bytes, size: int) -> list[tuple[int, bytes]]:
    out = []
    place = 0
    while place + 3 <= len(script):
        length = script[place + 2] % 17
        data = script[place + 3 : place + 3 + length]
        offset = int.from_bytes(script[place : place + 2], "little") % size
        if data[: size - offset]:
            out.append((offset, data[: size - offset]))
        place += 3 + length
    return out


def _space(data: bytes) -> None:
    if len(data) < _HEAD:
        return
    options, sizes = data[0], data[1:7]
    script_end = _HEAD + int.from_bytes(data[7:9], "little") % 1024
    size = at.EXPRESS_SIZE if options & 1 else at.STANDARD_SIZE
    own = data[script_end : script_end + size].ljust(size, b"\0")
    bars = {number: 1 << (one & 63) if one else 0 for number, one in enumerate(sizes)}
    space = VirtualConfig(
        own,
        bars=bars,
        rom=4096 if options & 2 else 0,
        intx=bool(options & 4),
        multifunction=bool(options & 8),
    )
    for offset, written in _records(data[_HEAD:script_end], size):
        before = space.merge(0, own)
        old = space.write(offset, written)
        after = space.merge(0, own)
        outside = before[:offset] + before[offset + len(written) :]
        msi = space.chains.find(at.MSI_ID)
        if msi is None:
            assert after[:offset] + after[offset + len(written) :] == outside, "a write reached beyond its bytes"
        guest = space.guest
        assert guest.msi <= 128
        space.sync(_KINDS[len(written) % 4], len(written))
        if options & 16:
            space.undo(offset, old)
    _guest_walks(space.merge(0, own))
    place = space.msix
    if place is not None:
        assert place.table_offset + place.table_size <= bars[place.table_bar]
        _table(MsixTable(place.vectors), data[_HEAD:script_end])


def _guest_walks(image: bytes) -> None:
    """As a guest does that trusts its device: it comes to an end, within the space, whatever was written."""
    if image[at.STATUS] & at.STATUS_CAPABILITIES:
        pointer, steps = image[at.CAPABILITIES] & 0xFC, 0
        while pointer:
            assert at.HEADER_SIZE <= pointer <= at.STANDARD_SIZE - 4, "the guest is led out of the space"
            steps += 1
            assert steps <= 48, "the guest walks in a circle"
            pointer = image[pointer + 1] & 0xFC
    if len(image) == at.EXPRESS_SIZE:
        pointer, steps = at.STANDARD_SIZE, 0
        while pointer:
            header = int.from_bytes(image[pointer : pointer + 4], "little")
            if header in (0, 0xFFFF_FFFF):
                break
            steps += 1
            assert steps <= 960, "the guest walks in a circle"
            pointer = header >> 20 & 0xFFC
            assert not pointer or pointer >= at.STANDARD_SIZE, "the guest is led out of the space"


def _table(table: MsixTable, script: bytes) -> None:
    size = table.vectors * at.ENTRY_SIZE
    before = table.read(0, size)
    undone = [(offset, table.write(offset, data)[1]) for offset, data in _records(script, size)]
    assert len(table.unmasked()) <= table.vectors
    pba = -(-table.vectors // 64) * 8
    table.pending(0, b"\xff" * pba, all_masked=True)
    for offset, old in reversed(undone):
        table.undo(offset, old)
    assert table.read(0, size) == before, "a write taken back left something"


def _sample(data: bytes) -> None:
    """The built-in device's own space, as a guest writes to it."""
    space = ConfigSpace(
        vendor=0x1234, device=0x11E8, bars={0: (4096, False), 2: (1 << 20, True)}, msi_vectors=4, msix=(8, 0x800, 0xC00)
    )
    ids = space.read(0, 4, intx=False)
    for offset, written in _records(data, ConfigSpace.size):
        space.write(offset, written)
        image = space.read(0, ConfigSpace.size, intx=bool(offset & 1))
        assert image[:4] == ids, "a guest has changed the ids"
        assert not image[0x10] & 0xF and len(image) == ConfigSpace.size
        assert not walk(image).cuts, "a guest has bent the chain"


TARGETS = (
    Target(
        "config-space",
        _space,
        lambda: lines("config-space"),
        ("vfiod.server.devices.config",),
        "whatever the device says, a guest's walk ends within the space; a write changes what it names; undo undoes",
        250,
    ),
    Target(
        "config-space-guest",
        _sample,
        lambda: lines("config-space-guest"),
        ("vfiod.server.mdev.samples.config_space",),
        "whatever the guest writes, ids and chains stay",
        200,
    ),
)
