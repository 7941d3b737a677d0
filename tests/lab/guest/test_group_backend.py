"""The kernel-group backend on a real kernel: what the fake of the unit tests claims, the kernel says here.

Rules are those of behaviour.md, section 1.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import select
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from tests.lab.guest import pci
from tests.lab.guest.machine import unprivileged
from tests.lab.topologies import EDU_FUNCTIONS, EDU_PAIR, EDU_PORT, EDU_ROOT, EDU_SHARED, SHARED_NEIGHBOUR

from vfiod.protocol import vfio
from vfiod.protocol.errors import Busy, InvalidArgument, OperationFailed, PermissionRefused
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import AddressSpace, Backend, Mapping
from vfiod.server.backends.checks import possible
from vfiod.server.backends.group import ContainerSource, GroupOrigin, KernelGroups
from vfiod.server.kernel.kinds import group_of_fd, kind_of
from vfiod.server.kernel.memory import RegionWindow, SharedMemory
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls
from vfiod.server.kernel.sysfs import Sysfs

MACHINE = "edu"

BAR0, CONFIG = vfio.PciRegion.BAR0, vfio.PciRegion.CONFIG
IOVA = 0x10_0000
CALLS = Syscalls()


class Guest:
    """The machine's memory: one mapping, replayed into every space."""

    def __init__(self) -> None:
        self.mappings: list[Mapping] = []
        self.spaces: list[AddressSpace] = []

    def attach(self, space: AddressSpace) -> None:
        for mapping in self.mappings:
            space.map(mapping)
        self.spaces.append(space)

    def detach(self, space: AddressSpace) -> None:
        self.spaces.remove(space)


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def groups(guest: Guest) -> Iterator[KernelGroups]:
    before = sorted(os.listdir("/proc/self/fd"))
    groups = KernelGroups(CALLS, guest.attach, guest.detach)
    yield groups
    groups.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not guest.spaces


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd = FileDescriptor(os.memfd_create("ram", os.MFD_CLOEXEC))
    os.ftruncate(fd.number, 16 * PAGE_SIZE)
    memory = SharedMemory(fd, name="ram")
    yield memory
    memory.close()


@contextmanager
def bound(groups: KernelGroups, *addresses: str, driver: str = "vfio-pci") -> Iterator[None]:
    """Have devices bound for a block; lets go of them before they are unbound, for the host would wait for ever."""
    with pci.bound(*addresses, driver=driver):
        try:
            yield
        finally:
            groups.close()


def group_fd(address: str) -> FileDescriptor:
    return FileDescriptor(os.open(f"/dev/vfio/{pci.group_of(address)}", os.O_RDWR | os.O_CLOEXEC))


def origin(address: str, *, passed: bool = True, container: ContainerSource | None = None) -> GroupOrigin:
    fd = group_fd(address) if passed else None
    return GroupOrigin("vfio-pci", host=address, group_fd=fd, container=container)


def new_container() -> FileDescriptor:
    return FileDescriptor(os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC))


def enable(device: Backend) -> None:
    """Memory space and bus master on."""
    device.region_write(CONFIG, 4, struct.pack("<H", 6))


def register(device: Backend, offset: int) -> int:
    return int.from_bytes(device.region_read(BAR0, offset, 4), "little")


def write(device: Backend, offset: int, value: int) -> None:
    device.region_write(BAR0, offset, value.to_bytes(4, "little"))


def fired(fd: FileDescriptor, seconds: float = 20.0) -> int:
    ready, _, _ = select.select([fd.number], [], [], seconds)
    return os.eventfd_read(fd.number) if ready else 0


@pytest.fixture
def event() -> Iterator[FileDescriptor]:
    with FileDescriptor(CALLS.eventfd()) as fd:
        yield fd


# --- one device, all of it ----------------------------------------------------------------
def test_identity_regions_and_interrupt_indexes(groups: KernelGroups) -> None:
    with bound(groups, EDU_ROOT):
        device = groups.open(origin(EDU_ROOT))
        info = device.info()
        assert info.flags & vfio.DeviceFlags.PCI
        assert (info.num_regions, info.num_irqs) == (vfio.VFIO_PCI_NUM_REGIONS, vfio.VFIO_PCI_NUM_IRQS)
        assert device.region_info(BAR0).size == pci.EDU_BAR_SIZE
        assert device.region_info(BAR0).areas == (vfio.Area(0, pci.EDU_BAR_SIZE),)
        assert not device.region_info(vfio.PciRegion.BAR1).present
        with pytest.raises(OperationFailed) as caught:
            device.region_info(vfio.PciRegion.VGA)
        assert caught.value.errno == "EINVAL"
        assert struct.unpack("<HH", device.region_read(CONFIG, 0, 4)) == (pci.EDU_VENDOR, pci.EDU_DEVICE)
        enable(device)
        assert register(device, pci.EDU_ID) == pci.EDU_IDENTITY
        intx = device.irq_info(vfio.PciIrq.INTX)
        assert intx.maskable
        assert intx.automasked
        assert device.irq_info(vfio.PciIrq.MSI).count == 1
        assert device.irq_info(vfio.PciIrq.REQ).count == 1
        with pytest.raises(OperationFailed) as caught:
            device.region_read(BAR0, pci.EDU_BAR_SIZE, 4)
        assert caught.value.errno == "EINVAL"
        with pytest.raises(OperationFailed) as caught:
            device.region_read(BAR0, pci.EDU_BAR_SIZE - 2, 4)
        assert caught.value.errno == "EIO", "a short read"
        assert not device.probe_feature(vfio.Feature.MIGRATION)
        assert device.close()


def test_a_window_reaches_the_registers(groups: KernelGroups) -> None:
    with bound(groups, EDU_ROOT):
        device = groups.open(origin(EDU_ROOT))
        enable(device)
        number = device.region_fd(BAR0)
        assert number is not None
        window = RegionWindow(CALLS, number, device.region_info(BAR0).offset, pci.EDU_BAR_SIZE)
        assert window.load(pci.EDU_ID, 4) == pci.EDU_IDENTITY
        window.store(pci.EDU_LIVENESS, 4, 0x12345678)
        assert window.load(pci.EDU_LIVENESS, 4) == ~0x12345678 & 0xFFFFFFFF
        window.close()
        assert device.close()


def test_msi_and_intx(groups: KernelGroups, event: FileDescriptor) -> None:
    with bound(groups, EDU_ROOT):
        device = groups.open(origin(EDU_ROOT))
        enable(device)
        for index in (vfio.PciIrq.MSI, vfio.PciIrq.INTX):
            device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, index, (event.number,)))
            write(device, pci.EDU_IRQ_RAISE, 1)
            assert fired(event) == 1
            write(device, pci.EDU_IRQ_ACK, 1)
            if index == vfio.PciIrq.INTX:
                device.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.UNMASK, index))
                write(device, pci.EDU_IRQ_RAISE, 2)
                assert fired(event) == 1, "unmasked, so it fires again"
                write(device, pci.EDU_IRQ_ACK, 2)
            device.set_irqs(vfio.SetIrqs.disable(index))
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI, (event.number,)))
        device.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.TRIGGER, vfio.PciIrq.MSI))
        assert fired(event) == 1, "loopback"
        with pytest.raises(OperationFailed) as caught:
            device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.INTX, (event.number,)))
        assert caught.value.errno == "EINVAL", "one kind at a time"
        assert device.close()


def test_dma_there_and_back(groups: KernelGroups, guest: Guest, memory: SharedMemory) -> None:
    guest.mappings.append(Mapping(IOVA, memory.size, memory, 0, readonly=False))
    memory.write(0, b"there and back again" * 10)
    with bound(groups, EDU_ROOT):
        device = groups.open(origin(EDU_ROOT))
        enable(device)
        for source, target, command in (
            (IOVA, pci.EDU_BUFFER, 0),
            (pci.EDU_BUFFER, IOVA + PAGE_SIZE, pci.EDU_DMA_TO_RAM),
        ):
            write(device, pci.EDU_DMA_SOURCE, source)
            write(device, pci.EDU_DMA_DESTINATION, target)
            write(device, pci.EDU_DMA_COUNT, 200)
            write(device, pci.EDU_DMA_COMMAND, pci.EDU_DMA_START | command)
            pci.wait_until(lambda: not register(device, pci.EDU_DMA_COMMAND) & pci.EDU_DMA_START, "the DMA done")
        assert memory.read(PAGE_SIZE, 200) == b"there and back again" * 10
        space = device.address_space
        assert space is not None
        assert space.page_size == PAGE_SIZE
        assert space.iova_ranges()
        with pytest.raises(OperationFailed, match=r"EEXIST.*overlaps"):
            space.map(Mapping(IOVA, PAGE_SIZE, memory, 0, readonly=False))
        outside = space.iova_ranges()[-1][1] + 1
        with pytest.raises(OperationFailed, match="EINVAL"):
            space.map(Mapping(outside, PAGE_SIZE, memory, 0, readonly=False))
        with pytest.raises(OperationFailed, match="EINVAL"):
            space.unmap(IOVA, PAGE_SIZE)
        space.unmap(IOVA, memory.size)
        with pytest.raises(OperationFailed, match="ENOENT"):
            space.unmap(IOVA, memory.size)
        assert device.close()


def test_reset_behind_a_root_port_and_none_on_the_root_bus(groups: KernelGroups) -> None:
    with bound(groups, EDU_PORT, EDU_ROOT):
        device = groups.open(origin(EDU_PORT))
        assert device.info().can_reset
        enable(device)
        write(device, pci.EDU_LIVENESS, 0)
        assert register(device, pci.EDU_LIVENESS) == 0xFFFFFFFF
        device.reset()
        other = groups.open(origin(EDU_ROOT))
        assert not other.info().can_reset
        with pytest.raises(OperationFailed, match=r"VFIO_DEVICE_RESET.*no reset of its own"):
            other.reset()
        assert device.close()
        assert other.close()


# --- groups and containers ---------------------------------------------------------------
def test_two_devices_in_one_group_and_two_groups_in_one_container(groups: KernelGroups) -> None:
    with bound(groups, *EDU_PAIR, EDU_ROOT):
        first = groups.open(origin(EDU_PAIR[0]))
        with pytest.raises(Busy, match="already attached"):
            groups.open(origin(EDU_PAIR[0], passed=False))
        second = groups.open(origin(EDU_PAIR[1], passed=False))
        third = groups.open(origin(EDU_ROOT))
        assert [c.iommu for c in groups.containers()] == ["type1v2"]
        assert groups.containers()[0].groups == [pci.group_of(EDU_PAIR[0]), pci.group_of(EDU_ROOT)]
        assert [d.close() for d in (first, second, third)] == [True, True, True]
        assert groups.containers() == ()
        assert groups.open(origin(EDU_PAIR[0])).close(), "the group can be opened again: it was let go"


def test_a_group_is_open_once_and_a_second_fd_is_refused(groups: KernelGroups) -> None:
    with bound(groups, *EDU_PAIR):
        managers = group_fd(EDU_PAIR[0])
        with pytest.raises(OSError, match="busy"):
            group_fd(EDU_PAIR[0])
        device = groups.open(GroupOrigin("vfio-pci", EDU_PAIR[0], group_fd=managers.duplicate()))
        with pytest.raises(InvalidArgument, match="held here already"):
            groups.open(GroupOrigin("vfio-pci", EDU_PAIR[1], group_fd=managers))
        assert device.close()


def test_not_viable_names_the_neighbour(groups: KernelGroups) -> None:
    with bound(groups, EDU_SHARED):
        with pytest.raises(Busy, match=rf"bound to host drivers: {SHARED_NEIGHBOUR} \(driver virtio-pci\)"):
            groups.open(origin(EDU_SHARED))
        checks = {check.name: check for check in groups.check(origin(EDU_SHARED))}
        assert not checks["viable"].ok
        assert SHARED_NEIGHBOUR in checks["viable"].detail
        pci.unbind(SHARED_NEIGHBOUR)
        try:
            assert groups.open(origin(EDU_SHARED)).close(), "without a driver it does not block"
        finally:
            pci.release(SHARED_NEIGHBOUR)


def test_the_group_of_another_device_is_refused(groups: KernelGroups) -> None:
    with bound(groups, EDU_ROOT, EDU_PORT), pytest.raises(InvalidArgument, match="but host device"):
        groups.open(GroupOrigin("vfio-pci", EDU_ROOT, group_fd=group_fd(EDU_PORT)))


def test_not_bound_to_vfio(groups: KernelGroups) -> None:
    allowed = KernelGroups(CALLS, lambda _: None, lambda _: None, allow_open=True)
    with pytest.raises(OperationFailed, match=r"open on /dev/vfio/.*ENOENT: bind"):
        allowed.open(origin(EDU_ROOT, passed=False))
    with pytest.raises(PermissionRefused, match="--allow-open"):
        groups.open(origin(EDU_ROOT, passed=False))
    with bound(groups, EDU_FUNCTIONS[0]), pytest.raises(OperationFailed, match=r"GET_DEVICE_FD.*ENODEV.*not bound"):
        groups.open(GroupOrigin("vfio-pci", EDU_FUNCTIONS[1], group_fd=group_fd(EDU_FUNCTIONS[0])))
    with bound(groups, EDU_ROOT):
        assert allowed.open(origin(EDU_ROOT, passed=False)).close()


def test_passed_containers(groups: KernelGroups) -> None:
    with bound(groups, EDU_ROOT, EDU_PORT, *EDU_PAIR):
        managers = new_container()
        same = [ContainerSource(managers.duplicate(), f"c{n}") for n in range(3)]
        first = groups.open(origin(EDU_ROOT, container=same[0]))
        second = groups.open(origin(EDU_PAIR[0], container=same[1]))
        third = groups.open(origin(EDU_PAIR[1], passed=False, container=same[2]))
        assert len(groups.containers()) == 1
        assert third.close()
        with pytest.raises(InvalidArgument, match="another container"):
            groups.open(origin(EDU_PAIR[1], passed=False, container=ContainerSource(new_container(), "c9")))
        assert first.close()
        assert second.close()
        managers.close()


def test_a_container_set_up_by_somebody_else_is_refused(groups: KernelGroups) -> None:
    with bound(groups, EDU_ROOT, EDU_PORT):
        container, foreign = new_container(), group_fd(EDU_PORT)
        fcntl.ioctl(foreign.number, vfio.GroupIoctl.VFIO_GROUP_SET_CONTAINER, struct.pack("=i", container.number))
        fcntl.ioctl(container.number, vfio.ContainerIoctl.VFIO_SET_IOMMU, vfio.Extension.TYPE1v2_IOMMU)
        with pytest.raises(Busy, match="set up by somebody else"):
            groups.open(origin(EDU_ROOT, container=ContainerSource(container, "c0")))
        with pytest.raises(Busy, match="in a container that is not this machine's"):
            groups.open(GroupOrigin("vfio-pci", EDU_PORT, group_fd=foreign))


# --- an fd given out ---------------------------------------------------------------------
@pytest.mark.parametrize("held_by", ["fd", "mapping"])
def test_a_group_lingers_and_is_taken_up_again(
    groups: KernelGroups, guest: Guest, memory: SharedMemory, held_by: str
) -> None:
    guest.mappings.append(Mapping(IOVA, memory.size, memory, 0, readonly=False))
    with bound(groups, EDU_PORT):
        device = groups.open(origin(EDU_PORT))
        number = device.region_fd(BAR0)
        assert number is not None
        outside: FileDescriptor | mmap.mmap = FileDescriptor.duplicate_of(number)
        if held_by == "mapping":
            outside.close()
            outside = mmap.mmap(number, PAGE_SIZE, offset=device.region_info(BAR0).offset)
        with closing(outside):
            device.give_out()
            assert device.close() is False
            assert groups.lingering == (pci.group_of(EDU_PORT),)
            assert groups.sweep() == ()
            again = groups.open(origin(EDU_PORT, passed=False))
            assert not groups.lingering
            assert len(guest.spaces) == 1
            again.give_out()
            assert again.close() is False
        assert groups.sweep() == (pci.group_of(EDU_PORT),)
        assert groups.fds() == ()
        assert groups.open(origin(EDU_PORT)).close()


def test_host_unbind_while_held_asks_and_completes(groups: KernelGroups, event: FileDescriptor) -> None:
    pci.bind(EDU_PORT)
    try:
        device = groups.open(origin(EDU_PORT))
        device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, vfio.PciIrq.REQ, (event.number,)))
        unbinding = threading.Thread(target=pci.unbind, args=(EDU_PORT,))
        unbinding.start()
        assert fired(event) >= 1
        assert unbinding.is_alive(), "the host waits for the device"
        assert device.close()
        unbinding.join(60)
        assert not unbinding.is_alive()
    finally:
        pci.release(EDU_PORT)


# --- limits and the dry run --------------------------------------------------------------
LIMITED = """
import json, os, sys
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.group import ContainerSource, GroupOrigin, KernelGroups
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.kernel.syscalls import Syscalls
address, group, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = FileDescriptor(os.memfd_create("ram"))
os.ftruncate(fd.number, size)
memory = SharedMemory(fd, name="ram")
groups = KernelGroups(
    Syscalls(), lambda s: s.map(Mapping(0, size, memory, 0, False)), lambda s: None, mapped_bytes=lambda: size
)
origin = lambda: GroupOrigin("vfio-pci", address, group_fd=FileDescriptor.duplicate_of(group))
checks = {c.name: [c.ok, c.detail] for c in groups.check(origin())}
try:
    error, device = None, groups.open(origin())
except CommandError as refused:
    error, device = [refused.errno, str(refused)], None
locked = Syscalls().memory_locked()
released = device.close() if device else None
print(json.dumps({"checks": checks, "error": error, "locked": locked, "released": released}))
"""


def limited(address: str, size: int, memlock: int) -> dict[str, Any]:
    with group_fd(address) as group:
        process = unprivileged(
            [sys.executable, "-c", LIMITED, address, str(group.number), str(size)],
            memlock=memlock,
            pass_fds=(group.number,),
            stdout=-1,
        )
        with process:
            out, _ = process.communicate(timeout=100)
        assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_an_unprivileged_server_within_its_memory_lock_limit() -> None:
    with pci.bound(EDU_ROOT):
        found = limited(EDU_ROOT, 4 << 20, 8 << 20)
    assert found["error"] is None
    assert found["locked"] == 4 << 20, "VFIO's pinned pages count as locked"
    assert found["released"] is True
    assert found["checks"]["memory-lock"][0] is True


def test_a_memory_lock_limit_too_low_is_named_and_foretold() -> None:
    with pci.bound(EDU_ROOT):
        found = limited(EDU_ROOT, 4 << 20, 1 << 20)
    errno_name, text = found["error"]
    assert errno_name == "ENOMEM"
    assert f"RLIMIT_MEMLOCK is {1 << 20} bytes" in text
    assert f"needs {4 << 20} more" in text
    ok, detail = found["checks"]["memory-lock"]
    assert not ok
    assert f"raise it to {4 << 20}" in detail


def test_the_dry_run_says_yes_and_changes_nothing(groups: KernelGroups) -> None:
    with bound(groups, EDU_PORT, EDU_ROOT):
        checks = groups.check(origin(EDU_PORT))
        assert possible(checks)
        assert all(check.ok for check in checks), checks
        assert groups.fds() == ()
        status = bytearray(vfio.GroupStatus().pack())
        with group_fd(EDU_PORT) as group:
            fcntl.ioctl(group.number, vfio.GroupIoctl.VFIO_GROUP_GET_STATUS, status)
        assert vfio.GroupStatus.unpack(bytes(status)).flags == vfio.GroupFlags.VIABLE
        reset = {check.name: check for check in groups.check(origin(EDU_ROOT))}["reset"]
        assert not reset.ok
        assert possible(groups.check(origin(EDU_ROOT)))
        assert Sysfs(CALLS).interrupt_remapping().detail == "interrupt remapping is on"


def test_every_kind_of_fd_is_recognised(groups: KernelGroups, event: FileDescriptor) -> None:
    with bound(groups, EDU_ROOT):
        with FileDescriptor(os.open(pci.vfio_cdev(EDU_ROOT), os.O_RDWR | os.O_CLOEXEC)) as cdev:
            assert kind_of(cdev.number) is FdKind.VFIO_DEVICE
        with FileDescriptor(os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)) as iommufd:
            assert kind_of(iommufd.number) is FdKind.IOMMUFD
        device = groups.open(origin(EDU_ROOT))
        assert [kind_of(held.number) for held in groups.fds()] == [held.kind for held in groups.fds()]
        assert group_of_fd(groups.fds()[1].number, CALLS) == (pci.group_of(EDU_ROOT), False)
        assert kind_of(event.number) is FdKind.EVENTFD
        assert device.close()
    with FileDescriptor(os.open("/dev/null", os.O_RDWR)) as null:
        assert kind_of(null.number) is FdKind.CHARACTER_DEVICE
        assert group_of_fd(null.number, CALLS) is None


def test_the_same_open_file_is_recognised() -> None:
    one, other = new_container(), new_container()
    with one, other, one.duplicate() as again:
        assert CALLS.same_file(one.number, again.number) is True
        assert CALLS.same_file(one.number, other.number) is False


def test_a_container_without_an_iommu_answers_einval() -> None:
    """How a container that somebody else has set up is told from a fresh one."""
    with new_container() as container, pytest.raises(OSError, match="Invalid argument"):
        fcntl.ioctl(container.number, vfio.ContainerIoctl.VFIO_IOMMU_GET_INFO, bytearray(24))
