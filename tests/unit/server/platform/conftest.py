"""A machine with platform devices of the fake kernel, and the eventfds that a hypervisor holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.unit.server.fake_kernel import FakeKernel
from tests.unit.server.fake_platform import FakePlatformDevice
from tests.unit.server.playing import play_in

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.declare import COMMANDS
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server.commands import devices, interrupts, objects, regions, reset
from vfiod.server.commands.call import Call
from vfiod.server.events import EventHub
from vfiod.server.fds import FdNames
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine import Machine

HANDLERS = {
    **devices.HANDLERS,
    **interrupts.HANDLERS,
    **objects.HANDLERS,
    **regions.HANDLERS,
    **reset.HANDLERS,
}


class Bell:
    """An eventfd of the hypervisor."""

    def __init__(self, number: int | None = None) -> None:
        self.fd = FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if number is None else number)

    def rung(self) -> int:
        """How often since the last look."""
        try:
            return os.eventfd_read(self.fd.number)
        except BlockingIOError:
            return 0

    def ring(self) -> None:
        os.eventfd_write(self.fd.number, 1)


class Irq:
    """One interrupt as ``irq-start`` answered, with its eventfds."""

    def __init__(self, started: Any, bells: list[Bell]) -> None:
        self.device = started.device
        self.index = started.index
        self.mode = started.mode
        self.number = None if started.number is msgspec.UNSET else started.number
        self.trigger = None if started.trigger_fd is msgspec.UNSET else bells[started.trigger_fd]
        self.resample = None if started.resample_fd is msgspec.UNSET else bells[started.resample_fd]

    def rung(self) -> int:
        assert self.trigger is not None
        rung: int = self.trigger.rung()
        return rung


class World:
    """A machine, and one session that carries fds unless ``carries`` is False."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.hub = EventHub(self.loop.call_later)
        self.emitted: list[EventData] = []
        self._news = asyncio.Event()
        emit = self.hub.emit

        def tee(data: EventData) -> None:
            self.emitted.append(data)
            self._news.set()
            emit(data)

        self.hub.emit = tee  # type: ignore[method-assign]  # what was meant, before rate limits
        self.kernel = FakeKernel()
        self.machine = Machine("test", hub=self.hub, syscalls=self.kernel)
        self.names = FdNames(lambda fd: self.kernel.kind(fd) or kind_of(fd))
        self.session: Any = SimpleNamespace(id=1, names=self.names)
        self.bells: list[Bell] = []
        self.carries = True

    async def command(self, name: str, *, oob: bool = False, **arguments: Any) -> Any:
        """One command as the dispatcher runs it."""
        return (await self.call(name, oob=oob, **arguments))[0]

    async def call(self, name: str, *, oob: bool = False, **arguments: Any) -> tuple[Any, list[Bell]]:
        """One command, and the fds that came with its reply."""
        call = Call(self.machine, cast("Any", None), self.session, oob, carries_fds=self.carries)
        spec = COMMANDS[name]
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            result = HANDLERS[spec.arguments](call, decode_arguments(spec, msgspec.json.encode(given)))
            if isinstance(result, Awaitable):
                result = await result
        except BaseException:
            call.fail()
            raise
        bells = [Bell(fd.give_away()) for fd in call.succeed() or ()]
        self.bells += bells
        return result, bells

    async def start(self, **arguments: Any) -> list[Irq]:
        """``irq-start``."""
        result, bells = await self.call("irq-start", **arguments)
        return [Irq(one, bells) for one in result.irqs]

    async def add(self, id: str = "p0", irqs: str = "le", *, group: int = 7, **more: Any) -> FakePlatformDevice:
        """Make a platform device ``ID.dev`` of the host, open its group as a manager does, and add it."""
        device = self.host(id, irqs, group=group)
        await self.plug(id, group=group, **more)
        return device

    def host(self, id: str = "p0", irqs: str = "le", *, group: int = 7, **settings: Any) -> FakePlatformDevice:
        """A platform device of the host."""
        return self.kernel.add_platform_device(f"{id}.dev", group, irqs=irqs, **settings)

    async def plug(self, id: str = "p0", *, group: int = 7, **more: Any) -> None:
        """``device_add`` with the group's fd."""
        noiommu = self.kernel.groups[group].noiommu
        self.name_opened("g", f"/dev/vfio/{'noiommu-' if noiommu else ''}{group}")
        arguments = {"driver": "vfio-platform", "id": id, "host": f"{id}.dev", "group_fd": "g"} | more
        try:
            await self.command("device_add", **arguments)
        finally:
            if self.names.look("g") is not None:
                self.names.remove("g")

    async def delete(self, id: str = "p0", **more: Any) -> Any:
        before = len(self.told(DeviceDeleted))
        await self.command("device_del", id=id, **more)
        while len(found := self.told(DeviceDeleted)) == before:
            self._news.clear()
            await self._news.wait()
        return found[-1]

    def name_opened(self, name: str, path: str) -> None:
        """Do as a manager: open a file of the kernel and pass it on."""
        self.names.receive([FileDescriptor(self.kernel.open(path))])
        self.names.name(name)

    def bell(self, name: str) -> Bell:
        """An eventfd of the hypervisor, of which a duplicate is sent and named."""
        bell = Bell()
        self.bells.append(bell)
        self.names.receive([bell.fd.duplicate()])
        self.names.name(name)
        return bell

    async def access(self, device: str = "p0", *, region: int = 0, offset: int = 0) -> int:
        """One read of a register."""
        result = await self.command("region-read", device=device, region=region, offset=offset, size=4)
        return int(result.value)

    async def irqs(self, device: str = "p0") -> list[Any]:
        """What query-irqs says."""
        return cast("list[Any]", await self.command("query-irqs", device=device))

    async def states(self, device: str = "p0") -> str:
        """The states of the started ones, briefly: ``active pending inactive``."""
        return " ".join(one.vectors[0].state for one in await self.irqs(device) if one.vectors)

    async def fast(self, device: str = "p0") -> bool:
        """Whether mapped access is on."""
        [info] = await self.command("query-devices", id=device)
        return bool(info.fast_path)

    def told(self, *kinds: type[EventData]) -> list[EventData]:
        """The events of these kinds so far."""
        return [data for data in self.emitted if isinstance(data, kinds)]

    async def settle(self) -> None:
        """Let the loop see what is readable."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something holds."""
        while not condition():
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        self.names.close()
        for bell in self.bells:
            bell.fd.close()
        await self.machine.close()
        assert self.kernel.nothing_is_open()


Scenario = Callable[[World], Awaitable[None]]
Play = Callable[[Scenario], None]


@pytest.fixture
def play() -> Play:
    """Play a scenario in a world of its own; afterwards nothing of it may be left."""

    def run(scenario: Scenario) -> None:
        play_in(World, scenario)

    return run
