"""Groups, containers and devices: behaviour.md section 1, rule by rule, on the fake kernel."""

from __future__ import annotations

import errno
import os

import pytest
from tests.unit.server.backends.conftest import PAGE, Host

from vfiod.protocol import vfio
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed, PermissionRefused
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.group import ContainerSource, KernelGroups
from vfiod.server.kernel.memory import SharedMemory


# --- adding ---
def test_a_passed_group_gives_a_device_and_the_order_is_the_kernels(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert backend.name == "0000:01:00.0"
    assert backend.kind == "kernel-group"
    assert backend.group is not None
    assert (backend.group.id, backend.group.container, backend.group.noiommu) == (7, 0, False)
    assert backend.info().flags & vfio.DeviceFlags.PCI
    order = [name for name in host.kernel.log if name != "VFIO_IOMMU_GET_INFO"]
    assert order == [
        "VFIO_GROUP_GET_STATUS",
        "VFIO_GET_API_VERSION",
        "VFIO_GROUP_SET_CONTAINER",
        "VFIO_CHECK_EXTENSION",
        "VFIO_SET_IOMMU",
        "VFIO_IOMMU_MAP_DMA",
        "VFIO_GROUP_GET_DEVICE_FD",
        "VFIO_DEVICE_GET_INFO",
    ]
    assert [c.iommu for c in host.groups.containers()] == ["type1v2"]
    assert backend.close()
    assert host.groups.containers() == ()
    assert host.guest.seen == ["attach container:0", "detach container:0"]
    assert backend.close(), "a second close says what the first said"


def test_closing_lets_the_device_go_before_its_group(host: Host) -> None:
    """Section 1: "Device fds close before their group leaves its container", and the last group's container closes."""
    first = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    second = host.groups.open(host.origin("01:00.1"))
    other = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    host.kernel.log.clear()
    assert first.close()
    assert host.kernel.log == [], "another device of the group is open: the kernel would say EBUSY"
    assert second.close()
    # The kernel takes it only when no device of the group is open any more.
    assert host.kernel.log == ["VFIO_GROUP_UNSET_CONTAINER"]
    assert [c.groups for c in host.groups.containers()] == [[8]]
    assert other.close()
    assert host.kernel.log == ["VFIO_GROUP_UNSET_CONTAINER"] * 2
    assert host.groups.containers() == ()


def test_a_group_is_passed_once_and_serves_all_its_devices(host: Host) -> None:
    first = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    second = host.groups.open(host.origin("01:00.1"))
    assert [c.groups for c in host.groups.containers()] == [[7]]
    assert first.close()
    assert host.groups.containers(), "the group stays while a device of it is open"
    assert second.close()
    assert host.kernel.nothing_is_open()


def test_a_second_group_fd_for_a_known_group_is_refused(host: Host) -> None:
    group = host.group_fd(7)
    backend = host.groups.open(host.origin(group_fd=group.duplicate()))
    with pytest.raises(InvalidArgument, match=r"group 7 is held here already.*leave group-fd out"):
        host.groups.open(host.origin("01:00.1", group_fd=group))
    assert group.closed, "the origin's fds are taken over on failure too"
    backend.close()


def test_a_group_fd_of_another_group_is_refused(host: Host) -> None:
    with pytest.raises(InvalidArgument, match=r"'group-fd' is group 8, but host device 0000:01:00.0 is in group 7"):
        host.groups.open(host.origin(group_fd=host.group_fd(8)))


def test_a_group_fd_that_is_no_group_is_refused(host: Host) -> None:
    with pytest.raises(InvalidArgument, match="not the fd of a VFIO group"):
        host.groups.open(host.origin(group_fd=FileDescriptor(os.eventfd(0))))


def test_without_a_group_fd_the_error_says_what_to_pass(host: Host) -> None:
    with pytest.raises(PermissionRefused, match=r"pass group-fd with an fd of /dev/vfio/7, or .*--allow-open"):
        host.groups.open(host.origin())


def test_allow_open_opens_the_group_here(host: Host) -> None:
    groups = KernelGroups(host.kernel, host.guest.attach, host.guest.detach, allow_open=True)
    backend = groups.open(host.origin())
    assert backend.close()
    # The kernel lets a group be open once.
    held = host.group_fd(7)
    with pytest.raises(
        OperationFailed, match=r"open on /dev/vfio/7 failed with EBUSY: another process holds"
    ) as caught:
        groups.open(host.origin())
    assert caught.value.errno == "EBUSY"
    held.close()


@pytest.mark.parametrize(
    ("form", "name"), [("0000:01:00.0", "0000:01:00.0"), ("01:00.1", "0000:01:00.1"), ("0:1:0.0", "0000:01:00.0")]
)
def test_host_forms(host: Host, form: str, name: str) -> None:
    backend = host.groups.open(host.origin(form, group_fd=host.group_fd(7)))
    assert backend.name == name
    backend.close()


def test_sysfsdev_names_the_same_device(host: Host) -> None:
    path = "/sys/bus/pci/devices/0000:01:00.0"
    origin = host.origin(None, sysfsdev=path, group_fd=host.group_fd(7))  # type: ignore[arg-type]
    backend = host.groups.open(origin)
    assert backend.name == "0000:01:00.0"
    with pytest.raises(Busy, match=r"0000:01:00\.0 is already attached"):
        host.groups.open(host.origin())
    backend.close()


def test_the_four_errors_are_four(host: Host) -> None:
    host.kernel.add_device("LNRO0005:00", 9, bus="platform", driver="vfio-platform")
    host.kernel.add_device("0000:03:00.0", -1)
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    texts = []
    for name in ("0000:7f:00.0", "0000:03:00.0", "0000:01:00.0", "LNRO0005:00"):
        with pytest.raises(CommandError) as caught:
            host.groups.open(host.origin(name))
        texts.append((type(caught.value), caught.value.errno, str(caught.value)))
    assert [errno_name for _, errno_name, _ in texts] == ["ENOENT", "ENODEV", "EBUSY", "EINVAL"]
    assert "no host device" in texts[0][2]
    assert "in no IOMMU group" in texts[1][2]
    assert "already attached" in texts[2][2]
    assert "is a platform device: driver 'vfio-pci' takes PCI devices" in texts[3][2]
    backend.close()


def test_a_device_whose_flags_are_not_pci_is_refused_and_unwound(host: Host) -> None:
    host.kernel.device("0000:01:00.0").flags = vfio.DeviceFlags.PLATFORM
    with pytest.raises(InvalidArgument, match="has the flags PLATFORM: driver 'vfio-pci' takes PCI devices"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert host.kernel.nothing_is_open()


# --- viability ---
def test_a_group_that_is_not_viable_names_the_culprits_and_no_others(host: Host) -> None:
    host.kernel.add_device("0000:01:00.2", 7, driver="e1000e")
    host.kernel.add_device("0000:01:00.3", 7, driver="pci-stub")
    host.kernel.add_device("0000:00:1c.0", 7, driver="pcieport")
    host.kernel.add_device("0000:01:00.4", 7, driver="mlx5_vfio_pci")
    host.kernel.add_device("0000:01:00.5", 7, driver=None)
    with pytest.raises(Busy) as caught:
        host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert "bound to host drivers: 0000:01:00.2 (driver e1000e);" in str(caught.value)
    assert caught.value.errno == "EBUSY"
    assert host.kernel.nothing_is_open()


def test_stub_drivers_do_not_block(host: Host) -> None:
    host.kernel.add_device("0000:01:00.3", 7, driver="pci-stub")
    host.kernel.add_device("0000:00:1c.0", 7, driver="pcieport")
    assert host.groups.open(host.origin(group_fd=host.group_fd(7))).close()


def test_not_viable_without_a_culprit_says_so(host: Host) -> None:
    host.kernel.groups[7].claimed = True
    with pytest.raises(Busy, match="sysfs names no host driver in it: somebody else uses it"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))


def test_a_group_in_somebody_elses_container_is_refused(host: Host) -> None:
    group, container = host.group_fd(7), FileDescriptor(host.kernel.open("/dev/vfio/vfio"))
    argument = bytearray(container.number.to_bytes(4, "little"))
    host.kernel.ioctl(group.number, vfio.GroupIoctl.VFIO_GROUP_SET_CONTAINER, argument)
    with pytest.raises(Busy, match="is in a container that is not this machine's"):
        host.groups.open(host.origin(group_fd=group))
    container.close()


# --- containers ---
def test_the_containers_there_are_are_tried_first(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    first = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    second = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    assert [(c.id, c.groups) for c in host.groups.containers()] == [(0, [7, 8])]
    assert second.address_space is first.address_space
    assert host.guest.seen == ["attach container:0"], "its mappings are there already"
    assert first.close()
    assert second.close()


def test_a_group_that_fits_into_none_gets_a_container_with_all_memory(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, 2 * PAGE, memory, 0, readonly=True))
    host.kernel.compatible = False
    first = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    second = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    assert [(c.id, c.groups) for c in host.groups.containers()] == [(0, [7]), (1, [8])]
    assert [len(container.mappings) for container in host.kernel.containers()] == [1, 1]
    assert first.close()
    assert second.close()


def test_a_passed_container_is_used_and_used_again(host: Host) -> None:
    source = host.container()
    again = ContainerSource(source.fd.duplicate(), "c1")
    first = host.groups.open(host.origin(group_fd=host.group_fd(7), container=source))
    second = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8), container=again))
    assert [(c.id, c.passed, c.groups) for c in host.groups.containers()] == [(0, True, [7, 8])]
    first.close()
    second.close()


def test_a_container_object_knows_its_users(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7), container=host.container("c", "obj0")))
    assert host.groups.users_of("obj0") == ("group:7",)
    assert host.groups.users_of("obj1") == ()
    backend.close()
    assert host.groups.users_of("obj0") == ()


def test_another_container_for_a_known_group_is_refused(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    with pytest.raises(InvalidArgument, match="Group 7 is in container:0 already, and 'c0' is another container"):
        host.groups.open(host.origin("01:00.1", container=host.container()))
    backend.close()


def test_the_same_container_for_a_known_group_is_fine(host: Host) -> None:
    source = host.container()
    same = ContainerSource(source.fd.duplicate(), "same")
    first = host.groups.open(host.origin(group_fd=host.group_fd(7), container=source))
    second = host.groups.open(host.origin("01:00.1", container=same))
    first.close()
    second.close()


def test_a_container_that_somebody_else_set_up_is_refused(host: Host) -> None:
    source, foreign = host.container(), host.group_fd(8)
    argument = bytearray(source.fd.number.to_bytes(4, "little"))
    host.kernel.ioctl(foreign.number, vfio.GroupIoctl.VFIO_GROUP_SET_CONTAINER, argument)
    host.kernel.ioctl(source.fd.number, vfio.ContainerIoctl.VFIO_SET_IOMMU, vfio.Extension.TYPE1v2_IOMMU)
    with pytest.raises(Busy, match="has an IOMMU already, set up by somebody else"):
        host.groups.open(host.origin(group_fd=host.group_fd(7), container=source))
    assert host.kernel.groups[7].container is None
    foreign.close()


def test_the_api_version_is_checked(host: Host) -> None:
    host.kernel.api_version = 1
    with pytest.raises(OperationFailed, match="the kernel speaks version 1, vfiod version 0"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))


def test_type1_is_taken_where_v2_is_not(host: Host) -> None:
    host.kernel.extensions.discard(vfio.Extension.TYPE1v2_IOMMU)
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert [c.iommu for c in host.groups.containers()] == ["type1"]
    backend.close()


def test_no_type1_at_all_says_what_to_load(host: Host) -> None:
    host.kernel.extensions.clear()
    with pytest.raises(OperationFailed, match="load vfio_iommu_type1"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))


def test_set_iommu_eperm_names_interrupt_remapping(host: Host) -> None:
    host.kernel.interrupt_remapping = False
    with pytest.raises(OperationFailed, match=r"VFIO_SET_IOMMU.*EPERM.*interrupt remapping.*allow_unsafe_interrupts"):
        host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert host.kernel.nothing_is_open()


# --- noiommu ---
def test_a_noiommu_group_is_taken_only_when_asked_for(host: Host) -> None:
    host.kernel.add_device("0000:05:00.0", 5, noiommu=True)
    groups = KernelGroups(host.kernel, host.guest.attach, host.guest.detach, allow_open=True)
    with pytest.raises(PermissionRefused, match="x-noiommu=true"):
        groups.open(host.origin("05:00.0"))
    backend = groups.open(host.origin("05:00.0", noiommu=True))
    assert backend.address_space is None
    assert backend.group is not None
    assert backend.group.noiommu
    assert [c.iommu for c in groups.containers()] == ["noiommu"]
    ordinary = groups.open(host.origin())
    assert [c.iommu for c in groups.containers()] == ["noiommu", "type1v2"], "the two never mix"
    assert backend.close()
    assert ordinary.close()


def test_a_noiommu_group_is_known_by_its_passed_fd(host: Host) -> None:
    host.kernel.add_device("0000:05:00.0", 5, noiommu=True)
    fd = FileDescriptor(host.kernel.open("/dev/vfio/noiommu-5"))
    with pytest.raises(PermissionRefused, match="x-noiommu=true"):
        host.groups.open(host.origin("05:00.0", group_fd=fd))


# --- without sysfs ---
def test_without_sysfs_the_passed_group_and_the_kernel_decide(host: Host) -> None:
    host.kernel.sysfs = False
    assert host.groups.open(host.origin(group_fd=host.group_fd(7))).close()
    with pytest.raises(InvalidArgument, match="sysfs cannot be read: pass group-fd"):
        host.groups.open(host.origin())
    with pytest.raises(OperationFailed, match=r"VFIO_GROUP_GET_DEVICE_FD on group 8.*ENODEV"):
        host.groups.open(host.origin(group_fd=host.group_fd(8)))


# --- unwinding ---
STEPS = (
    "open",
    "VFIO_GROUP_GET_STATUS",
    "VFIO_GET_API_VERSION",
    "VFIO_GROUP_SET_CONTAINER",
    "VFIO_CHECK_EXTENSION",
    "VFIO_SET_IOMMU",
    "VFIO_IOMMU_GET_INFO",
    "VFIO_IOMMU_MAP_DMA",
    "VFIO_GROUP_GET_DEVICE_FD",
    "VFIO_DEVICE_GET_INFO",
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOMEM, errno.EINTR])
def test_a_failure_anywhere_unwinds_everything(host: Host, memory: SharedMemory, step: str, number: int) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    origin = host.origin(group_fd=host.group_fd(7))
    host.kernel.fail(step, number)
    with pytest.raises(OperationFailed) as caught:
        host.groups.open(origin)
    assert caught.value.errno == errno.errorcode[number]
    assert host.kernel.nothing_is_open()
    assert host.groups.fds() == ()
    assert host.groups.containers() == ()
    assert not host.guest.spaces
    # and it can be tried again
    assert host.groups.open(host.origin(group_fd=host.group_fd(7))).close()


@pytest.mark.parametrize("step", ["VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_GET_INFO"])
def test_a_failure_leaves_the_devices_there_are_alone(host: Host, step: str) -> None:
    first = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    host.kernel.fail(step, errno.EIO)
    with pytest.raises(OperationFailed):
        host.groups.open(host.origin("01:00.1"))
    host.kernel.fail(step, errno.EIO)
    with pytest.raises(OperationFailed):
        host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    assert [(c.id, c.groups) for c in host.groups.containers()] == [(0, [7])]
    assert host.guest.seen == ["attach container:0"]
    assert first.close()


def test_the_groups_last_device_gone_from_the_host(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    host.kernel.fail("VFIO_GROUP_UNSET_CONTAINER", errno.ENODEV)
    assert backend.close()
    assert host.groups.fds() == ()


# --- leaving, with an fd given out ---
def test_a_group_lingers_while_an_fd_given_out_holds_its_device(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    number = backend.region_fd(vfio.PciRegion.BAR2)
    assert number is not None
    outside = FileDescriptor.duplicate_of(number)
    backend.give_out()
    assert backend.close() is False
    assert host.groups.lingering == (7,)
    assert [c.groups for c in host.groups.containers()] == [[7]]
    assert [len(c.mappings) for c in host.kernel.containers()] == [0], "the device left behind reaches no memory"
    assert host.groups.sweep() == ()
    outside.close()
    assert host.groups.sweep() == (7,)
    assert not host.groups.lingering
    assert host.kernel.nothing_is_open()


@pytest.mark.parametrize("passed_again", [False, True])
def test_a_lingering_group_is_taken_up_again(host: Host, memory: SharedMemory, passed_again: bool) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    managers = host.group_fd(7)
    backend = host.groups.open(host.origin(group_fd=managers.duplicate()))
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    assert not backend.close()
    again = host.groups.open(host.origin(group_fd=managers if passed_again else None))
    assert [len(c.mappings) for c in host.kernel.containers()] == [1], "the guest's memory is back"
    assert not host.groups.lingering
    outside.close()
    managers.close()
    assert again.close(), "nobody holds it any more"


@pytest.mark.parametrize("passed_again", [False, True])
def test_a_group_comes_back_though_its_holder_has_gone_unseen(host: Host, passed_again: bool) -> None:
    """Nobody swept since: what was held here a moment ago needs no group fd, and may be given one."""
    managers = host.group_fd(7)
    backend = host.groups.open(host.origin(group_fd=managers.duplicate()))
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    assert not backend.close()
    outside.close()
    again = host.groups.open(host.origin(group_fd=managers if passed_again else None))
    managers.close()
    assert again.close()


def test_adding_lets_go_of_what_lingers_elsewhere(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    backend.close()
    outside.close()
    other = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    assert not host.groups.lingering
    assert [c.groups for c in host.groups.containers()] == [[8]]
    other.close()


def test_a_failed_return_lingers_on(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    backend.close()
    host.kernel.fail("VFIO_GROUP_GET_DEVICE_FD", errno.EBUSY)
    with pytest.raises(OperationFailed):
        host.groups.open(host.origin())
    assert host.groups.lingering == (7,)
    assert not host.guest.spaces
    outside.close()


def test_a_lingering_group_does_not_take_memory_from_the_others(host: Host, memory: SharedMemory) -> None:
    host.guest.mappings.append(Mapping(0, PAGE, memory, 0, readonly=False))
    leaving = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    staying = host.groups.open(host.origin("02:00.0", group_fd=host.group_fd(8)))
    outside = FileDescriptor.duplicate_of(leaving.region_fd(vfio.PciRegion.BAR2) or -1)
    leaving.give_out()
    assert not leaving.close()
    assert [len(c.mappings) for c in host.kernel.containers()] == [1]
    assert staying.close()
    assert [(c.groups, c.iommu) for c in host.groups.containers()] == [([7], "type1v2")]
    assert [len(c.mappings) for c in host.kernel.containers()] == [0]
    outside.close()
    assert host.groups.sweep() == (7,)
    assert host.groups.containers() == ()


def test_who_is_released_in_a_group_of_two(host: Host) -> None:
    shared = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    own = host.groups.open(host.origin("01:00.1"))
    outside = FileDescriptor.duplicate_of(shared.region_fd(vfio.PciRegion.BAR2) or -1)
    shared.give_out()
    assert not shared.close(), "it was given out, and only the kernel knows who has it"
    assert own.close(), "its own fd was closed: what lingers is the other's"
    assert host.groups.lingering == (7,)
    outside.close()


def test_the_end_of_the_machine_lets_go_of_what_lingers(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    host.groups.close()
    assert host.groups.fds() == ()
    outside.close()
    assert host.kernel.nothing_is_open()


# --- looking ---
def test_every_fd_has_an_owner(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    held = {fd.owner: fd for fd in host.groups.fds()}
    assert {owner: fd.kind for owner, fd in held.items()} == {
        "container:0": FdKind.VFIO_CONTAINER,
        "group:7": FdKind.VFIO_GROUP,
        "host:0000:01:00.0": FdKind.VFIO_DEVICE,
    }
    assert all(host.kernel.kind(fd.number) is fd.kind for fd in held.values())
    backend.close()
    assert host.groups.fds() == ()
