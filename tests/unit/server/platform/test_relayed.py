"""Section 7, relayed mode: one active interrupt per device, the others wait; accesses complete; the fast path."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from tests.unit.server.platform.conftest import Play

from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import Irq as IrqEvent
from vfiod.protocol.catalogue.regions import RegionMmapChanged
from vfiod.protocol.errors import OperationFailed


async def relayed(world: Any, irqs: str = "le", **more: Any) -> tuple[Any, list[Any]]:
    device = await world.add(irqs=irqs, **more)
    return device, await world.start(device="p0", mode="relayed")


def test_a_level_is_delivered_and_completed_by_the_first_access(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, _] = await relayed(world)
        assert level.mode == "relayed"
        assert await world.fast()
        device.interrupt(0)
        await world.settle()
        assert level.rung() == 1
        assert device.lines[0].masked
        assert await world.states() == "active inactive"
        assert not await world.fast()
        device.lines[0].asserted = False
        assert await world.access() == 0x74726976
        assert not device.lines[0].masked, "unmasked by the access"
        assert await world.states() == "inactive inactive"
        assert level.rung() == 0
        [one] = (await world.irqs())[0].vectors
        assert (one.fired, one.delivered, one.spurious) == (1, 1, 0)
        assert [event.fired for event in world.told(IrqEvent)] == [1]

    play(scenario)


def test_a_level_that_is_still_asserted_comes_again(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, _] = await relayed(world)
        device.interrupt(0)
        for _ in range(3):
            await world.settle()
            assert level.rung() == 1
            await world.access()
        await world.settle()
        assert level.rung() == 1
        await world.command("region-write", device="p0", region="region0", offset=0x10, size=4, value=0)
        await world.settle()
        assert level.rung() == 0
        assert await world.states() == "inactive inactive"

    play(scenario)


def test_others_wait_in_the_order_they_came(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, irqs = await relayed(world, "lele")
        for index in (2, 1, 3, 0):
            device.interrupt(index)
            await world.settle()
        assert [irq.rung() for irq in irqs] == [0, 0, 1, 0]
        assert await world.states() == "pending pending active pending"
        order = []
        for _ in range(3):
            for line in device.lines:
                line.asserted = False
            await world.access()
            order.append([irq.rung() for irq in irqs].index(1))
        assert order == [1, 3, 0]
        await world.access()
        assert await world.states() == "inactive inactive inactive inactive"

    play(scenario)


def test_an_edge_is_coalesced_and_never_queued_twice(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, edge] = await relayed(world)
        for _ in range(3):
            device.interrupt(1)
            await world.settle()
        assert edge.rung() == 1
        device.interrupt(0)
        await world.settle()
        for _ in range(3):
            device.interrupt(1)
            await world.settle()
        assert await world.states() == "pending active"
        await world.access()
        assert (level.rung(), edge.rung()) == (1, 0)
        for _ in range(3):
            device.interrupt(1)
            await world.settle()
        assert await world.states() == "active pending"
        device.lines[0].asserted = False
        await world.access()
        assert edge.rung() == 1
        await world.access()
        assert await world.states() == "inactive inactive"
        assert (await world.irqs())[1].vectors[0].fired == 9

    play(scenario)


def test_irq_eoi_completes_and_nothing_pending_is_no_error(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, edge] = await relayed(world)
        await world.command("irq-eoi", oob=True, device="p0", index=0)
        device.interrupt(0)
        device.interrupt(1)
        await world.settle()
        assert await world.states() in ("active pending", "pending active")
        device.lines[0].asserted = False
        for _ in range(2):
            for index in (0, 1):
                await world.command("irq-eoi", oob=True, device="p0", index=index)
        assert (level.rung(), edge.rung()) == (1, 1)
        assert await world.states() == "inactive inactive"

    play(scenario)


def test_an_edge_completed_without_an_access_is_delivered_once_more(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [_, edge] = await relayed(world)
        device.interrupt(1)
        await world.settle()
        device.interrupt(1)
        await world.settle()
        assert edge.rung() == 1
        await world.command("irq-eoi", device="p0", index="irq1")
        assert edge.rung() == 1, "nobody may have seen what the second edge was about"
        await world.command("irq-eoi", device="p0", index="irq1")
        assert edge.rung() == 0
        assert await world.states() == "inactive inactive"

    play(scenario)


def test_the_timer_brings_the_fast_path_back_once_nothing_is_active(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, _ = await relayed(world, mmap_timeout_ms=5)
        device.interrupt(1)
        await world.settle()
        assert not await world.fast()
        await asyncio.sleep(0.03)
        assert not await world.fast(), "active: the timer re-arms"
        await world.access()
        await world.until(lambda: world.machine.device("p0").info().fast_path)
        assert [event.enabled for event in world.told(RegionMmapChanged)] == [False, True]

    play(scenario)


def test_it_is_the_timer_that_brings_it_back_not_the_access(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, _ = await relayed(world, mmap_timeout_ms=60_000)
        device.interrupt(1)
        await world.settle()
        await world.access()
        assert not await world.fast()
        await world.command("irq-stop", device="p0")

    play(scenario)


def test_a_timeout_of_zero_leaves_the_fast_path_off(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, _ = await relayed(world, mmap_timeout_ms=0)
        assert await world.fast()
        device.interrupt(1)
        await world.settle()
        await world.access()
        await asyncio.sleep(0.02)
        assert not await world.fast()
        await world.command("irq-stop", device="p0")
        assert await world.fast(), "nothing is relayed any more"

    play(scenario)


def test_the_region_mapped_outside_ends_completion_by_access(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, edge] = await relayed(world)
        await world.command("region-map", device="p0", region=0)
        device.interrupt(0)
        device.interrupt(1)
        device.interrupt(1)
        await world.settle()
        assert level.rung() == 1
        assert edge.rung() == 1, "an edge passes: nothing would complete it"
        await world.access()
        assert await world.states() == "active inactive"
        device.lines[0].asserted = False
        await world.command("irq-eoi", device="p0", index=0)
        assert await world.states() == "inactive inactive"

    play(scenario)


def test_masked_by_the_user_it_waits_for_the_unmask(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, _] = await relayed(world)
        await world.command("irq-mask", oob=True, device="p0", index=0)
        device.interrupt(0)
        await world.settle()
        assert level.rung() == 0
        assert await world.states() == "masked inactive"
        await world.command("irq-unmask", device="p0", index=0)
        await world.settle()
        assert level.rung() == 1
        await world.command("irq-mask", device="p0", index=0)
        await world.access()
        await world.settle()
        assert device.lines[0].masked, "the user's mask outlives the completion"
        assert level.rung() == 0
        await world.command("irq-unmask", device="p0", index=0)
        await world.settle()
        assert level.rung() == 1

    play(scenario)


def test_a_resample_eventfd_of_the_callers_completes_it_and_accesses_do_not(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add(irqs="l")
        trigger, resample = world.bell("t"), world.bell("r")
        eventfds = [{"trigger": "t", "resample": "r"}]
        [irq] = await world.start(device="p0", index=0, mode="relayed", eventfds=eventfds)
        assert (irq.trigger, irq.resample) == (None, None)
        device.interrupt(0)
        await world.settle()
        assert trigger.rung() == 1
        assert await world.fast(), "no access is waited for"
        await world.access()
        assert await world.states() == "active"
        device.lines[0].asserted = False
        resample.ring()
        await world.settle()
        assert await world.states() == "inactive"

    play(scenario)


def test_an_unmask_that_fails_is_said_and_the_interrupt_stays_active(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device, [level, _] = await relayed(world)
        device.interrupt(0)
        await world.settle()
        device.lines[0].asserted = False
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", errno.EIO, errno.EIO)
        await world.access()
        assert "could not be completed" in world.told(DeviceError)[0].reason
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("irq-eoi", device="p0", index=0)
        assert await world.states() == "active inactive"
        await world.access()
        assert await world.states() == "inactive inactive"
        assert level.rung() == 1

    play(scenario)


def test_ten_thousand_interrupts_on_256_indexes_and_none_is_lost(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add(irqs="e" * 240 + "l" * 16)
        irqs = []
        for first in (0, 128):
            irqs += await world.start(device="p0", mode="relayed", indexes=list(range(first, first + 128)))
        model = world.machine.device("p0")
        region = model.regions.find(0)
        seen = [0] * 256

        def handle(index: int) -> None:
            seen[index] += irqs[index].rung()
            device.lines[index].asserted = False
            model.load(region, 0, 4)  # the handler looks at the device: that completes it

        for index, irq in enumerate(irqs):
            world.loop.add_reader(irq.trigger.fd.number, handle, index)
        fired = [0] * 256
        for number in range(10_000):
            index = number * 7 % 256
            fired[index] += 1
            device.interrupt(index)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await world.until(lambda: not any(line.asserted and line.level for line in device.lines))
        await world.until(lambda: {one.vectors[0].state for one in model.irq_infos()} == {"inactive"})
        await world.settle()
        for irq in irqs:
            world.loop.remove_reader(irq.trigger.fd.number)
        infos = [one.vectors[0] for one in await world.irqs()]
        assert [one.fired for one in infos[:240]] == fired[:240], "every edge was heard"
        assert [one.delivered for one in infos] == seen
        assert all(seen), "and each came through"

    play(scenario)
