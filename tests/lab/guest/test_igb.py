"""igb on the real kernel: functions of one slot in groups of their own, SR-IOV virtual functions and their token.

Rules are those of behaviour.md, sections 1 and 6.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab.guest import pci
from tests.lab.guest.resets import add_cdev, add_iommufd, held, resets, running_vms, told_resets
from tests.lab.guest.vm import Vm, opened, opened_group
from tests.lab.topologies import IGB_FUNCTIONS, IGB_VIRTUAL

from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import RemoteError

MACHINE = "igb"

FIRST, SECOND = IGB_FUNCTIONS
#: Receive descriptor base of queue 0: a register that keeps what is written and that a reset clears (82576, 8.10.5).
RDBAL = 0xC000
MARK = 0xABCDE00

TOKEN = "3f2b9a30-5d1c-4d0e-9a55-6a1c2f3d4e5f"
OTHER_TOKEN = "00000000-0000-4000-8000-000000000001"


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = running_vms(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    """A vfiod with nothing in it: each test removes what it added, or ends it."""
    return next(vms)


def mark(vm: Vm, name: str) -> None:
    vm.let_it_work(name)
    vm.write(name, RDBAL, MARK)
    assert vm.read(name, RDBAL) == MARK


def was_reset(vm: Vm, name: str) -> bool:
    return vm.read(name, RDBAL) != MARK


def test_the_functions_are_in_groups_of_their_own() -> None:
    assert pci.group_of(FIRST) != pci.group_of(SECOND)
    assert pci.group_members(FIRST) == [FIRST]


def test_granted_when_both_are_held(vm: Vm) -> None:
    """Section 6: "with groups: pass the fds of all affected groups"."""
    with vm.bound(FIRST, SECOND):
        vm.add(FIRST, "n0")
        vm.add(SECOND, "n1", container=False)
        mark(vm, "n0")
        mark(vm, "n1")
        with told_resets(vm) as events:
            assert held(vm.client.hot_reset(id="n0")) == {FIRST: "n0", SECOND: "n1"}
            assert resets(events) == [("n0", "hot"), ("n1", "hot")]
        assert was_reset(vm, "n0")
        assert was_reset(vm, "n1")
        vm.remove("n0")
        vm.remove("n1")


def test_refused_for_a_missing_group_and_granted_when_it_is_lent(vm: Vm) -> None:
    """Section 6: "every affected device must be held here, or lie in a group lent for the call"."""
    with vm.bound(FIRST, SECOND):
        vm.add(FIRST, "n0")
        mark(vm, "n0")
        number = pci.group_of(SECOND)
        report = vm.client.query_hot_reset(id="n0")
        assert not report.possible
        assert f"group {number} is not held here" in str(held(report)[SECOND])
        with pytest.raises(RemoteError, match=f"group {number} is not held here") as refused:
            vm.client.hot_reset(id="n0")
        assert refused.value.errno == "EPERM"
        assert not was_reset(vm, "n0"), "refused: nothing is touched"
        with opened_group(SECOND) as lent, told_resets(vm) as events:
            report = vm.client.hot_reset(id="n0", group_fds=[lent])
            assert report.possible
            assert held(report) == {FIRST: "n0", SECOND: None}
            assert resets(events) == [("n0", "hot")]
        assert was_reset(vm, "n0")
        # It was given back: whoever wants it can open it (a group file is opened once at a time).
        pci.wait_until(lambda: can_be_opened(SECOND), "the lent group is closed")
        vm.remove("n0")


def can_be_opened(address: str) -> bool:
    try:
        with opened_group(address):
            return True
    except OSError:
        return False


def test_a_lent_group_in_a_container_is_somebody_elses(vm: Vm) -> None:
    with vm.bound(FIRST, SECOND):
        vm.add(FIRST, "n0")
        mark(vm, "n0")
        with opened_group(SECOND) as group, opened("/dev/vfio/vfio") as container:
            fcntl.ioctl(group.number, 0x3B68, container.number.to_bytes(4, "little"))  # VFIO_GROUP_SET_CONTAINER
            with pytest.raises(RemoteError, match="attached to a container: somebody uses it"):
                vm.client.hot_reset(id="n0", group_fds=[group])
        assert not was_reset(vm, "n0")
        vm.remove("n0")


def test_refused_for_a_neighbour_of_the_hosts_own(vm: Vm) -> None:
    with vm.bound(FIRST):
        assert pci.driver_of(SECOND) == "igb"
        vm.add(FIRST, "n0")
        report = vm.client.query_hot_reset(id="n0")
        assert not report.possible
        assert SECOND in str(report.reason)
        vm.remove("n0")


def test_refused_for_an_unowned_cdev_and_granted_when_it_is_owned(vm: Vm) -> None:
    """Section 6: "with cdevs: allowed only when DEV_ID_OWNED"."""
    with vm.bound(FIRST, SECOND):
        add_iommufd(vm)
        add_cdev(vm, FIRST, "c0")
        mark(vm, "c0")
        report = vm.client.query_hot_reset(id="c0")
        assert not report.possible
        assert [one.devid for one in report.affected][1] == -1
        with pytest.raises(RemoteError, match="neither it nor its IOMMU group is owned by iommufd 'i0'"):
            vm.client.hot_reset(id="c0")
        assert not was_reset(vm, "c0")
        # In another iommufd it is no better.
        add_iommufd(vm, "i1")
        add_cdev(vm, SECOND, "c1", "i1")
        with pytest.raises(RemoteError, match="bound to iommufd 'i1', while 'c0' is bound to 'i0'"):
            vm.client.hot_reset(id="c0")
        vm.remove("c1")
        add_cdev(vm, SECOND, "c1")
        mark(vm, "c1")
        with told_resets(vm) as events:
            assert held(vm.client.hot_reset(id="c0")) == {FIRST: "c0", SECOND: "c1"}
            assert resets(events) == [("c0", "hot"), ("c1", "hot")]
        assert was_reset(vm, "c0")
        assert was_reset(vm, "c1")
        vm.remove("c0")
        vm.remove("c1")
        vm.client.object_del(id="i0")
        vm.client.object_del(id="i1")


def test_a_group_and_a_cdev_do_not_mix(vm: Vm) -> None:
    with vm.bound(FIRST, SECOND):
        add_iommufd(vm)
        add_cdev(vm, FIRST, "c0")
        vm.add(SECOND, "n1")
        for name in ("c0", "n1"):
            with pytest.raises(RemoteError, match="one reset cannot cover both"):
                vm.client.hot_reset(id=name)
        vm.remove("c0")
        vm.remove("n1")
        vm.client.object_del(id="i0")


# --- SR-IOV --------------------------------------------------------------------------------------------------------


@contextmanager
def virtual_functions(vm: Vm, physical: str, count: int) -> Iterator[None]:
    """Have a physical function make virtual ones, for a block. vfio-pci does it only when told that it may.

    On failure vfiod ends first: the kernel waits with taking them away until nobody holds one.
    """
    parameter = Path("/sys/module/vfio_pci/parameters/enable_sriov")
    parameter.write_text("Y")
    file = pci.device_path(physical) / "sriov_numvfs"
    file.write_text(str(count))
    try:
        yield
    except BaseException:
        vm.process.kill()
        vm.process.wait()
        raise
    finally:
        file.write_text("0")


def test_virtual_functions_of_the_hosts_igb_by_group(vm: Vm) -> None:
    """Section 1, "Several devices per group, several groups per container", with VFs: the host keeps the PF."""
    one, two = IGB_VIRTUAL[0]
    pci.wait_until(lambda: pci.driver_of(FIRST) == "igb", "the host drives its function")
    with virtual_functions(vm, FIRST, 2), vm.bound(one, two):
        assert pci.group_of(one) != pci.group_of(two)
        vm.add(one, "v0")
        vm.add(two, "v1", container=False)
        (container,) = vm.client.query_machine().containers
        assert sorted(container.groups) == sorted([pci.group_of(one), pci.group_of(two)])
        for device in vm.client.query_devices():
            assert (device.vendor_id, device.device_id) == (0x8086, 0x10CA)
        # A VF resets alone (FLR); its bus is the host's.
        vm.client.device_reset(id="v0")
        report = vm.client.query_hot_reset(id="v0")
        assert not report.possible
        print(report.reason)
        vm.remove("v0")
        vm.remove("v1")


def test_a_vf_whose_pf_is_vfios_needs_its_token(vm: Vm) -> None:
    """Issue 3: "the VF token (DEVICE_FEATURE) as a device_add property", by group."""
    one, _ = IGB_VIRTUAL[0]
    with vm.bound(FIRST):
        with opened_group(FIRST) as group:
            vm.client.device_add(driver="vfio-pci", id="pf", host=FIRST, group_fd=group, vf_token=TOKEN)
        with virtual_functions(vm, FIRST, 1):
            pci.wait_until(lambda: pci.driver_of(one) == "vfio-pci", "VFs of vfio-pci's are vfio-pci's")
            with opened_group(one) as group:
                for wrong in (UNSET, OTHER_TOKEN):
                    with pytest.raises(RemoteError, match="token") as refused:
                        vm.client.device_add(driver="vfio-pci", id="vf", host=one, group_fd=group, vf_token=wrong)
                    assert refused.value.errno == "EACCES"
                vm.client.device_add(driver="vfio-pci", id="vf", host=one, group_fd=group, vf_token=TOKEN)
            report = vm.client.query_hot_reset(id="pf")
            assert one in [function.address for function in report.affected]
            print(held(report))
            vm.remove("vf")
        vm.remove("pf")


def test_a_vf_whose_pf_is_vfios_needs_its_token_by_cdev(vm: Vm) -> None:
    """Issue 3: "the VF token (DEVICE_FEATURE) as a device_add property", by cdev: it goes with the bind."""
    one, _ = IGB_VIRTUAL[0]
    with vm.bound(FIRST):
        add_iommufd(vm)
        with opened(str(pci.vfio_cdev(FIRST))) as fd:
            vm.client.device_add(driver="vfio-pci", id="pf", fd=fd, iommufd="i0", vf_token=TOKEN)
        with virtual_functions(vm, FIRST, 1):
            pci.wait_until(lambda: pci.driver_of(one) == "vfio-pci", "VFs of vfio-pci's are vfio-pci's")
            with opened(str(pci.vfio_cdev(one))) as fd:
                for wrong in (UNSET, OTHER_TOKEN):
                    with pytest.raises(RemoteError, match="token") as refused:
                        vm.client.device_add(driver="vfio-pci", id="vf", fd=fd, iommufd="i0", vf_token=wrong)
                    assert refused.value.errno == "EACCES"
                vm.client.device_add(driver="vfio-pci", id="vf", fd=fd, iommufd="i0", vf_token=TOKEN)
            assert sorted(device.id for device in vm.client.query_devices()) == ["pf", "vf"]
            assert vm.remove("vf")
        assert vm.remove("pf")
        vm.client.object_del(id="i0")


@pytest.mark.parametrize("way", ["group", "cdev"])
def test_no_hot_reset_while_there_are_virtual_functions(vm: Vm, way: str) -> None:
    """Section 6: a VF is a function of its PF's bus, and the kernel resets no bus that has any, whoever holds it."""
    one, _ = IGB_VIRTUAL[0]

    def add(address: str, name: str) -> None:
        token: Any = UNSET if address == SECOND else TOKEN
        if way == "cdev":
            with opened(str(pci.vfio_cdev(address))) as fd:
                vm.client.device_add(driver="vfio-pci", id=name, fd=fd, iommufd="i0", vf_token=token)
        else:
            with opened_group(address) as group:
                vm.client.device_add(driver="vfio-pci", id=name, host=address, group_fd=group, vf_token=token)

    with vm.bound(FIRST, SECOND):
        if way == "cdev":
            add_iommufd(vm)
        add(FIRST, "pf")
        add(SECOND, "n1")
        with virtual_functions(vm, FIRST, 1):
            pci.wait_until(lambda: pci.driver_of(one) == "vfio-pci", "VFs of vfio-pci's are vfio-pci's")
            mark(vm, "pf")
            add(one, "vf")
            for name in ("pf", "n1"):
                report = vm.client.query_hot_reset(id=name)
                assert not report.possible
                assert {address: kept for address, kept in held(report).items() if address != one} == {
                    FIRST: "pf",
                    SECOND: "n1",
                }
                assert "virtual function" in str(held(report)[one])
                with told_resets(vm) as events:
                    with pytest.raises(RemoteError, match="sriov_numvfs") as refused:
                        vm.client.hot_reset(id=name)
                    assert resets(events) == []
                assert refused.value.errno == "EPERM"
            assert not was_reset(vm, "pf"), "refused: nothing is touched"
            # The VF itself can be reset alone.
            vm.client.device_reset(id="vf")
            assert vm.read("vf", 0x8) != 0xFFFF_FFFF
            assert vm.remove("vf")
        with told_resets(vm) as events:
            assert held(vm.client.hot_reset(id="pf")) == {FIRST: "pf", SECOND: "n1"}
            assert resets(events) == [("n1", "hot"), ("pf", "hot")]
        assert was_reset(vm, "pf")
        assert vm.remove("pf")
        assert vm.remove("n1")
        if way == "cdev":
            vm.client.object_del(id="i0")
