"""The built-in device, register by register (the map is in its module's docstring).

Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from vfiod.protocol.vfio import IrqAction, PciIrq, PciRegion, SetIrqs
from vfiod.server.mdev.samples import pci
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

from .conftest import Ground

PAGE = 4096
CONFIG = PciRegion.CONFIG
UUID = "00000000-0000-4000-8000-000000000001"


class User:
    """A device and its registers."""

    def __init__(self, ground: Ground, **parameters: Any) -> None:
        self.parent = Primer()
        self.device: PrimerDevice = self.parent.create(ground.host, UUID, Primer.TYPE, parameters)
        self.device.open()

    def get(self, at: int, index: int = PciRegion.BAR0, size: int = 4) -> int:
        return int.from_bytes(self.device.read(index, at, size), "little")

    def set(self, at: int, value: int, index: int = PciRegion.BAR0, size: int = 4) -> None:
        self.device.write(index, at, value.to_bytes(size, "little"))

    def master(self) -> None:
        self.set(4, self.get(4, CONFIG, 2) | 4, CONFIG, 2)

    def dma(self, address: int, local: int, count: int, command: int) -> tuple[int, int, int]:
        self.set(pci.DMA_ADDRESS, address, size=8)
        self.set(pci.DMA_LOCAL, local)
        self.set(pci.DMA_COUNT, count)
        self.set(pci.DMA_COMMAND, pci.START | command)
        return self.get(pci.DMA_STATUS), self.get(pci.DMA_MOVED), self.get(pci.DMA_FAULT, size=8)


@pytest.fixture
def user(ground: Ground) -> Iterator[User]:
    made = User(ground)
    yield made
    made.device.close()
    ground.settle()


def test_memory_that_does_not_get_its_size_is_closed(ground: Ground) -> None:
    """Found by failing system calls: an open that was refused kept its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, hard))
    try:
        with pytest.raises(OSError) as refused:
            User(ground)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
    assert len(os.listdir("/proc/self/fd")) == before


# --- registers --------------------------------------------------------------------------------------------


def test_registers(user: User) -> None:
    assert user.get(pci.ID) == 0xF10D_0001
    user.set(pci.SCRATCH, 0x1234_5678)
    assert user.get(pci.SCRATCH) == 0xEDCB_A987
    user.set(pci.ROOT, 1_000_001)
    assert user.get(pci.ROOT) == 1000
    user.set(pci.ROOT, 0xFFFF_FFFF)
    assert user.get(pci.ROOT) == 65535


def test_accesses_are_counted_once_each(user: User) -> None:
    assert user.get(pci.ACCESSES) == 0
    user.get(pci.ID)
    user.get(pci.ID, size=1)
    user.set(pci.SCRATCH, 1)
    user.set(pci.DMA_ADDRESS, 1, size=8)
    assert user.get(pci.ACCESSES) == 5
    assert user.get(pci.ACCESSES) == 5


def test_any_width_reads_and_only_whole_registers_are_written(user: User) -> None:
    assert [user.get(n, size=1) for n in range(4)] == [0x01, 0x00, 0x0D, 0xF1]
    assert user.get(2, size=2) == 0xF10D
    assert user.get(1, size=8) == int.from_bytes(user.device.read(PciRegion.BAR0, 0, 12)[1:9], "little")
    for at, size in ((pci.SCRATCH, 1), (pci.SCRATCH, 2), (pci.SCRATCH + 2, 4)):
        user.set(at, 0x7F, size=size)
    assert user.get(pci.SCRATCH) == 0xFFFF_FFFF
    assert len(user.device.read(PciRegion.BAR0, 0, PAGE)) == PAGE


def test_unnamed_registers_read_zero_and_ignore_writes(user: User) -> None:
    for at in range(0x48, PAGE, 4):
        user.set(at, 0xFFFF_FFFF)
    for at in (pci.ID, pci.DMA_STATUS, pci.DMA_MOVED, pci.DMA_FAULT):
        user.set(at, 0xFFFF_FFFF)
    table = range(pci.MSIX_TABLE, pci.MSIX_TABLE + 8 * 16)
    unnamed = bytes(0xFF if at in table else 0 for at in range(0x48, PAGE))
    assert user.device.read(PciRegion.BAR0, 0x48, PAGE - 0x48) == unnamed
    assert user.get(pci.ID) == 0xF10D_0001
    assert user.get(pci.DMA_STATUS) == user.get(pci.DMA_MOVED) == user.get(pci.DMA_FAULT, size=8) == 0


# --- interrupts ---------------------------------------------------------------------------------------------


def test_raise_and_acknowledge_move_the_line(user: User, ground: Ground) -> None:
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.INTX, (bell.number,)))
    user.set(pci.IRQ_RAISE, 0b101)
    assert (user.get(pci.IRQ_STATUS), bell.rung()) == (0b101, 1)
    assert user.get(6, CONFIG, 2) & 1 << 3, "interrupt status"
    user.set(pci.IRQ_ACK, 0b001)
    user.device.set_irqs(SetIrqs.now(IrqAction.UNMASK, PciIrq.INTX))
    assert bell.rung() == 1, "one source is left"
    user.set(pci.IRQ_ACK, 0xFFFF_FFFF)
    user.device.set_irqs(SetIrqs.now(IrqAction.UNMASK, PciIrq.INTX))
    assert (user.get(pci.IRQ_STATUS), bell.rung()) == (0, 0)
    assert not user.get(6, CONFIG, 2) & 1 << 3


def test_messages_go_by_source_and_need_bus_mastering(user: User, ground: Ground) -> None:
    bells = [ground.bell() for _ in range(4)]
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.MSI, tuple(b.number for b in bells)))
    user.set(pci.IRQ_RAISE, 1)
    assert [b.rung() for b in bells] == [0, 0, 0, 0]
    user.master()
    user.set(pci.IRQ_RAISE, 1 << 1 | 1 << 6)
    assert [b.rung() for b in bells] == [0, 1, 1, 0]


def test_the_error_register_reports_an_error(user: User, ground: Ground) -> None:
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.ERR, (bell.number,)))
    user.set(pci.ERROR_RAISE, 0)
    assert bell.rung() == 1


def test_request_rings_req(user: User, ground: Ground) -> None:
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.REQ, (bell.number,)))
    user.device.request(0)
    assert bell.rung() == 1


# --- DMA ----------------------------------------------------------------------------------------------------


def test_dma_moves_data_both_ways_across_mappings(user: User, ground: Ground) -> None:
    first, second = ground.map(0x1_0000_0000, 2 * PAGE), ground.map(0x1_0000_2000, 2 * PAGE, offset=PAGE)
    data = os.urandom(3 * PAGE)
    first.write(PAGE // 2, data[: 2 * PAGE - PAGE // 2])
    second.write(PAGE, data[2 * PAGE - PAGE // 2 :])
    user.master()
    assert user.dma(0x1_0000_0000 + PAGE // 2, 12, len(data), 0) == (pci.DONE, len(data), 0)
    assert user.device.read(PciRegion.BAR2, 12, len(data)) == data
    first.write(0, bytes(2 * PAGE))
    assert user.dma(0x1_0000_0000, 12, 2 * PAGE, pci.TO_GUEST) == (pci.DONE, 2 * PAGE, 0)
    assert first.read(0, 2 * PAGE) == data[: 2 * PAGE]


def test_dma_interrupts_when_asked(user: User, ground: Ground) -> None:
    ground.map(0, PAGE)
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.INTX, (bell.number,)))
    user.master()
    user.dma(0, 0, 16, 0)
    assert bell.rung() == 0
    user.dma(0, 0, 16, pci.INTERRUPT)
    assert (bell.rung(), user.get(pci.IRQ_STATUS)) == (1, 1 << 31)


def fault(why: int) -> int:
    return pci.FAULT | why << 8


def test_dma_faults(user: User, ground: Ground) -> None:
    ground.map(0x10000, PAGE)
    ground.map(0x20000, PAGE, readonly=True)
    assert user.dma(0x10000, 0, 16, 0) == (fault(pci.FAULT_BUS_MASTER), 0, 0)
    user.master()
    assert user.dma(0x10000, 0, 16, 0) == (pci.DONE, 16, 0)
    assert user.dma(0x10FF0, 0, 64, pci.TO_GUEST) == (fault(pci.FAULT_UNMAPPED), 16, 0x11000)
    assert user.dma(0x10FF0, 0, 64, 0) == (fault(pci.FAULT_UNMAPPED), 16, 0x11000)
    assert user.dma(0x20000, 0, 16, pci.TO_GUEST) == (fault(pci.FAULT_READONLY), 0, 0x20000)
    assert user.dma(0x20000, 0, 16, 0) == (pci.DONE, 16, 0)
    assert user.dma(0x10000, 0, 0, 0)[0] == fault(pci.FAULT_LOCAL)
    assert user.dma(0x10000, 0x10_0000, 1, 0)[0] == fault(pci.FAULT_LOCAL)
    assert user.dma(0x10000, 0xFFFF_FFFF, 0xFFFF_FFFF, 0)[0] == fault(pci.FAULT_LOCAL)
    assert user.dma((1 << 64) - 8, 0, 16, 0)[0] == fault(pci.FAULT_ADDRESS)
    ground.map((1 << 64) - PAGE, PAGE)
    assert user.dma((1 << 64) - 16, 0, 16, pci.TO_GUEST)[0] == pci.DONE


def test_dma_of_the_whole_card(user: User, ground: Ground) -> None:
    memory = ground.map(0, 1 << 20)
    data = os.urandom(1 << 20)
    memory.write(0, data)
    user.master()
    assert user.dma(0, 0, 1 << 20, 0) == (pci.DONE, 1 << 20, 0)
    assert user.device.read(PciRegion.BAR2, 0, 1 << 20) == data


def test_a_closed_device_reaches_no_memory(user: User, ground: Ground) -> None:
    ground.map(0, PAGE)
    user.master()
    ground.host.memory = None
    assert user.dma(0, 0, 16, 0)[0] == fault(pci.FAULT_UNMAPPED)


# --- memory that can be mapped ------------------------------------------------------------------------------


def test_bar2_is_one_memory_for_reads_maps_and_dma(user: User) -> None:
    number = user.device.region_fd(PciRegion.BAR2)
    assert number is not None
    with mmap.mmap(number, 1 << 20) as window:
        window[100:104] = b"seen"
        assert user.device.read(PciRegion.BAR2, 100, 4) == b"seen"
        user.device.write(PciRegion.BAR2, 200, b"also")
        assert window[200:204] == b"also"


def test_nobody_can_cut_or_grow_bar2(user: User) -> None:
    number = user.device.region_fd(PciRegion.BAR2)
    assert number is not None
    for size in (0, 4096, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(number, size)


def test_the_next_user_gets_other_memory(user: User) -> None:
    number = user.device.region_fd(PciRegion.BAR2)
    assert number is not None
    with mmap.mmap(number, 1 << 20) as kept:
        kept[:6] = b"secret"
        user.device.close()
        user.device.open()
        assert user.device.read(PciRegion.BAR2, 0, 6) == bytes(6)
        user.device.write(PciRegion.BAR2, 0, b"other!")
        assert kept[:6] == b"secret"


# --- config space ---------------------------------------------------------------------------------------------


def test_config_space_reads_as_a_pci_express_endpoint(user: User) -> None:
    config = user.device.read(CONFIG, 0, PAGE)
    vendor, device, command, status = struct.unpack_from("<HHHH", config)
    assert (vendor, device, command) == (0x1234, 0xF10D, 2)
    assert status & 1 << 4
    found = {}
    at = config[0x34]
    while at:
        found[config[at]] = at
        at = config[at + 1]
    assert set(found) == {0x05, 0x10, 0x11}
    assert struct.unpack_from("<HII", config, found[0x11] + 2) == (8 - 1, pci.MSIX_TABLE, pci.MSIX_PBA)
    assert struct.unpack_from("<H", config, found[0x05] + 2)[0] == 0x80 | 2 << 1, "64 bits, 4 vectors, off"
    assert struct.unpack_from("<I", config, found[0x10] + 4)[0] & 1 << 28, "function level reset"
    assert config[0x3D] == 1
    assert config[0x100:] == bytes(PAGE - 0x100)


def test_bars_are_sized_by_writing_ones(user: User) -> None:
    user.set(0x10, 0xFFFF_FFFF, CONFIG)
    assert user.get(0x10, CONFIG) == 0xFFFF_F000
    user.set(0x18, (1 << 64) - 1, CONFIG, 8)
    assert user.get(0x18, CONFIG, 8) == (1 << 64) - (1 << 20) | 0b1100
    user.set(0x14, 0xFFFF_FFFF, CONFIG)
    user.set(0x20, 0xFFFF_FFFF, CONFIG)
    user.set(0x30, 0xFFFF_FFFF, CONFIG)
    assert user.get(0x14, CONFIG) == user.get(0x20, CONFIG) == user.get(0x30, CONFIG) == 0
    user.set(0x1B, 0x12, CONFIG, 1)
    assert user.get(0x18, CONFIG, 8) == 0xFFFF_FFFF_12F0_000C


def test_identity_cannot_be_written(user: User) -> None:
    before = user.device.read(CONFIG, 0, PAGE)
    user.device.write(CONFIG, 0, bytes(4))
    user.device.write(CONFIG, 8, bytes(4))
    user.device.write(CONFIG, 0x100, b"\xff" * (PAGE - 0x100))
    assert user.device.read(CONFIG, 0, PAGE) == before


def test_msi_enable_shows_only_while_set_irqs_has_it(user: User, ground: Ground) -> None:
    bell = ground.bell()
    user.set(0x42, 0x0071, CONFIG, 2)
    assert user.get(0x42, CONFIG, 2) == 0x80 | 2 << 1 | 2 << 4, "8 messages were cut to 4, and it is not on"
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.MSI, (bell.number,)))
    user.set(0x42, 0x0001, CONFIG, 2)
    assert user.get(0x42, CONFIG, 2) & 1
    user.device.set_irqs(SetIrqs.disable(PciIrq.MSI))
    assert not user.get(0x42, CONFIG, 2) & 1


@pytest.mark.parametrize("by", ["reset", "function level reset"])
def test_reset(user: User, ground: Ground, by: str) -> None:
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.INTX, (bell.number,)))
    user.master()
    user.set(pci.SCRATCH, 7)
    user.set(pci.IRQ_RAISE, 1)
    user.device.write(PciRegion.BAR2, 0, b"kept")
    assert bell.rung() == 1
    if by == "reset":
        user.device.reset()
    else:
        user.set(0x68, 0x8000, CONFIG, 2)
        assert user.get(0x68, CONFIG, 2) == 0x2810
    assert user.get(pci.ACCESSES) == 0
    assert user.get(pci.SCRATCH) == 0xFFFF_FFFF
    assert user.get(pci.IRQ_STATUS) == 0
    assert user.get(4, CONFIG, 2) == 2
    assert user.device.read(PciRegion.BAR2, 0, 4) == b"kept"
    user.device.set_irqs(SetIrqs.now(IrqAction.UNMASK, PciIrq.INTX))
    assert bell.rung() == 0
    user.set(pci.IRQ_RAISE, 1)
    assert bell.rung() == 1, "the eventfd stays over a reset"


def test_intx_disable_is_the_command_registers(user: User, ground: Ground) -> None:
    bell = ground.bell()
    user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.INTX, (bell.number,)))
    user.set(4, 1 << 10, CONFIG, 2)
    user.set(pci.IRQ_RAISE, 1)
    assert bell.rung() == 0
    user.set(4, 0, CONFIG, 2)
    assert bell.rung() == 1


# --- what it is made of ---------------------------------------------------------------------------------------


def test_regions_and_indexes_are_the_kernels(user: User) -> None:
    info = user.device.device_info()
    assert (info.regions, info.irqs, info.reset) == (9, 5, True)
    sizes = [user.device.region_info(index).size for index in range(8)]
    assert sizes == [PAGE, 0, 1 << 20, 0, 0, 0, 0, PAGE]
    with pytest.raises(OSError) as caught:
        user.device.region_info(PciRegion.VGA)
    assert caught.value.errno == errno.EINVAL


def test_parameters(ground: Ground) -> None:
    user = User(ground, memory=1 << 16, vectors=32, **{"granted-vectors": 3})
    assert user.device.region_info(PciRegion.BAR2).size == 1 << 16
    assert user.get(0x42, CONFIG, 2) == 0x80 | 5 << 1
    bell = ground.bell()
    assert user.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.MSI, (bell.number,) * 32)) == 3
    user.device.close()


@pytest.mark.parametrize(
    "parameters",
    [
        {"memory": 0},
        {"memory": 4097},
        {"memory": 1 << 40},
        {"memory": "1 MiB"},
        {"memory": 1e6},
        {"memory": None},
        {"vectors": True},
        {"vectors": 3},
        {"vectors": 64},
        {"vectors": []},
        {"granted-vectors": 0},
        {"granted-vectors": 9},
        {"msix-vectors": 65},
        {"msix-vectors": -1},
        {"msix-vectors": False},
        {"msix-resizable": 1},
        {"hot-unplug": 1},
    ],
)
def test_bad_parameters_are_named(ground: Ground, parameters: dict[str, Any]) -> None:
    with pytest.raises(OSError, match=f"'{next(iter(parameters))}'") as caught:
        Primer().create(ground.host, UUID, Primer.TYPE, parameters)
    assert caught.value.errno == errno.EINVAL


def test_hot_unplug_can_be_refused(ground: Ground) -> None:
    parent = Primer()
    device = parent.create(ground.host, UUID, Primer.TYPE, {"hot-unplug": False})
    parent.start("vm", [UUID])
    with pytest.raises(OSError, match="mdev-shutdown") as caught:
        parent.destroy(UUID, device, forced=False)
    assert caught.value.errno == errno.EBUSY
    parent.shutdown("vm", [UUID])
    parent.destroy(UUID, device, forced=False)


def test_nothing_a_stranger_writes_breaks_it(user: User, ground: Ground) -> None:
    chance = random.Random(11)
    ground.map(0, 4 * PAGE)
    sizes = {0: PAGE, 2: 1 << 20, 7: PAGE}
    for _ in range(20_000):
        index = chance.choice((0, 0, 0, 2, 7))
        length = chance.choice((1, 2, 4, 4, 4, 8, 3, 64))
        offset = chance.randrange(0, 0x48 if index == 0 else sizes[index] - 64)
        offset = offset & ~3 if chance.random() < 0.8 else offset
        if chance.random() < 0.5:
            assert len(user.device.read(index, offset, length)) == length
        else:
            data = chance.choice(
                (chance.randbytes(length), b"\xff" * length, bytes(length), b"\x07" + bytes(length - 1))
            )
            user.device.write(index, offset, data)
    assert user.get(pci.ID) == 0xF10D_0001
