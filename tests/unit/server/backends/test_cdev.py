"""cdevs, iommufds and IOASes: behaviour.md section 1 and 2, rule by rule, on the fake kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import pytest
from tests.unit.server.backends.conftest import PAGE, Guest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol import vfio
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed, PermissionRefused
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.cdev import CdevOrigin, IommufdSource, KernelCdevs
from vfiod.server.backends.checks import possible
from vfiod.server.backends.group import GroupOrigin, KernelGroups
from vfiod.server.kernel.kinds import cdev_of_fd, kind_of
from vfiod.server.kernel.memory import SharedMemory

FIRST, SIBLING, OTHER = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
TOKEN = UUID("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3")


@dataclass
class Host:
    """Both interfaces on one fake kernel, and one iommufd object."""

    kernel: FakeKernel
    guest: Guest
    groups: KernelGroups
    cdevs: KernelCdevs
    iommufd: FileDescriptor

    def cdev(self, name: str = FIRST) -> FileDescriptor:
        """What a manager passes."""
        return FileDescriptor(self.kernel.open(f"/dev/vfio/devices/vfio{self.kernel.devices[name].cdev}"))

    def origin(self, name: str = FIRST, fd: FileDescriptor | None = None, token: UUID | None = None) -> CdevOrigin:
        return CdevOrigin("vfio-pci", IommufdSource("i0", self.iommufd), fd=fd or self.cdev(name), vf_token=token)

    def here(self, name: str) -> CdevOrigin:
        return CdevOrigin("vfio-pci", IommufdSource("i0", self.iommufd), host=name)

    def group(self, name: str, number: int, token: UUID | None = None) -> GroupOrigin:
        fd = None
        if not self.groups.in_use(number):
            fd = FileDescriptor(self.kernel.open(f"/dev/vfio/{number}"))
        return GroupOrigin("vfio-pci", name, group_fd=fd, vf_token=token)


@pytest.fixture
def host() -> Iterator[Host]:
    kernel = FakeKernel()
    kernel.add_device(FIRST, 7)
    kernel.add_device(SIBLING, 7)
    kernel.add_device(OTHER, 8)
    guest = Guest()
    before = sorted(os.listdir("/proc/self/fd"))
    held: list[KernelCdevs] = []
    groups = KernelGroups(kernel, guest.attach, guest.detach, open_by_cdev=lambda number: held[0].in_group(number))
    cdevs = KernelCdevs(kernel, guest.attach, guest.detach, group_in_use=groups.in_use)
    held.append(cdevs)
    host = Host(kernel, guest, groups, cdevs, FileDescriptor(kernel.open("/dev/iommu")))
    yield host
    groups.close()
    cdevs.close()
    host.iommufd.close()
    assert kernel.nothing_is_open()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not guest.spaces


def space_of(host: Host, name: str = FIRST) -> object:
    return host.cdevs.open(host.origin(name)).address_space


# --- what an fd is ---
def test_kinds_of_the_modern_path(host: Host) -> None:
    with host.cdev() as fd:
        assert kind_of(fd.number, host.kernel) is FdKind.VFIO_DEVICE
        found = cdev_of_fd(fd.number, host.kernel)
        assert found is not None
        assert found.name == "vfio0"
    assert kind_of(host.iommufd.number, host.kernel) is FdKind.IOMMUFD
    assert cdev_of_fd(host.iommufd.number, host.kernel) is None


# --- adding: section 1, "Modern path" ---
def test_the_order_is_bind_allocate_attach_replay(host: Host, memory: SharedMemory) -> None:
    """Section 1: "Modern path: bind the cdev to the iommufd, attach an IOAS, then as above"."""
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    host.kernel.log.clear()
    backend = host.cdevs.open(host.origin())
    assert (backend.name, backend.kind, backend.group) == (FIRST, "kernel-cdev", None)
    assert host.kernel.log == [
        "VFIO_DEVICE_GET_INFO",  # is it bound?
        "VFIO_DEVICE_BIND_IOMMUFD",
        "IOMMU_IOAS_ALLOC",
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        "IOMMU_IOAS_IOVA_RANGES",
        "IOMMU_IOAS_MAP_FILE",
        "VFIO_DEVICE_GET_INFO",
    ]
    assert [(one.iommufd, one.devices) for one in host.cdevs.ioases()] == [("i0", (FIRST,))]
    assert [held.kind for held in host.cdevs.fds()] == [FdKind.VFIO_DEVICE]
    assert host.cdevs.users_of("i0") == (FIRST,)
    assert backend.close()
    assert backend.close(), "a second close says what the first said"
    assert host.guest.seen == ["attach ioas:i0/2", "detach ioas:i0/2"]
    assert host.cdevs.ioases() == ()
    assert host.kernel.ioases() == [], "the last device out destroys the IOAS"


def test_devices_share_the_machines_ioas(host: Host) -> None:
    one, other = host.cdevs.open(host.origin()), host.cdevs.open(host.origin(OTHER))
    assert one.address_space is other.address_space
    assert len(host.guest.spaces) == 1
    assert one.close()
    assert host.cdevs.ioases()
    assert other.close()


def test_a_device_the_ioas_cannot_take_gets_its_own(host: Host) -> None:
    host.kernel.compatible = False
    one, other = host.cdevs.open(host.origin()), host.cdevs.open(host.origin(OTHER))
    assert one.address_space is not other.address_space
    assert [info.devices for info in host.cdevs.ioases()] == [(FIRST,), (OTHER,)]
    assert one.close()
    assert other.close()


def test_both_paths_serve_one_machine(host: Host, memory: SharedMemory) -> None:
    """Section 1: "Both paths may serve devices of one machine at once"."""
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    by_cdev = host.cdevs.open(host.origin())
    by_group = host.groups.open(host.group(OTHER, 8))
    assert [space.name for space in host.guest.spaces] == ["ioas:i0/2", "container:0"]
    assert by_cdev.close()
    assert by_group.close()


def test_one_group_never_goes_through_both_interfaces(host: Host) -> None:
    """Section 1: "One group is used by one of the two kernel interfaces, never both"."""
    by_cdev = host.cdevs.open(host.origin())
    with pytest.raises(Busy, match=rf"Group 7 of {SIBLING} is used here through cdevs \({FIRST}\).*never.*both"):
        host.groups.open(GroupOrigin("vfio-pci", SIBLING))
    assert by_cdev.close()
    by_group = host.groups.open(host.group(FIRST, 7))
    with pytest.raises(Busy, match=r"Group 7 of 0000:01:00\.1 is held here through its group file.*by its group"):
        host.cdevs.open(host.origin(SIBLING))
    assert by_group.close()
    refusal = pytest.raises(OperationFailed, match=r"BIND_IOMMUFD.*EBUSY.*group 7.*never used through both")
    with FileDescriptor(host.kernel.open("/dev/vfio/7")), refusal:
        host.cdevs.open(host.origin())


def test_two_devices_of_a_group_by_their_cdevs(host: Host) -> None:
    one, other = host.cdevs.open(host.origin()), host.cdevs.open(host.origin(SIBLING))
    assert host.cdevs.in_group(7) == (FIRST, SIBLING)
    assert one.close()
    assert other.close()


# --- what is refused ---
def test_an_fd_that_is_no_cdev(host: Host) -> None:
    with pytest.raises(InvalidArgument, match="is not the fd of a cdev: expected /dev/vfio/devices/vfioN"):
        host.cdevs.open(host.origin(fd=FileDescriptor(os.eventfd(0))))
    by_group = host.groups.open(host.group(FIRST, 7))
    number = by_group.region_fd(vfio.PciRegion.BAR2)
    assert number is not None
    with pytest.raises(InvalidArgument, match="came out of a group"):
        host.cdevs.open(host.origin(fd=FileDescriptor.duplicate_of(number)))
    by_group.close()


def test_a_device_of_another_class(host: Host) -> None:
    """Section 1: "a wrong device class" is an error of its own, here and by what the device says of itself."""
    host.kernel.devices[FIRST].bus = "platform"
    with pytest.raises(InvalidArgument, match="is a platform device: driver 'vfio-pci' takes PCI devices"):
        host.cdevs.open(host.origin())
    host.kernel.devices[FIRST].bus = "pci"
    host.kernel.devices[FIRST].flags = vfio.DeviceFlags.CCW
    with pytest.raises(InvalidArgument, match="has the flags CCW"):
        host.cdevs.open(host.origin())
    assert host.cdevs.ioases() == ()


def test_attached_already(host: Host) -> None:
    device = host.cdevs.open(host.origin())
    with pytest.raises(Busy, match="already attached"):
        host.cdevs.open(host.origin())
    device.close()


def test_bound_already_by_somebody(host: Host) -> None:
    foreign = FileDescriptor(host.kernel.open("/dev/iommu"))
    with host.cdev() as fd, foreign:
        request = bytearray(vfio.BindIommufd(foreign.number).pack())
        host.kernel.ioctl(fd.number, vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD, request)
        with pytest.raises(Busy, match=r"bound to an iommufd already.*open it anew"):
            host.cdevs.open(host.origin(fd=fd.duplicate()))
        with pytest.raises(OperationFailed, match=r"EINVAL: the device is open elsewhere"):
            host.cdevs.open(host.origin())
        with pytest.raises(OperationFailed, match=r"EPERM: another iommufd owns group 7"):
            host.cdevs.open(host.origin(SIBLING))


def test_a_host_driver_in_the_group_is_named(host: Host) -> None:
    """Section 1: "name the devices of the group that are still bound to host drivers"; a stub driver is none."""
    host.kernel.devices[SIBLING].driver = "e1000e"
    with pytest.raises(OperationFailed, match=rf"EPERM: bound to host drivers in group 7: {SIBLING} \(driver e1000e\)"):
        host.cdevs.open(host.origin())
    host.kernel.devices[SIBLING].driver = "pci-stub"
    assert host.cdevs.open(host.origin()).close()


def test_without_interrupt_remapping(host: Host) -> None:
    host.kernel.interrupt_remapping = False
    with pytest.raises(OperationFailed, match=r"EPERM.*interrupt remapping.*allow_unsafe_interrupts"):
        host.cdevs.open(host.origin())


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("VFIO_DEVICE_BIND_IOMMUFD", errno.ENODEV),
        ("IOMMU_IOAS_ALLOC", errno.ENOMEM),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EINVAL),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EBUSY),
        ("IOMMU_IOAS_IOVA_RANGES", errno.ENOENT),
        ("IOMMU_IOAS_MAP_FILE", errno.ENOMEM),
    ],
)
def test_failure_anywhere_unwinds_everything(host: Host, memory: SharedMemory, operation: str, number: int) -> None:
    """Section 1: "Failure anywhere unwinds everything done before it"; the fixture looks for what is left."""
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    host.kernel.fail(operation, number)
    with pytest.raises(OperationFailed, match=f"{operation}.*{errno.errorcode[number]}"):
        host.cdevs.open(host.origin())
    assert host.cdevs.ioases() == ()
    assert host.kernel.ioases() == []
    assert host.cdevs.open(host.origin()).close()


# --- no unbinding but the end of the file ---
def test_what_failed_after_the_bind_is_taken_up_again(host: Host) -> None:
    managers = host.cdev()
    host.kernel.fail("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EBUSY)
    with pytest.raises(OperationFailed, match="EBUSY"):
        host.cdevs.open(host.origin(fd=managers.duplicate()))
    dry = {check.name: check for check in host.cdevs.check(host.origin(fd=managers.duplicate()))}
    assert "taken up again" in dry["cdev"].detail
    device = host.cdevs.open(host.origin(fd=managers.duplicate()))
    assert device.close() is False, "the manager's fd still holds it"
    again = host.cdevs.open(host.origin(fd=managers))
    assert again.close(), "now it is gone"
    assert host.cdevs.open(host.origin()).close()


def test_it_is_not_taken_up_by_another_iommufd(host: Host) -> None:
    with host.cdev() as managers, FileDescriptor(host.kernel.open("/dev/iommu")) as another:
        assert host.cdevs.open(host.origin(fd=managers.duplicate())).close() is False
        wrong = CdevOrigin("vfio-pci", IommufdSource("i1", another), fd=managers.duplicate())
        with pytest.raises(Busy, match="bound to an iommufd already"):
            host.cdevs.open(wrong)


def test_a_new_file_after_the_old_one_is_gone(host: Host) -> None:
    with host.cdev() as managers:
        assert host.cdevs.open(host.origin(fd=managers.duplicate())).close() is False
        with pytest.raises(OperationFailed, match="open elsewhere"):
            host.cdevs.open(host.origin())
    assert host.cdevs.open(host.origin()).close()


def test_an_fd_given_out_loses_the_guests_memory(host: Host, memory: SharedMemory) -> None:
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    space.map(Mapping(0, PAGE, memory, 0, readonly=False))
    number = device.region_fd(vfio.PciRegion.BAR2)
    assert number is not None
    with FileDescriptor.duplicate_of(number):
        device.give_out()
        assert device.close() is False
        assert host.kernel.ioases() == [], "detached before it was closed, so the IOAS could go"


def test_a_kernel_that_does_not_say_whether_it_is_bound(host: Host) -> None:
    """A kernel's mediated device has no id GET_HW_INFO knows: then only who was given the fd counts."""
    device = host.cdevs.open(host.origin())
    host.kernel.fail("IOMMU_GET_HW_INFO", errno.EOPNOTSUPP)
    device.give_out()
    assert device.close() is False
    device = host.cdevs.open(host.origin())
    host.kernel.fail("IOMMU_GET_HW_INFO", errno.EOPNOTSUPP)
    assert device.close() is True


# --- opened here ---
def test_opened_here_only_when_allowed(host: Host) -> None:
    with pytest.raises(PermissionRefused, match=r"pass 'fd' with an fd of it, or start the server with --allow-open"):
        host.cdevs.open(host.here(FIRST))
    allowed = KernelCdevs(host.kernel, host.guest.attach, host.guest.detach, allow_open=True)
    assert allowed.open(host.here(FIRST)).close()
    host.kernel.devices[FIRST].driver = "e1000e"
    with pytest.raises(InvalidArgument, match=r"has no cdev: bind it to vfio-pci \(its driver: e1000e\)"):
        allowed.open(host.here(FIRST))
    host.kernel.devices[FIRST].driver = "vfio-pci"
    host.kernel.modes["/dev/vfio/devices/vfio0"] = errno.EACCES
    with pytest.raises(OperationFailed, match=r"EACCES.*pass 'fd'"):
        allowed.open(host.here(FIRST))


def test_without_sysfs_the_cdev_is_known_by_its_own_name(host: Host) -> None:
    host.kernel.sysfs = False
    device = host.cdevs.open(host.origin())
    assert device.name == "vfio0"
    assert device.close()


# --- mapping: section 2 ---
def test_by_file_where_kernel_and_file_can(host: Host, memory: SharedMemory) -> None:
    """Section 2: "iommufd can map a memfd itself: preferred when the file allows it, else mmap"."""
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    space.map(Mapping(0, PAGE, memory, 0, readonly=False))
    assert host.kernel.log[-1] == "IOMMU_IOAS_MAP_FILE", "no address of this process was needed"
    host.kernel.maps_files = False
    host.kernel.log.clear()
    for page in (1, 2):
        space.map(Mapping(page * PAGE, PAGE, memory, page * PAGE, readonly=False))
    assert host.kernel.log == ["IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP"], "probed once"
    space.unmap(0, 3 * PAGE)
    assert device.close()


def test_a_file_of_another_kind_goes_by_address_from_then_on(host: Host, tmp_path: object) -> None:
    path = f"{tmp_path}/ram"
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(number, 4 * PAGE)
    memory = SharedMemory(FileDescriptor(number), name="file")
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    host.kernel.log.clear()
    for page in range(2):
        space.map(Mapping(page * PAGE, PAGE, memory, page * PAGE, readonly=False))
    assert host.kernel.log == ["IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP"]
    space.unmap(0, 2 * PAGE)
    memory.close()
    assert device.close()


def test_ranges_and_page_size_are_the_kernels(host: Host) -> None:
    """Section 2: "IOVA ranges the IOMMU cannot do (IOAS_IOVA_RANGES) are refused before any ioctl"."""
    host.kernel.iova_ranges = tuple((base << 20, (base << 20) + 0xFFFF) for base in range(40))
    host.kernel.page_sizes = 1 << 16
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    assert space.iova_ranges() == host.kernel.iova_ranges, "more than there was room for at first (EMSGSIZE)"
    assert space.page_size == 1 << 16
    assert device.close()


@pytest.mark.parametrize(
    ("iova", "size", "refusal"),
    [
        (PAGE, PAGE, "EADDRINUSE: it overlaps"),
        (0x800 + 64 * PAGE, PAGE, "EINVAL: IOVA and size must be whole pages"),
        (0xFEE00000, PAGE, "EINVAL"),
    ],
)
def test_refused_mappings_leave_the_state_before(
    host: Host, memory: SharedMemory, iova: int, size: int, refusal: str
) -> None:
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    space.map(Mapping(0, 4 * PAGE, memory, 0, readonly=False))
    with pytest.raises(OperationFailed, match=refusal):
        space.map(Mapping(iova, size, memory, 0, readonly=False))
    with pytest.raises(OperationFailed, match="ENOENT"):
        space.unmap(0, PAGE)
    with pytest.raises(OperationFailed, match="ENOENT: 0x0 bytes"):
        space.unmap(1 << 20, PAGE)
    (ioas,) = host.kernel.ioases()
    assert list(ioas.mappings) == [0]
    assert device.close()


def test_read_only_stays_read_only(host: Host, memory: SharedMemory) -> None:
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    space.map(Mapping(0, PAGE, memory, 0, readonly=True))
    (ioas,) = host.kernel.ioases()
    assert ioas.mappings[0].flags == vfio.IoasMapFlags.FIXED_IOVA | vfio.IoasMapFlags.READABLE
    assert device.close()


@pytest.mark.parametrize("mode", ["user", "process", "privileged"])
def test_enomem_names_limit_and_need(host: Host, memory: SharedMemory, mode: str) -> None:
    """Section 1: "A failure with ENOMEM names the limit, its value and the need" (per user, or per process)."""
    device = host.cdevs.open(host.origin())
    space = device.address_space
    assert space is not None
    host.kernel.memory_lock = 2 * PAGE
    host.kernel.ipc_lock = mode == "privileged"
    host.kernel.iommufds()[0].per_process = mode == "process"
    host.kernel.fail("IOMMU_IOAS_MAP_FILE", errno.ENOMEM)
    words = {
        "user": rf"RLIMIT_MEMLOCK is {2 * PAGE} bytes, shared by all processes of this user.*needs {4 * PAGE} more",
        "process": rf"RLIMIT_MEMLOCK is {2 * PAGE} bytes, of which this process uses 0.*needs {4 * PAGE} more",
        "privileged": "no memory left to pin",
    }
    with pytest.raises(OperationFailed, match=words[mode]):
        space.map(Mapping(0, 4 * PAGE, memory, 0, readonly=False))
    assert device.close()


def test_an_ioas_that_is_full(host: Host, memory: SharedMemory) -> None:
    device = host.cdevs.open(host.origin())
    assert device.address_space is not None
    host.kernel.fail("IOMMU_IOAS_MAP_FILE", errno.ENOSPC)
    with pytest.raises(OperationFailed, match="ENOSPC: the IOAS is full"):
        device.address_space.map(Mapping(0, PAGE, memory, 0, readonly=False))
    assert device.close()


# --- VF tokens ---
@pytest.fixture
def sriov(host: Host) -> Host:
    """A physical function in group 20 and a virtual one in group 21."""
    host.kernel.add_device("0000:03:00.0", 20, sriov=True)
    host.kernel.add_device("0000:03:10.0", 21, vf_of="0000:03:00.0")
    return host


@pytest.mark.parametrize("knows", [True, False], ids=["bind-takes-token", "before-6.17"])
def test_the_physical_functions_user_sets_the_token(sriov: Host, knows: bool) -> None:
    sriov.kernel.bind_takes_token = knows
    device = sriov.cdevs.open(sriov.origin("0000:03:00.0", token=TOKEN))
    assert sriov.kernel.devices["0000:03:00.0"].vf_token == TOKEN.bytes
    assert device.close()


def test_a_virtual_function_needs_the_token(sriov: Host) -> None:
    physical = sriov.cdevs.open(sriov.origin("0000:03:00.0", token=TOKEN))
    with pytest.raises(OperationFailed, match=r"EACCES: it needs the VF token.*pass vf-token"):
        sriov.cdevs.open(sriov.origin("0000:03:10.0"))
    with pytest.raises(OperationFailed, match="EACCES: the VF token is not the one in use"):
        sriov.cdevs.open(sriov.origin("0000:03:10.0", token=UUID(int=1)))
    virtual = sriov.cdevs.open(sriov.origin("0000:03:10.0", token=TOKEN))
    assert virtual.close()
    assert physical.close()


def test_a_token_for_a_device_that_takes_none(sriov: Host) -> None:
    with pytest.raises(OperationFailed, match=r"PCI_VF_TOKEN.*ENOTTY.*takes no VF token.*leave vf-token out"):
        sriov.cdevs.open(sriov.origin(token=TOKEN))
    with pytest.raises(OperationFailed, match=r"GET_DEVICE_FD.*EINVAL.*takes no VF token"):
        sriov.groups.open(sriov.group(FIRST, 7, TOKEN))


def test_tokens_of_groups_go_with_the_name(sriov: Host) -> None:
    """``VFIO_GROUP_GET_DEVICE_FD`` with ``ADDRESS vf_token=UUID``."""
    physical = sriov.groups.open(sriov.group("0000:03:00.0", 20, TOKEN))
    with pytest.raises(OperationFailed, match="EACCES: it needs the VF token"):
        sriov.groups.open(sriov.group("0000:03:10.0", 21))
    with pytest.raises(OperationFailed, match="EACCES: the VF token is not the one"):
        sriov.groups.open(sriov.group("0000:03:10.0", 21, UUID(int=1)))
    virtual = sriov.groups.open(sriov.group("0000:03:10.0", 21, TOKEN))
    assert virtual.close()
    assert physical.close()


# --- the primitives of hot reset: section 6 ---
def test_hot_reset_of_cdevs(host: Host) -> None:
    """Section 6: "with cdevs: allowed only when DEV_ID_OWNED, zero-length fd array. The two do not mix"."""
    one = host.cdevs.open(host.origin())
    info = one.hot_reset_info()
    assert info.flags == vfio.HotResetFlags.DEV_ID | vfio.HotResetFlags.DEV_ID_OWNED
    assert [(entry.address, entry.devid) for entry in info.devices] == [(FIRST, 1), (SIBLING, 0)]
    one.hot_reset(())
    assert [host.kernel.devices[name].hot_resets for name in (FIRST, SIBLING, OTHER)] == [1, 1, 0]
    with pytest.raises(OperationFailed, match="EINVAL"):
        one.hot_reset((host.iommufd.number,))
    host.kernel.devices[SIBLING].group = 9
    info = one.hot_reset_info()
    assert info.flags == vfio.HotResetFlags.DEV_ID
    assert [entry.devid for entry in info.devices] == [1, vfio.VFIO_PCI_DEVID_NOT_OWNED]
    with pytest.raises(OperationFailed, match=r"EINVAL: not every affected device is held"):
        one.hot_reset(())
    host.kernel.devices[SIBLING].group = 7
    assert one.close()


def test_hot_reset_of_groups(host: Host) -> None:
    """Section 6: "hot-reset with groups: pass the fds of all affected groups"."""
    one = host.groups.open(host.group(FIRST, 7))
    info = one.hot_reset_info()
    assert not info.flags
    assert [(entry.address, entry.group_id) for entry in info.devices] == [(FIRST, 7), (SIBLING, 7)]
    number = host.groups.group_fd(7)
    assert number is not None
    assert host.groups.group_fd(8) is None
    one.hot_reset((number,))
    for wrong in ((), (number, number, number), (host.iommufd.number,)):
        with pytest.raises(OperationFailed, match="EINVAL"):
            one.hot_reset(wrong)
    assert one.close()


def test_hot_reset_info_makes_room_and_tries_again(host: Host) -> None:
    for slot in range(2, 30):
        host.kernel.add_device(f"0000:01:{slot:02x}.0", 100 + slot)
    one = host.cdevs.open(host.origin())
    host.kernel.fail("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", errno.EAGAIN)
    assert len(one.hot_reset_info().devices) == 30
    host.kernel.fail("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", *[errno.EAGAIN] * 8)
    with pytest.raises(OperationFailed, match="EAGAIN: what is on its bus keeps changing"):
        one.hot_reset_info()
    host.kernel.devices[FIRST].hot_resettable = False
    with pytest.raises(OperationFailed, match="ENODEV: neither its bus nor its slot"):
        one.hot_reset_info()
    assert one.close()


# --- the dry run ---
def test_dry_run_foretells_and_changes_nothing(host: Host) -> None:
    checks = host.cdevs.check(host.origin())
    assert possible(checks)
    assert [check.name for check in checks] == [
        "host-device",
        "open-files",
        "reset",
        "cdev",
        "viable",
        "ioas",
        "interrupt-remapping",
        "memory-lock",
    ]
    assert "VFIO_DEVICE_BIND_IOMMUFD" not in host.kernel.log
    device = host.cdevs.open(host.origin())
    found = {check.name: check for check in host.cdevs.check(host.origin(OTHER))}
    assert found["ioas"].detail == "ioas:i0/2 is tried first, then a new one"
    assert not {check.name: check for check in host.cdevs.check(host.origin())}["host-device"].ok
    device.close()


def test_dry_run_says_what_stands_in_the_way(host: Host) -> None:
    host.kernel.devices[SIBLING].driver = "e1000e"
    found = {check.name: check for check in host.cdevs.check(host.origin())}
    assert not found["viable"].ok
    assert "e1000e" in found["viable"].detail
    found = {check.name: check for check in host.cdevs.check(host.here(OTHER))}
    assert not found["cdev"].ok
    assert "--allow-open" in found["cdev"].detail
    by_group = host.groups.open(host.group(OTHER, 8))
    found = {check.name: check for check in host.cdevs.check(host.origin(OTHER))}
    assert "never both interfaces" in found["viable"].detail
    by_group.close()
    (only,) = host.cdevs.check(host.origin(fd=FileDescriptor(os.eventfd(0))))
    assert (only.name, only.ok) == ("host-device", False)


def test_every_refusal_is_a_whole_sentence(host: Host) -> None:
    for number in (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENODEV, errno.ENOTTY, errno.EIO):
        host.kernel.fail("VFIO_DEVICE_BIND_IOMMUFD", number)
        with pytest.raises(CommandError, match=rf"BIND_IOMMUFD on {FIRST} \(to iommufd i0\) failed with"):
            host.cdevs.open(host.origin())
