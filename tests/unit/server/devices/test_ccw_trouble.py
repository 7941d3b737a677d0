"""The list "bad input and trouble" of channel I/O, one by one: what is said, and that later requests work.

Programs with addresses out of range and chains that loop are in ``tests/unit/server/mdev/test_channel.py``.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import threading

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.catalogue.ccw import CcwCrw, CcwIo
from vfiod.protocol.channel import Crw, CrwErc, CrwRsc, Orb, OrbFlags
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed, TimedOut
from vfiod.protocol.vfio import DeviceFlags
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwCmdRegion, CcwIoRegion, CcwIrq
from vfiod.server import trace

from .conftest import Play, World
from .test_ccw import ENDED, SlowSub, Sub, added, request, started


async def works(world: World, sub: Sub) -> None:
    """A request, from its start to its end."""
    asked = request(world)
    await started(world, sub, len(sub.starts) + 1)
    sub.end()
    assert (await asked).decoded.summary == "ended normally"


def test_orbs_of_the_wrong_length(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        for length in (0, 1, 11, 13, 32, 124):
            with pytest.raises(InvalidArgument, match=f"'orb': An ORB has 12 bytes, got {length}"):
                await world.command("ccw-request", device="n0", orb=base64.b64encode(bytes(length)).decode())
        assert sub.starts == []
        await works(world, sub)

    play(scenario)


def test_orbs_with_addresses_out_of_range(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        for cpa, flags, words in (
            (0x8000_1000, OrbFlags.FMT, "0x80001000 is not below 0x80000000"),  # the high bit
            (0x0100_0000, OrbFlags(0), "0x1000000 is not below 0x1000000"),
            (0x1004, OrbFlags.FMT, "not a multiple of 8"),
            (0x1000, OrbFlags.FMT | OrbFlags.MIDAW, r"modified indirect addressing \(D\)"),
        ):
            orb = base64.b64encode(Orb(cpa, flags=flags).pack()).decode()
            with pytest.raises(InvalidArgument, match=words):
                await world.command("ccw-request", device="n0", orb=orb)
        assert sub.starts == []
        await works(world, sub)

    play(scenario)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
@pytest.mark.parametrize("queue", [False, True])
def test_a_start_while_one_is_pending(play: Play, kind: type[Sub], queue: bool) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        first = request(world)
        await started(world, sub)
        second = request(world, queue=queue)
        if queue:
            await world.settle()
            assert len(sub.starts) == 1 and not second.done()
        else:
            with pytest.raises(Busy, match="has a request pending, and a subchannel does one at a time") as caught:
                await second
            assert caught.value.errno == "EBUSY"
        sub.end()
        await first
        if queue:
            await started(world, sub, 2)
            sub.end()
            assert (await second).irb == ENDED
        await works(world, sub)

    play(scenario)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_a_timeout_then_its_late_interrupt(play: Play, kind: type[Sub]) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        with pytest.raises(TimedOut, match="No interrupt ended the channel program") as caught:
            await request(world, timeout_ms=200)
        assert caught.value.errno == "ETIMEDOUT"
        sub.end()
        await world.until(lambda: bool(world.told(CcwIo)))
        [told] = world.told(CcwIo)
        assert isinstance(told, CcwIo) and told.late and told.irb == ENDED
        await works(world, sub)
        assert len(world.told(CcwIo)) == 1

    play(scenario)


def test_an_mdev_destroyed_while_in_use(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        asked = request(world)
        await started(world, sub)
        [uuid] = [one.uuid for kind in world.machine.mdevs.types() if kind.parent == "subs" for one in kind.devices]
        with pytest.raises(Busy, match="n0"):
            await world.machine.mdevs.destroy(uuid)
        assert not asked.done()
        sub.end()
        assert (await asked).irb == ENDED
        await works(world, sub)

    play(scenario)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_a_parent_whose_callback_raises(play: Play, kind: type[Sub]) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())

        def write(region: int, data: bytes) -> None:
            raise ZeroDivisionError

        def read(region: int) -> bytes:
            raise ZeroDivisionError

        sub.on_write = write
        assert "ZeroDivisionError, which is a defect of the parent" in (await request(world)).meaning
        for name in ("ccw-halt", "ccw-clear"):
            with pytest.raises(OperationFailed, match="a defect of the parent"):
                await world.command(name, device="n0", oob=True)
        sub.on_write, sub.on_read = (lambda region, data: None), read
        for name in ("query-subchannel", "query-crw"):
            with pytest.raises(OperationFailed, match="a defect of the parent"):
                await world.command(name, device="n0", oob=True)
        asked = request(world)
        await started(world, sub)
        sub.end()
        result = await asked
        assert result.return_code == "EIO" and "made up for the return code" in result.meaning
        sub.on_read = lambda region: None
        await works(world, sub)

    play(scenario)


@pytest.mark.parametrize("name", ["ccw-halt", "ccw-clear", "query-subchannel", "query-crw"])
@pytest.mark.parametrize("oob", [False, True])
def test_a_parent_that_takes_its_time_holds_up_nobody(play: Play, name: str, oob: bool) -> None:
    """Not the loop, and not the lane: a program is handed over meanwhile, and everything else is answered."""

    async def scenario(world: World) -> None:
        sub = await added(world, SlowSub())
        gate, entered = world.gate(), asyncio.Event()

        def wait() -> None:
            assert threading.get_ident() != threading.main_thread().ident
            world.loop.call_soon_threadsafe(entered.set)
            gate.wait(30)

        def write(region: int, data: bytes) -> None:
            if region == 1:
                assert CcwCmdRegion.unpack(data).command in (AsyncCommand.HSCH, AsyncCommand.CSCH)
                wait()

        words = [Crw(CrwRsc.SUBCHANNEL, CrwErc.EVENT, 7).pack() + bytes(4), bytes(8)]

        def read(region: int) -> bytes | None:
            if region in (2, 3):
                wait()
            return words.pop(0) if region == 3 and words else None

        sub.on_write, sub.on_read = write, read
        asked = asyncio.ensure_future(world.command(name, device="n0", oob=oob))
        await entered.wait()
        assert not asked.done() and world.machine.device("n0").lane.free
        await works(world, sub)
        assert (await world.command("query-devices"))[0].state == "running"
        gate.set()
        told = await asked
        if name == "query-crw":
            assert [one.id for one in told] == [7] and len(world.told(CcwCrw)) == 1
        elif name == "query-subchannel":
            assert told.requests == 1
        else:
            assert told.condition_code == 0

    play(scenario)


def test_a_halt_reaches_a_parent_that_hangs_in_a_start(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, SlowSub())
        gate, entered = world.gate(), asyncio.Event()

        def write(region: int, data: bytes) -> None:
            if region == 1:
                gate.set()  # that is what it is for
            else:
                world.loop.call_soon_threadsafe(entered.set)
                gate.wait(30)

        sub.on_write = write
        asked = request(world)
        await entered.wait()
        assert (await world.command("ccw-clear", device="n0", oob=True)).condition_code == 0
        await started(world, sub)
        sub.end()
        await asked

    play(scenario)


def test_a_removal_ends_what_is_asked_aside(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, SlowSub())
        gate, entered = world.gate(), asyncio.Event()

        def read(region: int) -> bytes | None:
            world.loop.call_soon_threadsafe(entered.set)
            gate.wait(30)
            return None

        sub.on_read = read
        asked = asyncio.ensure_future(world.command("query-subchannel", device="n0"))
        await entered.wait()
        await world.command("device_del", id="n0", force=True)
        await world.until(lambda: world.machine.device("n0").state != "running")
        gate.set()
        with pytest.raises(CommandError, match="was removed meanwhile"):
            await asked
        await world.until(lambda: not len(world.machine.devices))

    play(scenario)


def test_trace_points(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        await works(world, sub)
        await world.command("ccw-halt", device="n0")
        await world.command("ccw-clear", device="n0")

        def write(region: int, data: bytes) -> None:
            raise OSError(errno.EBUSY, "a program runs")

        sub.on_write = write
        await request(world)
        sub.on_write = lambda region, data: None
        with pytest.raises(TimedOut):
            await request(world, timeout_ms=10)

    caplog.set_level(logging.DEBUG)
    trace.switch("ccw_*", True)
    try:
        play(scenario)
    finally:
        trace.switch("ccw_*", False)
    said = [one.getMessage() for one in caplog.records if "ccw_" in one.getMessage()]
    for number, words in enumerate(
        (
            ("ccw_request", "n0", "cpa=0x1000", "start"),
            ("ccw_result", "n0", "condition_code=0"),
            ("ccw_request", "n0", "halt"),
            ("ccw_request", "n0", "clear"),
            ("ccw_request", "n0", "start"),
            ("ccw_result", "n0", "condition_code=2"),
            ("ccw_request", "n0", "start"),
            ("ccw_result", "n0", "No interrupt ended"),
        )
    ):
        assert all(word in said[number] for word in words), said


class Kernel(FakeKernel):
    """Notes which threads write to devices."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: list[int] = []

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.writers.append(threading.get_ident())
        return super().pwrite(fd, data, offset)


def test_the_kernel_is_handed_a_program_in_a_thread(play: Play) -> None:
    """It pins the program's pages then: that takes time, and none of it is the loop's."""
    kernel = Kernel()
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1313"
    css = kernel.add_platform_device(
        uuid, 7, bus="mdev", driver="vfio_ccw_mdev", device_api="vfio-ccw", irqs="eee", regions=(124,),
        flags=DeviceFlags.CCW | DeviceFlags.RESET,
    )  # fmt: skip

    async def scenario(world: World) -> None:
        await world.command("device_add", driver="vfio-ccw", id="n0", sysfsdev=f"/sys/bus/mdev/devices/{uuid}")
        kernel.writers.clear()
        asked = request(world)
        await world.until(lambda: bool(kernel.writers))
        await world.until(lambda: not world.machine.device("n0").lane.busy)
        assert kernel.writers and threading.get_ident() not in kernel.writers
        region = CcwIoRegion.unpack(css.read(124, 0))
        assert region.orb == Orb(0x1000).pack()
        css.write(CcwIoRegion(region.orb, region.scsw, ENDED).pack(), 0)
        css.interrupt(CcwIrq.IO)
        result = await asked
        assert (result.condition_code, result.irb) == (0, ENDED)

    play(scenario, syscalls=kernel)
    assert kernel.nothing_is_open()
