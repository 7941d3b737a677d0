"""``device_del`` and REQ: exactly one event, whoever holds the device, whatever fails."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceRequested, DeviceUnplugError, Holder
from vfiod.protocol.catalogue.words import DeviceState
from vfiod.protocol.errors import CommandError, DeviceNotFound, ErrorClass

Play = Callable[[Callable[[Any], Any]], None]

FOR_EVER = 3_600_000
GONE = DeviceDeleted(device="n0", path="/machine/peripheral/n0", released=True)


async def hold_by_reset(world: Any, id: str = "n0") -> asyncio.Task[None]:
    """Begin a reset that hangs in the kernel until the gate is opened."""
    world.temper.reset.close()
    task = asyncio.create_task(world.machine.device(id).reset())
    await world.temper.reset.is_reached()
    return task


@pytest.mark.parametrize("name", ["n0", "/machine/peripheral/n0"])
def test_it_goes_at_once_when_nobody_holds_it(play: Play, name: str) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0")
        before = len(os.listdir("/proc/self/fd"))
        await world.command("device_del", id=name)
        assert world.machine.device("n0").state is DeviceState.UNPLUGGING
        assert await world.hears(DeviceDeleted) == [GONE]
        assert world.machine.memory.spaces == ()
        assert len(os.listdir("/proc/self/fd")) < before
        with pytest.raises(DeviceNotFound, match="Device 'n0' not found") as caught:
            await world.command("device_del", id="n0")
        assert caught.value.error_class is ErrorClass.DEVICE_NOT_FOUND
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
        assert len(world.told(DeviceDeleted)) == 1

    play(scenario)


def test_a_second_removal_is_refused_in_qemus_words(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        reset = await hold_by_reset(world)
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        for _ in range(2):
            with pytest.raises(CommandError, match=r"^Device n0 is already in the process of unplug$") as caught:
                await world.command("device_del", id="n0", timeout_ms=0)
            assert caught.value.error_class is ErrorClass.GENERIC
        world.temper.reset.open()
        await reset
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


def test_it_waits_for_what_runs_and_for_what_waits(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        first = await hold_by_reset(world)
        second = asyncio.create_task(world.machine.device("n0").reset())
        await world.until(lambda: world.machine.device("n0").lane.waiting == 1)
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        [info] = await world.command("query-devices")
        assert info.state is DeviceState.UNPLUGGING
        assert info.held_by == [Holder(kind="operation", detail="device-reset")] * 2
        world.temper.reset.open()
        await asyncio.gather(first, second)
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


def test_when_time_is_over_it_names_the_holders_and_runs_on(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        reset = await hold_by_reset(world)
        device.map_region(device.regions.all[2], 7).close()
        await world.command("device_del", id="n0", timeout_ms=1)
        [error] = await world.hears(DeviceUnplugError)
        assert (error.device, error.path) == ("n0", "/machine/peripheral/n0")
        assert [holder.kind for holder in error.held_by] == ["operation", "mapping"]
        assert "operation (device-reset)" in error.msg
        assert "mapping (session 7: bar2)" in error.msg
        assert device.state is DeviceState.RUNNING
        world.temper.reset.open()
        await reset
        assert world.told(DeviceDeleted) == []
        world.machine.session_ended(7)
        await world.command("device_del", id="n0")
        assert await world.hears(DeviceDeleted) == [GONE]
        assert len(world.told(DeviceUnplugError)) == 1

    play(scenario)


def test_the_end_of_a_session_releases_what_it_mapped(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        for session in (3, 4):
            device.map_region(device.regions.all[2], session).close()
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        world.machine.session_ended(3)
        await asyncio.sleep(0.01)
        assert [holder.detail for holder in device.holders()] == ["session 4: bar2"]
        world.machine.session_ended(4)
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


def test_region_unmap_lets_a_waiting_removal_go_on(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        region = device.regions.all[2]
        device.map_region(region, 3).close()
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        await asyncio.sleep(0.01)
        assert world.told(DeviceDeleted) == []
        world.machine.unmap_region(device, region, 3)
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


def test_force_does_not_wait_for_mappings(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        device.map_region(device.regions.all[2], 3).close()
        await world.command("device_del", id="n0", force=True, timeout_ms=FOR_EVER)
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


def test_force_does_not_wait_for_a_stuck_reset(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        reset = await hold_by_reset(world)
        queued = asyncio.create_task(world.machine.device("n0").reset())
        await world.until(lambda: world.machine.device("n0").lane.waiting == 1)
        await world.command("device_del", id="n0", force=True)
        [gone] = await world.hears(DeviceDeleted)
        assert gone.device == "n0"
        with pytest.raises(DeviceNotFound, match="Device 'n0' not found"):
            await queued
        assert not reset.done()
        world.temper.reset.open()
        await asyncio.gather(reset, return_exceptions=True)
        assert len(world.told(DeviceDeleted)) == 1

    play(scenario)


def test_a_second_removal_with_force_frees_a_stuck_one_once(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        reset = await hold_by_reset(world)
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        await asyncio.sleep(0.01)
        assert world.told(DeviceDeleted) == []
        await world.command("device_del", id="n0", force=True)
        with pytest.raises(CommandError, match="already in the process of unplug"):
            await world.command("device_del", id="n0", force=True)
        await world.hears(DeviceDeleted)
        world.temper.reset.open()
        await asyncio.gather(reset, return_exceptions=True)
        assert len(world.told(DeviceDeleted)) == 1

    play(scenario)


def test_who_comes_while_the_lane_is_waited_for_is_waited_for_too(play: Play) -> None:
    """The topology is busy when the last holder leaves; another comes before the removal has its turn."""

    async def scenario(world: Any) -> None:
        await world.add("n0")
        world.temper.map.close()
        world.name_memory("m")
        mapping = asyncio.create_task(world.command("dma-map", iova=0, size=1 << 20, fd="m"))
        await world.temper.map.is_reached()
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        await world.until(lambda: world.machine.topology.waiting == 1)
        reset = await hold_by_reset(world)
        world.temper.map.open()
        await mapping
        await world.until(lambda: not world.machine.topology.busy)
        assert world.told(DeviceDeleted) == []
        assert world.machine.device("n0").state is DeviceState.UNPLUGGING
        world.temper.reset.open()
        await reset
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)


@pytest.mark.parametrize("where", ["stop", "close"])
def test_what_fails_on_the_way_out_does_not_keep_it(play: Play, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        device = world.machine.device("n0")
        whole = getattr(device, where)

        def fail() -> None:
            whole()
            raise RuntimeError("No")

        monkeypatch.setattr(device, where, fail)
        await world.command("device_del", id="n0")
        [gone] = await world.hears(DeviceDeleted)
        assert gone.released is (where == "stop")
        assert not world.machine.devices.exists("n0")

    play(scenario)


def test_a_device_of_the_same_id_may_come_as_soon_as_the_event_is_out(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0")
        for n in range(1, 20):
            await world.command("device_del", id="n0")
            await world.hears(DeviceDeleted, count=n)
            await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)

    play(scenario)


# --- the host asks ------------------------------------------------------------------------------------


def ask(world: Any, uuid: str) -> None:
    """The host asks for the device: its parent raises REQ."""
    world.parent.made[uuid].request(0)


def test_a_request_is_an_event_and_no_more(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0")
        ask(world, uuid)
        [event] = await world.hears(DeviceRequested)
        assert (event.device, event.action) == ("n0", "event")
        assert world.machine.device("n0").state is DeviceState.RUNNING
        assert (await world.command("query-devices"))[0].requested == 1

    play(scenario)


def test_a_request_may_delete(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0", on_request="delete")
        ask(world, uuid)
        assert await world.hears(DeviceDeleted) == [GONE]
        assert [type(event) for event in world.told(DeviceRequested, DeviceDeleted)] == [DeviceRequested, DeviceDeleted]

    play(scenario)


def test_a_request_forces_when_its_time_is_over(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0", on_request="delete", on_request_timeout_ms=1)
        device = world.machine.device("n0")
        device.map_region(device.regions.all[2], 3).close()
        ask(world, uuid)
        assert await world.hears(DeviceDeleted) == [GONE]
        assert world.told(DeviceUnplugError) == []

    play(scenario)


def test_a_request_makes_a_patient_removal_insist(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0", on_request="delete", on_request_timeout_ms=1)
        device = world.machine.device("n0")
        device.map_region(device.regions.all[2], 3).close()
        await world.command("device_del", id="n0", timeout_ms=FOR_EVER)
        await asyncio.sleep(0.01)
        assert world.told(DeviceDeleted) == []
        ask(world, uuid)
        assert await world.hears(DeviceDeleted) == [GONE]

    play(scenario)
