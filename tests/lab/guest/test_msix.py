"""MSI-X, MSI, configuration space and a ROM on the real kernel: an e1000e, by group and by cdev.

Rules are those of behaviour.md, by section.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.lab.guest import nics, pci
from tests.lab.guest.nics import WAYS, added, config, fired, quiet, set_config, set_entry, triggers
from tests.lab.guest.vm import Vm, told
from tests.lab.topologies import E1000E_PORT, E1000E_ROM

from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.errors import RemoteError

MACHINE = "e1000e"

# Intel 82574 datasheet, 10.2: offsets in BAR 0.
ICR, ICS, IMS, IVAR, STATUS = 0xC0, 0xC8, 0xD0, 0xE4, 0x08
CAUSES = (1 << 20, 1 << 21, 1 << 22, 1 << 23)  # RxQ0, RxQ1, TxQ0, TxQ1: each has a vector
ROM = Path("/usr/lib/ipxe/qemu") / E1000E_ROM


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = nics.vfiods(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    return next(vms)


def prepare(vm: Vm) -> None:
    """Cause n interrupts by vector n."""
    vm.write("dev", IVAR, sum((8 | vector) << 4 * vector for vector in range(4)))
    vm.write("dev", IMS, sum(CAUSES))


def fire(vm: Vm, vector: int) -> None:
    """A real interrupt of the card."""
    vm.write("dev", ICR, 0xFFFF_FFFF)
    vm.write("dev", ICS, CAUSES[vector])


def answered(vm: Vm, vector: int, eventfd: int) -> int:
    """How often a vector was signalled for one interrupt. The card says it again until its cause is cleared (EITR)."""
    fire(vm, vector)
    count = fired(eventfd)
    vm.write("dev", ICR, 0xFFFF_FFFF)
    fired(eventfd, 0.1)
    return count


def drained(eventfds: dict[int, int]) -> dict[int, int]:
    """What each vector was signalled without an interrupt of the card, to say that one may have been lost."""
    return {vector: fired(fd, 0.2) for vector, fd in eventfds.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["direct", "relayed"])
def test_vectors_are_added_one_by_one(vm: Vm, way: str, mode: str) -> None:
    """Section 4, MSI-X: "Vectors are used one by one"; each adds itself while the others go on."""
    with added(vm, E1000E_PORT, way), ExitStack() as stack:
        (irq,) = [irq for irq in vm.client.query_irqs(device="dev") if irq.name == "msix"]
        assert irq.count == 5
        eventfds: dict[int, int] = {}
        for vector in (1, 0, 3, 2):
            started = stack.enter_context(
                vm.client.irq_start(device="dev", index="msix", vectors=[vector], mode=mode)  # type: ignore[arg-type]
            )
            before = set(eventfds)
            eventfds.update(triggers(started))
            signalled = {number for number, count in drained(eventfds).items() if count}
            if vector < max(before, default=-1):
                assert signalled == {vector}, "within range: just that vector, once"
            elif irq.flags.noresize and before:
                assert signalled == before | {vector}, "disabled and enabled again: every used vector, once"
            else:
                assert signalled == set(), "the kernel adds one"
            prepare(vm)
            for number, fd in eventfds.items():
                assert answered(vm, number, fd) >= 1, (vector, number)
                assert all(quiet(other) for key, other in eventfds.items() if key != number), number
        # Released: -1. What fires then waits in the card, and comes with the vector.
        vm.client.irq_stop(device="dev", index="msix", vectors=[3])
        fire(vm, 3)
        assert quiet(eventfds[3])
        vm.write("dev", ICR, 0xFFFF_FFFF)
        assert answered(vm, 0, eventfds[0]) >= 1
        with vm.client.irq_start(device="dev", index="msix", vectors=[3]) as started:
            assert fired(triggers(started)[3]) >= 1
        with pytest.raises(RemoteError, match="there is no vector 5"):
            vm.client.irq_start(device="dev", index="msix", vectors=[5])
        assert answered(vm, 2, eventfds[2]) >= 1


@pytest.mark.parametrize("way", WAYS)
def test_the_guests_table_and_enable_bit_drive_the_vectors(vm: Vm, way: str) -> None:
    """Section 5: "Turning the enable bit of MSI or MSI-X on or off by a config write does the change of section 4"."""
    with added(vm, E1000E_PORT, way), vm.client.events("IRQ_MODE_CHANGED") as events:
        control = nics.find(vm, "dev", nics.MSIX_ID) + 2
        set_config(vm, "dev", control, 2, nics.MSIX_ENABLE | nics.MSIX_MASK_ALL)
        assert told(events.get(timeout=20), IrqModeChanged).kind == "msix"
        assert vm.client.query_devices()[0].irq_kind == "msix"
        set_entry(vm, "dev", 2, masked=False)
        bar, table = nics.msix_bar(vm, "dev")
        read = vm.client.region_read(device="dev", region=bar, offset=table + 32, length=16)
        assert read.data == b"\x00\x00\xe0\xfe\0\0\0\0\x02\x40\0\0\0\0\0\0", "the guest's own message, not the host's"
        set_config(vm, "dev", control, 2, nics.MSIX_ENABLE)
        used = told(events.get(timeout=20), IrqModeChanged)
        assert (used.kind, used.vector) == ("msix", 2)
        with vm.client.irq_start(device="dev", index="msix", vectors=[2]) as started:
            eventfd = triggers(started)[2]
            drained({2: eventfd})
            prepare(vm)
            assert answered(vm, 2, eventfd) >= 1
            set_entry(vm, "dev", 2, masked=True)
            fire(vm, 2)
            assert quiet(eventfd)
            vm.write("dev", ICR, 0xFFFF_FFFF)
            set_entry(vm, "dev", 2, masked=False)
            assert fired(eventfd) >= 1, "what came meanwhile, at the eventfd of before"
            set_config(vm, "dev", control, 2, 0)
            assert vm.client.query_devices()[0].irq_kind == "intx", "the guest's disabling goes back to INTx"
        set_config(vm, "dev", nics.find(vm, "dev", nics.MSI_ID) + 2, 2, 1)
        assert vm.client.query_devices()[0].irq_kind == "msi"
        assert config(vm, "dev", nics.find(vm, "dev", nics.MSI_ID) + 2, 2) & 0x71 == 1
        set_config(vm, "dev", control, 2, nics.MSIX_ENABLE)
        assert vm.client.query_devices()[0].irq_kind == "msix"
        assert config(vm, "dev", nics.find(vm, "dev", nics.MSI_ID) + 2, 2) & 1 == 0, "one kind is active at a time"


def test_base_addresses_are_sized_by_write_ones_and_are_not_the_hosts(vm: Vm) -> None:
    """Section 5: "BARs and ROM address (sized by write-ones; host addresses never show)"."""
    with added(vm, E1000E_PORT, "group"):
        host = [
            int(line.split()[0], 16) for line in (pci.device_path(E1000E_PORT) / "resource").read_text().split("\n")[:7]
        ]
        sizes = {region.name: region.size for region in vm.client.query_regions(device="dev")}
        for number, name in ((0, "bar0"), (1, "bar1"), (2, "bar2"), (3, "bar3"), (4, "bar4"), (5, "bar5"), (6, "rom")):
            at = 0x30 if name == "rom" else 0x10 + 4 * number
            before = config(vm, "dev", at, 4)
            assert before & ~0xF == 0
            assert not host[number] or before & ~0xF != host[number]
            set_config(vm, "dev", at, 4, 0xFFFF_FFFF if name != "rom" else 0xFFFF_F800)
            mask = config(vm, "dev", at, 4) & ~(0x3 if before & 1 else 0xF)
            assert (-mask & 0xFFFF_FFFF) == sizes[name], name
            set_config(vm, "dev", at, 4, 0xFE00_0000)
            assert config(vm, "dev", at, 4) & ~0xF == 0xFE00_0000 & mask
        # Unaligned and wide reads see the same bytes.
        whole = vm.client.region_read(device="dev", region="config", offset=0, length=256).data
        assert isinstance(whole, bytes)
        for offset, size in ((0x0F, 4), (0x13, 2), (0x31, 8), (1, 8)):
            assert config(vm, "dev", offset, size) == int.from_bytes(whole[offset : offset + size], "little")
        assert config(vm, "dev", 0x100, 4) not in (0, 0xFFFF_FFFF), "extended space is there"
        assert vm.read("dev", STATUS) not in (0, 0xFFFF_FFFF), "and the card still works"


def test_the_table_is_left_out_of_what_may_be_mapped_or_said_mappable(vm: Vm) -> None:
    """Section 4: without MSIX_MAPPABLE "the pages of the table are left out of what may be mapped"."""
    with added(vm, E1000E_PORT, "group"):
        bar, table = nics.msix_bar(vm, "dev")
        region = next(region for region in vm.client.query_regions(device="dev") if region.name == bar)
        covered = any(area.offset <= table < area.offset + area.size for area in region.areas)
        assert covered is region.msix_mappable
        # Whether or not it is mapped, vfiod shows the guest's table.
        assert vm.client.region_read(device="dev", region=bar, offset=table, length=16).data == bytes(12) + b"\1\0\0\0"


@pytest.mark.parametrize("way", WAYS)
def test_the_rom_is_the_files_and_then_ones(vm: Vm, way: str) -> None:
    """Section 5: "The ROM is read until zero bytes or full ...; a shorter ROM is padded with 0xff"."""
    image = ROM.read_bytes()
    with added(vm, E1000E_PORT, way):
        rom = next(region for region in vm.client.query_regions(device="dev") if region.name == "rom")
        assert rom.size >= len(image)
        data = vm.client.region_read(device="dev", region="rom", offset=0, length=rom.size).data
        assert isinstance(data, bytes)
        assert len(data) == rom.size
        same = next((at for at, (a, b) in enumerate(zip(data, image, strict=False)) if a != b), len(image))
        assert same > 65536, f"the first {same} bytes are the file's"
        assert data[same:].strip(b"\xff") == b"" or same == len(image), "what is missing reads as ones"
        assert vm.client.region_read(device="dev", region="rom", offset=0, size=2).value == 0xAA55


def test_romfile_and_rombar(vm: Vm) -> None:
    """Section 5: "`romfile` and `rombar=off` are honoured"."""
    with vm.bound(E1000E_PORT), nics.memfd(b"\x55\xaa" + b"own" * 1000) as fd:
        for properties, size in (({"romfile": fd}, 4096), ({"romfile": ""}, 0), ({"rombar": False}, 0)):
            name = ""
            if properties.get("romfile") == fd:
                vm.client.send_fds([fd])
                vm.client.getfd(fdname="rom")
                name = "rom"
            more = {"romfile": name} if "romfile" in properties else {"rombar": False}
            nics.add_group(vm, E1000E_PORT, "dev", **more)
            rom = next(region for region in vm.client.query_regions(device="dev") if region.name == "rom")
            assert rom.size == size
            set_config(vm, "dev", 0x30, 4, 0xFFFF_F800)
            assert config(vm, "dev", 0x30, 4) == (-size & 0xFFFF_F800 if size else 0)
            if size:
                read = vm.client.region_read(device="dev", region="rom", offset=0, length=size).data
                assert read == (b"\x55\xaa" + b"own" * 1000).ljust(4096, b"\xff")
            assert vm.remove("dev")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["device-reset", "hot-reset"])
def test_a_reset_keeps_what_the_guest_sees_and_its_vectors(vm: Vm, way: str, kind: str) -> None:
    """Section 6: "interrupts are disabled, before they are set up again; ... BARs and virtualised state restored"."""
    with added(vm, E1000E_PORT, way):
        set_config(vm, "dev", 0x10, 4, 0xFE00_0000)
        with vm.client.irq_start(device="dev", index="msix", vectors=[0, 2]) as started:
            eventfds = triggers(started)
            rom = vm.client.region_read(device="dev", region="rom", offset=0, length=4096).data
            set_config(vm, "dev", 0x30, 4, 0xFEB0_0001)
            if kind == "hot-reset":
                report = vm.client.query_hot_reset(id="dev")
                assert (report.possible, [one.address for one in report.affected]) == (True, [E1000E_PORT])
                assert vm.client.hot_reset(id="dev").possible
            else:
                vm.client.device_reset(id="dev")
            drained(eventfds)
            assert config(vm, "dev", 0x30, 4) & 1, "the ROM's address and enable bit are the guest's"
            assert vm.client.region_read(device="dev", region="rom", offset=0, length=4096).data == rom
            assert config(vm, "dev", 0x10, 4) == 0xFE00_0000
            assert config(vm, "dev", nics.find(vm, "dev", nics.MSIX_ID) + 2, 2) & nics.MSIX_ENABLE
            prepare(vm)
            for vector, fd in eventfds.items():
                assert answered(vm, vector, fd) >= 1
