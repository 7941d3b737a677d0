"""A machine, a monitor session's names, and a parent whose devices are as slow or as contrary as a test wants."""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.unit.server.fake_kernel import FakeKernel
from tests.unit.server.playing import play_in

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.declare import COMMANDS
from vfiod.protocol.catalogue.monitor import RunState, StatusInfo
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server.commands import ccw, devices, interrupts, memory, objects, regions, reset, topology
from vfiod.server.commands.call import Call
from vfiod.server.events import Event, EventHub
from vfiod.server.fds import FdNames
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine import Machine
from vfiod.server.mdev.parent import Host, MdevType, MediatedDevice
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

HANDLERS = {
    **ccw.HANDLERS,
    **devices.HANDLERS,
    **interrupts.HANDLERS,
    **memory.HANDLERS,
    **objects.HANDLERS,
    **regions.HANDLERS,
    **reset.HANDLERS,
    **topology.HANDLERS,
}


class Gate:
    """Holds up a worker's thread; open unless it is closed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()

    def close(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self) -> None:
        self.reached.set()
        self._open.wait()

    async def is_reached(self) -> None:
        await asyncio.to_thread(self.reached.wait)


@dataclass
class Temper:
    """How the devices of the contrary parent behave."""

    open: Gate = field(default_factory=Gate)
    reset: Gate = field(default_factory=Gate)
    close: Gate = field(default_factory=Gate)
    map: Gate = field(default_factory=Gate)
    refuse: set[str] = field(default_factory=set)
    """Callbacks that fail: open, reset, close, map, set_irqs, region_info, irq_info."""

    def meet(self, what: str) -> None:
        if what in self.refuse:
            raise OSError(errno.EIO, f"{what} was refused")

    def open_all(self) -> None:
        for gate in (self.open, self.reset, self.close, self.map):
            gate.open()


class ContraryDevice(PrimerDevice):
    """A primer that waits, or refuses."""

    temper: Temper

    def open(self) -> None:
        self.temper.open()
        self.temper.meet("open")
        super().open()

    def close(self) -> None:
        self.temper.close()
        super().close()
        self.temper.meet("close")

    def reset(self) -> None:
        self.temper.reset()
        self.temper.meet("reset")
        super().reset()

    def memory_mapped(self, iova: int, size: int, readonly: bool) -> None:
        self.temper.map()
        self.temper.meet("map")
        super().memory_mapped(iova, size, readonly)

    def set_irqs(self, request: Any) -> int:
        self.temper.meet("set_irqs")
        return super().set_irqs(request)

    def region_info(self, index: int) -> Any:
        self.temper.meet("region_info")
        return super().region_info(index)

    def irq_info(self, index: int) -> Any:
        self.temper.meet("irq_info")
        return super().irq_info(index)


class Contrary(Primer):
    """Makes contrary devices."""

    name = "contrary"
    types: Sequence[MdevType] = (Primer.TYPE,)

    def __init__(self, temper: Temper) -> None:
        super().__init__()
        self.temper = temper
        self.made: dict[str, MediatedDevice] = {}

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PrimerDevice:
        # Set by hand: PrimerDevice begins its life (reset) in its own constructor.
        device = ContraryDevice(host, memory=1 << 16, vectors=4, granted=4)
        device.temper = self.temper
        self.made[uuid] = device
        return device


class World:
    """A machine and one session."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.hub = EventHub(loop.call_later)
        self.events: list[Event] = []
        self._news = asyncio.Event()
        self.hub.subscribe(self._hear)
        self.kernel = FakeKernel()
        self.machine = Machine("test", hub=self.hub, syscalls=self.kernel)
        self.temper = Temper()
        self.parent = Contrary(self.temper)
        self.machine.mdevs.register(self.parent)
        self.names = FdNames(lambda fd: self.kernel.kind(fd) or kind_of(fd))
        self.server = SimpleNamespace(status=StatusInfo(running=True, status=RunState.RUNNING), session_infos=list)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    # --- commands, as a session gives them ---

    async def command(self, name: str, **arguments: Any) -> Any:
        """One command as the dispatcher runs it; names are consumed when it succeeds."""
        call = Call(self.machine, cast("Any", self.server), cast("Any", SimpleNamespace(id=1, names=self.names)))
        try:
            spec = COMMANDS[name.replace("_", "-") if name.replace("_", "-") in COMMANDS else name]
            given = {key.replace("_", "-"): value for key, value in arguments.items()}
            call.arguments = decode_arguments(spec, msgspec.json.encode(given))
            result = HANDLERS[spec.arguments](call, call.arguments)
            if isinstance(result, Awaitable):
                result = await result
        except BaseException:
            call.fail()
            raise
        for fd in call.succeed() or ():
            fd.close()
        return result

    def name_fd(self, name: str, number: int) -> None:
        """Send an fd and name it; it is taken over."""
        self.names.receive([FileDescriptor(number)])
        self.names.name(name)

    def name_memory(self, name: str, size: int = 1 << 20) -> None:
        """Send a memfd and name it."""
        number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(number, size)
        self.name_fd(name, number)

    def name_opened(self, name: str, path: str) -> None:
        """Do as a manager: open a file of the kernel and pass it on."""
        self.name_fd(name, self.kernel.open(path))

    async def mdev(self) -> str:
        """Make a contrary device; its UUID."""
        return await self.machine.mdevs.create("contrary", "primer-pci")

    async def add(self, id: str = "n0", **more: Any) -> str:
        """Make and add one; its UUID."""
        uuid = await self.mdev()
        await self.command("device_add", driver="vfio-pci", id=id, mdev=uuid, **more)
        return uuid

    # --- what happened ---

    def told(self, *kinds: type[EventData]) -> list[EventData]:
        """The data of all events so far, of these kinds."""
        return [event.data for event in self.events if not kinds or isinstance(event.data, kinds)]

    async def hears(self, *kinds: type[EventData], count: int = 1) -> list[EventData]:
        """Wait until so many events of these kinds have come."""
        while len(found := self.told(*kinds)) < count:
            self._news.clear()
            await self._news.wait()
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something holds."""
        while not condition():
            await asyncio.sleep(0.001)

    async def end(self) -> list[str]:
        self.temper.open_all()
        self.names.close()
        return await self.machine.close()


Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture
def play() -> Callable[[Scenario], None]:
    """Play a scenario in a world of its own; afterwards nothing of it may be left."""

    def run(scenario: Scenario) -> None:
        play_in(World, scenario)

    return run


__all__ = ["Scenario", "World"]
