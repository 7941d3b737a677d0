"""Adding: what a PCI device must have, what it may lack, and REQ and ERR from the first moment to the last.

Rules are those of behaviour.md, section 1.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceError, DeviceRequested
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.protocol.vfio import DeviceFlags, Feature, PciRegion
from vfiod.server.mdev.parent import DeviceInfo, IrqInfo, RegionInfo

EDU = "0000:01:00.0"


def test_req_and_err_are_armed_and_taken_back(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rigs: list[Any] = []
        rig = await world.add(prepare=rigs.append)
        assert sorted(fd.name for fd in world.machine.device("n0").fds()) == ["err", "req"]
        for fd in world.machine.device("n0").fds():
            assert os.readlink(f"/proc/self/fd/{fd.number}") == "anon_inode:[eventfd]"
        rig.irqs.error()
        await world.settle()
        [event] = world.told(DeviceError)
        assert "ERR interrupt" in event.reason
        await world.command("device_del", id="n0")
        await world.until(lambda: world.told(DeviceDeleted) != [])
        assert rig.say() == ["err trigger -1", "req trigger -1"]

    play(scenario)


def test_the_hosts_request_becomes_an_event_with_the_count(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        rig.irqs.request()
        await world.settle()
        rig.irqs.request()
        rig.irqs.request()
        await world.settle()
        assert [event.count for event in world.told(DeviceRequested)] == [1, 3]
        assert world.machine.device("n0").info().requested == 3

    play(scenario)


def test_on_request_delete_removes_it(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(on_request="delete")
        rig.irqs.request()
        await world.until(lambda: world.told(DeviceDeleted) != [])
        assert world.told(DeviceDeleted) == [DeviceDeleted(device="n0", path="/machine/peripheral/n0", released=True)]

    play(scenario)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda rig: rig.region.update({7: RegionInfo(32, readable=True)}), "configuration space of 32 bytes"),
        (lambda rig: setattr(rig, "dead", True), "reads all ones: the device does not answer"),
        (lambda rig: setattr(rig, "fail_read", short), "EIO"),
        (lambda rig: setattr(rig, "fail_set_irqs", refuse), "VFIO_DEVICE_SET_IRQS.*EIO"),
    ],
)
def test_what_a_device_must_have(play: Any, prepare: Any, words: str) -> None:
    async def scenario(world: Any) -> None:
        with pytest.raises(CommandError, match=words):
            await world.add(prepare=prepare)
        assert len(world.machine.devices) == 0
        # Everything is unwound: it can be added once it behaves.
        rig = world.rigs.made[-1]
        rig.prepare()
        [uuid] = world.machine.mdevs.uuids()
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)

    play(scenario)


def short(region: int, offset: int, length: int) -> None:
    if region == PciRegion.CONFIG:
        raise OSError(5, "short")


def refuse(request: Any) -> None:
    if request.index == 4:
        raise OSError(5, "no REQ today")


def test_a_rom_that_cannot_be_read_is_only_a_warning(play: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: Any) -> None:
        def prepare(rig: Any) -> None:
            rig.region[6] = RegionInfo(65536, readable=True)

        with caplog.at_level(logging.WARNING):
            await world.add(prepare=prepare)  # the primer refuses to read its ROM
        assert "The ROM of device n0 cannot be read and is left out" in caplog.text
        rom = await world.region("rom")
        assert rom.size == 0
        assert "65536 bytes, which cannot be read" in rom.note

    play(scenario)


def test_indexes_that_a_pci_device_need_not_have(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(prepare=lambda rig: rig.irq.update({3: IrqInfo(0), 1: IrqInfo(0)}))
        assert [fd.name for fd in world.machine.device("n0").fds()] == ["req"]
        infos = await world.command("query-irqs", device="n0")
        assert [(info.name, info.count, info.reserved) for info in infos] == [
            ("intx", 1, False),
            ("msi", 0, False),
            ("msix", 0, False),
            ("err", 0, True),
            ("req", 1, True),
        ]
        assert rig is not None

    play(scenario)


def test_more_indexes_than_pci_has_are_listed_by_number(play: Any) -> None:
    async def scenario(world: Any) -> None:
        def prepare(rig: Any) -> None:
            rig.info = DeviceInfo(11, 5, reset=True)
            rig.region[9] = RegionInfo(4096, readable=True)

        await world.add(prepare=prepare)
        infos = await world.command("query-regions", device="n0")
        assert [(info.name, info.size) for info in infos[9:]] == [("region9", 4096), ("region10", 0)]

    play(scenario)


# --- the same on the kernel's interface ----------------------------------------------------------------


def test_a_host_out_of_vectors_that_does_not_say_how_many_is_asked_for_the_next_lower_power(play: Any) -> None:
    kernel = FakeKernel()
    kernel.add_device(EDU, 7).msi_count = 8

    async def scenario(world: Any) -> None:
        await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)
        kernel.fail("VFIO_DEVICE_SET_IRQS", errno.ENOSPC)
        with pytest.raises(
            OperationFailed, match=r"5 vectors were asked for.* does not say how many: try 4 "
        ) as caught:
            await world.command("irq-start", device="e0", index="msi", vectors=[0, 1, 2, 3, 4])
        assert caught.value.errno == "ENOSPC"
        await world.command("irq-start", device="e0", index="msi", vectors=[0, 1, 2, 3])

    play(scenario, syscalls=kernel)


@pytest.mark.parametrize("can", [False, True])
def test_a_device_says_whether_it_can_migrate_and_be_reset(play: Any, can: bool) -> None:
    kernel = FakeKernel()
    edu = kernel.add_device(EDU, 7)
    edu.features = frozenset({int(Feature.MIGRATION)} if can else ())
    edu.flags = DeviceFlags.PCI | (DeviceFlags.RESET if can else DeviceFlags(0))

    async def scenario(world: Any) -> None:
        await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)
        [info] = await world.command("query-devices")
        assert (info.migratable, info.reset) == (can, can)

    play(scenario, syscalls=kernel)


def test_a_device_of_a_kernel_group(play: Any) -> None:
    kernel = FakeKernel()
    edu = kernel.add_device(EDU, 7)

    async def scenario(world: Any) -> None:
        await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)
        [info] = await world.command("query-devices")
        assert (info.backend, info.host, info.vendor_id, info.device_id) == ("kernel-group", EDU, 0x1234, 0x11E8)
        assert info.fast_path
        reply = await world.command("region-read", device="e0", region="bar0", offset=0, size=4)
        assert reply.value == 0x010000ED
        # INTx, relayed, completed by access.
        await world.command("irq-start", device="e0")
        [bell] = world.attached
        edu.raise_interrupt(1)
        await world.settle()
        assert bell.rung() == 1
        await world.command("region-write", device="e0", region="bar0", offset=0x64, size=4, value=1)
        assert not edu.masked
        # MSI, direct.
        await world.command("irq-start", device="e0", index="msi")
        [bell] = world.attached
        edu.raise_interrupt(1)
        assert bell.rung() == 1
        await world.command("device-reset", id="e0")
        assert edu.resets == 1
        edu.raise_interrupt(1)
        assert bell.rung() == 1
        assert kernel.request(EDU)
        await world.settle()
        assert len(world.told(DeviceRequested)) == 1

    play(scenario, syscalls=kernel)
    assert kernel.nothing_is_open()


@pytest.mark.parametrize(
    ("settings", "words"), [({"num_regions": 6}, "6 regions and 5"), ({"num_irqs": 2}, "9 regions and 2")]
)
def test_fewer_indexes_than_a_pci_device_has(play: Any, settings: dict[str, int], words: str) -> None:
    kernel = FakeKernel()
    edu = kernel.add_device(EDU, 7)
    for name, value in settings.items():
        setattr(edu, name, value)

    async def scenario(world: Any) -> None:
        with pytest.raises(CommandError, match=f"{words} interrupt indexes: a PCI device has at least 8 and 3"):
            await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)
        assert kernel.nothing_is_open()

    play(scenario, syscalls=kernel)


@pytest.mark.parametrize("failing", range(12))
def test_any_ioctl_of_realizing_that_fails_unwinds_everything(play: Any, failing: int) -> None:
    """Each region's and interrupt's information, and the arming of REQ, refused one at a time."""
    kernel = FakeKernel()
    edu = kernel.add_device(EDU, 7)
    operations = ["VFIO_DEVICE_GET_REGION_INFO"] * 6 + ["VFIO_DEVICE_GET_IRQ_INFO"] * 3
    operations += ["VFIO_DEVICE_SET_IRQS", "pread", "VFIO_DEVICE_GET_INFO"]
    before = failing % 6 if failing < 6 else max(0, failing - 6) % 3 if failing < 9 else 0

    async def scenario(world: Any) -> None:
        kernel.fail(operations[failing], *([0] * before), 5)
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)
        assert kernel.nothing_is_open()
        assert edu.single == {}
        await world.command("device_add", driver="vfio-pci", id="e0", host=EDU)

    play(scenario, syscalls=kernel)
