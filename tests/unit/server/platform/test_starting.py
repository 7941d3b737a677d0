"""``irq-start``: the notification that the machine is complete, for one device or all; its numbers; ``irq-stop``.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest
from tests.unit.server.platform.conftest import Play

from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.errors import CommandError, DeviceNotActive, DeviceNotFound, InvalidArgument, OperationFailed


def table(irqs: list[Any]) -> list[tuple[Any, ...]]:
    return [(irq.device, irq.index, irq.number, irq.trigger is not None, irq.resample is not None) for irq in irqs]


def test_the_machine_is_complete(play: Play) -> None:
    async def scenario(world: Any) -> None:
        first = await world.add("p0", "le")
        second = await world.add("p1", "e", group=8)
        assert await world.states("p0") == "", "set up, not started"
        irqs = await world.start(first_number=32)
        assert table(irqs) == [
            ("p0", 0, 32, True, True),
            ("p0", 1, 33, True, False),
            ("p1", 0, 34, True, False),
        ]
        assert [irq.mode for irq in irqs] == ["direct"] * 3
        first.interrupt(0)
        second.interrupt(0)
        assert [irq.rung() for irq in irqs] == [1, 0, 1]
        first.lines[0].asserted = False
        irqs[0].resample.ring()
        assert not world.kernel.device("p0.dev").lines[0].masked

    play(scenario)


def test_again_is_harmless_and_gives_the_same(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        one = await world.start(first_number=32)
        calls = len(world.kernel.log)
        for more in ({}, {"first_number": 32}):
            two = await world.start(**more)
            assert table(two) == table(one)
        assert world.kernel.log[calls:] == [], "the kernel is told nothing"
        device.interrupt(1)
        assert two[1].rung() == 1
        assert one[1].rung() == 0, "the same eventfd"

    play(scenario)


def test_devices_added_later_start_at_once_with_following_numbers(play: Play) -> None:
    async def scenario(world: Any) -> None:
        assert await world.start(first_number=5) == [], "a machine may have none"
        await world.add("p0", "le")
        device = await world.add("p1", "e", group=8)
        assert [one.vectors[0].number for one in await world.irqs("p0")] == [5, 6]
        assert [one.vectors[0].number for one in await world.irqs("p1")] == [7]
        device.interrupt(0)
        [irq] = await world.start(device="p1")
        assert irq.number == 7
        assert irq.rung() == 1, "what came before somebody took the eventfd waits in it"
        await world.delete("p0")
        await world.add("p2", "e", group=7)
        assert [one.vectors[0].number for one in await world.irqs("p2")] == [8], "numbers are not used twice"

    play(scenario)


def test_irq_stop_undoes_it(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        await world.start(first_number=32)
        await world.command("irq-stop")
        assert await world.states() == ""
        assert [line.trigger for line in device.lines] == [None, None]
        assert [line.virqfd for line in device.lines] == [None, None]
        assert [event.kind for event in world.told(IrqModeChanged)] == ["none"]
        await world.command("irq-stop")
        await world.add("p1", "e", group=8)
        assert await world.states("p1") == "", "what is added now waits for the next irq-start"
        assert [irq.number for irq in await world.start(first_number=1)] == [1, 2, 3]

    play(scenario)


def test_one_index_is_stopped_and_started_alone(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "lee")
        await world.start(device="p0")
        await world.command("irq-stop", device="p0", index="irq1")
        assert [one.active for one in await world.irqs()] == [True, False, True]
        [again] = await world.start(device="p0", index="irq1")
        device.interrupt(1)
        assert again.rung() == 1

    play(scenario)


def test_routes_name_the_numbers(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "le")
        await world.add("p1", "e", group=8)
        irqs = await world.start(device="p0", routes=[{"index": 1, "number": 9}, {"index": "irq0", "number": 0}])
        assert [irq.number for irq in irqs] == [0, 9]
        irqs = await world.start(routes=[{"device": "p1", "index": 0, "number": 4}])
        assert [(irq.device, irq.number) for irq in irqs] == [("p0", 0), ("p0", 9), ("p1", 4)]

    play(scenario)


ROUTE = {"index": 0, "number": 3}
REFUSED = [
    ({"device": "p0", "routes": [{"index": 7, "number": 3}]}, "no interrupt index 7; it has irq0 to irq1"),
    ({"device": "p0", "routes": [{"index": -1, "number": 3}]}, "no interrupt index -1"),
    ({"device": "p0", "routes": [{"index": "intx", "number": 3}]}, "no interrupt index 'intx'"),
    ({"device": "p0", "routes": [ROUTE, ROUTE]}, "names irq0 of 'p0' twice"),
    ({"device": "p0", "routes": [ROUTE, {"index": 1, "number": 3}]}, "Interrupt number 3 .* is that of irq0"),
    ({"device": "p0", "routes": [{"index": 0, "vector": 1, "number": 3}]}, "there is no vector 1"),
    ({"device": "p0", "index": 1, "routes": [ROUTE]}, "irq0 of 'p0', which is not being started"),
    ({"device": "p0", "routes": [{"device": "p1", "index": 0, "number": 3}]}, "names device 'p1', but"),
    ({"device": "p0", "routes": [{"index": 0, "number": 77}]}, "Interrupt number 77 .* is that of irq0 of device 'p1'"),
    ({"device": "p0", "first_number": 76}, "Interrupt number 77 .* device 'p1'"),
    ({"device": "p0", "first_number": 1, "routes": [ROUTE]}, "exclude each other"),
    ({"device": "p0", "first_number": (1 << 32) - 1}, "a number has 32 bits"),
    ({"device": "p0", "vectors": [1]}, "has vector 0 only"),
    ({"device": "p0", "index": 0, "indexes": [1]}, "exclude each other"),
    ({"device": "p0", "indexes": [1, "irq1"]}, "names index 1 twice"),
    ({"device": "p0", "indexes": [4]}, "no interrupt index 4"),
    ({"routes": [ROUTE]}, "'device' is missing"),
    ({"routes": [{"device": "p9", "index": 0, "number": 3}]}, "'p9', which is no platform device here"),
    ({"routes": [{"device": "p0", "index": 5, "number": 3}]}, "no interrupt index 5"),
    ({"routes": [{"device": "p0", "index": 0, "number": 77}]}, "Interrupt number 77"),
    ({"index": 0}, "'device' is missing"),
    ({"eventfds": [{"trigger": "t"}]}, "'device' is missing"),
    ({"first_number": (1 << 32) - 1}, "a number has 32 bits"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(play: Play, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "le")
        await world.add("p1", "e", group=8)
        await world.start(device="p1", routes=[{"index": 0, "number": 77}])
        before = len(os.listdir("/proc/self/fd"))
        calls = len(world.kernel.log)
        with pytest.raises(InvalidArgument, match=words):
            await world.start(**arguments)
        assert await world.states("p0") == ""
        assert world.kernel.log[calls:] == []
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(await world.start()) == 3

    play(scenario)


def test_another_first_number_is_refused_while_numbers_are_in_use(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("p0", "le")
        await world.start(first_number=32)
        with pytest.raises(InvalidArgument, match="numbered from 32 already"):
            await world.start(first_number=64)
        await world.command("irq-stop")
        assert [irq.number for irq in await world.start(first_number=64)] == [64, 65]

    play(scenario)


def test_before_a_device_is_bound_it_is_an_error_and_the_notification_waits_for_it(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", "le")
        adding = asyncio.create_task(world.plug("p0"))
        await asyncio.sleep(0)
        with pytest.raises(DeviceNotActive, match="'p0' is realizing: it has no regions or interrupts now"):
            await world.start(device="p0")
        started = asyncio.create_task(world.start(first_number=3))
        await adding
        assert [irq.number for irq in await started] == [3, 4]
        with pytest.raises(DeviceNotFound):
            await world.start(device="p7")

    play(scenario)


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_start_that_fails_leaves_everything_as_it_was(play: Play, failing: int) -> None:
    async def scenario(world: Any) -> None:
        # Mask, trigger, resample, unmask of each of two levels. (A refused resample eventfd is no failure: see direct.)
        device = await world.add("p0", "ll")
        before = len(os.listdir("/proc/self/fd"))
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", *[0] * (failing - 1), errno.EIO)
        refused = False
        try:
            irqs = await world.start(first_number=1)
        except OperationFailed as error:
            assert error.errno == "EIO"
            refused = True
        assert refused is (failing not in (3, 7))
        if not refused:
            assert sorted(irq.mode for irq in irqs) == ["direct", "relayed"]
            return
        assert await world.states() == ""
        assert [(line.trigger, line.virqfd) for line in device.lines] == [(None, None)] * 2
        assert not device.lines[(failing - 1) // 4].masked, "the bracket is closed on failure too"
        assert len(os.listdir("/proc/self/fd")) == before
        await world.add("p1", "e", group=8)
        assert await world.states("p1") == "", "the machine is not complete"
        assert [irq.number for irq in await world.start(first_number=1)] == [1, 2, 3]
        assert not any(line.masked for line in device.lines)

    play(scenario)


def test_when_one_device_fails_the_others_are_stopped_again(play: Play) -> None:
    async def scenario(world: Any) -> None:
        first = await world.add("p0", "e")
        await world.add("p1", "e", group=8)
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", 0, errno.EIO)
        with pytest.raises(OperationFailed):
            await world.start(first_number=1)
        assert await world.states("p0") == ""
        assert first.lines[0].trigger is None
        assert [irq.number for irq in await world.start(first_number=1)] == [1, 2]

    play(scenario)


def test_a_later_device_that_cannot_be_started_is_not_added(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.start(first_number=1)
        world.host("p0", "e")
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", errno.EIO)
        with pytest.raises(OperationFailed):
            await world.plug("p0")
        assert await world.command("query-devices") == []
        await world.plug("p0")
        assert [one.vectors[0].number for one in await world.irqs()] == [1]

    play(scenario)


def test_a_call_carries_253_fds_and_more_are_started_by_ranges(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "e" * 256)
        for arguments in ({}, {"device": "p0"}):
            with pytest.raises(InvalidArgument, match=r"256 interrupts do not fit one reply, .* at most 253 fds"):
                await world.start(**arguments)
        irqs = await world.start(device="p0", indexes=list(range(253)), first_number=100)
        irqs += await world.start(device="p0", indexes=[253, 254, 255], first_number=353)
        every = await world.start(first_number=1000)
        assert [irq.number for irq in every] == list(range(100, 356)), "each keeps the number it has"
        assert not any(irq.trigger for irq in every), "only what a call starts comes with it, when all are too many"
        device.interrupt(255)
        assert irqs[255].rung() == 1

    play(scenario)


def test_a_reply_without_fds_starts_relayed_and_they_are_asked_for_later(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add("p0", "le")
        world.carries = False
        irqs = await world.start(first_number=1)
        assert table(irqs) == [("p0", 0, 1, False, False), ("p0", 1, 2, False, False)]
        assert {irq.mode for irq in irqs} == {"relayed"}, "nobody took the eventfds"
        with pytest.raises(InvalidArgument, match="this reply can carry no fds"):
            await world.start(device="p0")
        world.carries = True
        device.interrupt(1)
        await world.settle()
        irqs = await world.start(device="p0")
        assert irqs[1].rung() == 1

    play(scenario)


def test_a_pci_device_takes_no_indexes(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.machine.mdevs.create("primer", "primer-pci")
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
        for more in (
            {"indexes": [0]},
            {"eventfds": [{"index": 0, "trigger": "t"}]},
            {"routes": [{**ROUTE, "device": "n0"}]},
        ):
            with pytest.raises(InvalidArgument, match="is for platform devices"):
                await world.start(device="n0", **more)
        await world.add("p0", "e")
        assert [irq.device for irq in await world.start()] == ["p0"]
        with pytest.raises(CommandError, match="no interrupt index"):
            await world.start(device="n0", index="irq9")

    play(scenario)
