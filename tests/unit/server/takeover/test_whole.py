"""A machine described, and made again from that in another machine: nothing differs but who holds it."""

import asyncio
import os
import struct
from typing import Any

import pytest
from tests.unit.server.machine.conftest import World

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.interrupts import Irq
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.container import Type1Space
from vfiod.server.machine.keeping import rehome
from vfiod.server.state.format import BadState, CannotKeep, decode
from vfiod.server.takeover.whole import busy, describe, rebuild

from .conftest import Two, bell, move, picture, rung

MiB = 1 << 20


async def primer(world: World, id: str = "n0", **more: Any) -> str:
    uuid = await world.machine.mdevs.create("primer", "primer-pci", parameters={"memory": 1 << 16})
    await world.command("device_add", driver="vfio-pci", id=id, mdev=uuid, **more)
    return uuid


async def write(world: World, offset: int, value: int, region: str = "bar0", size: int = 4, id: str = "n0") -> None:
    await world.command("region-write", device=id, region=region, offset=offset, size=size, value=value)


async def read(world: World, offset: int, region: str = "bar0", size: int = 4, id: str = "n0") -> int:
    result = await world.command("region-read", device=id, region=region, offset=offset, size=size)
    value = result.value
    assert isinstance(value, int)
    return value


def test_nothing_is_described_and_made_again(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        state = await move(first, second)
        assert (state.format, state.version, state.needs) == ("vfiod-state", 1, [])
        assert picture(first) == picture(second)

    two(scenario)


def test_objects_mappings_and_fd_sets_are_the_same_files(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        first.name_memory("m")
        first.name_memory("own", MiB)
        first.name_fd("loose", os.eventfd(0))
        await first.command("object-add", qom_type="memory-backend-fd", id="ram", fd="m", size=MiB)
        await first.command("dma-map", iova=0x10000, size=0x4000, memory_backend="ram", offset=0x2000)
        await first.command("dma-map", iova=MiB, size=MiB, fd="own", readonly=True)
        first.machine.fdsets.add(first.names.take_pending() if first.names.pending else held(first), 7)
        await move(first, second)
        assert picture(first) == picture(second)
        mine, theirs = first.machine.objects.memory("ram"), second.machine.objects.memory("ram")
        mine.write(0x100, b"the same pages")
        assert theirs.read(0x100, 14) == b"the same pages"
        # It is a machine like any other: it can be taken apart.
        await second.command("dma-unmap", iova=0x10000, size=0x4000)
        await second.command("object-del", id="ram")

    two(scenario)


def held(world: World) -> Any:
    world.names.receive([FileDescriptor(os.eventfd(0))])
    return world.names.take_pending()


def test_a_primer_goes_on_with_registers_memory_config_and_table(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        await primer(first, multifunction=True)
        await write(first, 0x04, 0x1234_5678)
        await write(first, 4, 0x0006, "config", 2)
        await write(first, 0x10, 0xFEB0_0000, "config")
        await write(first, 0x800, 0xFEE0_1000)
        await write(first, 0x2000, 0xAA55, "bar2")
        accesses = await read(first, 0x0C)
        await move(first, second)
        assert await read(second, 0x04) == 0x1234_5678 ^ 0xFFFF_FFFF
        assert await read(second, 0x0C) == accesses + 1
        assert await read(second, 0x2000, "bar2") == 0xAA55
        assert await read(second, 0x10, "config") == 0xFEB0_0000
        assert await read(second, 0x0E, "config", 1) & 0x80
        assert await read(second, 0x800) == 0xFEE0_1000
        assert first.events[-1].seq == second.machine.hub.seq
        assert second.told() == []

    two(scenario)


@pytest.mark.parametrize("mode", ["relayed", "direct"])
def test_messages_keep_their_eventfds_counts_and_numbers(two: Two, mode: str) -> None:
    async def scenario(first: World, second: World) -> None:
        await primer(first)
        await write(first, 4, 0x0006, "config", 2)
        with bell() as mine:
            first.name_fd("e", os.dup(mine.number))
            fds = [{"vector": 0, "trigger": "e"}]
            await first.command("irq-start", device="n0", index="msix", eventfds=fds, mode=mode)
            assert rung(mine) == 0
            await first.command("irq-route", device="n0", index="msix", number=40)
            await write(first, 0x14, 1)
            await first.until(lambda: rung(mine) == 1)
            await move(first, second)
            first.machine.devices.get("n0").stop()  # its process is gone
            shown = picture(second)
            assert shown[0]["irqs"][2]["active"] is True
            await write(second, 0x14, 1)
            await second.until(lambda: rung(mine) == 1)
            if mode == "relayed":
                [event] = await second.hears(Irq)
                assert isinstance(event, Irq)
                assert (event.vector, event.delivered) == (0, 2)
            await second.command("irq-stop", device="n0", index="msix")

    two(scenario)


def test_an_interrupt_that_fires_meanwhile_is_heard_by_the_new_one(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        await primer(first)
        await write(first, 4, 0x0006, "config", 2)
        with bell() as mine:
            first.name_fd("e", os.dup(mine.number))
            eventfds = [{"vector": 0, "trigger": "e"}]
            await first.command("irq-start", device="n0", index="msix", eventfds=eventfds, mode="relayed")
            told = describe(first.machine)
            fds = [FileDescriptor.duplicate_of(number) for _, number in told.fds]
            # The device fires when nobody hears: its eventfd keeps it.
            relay = next(number for name, number in told.fds if name.endswith("relay"))
            first.machine.devices.get("n0").stop()
            os.eventfd_write(relay, 3)
            await rebuild(second.machine, told.data, fds)
            await second.until(lambda: rung(mine) == 3)
            await second.hears(Irq)

    two(scenario)


def test_an_intx_that_is_up_stays_up_with_the_fast_path_off(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        await primer(first, x_intx_mmap_timeout_ms=0)
        await first.command("irq-start", device="n0", index="intx", mode="relayed")
        await write(first, 0x14, 1)
        await first.hears(Irq)
        await move(first, second)
        first.machine.devices.get("n0").stop()
        device = second.machine.devices.get("n0")
        assert device.info().fast_path is False
        [vector] = device.irq_infos()[0].vectors
        assert vector.state == "pending"
        await write(second, 0x18, 1)  # the acknowledgement is an access: it completes
        [vector] = device.irq_infos()[0].vectors
        assert vector.state == "inactive"
        await write(second, 0x14, 2)
        await second.hears(Irq)

    two(scenario)


def test_dma_goes_on_where_it_was_mapped(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        first.name_memory("m")
        await first.command("dma-map", iova=0x40_0000, size=MiB, fd="m")
        await primer(first)
        await write(first, 4, 0x0006, "config", 2)
        await move(first, second)
        assert [space.name for space in second.machine.memory.spaces] == [
            space.name for space in first.machine.memory.spaces
        ]
        first.machine.memory.ranges()[0].mapping.memory.write(0x10, struct.pack("<I", 0xC0FFEE))
        await write(second, 0x20, 0x40_0010, size=8)
        await write(second, 0x28, 0x100)
        await write(second, 0x2C, 4)
        await write(second, 0x30, 1)
        assert await read(second, 0x34) == 1
        assert await read(second, 0x100, "bar2") == 0xC0FFEE

    two(scenario)


def test_a_platform_device_goes_on(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        uuid = await first.machine.mdevs.create("platform", "primer-platform")
        await first.command("device_add", driver="vfio-platform", id="n0", mdev=uuid)
        await first.command("irq-start", first_number=32, mode="relayed")
        await write(first, 0x04, 5, "region0")
        await write(first, 0x10, 0, "region0")
        await first.hears(Irq)
        await move(first, second)
        first.machine.devices.get("n0").stop()
        shown, before = picture(second)[0], picture(first)[0]
        assert shown["irqs"][0]["vectors"] and shown["irqs"][0]["vectors"][0]["number"] == 32
        assert [one["name"] for one in shown["irqs"]] == [one["name"] for one in before["irqs"]]
        assert await read(second, 0x04, "region0") == 5 ^ 0xFFFF_FFFF
        await write(second, 0x14, 0, "region0")
        await write(second, 0x10, 1, "region0")
        await second.hears(Irq)
        # What is added later is numbered on.
        other = await second.machine.mdevs.create("platform", "primer-platform")
        await second.command("device_add", driver="vfio-platform", id="n1", mdev=other)
        numbers = [vector.number for one in second.machine.devices.get("n1").irq_infos() for vector in one.vectors]
        assert min(number for number in numbers if isinstance(number, int)) == 34

    two(scenario)


def test_a_device_of_a_group_stays_open_bound_and_mapped(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        kernel = first.kernel
        first.name_memory("m")
        await first.command("dma-map", iova=0, size=MiB, fd="m")
        kernel.add_device("0000:01:00.0", 7)
        first.name_opened("g", "/dev/vfio/7")
        await first.command("device_add", driver="vfio-pci", id="n0", host="0000:01:00.0", group_fd="g")
        describe(first.machine)
        kernel.log.clear()
        await move(first, second)
        told_kernel = {"VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_IOMMU_MAP_DMA", "VFIO_GROUP_GET_DEVICE_FD"}
        assert not told_kernel & set(kernel.log)
        assert not {"VFIO_DEVICE_SET_IRQS", "VFIO_DEVICE_RESET", "VFIO_IOMMU_UNMAP_DMA"} & set(kernel.log)
        assert picture(first) == picture(second)
        [space] = second.machine.memory.spaces
        assert isinstance(space, Type1Space)
        assert space.mapped() == [(0, MiB)]
        device = second.machine.devices.get("n0")
        await second.command("region-read", device="n0", region="config", offset=0, size=2)
        assert device.info().state == "running"

    two(scenario)


def test_what_cannot_be_described_is_named(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        uuid = await first.add()
        first.parent.made[uuid].save = lambda: (_ for _ in ()).throw(OSError(95, "not this one"))  # type: ignore[method-assign]
        with pytest.raises(CannotKeep, match=f"save on mdev {uuid}.*not this one"):
            describe(first.machine)

    two(scenario)


def test_while_something_is_under_way_it_says_what(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        await first.add()
        first.temper.reset.close()
        task = asyncio.ensure_future(first.command("device-reset", id="n0"))
        await first.temper.reset.is_reached()
        assert busy(first.machine) == "device-reset of device 'n0'"
        first.temper.reset.open()
        await task
        assert busy(first.machine) is None

    two(scenario)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no state of vfiod"),
        (b"[]", "no state of vfiod"),
        (b"{}", "damaged"),
        (b'{"format":"other"}', "its format is 'other'"),
        (b'{"format":"vfiod-state","version":2}', "has version 2, this vfiod reads version 1"),
        (b'{"format":"vfiod-state","version":1,"machine":{}}', "damaged"),
    ],
)
def test_another_format_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadState, match=words):
        decode(data)


def test_what_the_kernel_cannot_count_is_said(two: Two) -> None:
    async def scenario(first: World, second: World) -> None:
        kernel = first.kernel
        kernel.add_device("0000:01:00.0", 7)
        first.name_opened("g", "/dev/vfio/7")
        await first.command("device_add", driver="vfio-pci", id="n0", host="0000:01:00.0", group_fd="g")
        problems = rehome(first.machine)
        assert problems == ["container:0: the kernel cannot update addresses (VFIO_UPDATE_VADDR)"]
        assert int(vfio.Extension.UPDATE_VADDR) == 10

    two(scenario)
