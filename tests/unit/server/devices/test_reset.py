"""Reset: interrupts and bus mastering off around it, everything as before after it, and honest when it fails.

Rules are those of behaviour.md, sections 1 and 6.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceError
from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.catalogue.reset import DeviceResetDone
from vfiod.protocol.errors import CommandError, DeviceNotActive, DeviceNotFound, OperationFailed
from vfiod.server.mdev.parent import DeviceInfo

BUS_MASTER = 1 << 2
MEMORY = 1 << 1


async def prepared(world: Any) -> Any:
    """A rig with bus mastering on and its BAR0 somewhere."""
    rig = await world.add()
    await world.command("region-write", device="n0", region="config", offset=4, size=2, value=MEMORY | BUS_MASTER)
    await world.command("region-write", device="n0", region="config", offset=0x10, size=4, value=0xFEB00000)
    return rig


async def read(world: Any, offset: int, size: int) -> int:
    reply = await world.command("region-read", device="n0", region="config", offset=offset, size=size)
    return int(reply.value)


def test_a_reset_restores_everything(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        bells = world.bell("t"), world.bell("r")
        await world.command("irq-start", device="n0", eventfds=[{"vector": 0, "trigger": "t", "resample": "r"}])
        await world.command("region-write", device="n0", region="bar0", offset=4, size=4, value=5)
        during: list[Any] = []
        rig.on_reset = lambda: during.append((rig.irqs.kind, rig.config.bus_master))
        rig.say()
        await world.command("device-reset", id="n0")
        assert during == [(None, False)]  # no interrupt, no DMA
        assert rig.say() == [
            "intx mask none",
            "intx unmask -1",
            "intx disable",
            "intx trigger eventfd",
            "intx unmask eventfd",
        ]
        assert await read(world, 4, 2) == MEMORY | BUS_MASTER
        assert await read(world, 0x10, 4) == 0xFEB00000
        reply = await world.command("region-read", device="n0", region="bar0", offset=4, size=4)
        assert reply.value == 0xFFFFFFFF  # it was reset
        assert world.told(DeviceResetDone) == [DeviceResetDone(device="n0", method="device")]
        rig.irqs.set_line(True)
        assert bells[0].rung() == 1
        assert world.told(IrqModeChanged) == []

    play(scenario)


def test_messages_come_back_with_their_vectors_and_modes(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0", index="msi", vectors=[0, 2])
        await world.command("irq-start", device="n0", index="msi", vectors=[0], mode="relayed")
        modes = [(v.vector, v.mode) for v in (await world.irq("msi")).vectors]
        rig.irqs.message(0)
        await world.settle()
        await world.command("device-reset", id="n0")
        assert (
            [(v.vector, v.mode) for v in (await world.irq("msi")).vectors] == modes == [(0, "relayed"), (2, "direct")]
        )
        rig.irqs.message(0)
        await world.settle()
        assert (await world.irq("msi")).vectors[0].fired == 2

    play(scenario)


def test_a_pending_interrupt_ends_with_the_reset_and_a_mask_does_not(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()
        await world.command("irq-mask", device="n0", index="intx")
        await world.command("device-reset", id="n0")
        assert (await world.irq()).vectors[0].state == "masked"
        assert rig.irqs._masked
        await world.command("irq-unmask", device="n0", index="intx")
        assert (await world.irq()).vectors[0].state == "inactive"
        assert world.machine.device("n0").info().fast_path

    play(scenario)


def test_out_of_band_commands_answer_during_a_reset(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        gate = world.gate()
        rig.on_reset = gate.wait
        reset = asyncio.ensure_future(world.command("device-reset", id="n0"))
        await world.until(lambda: world.machine.device("n0").lane.current == "device-reset")
        rig.say()
        await world.command("irq-eoi", device="n0", index="intx", oob=True)
        await world.command("irq-mask", device="n0", index="intx", oob=True)
        assert (await world.irq()).vectors[0].state == "masked"
        assert rig.say() == []  # the kernel has no interrupt to be masked now
        [holder] = world.machine.device("n0").holders()
        assert (holder.kind, holder.detail) == ("operation", "device-reset")
        waits = asyncio.ensure_future(world.command("region-read", device="n0", region="bar0", offset=0, size=4))
        await world.settle()
        assert not waits.done()
        gate.set()
        await asyncio.gather(reset, waits)
        assert rig.irqs._masked

    play(scenario)


def test_a_reset_goes_on_when_its_caller_is_gone(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        gate = world.gate()
        rig.on_reset = gate.wait
        reset = asyncio.ensure_future(world.command("device-reset", id="n0"))
        await world.until(lambda: world.machine.device("n0").lane.busy)
        reset.cancel()
        gate.set()
        await world.until(lambda: world.told(DeviceResetDone) != [])
        assert rig.irqs.kind is not None

    play(scenario)


def test_a_device_without_reset_says_so(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(prepare=lambda rig: setattr(rig, "info", DeviceInfo(9, 5, reset=False)))
        rig.say()
        with pytest.raises(CommandError, match=r"Device 'n0' cannot be reset alone .*by hot-reset"):
            await world.command("device-reset", id="n0")
        assert rig.say() == []
        with pytest.raises(DeviceNotFound):
            await world.command("device-reset", id="zz")

    play(scenario)


def test_a_reset_that_fails_gives_interrupts_and_bus_mastering_back(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        [bell] = world.attached

        def refuse() -> None:
            raise OSError(errno.EAGAIN, "not now")

        rig.on_reset = refuse
        with pytest.raises(OperationFailed, match=r"VFIO_DEVICE_RESET.*EAGAIN"):
            await world.command("device-reset", id="n0")
        assert await read(world, 4, 2) == MEMORY | BUS_MASTER
        assert world.told(DeviceResetDone) == []
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


def test_a_device_that_does_not_answer_after_it_is_an_error_and_an_event(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        rig.on_reset = lambda: setattr(rig, "dead", True)
        with pytest.raises(OperationFailed, match="all ones after a reset"):
            await world.command("device-reset", id="n0")
        [event] = world.told(DeviceError)
        assert "all ones" in event.reason
        assert world.told(DeviceResetDone) == []
        rig.dead = False

    play(scenario)


def test_interrupts_that_cannot_be_set_up_again_are_an_error_and_events(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")

        def refuse(request: Any) -> None:
            raise OSError(errno.EIO, "no")

        rig.on_reset = lambda: setattr(rig, "fail_set_irqs", refuse)
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("device-reset", id="n0")
        assert world.machine.device("n0").info().irq_kind == "none"
        assert len(world.told(DeviceError)) == 1
        assert [event.kind for event in world.told(IrqModeChanged)] == ["none"]
        rig.fail_set_irqs = lambda request: None
        await world.command("irq-start", device="n0")

    play(scenario)


def test_interrupts_that_cannot_be_taken_down_leave_the_device_alone(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        reset: list[int] = []
        rig.on_reset = lambda: reset.append(1)
        refused = [True]

        def refuse(request: Any) -> None:
            if request.is_disable and refused.pop() if refused else False:
                raise OSError(errno.EIO, "no")

        rig.fail_set_irqs = refuse
        with pytest.raises(OperationFailed):
            await world.command("device-reset", id="n0")
        assert reset == []
        assert (await world.irq()).active
        assert not rig.irqs._masked

    play(scenario)


def test_a_device_that_is_forced_away_during_its_reset(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await prepared(world)
        await world.command("irq-start", device="n0")
        gate = world.gate()
        rig.on_reset = gate.wait
        reset = asyncio.ensure_future(world.command("device-reset", id="n0"))
        await world.until(lambda: world.machine.device("n0").lane.busy)
        await world.command("device_del", id="n0", force=True)
        await world.until(lambda: world.told(DeviceDeleted) != [])
        gate.set()
        with pytest.raises(DeviceNotActive, match="was removed"):
            await reset
        assert rig.irqs.kind is None

    play(scenario)


def test_system_reset_resets_all_that_can_be(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        await world.add("n1", prepare=lambda rig: setattr(rig, "info", DeviceInfo(9, 5, reset=False)))
        await world.add("n2", prepare=lambda rig: None)
        await world.command("system_reset")
        assert {event.device for event in world.told(DeviceResetDone)} == {"n0", "n2"}

    play(scenario)


def test_system_reset_names_those_that_failed_and_resets_the_others(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add("n0")
        await world.add("n1")

        def refuse() -> None:
            raise OSError(errno.EIO, "no")

        rig.on_reset = refuse
        with pytest.raises(CommandError, match=r"1 of 2 devices could not be reset, the others were: .*'n0'.*EIO"):
            await world.command("system_reset")
        assert [event.device for event in world.told(DeviceResetDone)] == ["n1"]

    play(scenario)
