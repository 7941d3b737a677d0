"""The main job on the real kernel: root opens VFIO groups and passes them, an unprivileged vfiod serves the devices.

Rules are those of behaviour.md, by section.

Rules are those of behaviour.md, sections 1, 3, 4 and 6.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.vm import Vm, opened, opened_group, running_vm, told, trigger_of
from tests.lab.topologies import EDU_PAIR, EDU_PORT, EDU_ROOT, EDU_SHARED, SHARED_NEIGHBOUR

from vfiod.client.methods.values import VectorFds
from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceRequested, DeviceUnplugError
from vfiod.protocol.catalogue.reset import DeviceResetDone
from vfiod.protocol.catalogue.words import DeviceState
from vfiod.protocol.errors import RemoteError

MACHINE = "edu"

IOVA = 0x100000
HOTPLUGS = 200


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    """Running vfiods: one for all tests, as starting it takes long here; a new one when a test has ended it."""

    def running() -> Generator[Vm, None, None]:
        with ExitStack() as stack:
            vm: Vm | None = None
            while True:
                if vm is None or vm.process.poll() is not None:
                    vm = stack.enter_context(running_vm(tmp_path_factory.mktemp("vm")))
                yield vm

    vms = running()
    yield vms
    vms.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Iterator[Vm]:
    """A vfiod with nothing in it, before the test and after."""
    running = next(vms)
    before = running.fds()
    yield running
    if running.process.poll() is None:
        picture = running.client.query_machine()
        assert (picture.devices, picture.objects, picture.mappings, picture.containers) == ([], [], [], [])
        pci.wait_until(lambda: running.fds() == before, f"its fds are as before: {before}, {running.fds()}")


def fired(eventfd: int, seconds: float = 20.0) -> int:
    """How often an eventfd was signalled; 0 when it was not in time."""
    ready, _, _ = select.select([eventfd], [], [], seconds)
    return int.from_bytes(os.read(eventfd, 8), "little") if ready else 0


def quiet(eventfd: int) -> bool:
    """Whether an eventfd stays silent for a while that is long for an interrupt."""
    return not select.select([eventfd], [], [], 0.2)[0]


def counts(vm: Vm, name: str, index: str) -> tuple[int | None, int | None, str]:
    irq = next(irq for irq in vm.client.query_irqs(device=name) if irq.name == index)
    return irq.fired, irq.delivered, irq.vectors[0].state


# --- section 1 and 3: adding, identity, regions --------------------------------------------------


def test_identity_by_the_fast_and_the_slow_path(vm: Vm) -> None:
    before = vm.fds()
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        assert vm.read("edu", pci.EDU_ID) == pci.EDU_IDENTITY
        vm.write("edu", pci.EDU_LIVENESS, 0x12345678)
        assert vm.read("edu", pci.EDU_LIVENESS) == 0xEDCBA987
        (device,) = vm.client.query_devices()
        assert (device.vendor_id, device.device_id) == (pci.EDU_VENDOR, pci.EDU_DEVICE)
        assert device.state is DeviceState.RUNNING
        assert device.fast_path
        bar0 = next(region for region in vm.client.query_regions(device="edu") if region.name == "bar0")
        assert (bar0.size, bar0.mappable, bar0.mapped) == (pci.EDU_BAR_SIZE, True, True)
        config = vm.client.region_read(device="edu", region="config", offset=0, size=4).value
        assert config == pci.EDU_DEVICE << 16 | pci.EDU_VENDOR
        assert vm.remove("edu")
    assert vm.fds() == before


def test_what_is_refused_leaves_the_machine_as_it_was(vm: Vm) -> None:
    before = vm.fds()
    with vm.bound(EDU_PORT, EDU_ROOT):
        with opened_group(EDU_ROOT) as wrong, opened("/dev/vfio/vfio") as container:
            with pytest.raises(RemoteError, match=EDU_PORT.replace(".", r"\.")):
                vm.client.device_add(driver="vfio-pci", id="edu", host=EDU_PORT, group_fd=wrong, container_fd=container)
            with pytest.raises(RemoteError, match="group"):
                vm.client.device_add(driver="vfio-pci", id="edu", host=EDU_PORT, group_fd=container)
        with pytest.raises(RemoteError, match=r"group-fd|allow-open"):
            vm.client.device_add(driver="vfio-pci", id="edu", host=EDU_PORT)
        assert vm.client.query_devices() == []
        assert vm.fds() == before
        # And the right fds work straight afterwards.
        vm.add(EDU_PORT, "edu")
        assert vm.remove("edu")
    assert vm.fds() == before


def test_two_devices_of_one_group_need_the_group_once(vm: Vm) -> None:
    first, second = EDU_PAIR
    before = vm.fds()
    with vm.bound(first, second):
        with opened_group(first) as group, opened("/dev/vfio/vfio") as container:
            vm.client.device_add(driver="vfio-pci", id="first", host=first, group_fd=group, container_fd=container)
            with pytest.raises(RemoteError, match="group"):
                vm.client.device_add(driver="vfio-pci", id="second", host=second, group_fd=group)
        vm.add(second, "second", group=False)
        vm.write("first", pci.EDU_LIVENESS, 1)
        vm.write("second", pci.EDU_LIVENESS, 2)
        assert vm.read("first", pci.EDU_LIVENESS) == 0xFFFFFFFE
        assert vm.read("second", pci.EDU_LIVENESS) == 0xFFFFFFFD
        (held,) = vm.client.query_machine().containers
        assert held.groups == [pci.group_of(first)]
        vm.remove("first")
        assert vm.read("second", pci.EDU_ID) == pci.EDU_IDENTITY
        assert vm.remove("second")
        assert vm.client.query_machine().containers == []
    assert vm.fds() == before


def test_devices_of_two_groups_share_a_container(vm: Vm) -> None:
    with vm.bound(EDU_PORT, EDU_ROOT):
        vm.add(EDU_PORT, "port")
        vm.add(EDU_ROOT, "root", container=False)
        (container,) = vm.client.query_machine().containers
        assert sorted(container.groups) == sorted([pci.group_of(EDU_PORT), pci.group_of(EDU_ROOT)])
        vm.remove("port")
        assert vm.read("root", pci.EDU_ID) == pci.EDU_IDENTITY
        vm.remove("root")


def test_a_group_that_is_not_viable_names_who_is_in_the_way(vm: Vm) -> None:
    before = vm.fds()
    with vm.bound(EDU_SHARED):
        assert pci.driver_of(SHARED_NEIGHBOUR) == "virtio-pci"
        with pytest.raises(RemoteError) as refused:
            vm.add(EDU_SHARED, "edu")
        assert SHARED_NEIGHBOUR in refused.value.desc
        assert "virtio-pci" in refused.value.desc
        with opened_group(EDU_SHARED) as group, opened("/dev/vfio/vfio") as container:
            report = vm.client.device_add(
                driver="vfio-pci", id="edu", host=EDU_SHARED, group_fd=group, container_fd=container, x_dry_run=True
            )
        assert report.possible is False
        failed = [check for check in report.checks or [] if not check.ok]
        assert "viable" in [check.name for check in failed]
        assert vm.client.query_devices() == []
    assert vm.fds() == before


def test_a_dry_run_reports_and_changes_nothing(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        with opened_group(EDU_PORT) as group, opened("/dev/vfio/vfio") as container:
            report = vm.client.device_add(
                driver="vfio-pci", id="edu", host=EDU_PORT, group_fd=group, container_fd=container, x_dry_run=True
            )
        checks = {check.name: check for check in report.checks or []}
        assert report.possible is True, checks
        assert {"viable", "memory-lock", "open-files"} <= set(checks)
        assert vm.client.query_devices() == []
        assert vm.client.query_machine().containers == []
        vm.add(EDU_PORT, "edu")
        vm.remove("edu")


# --- section 2: guest memory -----------------------------------------------------------------------


def copy_through(vm: Vm, name: str, source: int, destination: int, count: int) -> None:
    """Have edu fetch from one IOVA and store to another."""
    for command, (origin, target) in {
        pci.EDU_DMA_START: (source, pci.EDU_BUFFER),
        pci.EDU_DMA_START | pci.EDU_DMA_TO_RAM: (pci.EDU_BUFFER, destination),
    }.items():
        vm.write(name, pci.EDU_DMA_SOURCE, origin, 8)
        vm.write(name, pci.EDU_DMA_DESTINATION, target, 8)
        vm.write(name, pci.EDU_DMA_COUNT, count, 8)
        vm.write(name, pci.EDU_DMA_COMMAND, command, 8)
        pci.wait_until(lambda: not vm.read(name, pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "edu's DMA is done")


def test_dma_out_and_back_through_memory_mapped_before_and_after(vm: Vm) -> None:
    size = 1 << 20
    ram = os.memfd_create("guest")
    os.ftruncate(ram, size)
    vm.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=ram)
    before = vm.client.dma_map(iova=IOVA, size=size // 2, memory_backend="ram0")
    assert (before.iova, before.size) == (IOVA, size // 2)
    pattern = struct.pack("<1024I", *range(1024))
    os.pwrite(ram, pattern, 0)
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")  # the mapping is replayed into its container
        vm.client.dma_map(iova=IOVA + size // 2, size=size // 2, memory_backend="ram0", offset=size // 2)
        vm.let_it_work("edu")
        copy_through(vm, "edu", IOVA, IOVA + size // 2 + 4096, 4096)
        assert os.pread(ram, 4096, size // 2 + 4096) == pattern
        assert os.pread(ram, 4096, size // 2) == bytes(4096)
        with pytest.raises(RemoteError, match=r"overlap|exist"):
            vm.client.dma_map(iova=IOVA + 4096, size=4096, memory_backend="ram0")
        with pytest.raises(RemoteError, match="split"):
            vm.client.dma_unmap(iova=IOVA, size=4096)
        assert vm.client.dma_unmap(iova=IOVA, size=size).size == size
        # What is unmapped is out of reach: the device gets nothing, and vfiod lives.
        os.pwrite(ram, bytes(4096), size // 2 + 4096)
        copy_through(vm, "edu", IOVA, IOVA + size // 2 + 4096, 4096)
        assert os.pread(ram, 4096, size // 2 + 4096) == bytes(4096)
        assert vm.remove("edu")
    vm.client.object_del(id="ram0")
    os.close(ram)


def test_a_memory_lock_limit_too_low_is_named_with_its_value_and_the_need(tmp_path: Path) -> None:
    limit, size = 1 << 20, 8 << 20
    ram = os.memfd_create("guest")
    os.ftruncate(ram, size)
    with running_vm(tmp_path, memlock=limit) as vm, vm.bound(EDU_PORT):
        vm.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=ram)
        vm.add(EDU_PORT, "edu")
        with pytest.raises(RemoteError) as refused:
            vm.client.dma_map(iova=IOVA, size=size, memory_backend="ram0")
        assert refused.value.errno == "ENOMEM"
        assert "RLIMIT_MEMLOCK" in refused.value.desc
        assert str(limit) in refused.value.desc
        assert str(size) in refused.value.desc
        assert vm.client.query_dma() == []
        # The same when the mapping is there first and the device comes later: the device is not added.
        vm.remove("edu")
        vm.client.dma_map(iova=IOVA, size=size, memory_backend="ram0")
        before = vm.client.query_fds()
        with pytest.raises(RemoteError, match="RLIMIT_MEMLOCK"):
            vm.add(EDU_PORT, "edu")
        assert vm.client.query_devices() == []
        assert [i for i in vm.client.query_fds() if not (i.name or "").startswith("client-")] == before
    os.close(ram)


# --- section 4: interrupts -------------------------------------------------------------------------


@pytest.mark.parametrize("address", [EDU_ROOT, EDU_PORT])
def test_msi_relayed_is_delivered_and_counted(vm: Vm, address: str) -> None:
    with vm.bound(address):
        vm.add(address, "edu")
        vm.let_it_work("edu")
        with vm.client.irq_start(device="edu", index="msi", mode="relayed") as started:
            (irq,) = started.irqs
            assert irq.mode == "relayed"
            trigger = trigger_of(started)
            for number in range(1, 6):
                vm.write("edu", pci.EDU_IRQ_RAISE, 1)
                assert fired(trigger) == 1
                vm.write("edu", pci.EDU_IRQ_ACK, 1)
                wanted = (number, number)
                pci.wait_until(lambda w=wanted: counts(vm, "edu", "msi")[:2] == w, "the interrupt is counted")  # type: ignore[misc]
            vm.client.irq_trigger(device="edu", index="msi")
            assert fired(trigger) == 1
            vm.client.irq_stop(device="edu", index="msi")
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert quiet(trigger)
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
        vm.remove("edu")


def test_msi_direct_goes_past_vfiod(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        vm.let_it_work("edu")
        trigger = os.eventfd(0)
        vm.client.irq_start(device="edu", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
        vm.write("edu", pci.EDU_IRQ_RAISE, 1)
        assert fired(trigger) == 1
        assert counts(vm, "edu", "msi")[:2] == (None, None)
        vm.write("edu", pci.EDU_IRQ_ACK, 1)
        os.close(trigger)
        vm.remove("edu")


@pytest.mark.parametrize("address", [EDU_ROOT, EDU_PORT])
def test_intx_relayed_masks_until_eoi(vm: Vm, address: str) -> None:
    with vm.bound(address):
        vm.add(address, "edu")
        vm.let_it_work("edu")
        with vm.client.irq_start(device="edu", mode="relayed") as started:
            trigger = trigger_of(started)
            for number in range(1, 4):
                vm.client.irq_eoi(device="edu", index="intx")  # nothing pending: does nothing
                vm.write("edu", pci.EDU_IRQ_RAISE, 1)
                assert fired(trigger) == 1
                assert quiet(trigger), "the line is masked until it is completed"
                assert counts(vm, "edu", "intx") == (number, number, "pending")
                vm.write("edu", pci.EDU_IRQ_ACK, 1)
                vm.client.irq_eoi(device="edu", index="intx")
                assert counts(vm, "edu", "intx")[2] == "inactive"
            # Completed without being served, a level interrupt comes again.
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger) == 1
            vm.client.irq_eoi(device="edu", index="intx")
            assert fired(trigger) == 1
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
            vm.client.irq_eoi(device="edu", index="intx")
        vm.remove("edu")


def test_intx_direct_is_completed_by_the_resample_eventfd(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        vm.let_it_work("edu")
        trigger, resample = os.eventfd(0), os.eventfd(0)
        started = vm.client.irq_start(device="edu", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)])
        assert started.irqs[0].mode == "direct"
        for _ in range(3):
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger) == 1
            assert quiet(trigger)
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
            os.eventfd_write(resample, 1)
        # One kind at a time: MSI ends INTx, and INTx comes back when asked for.
        with vm.client.irq_start(device="edu", index="msi", mode="relayed") as msi:
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger_of(msi)) == 1
            assert quiet(trigger)
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
        vm.client.irq_start(device="edu", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)])
        vm.write("edu", pci.EDU_IRQ_RAISE, 1)
        assert fired(trigger) == 1
        vm.write("edu", pci.EDU_IRQ_ACK, 1)
        vm.remove("edu")
        os.close(trigger)
        os.close(resample)


def test_intx_is_completed_by_the_first_access_and_the_fast_path_comes_back(vm: Vm) -> None:
    def fast() -> bool:
        return vm.client.query_devices(id="edu")[0].fast_path

    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        vm.let_it_work("edu")
        with vm.client.irq_start(device="edu", mode="relayed") as started:
            trigger = trigger_of(started)
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger) == 1
            assert counts(vm, "edu", "intx")[2] == "pending"
            assert not fast()
            vm.write("edu", pci.EDU_IRQ_ACK, 1)  # the trapped access is the EOI
            assert counts(vm, "edu", "intx")[2] == "inactive"
            pci.wait_until(fast, "the fast path is restored")
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger) == 1
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
        vm.remove("edu")


def test_masking_intx(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        vm.let_it_work("edu")
        with vm.client.irq_start(device="edu", mode="relayed") as started:
            trigger = trigger_of(started)
            vm.client.irq_mask(device="edu", index="intx", oob=True)
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert quiet(trigger)
            vm.client.irq_unmask(device="edu", index="intx")
            assert fired(trigger) == 1
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
            vm.client.irq_eoi(device="edu", index="intx")
            with pytest.raises(RemoteError, match="mask"):
                vm.client.irq_mask(device="edu", index="msi")
            with pytest.raises(RemoteError, match=r"req|reserved|vfiod"):
                vm.client.irq_start(device="edu", index="req")
        vm.remove("edu")


# --- section 6: reset --------------------------------------------------------------------------------


def test_reset_behind_the_root_port_restores_interrupts(vm: Vm) -> None:
    with vm.bound(EDU_PORT, EDU_ROOT):
        vm.add(EDU_PORT, "edu")
        vm.let_it_work("edu")
        vm.write("edu", pci.EDU_LIVENESS, 0x1111)
        with vm.client.irq_start(device="edu", index="msi", mode="relayed") as started:
            with vm.client.events("DEVICE_RESET") as events:
                vm.client.device_reset(id="edu")
                assert told(events.get(timeout=30), DeviceResetDone).device == "edu"
            assert vm.read("edu", pci.EDU_ID) == pci.EDU_IDENTITY
            vm.let_it_work("edu")
            vm.write("edu", pci.EDU_IRQ_RAISE, 1)
            assert fired(trigger_of(started)) == 1
            vm.write("edu", pci.EDU_IRQ_ACK, 1)
        vm.add(EDU_ROOT, "root", container=False)
        assert not vm.client.query_devices(id="root")[0].reset
        with pytest.raises(RemoteError, match="reset"):
            vm.client.device_reset(id="root")
        vm.client.system_reset()
        assert vm.read("edu", pci.EDU_ID) == pci.EDU_IDENTITY
        vm.remove("edu")
        vm.remove("root")


# --- the host takes it back ---------------------------------------------------------------------------


def test_a_host_unbind_while_held_is_a_request_and_ends(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        with vm.client.events("DEVICE_REQUESTED") as requested:
            unbind = threading.Thread(target=pci.unbind, args=(EDU_PORT,))
            unbind.start()
            event = requested.get(timeout=60)
            assert told(event, DeviceRequested).device == "edu"
            assert unbind.is_alive(), "the host waits for the device"
            assert vm.remove("edu")
            unbind.join(60)
            assert not unbind.is_alive()
        assert pci.driver_of(EDU_PORT) is None


def test_on_request_delete_gives_it_back_by_itself(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        with opened_group(EDU_PORT) as group:
            vm.client.device_add(driver="vfio-pci", id="edu", host=EDU_PORT, group_fd=group, on_request="delete")
        with vm.client.events("DEVICE_DELETED") as deleted:
            pci.unbind(EDU_PORT)
            assert told(deleted.get(timeout=60), DeviceDeleted).released
        assert vm.client.query_devices() == []


# --- given out, killed, and again and again --------------------------------------------------------------


def test_a_mapped_region_holds_the_device_and_force_says_it_is_not_released(vm: Vm) -> None:
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        with vm.client.region_map(device="edu", region="bar0") as given:
            window = mmap.mmap(given.map_fd.number, 4096, offset=given.offset)
            assert memoryview(window).cast("I")[0] == pci.EDU_IDENTITY
            with vm.client.events("DEVICE_UNPLUG_ERROR", "DEVICE_DELETED") as events:
                vm.client.device_del(id="edu", timeout_ms=200)
                event = events.get(timeout=30)
                assert told(event, DeviceUnplugError).held_by[0].kind == "mapping"
                assert vm.read("edu", pci.EDU_ID) == pci.EDU_IDENTITY
                vm.client.device_del(id="edu", force=True)
                event = events.get(timeout=30)
                assert told(event, DeviceDeleted).released is False
        window.close()
        # Its holder let go: the same group, the same address work again.
        vm.add(EDU_PORT, "again", group=False)
        assert vm.read("again", pci.EDU_ID) == pci.EDU_IDENTITY
        assert vm.remove("again")


def test_killing_vfiod_gives_everything_back(tmp_path: Path) -> None:
    with pci.bound(EDU_PORT):
        with pytest.raises(AssertionError, match="-9"), running_vm(tmp_path) as vm:  # its status says it was killed
            vm.add(EDU_PORT, "edu")
            vm.process.kill()
            vm.process.wait()
        pci.unbind(EDU_PORT)  # would hang if anything still held it
        assert pci.driver_of(EDU_PORT) is None


def test_killing_a_manager_leaves_the_device_and_nothing_else(vm: Vm, tmp_path: Path) -> None:
    before = vm.fds()
    code = (
        "import os, sys\n"
        "from vfiod.client.sync import Client\n"
        "c = Client.connect(sys.argv[1])\n"
        "c.send_fds([os.open('/dev/vfio/vfio', os.O_RDWR), os.eventfd(0)])\n"
        "c.getfd(fdname='left')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(vm.path)], check=False)
    assert done.returncode == -9
    pci.wait_until(lambda: vm.fds() == before, "what the manager had sent is closed")


def test_hotplug_of_the_hypervisors_kind_200_times(vm: Vm) -> None:
    ram = os.memfd_create("guest")
    os.ftruncate(ram, 1 << 20)
    vm.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=ram)
    vm.client.dma_map(iova=IOVA, size=1 << 20, memory_backend="ram0")
    began = time.monotonic()
    with vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu")
        vm.remove("edu")
        before = vm.fds()
        for _ in range(HOTPLUGS):
            vm.add(EDU_PORT, "edu")
            assert vm.read("edu", pci.EDU_ID) == pci.EDU_IDENTITY
            assert vm.remove("edu")
        assert vm.fds() == before
    vm.client.dma_unmap(iova=IOVA, size=1 << 20)
    vm.client.object_del(id="ram0")
    print(f"{HOTPLUGS} hotplugs in {time.monotonic() - began:.1f} s")
    os.close(ram)
