"""Whether a hot reset would be done: behaviour.md section 6, "Hot reset resets a bus or slot", rule by rule."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.hot_reset import Held, Lent, Surroundings, judge, look_at_lent

BY_GROUP = vfio.HotResetFlags(0)
OWNED = vfio.HotResetFlags.DEV_ID | vfio.HotResetFlags.DEV_ID_OWNED
NOT_OWNED = vfio.HotResetFlags.DEV_ID

ASKED = Held("n0", "0000:04:00.0", group=7)
OTHER = Held("n1", "0000:04:00.1", group=8)
CDEV = Held("c0", "0000:04:00.0", iommufd="i0", devid=1)
VFIO = {"0000:04:00.0": "vfio-pci", "0000:04:00.1": "vfio-pci"}


@pytest.fixture
def some_fd() -> Iterator[FileDescriptor]:
    with FileDescriptor(os.memfd_create("group")) as fd:
        yield fd


def info(*numbers: int, flags: vfio.HotResetFlags = BY_GROUP) -> vfio.HotResetInfo:
    """Functions 0000:04:00.0, .1, ... with these groups, or devids."""
    rows = tuple(vfio.DependentDevice(number & 0xFFFFFFFF, 0, 4, devfn) for devfn, number in enumerate(numbers))
    return vfio.HotResetInfo(flags, rows)


def test_every_affected_function_held_by_its_group() -> None:
    """Section 6: with groups, the fds of all affected groups are passed, each once."""
    verdict = judge(ASKED, info(7, 8, 8), Surroundings(held=[OTHER, ASKED], groups={7, 8}))
    assert verdict.report.possible
    assert verdict.report.reason is UNSET
    assert verdict.devices == ("n0", "n1")
    assert verdict.groups == (7, 8)
    assert [(one.address, one.group, one.held_as) for one in verdict.report.affected] == [
        ("0000:04:00.0", 7, "n0"),
        ("0000:04:00.1", 8, "n1"),
        ("0000:04:00.2", 8, UNSET),  # its group is held: nobody else can have it
    ]


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (Surroundings(held=[ASKED], groups={7}), "group 8 is not held here: add its device .* or lend the group's fd"),
        (Surroundings(held=[ASKED], groups={7, 8}, lingering={8}), "another process still has a device of group 8"),
        (Surroundings(held=[ASKED, Held("c", "0000:04:00.1", iommufd="i", devid=2)], groups={7}), "'c' here.*cdev"),
        (Surroundings(held=[ASKED], groups={7, 8}, drivers={**VFIO, "0000:04:00.1": "igb"}), "bound to igb: bind"),
        (Surroundings(held=[ASKED], groups={7, 8}, drivers={**VFIO, "0000:04:00.1": None}), "bound to no driver"),
        (
            Surroundings(held=[ASKED, OTHER], groups={7, 8}, virtual={"0000:04:00.1"}),
            "virtual function: .*sriov_numvfs",
        ),
        # The kernel takes stubs for viable, and yet does not reset them under nobody's eyes.
        (Surroundings(held=[ASKED], groups={7, 8}, drivers={**VFIO, "0000:04:00.1": "pci-stub"}), "bound to pci-stub"),
    ],
)
def test_a_function_in_the_way_of_a_group_is_named_with_what_would_help(around: Surroundings, reason: str) -> None:
    """Section 6: every affected device must be held here, or lie in a group lent for the call."""
    report = judge(ASKED, info(7, 8), around).report
    assert not report.possible
    assert isinstance(report.reason, str)
    assert report.reason.startswith("1 of 2 affected functions in the way: 0000:04:00.1: ")
    first, second = report.affected
    assert first.reason is UNSET
    assert second.reason is not UNSET
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(second.reason)


def test_a_group_lent_and_in_no_container_will_do_and_one_in_use_will_not(some_fd: FileDescriptor) -> None:
    """Section 6: "a group lent for the call and attached to no container"."""
    around = Surroundings(held=[ASKED], groups={7}, lent={8: Lent(some_fd, attached=False)}, drivers=VFIO)
    assert judge(ASKED, info(7, 8), around).report.possible
    around = Surroundings(held=[ASKED], groups={7}, lent={8: Lent(some_fd, attached=True)})
    report = judge(ASKED, info(7, 8), around).report
    assert not report.possible
    assert "lent, but is attached to a container" in str(report.reason)
    # Lending does not make a host driver's device ours.
    around = Surroundings(
        held=[ASKED], groups={7}, lent={8: Lent(some_fd, attached=False)}, drivers={**VFIO, "0000:04:00.1": "e1000e"}
    )
    assert not judge(ASKED, info(7, 8), around).report.possible


def test_cdevs_of_one_iommufd_own_the_bus() -> None:
    """Section 6: with cdevs, allowed only when DEV_ID_OWNED, and no fds."""
    other = Held("c1", "vfio9", iommufd="i0", devid=3)  # sysfs could not be read: known by its id alone
    verdict = judge(CDEV, info(1, 3, 0, flags=OWNED), Surroundings(held=[CDEV, other]))
    assert verdict.report.possible
    assert verdict.groups == ()
    assert verdict.devices == ("c0", "c1")
    assert [(one.group, one.devid, one.held_as) for one in verdict.report.affected] == [
        (UNSET, 1, "c0"),
        (UNSET, 3, "c1"),
        (UNSET, 0, UNSET),
    ]


@pytest.mark.parametrize(
    ("other", "devid", "reason"),
    [
        (None, -1, "neither it nor its IOMMU group is owned by iommufd 'i0'"),
        (Held("g", "0000:04:00.1", group=8), -1, "'g' here, added by its group, while 'c0' was added by its cdev"),
        (Held("c", "0000:04:00.1", iommufd="i1", devid=1), -1, "bound to iommufd 'i1', while 'c0' is bound to 'i0'"),
        (None, 5, "another process has it, bound to the same iommufd 'i0'"),
    ],
)
def test_a_function_in_the_way_of_a_cdev(other: Held | None, devid: int, reason: str) -> None:
    held = [CDEV] if other is None else [CDEV, other]
    report = judge(CDEV, info(1, devid, flags=NOT_OWNED), Surroundings(held=held)).report
    assert not report.possible
    assert reason in str(report.affected[1].reason)
    assert report.affected[1].devid == devid
    assert report.affected[0].reason is UNSET


def test_an_unowned_function_with_a_host_driver_says_to_bind_it() -> None:
    around = Surroundings(held=[CDEV], drivers={**VFIO, "0000:04:00.1": "igb"})
    report = judge(CDEV, info(1, -1, flags=NOT_OWNED), around).report
    assert "bound to igb: bind it to vfio-pci" in str(report.affected[1].reason)


def test_the_kernel_has_the_last_word_on_ownership() -> None:
    report = judge(CDEV, info(1, 0, flags=NOT_OWNED), Surroundings(held=[CDEV])).report
    assert not report.possible
    assert "does not own every affected function" in str(report.reason)


def test_what_sysfs_does_not_tell_is_left_to_the_kernel() -> None:
    assert judge(ASKED, info(7, 8), Surroundings(held=[ASKED], groups={7, 8}, drivers={})).report.possible


def test_the_same_devid_in_another_iommufd_is_another_device() -> None:
    stranger = Held("c1", "0000:09:00.0", iommufd="i1", devid=2)
    report = judge(CDEV, info(1, 2, flags=OWNED), Surroundings(held=[CDEV, stranger])).report
    assert report.affected[1].held_as is UNSET
    assert not report.possible


def test_lent_fds_are_looked_at_never_believed() -> None:
    kernel = FakeKernel()
    kernel.add_device("0000:04:00.0", 7)
    with FileDescriptor(kernel.open("/dev/vfio/7")) as group, FileDescriptor(kernel.open("/dev/vfio/vfio")) as other:
        with group.duplicate() as again:
            lent = look_at_lent(kernel, [group, again])
        assert {number: one.attached for number, one in lent.items()} == {7: False}
        with pytest.raises(InvalidArgument, match=r"group-fds\[1\]' is not the fd of a VFIO group"):
            look_at_lent(kernel, [group, other])
