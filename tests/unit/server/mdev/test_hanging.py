"""Parents and devices that hang: others go on, whoever asked is told, later requests work, what came late is undone.

Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import asyncio
import errno
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.mdev.test_bus import OTHER, UUID, VM, Card, Maker, Stage, stage

from vfiod.protocol.catalogue.mediated import MdevStarted
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, InvalidArgument, OperationFailed
from vfiod.server.mdev.calls import Calls, CallThreads

SOON = 0.05
"""Seconds a call gets here: what hangs, hangs for ever, so it could be any."""

FAR = 60.0


class Gate:
    """Where a callback hangs until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.left = threading.Event()

    def __call__(self, *_: Any) -> None:
        self.entered.set()
        self.open.wait(FAR)
        self.left.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def run(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(play())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# --- the calls themselves ----------------------------------------------------------------------------------------


@pytest.fixture
def calls() -> Iterator[Calls]:
    threads = CallThreads()
    yield Calls("parent 'x'", threads, -1, limit_s=SOON)
    threads.close()


def test_what_returns_is_given_and_what_raises_is_named(calls: Calls) -> None:
    assert calls.run("read", "x", lambda: 7) == 7
    with pytest.raises(OperationFailed, match=r"read on x failed with EIO: it raised ZeroDivisionError"):
        calls.run("read", "x", lambda: 1 // 0)
    assert calls.hangs is None


def test_what_hangs_is_given_up_and_refused_until_it_returns(calls: Calls, gate: Gate) -> None:
    with pytest.raises(OperationFailed, match=r"it has not returned after 0\.05 s") as caught:
        calls.run("create", "x", gate)
    assert caught.value.errno == "ETIMEDOUT"
    assert calls.hangs is not None and calls.hangs.startswith("its 'create' has not returned")
    with pytest.raises(OperationFailed, match="its 'create' has not returned") as caught:
        calls.run("read", "x", lambda: 7)
    assert caught.value.errno == "EBUSY"
    gate.open.set()
    while calls.hangs:
        pass
    assert calls.run("read", "x", lambda: 7) == 7


def test_what_came_late_is_undone_and_what_is_owed_is_done_in_order(calls: Calls, gate: Gate) -> None:
    done: list[str] = []

    def opened() -> str:
        gate()
        return "made"

    def destroyed() -> None:
        done.append("destroy")
        raise ValueError("which keeps nobody from what comes next")

    with pytest.raises(OperationFailed):
        calls.run("open", "x", opened, late=lambda made: done.append(f"undo {made}"))
    calls.quietly("close", "x", lambda: done.append("close"))
    calls.quietly("destroy", "x", destroyed)
    calls.quietly("and more", "x", lambda: done.append("more"))
    assert done == []
    gate.open.set()
    while calls.hangs:
        pass
    assert done == ["undo made", "close", "destroy", "more"]


def test_a_late_failure_needs_no_undoing(calls: Calls, gate: Gate) -> None:
    undone: list[object] = []

    def opened() -> None:
        gate()
        raise OSError(errno.EIO, "no")

    with pytest.raises(OperationFailed, match="ETIMEDOUT"):
        calls.run("open", "x", opened, late=undone.append)
    gate.open.set()
    while calls.hangs:
        pass
    assert undone == []


def test_on_the_loops_thread_the_limit_is_shorter(gate: Gate) -> None:
    threads = CallThreads()
    calls = Calls("x", threads, threading.get_ident(), limit_s=FAR, loop_limit_s=SOON)
    with pytest.raises(OperationFailed, match=r"after 0\.05 s"):
        calls.run("set_irqs", "x", gate)
    gate.open.set()
    while calls.hangs:
        pass
    threads.close()


def test_a_quick_one_is_called_where_it_is() -> None:
    calls = Calls("x", None, threading.get_ident())
    assert calls.run("read", "x", threading.get_ident) == threading.get_ident()
    assert not calls.waits


def test_threads_are_kept_few_and_end() -> None:
    def ours() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "vfiod-mdev" and one not in before]

    before = threading.enumerate()
    threads, gates = CallThreads(), [Gate() for _ in range(12)]
    for gate in gates:
        threads.submit(gate)
    for gate in gates:
        gate.entered.wait(FAR)
    assert len(ours()) == 12
    for gate in gates:
        gate.open.set()
    while len(ours()) > 4:
        pass
    assert all(one.daemon for one in ours()), "none keeps vfiod alive"
    threads.close()
    while ours():
        pass


# --- on the bus ---------------------------------------------------------------------------------------------------


def test_a_create_that_hangs(gate: Gate) -> None:
    slow = Maker("slow", create=gate)

    async def play() -> None:
        async with stage(slow, Maker("sound"), call_limit_s=SOON) as s:
            with pytest.raises(OperationFailed, match=r"create on mdev parent 'slow'.*ETIMEDOUT"):
                await s.bus.create("slow", "card", UUID)
            assert s.bus.uuids() == []
            await s.bus.create("sound", "card", OTHER)
            with pytest.raises(OperationFailed, match="its 'create' has not returned"):
                await s.bus.create("slow", "card", UUID)
            told = {one.parent: one for one in await s.bus.ask()}
            assert "has not returned" in told["slow"].parent_attributes["error"]
            assert told["sound"].available_instances == 1
            gate.open.set()
            await until(lambda: ("destroy", UUID, True) in slow.calls)
            await until(lambda: s.bus._parents["slow"].calls.hangs is None)
            await s.bus.create("slow", "card", UUID)
            assert s.bus.uuids() == sorted([UUID, OTHER])

    run(play)


def test_a_destroy_that_hangs(gate: Gate) -> None:
    slow = Maker("slow", destroy=gate)

    async def play() -> None:
        async with stage(slow, Maker("sound"), call_limit_s=SOON) as s:
            await s.bus.create("slow", "card", UUID)
            await s.bus.create("sound", "card", OTHER)
            with pytest.raises(OperationFailed, match="ETIMEDOUT"):
                await s.bus.destroy(UUID)
            assert s.bus.uuids() == sorted([UUID, OTHER]), "it is as it was, as far as anybody knows"
            await s.bus.destroy(OTHER)
            gate.open.set()
            await until(lambda: s.bus._parents["slow"].calls.hangs is None)
            await s.bus.destroy(UUID)

    run(play)


def test_a_start_that_hangs_is_unwound_for_all_and_shut_down_when_it_returns(gate: Gate) -> None:
    first, slow = Maker("a-first"), Maker("slow", start=gate)

    async def play() -> None:
        async with stage(first, slow, call_limit_s=SOON) as s:
            await s.bus.create("a-first", "card", UUID)
            await s.bus.create("slow", "card", OTHER)
            with pytest.raises(OperationFailed, match=r"start on mdev parent 'slow' for VM .*ETIMEDOUT"):
                await s.bus.start(VM)
            assert [call[0] for call in first.calls] == ["create", "start", "shutdown"]
            assert not any(isinstance(event, MdevStarted) for event in s.events)
            with pytest.raises(DeviceNotActive):
                await s.bus.shutdown(VM)
            gate.open.set()
            await until(lambda: ("shutdown", VM, [OTHER]) in slow.calls)
            await until(lambda: s.bus._parents["slow"].calls.hangs is None)
            await s.bus.start(VM)
            await s.bus.shutdown(VM)

    run(play)


def test_a_parent_that_hangs_can_be_unregistered(gate: Gate) -> None:
    slow = Maker("slow", create=lambda uuid, _: gate() if uuid == OTHER else None)

    async def play() -> None:
        async with stage(slow, call_limit_s=SOON) as s:
            await s.bus.create("slow", "card", UUID)
            with pytest.raises(OperationFailed):
                await s.bus.create("slow", "card", OTHER)
            await s.bus.unregister("slow", patience=0)
            assert s.bus.uuids() == []
            assert ("destroy", UUID, True) not in slow.calls
            gate.open.set()
            await until(lambda: ("destroy", UUID, True) in slow.calls)
            assert ("destroy", OTHER, True) in slow.calls

    run(play)


def test_a_device_that_hangs_is_not_destroyed_but_by_force(gate: Gate) -> None:
    class Sticky(Card):
        def reset(self) -> None:
            gate()

    parent = Maker(create=lambda *_: Sticky())

    async def play() -> None:
        async with stage(parent, call_limit_s=SOON) as s:
            await s.bus.create("maker", "card", UUID)
            instance = s.bus.look(UUID)
            with pytest.raises(OperationFailed, match="ETIMEDOUT"):
                instance.call("reset", instance.device.reset)
            with pytest.raises(Busy, match=r"cannot be destroyed: its 'reset' has not returned"):
                await s.bus.destroy(UUID)
            await s.bus.create("maker", "card", OTHER)
            await s.bus.unregister("maker", patience=0)
            assert ("destroy", OTHER, True) in parent.calls
            assert ("destroy", UUID, True) not in parent.calls
            gate.open.set()
            await until(lambda: ("destroy", UUID, True) in parent.calls)

    run(play)


def test_attributes_that_hang_are_published_as_that(gate: Gate) -> None:
    class Silent(Maker):
        def attributes(self) -> dict[str, str]:
            gate()
            return {}

    async def play() -> None:
        async with stage(Silent("silent"), Maker("sound")) as s:
            told = {one.parent: one for one in await s.bus.ask()}
            assert "ETIMEDOUT" in told["silent"].parent_attributes["error"]
            assert told["sound"].available_instances == 2
            gate.open.set()
            await until(lambda: s.bus._parents["silent"].calls.hangs is None)
            assert {one.parent: one for one in await s.bus.ask()}["silent"].parent_attributes == {}

    run(play)


# --- finding them ---------------------------------------------------------------------------------------------------


PARENT = """
from vfiod.server.mdev.samples.pci import Primer
class Cards(Primer):
    name = {name!r}
"""


def distribution(directory: Path, name: str, points: dict[str, str], **modules: str) -> None:
    """What an installed package leaves on the path."""
    made = directory / f"{name}-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{point} = {where}\n" for point, where in points.items())
    (made / "entry_points.txt").write_text(f"[vfiod.mdev_parents]\n{lines}")
    for module, text in modules.items():
        (directory / f"{module}.py").write_text(text)


def test_a_broken_entry_point_is_named_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = {
        "sound": "h7_sound:Cards",
        "gone": "h7_no_such_module:Cards",
        "nameless": "h7_sound:Nothing",
        "exits": "h7_exits:Cards",
        "hangs": "h7_hangs:Cards",
        "twice": "h7_sound:Cards",
        "wrong": "builtins:dict",
    }
    distribution(
        tmp_path, "h7-cards", points,
        h7_sound=PARENT.format(name="sound"), h7_exits="raise SystemExit(3)",
        h7_hangs="import threading; threading.Event().wait(60)",
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))

    async def play() -> None:
        built_in = {"primer": "vfiod.server.mdev.samples.pci:Primer"}
        async with stage(built_in=built_in, entry_points="vfiod.mdev_parents", call_limit_s=1) as s:
            await s.bus.create("primer", "primer-pci", UUID)  # what comes with vfiod waits for nothing
            for name, words in (
                ("gone", "ModuleNotFoundError"),
                ("nameless", "AttributeError"),
                ("exits", "SystemExit"),
                ("hangs", "has not returned"),
                ("wrong", "dict"),
                ("nobody", r"there is primer.*'gone' could not be loaded"),
            ):
                with pytest.raises(InvalidArgument, match=rf"'{name}' not found.*{words}"):
                    await s.bus.create(name, "card")
            assert [one.parent for one in await s.bus.ask()] == ["primer", "sound"]
            await s.bus.create("sound", "primer-pci", OTHER)

    run(play)
    assert "entry point 'gone' of h7-cards (h7_no_such_module:Cards)" in caplog.text
    assert "h7_sound" in sys.modules


def test_a_type_is_found_by_its_name() -> None:
    async def play() -> None:
        async with stage(Maker(), Maker("second"), built_in={"primer": "vfiod.server.mdev.samples.pci:Primer"}) as s:
            assert (await s.bus.find_type("primer-pci"))[0] == "primer"
            parent, found = await s.bus.find_type("second/card")
            assert (parent, found.id) == ("second", "card")
            with pytest.raises(InvalidArgument, match=r"name one of maker/card, second/card"):
                await s.bus.find_type("card")
            for name in ("none", "primer/card", "/", ""):
                with pytest.raises(InvalidArgument, match=r"not found; there is maker, second, primer"):
                    await s.bus.find_type(name)

    run(play)


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    async def play() -> None:
        with ThreadPoolExecutor(1) as executor:
            s = Stage(executor, built_in={"x": "h7_never_imported:X"}, entry_points="vfiod.mdev_parents")
            with pytest.raises(CommandError):
                await s.bus.destroy(UUID)
            assert s.bus.types() == []
            assert not s.bus._discovery.broken
            await s.bus.close()

    run(play)
