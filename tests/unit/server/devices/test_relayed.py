"""Relayed interrupts: what comes in goes out, is counted, told, and completed in each of the three ways.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import Irq, IrqModeChanged, IrqStorm
from vfiod.protocol.catalogue.regions import RegionMmapChanged
from vfiod.protocol.catalogue.words import IrqKind
from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.vfio import IrqAction
from vfiod.server.devices.vectors import STORM_PER_SECOND, StormMeter


def test_an_intx_goes_through_and_is_completed_by_irq_eoi(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        bell = world.bell("t")
        reply = await world.command("irq-start", device="n0", eventfds=[{"vector": 0, "trigger": "t"}])
        assert [(one.index, one.vector, one.mode, one.trigger_fd) for one in reply.irqs] == [
            (0, 0, "relayed", reply.irqs[0].trigger_fd)
        ]
        assert world.attached == []
        assert world.names.look("t") is None
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1
        assert world.told(Irq) == [Irq(device="n0", index=0, vector=0, fired=1, delivered=1)]
        info = await world.irq()
        assert info.active
        assert [(v.state, v.fired, v.delivered) for v in info.vectors] == [("pending", 1, 1)]
        # Still asserted: the EOI unmasks, and it fires again at once.
        await world.command("irq-eoi", device="n0", index="intx", oob=True)
        await world.settle()
        assert bell.rung() == 1
        rig.irqs.set_line(False)
        await world.command("irq-eoi", device="n0", index=0)
        await world.settle()
        assert bell.rung() == 0
        info = await world.irq()
        assert [(v.state, v.fired, v.delivered) for v in info.vectors] == [("inactive", 2, 2)]
        assert (info.fired, info.delivered, info.spurious) == (2, 2, 0)

    play(scenario)


def test_an_eoi_with_nothing_pending_tells_the_kernel_nothing(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-eoi", device="n0", index="intx")  # not even started
        await world.command("irq-start", device="n0")
        rig.say()
        await world.command("irq-eoi", device="n0", index="intx")
        assert rig.say() == []

    play(scenario)


def test_a_trigger_eventfd_is_made_and_handed_back_when_none_was_brought(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        reply = await world.command("irq-start", device="n0")
        assert (reply.irqs[0].mode, reply.irqs[0].trigger_fd) == ("relayed", 0)
        [bell] = world.attached
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


def test_the_first_bar_access_is_the_eoi_and_the_fast_path_comes_back(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(mmap_timeout_ms=1)
        await world.command("irq-start", device="n0")
        assert (await world.region("bar2")).mapped
        rig.irqs.set_line(True)
        await world.settle()
        rig.irqs.set_line(False)
        bar2 = await world.region("bar2")
        assert not bar2.mapped
        assert "pending" in bar2.note
        assert world.told(RegionMmapChanged) == [RegionMmapChanged(device="n0", enabled=False)]
        # Configuration space completes nothing; a BAR does.
        await world.command("region-read", device="n0", region="config", offset=0, size=4)
        assert (await world.irq()).vectors[0].state == "pending"
        await world.command("region-read", device="n0", region="bar2", offset=0, size=4)
        assert (await world.irq()).vectors[0].state == "inactive"
        assert not rig.irqs._masked
        await world.until(lambda: world.told(RegionMmapChanged)[-1].enabled)
        assert (await world.region("bar2")).mapped

    play(scenario)


def test_the_timer_finds_the_interrupt_still_active_and_waits_on(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(mmap_timeout_ms=1)
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()
        timer = world.machine.device("n0").interrupts._relay
        for _ in range(3):  # each time it fires it is armed anew
            former = timer._timer
            await world.until(lambda former=former: timer._timer is not former)
        assert not world.machine.device("n0").info().fast_path
        rig.irqs.set_line(False)
        await world.command("irq-eoi", device="n0", index="intx")
        await world.until(lambda: world.machine.device("n0").info().fast_path)

    play(scenario)


def test_a_timer_of_zero_leaves_the_fast_path_off_until_the_interrupt_is_stopped(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(mmap_timeout_ms=0)
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()
        rig.irqs.set_line(False)
        await world.command("region-read", device="n0", region="bar0", offset=0, size=4)
        assert not world.machine.device("n0").info().fast_path
        await world.command("irq-stop", device="n0")
        assert world.machine.device("n0").info().fast_path

    play(scenario)


def test_accesses_complete_nothing_once_a_region_is_mapped_outside(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()
        await world.command("region-map", device="n0", region="bar2")
        await world.command("region-read", device="n0", region="bar0", offset=0, size=4)
        assert (await world.irq()).vectors[0].state == "pending"
        # Nor for one that is started afterwards.
        await world.command("irq-stop", device="n0")
        await world.command("irq-start", device="n0")
        await world.settle()
        await world.command("region-read", device="n0", region="bar0", offset=0, size=4)
        assert (await world.irq()).vectors[0].state == "pending"
        rig.irqs.set_line(False)
        await world.command("irq-eoi", device="n0", index="intx")
        assert (await world.irq()).vectors[0].state == "inactive"

    play(scenario)


def test_a_resample_eventfd_completes_in_the_relayed_mode_too(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        trigger, resample = world.bell("t"), world.bell("r", flags=0)
        entry = {"vector": 0, "trigger": "t", "resample": "r"}
        await world.command("irq-start", device="n0", eventfds=[entry], mode="relayed")
        rig.irqs.set_line(True)
        await world.settle()
        assert trigger.rung() == 1
        assert world.machine.device("n0").info().fast_path  # no access needs to be seen
        rig.irqs.set_line(False)
        resample.ring()
        await world.settle()
        assert (await world.irq()).vectors[0].state == "inactive"
        assert not rig.irqs._masked

    play(scenario)


def test_an_eventfd_counter_above_one_counts_that_many(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        bell = world.bell("t")
        await world.command(
            "irq-start", device="n0", index="msi", mode="relayed", eventfds=[{"vector": 0, "trigger": "t"}]
        )
        for _ in range(3):
            rig.irqs.message(0)
        await world.settle()
        assert bell.rung() == 3
        assert ((await world.irq("msi")).fired, (await world.irq("msi")).delivered) == (3, 3)

    play(scenario)


def test_a_consumer_that_never_reads_does_not_stop_the_loop(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        bell = world.bell("t", flags=0)  # blocking
        await world.command(
            "irq-start", device="n0", index="msi", mode="relayed", eventfds=[{"vector": 0, "trigger": "t"}]
        )
        bell.ring(2**64 - 2)  # full: one more would block
        # Should it block after all, this lets it go on, and the counter below tells.
        rescue = threading.Timer(20, os.eventfd_read, (bell.number,))
        rescue.start()
        rig.irqs.message(0)
        await world.settle()
        rescue.cancel()
        assert (await world.irq("msi")).fired == 1
        assert os.eventfd_read(bell.number) == 2**64 - 2

    play(scenario)


def test_masking_keeps_what_arrives_until_it_is_unmasked(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        bell = world.bell("t")
        await world.command("irq-start", device="n0", eventfds=[{"vector": 0, "trigger": "t"}])
        rig.say()
        await world.command("irq-mask", device="n0", index="intx", oob=True)
        assert rig.say() == ["intx mask none"]
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 0
        assert (await world.irq()).vectors[0].state == "masked"
        await world.command("irq-unmask", device="n0", index="intx")
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


def test_trigger_is_a_loopback_through_the_kernel(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        bells = [world.bell("a"), world.bell("b")]
        entries = [{"vector": 0, "trigger": "a"}, {"vector": 2, "trigger": "b"}]
        await world.command("irq-start", device="n0", index="msi", eventfds=entries)
        rig.log.clear()
        await world.command("irq-trigger", device="n0", index="msi", vector=2)
        [request] = rig.log
        assert (request.action, request.start, request.count, request.data.name) == (IrqAction.TRIGGER, 2, 1, "NONE")
        assert [bell.rung() for bell in bells] == [0, 1]
        with pytest.raises(InvalidArgument, match="vector 1 of msi of device 'n0': it has no trigger; irq-start it"):
            await world.command("irq-trigger", device="n0", index="msi", vector=1)
        with pytest.raises(InvalidArgument, match="Cannot trigger vector 0 of intx"):
            await world.command("irq-trigger", device="n0", index="intx")

    play(scenario)


def test_what_still_arrives_when_it_is_stopped_is_spurious(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0", index="msi", mode="relayed")
        rig.irqs.message(0)
        await world.command("irq-stop", device="n0", index="msi")
        info = await world.irq("msi")
        assert (info.fired, info.delivered, info.spurious, info.vectors) == (0, 0, 1, [])
        assert world.told(IrqModeChanged) == [IrqModeChanged(device="n0", kind=IrqKind.NONE, reason="irq-stop")]
        assert world.attached == []

    play(scenario)


def test_a_storm_is_told_once_per_second() -> None:
    meter = StormMeter()
    assert meter.note(STORM_PER_SECOND, 10.0) is None
    assert meter.note(1, 10.5) == STORM_PER_SECOND + 1
    assert meter.note(STORM_PER_SECOND, 10.9) is None
    assert meter.note(STORM_PER_SECOND, 11.0) is None
    assert meter.note(2, 11.1) == STORM_PER_SECOND + 2


def test_a_storm_becomes_an_event(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0", index="msi", mode="relayed")
        assert rig is not None
        [name_fd] = [fd for fd in world.machine.device("n0").fds() if fd.name == "msi0 relay"]
        os.eventfd_write(name_fd.number, STORM_PER_SECOND + 7)
        await world.settle()
        expected = IrqStorm(device="n0", index=1, vector=0, per_second=STORM_PER_SECOND + 7)
        assert world.told(IrqStorm) == [expected]

    play(scenario)


def test_an_eoi_that_the_kernel_refuses_leaves_the_line_pending(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()

        def refuse(request: Any) -> None:
            raise OSError(5, "no")

        rig.fail_set_irqs = refuse
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("irq-eoi", device="n0", index="intx")
        assert (await world.irq()).vectors[0].state == "pending"
        # By an access nobody asked for a reply: it becomes an event, and the access succeeds.
        await world.command("region-read", device="n0", region="bar0", offset=0, size=4)
        assert "EIO" in world.told(DeviceError)[0].reason
        rig.fail_set_irqs = lambda request: None
        rig.irqs.set_line(False)
        await world.command("irq-eoi", device="n0", index="intx")
        assert (await world.irq()).vectors[0].state == "inactive"

    play(scenario)
