"""The device behind an fd: info, regions, interrupts, reset, features, errors that say where.

Rules are those of behaviour.md, sections 3, 4 and 5.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from tests.unit.server.backends.conftest import PAGE, Host

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Backend, FewerVectors, Mapping
from vfiod.server.devices import rom
from vfiod.server.kernel.memory import RegionWindow, SharedMemory

BAR0, BAR2, CONFIG = vfio.PciRegion.BAR0, vfio.PciRegion.BAR2, vfio.PciRegion.CONFIG
NAME = "0000:01:00.0"


@pytest.fixture
def device(host: Host) -> Iterator[Backend]:
    host.kernel.device(NAME).capabilities = (vfio.UnknownCapability(2, 1, b"x" * 100),)
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    backend.region_write(CONFIG, 4, b"\x06\x00")
    yield backend
    backend.close()


@pytest.fixture
def event() -> Iterator[FileDescriptor]:
    with FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) as fd:
        yield fd


def test_info_is_whole_though_the_first_buffer_is_small(device: Backend) -> None:
    info = device.info()
    assert (info.num_regions, info.num_irqs) == (9, 5)
    (capability,) = info.capabilities
    assert capability.pack().startswith(b"x" * 100)


def test_an_answer_that_always_grows_is_given_up(host: Host) -> None:
    host.kernel.device(NAME).capabilities = (vfio.UnknownCapability(2, 1, bytes(2 << 20)),)
    with pytest.raises(OperationFailed, match=r"VFIO_DEVICE_GET_INFO on 0000:01:00.0 failed with EPROTO"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))


def test_messages_of_a_kernel_that_has_them(host: Host, device: Backend) -> None:
    """Section 7, extended IRQs: asked again with a larger buffer, and each time anew, as messages come and go."""
    index = vfio.PciIrq.REQ
    assert device.irq_info(index).type is None
    kind = vfio.IrqTypeCap(vfio.IrqType.MSI, 0)
    for count in (0, 3, 200):
        messages = tuple(vfio.MsiMessage(0x0802_0040, at) for at in range(count))
        host.kernel.device(NAME).irq_capabilities[index] = (kind, vfio.MsiDescs(messages))
        asked = host.kernel.log.count("VFIO_DEVICE_GET_IRQ_INFO")
        info = device.irq_info(index)
        assert (info.type, info.messages) == (kind, messages)
        assert host.kernel.log.count("VFIO_DEVICE_GET_IRQ_INFO") == asked + 2
    host.kernel.device(NAME).irq_capabilities[index] = (vfio.UnknownCapability(3, 1, b""),)
    with pytest.raises(OperationFailed, match=r"EPROTO.*TYPE has"):
        device.irq_info(index)
    host.kernel.device(NAME).irq_capabilities[index] = (vfio.UnknownCapability(9, 1, bytes(2 << 20)),)
    with pytest.raises(OperationFailed, match=r"EPROTO.*does not fit"):
        device.irq_info(index)


def test_regions(host: Host, device: Backend) -> None:
    assert device.region_info(BAR2).areas == (vfio.Area(0, 1 << 16),)
    asked = host.kernel.log.count("VFIO_DEVICE_GET_REGION_INFO")
    device.region_info(BAR2)
    assert host.kernel.log.count("VFIO_DEVICE_GET_REGION_INFO") == asked, "kept"
    with pytest.raises(OperationFailed, match=r"0000:01:00.0 region 8 failed with EINVAL"):
        device.region_info(vfio.PciRegion.VGA)
    assert not device.region_info(vfio.PciRegion.ROM).present
    assert device.region_fd(vfio.PciRegion.ROM) is None
    assert device.region_read(BAR0, 0, 4) == bytes.fromhex("ed000001")
    device.region_write(BAR0, 4, b"\x0f\0\0\0")
    assert device.region_read(BAR0, 4, 4) == b"\xf0\xff\xff\xff"


def test_a_mapped_region_is_the_same_memory(host: Host, device: Backend) -> None:
    number = device.region_fd(BAR2)
    assert number is not None
    window = RegionWindow(host.kernel, number, device.region_info(BAR2).offset, PAGE)
    window.store(16, 4, 0x11223344)
    assert device.region_read(BAR2, 16, 4) == bytes.fromhex("44332211")
    window.close()


def test_short_and_refused_accesses_say_where(device: Backend) -> None:
    with pytest.raises(OperationFailed, match=r"region 2 \(offset 0xfffe, 4 bytes\) failed with EIO: .* gave 2 bytes"):
        device.region_read(BAR2, 0xFFFE, 4)
    with pytest.raises(OperationFailed, match=r"region 2 \(offset 0xfffe, 4 bytes\) failed with EIO: .* took 2 bytes"):
        device.region_write(BAR2, 0xFFFE, bytes(4))
    with pytest.raises(OperationFailed, match="EINVAL: the region is not there, or the access leaves it"):
        device.region_read(BAR2, 1 << 16, 4)
    device.region_write(CONFIG, 4, b"\0\0")
    with pytest.raises(OperationFailed, match=r"pread on .* failed with EIO: .*command register"):
        device.region_read(BAR0, 0, 4)


def test_msi_by_eventfd_and_loopback(host: Host, device: Backend, event: FileDescriptor) -> None:
    device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI, (event.number,)))
    host.kernel.device(NAME).raise_interrupt()
    assert os.eventfd_read(event.number) == 1
    device.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI))
    assert os.eventfd_read(event.number) == 1
    with pytest.raises(OperationFailed, match=r"interrupt index 0 \(TRIGGER of 0 by EVENTFD\) failed with EINVAL"):
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.INTX, (event.number,)))
    with pytest.raises(OperationFailed, match=r"\(MASK of 0\) failed with ENOTTY"):
        device.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.MASK, vfio.PciIrq.MSI))
    device.set_irqs(vfio.SetIrqs.disable(vfio.PciIrq.MSI))


def test_intx_masks_itself_and_an_unmask_eventfd_brings_it_back(
    host: Host, device: Backend, event: FileDescriptor
) -> None:
    with FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as resample:
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.INTX, (event.number,)))
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.UNMASK, vfio.PciIrq.INTX, (resample.number,)))
        edu = host.kernel.device(NAME)
        edu.raise_interrupt()
        edu.raise_interrupt()
        assert os.eventfd_read(event.number) == 1, "the second finds it masked"
        os.eventfd_write(resample.number, 1)
        host.kernel.device(NAME)
        assert os.eventfd_read(event.number) == 1, "still asserted, so it fires again"
        device.region_write(BAR0, 0x64, b"\x01\0\0\0")
        os.eventfd_write(resample.number, 1)
        assert not host.kernel.device(NAME).masked
        device.set_irqs(vfio.SetIrqs.disable(vfio.PciIrq.INTX))


def test_a_smaller_grant_says_how_many(host: Host) -> None:
    host.kernel.device(NAME).msi_count = 32
    host.kernel.device(NAME).msi_grant = 5
    device = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    request = vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI, (-1,) * 32)
    with pytest.raises(FewerVectors, match="32 vectors were asked for, the host can give 5") as caught:
        device.set_irqs(request)
    assert (caught.value.asked, caught.value.granted, caught.value.errno) == (32, 5, "ENOSPC")
    device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI, (-1,) * 4))
    host.kernel.fail("VFIO_DEVICE_SET_IRQS", errno.ENOSPC)
    with pytest.raises(FewerVectors, match="the host can give fewer") as caught:
        device.set_irqs(request)
    assert (caught.value.asked, caught.value.granted) == (32, None), "an errno says nothing of how many"
    host.kernel.fail("VFIO_DEVICE_SET_IRQS", errno.ENOSPC)
    with pytest.raises(OperationFailed, match="no interrupt vectors left") as refused:
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI, (-1,)))
    assert not isinstance(refused.value, FewerVectors), "there are no fewer than one"
    device.close()


def test_the_device_request(host: Host, device: Backend, event: FileDescriptor) -> None:
    assert not host.kernel.request(NAME)
    device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.REQ, (event.number,)))
    assert host.kernel.request(NAME)
    assert os.eventfd_read(event.number) == 1
    with pytest.raises(OperationFailed, match="EINVAL"):
        device.irq_info(vfio.PciIrq.ERR)


def test_reset(host: Host, device: Backend) -> None:
    device.region_write(BAR0, 4, bytes(4))
    device.reset()
    assert device.region_read(BAR0, 4, 4) == bytes(4)
    assert host.kernel.device(NAME).resets == 1
    host.kernel.fail("VFIO_DEVICE_RESET", errno.EINVAL)
    with pytest.raises(OperationFailed, match=r"VFIO_DEVICE_RESET on 0000:01:00.0.*no reset of its own"):
        device.reset()


def test_features_are_probed(host: Host, device: Backend) -> None:
    assert not device.probe_feature(vfio.Feature.MIGRATION)
    host.kernel.device(NAME).features = frozenset({vfio.Feature.MIGRATION})
    assert device.probe_feature(vfio.Feature.MIGRATION)


def test_features_are_set_and_got(host: Host, device: Backend) -> None:
    asked, flags = vfio.DeviceFeature, vfio.FeatureFlags
    with pytest.raises(OperationFailed, match="feature 10") as caught:
        device.feature(asked(vfio.Feature.BUS_MASTER, flags.PROBE | flags.SET), 0)
    assert caught.value.errno == "ENOTTY"
    host.kernel.device(NAME).features = frozenset({vfio.Feature.BUS_MASTER})
    assert device.feature(asked(vfio.Feature.BUS_MASTER, flags.PROBE | flags.SET), 0) == b""
    assert device.feature(asked(vfio.Feature.BUS_MASTER, flags.SET, b"\1\0\0\0"), 0) == b""
    assert device.feature(asked(vfio.Feature.BUS_MASTER, flags.GET), 4) == b"\1\0\0\0"
    with pytest.raises(OperationFailed, match="EINVAL"):
        device.feature(asked(vfio.Feature.BUS_MASTER, flags.GET), 3)


def test_dma_really_moves_the_guests_memory(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0x10000, 4 * PAGE, memory, PAGE, readonly=False))
    device = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    device.region_write(CONFIG, 4, b"\x06\x00")
    memory.write(PAGE, b"guest")
    for register, value in ((0x80, 0x10000), (0x88, 0x40000), (0x90, 5), (0x98, 1)):
        device.region_write(BAR0, register, value.to_bytes(4, "little"))
    for register, value in ((0x80, 0x40000), (0x88, 0x10100), (0x90, 5), (0x98, 3)):
        device.region_write(BAR0, register, value.to_bytes(4, "little"))
    assert memory.read(PAGE + 0x100, 5) == b"guest"
    device.close()


def test_a_rom_read_that_is_interrupted_or_put_off_goes_on(
    host: Host, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 5: "The ROM is read until zero bytes or full; EINTR and EAGAIN are retried", at the system call."""
    monkeypatch.setattr(rom, "_PAUSE_S", 0)
    image = bytes(range(256)) * (2 * PAGE // 256)
    device.region_write(BAR2, 0, image)
    for number in (errno.EINTR, errno.EAGAIN, errno.EAGAIN):
        host.kernel.fail("pread", number)
    assert rom.read_rom(device, BAR2, 2 * PAGE) == image
    host.kernel.fail("pread", errno.EIO)
    with pytest.raises(OperationFailed, match=r"pread .* EIO"):
        rom.read_rom(device, BAR2, 2 * PAGE)
