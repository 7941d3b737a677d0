"""Extended IRQs on the built-in platform device: granted, delivered, released; and devices that misbehave.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vfiod.protocol.catalogue.interrupts import IrqMessage
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import IrqAction, IrqType, IrqTypeCap, MsiMessage, SetIrqs
from vfiod.server.backends.base import Backend
from vfiod.server.backends.mediated import MediatedDevices
from vfiod.server.devices.irq_index import Started, Wanted
from vfiod.server.devices.platform_messages import MessageIndex, PlatformMessages
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.parent import Host, IrqInfo, MdevType
from vfiod.server.mdev.samples import platform
from vfiod.server.mdev.samples.platform import Platform, PlatformDevice

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003"
REGISTERS, MSI = 0, 2


class Rig(PlatformDevice):
    """The built-in device, with a log, and answers that a test replaces."""

    log: list[SetIrqs]
    refuse: Callable[[SetIrqs], None]
    tells: Callable[[IrqInfo], IrqInfo]

    def set_irqs(self, request: SetIrqs) -> int:
        self.log.append(request)
        self.refuse(request)
        return super().set_irqs(request)

    def irq_info(self, index: int) -> IrqInfo:
        told = super().irq_info(index)
        return self.tells(told) if index == MSI else told


class Rigs(Platform):
    made: Rig

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Any) -> Rig:
        self.made = Rig(host, sources=8, granted=parameters.get("granted-messages"))
        self.made.log, self.made.refuse, self.made.tells = [], lambda request: None, lambda told: told
        return self.made


class Ground:
    """One device, open, with its messages."""

    def __init__(self, granted: int | None = None) -> None:
        self.executor = ThreadPoolExecutor(1)
        self.loop = asyncio.new_event_loop()
        self.bus = MdevBus(emit=lambda event: None, executor=self.executor, built_in={}, entry_points=None)
        devices = MediatedDevices(self.bus, lambda space: None, lambda space: None)
        parent = Rigs()
        self.bus.register(parent)
        parameters = {} if granted is None else {"granted-messages": granted}
        self.loop.run_until_complete(self.bus.create("platform", "primer-platform", UUID, parameters))
        self.device = parent.made
        self.backend: Backend = devices.open(UUID, "dev0", "vfio-platform")
        infos = [self.backend.irq_info(index) for index in range(self.backend.info().num_irqs)]
        (found,) = [info for info in infos if MessageIndex.matches(info)]
        self.messages = PlatformMessages(self.backend, MessageIndex("dev0", found))

    def start(self, *vectors: int, **more: Any) -> list[Started]:
        return self.messages.start([Wanted(vector) for vector in vectors], **more)

    def program(self, started: Sequence[Started]) -> None:
        """What the guest's driver does with what it was told: source n gets message n."""
        for one in started:
            assert one.message is not None
            data = struct.pack("<QI", one.message.address, one.message.data)
            for at in (0, 4, 8):
                self.backend.region_write(REGISTERS, platform.MSI_SOURCE + 16 * one.vector + at, data[at : at + 4])

    def send(self, source: int) -> None:
        self.backend.region_write(REGISTERS, platform.MSI_RAISE, source.to_bytes(4, "little"))

    def held(self) -> int:
        """How many messages the device has given away."""
        return len(PlatformDevice.irq_info(self.device, MSI).messages)

    def close(self) -> None:
        self.messages.close()
        self.backend.close()
        self.loop.run_until_complete(self.bus.close())
        self.executor.shutdown()
        self.loop.close()


@pytest.fixture
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    before = sorted(os.listdir("/proc/self/fd"))
    made = Ground(getattr(request, "param", None))
    yield made
    made.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def rung(started: Sequence[Started]) -> list[int]:
    """What arrived at each, since the last look."""
    counts = []
    for one in started:
        assert one.trigger is not None
        try:
            counts.append(os.eventfd_read(one.trigger.number))
        except BlockingIOError:
            counts.append(0)
    return counts


def close(started: Sequence[Started]) -> None:
    for one in started:
        assert one.trigger is not None
        one.trigger.close()


def eventfd() -> FileDescriptor:
    return FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK))


# --- the way it should be ---------------------------------------------------------------------------------


def test_granted_read_back_programmed_and_delivered(ground: Ground) -> None:
    started = ground.start(0, 1, 2, numbers={1: 77})
    assert [(one.vector, one.mode, one.number) for one in started] == [
        (0, IrqMode.DIRECT, None),
        (1, IrqMode.DIRECT, 77),
        (2, IrqMode.DIRECT, None),
    ]
    ground.program(started)
    ground.send(1)
    ground.send(2)
    ground.send(2)
    assert rung(started) == [0, 1, 2]
    ground.messages.trigger(0)
    assert rung(started) == [1, 0, 0]
    close(started)


def test_what_query_irqs_says(ground: Ground) -> None:
    before = ground.messages.info()
    assert (before.name, before.count, before.active, before.x_messages) == ("x-msi", 8, False, [])
    assert ground.messages.fds() == []
    started = ground.start(0, 1)
    told = [one.message for one in started]
    after = ground.messages.info()
    assert (after.count, after.active, after.fired) == (2, True, None), "the count is what was granted"
    assert after.x_messages == [
        IrqMessage(vector=at, address=one.address, data=one.data) for at, one in enumerate(told) if one is not None
    ]
    assert [name for name, _ in ground.messages.fds()] == ["x-msi0 trigger", "x-msi1 trigger"]
    close(started)
    ground.messages.stop()
    assert ground.messages.info() == before


def test_the_callers_eventfds(ground: Ground) -> None:
    with eventfd() as seen:
        started = ground.messages.start([Wanted(0, FileDescriptor.duplicate_of(seen.number))])
        assert started[0].trigger is None
        ground.program(started)
        ground.send(0)
        assert os.eventfd_read(seen.number) == 1


def test_released_whole_and_asked_again_for_more(ground: Ground) -> None:
    close(ground.start(0, 1))
    with pytest.raises(InvalidArgument, match="does not grow"):
        ground.start(0, 1, 2)
    assert ground.held() == 2
    ground.messages.stop()
    assert (ground.device.log[-1], ground.held()) == (SetIrqs.disable(MSI), 0)
    ground.messages.stop()
    close(ground.start(0, 1, 2))
    assert ground.held() == 3


def test_started_again_it_keeps_its_eventfds(ground: Ground) -> None:
    first = ground.start(0, 1)
    ground.program(first)
    again = ground.start(0)
    ground.send(0)
    ground.send(1)
    assert rung(first) == [1, 1]
    close(first)
    close(again)


def test_other_eventfds_for_some(ground: Ground) -> None:
    first = ground.start(0, 1)
    ground.program(first)
    with eventfd() as other:
        ground.messages.start([Wanted(0, FileDescriptor.duplicate_of(other.number))])
        ground.send(0)
        ground.send(1)
        assert (os.eventfd_read(other.number), rung(first)) == (1, [0, 1])
    close(first)


@pytest.mark.parametrize("ground", [3], indirect=True)
def test_a_short_host_grants_fewer_and_says_so(ground: Ground) -> None:
    started = ground.start(*range(6))
    assert len(started) == ground.messages.info().count == ground.held() == 3
    with pytest.raises(InvalidArgument, match="is not started"):
        ground.messages.trigger(3)
    close(started)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "more", "complaint"),
    [
        ((1, 2), {}, "block from vector 0"),
        ((0, 2), {}, "block from vector 0"),
        ((0, 0), {}, "named twice"),
        ((8,), {}, "no vector 8"),
        ((0,), {"mode": IrqMode.RELAYED}, "direct"),
    ],
)
def test_what_cannot_be_asked_for(
    ground: Ground, vectors: tuple[int, ...], more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        ground.start(*vectors, **more)
    assert (ground.device.log, ground.held()) == ([], 0)


def test_a_message_has_no_resample_eventfd(ground: Ground) -> None:
    with pytest.raises(InvalidArgument, match="resample"):
        ground.messages.start([Wanted(0, eventfd(), eventfd())])


def test_part_of_a_block_is_not_released(ground: Ground) -> None:
    close(ground.start(0, 1, 2))
    with pytest.raises(InvalidArgument, match="0 to 2"):
        ground.messages.stop([1])
    assert ground.held() == 3
    ground.messages.stop([2, 1, 0])
    assert ground.held() == 0


def test_routes(ground: Ground) -> None:
    with pytest.raises(InvalidArgument, match="is not started"):
        ground.messages.route(0, 5)
    close(ground.start(0))
    ground.messages.route(0, 5)
    assert ground.messages.info().vectors[0].number == 5
    with pytest.raises(InvalidArgument, match="no vector 9"):
        ground.messages.route(9, 5)


# --- devices that misbehave ---------------------------------------------------------------------------------


def fail(*actions: Callable[[SetIrqs], bool]) -> Callable[[SetIrqs], None]:
    def refuse(request: SetIrqs) -> None:
        if any(action(request) for action in actions):
            raise OSError(errno.EIO, "refused")

    return refuse


def sets(request: SetIrqs) -> bool:
    return request.action is IrqAction.TRIGGER and bool(request.count)


def releases(request: SetIrqs) -> bool:
    return request.is_disable


def test_refused_at_once_nothing_is_left(ground: Ground) -> None:
    ground.device.refuse = fail(sets)
    with pytest.raises(OperationFailed, match="refused"):
        ground.start(0, 1)
    assert (ground.held(), ground.messages.fds(), len(ground.device.log)) == (0, [], 1)
    ground.device.refuse = fail()
    close(ground.start(0, 1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda messages: (), "tells no messages"),
        (lambda messages: (messages[0], messages[0]), "same message"),
        (lambda messages: (*messages, MsiMessage(0, 1)) * 5, "gave"),
        (lambda messages: (MsiMessage(1 << 64, 0),), "gave"),
    ],
)
def test_useless_messages_release_the_block(
    ground: Ground, change: Callable[[tuple[MsiMessage, ...]], tuple[MsiMessage, ...]], complaint: str
) -> None:
    def tells(told: IrqInfo) -> IrqInfo:
        return IrqInfo(count=8, type=told.type, messages=change(told.messages)) if told.messages else told

    ground.device.tells = tells
    with pytest.raises(OperationFailed, match=complaint):
        ground.start(0, 1)
    assert ground.held() == 0
    assert ground.device.log[-1] == SetIrqs.disable(MSI)
    assert ground.messages.info().x_messages == []


def test_fewer_messages_than_eventfds_are_what_was_granted(ground: Ground) -> None:
    ground.device.tells = lambda told: IrqInfo(count=8, type=told.type, messages=told.messages[:1])
    started = ground.start(0, 1, 2)
    assert len(started) == len(ground.messages.fds()) == ground.messages.info().count == 1
    close(started)


def test_a_release_that_fails_is_told_and_forgotten(ground: Ground) -> None:
    close(ground.start(0))
    ground.device.refuse = fail(releases)
    with pytest.raises(OperationFailed, match="refused"):
        ground.messages.stop()
    assert (ground.messages.fds(), ground.messages.info().active) == ([], False)


def test_new_eventfds_refused_undo_the_block(ground: Ground) -> None:
    close(ground.start(0, 1))
    ground.device.refuse = fail(sets)
    with pytest.raises(OperationFailed, match="the block was released"):
        ground.start(0, 1)
    assert (ground.held(), ground.messages.fds()) == (0, [])
    ground.device.refuse = fail()
    close(ground.start(0, 1, 2))


def test_found_by_its_type_and_not_by_its_place() -> None:
    def info(kind: int | None) -> Any:
        from vfiod.protocol.vfio import IrqFlags
        from vfiod.protocol.vfio import IrqInfo as KernelInfo

        return KernelInfo(0, IrqFlags.EVENTFD, 1, () if kind is None else (IrqTypeCap(kind, 0),))

    assert [MessageIndex.matches(info(kind)) for kind in (None, 0, IrqType.MSI, 2)] == [False, False, True, False]
