"""An NVMe disk's queues, set up by the test: DMA, doorbells and MSI-X proven together, by group and by cdev.

Registers and commands: NVM Express 1.4, sections 3.1, 4.2, 4.6, 5.3, 5.4, 5.15 and 6.8.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from tests.lab.guest import nics, pci
from tests.lab.guest.nics import WAYS, added, fired, quiet, set_config, set_entry, triggers
from tests.lab.guest.vm import Vm
from tests.lab.topologies import NVME_PORT, NVME_SERIAL

MACHINE = "nvme"

CC, CSTS, AQA, ASQ, ACQ, SQ0_TAIL, CQ0_HEAD = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000, 0x1004
SQ1_TAIL, CQ1_HEAD = 0x1008, 0x100C
ENABLE, READY = 1, 1
ENTRIES = 16
CREATE_SQ, CREATE_CQ, IDENTIFY, CONTROLLER = 0x01, 0x05, 0x06, 1
FLUSH, NAMESPACE = 0x00, 1
IOVA, COMPLETIONS, ANSWER, IO_COMMANDS, IO_COMPLETIONS, SIZE = 0x10_0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x1_0000


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = nics.vfiods(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    return next(vms)


@pytest.fixture
def ram(vm: Vm) -> Iterator[int]:
    number = os.memfd_create("guest")
    os.ftruncate(number, SIZE)
    vm.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=number)
    vm.client.dma_map(iova=IOVA, size=SIZE, memory_backend="ram0")
    yield number
    vm.client.dma_unmap(iova=IOVA, size=SIZE)
    vm.client.object_del(id="ram0")
    os.close(number)


def start_controller(vm: Vm) -> None:
    vm.write("dev", CC, 0)
    pci.wait_until(lambda: not vm.read("dev", CSTS) & READY, "the controller has stopped")
    vm.write("dev", AQA, (ENTRIES - 1) << 16 | ENTRIES - 1)
    vm.write("dev", ASQ, IOVA, 8)
    vm.write("dev", ACQ, IOVA + COMPLETIONS, 8)
    vm.write("dev", CC, 6 << 16 | 4 << 20 | ENABLE)
    pci.wait_until(lambda: vm.read("dev", CSTS) & READY == READY, "the controller is ready")


def admin(vm: Vm, ram: int, slot: int, eventfd: int, opcode: int, pointer: int, *words: int) -> None:
    """One command through the admin queue, until its interrupt has come. ``words``: from dword 10 on."""
    command = struct.pack("<BBHIQQQQ6I", opcode, 0, 0x40 + slot, 0, 0, 0, pointer, 0, *words, *[0] * (6 - len(words)))
    os.pwrite(ram, command, 64 * slot)
    vm.write("dev", SQ0_TAIL, slot + 1)
    assert fired(eventfd) >= 1, "MSI-X says that it is done"
    _, _, head, _, cid, status = struct.unpack("<IIHHHH", os.pread(ram, 16, COMPLETIONS + 16 * slot))
    assert (cid, status) == (0x40 + slot, 1), "its id, success, phase 1"
    assert head == slot + 1
    vm.write("dev", CQ0_HEAD, slot + 1)


def identify(vm: Vm, ram: int, slot: int, eventfd: int) -> bytes:
    """One identify command through the queue; returns the controller's data when its interrupt has come."""
    os.pwrite(ram, bytes(4096), ANSWER)
    admin(vm, ram, slot, eventfd, IDENTIFY, IOVA + ANSWER, CONTROLLER)
    return os.pread(ram, 4096, ANSWER)


def flush(vm: Vm, ram: int, slot: int, eventfd: int) -> None:
    """One flush of the disk through the I/O queue, until its interrupt has come."""
    os.pwrite(ram, struct.pack("<BBHI56x", FLUSH, 0, 0x80 + slot, NAMESPACE), IO_COMMANDS + 64 * slot)
    vm.write("dev", SQ1_TAIL, slot + 1)
    assert fired(eventfd) >= 1, "the I/O queue's own vector says that it is done"
    _, _, head, queue, cid, status = struct.unpack("<IIHHHH", os.pread(ram, 16, IO_COMPLETIONS + 16 * slot))
    assert (head, queue, cid, status) == (slot + 1, 1, 0x80 + slot, 1)
    vm.write("dev", CQ1_HEAD, slot + 1)


def serial(data: bytes) -> str:
    return data[4:24].decode().strip()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["direct", "relayed"])
def test_identify_with_the_hypervisors_vector(vm: Vm, ram: int, way: str, mode: str) -> None:
    """Section 4, MSI-X, with sections 2 and 3."""
    with added(vm, NVME_PORT, way):
        with vm.client.irq_start(device="dev", index="msix", mode=mode) as started:  # type: ignore[arg-type]
            eventfd = triggers(started)[0]
            start_controller(vm)
            for slot in range(3):
                assert serial(identify(vm, ram, slot, eventfd)) == NVME_SERIAL
            # A reset stops it; set up again, it serves again, with the same eventfd.
            vm.client.device_reset(id="dev")
            fired(eventfd, 0.2)
            start_controller(vm)
            os.pwrite(ram, bytes(16 * ENTRIES), COMPLETIONS)
            assert serial(identify(vm, ram, 0, eventfd)) == NVME_SERIAL
        vm.write("dev", CC, 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["direct", "relayed"])
def test_a_vector_is_added_for_an_io_queue_while_the_first_works(vm: Vm, ram: int, way: str, mode: str) -> None:
    """Section 4, MSI-X: "Vectors are used one by one": vector 0 is the admin queue's, 1 comes with an I/O queue."""
    with added(vm, NVME_PORT, way):
        one = vm.client.irq_start(device="dev", index="msix", vectors=[0], mode=mode)  # type: ignore[arg-type]
        with one as started:
            first = triggers(started)[0]
            start_controller(vm)
            assert serial(identify(vm, ram, 0, first)) == NVME_SERIAL
            two = vm.client.irq_start(device="dev", index="msix", vectors=[1], mode=mode)  # type: ignore[arg-type]
            with two as more:
                second = triggers(more)[1]
                for fd in (first, second):
                    fired(fd, 0.2)  # said once of each used vector, where the kernel cannot add one
                # Both queues in one page each: 16 entries, id 1; completions by vector 1, interrupts on (5.3, 5.4).
                size = (ENTRIES - 1) << 16 | 1
                admin(vm, ram, 1, first, CREATE_CQ, IOVA + IO_COMPLETIONS, size, 1 << 16 | 0b11)
                admin(vm, ram, 2, first, CREATE_SQ, IOVA + IO_COMMANDS, size, 1 << 16 | 0b01)
                assert quiet(second)
                for slot in range(3):
                    flush(vm, ram, slot, second)
                    assert quiet(first)
                    assert serial(identify(vm, ram, 3 + slot, first)) == NVME_SERIAL
                    assert quiet(second)
                vm.client.irq_stop(device="dev", index="msix", vectors=[1])
                assert serial(identify(vm, ram, 6, first)) == NVME_SERIAL
        vm.write("dev", CC, 0)


@pytest.mark.parametrize("way", WAYS)
def test_identify_with_what_a_guests_driver_writes(vm: Vm, ram: int, way: str) -> None:
    """Section 5: the guest's enable bit and table start the vector; the table shares its BAR with the registers."""
    with added(vm, NVME_PORT, way):
        control = nics.find(vm, "dev", nics.MSIX_ID) + 2
        set_config(vm, "dev", control, 2, nics.MSIX_ENABLE | nics.MSIX_MASK_ALL)
        set_entry(vm, "dev", 0, masked=False)
        set_config(vm, "dev", control, 2, nics.MSIX_ENABLE)
        with vm.client.irq_start(device="dev", index="msix") as started:
            eventfd = triggers(started)[0]
            fired(eventfd, 0.2)
            start_controller(vm)
            assert serial(identify(vm, ram, 0, eventfd)) == NVME_SERIAL
            set_entry(vm, "dev", 0, masked=True)
            set_entry(vm, "dev", 0, masked=False)
            fired(eventfd, 0.2)
            assert serial(identify(vm, ram, 1, eventfd)) == NVME_SERIAL
        vm.write("dev", CC, 0)
