"""Hot reset and system_reset on the real kernel: behaviour.md section 6, with QEMU's edu.

Two functions of one slot, and two devices behind one bridge: each pair is one IOMMU group here. Where the functions of
one slot are in groups of their own: ``test_igb.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from tests.integration.pages.conversation import converse
from tests.lab.guest import pci
from tests.lab.guest.resets import (
    add_cdev,
    add_iommufd,
    add_member,
    forget_names,
    held,
    resets,
    running_vms,
    told_resets,
)
from tests.lab.guest.test_vfiod import IOVA, copy_through, fired
from tests.lab.guest.vm import Vm, opened_group, trigger_of
from tests.lab.topologies import EDU_FUNCTIONS, EDU_PAIR, EDU_PORT, EDU_ROOT

from vfiod.protocol.errors import RemoteError
from vfiod.protocol.examples import LAB_STORIES

MACHINE = "edu"


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = running_vms(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    """A vfiod with nothing in it: each test removes what it added, or ends it."""
    return next(vms)


def command_register(vm: Vm, name: str) -> int:
    value = vm.client.region_read(device=name, region="config", offset=4, size=2).value
    assert isinstance(value, int)
    return value & 0x6


@pytest.mark.parametrize("pair", [EDU_FUNCTIONS, EDU_PAIR], ids=["slot", "bridge"])
def test_both_are_reset_together_and_work_afterwards(vm: Vm, pair: tuple[str, str]) -> None:
    """Section 6: "all affected devices quiesce and drop interrupts; after: each is restored and emits DEVICE_RESET"."""
    first, second = pair
    with vm.bound(first, second):
        vm.add(first, "n0")
        add_member(vm, second, "n1")
        triggers = {}
        for name in ("n0", "n1"):
            vm.let_it_work(name)
            triggers[name] = vm.client.irq_start(device=name, index="msi", mode="relayed")
        report = vm.client.query_hot_reset(id="n0", oob=False)
        assert (report.possible, held(report)) == (True, {first: "n0", second: "n1"})
        with told_resets(vm) as events:
            assert vm.client.hot_reset(id="n0") == report
            assert resets(events) == [("n0", "hot"), ("n1", "hot")]
        for name, started in triggers.items():
            with started:
                assert command_register(vm, name) == 6
                assert vm.read(name, pci.EDU_ID) == pci.EDU_IDENTITY
                vm.write(name, pci.EDU_IRQ_RAISE, 1)
                assert fired(trigger_of(started)) == 1
                vm.write(name, pci.EDU_IRQ_ACK, 1)
        vm.remove("n0")
        vm.remove("n1")


def test_a_neighbour_of_the_same_group_that_nobody_added_is_reset_too(vm: Vm) -> None:
    """Its group is held here, so nobody else can have it."""
    first, second = EDU_FUNCTIONS
    with vm.bound(first, second):
        vm.add(first, "n0")
        assert held(vm.client.hot_reset(id="n0")) == {first: "n0", second: None}
        vm.remove("n0")


def test_refused_for_a_neighbour_without_a_vfio_driver(vm: Vm) -> None:
    """Section 6: "Refused: nothing is touched". The group is viable all the same: nothing is bound to the neighbour."""
    first, second = EDU_FUNCTIONS
    with vm.bound(first):
        vm.add(first, "n0")
        vm.let_it_work("n0")
        report = vm.client.query_hot_reset(id="n0")
        assert not report.possible
        assert "bound to no driver" in str(held(report)[second])
        with told_resets(vm) as events:
            with pytest.raises(RemoteError, match=second.replace(".", r"\.")) as refused:
                vm.client.hot_reset(id="n0")
            assert resets(events) == []
        assert refused.value.errno == "EPERM"
        assert command_register(vm, "n0") == 6
        vm.remove("n0")


def test_a_device_that_has_no_bus_of_its_own(vm: Vm) -> None:
    with vm.bound(EDU_ROOT):
        vm.add(EDU_ROOT, "n0")
        report = vm.client.query_hot_reset(id="n0")
        assert (report.possible, report.affected) == (False, [])
        with pytest.raises(RemoteError, match="neither its bus nor its slot can be reset"):
            vm.client.hot_reset(id="n0")
        vm.remove("n0")


def test_cdevs_own_their_bus_by_one_iommufd(vm: Vm) -> None:
    """Section 6: "with cdevs: allowed only when DEV_ID_OWNED, zero-length fd array. The two do not mix"."""
    first, second = EDU_FUNCTIONS
    with vm.bound(first, second, EDU_PORT):
        add_iommufd(vm)
        add_cdev(vm, first, "c0")
        report = vm.client.query_hot_reset(id="c0")
        assert report.possible
        assert [one.devid for one in report.affected][1] == 0  # owned: by its group
        add_cdev(vm, second, "c1")
        vm.let_it_work("c1")
        with opened_group(EDU_PORT) as group, pytest.raises(RemoteError, match="do not mix"):
            vm.client.hot_reset(id="c0", group_fds=[group])
        forget_names(vm)
        with told_resets(vm) as events:
            assert held(vm.client.hot_reset(id="c0")) == {first: "c0", second: "c1"}
            assert resets(events) == [("c0", "hot"), ("c1", "hot")]
        assert command_register(vm, "c1") == 6
        assert vm.read("c1", pci.EDU_ID) == pci.EDU_IDENTITY
        vm.remove("c0")
        vm.remove("c1")
        vm.client.object_del(id="i0")


def test_reset_while_dma_runs(vm: Vm) -> None:
    """Issue 3: bus mastering goes off first; memory and device are whole afterwards."""
    ram = os.memfd_create("guest")
    os.ftruncate(ram, 1 << 16)
    vm.client.dma_map(iova=IOVA, size=1 << 16, fd=ram)
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "n0")
        vm.let_it_work("n0")
        os.pwrite(ram, b"before" * 600, 0)
        for _ in range(5):
            vm.write("n0", pci.EDU_DMA_SOURCE, pci.EDU_BUFFER, 8)
            vm.write("n0", pci.EDU_DMA_DESTINATION, IOVA + 8192, 8)
            vm.write("n0", pci.EDU_DMA_COUNT, 4096, 8)
            vm.write("n0", pci.EDU_DMA_COMMAND, pci.EDU_DMA_START | pci.EDU_DMA_TO_RAM, 8)
            vm.client.hot_reset(id="n0")
            pci.wait_until(lambda: not vm.read("n0", pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "edu is idle")
        assert os.pread(ram, 3600, 0) == b"before" * 600
        copy_through(vm, "n0", IOVA, IOVA + 16384, 2048)
        assert os.pread(ram, 2048, 16384) == os.pread(ram, 2048, 0)
        vm.remove("n0")
    vm.client.dma_unmap(iova=IOVA, size=1 << 16)
    os.close(ram)


def test_system_reset_hot_resets_what_cannot_be_reset_alone(vm: Vm) -> None:
    """Section 6: "hot-reset each bus once for those that can only be reset that way, then reset the others"."""
    first, second = EDU_PAIR
    with vm.bound(first, second, EDU_PORT):
        vm.add(first, "n0")
        add_member(vm, second, "n1")
        vm.add(EDU_PORT, "alone")
        can_reset = {device.id: device.reset for device in vm.client.query_devices()}
        assert not can_reset["n1"]
        assert can_reset["alone"]
        with told_resets(vm) as events:
            vm.client.system_reset()
            assert resets(events) == [("alone", "device"), ("n0", "hot"), ("n1", "hot")]
        for name in ("n0", "n1", "alone"):
            vm.remove(name)


def test_the_topology_of_all_that(vm: Vm) -> None:
    first, second = EDU_FUNCTIONS
    with vm.bound(first, second, EDU_PORT):
        vm.add(first, "n0")
        add_iommufd(vm)
        add_cdev(vm, EDU_PORT, "c0")
        topology = vm.client.query_topology()
        edges = {(edge.parent, edge.child) for edge in topology.edges}
        group = f"group:{pci.group_of(first)}"
        assert {(group, "device:n0"), (group, f"host:{second}")} <= edges
        (ioas,) = [node.id for node in topology.nodes if node.kind == "ioas"]
        assert (ioas, "device:c0") in edges
        domains = {node.id: node.label for node in topology.nodes if node.kind == "reset-domain"}
        assert sorted(domains.values()) == ["reset of slot 0000:01:00", "reset of slot 0000:04:00"]
        (mine,) = [id for id, label in domains.items() if label.endswith("04:00")]
        assert {(mine, "device:n0"), (mine, f"host:{second}")} <= edges
        tree = str(vm.client.query_topology(format="tree").text)
        print(tree)
        assert group in tree
        svg = str(vm.client.query_topology(format="svg").text)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        vm.remove("n0")
        vm.remove("c0")
        vm.client.object_del(id="i0")


def test_the_examples_of_the_reference(vm: Vm) -> None:
    """docs/commands.md shows them; only the addresses and the group are another's."""
    with vm.bound(*EDU_FUNCTIONS):
        story = LAB_STORIES["kernel"]
        group = pci.group_of(EDU_FUNCTIONS[0])
        for shown, here in zip(("0000:03:00.0", "0000:03:00.1"), EDU_FUNCTIONS, strict=True):
            story = story.replace(shown, here)
        story = story.replace("/dev/vfio/26", f"/dev/vfio/{group}").replace('"group": 26', f'"group": {group}')
        converse(vm.path, story, "kernel")
