"""Real platform devices: virtio-mmio transports under the kernel's vfio-platform, first by the backend, then by vfiod.

The balloon is the device with a real level interrupt: once its driver said DRIVER_OK, the host's ``balloon`` command
(QEMU's own monitor, from inside) changes its configuration, and the line stays up until InterruptACK is written.

Rules are those of behaviour.md, sections 1 and 7.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.lab.guest import platform
from tests.lab.guest.machine import qemu
from tests.lab.guest.nics import fired, quiet
from tests.lab.guest.vm import Vm, running_vm, trigger_of
from tests.lab.topologies import VIRTIO_MMIO

from vfiod.client import VectorFds
from vfiod.protocol import vfio
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import OperationFailed, PermissionRefused
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Backend
from vfiod.server.backends.group import KernelGroups
from vfiod.server.backends.origin import GroupOrigin
from vfiod.server.kernel.syscalls import Syscalls

MACHINE = "microvm"

UNMASK, TRIGGER = vfio.IrqAction.UNMASK, vfio.IrqAction.TRIGGER
LEVEL = vfio.IrqFlags.EVENTFD | vfio.IrqFlags.MASKABLE | vfio.IrqFlags.AUTOMASKED
MIB = 1 << 20
MEMORY = 1 << 30


@pytest.fixture(scope="module", autouse=True)
def devices() -> Iterator[None]:
    """Both transports with vfio-platform, as the host's administrator leaves them."""
    qemu()  # keeps files open; a test that counts them would be the first to use it
    with platform.noiommu(), platform.bound(*VIRTIO_MMIO):
        yield


# --- the backend on the real driver -------------------------------------------------------------------------


@contextmanager
def opened(name: str) -> Iterator[Backend]:
    """The device by its group, with nothing of vfiod above the backend."""
    before = sorted(os.listdir("/proc/self/fd"))
    groups = KernelGroups(Syscalls(), lambda space: None, lambda space: None)
    try:
        yield groups.open(GroupOrigin("vfio-platform", host=name, group_fd=group_fd(name), noiommu=True))
    finally:
        groups.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def group_fd(name: str) -> FileDescriptor:
    return FileDescriptor(os.open(platform.group_path(name), os.O_RDWR | os.O_CLOEXEC))


@contextmanager
def eventfd() -> Iterator[int]:
    with FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as fd:
        yield fd.number


def load(device: Backend, register: int) -> int:
    return int.from_bytes(device.region_read(0, register, 4), "little")


def store(device: Backend, register: int, value: int) -> None:
    device.region_write(0, register, value.to_bytes(4, "little"))


def find_balloon() -> str:
    """Which of the two is the balloon: transports are filled in an order of QEMU's own."""
    for name in VIRTIO_MMIO:
        with opened(name) as device:
            if load(device, platform.DEVICE_ID) == platform.BALLOON:
                return name
    raise LookupError("no transport has a balloon")


def let_it_work(device: Backend) -> None:
    """Reset, then what a driver writes. Its queues are not needed to hear of a new size."""
    store(device, platform.STATUS, 0)
    for status in (platform.ACKNOWLEDGE, platform.HAS_DRIVER, platform.DRIVER_OK):
        store(device, platform.STATUS, load(device, platform.STATUS) | status)


_size = [MEMORY]


def resize() -> None:
    """The host wants another size: the balloon's configuration changes."""
    _size[0] = MEMORY - MIB if _size[0] == MEMORY else MEMORY
    qemu().execute("balloon", value=_size[0])


@pytest.mark.parametrize("name", VIRTIO_MMIO)
def test_what_it_has(name: str) -> None:
    with opened(name) as device:
        info = device.info()
        assert info.flags & vfio.DeviceFlags.PLATFORM
        assert (info.num_regions, info.num_irqs) == (1, 1)
        assert device.address_space is None, "noiommu"
        region = device.region_info(0)
        assert (region.size, region.readable, region.writable) == (platform.REGION_SIZE, True, True)
        assert region.areas == (), "half a kilobyte is no page that could be mapped"
        assert device.region_fd(0) is None
        irq = device.irq_info(0)
        assert (irq.flags, irq.count, irq.type, irq.messages) == (LEVEL, 1, None, ())
        for missing in (lambda: device.region_info(1), lambda: device.irq_info(1)):
            with pytest.raises(OperationFailed) as caught:
                missing()
            assert caught.value.errno == "EINVAL"


def test_registers() -> None:
    found = set()
    for name in VIRTIO_MMIO:
        with opened(name) as device:
            assert device.region_read(0, platform.MAGIC, 4) == platform.MAGIC_VALUE
            assert load(device, platform.VERSION) in (1, 2)
            found.add(load(device, platform.DEVICE_ID))
            with pytest.raises(OperationFailed):
                device.region_read(0, platform.REGION_SIZE, 4)
    assert found == {platform.RNG, platform.BALLOON}


def test_a_noiommu_group_only_when_asked_for() -> None:
    groups = KernelGroups(Syscalls(), lambda space: None, lambda space: None)
    try:
        with pytest.raises(PermissionRefused, match="noiommu"):
            groups.open(GroupOrigin("vfio-platform", host=VIRTIO_MMIO[0], group_fd=group_fd(VIRTIO_MMIO[0])))
    finally:
        groups.close()


@pytest.mark.parametrize("name", VIRTIO_MMIO)
def test_the_loopback_masks_as_a_real_interrupt(name: str) -> None:
    """What the mediated device's PlatformIrqs claims of ``vfio_automasked_irq_handler``, the kernel says here."""
    with opened(name) as device, eventfd() as trigger:
        device.set_irqs(vfio.SetIrqs.eventfds(TRIGGER, 0, (trigger,)))
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert fired(trigger) == 1
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert quiet(trigger), "masked"
        device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert fired(trigger) == 1
        device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
        device.set_irqs(vfio.SetIrqs.disable(0))
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert quiet(trigger), "disabled"
        # That loopback masked it: nobody heard it, and the mask outlives the trigger.
        device.set_irqs(vfio.SetIrqs.eventfds(TRIGGER, 0, (trigger,)))
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert quiet(trigger)
        device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
        device.set_irqs(vfio.SetIrqs.now(TRIGGER, 0))
        assert fired(trigger) == 1


def test_a_second_eventfd_for_unmask_is_refused() -> None:
    with opened(VIRTIO_MMIO[0]) as device, eventfd() as unmask:
        device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (unmask,)))
        with pytest.raises(OperationFailed) as caught:
            device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (unmask,)))
        assert caught.value.errno == "EBUSY"
        device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (-1,)))
        device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (unmask,)))
        device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (-1,)))


def test_a_real_level_interrupt() -> None:
    with opened(find_balloon()) as device, eventfd() as trigger, eventfd() as unmask:
        let_it_work(device)
        device.set_irqs(vfio.SetIrqs.eventfds(TRIGGER, 0, (trigger,)))
        for _ in range(2):
            resize()
            assert fired(trigger) == 1
            assert load(device, platform.INTERRUPT_STATUS) & platform.CONFIG_CHANGED
            assert quiet(trigger), "the driver masked it"
            device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
            assert fired(trigger) == 1, "not acknowledged, the line is still up"
            store(device, platform.INTERRUPT_ACK, load(device, platform.INTERRUPT_STATUS))
            device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
            assert quiet(trigger)
        assert load(device, platform.BALLOON_PAGES) == (MEMORY - _size[0]) >> 12
        # The same by the eventfd that a hypervisor signals at the guest's EOI.
        device.set_irqs(vfio.SetIrqs.eventfds(UNMASK, 0, (unmask,)))
        for _ in range(2):
            resize()
            assert fired(trigger) == 1
            store(device, platform.INTERRUPT_ACK, load(device, platform.INTERRUPT_STATUS))
            os.eventfd_write(unmask, 1)
            assert quiet(trigger)
        store(device, platform.STATUS, 0)


def test_a_line_that_is_up_fires_as_soon_as_it_has_a_trigger() -> None:
    with opened(find_balloon()) as device, eventfd() as trigger:
        let_it_work(device)
        resize()
        assert quiet(trigger)
        device.set_irqs(vfio.SetIrqs.eventfds(TRIGGER, 0, (trigger,)))
        assert fired(trigger) == 1
        store(device, platform.INTERRUPT_ACK, load(device, platform.INTERRUPT_STATUS))
        device.set_irqs(vfio.SetIrqs.now(UNMASK, 0))
        store(device, platform.STATUS, 0)


# --- by vfiod -----------------------------------------------------------------------------------------------


class Balloon:
    """The balloon behind a vfiod."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        name = find_balloon()
        with group_fd(name) as group:
            vm.client.device_add(driver="vfio-platform", id="b0", host=name, group_fd=group, x_noiommu=True)

    def load(self, register: int) -> int:
        value = self.vm.client.region_read(device="b0", region=0, offset=register, size=4).value
        assert isinstance(value, int)
        return value

    def store(self, register: int, value: int) -> None:
        self.vm.client.region_write(device="b0", region=0, offset=register, size=4, value=value)

    def let_it_work(self) -> None:
        self.store(platform.STATUS, 0)
        status = 0
        for bit in (platform.ACKNOWLEDGE, platform.HAS_DRIVER, platform.DRIVER_OK):
            status |= bit
            self.store(platform.STATUS, status)

    def irq(self) -> IrqInfo:
        (irq,) = self.vm.client.query_irqs(device="b0")
        return irq

    def state(self) -> str:
        (vector,) = self.irq().vectors
        return vector.state

    def wakeups(self) -> int:
        """How often any thread of vfiod slept and was woken."""
        found = 0
        for task in Path(f"/proc/{self.vm.process.pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    found += int(line.split()[1])
        return found


@pytest.fixture
def balloon(tmp_path: Path) -> Iterator[Balloon]:
    """As root: the kernel wants CAP_SYS_RAWIO of whoever uses a noiommu group."""
    with running_vm(tmp_path, root=True) as vm:
        yield Balloon(vm)
        assert vm.remove("b0")


def test_added_by_its_name(balloon: Balloon) -> None:
    """Section 1: `compatible` is the host's. This one came by the kernel's command line: no node, so null."""
    (device,) = balloon.vm.client.query_devices()
    assert not (platform.device_path(str(device.host)) / "of_node").exists()
    assert device.compatible is None
    (region,) = balloon.vm.client.query_regions(device="b0")
    assert (region.size, region.mappable) == (platform.REGION_SIZE, False)
    irq = balloon.irq()
    assert (irq.count, irq.active, irq.flags.maskable, irq.flags.automasked) == (1, False, True, True)
    assert balloon.load(platform.MAGIC).to_bytes(4, "little") == platform.MAGIC_VALUE
    assert balloon.load(platform.DEVICE_ID) == platform.BALLOON


def test_the_loopback_through_vfiod(balloon: Balloon) -> None:
    started = balloon.vm.client.irq_start(first_number=32)
    assert [(irq.device, irq.index, irq.number, irq.mode) for irq in started.irqs] == [("b0", 0, 32, IrqMode.DIRECT)]
    again = balloon.vm.client.irq_start()
    assert [irq.number for irq in again.irqs] == [32]
    balloon.vm.client.irq_trigger(device="b0", index=0)
    assert fired(trigger_of(started)) == 1
    for answer in (started, again):
        for irq in answer.irqs:
            for fd in (irq.trigger_fd, irq.resample_fd):
                assert isinstance(fd, FileDescriptor)
                fd.close()


def test_a_real_interrupt_relayed_and_completed_by_the_trapped_access(balloon: Balloon) -> None:
    with FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as trigger:
        eventfds = [VectorFds(vector=0, trigger=trigger)]
        balloon.vm.client.irq_start(device="b0", index=0, mode=IrqMode.RELAYED, eventfds=eventfds)
        balloon.let_it_work()
        for times in (1, 2):
            resize()
            assert fired(trigger.number) == 1
            assert (balloon.irq().fired, balloon.state()) == (times, "active")
            assert quiet(trigger.number)
            balloon.store(platform.INTERRUPT_ACK, platform.CONFIG_CHANGED | 1)
            assert balloon.state() == "inactive"
            assert quiet(trigger.number)
        # Looking first is an access, too: it completes, and the line that is still up fires again.
        resize()
        assert fired(trigger.number) == 1
        assert balloon.load(platform.INTERRUPT_STATUS) & platform.CONFIG_CHANGED
        assert fired(trigger.number) == 1
        balloon.store(platform.INTERRUPT_ACK, platform.CONFIG_CHANGED | 1)
        assert (balloon.irq().fired, balloon.irq().delivered, balloon.state()) == (4, 4, "inactive")
        balloon.store(platform.STATUS, 0)
        balloon.vm.client.irq_stop(device="b0")


def test_a_real_interrupt_direct_and_vfiod_sleeps(balloon: Balloon) -> None:
    """Trigger and resample eventfds of a hypervisor: nobody else hears of the interrupt."""
    client = balloon.vm.client
    with ExitStack() as stack:
        trigger, resample = (
            stack.enter_context(FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))) for _ in range(2)
        )
        pair = VectorFds(vector=0, trigger=trigger, resample=resample)
        started = client.irq_start(device="b0", index=0, eventfds=[pair])
        assert started.irqs[0].mode is IrqMode.DIRECT
        balloon.let_it_work()
        resize()
        assert fired(trigger.number) == 1
        before = balloon.wakeups()
        for _ in range(10):
            os.eventfd_write(resample.number, 1)  # an EOI, but nobody acknowledged: the line is still up
            assert fired(trigger.number) == 1
        assert balloon.wakeups() == before
        balloon.store(platform.INTERRUPT_ACK, platform.CONFIG_CHANGED | 1)
        os.eventfd_write(resample.number, 1)
        assert quiet(trigger.number)
        resize()
        assert fired(trigger.number) == 1
        balloon.store(platform.INTERRUPT_ACK, platform.CONFIG_CHANGED | 1)
        assert (balloon.irq().fired, balloon.state()) == (None, "direct")
        balloon.store(platform.STATUS, 0)
        client.irq_stop(device="b0")
