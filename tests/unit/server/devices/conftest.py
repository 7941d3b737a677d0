"""A machine with rigs: mediated PCI devices that keep a log of what they were told, and fail where a test says."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.unit.server.playing import play_in

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.declare import COMMANDS
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import IrqAction, IrqData, PciRegion, SetIrqs
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server.commands import ccw, devices, interrupts, regions, reset
from vfiod.server.commands.call import Call
from vfiod.server.events import Event, EventHub
from vfiod.server.fds import FdNames
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.machine import Machine
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, RegionInfo
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

HANDLERS = {**devices.HANDLERS, **regions.HANDLERS, **interrupts.HANDLERS, **reset.HANDLERS, **ccw.HANDLERS}


class Rig(PrimerDevice):
    """A primer whose every part can be replaced by a test.

    Attributes:
        log: every SET_IRQS, in order.
        fail_set_irqs: called with each request before it is done; raise to refuse it.
        info, region, irq: replacements of what the device says of itself.
        fail_read: called with (region, offset, length); raise to refuse.
        on_reset: called in the worker's thread.
        dead: configuration space reads all ones.
        overlay: bytes that configuration space shows instead of its own, by offset.

    """

    log: list[SetIrqs]
    fail_set_irqs: Callable[[SetIrqs], None]
    info: DeviceInfo | None
    region: dict[int, RegionInfo]
    irq: dict[int, IrqInfo]
    fail_read: Callable[[int, int, int], None]
    on_reset: Callable[[], None]
    dead: bool
    overlay: dict[int, int]

    def prepare(self) -> None:
        self.log = []
        self.fail_set_irqs = lambda request: None
        self.info = None
        self.region = {}
        self.irq = {}
        self.fail_read = lambda region, offset, length: None
        self.on_reset = lambda: None
        self.dead = False
        self.overlay = {}

    def device_info(self) -> DeviceInfo:
        return self.info or super().device_info()

    def region_info(self, index: int) -> RegionInfo:
        return self.region.get(index) or super().region_info(index)

    def irq_info(self, index: int) -> IrqInfo:
        return self.irq.get(index) or super().irq_info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        self.log.append(request)
        self.fail_set_irqs(request)
        return super().set_irqs(request)

    def read(self, index: int, offset: int, length: int) -> bytes:
        self.fail_read(index, offset, length)
        if index == PciRegion.CONFIG and self.dead:
            return b"\xff" * length
        data = super().read(index, offset, length)
        if index == PciRegion.CONFIG and self.overlay:
            return bytes(self.overlay.get(at, byte) for at, byte in enumerate(data, offset))
        return data

    def reset(self) -> None:
        self.on_reset()
        super().reset()

    def say(self) -> list[str]:
        """What it was told since the last look, briefly: ``intx trigger eventfd``."""
        said, self.log = self.log, []
        names = ("intx", "msi", "msix", "err", "req")
        return [
            f"{names[r.index]} disable"
            if r.is_disable
            else f"{names[r.index]} {IrqAction(r.action).name.lower()} {_data(r)}"
            for r in said
        ]

    @property
    def irqs(self) -> Any:
        """The kernel's side of its interrupts."""
        return self._irqs

    @property
    def config(self) -> Any:
        """Its configuration space."""
        return self._config


def _data(request: SetIrqs) -> str:
    if request.data is not IrqData.EVENTFD:
        return request.data.name.lower()
    return "-1" if all(fd < 0 for fd in request.fds) else "eventfd"


class Rigs(Primer):
    """Makes rigs."""

    name = "rigs"
    types: Sequence[MdevType] = (Primer.TYPE,)

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Rig] = []
        self.prepare: Callable[[Rig], None] = lambda rig: None
        self.granted: int | None = None
        self.msix = 0
        self.resizable = False

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PrimerDevice:
        rig = Rig.__new__(Rig)
        rig.prepare()
        Rig.__init__(
            rig, host, memory=1 << 16, vectors=4, granted=self.granted, msix=self.msix, resizable=self.resizable
        )
        self.prepare(rig)
        self.made.append(rig)
        return rig


class Bell:
    """An eventfd of the hypervisor."""

    def __init__(self, number: int | None = None, *, flags: int = os.EFD_NONBLOCK) -> None:
        self.fd = FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | flags) if number is None else number)

    @property
    def number(self) -> int:
        return self.fd.number

    def rung(self) -> int:
        """How often since the last look."""
        try:
            return os.eventfd_read(self.number)
        except BlockingIOError:
            return 0

    def ring(self, count: int = 1) -> None:
        os.eventfd_write(self.number, count)


class World:
    """A machine and one session."""

    def __init__(self, syscalls: Syscalls | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.hub = EventHub(self.loop.call_later)
        self.events: list[Event] = []
        self.hub.subscribe(self.events.append)
        self.emitted: list[EventData] = []
        emit = self.hub.emit

        def tee(data: EventData) -> None:
            self.emitted.append(data)
            emit(data)

        self.hub.emit = tee  # type: ignore[method-assign]  # what was meant, before rate limits
        self.machine = Machine("test", hub=self.hub, allow_open=syscalls is not None, syscalls=syscalls)
        self.rigs = Rigs()
        self.machine.mdevs.register(self.rigs)
        self.names = FdNames(kind_of)
        self.bells: list[Bell] = []
        self.gates: list[threading.Event] = []
        self.attached: list[Bell] = []
        self.session: Any = SimpleNamespace(id=1, names=self.names)

    # --- commands ---

    async def command(self, name: str, *, oob: bool = False, **arguments: Any) -> Any:
        """One command as the dispatcher runs it. The reply's fds are in ``attached`` afterwards."""
        call = Call(self.machine, cast("Any", None), self.session, oob)
        spec = COMMANDS[name]
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            result = HANDLERS[spec.arguments](call, decode_arguments(spec, msgspec.json.encode(given)))
            if isinstance(result, Awaitable):
                # Nothing is waited for on the loop: a device that may wait answers when it does.
                waits = not oob or self.machine.device(str(given.get("device"))).waits
                assert waits, "an out-of-band command must answer at once"
                result = await result
        except BaseException:
            call.fail()
            raise
        self.attached = [Bell(fd.give_away()) for fd in call.succeed() or ()]
        self.bells += self.attached
        return result

    async def add(self, id: str = "n0", *, prepare: Callable[[Rig], None] | None = None, **more: Any) -> Rig:
        """Make and add a rig; it has been told nothing yet as far as its log says."""
        if prepare is not None:
            self.rigs.prepare = prepare
        uuid = await self.machine.mdevs.create("rigs", "primer-pci")
        await self.command("device_add", driver="vfio-pci", id=id, mdev=uuid, **more)
        rig = self.rigs.made[-1]
        rig.log.clear()
        return rig

    def bell(self, name: str | None = None, *, flags: int = os.EFD_NONBLOCK) -> Bell:
        """An eventfd; with a name, a duplicate of it is sent and named."""
        bell = Bell(flags=flags)
        self.bells.append(bell)
        if name is not None:
            self.send(name, bell.fd)
        return bell

    def send(self, name: str, fd: FileDescriptor) -> None:
        self.names.receive([fd.duplicate()])
        self.names.name(name)

    def gate(self) -> threading.Event:
        """Something for a worker to wait at; opened at the end at the latest."""
        gate = threading.Event()
        self.gates.append(gate)
        return gate

    async def irq(self, index: str = "intx", device: str = "n0") -> Any:
        """What query-irqs says of an index."""
        infos = await self.command("query-irqs", device=device)
        return next(info for info in infos if info.name == index)

    async def region(self, name: str, device: str = "n0") -> Any:
        """What query-regions says of a region."""
        infos = await self.command("query-regions", device=device)
        return next(info for info in infos if info.name == name)

    def told(self, *kinds: type[EventData]) -> list[EventData]:
        """The events of these kinds that were meant so far, before rate limits."""
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
        for gate in self.gates:
            gate.set()
        self.names.close()
        for bell in self.bells:
            bell.fd.close()
        await self.machine.close()


Scenario = Callable[[World], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play() -> Iterator[Play]:
    """Play a scenario in a world of its own; afterwards nothing of it may be left."""

    def run(scenario: Scenario, *, syscalls: Syscalls | None = None) -> None:
        play_in(lambda: World(syscalls), scenario)

    return run  # type: ignore[return-value]
