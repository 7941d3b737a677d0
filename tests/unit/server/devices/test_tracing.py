"""Every trace point of a device, while it lives a whole life: each writes what it should, and none breaks anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.server import trace

HERE = {
    "config_read",
    "config_write",
    "device_populated_irq",
    "device_populated_region",
    "direct_ended",
    "direct_started_edge",
    "direct_started_level",
    "fast_path_off",
    "fast_path_on",
    "irq_eoi",
    "irq_fired",
    "irq_mask",
    "irq_pending",
    "irq_spurious",
    "irq_unmask",
    "region_read",
    "region_write",
    "reset_begin",
    "reset_end",
    "route_moved",
    "timer_still_active",
    "vector_released",
    "vector_used",
}


@pytest.fixture(autouse=True)
def _everything_on() -> Iterator[None]:
    trace.switch("*", True)
    yield
    trace.switch("*", False)


def test_a_whole_life_traced(play: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(mmap_timeout_ms=1)
        # Relayed, completed by access; its timer finds it active once.
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)
        await world.settle()
        await world.until(lambda: "timer_still_active" in caplog.text)
        await world.command("irq-trigger", device="n0", index="intx")
        await world.settle()
        rig.irqs.set_line(False)
        await world.command("region-read", device="n0", region="bar0", offset=0, size=4)
        await world.until(lambda: "fast_path_on" in caplog.text)
        for command in ("irq-mask", "irq-unmask", "irq-eoi"):
            await world.command(command, device="n0", index="intx")
        # Direct, by another route.
        await world.command("irq-start", device="n0", mode="direct")
        await world.command("irq-route", device="n0", index="intx", number=5)
        # Messages, of which one comes too late.
        await world.command("irq-start", device="n0", index="msi", vectors=[0, 1])
        await world.command("irq-start", device="n0", index="msi", vectors=[0], mode="relayed")
        rig.irqs.message(0)
        await world.command("irq-stop", device="n0")
        for region in ("config", "bar2"):
            await world.command("region-write", device="n0", region=region, offset=0x3C, size=1, value=3)
            await world.command("region-read", device="n0", region=region, offset=0x3C, length=3)
        await world.command("device-reset", id="n0")
        await world.command("device_del", id="n0")
        await world.until(lambda: world.told(DeviceDeleted) != [])

    with caplog.at_level(logging.INFO, "vfiod.trace"):
        play(scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "vfiod.trace"]
    assert {line.split()[0] for line in lines} >= HERE
    for line in lines:
        if line.split()[0] in HERE:
            assert " device=n0" in line, line


def test_what_was_pending_behind_a_mask_is_traced_when_it_is_injected(
    play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")
        rig.irqs.set_line(True)  # in the eventfd already, and not heard yet
        await world.command("irq-mask", device="n0", index="intx", oob=True)
        await world.settle()
        assert (await world.irq()).delivered == 0
        assert "irq_pending_injected" not in caplog.text
        await world.command("irq-unmask", device="n0", index="intx")
        assert (await world.irq()).delivered == 1
        assert "irq_pending_injected device=n0 index=0" in caplog.text

    with caplog.at_level(logging.INFO, "vfiod.trace"):
        play(scenario)
