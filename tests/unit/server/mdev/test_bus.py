"""Parents and the lives of their devices: behaviour section 8."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.mediated import DeviceApi, MdevRemoved, MdevStarted, MdevStopped
from vfiod.protocol.errors import (
    Busy,
    CommandError,
    DeviceNotActive,
    DeviceNotFound,
    InvalidArgument,
    OperationFailed,
    PermissionRefused,
)
from vfiod.protocol.vfio import SetIrqs
from vfiod.server.mdev import parent as interface
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.parent import (
    DeviceInfo,
    Host,
    IrqInfo,
    MapRequest,
    MdevType,
    MediatedDevice,
    Parent,
    RegionInfo,
)

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
VM = "11111111-2222-3333-4444-555555555555"
VM2 = "11111111-2222-3333-4444-666666666666"


class Card(MediatedDevice):
    """The least a device can be."""

    def __init__(self) -> None:
        self.requests: list[int] = []

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(regions=9, irqs=5)

    def region_info(self, index: int) -> RegionInfo:
        return RegionInfo()

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo()

    def read(self, index: int, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Nothing to write to."""

    def set_irqs(self, request: SetIrqs) -> int:
        return 0

    def request(self, count: int) -> None:
        self.requests.append(count)


class Maker(Parent):
    """A parent whose callbacks say what they were called with, and do what the test wants."""

    name = "maker"
    types: Sequence[MdevType] = (MdevType("card", "Card", "A card", DeviceApi.VFIO_PCI, 2, {"colour": "any"}),)

    def __init__(self, name: str = "maker", **does: Callable[..., Any]) -> None:
        self.name = name
        self.does = does
        self.calls: list[tuple[Any, ...]] = []

    def _do(self, callback: str, *arguments: Any) -> Any:
        self.calls.append((callback, *arguments))
        does = self.does.get(callback)
        return does(*arguments) if does is not None else None

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> MediatedDevice:
        made: MediatedDevice | None = self._do("create", uuid, dict(parameters))
        return made or Card()

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        self._do("destroy", uuid, forced)

    def start(self, vm: str, uuids: Sequence[str]) -> None:
        self._do("start", vm, list(uuids))

    def shutdown(self, vm: str, uuids: Sequence[str]) -> None:
        self._do("shutdown", vm, list(uuids))


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


class Stage:
    """A bus with its surroundings."""

    def __init__(self, executor: ThreadPoolExecutor, **how: Any) -> None:
        self.events: list[EventData] = []
        self.bus = MdevBus(emit=self.events.append, executor=executor, **{"built_in": {}, "entry_points": None, **how})

    def removed(self) -> list[tuple[str, str]]:
        return [(event.uuid, event.reason) for event in self.events if isinstance(event, MdevRemoved)]


@asynccontextmanager
async def stage(*parents: Parent, **how: Any) -> AsyncIterator[Stage]:
    with ThreadPoolExecutor(4) as executor:
        made = Stage(executor, **how)
        for parent in parents:
            made.bus.register(parent)
        yield made
        await made.bus.close()
        assert made.bus.uuids() == []
        assert not made.bus._names and not made.bus._groups and not made.bus._leaving


def run(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(play())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is so; no test says how long that may take."""
    while not condition():
        await asyncio.sleep(0.001)


def calling(s: Stage) -> list[str]:
    """The parents in whose lane something runs, in a worker's thread."""
    return [name for name, record in s.bus._parents.items() if record.lane.busy]


# --- creating ---------------------------------------------------------------------------------------------


def test_create_is_told_uuid_and_parameters_and_makes_it_visible() -> None:
    maker = Maker()

    async def play() -> None:
        async with stage(maker) as s:
            assert await s.bus.create("maker", "card", UUID.upper(), {"colour": "red"}) == UUID
            assert maker.calls == [("create", UUID, {"colour": "red"})]
            [told] = s.bus.types()
            assert (told.available_instances, told.device_api) == (1, DeviceApi.VFIO_PCI)
            assert [(one.uuid, one.started, one.attributes) for one in told.devices] == [(UUID, False, {"group": "0"})]
            random = await s.bus.create("maker", "card")
            assert s.bus.uuids() == sorted([UUID, random])

    run(play)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none", "card"), "there is maker"),
        (("maker", "none"), "it has card"),
        (("maker", "card", "not-a-uuid"), "is not a UUID"),
        (("maker", "card", UUID + "\n"), "is not a UUID"),
        (("maker", "card", UUID[:-1]), "is not a UUID"),
        (("maker", "card", UUID, {"size": 1}), "takes colour"),
    ],
)
def test_bad_input_is_refused_with_the_reason(arguments: tuple[Any, ...], words: str) -> None:
    maker = Maker()

    async def play() -> None:
        async with stage(maker) as s:
            with pytest.raises(InvalidArgument, match=words):
                await s.bus.create(*arguments)
            assert maker.calls == []

    run(play)


def test_one_uuid_is_one_device_on_any_parent() -> None:
    async def play() -> None:
        async with stage(Maker(), Maker("second")) as s:
            await s.bus.create("maker", "card", UUID)
            for parent in ("maker", "second"):
                with pytest.raises(OperationFailed, match="EEXIST"):
                    await s.bus.create(parent, "card", UUID)

    run(play)


def test_a_uuid_is_taken_from_the_moment_its_creation_begins() -> None:
    gate = threading.Event()

    async def play() -> None:
        async with stage(Maker(create=lambda *_: gate.wait(60) and None), Maker("second")) as s:
            first = asyncio.ensure_future(s.bus.create("maker", "card", UUID))
            await until(lambda: "maker" in calling(s))
            assert s.bus.uuids() == [], "not visible before create succeeded"
            with pytest.raises(OperationFailed, match="EEXIST"):
                await s.bus.create("second", "card", UUID)
            gate.set()
            assert await first == UUID

    run(play)


def test_instances_are_counted_those_being_made_too() -> None:
    gate = threading.Event()

    async def play() -> None:
        async with stage(Maker(create=lambda *_: gate.wait(60) and None)) as s:
            making = [asyncio.ensure_future(s.bus.create("maker", "card")) for _ in range(2)]
            await until(lambda: s.bus.types()[0].available_instances == 0)
            with pytest.raises(OperationFailed, match=r"ENOSPC.*destroy one"):
                await s.bus.create("maker", "card")
            gate.set()
            uuid, _ = await asyncio.gather(*making)
            await s.bus.destroy(uuid)
            await s.bus.create("maker", "card")

    run(play)


def test_types_may_share_a_resource() -> None:
    class Sharing(Maker):
        def available_instances(self, mdev_type: MdevType) -> int | None:
            return 1 - len([call for call in self.calls if call[0] == "create"])

    async def play() -> None:
        async with stage(Sharing()) as s:
            await s.bus.create("maker", "card")
            assert (await s.bus.ask())[0].available_instances == 0
            with pytest.raises(OperationFailed, match="ENOSPC"):
                await s.bus.create("maker", "card")

    run(play)


@pytest.mark.parametrize(
    ("error", "words", "number"),
    [
        (
            OSError(errno.ENXIO, "the card is off"),
            "create on mdev parent 'maker' failed with ENXIO: the card is off",
            "ENXIO",
        ),
        (PermissionRefused("Not today"), "Not today", None),
        (ValueError("secret detail"), "create on mdev parent 'maker' failed with EIO: it raised ValueError", "EIO"),
        (SystemExit(3), "it raised SystemExit", "EIO"),
        (OSError("no number"), "failed with EIO: no number", "EIO"),
    ],
)
def test_a_failing_create_leaves_nothing(
    error: BaseException, words: str, number: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(create=fails(error))

    async def play() -> None:
        async with stage(maker) as s:
            with pytest.raises(CommandError) as caught:
                await s.bus.create("maker", "card", UUID)
            assert words in str(caught.value)
            assert "secret" not in str(caught.value)
            assert caught.value.errno == number
            assert s.bus.types()[0].available_instances == 2
            maker.does.clear()
            await s.bus.create("maker", "card", UUID)

    run(play)


def test_what_is_no_device_is_the_parents_failure() -> None:
    async def play() -> None:
        async with stage(Maker(create=lambda *_: "a device")) as s:
            with pytest.raises(OperationFailed, match="gave str, not a MediatedDevice"):
                await s.bus.create("maker", "card", UUID)

    run(play)


def test_a_cancelled_caller_leaves_a_whole_device() -> None:
    gate = threading.Event()

    async def play() -> None:
        async with stage(Maker(create=lambda *_: gate.wait(60) and None)) as s:
            caller = asyncio.ensure_future(s.bus.create("maker", "card", UUID))
            await until(lambda: "maker" in calling(s))
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            gate.set()
            await asyncio.gather(*s.bus._tasks)
            assert s.bus.uuids() == [UUID]

    run(play)


# --- drivers of the bus -----------------------------------------------------------------------------------


class Driver:
    name = "driver"
    device_api = "vfio-pci"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, int]] = []

    def probe(self, instance: Instance) -> None:
        self.calls.append(("probe", instance.group))
        if self.error is not None:
            raise self.error

    def remove(self, instance: Instance) -> None:
        self.calls.append(("remove", instance.group))


def test_drivers_are_probed_by_device_api_within_the_group() -> None:
    async def play() -> None:
        driver, foreign = Driver(), Driver()
        foreign.device_api = "vfio-ap"
        async with stage(Maker()) as s:
            s.bus.register_driver(foreign)
            s.bus.register_driver(driver)
            await s.bus.create("maker", "card", UUID)
            await s.bus.create("maker", "card", OTHER)
            await s.bus.destroy(UUID)
            assert driver.calls == [("probe", 0), ("probe", 1), ("remove", 0)]
            await s.bus.create("maker", "card", UUID)
            assert driver.calls[-1] == ("probe", 0)
            assert foreign.calls == []

    run(play)


def test_a_failing_probe_unwinds_the_creation() -> None:
    maker = Maker()

    async def play() -> None:
        async with stage(maker) as s:
            s.bus.register_driver(Driver(OSError(errno.EINVAL, "not for me")))
            with pytest.raises(OperationFailed, match=r"probe on mdev .* by driver 'driver' failed with EINVAL"):
                await s.bus.create("maker", "card", UUID)
            assert [call[0] for call in maker.calls] == ["create", "destroy"]
            assert s.bus.uuids() == []

    run(play)


# --- what a parent has to have ------------------------------------------------------------------------------


def test_what_may_be_left_out_is_written_down_with_what_it_means() -> None:
    written = set()
    for row in re.findall(r"^((?:``[\w.]+``(?:, )?)+) +\S", interface.__doc__ or "", re.M):
        if not row.startswith(("``Parent.", "``MediatedDevice.")):
            continue
        owner = ""
        for name in re.findall(r"``([^`]+)``", row):
            owner = name.partition(".")[0] if "." in name else owner
            written.add((owner, name.rpartition(".")[2]))
    there = {
        (owner.__name__, name)
        for owner in (Parent, MediatedDevice)
        for name in vars(owner)
        if not name.startswith("_") and name not in owner.__abstractmethods__
    }
    assert written == there


def test_a_device_with_nothing_more_than_it_must_have() -> None:
    """Each absent operation means what the table says."""
    device = Card()
    device.open()
    with pytest.raises(OSError, match="cannot be reset") as refused:
        device.reset()
    assert refused.value.errno == errno.ENOTTY
    assert not device.device_info().reset
    asked = MapRequest(0, 0, 4096, 0)
    assert (device.quick, device.region_fd(0), device.validate_map_request(asked)) == (False, None, asked)
    assert (list(device.doorbells()), device.may_dma(0, 0, 4, write=True)) == ([], True)
    device.memory_mapped(0, 4096, False)
    device.memory_unmapped(0, 4096)
    assert (dict(device.attributes()), dict(device.fds())) == ({}, {})
    device.close()


# --- destroying -------------------------------------------------------------------------------------------


def test_destroy_frees_the_name_and_says_so() -> None:
    maker = Maker()

    async def play() -> None:
        async with stage(maker) as s:
            await s.bus.create("maker", "card", UUID)
            await s.bus.destroy(UUID.upper())
            assert maker.calls[-1] == ("destroy", UUID, False)
            assert s.removed() == [(UUID, "destroyed")]
            with pytest.raises(DeviceNotFound):
                await s.bus.destroy(UUID)
            await s.bus.create("maker", "card", UUID)

    run(play)


def test_a_refused_destroy_reaches_the_caller_and_changes_nothing() -> None:
    driver = Driver()

    async def play() -> None:
        async with stage(Maker(destroy=fails(OSError(errno.EBUSY, "the VM runs")))) as s:
            s.bus.register_driver(driver)
            await s.bus.create("maker", "card", UUID)
            with pytest.raises(OperationFailed, match="the VM runs") as caught:
                await s.bus.destroy(UUID)
            assert caught.value.errno == "EBUSY"
            assert s.bus.uuids() == [UUID]
            assert s.removed() == []
            assert [call for call, _ in driver.calls] == ["probe", "remove", "probe"]
            s.bus.release(s.bus.acquire(UUID, "nic0"))

    run(play)


def test_hidden_before_destroy_begins() -> None:
    seen: list[list[str]] = []

    async def play() -> None:
        async with stage(Maker(destroy=lambda *_: seen.append(s.bus.uuids()))) as s:
            await s.bus.create("maker", "card", UUID)
            await s.bus.destroy(UUID)
            assert seen == [[]]

    run(play)


def test_a_device_in_use_is_not_destroyed() -> None:
    async def play() -> None:
        async with stage(Maker()) as s:
            await s.bus.create("maker", "card", UUID)
            instance = s.bus.acquire(UUID, "nic0")
            with pytest.raises(Busy, match="'nic0'"):
                await s.bus.destroy(UUID)
            with pytest.raises(Busy, match="'nic0'"):
                s.bus.acquire(UUID, "nic1")
            assert s.bus.types()[0].devices[0].device == "nic0"
            s.bus.release(instance)
            await s.bus.destroy(UUID)

    run(play)


def test_two_destroys_of_one_device() -> None:
    async def play() -> None:
        async with stage(Maker()) as s:
            await s.bus.create("maker", "card", UUID)
            first, second = await asyncio.gather(s.bus.destroy(UUID), s.bus.destroy(UUID), return_exceptions=True)
            assert first is None
            assert isinstance(second, DeviceNotFound)
            assert s.removed() == [(UUID, "destroyed")]

    run(play)


# --- start and shutdown -----------------------------------------------------------------------------------


def test_start_and_shutdown_span_all_parents_with_devices() -> None:
    one, two, idle = Maker("one"), Maker("two"), Maker("idle")

    async def play() -> None:
        async with stage(one, two, idle) as s:
            await s.bus.create("one", "card", UUID)
            await s.bus.create("two", "card", OTHER)
            await s.bus.start(VM.upper())
            assert one.calls[-1] == ("start", VM, [UUID])
            assert two.calls[-1] == ("start", VM, [OTHER])
            assert s.events == [MdevStarted(uuid=UUID, vm=VM), MdevStarted(uuid=OTHER, vm=VM)]
            assert s.bus.types()[0].devices[0].started
            await s.bus.start(VM)
            assert len(s.events) == 2, "again is harmless"
            with pytest.raises(Busy, match=VM):
                await s.bus.start(VM2)
            with pytest.raises(DeviceNotActive):
                await s.bus.shutdown(VM2)
            await s.bus.shutdown(VM)
            assert s.events[2:] == [MdevStopped(uuid=UUID, vm=VM), MdevStopped(uuid=OTHER, vm=VM)]
            assert idle.calls == []
            with pytest.raises(InvalidArgument):
                await s.bus.start("vm")

    run(play)


def test_a_device_made_later_is_started_alone() -> None:
    one = Maker("one")

    async def play() -> None:
        async with stage(one) as s:
            await s.bus.create("one", "card", UUID)
            await s.bus.start(VM)
            await s.bus.create("one", "card", OTHER)
            await s.bus.start(VM)
            assert one.calls[-1] == ("start", VM, [OTHER])

    run(play)


def test_a_failing_start_unwinds_those_done() -> None:
    one, two, three = Maker("one"), Maker("two"), Maker("three", start=fails(OSError(errno.ENODEV, "unplugged")))

    async def play() -> None:
        async with stage(three, two, one) as s:
            for number, name in enumerate(("one", "three", "two")):
                await s.bus.create(name, "card", UUID[:-1] + str(number))
            with pytest.raises(OperationFailed, match=r"start on mdev parent 'three' for VM .* unplugged"):
                await s.bus.start(VM)
            assert [call[0] for call in one.calls] == ["create", "start", "shutdown"]
            assert [call[0] for call in two.calls] == ["create"], "parents go by name; it was never reached"
            assert s.events == []
            assert not any(device.started for told in s.bus.types() for device in told.devices)

    run(play)


def test_a_failing_shutdown_tells_the_others_all_the_same() -> None:
    one, two = Maker("one", shutdown=fails(OSError(errno.EIO, "no answer"))), Maker("two")

    async def play() -> None:
        async with stage(one, two) as s:
            await s.bus.create("one", "card", UUID)
            await s.bus.create("two", "card", OTHER)
            await s.bus.start(VM)
            with pytest.raises(OperationFailed, match="no answer"):
                await s.bus.shutdown(VM)
            assert s.events[2:] == [MdevStopped(uuid=OTHER, vm=VM)]

    run(play)


def test_a_start_holds_back_destroy_and_unregister() -> None:
    gate = threading.Event()
    order: list[str] = []

    def start(*_: Any) -> None:
        gate.wait(60)
        order.append("started")

    slow = Maker("slow", start=start)
    quick = Maker("quick", destroy=lambda *_: order.append("destroyed"))

    async def play() -> None:
        async with stage(slow, quick) as s:
            await s.bus.create("quick", "card", UUID)
            await s.bus.create("slow", "card", OTHER)
            starting = asyncio.ensure_future(s.bus.start(VM))
            await until(lambda: bool(slow.calls[1:]))
            destroying = asyncio.ensure_future(s.bus.destroy(UUID))
            leaving = asyncio.ensure_future(s.bus.unregister("slow"))
            await until(lambda: s.bus._parents["quick"].lane.waiting == 1)
            assert order == []
            gate.set()
            await asyncio.gather(starting, destroying, leaving)
            assert order == ["started", "destroyed"]

    run(play)


# --- parents ----------------------------------------------------------------------------------------------


def test_a_second_registration_is_eexist() -> None:
    async def play() -> None:
        async with stage(Maker()) as s:
            with pytest.raises(OperationFailed, match="EEXIST"):
                s.bus.register(Maker())
            await s.bus.unregister("maker")
            s.bus.register(Maker())

    run(play)


def typed(*types: MdevType, name: str = "bad") -> Parent:
    parent = Maker(name)
    parent.types = types
    return parent


CARD = Maker.types[0]


@pytest.mark.parametrize(
    "parent",
    [
        "a parent",
        typed(),
        typed(CARD, CARD),
        typed(CARD, name="9"),
        typed(CARD, name="a b"),
        typed(CARD, name="a" * 128),
        typed(MdevType("", "", "", DeviceApi.VFIO_PCI, 1, {})),
        typed(MdevType("card", "", "", DeviceApi.VFIO_PCI, 0, {})),
        typed(MdevType("subchannel", "", "", DeviceApi.VFIO_CCW, 2, {})),
        typed(None),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_a_parent_is_refused(parent: Any) -> None:
    async def play() -> None:
        async with stage() as s:
            with pytest.raises(CommandError):
                s.bus.register(parent)
            assert s.bus.types() == []

    run(play)


def test_a_slow_parent_holds_up_nobody_else() -> None:
    gate = threading.Event()

    async def play() -> None:
        async with stage(Maker("slow", create=lambda *_: gate.wait(60) and None), Maker("quick")) as s:
            slow = asyncio.ensure_future(s.bus.create("slow", "card", UUID))
            await until(lambda: "slow" in calling(s))
            await s.bus.create("quick", "card", OTHER)
            await s.bus.destroy(OTHER)
            assert not slow.done()
            gate.set()
            await slow

    run(play)


def test_unregistering_tells_users_first_and_then_takes_the_devices() -> None:
    maker = Maker(destroy=fails(OSError(errno.EBUSY, "never")))

    async def play() -> None:
        async with stage(maker) as s:
            await s.bus.create("maker", "card", UUID)
            await s.bus.create("maker", "card", OTHER)
            instance = s.bus.acquire(UUID, "nic0")
            assert isinstance(instance.device, Card)
            leaving = asyncio.ensure_future(s.bus.unregister("maker", reason="the card was pulled", patience=0.05))
            await asyncio.sleep(0)
            assert s.bus.uuids() == [], "hidden first"
            with pytest.raises(InvalidArgument):
                await s.bus.create("maker", "card")
            with pytest.raises(OperationFailed, match="EEXIST"):
                s.bus.register(Maker())
            await leaving
            assert instance.device.requests == [0]
            assert instance.gone == "the card was pulled"
            assert s.removed() == [(UUID, "the card was pulled"), (OTHER, "the card was pulled")]
            kinds = [type(event) for event in s.events]
            assert kinds == [MdevRemoved, MdevRemoved, DeviceError]
            assert [call[1:] for call in maker.calls if call[0] == "destroy"] == [(UUID, True), (OTHER, True)]
            s.bus.release(instance)

    run(play)


def test_a_user_who_lets_go_in_time_loses_nothing() -> None:
    async def play() -> None:
        async with stage(Maker()) as s:
            await s.bus.create("maker", "card", UUID)
            instance = s.bus.acquire(UUID, "nic0")
            leaving = asyncio.ensure_future(s.bus.unregister("maker", patience=60))
            await until(lambda: instance.released is not None)
            await asyncio.get_running_loop().run_in_executor(None, s.bus.release, instance)
            await leaving
            assert instance.gone is None
            assert [type(event) for event in s.events] == [MdevRemoved]

    run(play)


def test_a_create_that_races_with_unregister_fails_and_unwinds() -> None:
    gate = threading.Event()
    maker = Maker(create=lambda *_: gate.wait(60) and None)

    async def play() -> None:
        async with stage(maker) as s:
            inside = asyncio.ensure_future(s.bus.create("maker", "card", UUID))
            waiting = asyncio.ensure_future(s.bus.create("maker", "card", OTHER))
            await until(lambda: s.bus._parents["maker"].lane.waiting == 1)
            leaving = asyncio.ensure_future(s.bus.unregister("maker"))
            await asyncio.sleep(0)
            gate.set()
            for one in (inside, waiting):
                with pytest.raises(OperationFailed, match="ENODEV"):
                    await one
            await leaving
            assert [call[:2] for call in maker.calls] == [("create", UUID), ("destroy", UUID)]

    run(play)


def test_queries_survive_a_parent_that_fails() -> None:
    class Broken(Maker):
        def attributes(self) -> Mapping[str, str]:
            raise KeyError("x")

        def available_instances(self, mdev_type: MdevType) -> int | None:
            raise ZeroDivisionError

    async def play() -> None:
        async with stage(Broken(), Maker("sound")) as s:
            told = {one.parent: one for one in await s.bus.ask()}
            assert told["maker"].available_instances == 0
            assert "KeyError" in told["maker"].parent_attributes["error"]
            assert told["sound"].available_instances == 2

    run(play)


# --- discovery --------------------------------------------------------------------------------------------


def test_parents_are_found_once_and_bad_ones_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        found = {
            "primer": "vfiod.server.mdev.samples.pci:Primer",
            "missing": "no.such.module:Parent",
            "again": "vfiod.server.mdev.samples.pci:Primer",
            "wrong": "builtins:dict",
        }
        async with stage(built_in=found, entry_points="vfiod.mdev_parents") as s:
            assert s.bus.types() == []
            await asyncio.gather(s.bus.discover(), s.bus.discover())
            assert [one.parent for one in s.bus.types()] == ["primer"]

    with caplog.at_level(logging.ERROR):
        run(play)
    assert [word in caplog.text for word in ("no.such.module", "EEXIST", "got dict")] == [True] * 3


def test_entry_points_are_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vfiod.mdev_parents]\nother = other_parent:Cards.make\n")
    (tmp_path / "other_parent.py").write_text(
        "from vfiod.server.mdev.samples.pci import Primer\n"
        "class Cards(Primer):\n"
        "    name = 'cards'\n"
        "    @classmethod\n"
        "    def make(cls): return cls()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def play() -> None:
        async with stage(entry_points="vfiod.mdev_parents") as s:
            await s.bus.create("cards", "primer-pci", UUID)
            assert s.bus.uuids() == [UUID]

    run(play)
