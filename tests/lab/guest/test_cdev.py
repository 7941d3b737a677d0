"""cdevs and iommufd on the real kernel, as backends and through an unprivileged vfiod.

Rules are those of behaviour.md, by section; what the fake kernel of the unit tests claims, the kernel says here.

Rules are those of behaviour.md, sections 1 and 2.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.vm import Vm, opened, opened_group, running_vm
from tests.lab.topologies import EDU_FUNCTIONS, EDU_PAIR, EDU_PORT, EDU_ROOT, EDU_SHARED, SHARED_NEIGHBOUR

from vfiod.protocol import vfio
from vfiod.protocol.errors import Busy, InvalidArgument, OperationFailed, RemoteError
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import AddressSpace, Backend, Mapping
from vfiod.server.backends.cdev import CdevOrigin, IommufdSource, KernelCdevs
from vfiod.server.backends.checks import possible
from vfiod.server.backends.group import GroupOrigin, KernelGroups
from vfiod.server.kernel.kinds import cdev_of_fd, kind_of
from vfiod.server.kernel.memory import RegionWindow, SharedMemory
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

MACHINE = "edu"

BAR0, CONFIG = vfio.PciRegion.BAR0, vfio.PciRegion.CONFIG
INTX, MSI = vfio.PciIrq.INTX, vfio.PciIrq.MSI
IOVA = 0x10_0000
TEXT = b"there and back again" * 10


class Watched(Syscalls):
    """The kernel, and a note of what was asked; a kernel before Linux 6.13 when ``old``."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.old = False

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        self.asked.append(request)
        if self.old and request == vfio.IommufdIoctl.IOMMU_IOAS_MAP_FILE:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return super().ioctl(fd, request, argument)


class Guest:
    """The machine's memory: replayed into every space."""

    def __init__(self) -> None:
        self.mappings: list[Mapping] = []
        self.spaces: list[AddressSpace] = []
        self.refuses = False

    def attach(self, space: AddressSpace) -> None:
        if self.refuses:
            raise InvalidArgument("no")
        for mapping in self.mappings:
            space.map(mapping)
        self.spaces.append(space)

    def detach(self, space: AddressSpace) -> None:
        self.spaces.remove(space)


class Host:
    """Both interfaces on one guest, and one iommufd."""

    def __init__(self) -> None:
        self.calls = Watched()
        self.guest = Guest()
        self.groups = KernelGroups(
            self.calls, self.guest.attach, self.guest.detach, open_by_cdev=lambda number: self.cdevs.in_group(number)
        )
        self.cdevs = KernelCdevs(
            self.calls, self.guest.attach, self.guest.detach, group_in_use=self.groups.in_use, allow_open=True
        )
        self.iommufd = FileDescriptor(os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC))

    def origin(self, address: str, fd: FileDescriptor | None = None, *, here: bool = False) -> CdevOrigin:
        source = IommufdSource("iommufd0", self.iommufd)
        if here:
            return CdevOrigin("vfio-pci", source, host=address)
        return CdevOrigin("vfio-pci", source, fd=fd or cdev_fd(address))

    def close(self) -> None:
        self.groups.close()
        self.cdevs.close()

    @contextmanager
    def bound(self, *addresses: str) -> Iterator[None]:
        """Have devices bound; lets go of them before they are unbound, for the host would wait for ever."""
        with pci.bound(*addresses):
            try:
                yield
            finally:
                self.close()


def cdev_fd(address: str) -> FileDescriptor:
    return FileDescriptor(os.open(pci.vfio_cdev(address), os.O_RDWR | os.O_CLOEXEC))


def group_fd(address: str) -> FileDescriptor:
    return FileDescriptor(os.open(f"/dev/vfio/{pci.group_of(address)}", os.O_RDWR | os.O_CLOEXEC))


@pytest.fixture
def host() -> Iterator[Host]:
    before = sorted(os.listdir("/proc/self/fd"))
    host = Host()
    yield host
    host.close()
    host.iommufd.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not host.guest.spaces


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd = FileDescriptor(os.memfd_create("ram", os.MFD_CLOEXEC))
    os.ftruncate(fd.number, 16 * PAGE_SIZE)
    memory = SharedMemory(fd, name="ram")
    yield memory
    memory.close()


@pytest.fixture
def event() -> Iterator[FileDescriptor]:
    with FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) as fd:
        yield fd


def enable(device: Backend) -> None:
    """Memory space and bus master on."""
    device.region_write(CONFIG, 4, struct.pack("<H", 6))


def register(device: Backend, offset: int) -> int:
    return int.from_bytes(device.region_read(BAR0, offset, 4), "little")


def write(device: Backend, offset: int, value: int) -> None:
    device.region_write(BAR0, offset, value.to_bytes(4, "little"))


def transfer(device: Backend, source: int, target: int, count: int, command: int = 0) -> None:
    write(device, pci.EDU_DMA_SOURCE, source)
    write(device, pci.EDU_DMA_DESTINATION, target)
    write(device, pci.EDU_DMA_COUNT, count)
    write(device, pci.EDU_DMA_COMMAND, pci.EDU_DMA_START | command)
    pci.wait_until(lambda: not register(device, pci.EDU_DMA_COMMAND) & pci.EDU_DMA_START, "the DMA done")


def there_and_back(device: Backend, memory: SharedMemory, iova: int = IOVA) -> bytes:
    memory.write(0, TEXT)
    transfer(device, iova, pci.EDU_BUFFER, len(TEXT))
    transfer(device, pci.EDU_BUFFER, iova + PAGE_SIZE, len(TEXT), pci.EDU_DMA_TO_RAM)
    return memory.read(PAGE_SIZE, len(TEXT))


def fired(fd: FileDescriptor, seconds: float = 20.0) -> int:
    ready, _, _ = select.select([fd.number], [], [], seconds)
    return os.eventfd_read(fd.number) if ready else 0


def code(call: object, *arguments: object) -> str | None:
    """The errno a call is refused with."""
    with pytest.raises(OperationFailed) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.errno


# --- section 1: "Modern path: bind the cdev to the iommufd, attach an IOAS, then as above" -----------------------


def test_identity_regions_and_interrupts(host: Host, event: FileDescriptor) -> None:
    with host.bound(EDU_ROOT):
        fd = cdev_fd(EDU_ROOT)
        assert kind_of(fd.number) is FdKind.VFIO_DEVICE
        assert kind_of(host.iommufd.number) is FdKind.IOMMUFD
        cdev = cdev_of_fd(fd.number, host.calls)
        assert cdev is not None
        assert cdev.name == pci.vfio_cdev(EDU_ROOT).name
        device = host.cdevs.open(host.origin(EDU_ROOT, fd))
        assert (device.name, device.kind, device.group) == (EDU_ROOT, "kernel-cdev", None)
        assert struct.unpack("<HH", device.region_read(CONFIG, 0, 4)) == (pci.EDU_VENDOR, pci.EDU_DEVICE)
        enable(device)
        assert register(device, pci.EDU_ID) == pci.EDU_IDENTITY
        number = device.region_fd(BAR0)
        assert number is not None
        window = RegionWindow(host.calls, number, device.region_info(BAR0).offset, pci.EDU_BAR_SIZE)
        window.store(pci.EDU_LIVENESS, 4, 0x12345678)
        assert window.load(pci.EDU_LIVENESS, 4) == ~0x12345678 & 0xFFFFFFFF
        window.close()
        for index in (MSI, INTX):
            device.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, index, (event.number,)))
            write(device, pci.EDU_IRQ_RAISE, 1)
            assert fired(event) == 1
            write(device, pci.EDU_IRQ_ACK, 1)
            device.set_irqs(vfio.SetIrqs.disable(index))
        assert device.close(), "the kernel let it go"
        assert host.cdevs.ioases() == ()
        assert host.cdevs.open(host.origin(EDU_ROOT, here=True)).close(), "and it can be had again, opened here"


@pytest.mark.parametrize("old", [False, True], ids=["by-file", "by-address"])
def test_dma_by_both_mapping_kinds(host: Host, memory: SharedMemory, old: bool) -> None:
    """Section 2: "iommufd can map a memfd or hugetlbfs file itself: preferred when the file allows it, else mmap"."""
    host.calls.old = old
    host.guest.mappings.append(Mapping(IOVA, memory.size, memory, 0, readonly=False))
    with host.bound(EDU_ROOT):
        device = host.cdevs.open(host.origin(EDU_ROOT))
        enable(device)
        assert there_and_back(device, memory) == TEXT
        assert (vfio.IommufdIoctl.IOMMU_IOAS_MAP in host.calls.asked) is old
        assert vfio.IommufdIoctl.IOMMU_IOAS_MAP_FILE in host.calls.asked
        assert device.close()


def test_a_file_that_is_no_shared_memory_is_mapped_by_address(host: Host, tmp_path: Path) -> None:
    """A file the kernel cannot map as such (EINVAL): found out once, then by its address."""
    candidates = [path for path in (Path("/"), Path("/root"), Path("/opt"), tmp_path) if os.access(path, os.W_OK)]
    with host.bound(EDU_ROOT):
        device = host.cdevs.open(host.origin(EDU_ROOT))
        space = device.address_space
        assert space is not None
        for folder in candidates:
            path = folder / "vfiod-lab-ram"
            path.write_bytes(bytes(4 * PAGE_SIZE))
            memory = SharedMemory(FileDescriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC)), name=str(path))
            try:
                for page in range(2):
                    host.calls.asked.clear()
                    mapping = Mapping(IOVA + page * PAGE_SIZE, PAGE_SIZE, memory, page * PAGE_SIZE, readonly=False)
                    try:
                        space.map(mapping)
                    except OperationFailed as refusal:
                        assert refusal.operation == "IOMMU_IOAS_MAP", "a file system without long-term pinning"
                        break
                    tried = vfio.IommufdIoctl.IOMMU_IOAS_MAP_FILE in host.calls.asked
                    by_address = vfio.IommufdIoctl.IOMMU_IOAS_MAP in host.calls.asked
                    assert (tried, by_address) in ((True, False), (True, page == 0), (False, True))
                    space.unmap(mapping.iova, PAGE_SIZE)
            finally:
                memory.close()
                path.unlink()
        assert device.close()


def test_ranges_overlaps_alignment_and_read_only(host: Host, memory: SharedMemory) -> None:
    """Section 2: what cannot be mapped is refused and leaves the state before; "read-only stays read-only"."""
    with host.bound(EDU_ROOT):
        device = host.cdevs.open(host.origin(EDU_ROOT))
        enable(device)
        space = device.address_space
        assert space is not None
        assert space.page_size == PAGE_SIZE
        ranges = space.iova_ranges()
        assert ranges
        assert not any(low <= 0xFEE00000 <= high for low, high in ranges), "the window of MSI is reserved"
        space.map(Mapping(IOVA, memory.size, memory, 0, readonly=True))
        assert code(space.map, Mapping(IOVA + PAGE_SIZE, PAGE_SIZE, memory, 0, False)) in ("EADDRINUSE", "EEXIST")
        assert code(space.map, Mapping(0x20_0800, PAGE_SIZE, memory, 0, False)) == "EINVAL"
        assert code(space.map, Mapping(0xFEE00000, PAGE_SIZE, memory, 0, False)) is not None
        assert code(space.unmap, IOVA, PAGE_SIZE) == "ENOENT", "it would split"
        assert there_and_back(device, memory) == bytes(len(TEXT)), "the device could not write"
        space.unmap(IOVA, memory.size)
        assert code(space.unmap, IOVA, memory.size) == "ENOENT"
        space.map(Mapping(IOVA, memory.size, memory, 0, readonly=False))
        assert there_and_back(device, memory) == TEXT
        assert device.close()


def test_devices_share_an_ioas_and_the_last_one_out_destroys_it(host: Host, memory: SharedMemory) -> None:
    """Section 1: "attach an IOAS (reuse the machine's, when compatible)"."""
    host.guest.mappings.append(Mapping(IOVA, memory.size, memory, 0, readonly=False))
    with host.bound(EDU_ROOT, EDU_PORT, *EDU_PAIR):
        devices = [host.cdevs.open(host.origin(address)) for address in (EDU_ROOT, EDU_PORT, *EDU_PAIR)]
        (ioas,) = host.cdevs.ioases()
        assert ioas.devices == (EDU_ROOT, EDU_PORT, *EDU_PAIR)
        assert len(host.guest.spaces) == 1
        for device in devices:
            enable(device)
            assert there_and_back(device, memory) == TEXT
        assert [device.close() for device in devices] == [True] * 4
        assert host.cdevs.ioases() == ()


def test_both_interfaces_at_once(host: Host, memory: SharedMemory) -> None:
    """Section 1: "Both paths may serve devices of one machine at once"."""
    host.guest.mappings.append(Mapping(IOVA, memory.size, memory, 0, readonly=False))
    with host.bound(EDU_ROOT, EDU_PORT):
        one = host.cdevs.open(host.origin(EDU_ROOT))
        other = host.groups.open(GroupOrigin("vfio-pci", EDU_PORT, group_fd=group_fd(EDU_PORT)))
        assert len(host.guest.spaces) == 2
        for device in (one, other):
            enable(device)
            assert there_and_back(device, memory) == TEXT
        assert one.close()
        assert other.close()


def test_one_group_is_never_used_through_both_interfaces(host: Host) -> None:
    """Section 1: "One group is used by one of the two kernel interfaces, never both"."""
    with host.bound(*EDU_PAIR):
        device = host.cdevs.open(host.origin(EDU_PAIR[0]))
        with pytest.raises(OSError, match="busy"):
            group_fd(EDU_PAIR[1])
        with pytest.raises(Busy, match="never used through both"):
            host.groups.open(GroupOrigin("vfio-pci", EDU_PAIR[1]))
        assert device.close()
        fd = group_fd(EDU_PAIR[0])
        with pytest.raises(OperationFailed, match=r"BIND_IOMMUFD.*EBUSY.*never used through both"):
            host.cdevs.open(host.origin(EDU_PAIR[1]))
        by_group = host.groups.open(GroupOrigin("vfio-pci", EDU_PAIR[0], group_fd=fd))
        with pytest.raises(Busy, match="held here through its group file"):
            host.cdevs.open(host.origin(EDU_PAIR[1]))
        number = by_group.region_fd(BAR0)
        assert number is not None
        with pytest.raises(InvalidArgument, match="is not the fd of a cdev"):
            host.cdevs.open(host.origin(EDU_PAIR[1], FileDescriptor.duplicate_of(number)))
        assert by_group.close()


def test_a_cdev_that_is_bound_or_open_elsewhere_is_refused(host: Host) -> None:
    with host.bound(EDU_ROOT):
        foreign = FileDescriptor(os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC))
        fd = cdev_fd(EDU_ROOT)
        host.calls.ioctl(
            fd.number,
            vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD,
            bytearray(vfio.BindIommufd(foreign.number).pack()),
        )
        with pytest.raises(Busy, match="bound to an iommufd already"):
            host.cdevs.open(host.origin(EDU_ROOT, fd.duplicate()))
        with pytest.raises(OperationFailed, match=r"EINVAL.*open elsewhere"):
            host.cdevs.open(host.origin(EDU_ROOT))
        checks = host.cdevs.check(host.origin(EDU_ROOT, fd))
        assert not possible(checks)
        foreign.close()
        device = host.cdevs.open(host.origin(EDU_ROOT))
        with pytest.raises(Busy, match="already attached"):
            host.cdevs.open(host.origin(EDU_ROOT))
        assert device.close()


def test_what_fails_after_the_bind_can_be_tried_again_with_the_same_file(host: Host) -> None:
    """ "Failing leaves the names": the kernel cannot unbind, so the file that stays bound is taken up again."""
    with host.bound(EDU_ROOT):
        managers = cdev_fd(EDU_ROOT)
        host.guest.refuses = True
        with pytest.raises(InvalidArgument, match="no"):
            host.cdevs.open(host.origin(EDU_ROOT, managers.duplicate()))
        assert host.cdevs.ioases() == ()
        host.guest.refuses = False
        device = host.cdevs.open(host.origin(EDU_ROOT, managers.duplicate()))
        enable(device)
        assert register(device, pci.EDU_ID) == pci.EDU_IDENTITY
        assert device.close() is False, "the manager's fd still holds it"
        again = host.cdevs.open(host.origin(EDU_ROOT, managers))
        assert again.close()


def test_not_viable_names_the_neighbour(host: Host) -> None:
    """Section 1: "name the devices of the group that are still bound to host drivers"."""
    with host.bound(EDU_SHARED):
        with pytest.raises(OperationFailed, match=rf"EPERM.*{SHARED_NEIGHBOUR} \(driver virtio-pci\)"):
            host.cdevs.open(host.origin(EDU_SHARED))
        checks = {check.name: check for check in host.cdevs.check(host.origin(EDU_SHARED))}
        assert not checks["viable"].ok
        assert SHARED_NEIGHBOUR in checks["viable"].detail


def test_dry_run_changes_nothing(host: Host) -> None:
    with host.bound(EDU_PORT):
        checks = host.cdevs.check(host.origin(EDU_PORT))
        assert possible(checks), checks
        assert host.cdevs.open(host.origin(EDU_PORT)).close()


def test_host_unbind_while_held_asks_and_completes(host: Host, event: FileDescriptor) -> None:
    """Section 1: "A host unbind must never hang"."""
    pci.bind(EDU_PORT)
    try:
        device = host.cdevs.open(host.origin(EDU_PORT))
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


# --- section 6: the primitives of hot reset ----------------------------------------------------------------------


def test_hot_reset_by_cdev(host: Host) -> None:
    """Section 6: "with cdevs: allowed only when DEV_ID_OWNED, zero-length fd array. The two do not mix"."""
    first, second = EDU_FUNCTIONS
    with host.bound(first, second):
        one = host.cdevs.open(host.origin(first))
        info = one.hot_reset_info()
        assert info.flags & vfio.HotResetFlags.DEV_ID
        assert [entry.address for entry in info.devices] == [first, second]
        same_group = pci.group_of(first) == pci.group_of(second)
        assert info.devices[0].devid > 0
        assert info.devices[1].devid == (vfio.VFIO_PCI_DEVID_OWNED if same_group else vfio.VFIO_PCI_DEVID_NOT_OWNED)
        assert bool(info.flags & vfio.HotResetFlags.DEV_ID_OWNED) is same_group
        two = host.cdevs.open(host.origin(second))
        info = one.hot_reset_info()
        assert info.flags & vfio.HotResetFlags.DEV_ID_OWNED
        assert all(entry.devid > 0 for entry in info.devices)
        for device in (one, two):
            enable(device)
        one.hot_reset(())  # edu itself remembers nothing that a reset would clear
        for device in (one, two):
            enable(device)
            assert register(device, pci.EDU_ID) == pci.EDU_IDENTITY
        assert code(one.hot_reset, (host.iommufd.number,)) == "EINVAL"
        assert one.close()
        assert two.close()


def test_hot_reset_by_group(host: Host) -> None:
    first, second = EDU_FUNCTIONS
    with host.bound(first, second):
        one = host.groups.open(GroupOrigin("vfio-pci", first, group_fd=group_fd(first)))
        info = one.hot_reset_info()
        assert not info.flags
        groups = [pci.group_of(first), pci.group_of(second)]
        assert [(entry.address, entry.group_id) for entry in info.devices] == list(
            zip(EDU_FUNCTIONS, groups, strict=True)
        )
        assert code(one.hot_reset, ()) == "EINVAL"
        number = host.groups.group_fd(groups[0])
        assert number is not None
        if groups[0] == groups[1]:
            one.hot_reset((number,))
        else:
            assert code(one.hot_reset, (number,)) == "EINVAL"
            with group_fd(second) as lent:
                one.hot_reset((number, lent.number))
        assert one.close()


def test_no_hot_reset_on_the_root_bus(host: Host) -> None:
    with host.bound(EDU_ROOT):
        device = host.cdevs.open(host.origin(EDU_ROOT))
        assert code(device.hot_reset_info) == "ENODEV"
        assert device.close()


# --- the whole: root opens and passes, an unprivileged vfiod serves ----------------------------------------------


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    with running_vm(tmp_path) as running:
        yield running


def add_cdev(vm: Vm, address: str, name: str, iommufd: str = "iommufd0", *, dry_run: bool = False) -> object:
    with cdev_fd(address) as fd:
        arguments = {"driver": "vfio-pci", "id": name, "fd": "cdev", "iommufd": iommufd, "x-dry-run": dry_run}
        return vm.client.execute("device_add", arguments, fds={"cdev": fd})


def add_iommufd(vm: Vm, name: str = "iommufd0") -> None:
    with opened("/dev/iommu") as fd:
        vm.client.execute("object-add", {"qom-type": "iommufd", "id": name, "fd": "iommu"}, fds={"iommu": fd})


def vm_dma(vm: Vm, name: str, ram: int) -> bytes:
    vm.let_it_work(name)
    os.pwrite(ram, TEXT, 0)
    os.pwrite(ram, bytes(len(TEXT)), PAGE_SIZE)
    for source, target, command in (
        (IOVA, pci.EDU_BUFFER, 0),
        (pci.EDU_BUFFER, IOVA + PAGE_SIZE, pci.EDU_DMA_TO_RAM),
    ):
        vm.write(name, pci.EDU_DMA_SOURCE, source, 8)
        vm.write(name, pci.EDU_DMA_DESTINATION, target, 8)
        vm.write(name, pci.EDU_DMA_COUNT, len(TEXT), 8)
        vm.write(name, pci.EDU_DMA_COMMAND, pci.EDU_DMA_START | command, 8)
        pci.wait_until(lambda: not vm.read(name, pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "the DMA done")
    return os.pread(ram, len(TEXT), PAGE_SIZE)


def test_vfiod_serves_both_interfaces_at_once(vm: Vm) -> None:
    before = vm.fds()
    with vm.bound(EDU_ROOT, EDU_PORT):
        add_iommufd(vm)
        ram = os.memfd_create("ram")
        os.ftruncate(ram, 1 << 20)
        vm.client.dma_map(iova=IOVA, size=1 << 20, fd=ram)
        add_cdev(vm, EDU_ROOT, "cdev")
        vm.add(EDU_PORT, "group")
        first, second = vm.client.query_devices()
        assert (first.id, first.backend, first.host) == ("cdev", "kernel-cdev", EDU_ROOT)
        assert (second.id, second.backend) == ("group", "kernel-group")
        assert [vm_dma(vm, name, ram) for name in ("cdev", "group")] == [TEXT, TEXT]
        spaces = vm.client.query_machine().address_spaces
        assert [space.partition(":")[0] for space in spaces] == ["ioas", "container"]
        (thing,) = vm.client.query_objects()
        assert thing.used_by == ["device:cdev"]
        with pytest.raises(RemoteError, match=r"in use.*device:cdev"):
            vm.client.object_del(id="iommufd0")
        vm.client.dma_unmap(iova=IOVA, size=1 << 20)
        assert vm.remove("cdev")
        assert vm.remove("group")
        os.close(ram)
        vm.client.object_del(id="iommufd0")
    assert vm.fds() == before


def test_vfiod_refuses_what_does_not_fit_and_stays_as_it_was(vm: Vm, tmp_path: Path) -> None:
    """Issue 3's bad input: an iommufd that is a file, a cdev already bound, a device of a group.

    The client closes the names of a call that failed: an open cdev, bound or not, keeps the host from unbinding.
    """
    before = vm.fds()
    (tmp_path / "file").write_bytes(b"x")
    with vm.bound(EDU_ROOT):
        with opened(str(tmp_path / "file")) as fd, pytest.raises(RemoteError, match="iommufd"):
            vm.client.execute("object-add", {"qom-type": "iommufd", "id": "i", "fd": "f"}, fds={"f": fd})
        with pytest.raises(RemoteError, match="object 'none' not found"):
            add_cdev(vm, EDU_ROOT, "edu", iommufd="none")
        add_iommufd(vm)
        with opened("/dev/iommu") as iommu, pytest.raises(RemoteError, match=r"'fd'.*vfio-device"):
            arguments = {"driver": "vfio-pci", "fd": "f", "iommufd": "iommufd0"}
            vm.client.execute("device_add", arguments, fds={"f": iommu})
        with cdev_fd(EDU_ROOT) as fd:
            own = FileDescriptor(os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC))
            request = bytearray(vfio.BindIommufd(own.number).pack())
            Syscalls().ioctl(fd.number, vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD, request)
            with pytest.raises(RemoteError, match="bound to an iommufd already"):
                vm.client.execute("device_add", {"driver": "vfio-pci", "fd": "f", "iommufd": "iommufd0"}, fds={"f": fd})
            own.close()
        vm.client.query_fds()  # commands run in order: the names are closed before this is answered
        with opened_group(EDU_ROOT), pytest.raises(RemoteError, match="both interfaces"):
            add_cdev(vm, EDU_ROOT, "edu")
        vm.client.query_fds()
        dry = add_cdev(vm, EDU_ROOT, "edu", dry_run=True)
        assert isinstance(dry, dict)
        assert dry["possible"], dry
        assert vm.client.query_devices() == []
        with suppress(RemoteError):  # a dry run keeps its names, unless the client ends them: the cdev would stay open
            vm.client.closefd(fdname="cdev")
        vm.client.object_del(id="iommufd0")
    assert vm.fds() == before


def test_vfiod_a_host_unbind_while_held_is_a_request_and_ends(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        add_iommufd(vm)
        add_cdev(vm, EDU_PORT, "edu")
        with vm.client.events("DEVICE_REQUESTED") as requested:
            unbind = threading.Thread(target=pci.unbind, args=(EDU_PORT,))
            unbind.start()
            requested.get(timeout=60)
            assert unbind.is_alive(), "the host waits for the device"
            assert vm.remove("edu")
            unbind.join(60)
            assert not unbind.is_alive()
        vm.client.object_del(id="iommufd0")


def test_memory_beyond_the_limit_names_limit_and_need(tmp_path: Path) -> None:
    """Section 1: "Mapping pins memory against RLIMIT_MEMLOCK (iommufd: per user unless the manager set ...)"."""
    with running_vm(tmp_path, memlock=1 << 20) as vm, vm.bound(EDU_ROOT):
        add_iommufd(vm)
        add_cdev(vm, EDU_ROOT, "edu")
        ram = os.memfd_create("ram")
        os.ftruncate(ram, 4 << 20)
        with pytest.raises(RemoteError, match=r"ENOMEM.*RLIMIT_MEMLOCK is 1048576.*4194304 more") as refused:
            vm.client.dma_map(iova=IOVA, size=4 << 20, fd=ram)
        assert "processes of this user" in refused.value.desc
        vm.client.dma_map(iova=IOVA, size=1 << 16, fd=ram)
        assert vm_dma(vm, "edu", ram) == TEXT
        os.close(ram)
        assert vm.remove("edu")
