"""Guest memory of a mediated device: any mapping, piece by piece, with faults."""

from __future__ import annotations

import os
import random

import pytest

from vfiod.protocol.errors import OperationFailed
from vfiod.server.mdev.parent import DmaFault
from vfiod.server.mdev.space import Piece

from .conftest import Ground

PAGE = 4096


def test_an_access_goes_across_mappings_of_different_files(ground: Ground) -> None:
    first = ground.map(0x10000, PAGE, offset=PAGE)
    second = ground.map(0x11000, PAGE)
    data = os.urandom(2 * PAGE)
    ground.host.write_memory(0x10000, data)
    assert first.read(PAGE, PAGE) + second.read(0, PAGE) == data
    assert first.read(0, PAGE) == bytes(PAGE)
    assert ground.host.read_memory(0x10000 + 100, PAGE) == data[100 : 100 + PAGE]


def test_a_fault_names_the_first_address_and_what_was_done(ground: Ground) -> None:
    memory = ground.map(0x10000, PAGE)
    with pytest.raises(DmaFault) as caught:
        ground.host.write_memory(0x10F00, b"x" * 0x200)
    assert (caught.value.iova, caught.value.done, caught.value.write) == (0x11000, 0x100, True)
    assert memory.read(0xF00, 0x100) == b"x" * 0x100
    with pytest.raises(DmaFault) as caught:
        ground.host.read_memory(0xFFFF, 2)
    assert (caught.value.iova, caught.value.done) == (0xFFFF, 0)


def test_readonly_memory_is_read_and_not_written(ground: Ground) -> None:
    memory = ground.map(0, PAGE, readonly=True)
    memory.write(0, b"rom")
    assert ground.host.read_memory(0, 3) == b"rom"
    with pytest.raises(DmaFault) as caught:
        ground.host.write_memory(0, b"x")
    assert caught.value.readonly
    assert memory.read(0, 3) == b"rom"


def test_a_file_that_its_owner_cuts_is_a_fault_and_not_sigbus(ground: Ground) -> None:
    memory = ground.map(0, 4 * PAGE)
    os.ftruncate(memory.number, PAGE)
    assert ground.host.read_memory(0, PAGE) == bytes(PAGE)
    with pytest.raises(DmaFault):
        ground.host.read_memory(0, 2 * PAGE)


def test_the_last_address_of_all(ground: Ground) -> None:
    ground.map((1 << 64) - PAGE, PAGE)
    ground.host.write_memory((1 << 64) - 4, b"last")
    assert ground.host.read_memory((1 << 64) - 4, 4) == b"last"
    with pytest.raises(DmaFault):
        ground.host.read_memory((1 << 64) - 4, 5)


def test_overlaps_are_refused_and_unmap_splits_nothing(ground: Ground) -> None:
    memory = ground.map(0x10000, 2 * PAGE)
    for iova, size in ((0x10000, PAGE), (0x11000, PAGE), (0xF000, 2 * PAGE), (0xF000, 8 * PAGE)):
        with pytest.raises(OperationFailed, match="EEXIST"):
            ground.space.add(Piece(iova, size, memory, 0, False))
    for iova, size in ((0x10000, PAGE), (0x11000, PAGE), (0xF000, 2 * PAGE)):
        with pytest.raises(OperationFailed, match="split"):
            ground.space.remove(iova, size)
    ground.space.remove(0xF000, 8 * PAGE)
    assert len(ground.space) == 0
    ground.space.remove(0, 1 << 64)


def test_against_a_plain_model(ground: Ground) -> None:
    chance = random.Random(7)
    model: dict[int, int] = {}
    mapped: dict[int, int] = {}
    for step in range(400):
        page = chance.randrange(16)
        if chance.random() < 0.3:
            size = chance.randrange(1, 3)
            if not any(p in mapped for p in range(page, page + size)):
                ground.map(page * PAGE, size * PAGE)
                for p in range(page, page + size):
                    mapped[p] = page
                    model.update(dict.fromkeys(range(p * PAGE, (p + 1) * PAGE), 0))
        elif chance.random() < 0.2 and page in mapped:
            start = mapped[page]
            pages = [p for p in mapped if mapped[p] == start]
            ground.space.remove(start * PAGE, len(pages) * PAGE)
            for p in pages:
                del mapped[p]
                for at in range(p * PAGE, (p + 1) * PAGE):
                    del model[at]
        iova, length = chance.randrange(17 * PAGE), chance.randrange(1, 3 * PAGE)
        reach = next((n for n in range(length) if iova + n not in model), length)
        data = bytes([step % 256]) * length
        try:
            ground.host.write_memory(iova, data)
            assert reach == length
        except DmaFault as fault:
            assert (fault.done, fault.iova) == (reach, iova + reach)
        model.update(dict.fromkeys(range(iova, iova + reach), step % 256))
        if reach:
            assert ground.host.read_memory(iova, reach) == bytes(model[iova + n] for n in range(reach))
