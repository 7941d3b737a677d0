"""A real device offered to a hypervisor: the kernel serves the client, by group and by cdev, and vfiod sleeps.

The client is a small one of the tests' own (``tests/integration/exports/hypervisor.py``); that a real QEMU does the
same is in ``test_nested.py``. Rules are those of behaviour.md, sections 2, 3 and 5.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import Hypervisor, Refused, eventfd, memfd, rung, silent
from tests.lab.guest import pci
from tests.lab.guest.machine import SOURCE_ROOTS, UNPRIVILEGED_GID, UNPRIVILEGED_UID
from tests.lab.guest.vm import Vm, opened, running_vm
from tests.lab.places import REPO
from tests.lab.topologies import EDU_PORT

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.catalogue.exports import ExportState
from vfiod.server.kernel.memory import RegionWindow
from vfiod.server.kernel.syscalls import Syscalls

MACHINE = "edu"

BAR0, CONFIG = int(vfio.PciRegion.BAR0), int(vfio.PciRegion.CONFIG)
INTX, MSI = int(vfio.PciIrq.INTX), int(vfio.PciIrq.MSI)
COMMAND, MEMORY, MASTER = 4, 2, 4
SIZE = 1 << 20
IOVA = 0x10_0000
TEXT = b"from the guest's memory"

#: A client that has everything a hypervisor has, and is killed.
VICTIM = """
import os, signal, sys
from pathlib import Path
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd
client = Hypervisor(Path(sys.argv[1]))
memory, trigger = memfd(1 << 20, b"of the dead"), eventfd()
client.map(0x100000, 1 << 20, memory.number)
client.write(7, 4, 6, 2)
client.trigger(1, trigger.number)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(params=["group", "cdev"])
def offered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Vm, Path]]:
    """A vfiod without rights that offers the real edu, and where."""
    sockets = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own directories are closed to the user that vfiod runs as
    os.chown(sockets, UNPRIVILEGED_UID, UNPRIVILEGED_GID)
    with running_vm(tmp_path, sockets=sockets) as vm, vm.bound(EDU_PORT):
        if request.param == "group":
            vm.add(EDU_PORT, "edu")
        else:
            with opened("/dev/iommu") as iommu, opened(str(pci.vfio_cdev(EDU_PORT))) as cdev:
                vm.client.execute(
                    "object-add", {"qom-type": "iommufd", "id": "iommufd0", "fd": "iommu"}, fds={"iommu": iommu}
                )
                arguments = {"driver": "vfio-pci", "id": "edu", "fd": "cdev", "iommufd": "iommufd0"}
                vm.client.execute("device_add", arguments, fds={"cdev": cdev})
        vm.client.device_export_add(id="x0", type="vfio-user", device="edu", path=str(sockets / "edu"))
        yield vm, sockets / "edu"
        at_rest(vm)
        assert vm.remove("edu")


def by_group(vm: Vm) -> bool:
    return vm.client.query_devices(id="edu")[0].backend == "kernel-group"


def at_rest(vm: Vm) -> None:
    """Nobody is attached, and nothing of whoever was is left."""
    export = vm.client.query_device_exports
    pci.wait_until(lambda: export()[0].state is ExportState.LISTENING, "the export is free")
    assert vm.client.query_dma() == []
    assert not maps_memory(vm)
    assert [one.name for one in vm.client.query_irqs(device="edu") if one.active and not one.reserved] == []
    command = vm.client.region_read(device="edu", region="config", offset=COMMAND, size=2).value
    assert isinstance(command, int) and not command & MASTER


def maps_memory(vm: Vm) -> bool:
    """Whether the client's file is mapped in vfiod: type1 pins by address, iommufd by the file alone."""
    return "memfd:guest" in Path(f"/proc/{vm.process.pid}/maps").read_text()


@contextmanager
def bar_of(client: Hypervisor) -> Iterator[RegionWindow]:
    """BAR 0 mapped as a hypervisor maps it: from the fd that came with its description. Memory decoding and bus
    mastering are on.
    """
    client.write(CONFIG, COMMAND, MEMORY | MASTER, 2)
    info, fd = client.region(BAR0)
    assert info.size == pci.EDU_BAR_SIZE and fd is not None
    [area] = info.areas
    window = RegionWindow(
        Syscalls(), fd.number, info.offset + area.offset, area.size, readable=info.readable, writable=info.writable
    )
    try:
        yield window
    finally:
        window.close()
        fd.close()


def spent(vm: Vm) -> list[str]:
    """What the kernel counts of every thread of vfiod: its processor time in clock ticks, its context switches."""
    found = []
    for task in sorted(Path(f"/proc/{vm.process.pid}/task").iterdir()):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        switches = [line for line in (task / "status").read_text().splitlines() if "ctxt_switches" in line]
        found += [f"{task.name} utime {fields[11]} stime {fields[12]}", *switches]
    return found


def asleep(vm: Vm) -> list[str]:
    """What it has spent, when it has nothing to do any more."""
    last: list[str] = []

    def same() -> bool:
        nonlocal last
        before, last = last, spent(vm)
        return before == last

    pci.wait_until(same, "vfiod sleeps")
    return last


def transfer(bar: RegionWindow, source: int, target: int, command: int = 0) -> None:
    bar.store(pci.EDU_DMA_SOURCE, 8, source)
    bar.store(pci.EDU_DMA_DESTINATION, 8, target)
    bar.store(pci.EDU_DMA_COUNT, 8, len(TEXT))
    bar.store(pci.EDU_DMA_COMMAND, 8, pci.EDU_DMA_START | command)
    pci.wait_until(lambda: not bar.load(pci.EDU_DMA_COMMAND, 8) & pci.EDU_DMA_START, "the DMA is done")


def test_registers_msi_and_intx_with_vfiod_asleep(offered: tuple[Vm, Path]) -> None:
    """Sections 3 and 5, direct: BAR accesses and interrupts go past vfiod, which is not even scheduled."""
    vm, path = offered
    with Hypervisor(path) as client, bar_of(client) as bar, eventfd() as msi, eventfd() as intx, eventfd() as resample:
        client.trigger(MSI, msi.number)
        before = asleep(vm)
        for round in range(100):
            assert bar.load(pci.EDU_ID, 4) == pci.EDU_IDENTITY
            bar.store(pci.EDU_LIVENESS, 4, round)
            assert bar.load(pci.EDU_LIVENESS, 4) == 0xFFFF_FFFF ^ round
            bar.store(pci.EDU_IRQ_RAISE, 4, 1)
            assert rung(msi) == 1
            bar.store(pci.EDU_IRQ_ACK, 4, 1)
        assert spent(vm) == before
        client.irqs(vfio.SetIrqs.disable(MSI))
        client.trigger(INTX, intx.number)
        client.irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.UNMASK, INTX, (resample.number,)))
        before = asleep(vm)
        for _ in range(100):
            bar.store(pci.EDU_IRQ_RAISE, 4, 1)
            assert rung(intx) == 1
            assert silent(intx), "masked until it is completed"
            bar.store(pci.EDU_IRQ_ACK, 4, 1)
            os.eventfd_write(resample.number, 1)
        assert spent(vm) == before
        assert silent(msi)


def test_dma_through_the_clients_file_until_it_is_unmapped(offered: tuple[Vm, Path]) -> None:
    """Section 2: pinned by address in a container, by file in an IOAS; once the unmap is answered, out of reach."""
    vm, path = offered
    with Hypervisor(path) as client, bar_of(client) as bar, memfd(SIZE, TEXT) as memory:
        client.map(IOVA, SIZE, memory.number)
        [mapping] = vm.client.query_dma()
        assert mapping.address_space is not None and mapping.clients
        assert maps_memory(vm) is by_group(vm)
        transfer(bar, IOVA, pci.EDU_BUFFER)
        transfer(bar, pci.EDU_BUFFER, IOVA + SIZE // 2, pci.EDU_DMA_TO_RAM)
        assert os.pread(memory.number, len(TEXT), SIZE // 2) == TEXT
        client.unmap(IOVA, SIZE)
        os.pwrite(memory.number, bytes(len(TEXT)), SIZE // 2)
        transfer(bar, pci.EDU_BUFFER, IOVA + SIZE // 2, pci.EDU_DMA_TO_RAM)
        assert os.pread(memory.number, len(TEXT), SIZE // 2) == bytes(len(TEXT))
        client.map(IOVA, SIZE, memory.number, flags=1)
        transfer(bar, pci.EDU_BUFFER, IOVA + SIZE // 2, pci.EDU_DMA_TO_RAM)
        assert os.pread(memory.number, len(TEXT), SIZE // 2) == bytes(len(TEXT)), "it was mapped read-only"


def test_a_reset_keeps_the_clients_interrupts(offered: tuple[Vm, Path]) -> None:
    vm, path = offered
    with Hypervisor(path) as client, bar_of(client) as bar, eventfd() as msi:
        client.trigger(MSI, msi.number)
        client.reset()
        assert client.read(CONFIG, COMMAND, 2) & (MEMORY | MASTER) == MEMORY | MASTER
        assert bar.load(pci.EDU_ID, 4) == pci.EDU_IDENTITY
        bar.store(pci.EDU_IRQ_RAISE, 4, 1)
        assert rung(msi) == 1
        bar.store(pci.EDU_IRQ_ACK, 4, 1)
    del vm


def test_features_of_the_device_alone_are_passed_on(offered: tuple[Vm, Path]) -> None:
    """Low power is the device's own business, and the kernel's to say; the rest is refused without asking it."""
    vm, path = offered
    flags, feature = vfio.FeatureFlags, vfio.Feature

    def ask(client: Hypervisor, which: int, how: vfio.FeatureFlags) -> None:
        client.do(vfio_user.DeviceFeature(which, how, argsz=64))

    with Hypervisor(path) as client:
        client.write(CONFIG, COMMAND, MEMORY, 2)
        for one in (feature.LOW_POWER_ENTRY, feature.LOW_POWER_EXIT):
            ask(client, one, flags.PROBE | flags.SET)
        for refused in (*range(3), feature.LOW_POWER_ENTRY_WITH_WAKEUP, *range(6, 13)):
            with pytest.raises(Refused, match="ENOTTY"):
                ask(client, refused, flags.PROBE | flags.GET)
        ask(client, feature.LOW_POWER_ENTRY, flags.SET)
        assert client.read(BAR0, pci.EDU_ID) == pci.EDU_IDENTITY, "the access wakes it"
        assert not vm.client.query_devices(id="edu")[0].fast_path
        ask(client, feature.LOW_POWER_EXIT, flags.SET)
        assert client.read(BAR0, pci.EDU_ID) == pci.EDU_IDENTITY


def test_a_killed_client_leaves_nothing_and_the_next_attaches(offered: tuple[Vm, Path]) -> None:
    vm, path = offered
    places = os.pathsep.join((str(REPO), *SOURCE_ROOTS))
    with vm.client.events("DEVICE_EXPORT_DETACHED") as events:
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": places}
        )
        assert victim.stdout is not None
        with victim.stdout as said:
            assert said.readline() == b"ready\n"
            assert len(vm.client.query_dma()) == 1
            assert any(one.active for one in vm.client.query_irqs(device="edu") if one.name == "msi")
            victim.kill()
            victim.wait()
        events.get(timeout=60)
    at_rest(vm)
    with Hypervisor(path) as client, bar_of(client) as bar, memfd(SIZE, TEXT) as memory:
        client.map(IOVA, SIZE, memory.number)
        transfer(bar, IOVA, pci.EDU_BUFFER)
        transfer(bar, pci.EDU_BUFFER, IOVA + 4096, pci.EDU_DMA_TO_RAM)
        assert os.pread(memory.number, len(TEXT), 4096) == TEXT
