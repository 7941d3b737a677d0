"""The machine's end: in order, once, whatever hangs or fails; and how much work things take when there are many."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceDeleted, DeviceUnplugError
from vfiod.protocol.errors import CommandError, DeviceNotActive
from vfiod.server.dma import guest_memory

Play = Callable[[Callable[[Any], Any]], None]

MiB = 1 << 20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time for what hangs."""
    monkeypatch.setattr("vfiod.server.machine.root.CLOSE_TIMEOUT_MS", 1)
    monkeypatch.setattr("vfiod.server.machine.ending.GRACE_S", 0.05)


def test_everything_is_closed_once_in_order(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        await world.command("object-add", qom_type="memory-backend-fd", id="ram0", fd="m")
        await world.command("dma-map", iova=0, size=MiB, memory_backend="ram0")
        for n in range(3):
            await world.add(f"n{n}")
        first, second = await asyncio.gather(world.machine.close(), world.machine.close())
        assert first == second == await world.machine.close() == []
        assert [event.device for event in world.told(DeviceDeleted)] == ["n2", "n1", "n0"]
        assert (len(world.machine.devices), len(world.machine.memory), len(world.machine.objects)) == (0, 0, 0)
        assert not world.machine.stuck
        world.name_memory("late")
        for command, arguments in (
            ("device_add", {"driver": "vfio-pci", "mdev": "11111111-2222-3333-4444-555555555555"}),
            ("dma-map", {"iova": 0, "size": MiB, "fd": "late"}),
            ("object-add", {"qom_type": "memory-backend-fd", "id": "ram1", "fd": "late"}),
        ):
            with pytest.raises(DeviceNotActive, match="The server is shutting down"):
                await world.command(command, **arguments)
        assert world.names.look("late") is not None
        assert (await world.command("query-machine")).devices == []

    play(scenario)


def test_an_addition_under_way_ends_and_is_closed_too(play: Play) -> None:
    async def scenario(world: Any) -> None:
        running, waiting = await world.mdev(), await world.mdev()
        world.temper.open.close()
        first = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n0", mdev=running))
        await world.temper.open.is_reached()
        second = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n1", mdev=waiting))
        await world.until(lambda: world.machine.topology.waiting == 1)
        closing = asyncio.create_task(_await(world.machine.close()))
        with pytest.raises(DeviceNotActive, match="shutting down"):
            await second
        world.temper.open.open()
        await first
        assert await closing == []
        assert [type(event) for event in world.told(DeviceAdded, DeviceDeleted)] == [DeviceAdded, DeviceDeleted]

    play(scenario)


def test_a_removal_that_waits_for_a_holder_ends_with_one_event(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        device.map_region(device.regions.all[2], 3).close()
        await world.command("device_del", id="n0", timeout_ms=3_600_000)
        await asyncio.sleep(0.01)
        assert await world.machine.close() == []
        assert len(world.told(DeviceDeleted)) == 1
        assert world.told(DeviceUnplugError) == []

    play(scenario)


def test_a_removal_that_is_closing_ends_with_one_event(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        world.temper.close.close()
        await world.command("device_del", id="n0")
        await world.temper.close.is_reached()
        closing = asyncio.create_task(_await(world.machine.close()))
        await asyncio.sleep(0.01)
        world.temper.close.open()
        assert await closing == []
        assert len(world.told(DeviceDeleted)) == 1

    play(scenario)


@pytest.mark.usefixtures("impatient")
def test_a_stuck_reset_is_named_and_the_rest_is_closed(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        await world.add("n1")
        world.temper.reset.close()
        reset = asyncio.create_task(world.machine.device("n0").reset())
        await world.temper.reset.is_reached()
        problems = await world.machine.close()
        assert problems[0] == "Device n0: device-reset is still running; it is closed all the same"
        assert world.machine.stuck
        assert [event.device for event in world.told(DeviceDeleted)] == ["n1", "n0"]
        world.temper.reset.open()
        await asyncio.gather(reset, return_exceptions=True)

    play(scenario)


@pytest.mark.usefixtures("impatient")
def test_a_close_that_hangs_is_left_to_the_kernel(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        world.temper.close.close()
        problems = await world.machine.close()
        assert "Closing device n0 does not end; it is left to the kernel" in problems
        assert world.machine.stuck
        assert [event.released for event in world.told(DeviceDeleted)] == [False]
        world.temper.close.open()
        await world.until(lambda: len(os.listdir("/proc/self/task")) <= 64)

    play(scenario)


@pytest.mark.usefixtures("impatient")
def test_a_stuck_addition_is_named(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.mdev()
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        world.temper.map.close()
        adding = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid))
        await world.temper.map.is_reached()
        problems = await world.machine.close()
        assert "device_add n0 is still running; the devices are closed all the same" in problems
        assert world.machine.stuck
        world.temper.map.open()
        with pytest.raises(CommandError):
            await adding

    play(scenario)


def test_what_fails_is_said_and_stops_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: Any) -> None:
        for n in range(3):
            await world.add(f"n{n}")
        device = world.machine.device("n1")
        whole = device.close

        def fail() -> bool:
            whole()
            raise CommandError("The kernel is cross")

        monkeypatch.setattr(device, "close", fail)
        assert await world.machine.close() == ["Closing device n1 failed: The kernel is cross"]
        assert [event.released for event in world.told(DeviceDeleted)] == [True, False, True]
        assert not world.machine.stuck

    play(scenario)


async def _await(work: Any) -> Any:
    return await work


# --- many --------------------------------------------------------------------------------------------


def test_ten_thousand_mappings_are_found_by_bisection(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def counted(one: guest_memory.MappedRange) -> int:
        nonlocal looks
        looks += 1
        return one.mapping.iova

    async def scenario(world: Any) -> None:
        nonlocal looks
        memory = world.machine.memory
        world.name_memory("m", 10_002 * 0x1000)
        await world.command("object-add", qom_type="memory-backend-fd", id="ram0", fd="m")
        file = world.machine.objects.memory("ram0")
        await world.add("n0")
        for n in range(10_000):
            memory.map(n * 0x2000, 0x1000, file, backend="ram0")
        monkeypatch.setattr(guest_memory, "_first", counted)
        between = 5_000 * 0x2000 + 0x1000
        works: list[Callable[[], Any]] = [
            lambda: memory.find(5_000 * 0x2000),
            lambda: memory.map(between, 0x1000, file, backend="ram0"),
            lambda: memory.unmap(between, 0x1000),
        ]
        for work in works:
            looks = 0
            assert work() is not None
            assert looks <= 40
        assert len(await world.command("query-dma")) == 10_000

    play(scenario)


def test_hundreds_of_devices_are_there_and_go(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await asyncio.gather(*(world.add(f"n{n}") for n in range(200)))
        assert len(await world.command("query-devices")) == 200
        await asyncio.gather(*(world.command("device_del", id=f"n{n}") for n in range(200)))
        await world.hears(DeviceDeleted, count=200)
        assert len({event.device for event in world.told(DeviceDeleted)}) == 200

    play(scenario)
