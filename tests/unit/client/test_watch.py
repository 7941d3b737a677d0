"""The picture of `vfiod watch`."""

from __future__ import annotations

from typing import Any, get_origin

import msgspec
import pytest
from rich.console import Console

from vfiod.client.events import Event
from vfiod.client.line import members, plain_type
from vfiod.client.watch import Picture, render
from vfiod.protocol.catalogue.devices import DeviceAdded, MachineInfo

LISTS = [name for name, hint in members(MachineInfo).items() if get_origin(plain_type(hint)) is list]


def machine(delivered: int | None, **more: Any) -> MachineInfo:
    flags = {"eventfd": True, "maskable": True, "automasked": True, "noresize": False}
    vector = {
        "vector": 0,
        "mode": "relayed",
        "state": "inactive",
        "fired": delivered,
        "delivered": delivered,
        "spurious": 0,
    }
    irq = {
        "device": "nic0", "index": 0, "name": "intx", "count": 1, "active": True, "flags": flags, "reserved": False,
        "vectors": [vector], "fired": delivered, "delivered": delivered, "spurious": 0,
    }  # fmt: skip
    empty: dict[str, Any] = {name: [] for name in LISTS}
    value = empty | {
        "seq": 7, "name": "vm1", "uuid": "-", "status": {"running": True, "status": "running"}, "irqs": [irq],
    }  # fmt: skip
    return msgspec.convert(value | more, MachineInfo)


def text(picture: Picture) -> str:
    console = Console(width=160, height=40, color_system=None)
    with console.capture() as capture:
        console.print(render(picture))
    return capture.get()


def test_nothing_yet() -> None:
    assert "connecting" in text(Picture())


@pytest.mark.parametrize(
    ("counts", "rate"),
    [([10, 40], 15.0), ([10, 10], 0.0), ([40, 10], None), ([None, 10], None), ([10, None], None), ([10], None)],
    ids=["rises", "rests", "started-anew", "became-relayed", "became-direct", "first"],
)
def test_rates(counts: list[int | None], rate: float | None) -> None:
    picture = Picture()
    for number, count in enumerate(counts):
        picture.update(machine(count), 100.0 + 2 * number)
    assert picture.rates.get(("nic0", 0, 0)) == rate
    shown = text(picture)
    assert "nic0 intx" in shown
    assert rate is None or f"{rate:.1f}" in shown


def test_events_and_problems() -> None:
    picture = Picture()
    picture.update(machine(1), 1.0)
    picture.events.append(Event("DEVICE_ADDED", DeviceAdded(device="\x1b[2Jnic", path="/p"), 3, 0.0))
    picture.problem = "it has gone"
    shown = text(picture)
    assert "DEVICE_ADDED" in shown
    assert "it has gone" in shown
    assert "\x1b" not in shown
