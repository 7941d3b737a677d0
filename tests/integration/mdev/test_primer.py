"""The built-in device through everything: a real server, real sockets, real eventfds, real memory.

Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import mmap
import os
import select
from typing import Any

import msgspec
import pytest

from vfiod.client.events import Event
from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.mediated import MdevTypeInfo
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

from .conftest import PATIENCE, VM, Manager, Primer

OTHER = "5c4a1e3e-0000-4000-8000-000000000bad"


def rung(fd: FileDescriptor) -> int:
    """Wait for an eventfd, and take its count."""
    assert select.select([fd.number], [], [], PATIENCE)[0], "it was never signalled"
    return os.eventfd_read(fd.number)


def silent(fd: FileDescriptor) -> bool:
    return not select.select([fd.number], [], [], 0)[0]


def data(event: Event) -> dict[str, Any]:
    """An event's data as it came over the wire."""
    told = event.data if isinstance(event.data, dict) else msgspec.to_builtins(event.data)
    assert isinstance(told, dict)
    return told


def refused(words: str, function: Any, **arguments: Any) -> RemoteError:
    with pytest.raises(RemoteError, match=words) as caught:
        function(**arguments)
    return caught.value


def primers(manager: Manager, *, oob: bool = False) -> MdevTypeInfo:
    """The built-in PCI device's one type."""
    [told] = [one for one in manager.client.query_mdev_types(oob=oob) if one.parent == "primer"]
    return told


def test_what_can_be_made_is_listed(manager: Manager) -> None:
    told = primers(manager)
    assert (told.parent, told.type, told.device_api, told.devices) == ("primer", "primer-pci", "vfio-pci", [])
    assert set(told.parameters) == {
        "memory",
        "vectors",
        "msix-vectors",
        "msix-resizable",
        "granted-vectors",
        "hot-unplug",
        "doorbell",
    }
    primer = Primer(manager)
    told = primers(manager, oob=True)
    [device] = told.devices
    assert (device.uuid, device.device, device.started) == (primer.uuid, "dev0", False)
    assert device.attributes["memory"] == "1048576"


def test_it_is_a_pci_device_like_any_other(manager: Manager) -> None:
    Primer(manager)
    [info] = manager.client.query_devices()
    assert (info.backend, info.vendor_id, info.device_id) == ("mdev", 0x1234, 0xF10D)
    [made] = primers(manager, oob=True).devices
    assert info.mdev == made and (made.type, made.parent) == ("primer-pci", "primer")
    assert made.attributes["memory"] == "1048576"
    assert (info.regions, info.irq_indexes, info.reset) == (9, 5, True)
    irqs = {one.name: one for one in manager.client.query_irqs(device="dev0")}
    assert (irqs["intx"].count, irqs["msi"].count) == (1, 4)
    assert irqs["intx"].flags.automasked
    assert irqs["msi"].flags.noresize
    regions = {one.name: one for one in manager.client.query_regions(device="dev0")}
    assert {name: one.size for name, one in regions.items() if one.size} == {
        "bar0": 4096,
        "bar2": 1 << 20,
        "config": 4096,
    }
    assert [name for name, one in regions.items() if one.mappable] == ["bar2"]


def test_registers_are_accessed_exactly_once(manager: Manager) -> None:
    primer = Primer(manager)
    assert primer.get(0) == 0xF10D_0001
    primer.set(4, 0x0F0F_0F0F)
    assert primer.get(4) == 0xF0F0_F0F0
    assert primer.get(0x0C) == 3


def test_dma_moves_guest_memory_across_mappings(manager: Manager) -> None:
    primer = Primer(manager)
    low, high = manager.memfd(1 << 16), manager.memfd(1 << 16)
    manager.client.dma_map(iova=0x10000, size=1 << 16, fd=low)
    manager.client.dma_map(iova=0x20000, size=1 << 16, fd=high)
    data = os.urandom(8192)
    os.pwrite(low.number, data[:4096], 0xF000)
    os.pwrite(high.number, data[4096:], 0)
    assert primer.dma(0x1F000, 64, 8192, 1) == 0x102, "bus mastering is off"
    primer.master()
    assert primer.dma(0x1F000, 64, 8192, 1) == 1
    read = manager.client.region_read(device="dev0", region="bar2", offset=64, length=8192)
    assert read.data == data
    assert primer.dma(0x28000, 64, 8192, 3) == 1
    assert os.pread(high.number, 8192, 0x8000) == data
    manager.client.dma_unmap(iova=0x20000, size=1 << 16)
    assert primer.dma(0x1F000, 64, 8192, 3) == 0x202
    assert (primer.get(0x38), primer.get(0x40, size=8)) == (4096, 0x20000)


def test_memory_mapped_before_and_after_the_device_is_the_same(manager: Manager) -> None:
    memory = manager.memfd(1 << 16)
    os.pwrite(memory.number, b"early", 0)
    manager.client.dma_map(iova=0, size=1 << 16, fd=memory, readonly=True)
    primer = Primer(manager)
    primer.master()
    assert primer.dma(0, 0, 5, 1) == 1
    assert manager.client.region_read(device="dev0", region="bar2", offset=0, length=5).data == b"early"
    assert primer.dma(0, 0, 5, 3) == 0x302, "read-only stays read-only"
    assert manager.client.query_machine().address_spaces == [f"mdev:{primer.uuid}"]


def test_guest_memory_that_its_owner_cuts_is_a_fault(manager: Manager) -> None:
    primer = Primer(manager)
    memory = manager.memfd(1 << 16)
    manager.client.dma_map(iova=0, size=1 << 16, fd=memory)
    primer.master()
    os.ftruncate(memory.number, 4096)
    assert primer.dma(0, 0, 8192, 1) == 0x202
    assert primer.get(0x38) == 4096
    assert primer.get(0) == 0xF10D_0001, "the server lives"


def test_intx_direct_with_a_resample_eventfd(manager: Manager) -> None:
    primer = Primer(manager)
    trigger, resample = manager.eventfd(), manager.eventfd()
    manager.client.irq_start(device="dev0", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)])
    primer.set(0x14, 1)
    assert rung(trigger) == 1
    primer.set(0x14, 2)
    assert silent(trigger), "it masked itself"
    os.eventfd_write(resample.number, 1)
    assert rung(trigger) == 1, "the line is still up"
    primer.set(0x18, 3)
    os.eventfd_write(resample.number, 1)
    primer.set(0x14, 4)
    assert rung(trigger) == 1


def test_intx_relayed_is_counted_and_completed_by_command(manager: Manager) -> None:
    primer = Primer(manager)
    trigger = manager.eventfd()
    manager.client.irq_start(device="dev0", mode="relayed", eventfds=[VectorFds(vector=0, trigger=trigger)])
    for count in (1, 2, 3):
        primer.set(0x14, 1)
        assert rung(trigger) == 1
        primer.set(0x18, 1)
        manager.client.irq_eoi(device="dev0", index="intx")
        [irq] = [one for one in manager.client.query_irqs(device="dev0") if one.name == "intx"]
        assert (irq.fired, irq.delivered) == (count, count)


def test_msi_vectors_go_where_they_belong(manager: Manager) -> None:
    primer = Primer(manager)
    primer.master()
    with manager.client.irq_start(device="dev0", index="msi", vectors=[0, 1, 2, 3]) as started:
        fds = {irq.vector: irq.trigger_fd for irq in started.irqs}
        primer.set(0x14, 0b0110)
        for vector, fd in fds.items():
            assert isinstance(fd, FileDescriptor)
            if vector in (1, 2):
                assert rung(fd) == 1
            else:
                assert silent(fd)
        manager.client.irq_trigger(device="dev0", index="msi", vector=3)
        last = fds[3]
        assert isinstance(last, FileDescriptor)
        assert rung(last) == 1


def test_fewer_vectors_than_asked_for_are_named(manager: Manager) -> None:
    primer = Primer(manager, parameters={"vectors": 8, "granted-vectors": 3})
    primer.master()
    refused("2 are available", manager.client.irq_start, device="dev0", index="msi", vectors=list(range(8)))
    with manager.client.irq_start(device="dev0", index="msi", vectors=[0, 1]) as started:
        assert [irq.vector for irq in started.irqs] == [0, 1]


def test_dma_completion_interrupts(manager: Manager) -> None:
    primer = Primer(manager)
    primer.master()
    memory, trigger = manager.memfd(4096), manager.eventfd()
    manager.client.dma_map(iova=0, size=4096, fd=memory)
    manager.client.irq_start(device="dev0", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
    assert primer.dma(0, 0, 4096, 0b111) == 1
    assert rung(trigger) == 1
    assert primer.get(0x10) == 1 << 31


def test_a_mapped_bar_is_the_devices_memory_and_nobody_can_cut_it(manager: Manager) -> None:
    Primer(manager)
    with manager.client.region_map(device="dev0", region="bar2") as told:
        with mmap.mmap(told.map_fd.number, told.size, offset=told.offset) as window:
            window[256:261] = b"hello"
            assert manager.client.region_read(device="dev0", region="bar2", offset=256, length=5).data == b"hello"
            manager.client.region_write(device="dev0", region="bar2", offset=512, data=b"there")
            assert window[512:517] == b"there"
        with pytest.raises(PermissionError):
            os.ftruncate(told.map_fd.number, 0)


def test_errors_become_events(manager: Manager) -> None:
    primer = Primer(manager)
    with manager.client.events("DEVICE_ERROR") as errors:
        primer.set(0x1C, 1)
        assert data(errors.get(timeout=PATIENCE))["device"] == "dev0"


def test_reset(manager: Manager) -> None:
    primer = Primer(manager)
    primer.master()
    primer.set(4, 5)
    with manager.client.events("DEVICE_RESET") as resets:
        manager.client.device_reset(id="dev0")
        assert data(resets.get(timeout=PATIENCE))["device"] == "dev0"
    assert primer.get(4) == 0xFFFF_FFFF


def test_a_device_lives_and_dies_and_nothing_is_left(manager: Manager) -> None:
    primer = Primer(manager, "first")  # what the first use loads stays
    manager.client.device_del(id="first", force=True)
    while manager.client.query_devices():
        pass
    manager.client.mdev_destroy(uuid=primer.uuid)
    before = manager.open_fds()
    for _ in range(5):
        primer = Primer(manager)
        trigger, resample = manager.eventfd(), manager.eventfd()
        manager.client.irq_start(device="dev0", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)])
        manager.client.dma_map(iova=0, size=4096, fd=manager.memfd(4096))
        error = refused("in use as device 'dev0'", manager.client.mdev_destroy, uuid=primer.uuid)
        assert error.errno == "EBUSY"
        with manager.client.events("DEVICE_DELETED", "MDEV_REMOVED") as ends:
            manager.client.device_del(id="dev0")
            deleted = ends.get(timeout=PATIENCE)
            assert (deleted.name, data(deleted)["released"]) == ("DEVICE_DELETED", True)
            manager.client.mdev_destroy(uuid=primer.uuid)
            removed = ends.get(timeout=PATIENCE)
            assert (data(removed)["uuid"], data(removed)["reason"]) == (primer.uuid, "destroyed")
        manager.client.dma_unmap(iova=0, size=4096)
        assert manager.client.query_machine().mdevs == []
        assert manager.open_fds() == before


def test_its_own_fds_are_listed_as_the_mediated_devices(manager: Manager) -> None:
    primer = Primer(manager)
    trigger, resample = manager.eventfd(), manager.eventfd()
    manager.client.irq_start(device="dev0", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)])

    def own() -> dict[str, str]:
        infos = [info for info in manager.client.query_fds() if info.owner == f"mdev:{primer.uuid}"]
        links = {str(info.name): os.readlink(f"/proc/{manager.process.pid}/fd/{info.number}") for info in infos}
        assert {info.name for info in infos if info.kind == "eventfd"} == links.keys() - {"bar2"}
        return links

    fds = own()
    assert fds.keys() == {"bar2", "intx trigger", "req trigger", "err trigger", "watch[0]"}
    assert fds["bar2"].startswith("/memfd:vfiod-primer")
    manager.client.irq_stop(device="dev0")
    # What it watched is closed on the loop, a moment later.
    assert own().keys() == {"bar2", "req trigger", "err trigger"}
    # Together with the others' these are all the server has of eventfds and memory: nothing is held unlisted.
    listed = {info.number for info in manager.client.query_fds()}
    others = set(map(int, os.listdir(f"/proc/{manager.process.pid}/fd"))) - listed
    links = [os.readlink(f"/proc/{manager.process.pid}/fd/{number}") for number in others]
    assert [link for link in links if "eventfd" in link or "memfd" in link] == []


def test_start_and_shutdown(manager: Manager) -> None:
    uuids = sorted(
        manager.client.mdev_create(parent="primer", type="primer-pci", parameters={"hot-unplug": False}).uuid
        for _ in range(2)
    )
    with manager.client.events("MDEV_STARTED", "MDEV_SHUTDOWN") as events:
        manager.client.mdev_start()
        got = [events.get(timeout=PATIENCE) for _ in range(2)]
        assert sorted(data(event)["uuid"] for event in got) == uuids
        assert {data(event)["vm"] for event in got} == {VM}
        refused("EBUSY", manager.client.mdev_destroy, uuid=uuids[0])
        refused("No mediated device is started", manager.client.mdev_shutdown, uuid=OTHER)
        manager.client.mdev_shutdown()
        assert events.get(timeout=PATIENCE).name == "MDEV_SHUTDOWN"
    manager.client.mdev_destroy(uuid=uuids[0])


def test_bad_input(manager: Manager) -> None:
    client = manager.client
    refused("there is primer", client.mdev_create, parent="mtty", type="mtty-1")
    refused("has primer-pci", client.mdev_create, parent="primer", type="none")
    refused("uuid", client.mdev_create, parent="primer", type="primer-pci", uuid="no")
    refused("takes memory", client.mdev_create, parent="primer", type="primer-pci", parameters={"size": 1})
    refused("power of two", client.mdev_create, parent="primer", type="primer-pci", parameters={"memory": 5000})
    refused("not found", client.mdev_destroy, uuid=OTHER)
    refused("not found", client.device_add, driver="vfio-pci", id="x", mdev=OTHER)
    assert client.query_mdev_types()[0].devices == []
    primer = Primer(manager)
    refused("EEXIST", client.mdev_create, parent="primer", type="primer-pci", uuid=primer.uuid)
    refused("in use", client.device_add, driver="vfio-pci", id="second", mdev=primer.uuid)
    dry = client.device_add(driver="vfio-pci", id="second", mdev=primer.uuid, x_dry_run=True)
    assert dry.possible is False
    refused("bar0", client.region_read, device="dev0", region="bar0", offset=4096, size=4)
    assert len(client.query_devices()) == 1


def test_many_devices_share_memory_and_nothing_else(manager: Manager) -> None:
    memory = manager.memfd(1 << 16)
    manager.client.dma_map(iova=0, size=1 << 16, fd=memory)
    primers = [Primer(manager, f"dev{n}", parameters={"memory": 4096}) for n in range(16)]
    for number, primer in enumerate(primers):
        primer.master()
        manager.client.region_write(device=primer.id, region="bar2", offset=0, data=bytes([number]) * 16)
        assert primer.dma(16 * number, 0, 16, 3) == 1
    assert os.pread(memory.number, 256, 0) == b"".join(bytes([number]) * 16 for number in range(16))
    assert [primer.get(0x0C) for primer in primers] == [6] * 16


def test_a_manager_that_is_killed_leaves_the_devices_to_the_next(manager: Manager) -> None:
    second = Client.connect(manager.path, timeout=PATIENCE)
    uuid = second.mdev_create(parent="primer", type="primer-pci").uuid
    second.device_add(driver="vfio-pci", id="kept", mdev=uuid)
    second.close()
    [info] = manager.client.query_devices()
    assert (info.id, info.host) == ("kept", uuid)
