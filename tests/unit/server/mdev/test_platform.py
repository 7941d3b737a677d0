"""The built-in platform device: its registers, interrupts and messages, and what a stranger may try."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.vfio import Area, IrqAction, SetIrqs
from vfiod.server.mdev.samples import platform
from vfiod.server.mdev.samples.platform import Platform, PlatformDevice

from .conftest import Bell, Ground

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
TRIGGER = IrqAction.TRIGGER
LEVEL, SECOND, EDGE, MSI = 0, 1, 2, 3


@pytest.fixture
def device(ground: Ground) -> Iterator[PlatformDevice]:
    made = PlatformDevice(ground.host, memory=8192, level=2, edge=1, sources=4)
    made.open()
    yield made
    made.close()
    ground.settle()


def load(device: PlatformDevice, at: int) -> int:
    return int.from_bytes(device.read(0, at, 4), "little")


def store(device: PlatformDevice, at: int, value: int) -> None:
    device.write(0, at, struct.pack("<I", value))


def bind(device: PlatformDevice, index: int, *bells: Bell) -> None:
    assert device.set_irqs(SetIrqs.eventfds(TRIGGER, index, tuple(bell.number for bell in bells))) == 0


def test_what_it_has(device: PlatformDevice) -> None:
    info = device.device_info()
    assert (info.regions, info.irqs, info.reset) == (2, 4, True)
    assert device.region_info(0).areas == ()
    assert device.region_info(1).areas == (Area(0, 8192),)
    assert [device.irq_info(index).automasked for index in range(4)] == [True, True, False, False]
    with pytest.raises(OSError):
        device.region_info(2)


def test_registers(device: PlatformDevice) -> None:
    assert load(device, platform.ID) == platform.IDENTITY
    store(device, platform.SCRATCH, 0x1234_5678)
    assert load(device, platform.SCRATCH) == 0x1234_5678 ^ 0xFFFF_FFFF
    assert load(device, platform.ACCESSES) == 3
    assert load(device, platform.INTERRUPTS) == 2 | 1 << 16
    assert load(device, platform.MSI_SOURCES) == 4
    assert device.read(0, 1, 2) == struct.pack("<I", platform.IDENTITY)[1:3]
    device.write(0, platform.SCRATCH, b"\1")
    device.write(0, platform.SCRATCH + 2, b"\1\2\3\4")
    assert load(device, platform.SCRATCH) == 0x1234_5678 ^ 0xFFFF_FFFF, "neither narrow nor crooked writes are taken"
    device.reset()
    assert load(device, platform.SCRATCH) == 0xFFFF_FFFF


def test_a_level_stays_until_it_is_acknowledged(device: PlatformDevice, ground: Ground) -> None:
    bell = ground.bell()
    bind(device, SECOND, bell)
    store(device, platform.IRQ_RAISE, SECOND)
    assert (bell.rung(), load(device, platform.IRQ_LINES)) == (1, 0b10)
    device.set_irqs(SetIrqs.now(IrqAction.UNMASK, SECOND))
    assert bell.rung() == 1, "not acknowledged"
    store(device, platform.IRQ_ACK, SECOND)
    device.set_irqs(SetIrqs.now(IrqAction.UNMASK, SECOND))
    assert (bell.rung(), load(device, platform.IRQ_LINES)) == (0, 0)
    store(device, platform.IRQ_RAISE, LEVEL)
    device.reset()
    assert load(device, platform.IRQ_LINES) == 0


def test_an_edge_comes_once(device: PlatformDevice, ground: Ground) -> None:
    bell = ground.bell()
    bind(device, EDGE, bell)
    store(device, platform.IRQ_RAISE, EDGE)
    store(device, platform.IRQ_RAISE, EDGE)
    store(device, platform.IRQ_ACK, EDGE)
    assert bell.rung() == 2


def test_a_source_sends_what_it_was_programmed_with(device: PlatformDevice, ground: Ground) -> None:
    bells = [ground.bell(), ground.bell()]
    store(device, platform.MSI_RAISE, 0)
    assert load(device, platform.MSI_LOST) == 1, "not programmed"
    bind(device, MSI, *bells)
    for source, message in ((3, device.irq_info(MSI).messages[1]), (0, device.irq_info(MSI).messages[0])):
        at = platform.MSI_SOURCE + 16 * source
        device.write(0, at, struct.pack("<Q", message.address))
        store(device, at + 8, message.data)
        assert device.read(0, at, 12) == struct.pack("<QI", message.address, message.data)
    store(device, platform.MSI_RAISE, 3)
    assert [bell.rung() for bell in bells] == [0, 1]
    device.set_irqs(SetIrqs.disable(MSI))
    store(device, platform.MSI_RAISE, 3)
    assert load(device, platform.MSI_LOST) == 2


@pytest.mark.parametrize("value", [3, 4, 100, 0xFFFF_FFFF])
def test_numbers_of_nothing_do_nothing(device: PlatformDevice, value: int) -> None:
    for at in (platform.IRQ_RAISE, platform.IRQ_ACK, platform.MSI_RAISE):
        store(device, at, value)
    assert load(device, platform.IRQ_LINES) == 0


def test_every_register_can_be_read_and_written(device: PlatformDevice) -> None:
    for at in range(0, platform.REGISTERS_SIZE, 4):
        store(device, at, 0xFFFF_FFFF)
        load(device, at)
    assert load(device, platform.ID) == platform.IDENTITY


def test_memory_is_the_users_alone(ground: Ground) -> None:
    device = PlatformDevice(ground.host, memory=4096)
    with pytest.raises(OSError):
        device.read(1, 0, 4)
    device.open()
    device.write(1, 0, b"mine")
    number = device.region_fd(1)
    assert number is not None
    assert os.pread(number, 4, 0) == b"mine"
    with pytest.raises(OSError):
        os.ftruncate(number, 0)
    device.close()
    device.open()
    assert device.read(1, 0, 4) == bytes(4)
    device.close()
    assert device.region_fd(1) is None


# --- the parent -----------------------------------------------------------------------------------------


def make(ground: Ground, parameters: dict[str, Any]) -> PlatformDevice:
    return Platform().create(ground.host, UUID, Platform.TYPE, parameters)


def test_parameters(ground: Ground) -> None:
    assert Platform.TYPE.device_api is DeviceApi.VFIO_PLATFORM
    small = make(ground, {"memory": 4096, "level": 0, "edge": 256, "messages": 0})
    assert small.device_info().irqs == 256
    assert small.region_info(1).size == 4096
    assert make(ground, {}).attributes() == {"memory": "65536", "interrupts": "1 level, 1 edge, 8 msi"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"memory": 4095},
        {"memory": 4097},
        {"memory": 1 << 40},
        {"memory": "4096"},
        {"level": -1},
        {"level": 257},
        {"edge": True},
        {"messages": 129},
        {"messages": 2, "granted-messages": 3},
        {"granted-messages": None},
    ],
)
def test_parameters_that_cannot_be(ground: Ground, parameters: dict[str, Any]) -> None:
    with pytest.raises(OSError) as caught:
        make(ground, parameters)
    assert any(f"'{name}'" in str(caught.value) for name in parameters)
