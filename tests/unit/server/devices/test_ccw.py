"""A subchannel whose parent does what a test says: return codes, late and stale interrupts, hanging, going away.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from vfiod.protocol.catalogue.ccw import CcwCrw, CcwIo
from vfiod.protocol.catalogue.devices import DeviceRequested
from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.channel import Crw, CrwErc, CrwRsc, Irb, Orb, Scsw
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, OperationFailed, TimedOut
from vfiod.protocol.limits import MAX_CCW_QUEUE
from vfiod.protocol.vfio import RegionType, RegionTypeCap, SetIrqs
from vfiod.protocol.vfio.ccw import CcwIoRegion, CcwIrq
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, MediatedDevice, Parent, RegionInfo

from .conftest import Play, World

ENDED = bytes.fromhex("00c04007000010080c000000") + bytes(84)


class Line:
    """base64 of an ORB: JSON is what commands take."""

    ORB = "AAAAAADA/wAAABAA"  # a program of format 1 at 0x1000


class Sub(MediatedDevice):
    """A subchannel that starts nothing by itself.

    Attributes:
        on_write: called with (region, data) in the worker's thread.
        on_read: called with the region; raise, or give other bytes.
        io: what the I/O region holds.
        sizes, types: of the regions.

    """

    quick = True

    def __init__(self) -> None:
        self.on_write: Callable[[int, bytes], None] = lambda region, data: None
        self.on_read: Callable[[int], bytes | None] = lambda region: None
        self.io = CcwIoRegion()
        self.sizes = [124, 8, 52, 8]
        self.types: list[int | None] = [None, 1, 2, 3]
        self.bells: dict[int, int] = {}
        self.starts: list[bytes] = []

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(regions=len(self.sizes), irqs=3, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        kind = self.types[index]
        cap = None if kind is None else RegionTypeCap(RegionType.CCW, kind)
        return RegionInfo(self.sizes[index], readable=True, writable=True, type=cap)

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo(count=1)

    def read(self, index: int, offset: int, length: int) -> bytes:
        given = self.on_read(index)
        if given is not None:
            return given
        return self.io.pack() if index == 0 else bytes(length)

    def write(self, index: int, offset: int, data: bytes) -> None:
        self.on_write(index, data)
        if index == 0:
            self.io = CcwIoRegion.unpack(data)
            self.starts.append(data)

    def set_irqs(self, request: SetIrqs) -> int:

        for fd in request.fds:
            if request.index in self.bells:
                os.close(self.bells.pop(request.index))
            if fd >= 0:
                self.bells[request.index] = os.dup(fd)
        return 0

    def reset(self) -> None:
        self.io = CcwIoRegion()

    def close(self) -> None:
        while self.bells:
            os.close(self.bells.popitem()[1])

    def ring(self, index: int = CcwIrq.IO) -> None:

        os.eventfd_write(self.bells[index], 1)

    def end(self, irb: bytes = ENDED, ret_code: int = 0) -> None:
        """The program ends: the IRB is there, and the interrupt comes."""
        self.io = CcwIoRegion(self.io.orb, self.io.scsw, irb, ret_code)
        self.ring()


class SlowSub(Sub):
    """One that may wait."""

    quick = False


class Subs(Parent):
    """Makes them."""

    name = "subs"
    types: Sequence[MdevType] = (MdevType("sub", "Sub", "A subchannel", DeviceApi.VFIO_CCW, 1, {}),)

    def __init__(self, device: MediatedDevice) -> None:
        self._device = device

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> MediatedDevice:
        return self._device


async def added(world: World, sub: MediatedDevice | None = None) -> Any:
    device = Sub() if sub is None else sub
    world.machine.mdevs.register(Subs(device))
    uuid = await world.machine.mdevs.create("subs", "sub")
    await world.command("device_add", driver="vfio-ccw", id="n0", mdev=uuid)
    return device


def request(world: World, **more: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(world.command("ccw-request", device="n0", orb=Line.ORB, **more))


async def started(world: World, sub: Sub, count: int = 1) -> None:
    await world.until(lambda: len(sub.starts) == count)
    await world.until(lambda: not world.machine.device("n0").lane.busy)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_a_round_trip(play: Play, kind: type[Sub]) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        asked = request(world)
        await started(world, sub)
        assert sub.starts[0][:12] == Orb(0x1000).pack()
        assert sub.starts[0][12:24] == bytes.fromhex("00004000") + bytes(8)
        assert not any(sub.starts[0][24:])
        sub.end()
        result = await asked
        assert (result.condition_code, result.irb, result.decoded.summary) == (0, ENDED, "ended normally")

    play(scenario)


def test_eagain_is_tried_again(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        refusals = [errno.EAGAIN] * 3

        def write(region: int, data: bytes) -> None:
            if refusals:
                raise OSError(refusals.pop(), "not now")
            if region == 0:
                world.loop.call_soon_threadsafe(world.loop.call_later, 0.001, sub.end)

        sub.on_write = write
        assert (await request(world)).decoded.summary == "ended normally"
        refusals[:] = [errno.EAGAIN] * 2
        assert (await world.command("ccw-clear", device="n0")).condition_code == 0
        refusals[:] = [errno.EAGAIN]
        with pytest.raises(Busy, match="ask again"):
            await world.command("ccw-halt", device="n0", oob=True)

    play(scenario)


CODES = {
    "EBUSY": (2, "busy"),
    "ENODEV": (3, "not operational"),
    "EACCES": (3, "not operational"),
    "EFAULT": (0, "channel-data check"),
    "EINVAL": (0, "program check"),
    "EIO": (0, "program check"),
    "EOPNOTSUPP": (0, "program check"),
}


def test_return_codes_of_the_start_in_words(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        for name, (code, words) in CODES.items():

            def write(region: int, data: bytes, name: str = name) -> None:
                raise OSError(getattr(errno, name), "the parent says so")

            sub.on_write = write
            result = await request(world)
            assert (result.condition_code, result.return_code) == (code, name)
            assert words in result.meaning and "the parent says so" in result.meaning
            assert (result.decoded is not None) and ((code == 0) is bool(result.irb))

    play(scenario)


def test_a_parent_that_raises_is_told_from_one_that_refuses(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)

        def write(region: int, data: bytes) -> None:
            raise ValueError("a defect")

        sub.on_write = write
        result = await request(world)
        assert result.return_code == "EIO"
        assert "it raised ValueError, which is a defect of the parent" in result.meaning
        with pytest.raises(OperationFailed, match="a defect of the parent"):
            await world.command("ccw-halt", device="n0")
        sub.on_write = lambda region, data: None
        asked = request(world)
        await started(world, sub)
        sub.end()
        assert (await asked).return_code != "EIO"

    play(scenario)


def test_a_failing_irb(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        for error, words in ((errno.ENODEV, "deferred condition code 3"), (errno.EFAULT, "channel-data check")):
            asked = request(world)
            await started(world, sub, len(sub.starts) + 1)

            def read(region: int, error: int = error) -> bytes:
                raise OSError(error, "gone")

            sub.on_read = read
            sub.ring()
            assert words in (await asked).meaning
            sub.on_read = lambda region: None
        asked = request(world)
        await started(world, sub, 3)
        sub.end(ret_code=-errno.EFAULT)
        result = await asked
        assert (result.return_code, result.decoded.subchannel_status) == ("EFAULT", ["channel-data-check"])

    play(scenario)


def test_stale_signals_answer_nothing(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        sub.ring()  # without any status
        await world.settle()
        assert world.told(CcwIo) == []
        # A program that was given up ends while the next one is handed over: its signal comes first.
        with pytest.raises(TimedOut):
            await request(world, timeout_ms=10)
        sub.on_write = lambda region, data: sub.ring()
        asked = request(world)
        await started(world, sub, 2)
        await world.settle()
        assert not asked.done()
        sub.end()
        assert (await asked).irb == ENDED
        assert world.told(CcwIo) == []

    play(scenario)


def test_what_was_signalled_before_a_start_is_told_and_not_taken(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        with pytest.raises(TimedOut, match="its late interrupt becomes CCW_IO"):
            await request(world, timeout_ms=10)
        sub.end()  # nobody has heard it yet: no turn of the loop in between
        asked = request(world)
        await started(world, sub, 2)
        [told] = world.told(CcwIo)
        assert isinstance(told, CcwIo) and told.late and told.solicited
        assert not asked.done()
        sub.end()
        assert (await asked).condition_code == 0

    play(scenario)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_unsolicited_interrupts_become_events(play: Play, kind: type[Sub]) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        attention = Irb(scsw=Scsw.unpack(bytes.fromhex("00000011000000008000" + "0000"))).pack()
        sub.end(attention)
        await world.until(lambda: len(world.told(CcwIo)) == 1)
        asked = request(world)
        await started(world, sub)
        sub.end(attention)
        await world.until(lambda: len(world.told(CcwIo)) == 2)
        assert not asked.done()
        sub.end()
        await asked
        told = world.told(CcwIo)[1]
        assert isinstance(told, CcwIo)
        assert (told.solicited, told.late, told.decoded.device_status) == (False, False, ["attention"])

    play(scenario)


def test_a_parent_that_hangs(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, SlowSub())
        gate = world.gate()
        sub.on_write = lambda region, data: bool(gate.wait(30)) and None
        with pytest.raises(TimedOut, match="has not returned from taking the channel program"):
            await request(world, timeout_ms=20)
        with pytest.raises(Busy, match="still takes the program of a request that is over"):
            await request(world)
        told = await world.command("query-subchannel", device="n0", oob=True)
        assert told.pending and "is being handed over" in told.words[0]
        gate.set()
        await world.until(lambda: not world.machine.device("n0").lane.busy)
        assert (await world.command("query-subchannel", device="n0")).late == 1
        sub.on_write = lambda region, data: None
        asked = request(world)
        await started(world, sub, 2)
        sub.end()
        assert (await asked).condition_code == 0

    play(scenario)


@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_the_device_goes_in_the_middle(play: Play, kind: type[Sub]) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        pending, queued = request(world), request(world, queue=True)
        await started(world, sub)
        await world.machine.mdevs.unregister("subs", patience=0)
        # At once, and not when their time is over.
        result = await pending
        assert (result.condition_code, result.return_code) == (0, "ENODEV")
        assert result.decoded.deferred_condition_code == 3
        assert "its parent was unregistered" in result.meaning
        for result in (await queued, await request(world)):
            assert (result.condition_code, result.return_code) == (3, "ENODEV")
            assert "its parent was unregistered" in result.meaning and "not operational" in result.meaning

    play(scenario)


def test_the_device_goes_while_it_takes_a_program(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world, SlowSub())
        gate = world.gate()
        entered = asyncio.Event()

        def write(region: int, data: bytes) -> None:
            world.loop.call_soon_threadsafe(entered.set)
            gate.wait(30)

        sub.on_write = write
        pending, queued = request(world), request(world, queue=True)
        await entered.wait()
        leaving = asyncio.ensure_future(world.machine.mdevs.unregister("subs", patience=0))
        for result in (await pending, await queued):
            assert (result.condition_code, result.return_code) == (3, "ENODEV")
        gate.set()
        await leaving

    play(scenario)


@pytest.mark.parametrize("index", [CcwIrq.REQ, CcwIrq.CRW])
@pytest.mark.parametrize("kind", [Sub, SlowSub])
def test_a_device_of_the_kernel_goes_in_the_middle(play: Play, kind: type[Sub], index: CcwIrq) -> None:
    """It says nothing but REQ or a channel report; STORE SUBCHANNEL then says ENODEV."""

    async def scenario(world: World) -> None:
        sub = await added(world, kind())
        pending, queued = request(world), request(world, queue=True)
        await started(world, sub)
        sub.ring(index)  # it is asked for, or reports something, and is still there
        await world.until(lambda: bool(world.told(DeviceRequested)) or index == CcwIrq.CRW)
        await world.settle()
        assert not pending.done()

        def write(region: int, data: bytes) -> None:
            raise OSError(errno.ENODEV, "it is gone")

        def read(region: int) -> bytes | None:
            raise OSError(errno.ENODEV, "it is gone")

        sub.on_write, sub.on_read = write, read
        sub.ring(index)
        result = await pending
        assert (result.return_code, result.decoded.deferred_condition_code) == ("ENODEV", 3)
        assert "it is gone" in result.meaning
        assert (await queued).condition_code == 3
        sub.on_write, sub.on_read = (lambda region, data: None), (lambda region: None)

    play(scenario)


def test_removal_waits_for_the_request_or_forces_it(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        asked = request(world)
        await started(world, sub)
        await world.command("device_del", id="n0")
        await world.settle()
        assert world.machine.device("n0").state == "unplugging"
        sub.end()
        assert (await asked).condition_code == 0
        await world.until(lambda: not len(world.machine.devices))

    play(scenario)


def test_forced_removal_ends_what_waits(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        asked = [request(world), request(world, queue=True)]
        await started(world, sub)
        await world.command("device_del", id="n0", force=True)
        for one in asked:
            with pytest.raises(DeviceNotActive, match="was removed while its request was pending"):
                await one
        await world.until(lambda: not len(world.machine.devices))

    play(scenario)


def test_the_line_is_bounded_and_can_be_left(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        first = request(world)
        await started(world, sub)
        with pytest.raises(Busy, match="queue=true"):
            await request(world)
        waiting = [request(world, queue=True) for _ in range(MAX_CCW_QUEUE)]
        await world.settle()
        with pytest.raises(Busy, match=f"{MAX_CCW_QUEUE} requests wait"):
            await request(world, queue=True)
        for one in waiting[1:]:
            one.cancel()
        await world.settle()
        assert (await world.command("query-subchannel", device="n0")).waiting == 1
        sub.end()
        await first
        await started(world, sub, 2)
        sub.end()
        assert (await waiting[0]).condition_code == 0
        assert not (await world.command("query-subchannel", device="n0")).pending

    play(scenario)


def test_reports(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = await added(world)
        words = [Crw(CrwRsc.SUBCHANNEL, CrwErc.EVENT, number).pack() + bytes(4) for number in range(3)]
        sub.on_read = lambda region: (words.pop(0) if words else bytes(8)) if region == 3 else None
        sub.ring(CcwIrq.CRW)
        await world.until(lambda: len(world.told(CcwCrw)) == 3)
        words.append(Crw(CrwRsc.CHANNEL_PATH, CrwErc.TERMINAL, 9).pack() + bytes(4))
        told = await world.command("query-crw", device="n0", oob=True)
        assert [one.id for one in told] == [0, 1, 2, 9]
        assert len(world.told(CcwCrw)) == 4
        sub.ring(CcwIrq.REQ)
        await world.until(lambda: bool(world.told(DeviceRequested)))
        infos = {one.name: one.fired for one in await world.command("query-irqs", device="n0")}
        assert infos == {"io": 0, "crw": 1, "req": 1}

    play(scenario)


def test_an_older_kernel_has_fewer_regions(play: Play) -> None:
    async def scenario(world: World) -> None:
        sub = Sub()
        sub.sizes, sub.types = [124], [None]
        await added(world, sub)
        with pytest.raises(CommandError, match=r"no async command region.* device-reset ends") as caught:
            await world.command("ccw-halt", device="n0", oob=True)
        assert caught.value.errno == "EOPNOTSUPP"
        with pytest.raises(CommandError, match="no CRW region"):
            await world.command("query-crw", device="n0")
        told = await world.command("query-subchannel", device="n0")
        assert "no SCHIB region" in told.words[0] and not told.can_halt
        asked = request(world)
        await started(world, sub)
        sub.end()
        await asked

    play(scenario)


@pytest.mark.parametrize(
    "sizes, types, words",
    [
        ([120], [None], "io region of .* has 120 bytes, it must have 124"),
        ([124, 12], [None, 1], "command region of .* has 12 bytes, it must have 8"),
        ([124, 8, 53], [None, 1, 2], "schib region of .* has 53 bytes"),
    ],
)
def test_regions_of_the_wrong_size(play: Play, sizes: list[int], types: list[int | None], words: str) -> None:
    async def scenario(world: World) -> None:
        sub = Sub()
        sub.sizes, sub.types = sizes, types
        with pytest.raises(CommandError, match=words):
            await added(world, sub)
        assert not len(world.machine.devices)

    play(scenario)
