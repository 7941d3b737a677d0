"""The picture of `vfiod watch`: what is in it, and what keys do to it."""

from __future__ import annotations

from typing import Any, get_origin

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.events import Event
from vfiod.client.line import members, plain_type
from vfiod.client.watch.draw import everything, screen, sparkline
from vfiod.client.watch.picture import Picture
from vfiod.client.watch.view import HELP, Pane, View, keys_of
from vfiod.protocol.catalogue.devices import DeviceAdded, MachineInfo
from vfiod.protocol.catalogue.exports import ExportInfo

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
        "mappings": [{"iova": 4096, "size": 1 << 30, "offset": 0, "readonly": True, "memory-backend": "ram"}],
    }  # fmt: skip
    return msgspec.convert(value | more, MachineInfo)


def picture_of(*counts: int | None) -> Picture:
    picture = Picture("/run/vm1.sock")
    for number, count in enumerate(counts):
        picture.update(machine(count), 100.0 + 2 * number)
    export = {"id": "e0", "type": "vfio-user", "device": "nic0", "state": "listening", "attached": 0, "path": "/p"}
    picture.exports = [msgspec.convert(export, ExportInfo)]
    return picture


def text(picture: Picture, view: View | None = None, width: int = 160, height: int = 40) -> str:
    return "\n".join(line.plain for line in screen([picture], view or View(), width, height))


def test_nothing_yet() -> None:
    assert "connecting" in text(Picture("vm1.sock"))
    assert "connecting" in everything(Picture("vm1.sock"), 80)[0].plain


@pytest.mark.parametrize(
    ("counts", "rate"),
    [([10, 40], 15.0), ([10, 10], 0.0), ([40, 10], None), ([None, 10], None), ([10, None], None), ([10], None)],
    ids=["rises", "rests", "started-anew", "became-relayed", "became-direct", "first"],
)
def test_rates(counts: list[int | None], rate: float | None) -> None:
    picture = picture_of(*counts)
    assert picture.rates.get(("nic0", 0, 0)) == rate
    shown = text(picture)
    assert "nic0 intx" in shown
    assert rate is None or f"{rate:.1f}" in shown


def test_peaks_and_history() -> None:
    picture = picture_of(0, 20, 100, 100)
    key = ("nic0", 0, 0)
    assert (list(picture.history[key]), picture.peaks[key]) == ([10.0, 40.0, 0.0], 40.0)
    assert picture.total() == [10.0, 40.0, 0.0]
    assert "▂█ " in text(picture)
    picture.reset_peaks()
    assert picture.peaks[key] == 0.0


def test_every_part_is_there() -> None:
    for shown in (text(picture_of(1)), "\n".join(line.plain for line in everything(picture_of(1), 120))):
        assert all(part in shown for part in ("Devices 0", "Interrupts 1", "DMA maps 1", "Exports 1", "Events 0"))
        assert "1 GiB" in shown and "0x1000" in shown
        assert "listening" in shown


def test_events_and_problems() -> None:
    picture = picture_of(1)
    picture.events.append(Event("DEVICE_ADDED", DeviceAdded(device="\x1b[2Jnic", path="/p"), 3, 0.0))
    picture.problem = "it has gone"
    shown = text(picture)
    assert "DEVICE_ADDED" in shown
    assert "it has gone" in shown
    assert "\x1b" not in shown


@given(
    st.integers(1, 200), st.integers(1, 60), st.sampled_from(Pane), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_any_terminal(
    width: int, height: int, pane: Pane, alone: bool, plain: bool, problem: bool, machines: int
) -> None:
    pictures = [picture_of(0, number, 90) for number in range(machines)]
    pictures[0].events.extend(Event("DEVICE_ADDED", DeviceAdded(device=f"d{n}", path="/p"), n, 0.0) for n in range(30))
    pictures[0].problem = "it has gone" * problem
    view = View(pane=pane, alone=alone, offsets={Pane.EVENTS: 7})
    lines = screen(pictures, view, width, height, plain=plain)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    assert not plain or all(line.plain.isascii() for line in lines)


def test_a_small_terminal_shows_the_selected_part() -> None:
    shown = text(picture_of(0, 20, 100), View(pane=Pane.INTERRUPTS), width=20, height=8)
    assert "nic0 intx" in shown
    assert "DMA" not in shown
    assert "DMA maps" in text(picture_of(1), View(pane=Pane.MEMORY), width=20, height=8)


def test_sparkline() -> None:
    assert sparkline([], 8) == ""
    assert sparkline([0, 1, 4, 8], 8) == " ▁▄█"
    assert sparkline(range(100), 3) == "███"
    assert sparkline([0, 0], 8) == "  "
    assert sparkline([0, 4, 8], 8, plain=True) == " =#"


def test_keys() -> None:
    assert list(keys_of(b"q\t\x1b[A\x1bOB\x1b[6~\x1b[Z?\xff")) == [
        "q", "right", "up", "down", "pgdn", "left", "?", "\xff",
    ]  # fmt: skip
    assert list(keys_of(b"\x1b")) == ["escape"]


@given(st.binary())
def test_any_keys(data: bytes) -> None:
    view = View()
    for key in keys_of(data):
        view.press(key, 2)
    assert 0 <= view.machine < 2
    assert len(screen([picture_of(1), picture_of(2)], view, 80, 24)) == 24


def test_what_keys_do() -> None:
    view = View()
    view.press("right", 1)
    assert view.pane is Pane.MEMORY
    view.press("left", 1)
    view.press("left", 1)
    view.press("left", 1)
    assert view.pane.value == "Events", "around, past the VMs, of which there is one"
    view.press("down", 1)
    assert view.offsets == {Pane.EVENTS: 1}
    for key, name in [("p", "paused"), ("t", "topology"), ("?", "help"), ("z", "alone"), ("r", "reset")]:
        view.press(key, 1)
        assert getattr(view, name), key
    assert not view.topology, "help lies over it"
    view.press("escape", 1)
    assert not (view.help or view.alone)
    view.press("n", 3)
    view.press("N", 3)
    view.press("N", 3)
    assert view.machine == 2
    view.pane = Pane.MACHINES
    view.press("up", 3)
    assert view.machine == 1
    view.press("q", 1)
    assert view.leaving


def test_help_and_topology_lie_over_it() -> None:
    picture = picture_of(1)
    assert all(does in text(picture, View(help=True)) for _, does in HELP)
    picture.topology = "vm1\n└─ nic0"
    assert "└─ nic0" in text(picture, View(topology=True))


def test_several_machines() -> None:
    pictures = [picture_of(0, 20), Picture("/run/vm2.sock", problem="ECONNREFUSED")]
    shown = "\n".join(line.plain for line in screen(pictures, View(machine=0), 120, 40))
    assert "VMs 2" in shown
    assert "> vm1" in shown
    assert "/run/vm2.sock" in shown and "lost" in shown
