"""Section 7, direct mode: the kernel signals the hypervisor and vfiod sleeps; when it cannot be, relayed and said."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest
from tests.unit.server.platform.conftest import Play

from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor


def test_the_callers_eventfds_are_the_kernels(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        level, resample, edge = (world.bell(name) for name in "tre")
        eventfds = [{"index": 0, "trigger": "t", "resample": "r"}, {"index": "irq1", "trigger": "e"}]
        irqs = await world.start(device="p0", eventfds=eventfds)
        assert [(irq.mode, irq.trigger, irq.resample) for irq in irqs] == [("direct", None, None)] * 2
        assert [world.names.look(name) for name in "tre"] == [None] * 3, "used up"
        for _ in range(3):
            device.interrupt(0)
            device.interrupt(1)
            assert (level.rung(), edge.rung()) == (1, 1)
            device.lines[0].asserted = False
            resample.ring()
            device.poll()
        [one, two] = [info.vectors[0] for info in await world.irqs()]
        assert (one.state, one.fired, two.fired) == ("direct", None, None), "vfiod does not see them"

    play(scenario)


def test_setting_up_is_bracketed_by_mask_and_unmask(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        said: list[tuple[int, str]] = []
        do = device.set_irqs

        def say(request: Any) -> Any:
            said.append((request.index, request.describe()))
            return do(request)

        device.set_irqs = say
        await world.start(device="p0")
        assert said == [
            (0, "MASK of 0"),
            (0, "TRIGGER of 0 by EVENTFD"),
            (0, "UNMASK of 0 by EVENTFD"),
            (0, "UNMASK of 0"),
            (1, "TRIGGER of 0 by EVENTFD"),
        ]
        said.clear()
        await world.command("irq-stop", device="p0")
        assert said == [(0, "MASK of 0"), (0, "UNMASK of 0 by EVENTFD"), (0, "disable"), (1, "disable")]

    play(scenario)


@pytest.mark.parametrize("brought", [False, True])
def test_what_cannot_be_direct_is_relayed_and_says_so(play: Play, brought: bool) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "l")
        more: dict[str, Any] = {}
        if brought:
            trigger, resample = world.bell("t"), world.bell("r")
            more = {"index": 0, "eventfds": [{"trigger": "t", "resample": "r"}]}
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", 0, 0, errno.ENOTTY)
        [irq] = await world.start(device="p0", **more)
        assert irq.mode == "relayed"
        [event] = world.told(IrqModeChanged)
        assert (event.device, event.kind, event.index, event.mode) == ("p0", "platform", 0, "relayed")
        assert "could not be set up" in event.reason
        assert "ENOTTY" in event.reason
        device.interrupt(0)
        await world.settle()
        device.lines[0].asserted = False
        if brought:
            assert trigger.rung() == 1
            resample.ring()
            await world.settle()
        else:
            assert irq.resample is None
            assert irq.rung() == 1
            await world.access()
        assert await world.states() == "inactive"
        assert not device.lines[0].masked

    play(scenario)


def test_x_irqfd_false_relays_everything(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "le", x_irqfd=False)
        irqs = await world.start(device="p0")
        assert [(irq.mode, irq.resample) for irq in irqs] == [("relayed", None)] * 2
        with pytest.raises(InvalidArgument, match="x-irqfd=false"):
            await world.start(device="p0", mode="direct")

    play(scenario)


def test_from_direct_to_relayed_and_back_keeps_the_eventfds(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        [level, edge] = await world.start(device="p0")
        assert edge.mode == "direct"
        for mode in ("relayed", "direct", "relayed"):
            changed = await world.start(device="p0", mode=mode)
            assert {irq.mode for irq in changed} == {mode}
            device.interrupt(0)
            device.interrupt(1)
            for _ in range(3):
                await world.settle()
                device.lines[0].asserted = False
                if mode == "relayed":
                    await world.access()
            assert (level.rung(), edge.rung()) == (1, 1)
            if mode == "direct":
                changed[0].resample.ring()
                device.poll()

    play(scenario)


def test_an_edge_that_waits_is_not_lost_when_the_mode_changes(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "ee")
        [one, two] = await world.start(device="p0", mode="relayed")
        device.interrupt(0)
        await world.settle()
        device.interrupt(1)
        await world.settle()
        assert await world.states() == "active pending"
        await world.start(device="p0", index=1, mode="direct")
        assert (one.rung(), two.rung()) == (1, 1)
        device.interrupt(0)  # in its eventfd when it changes, unread
        await world.start(device="p0", index=0, mode="direct")
        assert one.rung() == 1

    play(scenario)


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_change_that_fails_keeps_the_old_mode(play: Play, failing: int) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "l")
        [irq] = await world.start(device="p0")
        before = len(os.listdir("/proc/self/fd"))
        # Mask, resample taken back, trigger, unmask.
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", *[0] * (failing - 1), errno.EIO)
        if failing == 5:
            await world.start(device="p0", mode="relayed")
            world.kernel._failures.clear()
            return
        with pytest.raises(OperationFailed, match="EIO"):
            await world.start(device="p0", mode="relayed")
        assert len(os.listdir("/proc/self/fd")) == before
        assert (await world.irqs())[0].vectors[0].mode == "direct"
        device.interrupt(0)
        assert irq.rung() == 1
        device.lines[0].asserted = False
        irq.resample.ring()
        assert not world.kernel.device("p0.dev").lines[0].masked

    play(scenario)


def test_when_the_way_back_fails_too_it_is_stopped_and_said(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "e")
        await world.start(device="p0")
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", errno.EIO, errno.EIO)
        with pytest.raises(CommandError, match="it is stopped now, irq-start it again"):
            await world.start(device="p0", mode="relayed")
        assert await world.states() == ""
        assert device.lines[0].trigger is None
        [irq] = await world.start(device="p0")
        device.interrupt(0)
        assert irq.rung() == 1

    play(scenario)


def test_trigger_mask_unmask_and_eoi_by_index(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        with pytest.raises(InvalidArgument, match="irq-start it first"):
            await world.command("irq-trigger", device="p0", index=0)
        [level, edge] = await world.start(device="p0")
        for index, irq in ((0, level), ("irq1", edge)):
            await world.command("irq-trigger", device="p0", index=index)
            assert irq.rung() == 1
        assert device.lines[0].masked
        await world.command("irq-eoi", oob=True, device="p0", index=0)
        assert not device.lines[0].masked
        await world.command("irq-mask", oob=True, device="p0", index=0)
        device.interrupt(0)
        assert level.rung() == 0
        assert await world.states() == "masked direct"
        await world.command("irq-eoi", device="p0", index=0)
        assert device.lines[0].masked, "the user's mask is not the EOI's to take"
        await world.command("irq-unmask", device="p0", index=0)
        assert level.rung() == 1
        with pytest.raises(InvalidArgument, match="not MASKABLE"):
            await world.command("irq-mask", device="p0", index=1)
        with pytest.raises(InvalidArgument, match="there is no vector 1"):
            await world.command("irq-trigger", device="p0", index=0, vector=1)

    play(scenario)


def test_a_new_route_sets_the_direct_mode_up_again_and_no_route_ends_it(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "l")
        [irq] = await world.start(device="p0", first_number=4)
        device.lines[0].masked = True  # an EOI was missed
        await world.command("irq-route", device="p0", index=0, number=5)
        assert not device.lines[0].masked
        calls = len(world.kernel.log)
        await world.command("irq-route", device="p0", index=0, number=5)
        assert world.kernel.log[calls:] == [], "an unchanged route does nothing"
        await world.command("irq-route", device="p0", index=0)
        assert (await world.irqs())[0].vectors[0].mode == "relayed"
        await world.command("irq-route", device="p0", index=0, number=6)
        assert (await world.irqs())[0].vectors[0].mode == "direct"
        assert [event.mode for event in world.told(IrqModeChanged)] == ["relayed", "direct"]
        device.interrupt(0)
        assert irq.rung() == 1

    play(scenario)


def test_interrupts_work_after_a_reset(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "lee")
        irqs = await world.start(device="p0", indexes=[0, 1])
        irqs += await world.start(device="p0", index=2, mode="relayed")
        device.interrupt(0)
        assert irqs[0].rung() == 1
        await world.command("device-reset", id="p0")
        assert device.resets == 1
        for index, irq in enumerate(irqs):
            device.interrupt(index)
            await world.settle()
            assert irq.rung() == 1, index

    play(scenario)


# --- bad input --------------------------------------------------------------------------------------


def test_a_resample_eventfd_is_for_a_level(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "le")
        world.bell("t")
        world.bell("r")
        with pytest.raises(InvalidArgument, match="is edge triggered: a resample eventfd"):
            await world.start(device="p0", index=1, eventfds=[{"trigger": "t", "resample": "r"}])
        assert await world.states() == ""
        assert world.names.look("t") is not None, "what failed uses no name up"

    play(scenario)


@pytest.mark.parametrize("role", ["trigger", "resample"])
def test_an_eventfd_that_is_none(play: Play, role: str) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "l")
        world.bell("t")
        world.bell("r")
        world.names.receive([FileDescriptor(os.memfd_create("x", os.MFD_CLOEXEC))])
        world.names.name("x")
        entry = {"trigger": "t", "resample": "r", role: "x"}
        with pytest.raises(InvalidArgument, match=rf"eventfds\[0\]\.{role}"):
            await world.start(device="p0", index=0, eventfds=[entry])
        assert await world.states() == ""

    play(scenario)


@pytest.mark.parametrize(
    ("eventfds", "words"),
    [
        ([{"trigger": "t"}], "'index' is missing"),
        ([{"index": 0, "trigger": "t"}, {"index": "irq0", "trigger": "u"}], "names index 0 twice"),
        ([{"index": 0, "trigger": "t"}, {"index": 1, "trigger": "t"}], "names fd 't' twice"),
        ([{"index": 0, "vector": 1, "trigger": "t"}], "a platform interrupt has vector 0"),
        ([{"index": 9, "trigger": "t"}], "no interrupt index 9"),
        ([{"index": 0, "trigger": "nothing"}], "nothing"),
    ],
)
def test_eventfds_that_name_nothing_or_twice(play: Play, eventfds: list[Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "ee")
        world.bell("t")
        world.bell("u")
        with pytest.raises(CommandError, match=words):
            await world.start(device="p0", eventfds=eventfds)
        assert await world.states() == ""

    play(scenario)


def test_it_is_removed_with_one_active_and_others_pending(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "lel", mmap_timeout_ms=5)
        irqs = await world.start(device="p0", mode="relayed")
        for index in range(3):
            device.interrupt(index)
        await world.settle()
        assert sorted((await world.states()).split()) == ["active", "pending", "pending"]
        rung = sum(irq.rung() for irq in irqs)
        gone = await world.delete(force=True)
        assert gone.released
        assert (rung, sum(irq.rung() for irq in irqs)) == (1, 0), "who waited is not delivered as it goes"
        await asyncio.sleep(0.03)  # its timer would have fired: the fixture fails on what the loop has to say
        assert world.kernel.nothing_is_open()

    play(scenario)
