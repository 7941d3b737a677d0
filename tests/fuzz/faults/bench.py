"""A machine on the model of the kernel, with two sessions; and a picture of all there is to see of it.

The picture (:meth:`Bench.picture`) has what every ``query-`` command says, this process's fds and mappings of files,
and what the kernel, the mediated devices and the other programs see. Fd numbers, clocks and addresses are left out.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from tests.unit.server.fake_device import REGION_SHIFT, FakeDevice
from tests.unit.server.fake_kernel import FakeKernel
from tests.unit.server.fake_platform import FakePlatformDevice

from vfiod.protocol import vfio
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.declare import COMMANDS
from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceUnplugError
from vfiod.protocol.catalogue.monitor import RunState, StatusInfo
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server.commands.call import Call
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.fds import FdNames
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine import Machine

__all__ = ["Bench", "open_fds"]

PATIENCE = 120.0
"""Seconds that nothing takes; when they are over, something hangs."""

_VOLATILE = frozenset({"number", "seq", "uptime-seconds", "events", "events-suppressed", "requests", "errors"})
"""What differs from run to run, or with every event or request (events are compared by themselves)."""

_LOOKED_AT = tuple(
    name
    for name, spec in COMMANDS.items()
    if name.startswith("query-") and name not in ("query-commands", "query-qmp-schema", "query-version", "query-crw")
)
_PER_DEVICE = ("query-hot-reset", "query-subchannel")

Picture = dict[str, Any]


class _Log(logging.Handler):
    """Keeps what tells of a defect: a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.defects: list[str] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info is not None:
            self.defects.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


class Bench:
    """One machine. Made inside a running loop.

    Attributes:
        kernel: the model of the kernel.
        bells: eventfds that the hypervisor holds, by name.
        replies: fds that came with the last reply.
        notes: what an operation's preparation leaves for its run.

    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.hub = EventHub(self.loop.call_later)
        self.told: list[EventData] = []
        self._news = asyncio.Event()
        emit = self.hub.emit

        def tee(data: EventData) -> None:
            self.told.append(data)
            self._news.set()
            emit(data)

        self.hub.emit = tee  # type: ignore[method-assign]  # what was meant, before rate limits
        self.kernel = FakeKernel()
        self.machine = Machine("test", hub=self.hub, syscalls=self.kernel)
        names = FdNames(lambda fd: self.kernel.kind(fd) or kind_of(fd))
        self.names = names
        self.session: Any = SimpleNamespace(id=1, names=names, allows=lambda _: True)
        self.server: Any = SimpleNamespace(
            status=StatusInfo(running=True, status=RunState.RUNNING),
            session_infos=list,
            session_stats=list,
            fd_infos=lambda: names.infos("session:1"),
            audited=lambda *_: None,
        )
        self.bells: dict[str, FileDescriptor] = {}
        self.replies: list[FileDescriptor] = []
        self.kept: list[FileDescriptor] = []
        self.notes: dict[str, Any] = {}
        self.closers: list[Callable[[], Any]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="vfiod-faults-")
        self.troubles: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self.troubles.append(f"{context}"))
        self.log = _Log()
        logging.getLogger("vfiod").addHandler(self.log)

    # --- commands -------------------------------------------------------------------------------------

    async def command(self, name: str, **arguments: Any) -> Any:
        """One command as the dispatcher runs it; names are consumed when it succeeds."""
        call = Call(self.machine, self.server, cast("Any", self.session))
        try:
            spec = COMMANDS[name]
            given = {key.replace("_", "-"): value for key, value in arguments.items()}
            call.arguments = decode_arguments(spec, msgspec.json.encode(given))
            result = TABLE[name](call, call.arguments)
            if isinstance(result, Awaitable):
                result = await asyncio.wait_for(result, PATIENCE)
        except BaseException:
            call.fail()
            raise
        close_all(self.replies)
        self.replies = call.succeed() or []
        return result

    async def delete(self, id: str = "d0", **more: Any) -> None:
        """``device_del``, and what comes of it."""
        before = len(self.heard(DeviceDeleted, DeviceUnplugError))
        await self.command("device_del", id=id, **more)
        await self.until(lambda: len(self.heard(DeviceDeleted, DeviceUnplugError)) > before)
        if isinstance(self.heard(DeviceDeleted, DeviceUnplugError)[-1], DeviceUnplugError):
            raise CommandError("The device stays")

    def name_fd(self, name: str, number: int) -> None:
        """Send an fd and name it; it is taken over. Named already, it is not sent again."""
        if self.names.look(name) is not None:
            os.close(number)
            return
        self.names.receive([FileDescriptor(number)])
        self.names.name(name)

    def name_opened(self, name: str, path: str) -> None:
        """Do as a manager: open a file of the kernel and pass it on."""
        if self.names.look(name) is None:
            self.name_fd(name, self.kernel.open(path))

    def name_memory(self, name: str, size: int = 1 << 20) -> None:
        """Send a memfd and name it."""
        if self.names.look(name) is None:
            number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(number, size)
            self.name_fd(name, number)

    def name_bell(self, name: str) -> None:
        """An eventfd of the hypervisor, of which a duplicate is sent and named."""
        if name not in self.bells:
            self.bells[name] = FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.name_fd(name, os.dup(self.bells[name].number))

    def rung(self, name: str) -> int:
        """How often since the last look."""
        try:
            return os.eventfd_read(self.bells[name].number)
        except BlockingIOError:
            return 0

    def heard(self, *kinds: type[EventData]) -> list[EventData]:
        """The events of these kinds so far."""
        return [data for data in self.told if isinstance(data, kinds)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something holds."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.0005)

    async def settle(self) -> None:
        """Wait until nothing is under way: lanes, and what the loop was called for."""
        await asyncio.wait_for(self.machine.topology.idle(), PATIENCE)
        for device in self.machine.devices.all():
            await asyncio.wait_for(device.lane.idle(), PATIENCE)
        for _ in range(4):
            await asyncio.sleep(0)
        if "settled" in self.notes:
            await self.until(self.notes["settled"])

    # --- the picture ----------------------------------------------------------------------------------

    async def picture(self) -> Picture:
        """All there is to see, from outside and from inside."""
        await self.settle()
        seen: Picture = {}
        for name in _LOOKED_AT:
            if name in _PER_DEVICE:
                for device in self.machine.devices.all():
                    seen[f"{name} {device.name}"] = await self._look(name, device=device.name)
            elif name == "query-stats":
                seen[name] = await self._look(name, target="vm"), await self._look(name, target="device")
            else:
                seen[name] = await self._look(name)
        for index, parent in enumerate(self.notes.get("parents", ())):
            seen[f"parent {index}"] = parent()
        seen["kernel"] = self._kernel()
        seen["mappings"] = _mappings()
        seen["fds"] = _fds()
        return seen

    async def _look(self, name: str, **arguments: Any) -> Any:
        try:
            return self._ranked(_plain(msgspec.to_builtins(await self.command(name, **arguments))))
        except CommandError as error:
            return f"{type(error).__name__}: {error}"

    def _ranked(self, value: Any) -> Any:
        """Containers by their rank: a number that was given once is not given again."""
        ranks = {one.id: rank for rank, one in enumerate(self.machine.sources.containers())}

        def rank(one: Any, key: str = "") -> Any:
            if isinstance(one, dict):
                return {name: rank(part, name) for name, part in one.items()}
            if isinstance(one, list):
                return [rank(part, key) for part in one]
            if isinstance(one, int) and key == "container":
                return ranks.get(one, one)
            if isinstance(one, str) and one.startswith("container:"):
                return f"container:{ranks.get(int(one[10:]), one)}"
            return one

        return rank(value)

    def _kernel(self) -> Any:
        self.kernel._reap()
        return {
            "devices": {name: _device(device) for name, device in self.kernel.devices.items()},
            "groups": {
                number: (group.inode is not None, group.container is not None)
                for number, group in self.kernel.groups.items()
            },
            "containers": [
                (one.iommu, [group.number for group in one.groups], _spans(one.mappings))
                for one in self.kernel.containers()
            ],
            "iommufds": [
                [
                    (number, "device" if isinstance(thing, FakeDevice) else _ioas(thing))
                    for number, thing in sorted(one.objects.items())
                ]
                for one in self.kernel.iommufds()
            ],
        }

    # --- the end --------------------------------------------------------------------------------------

    async def end(self) -> list[str]:
        """Close everything; what is left, in sentences."""
        for close in reversed(self.closers):
            done = close()
            if isinstance(done, Awaitable):
                await done
        self.names.close()
        close_all(self.replies)
        close_all(self.kept)
        close_all(self.bells.values())
        problems = list(await asyncio.wait_for(self.machine.close(), PATIENCE))
        self.folder.cleanup()
        if not self.kernel.nothing_is_open():
            problems.append("something of the kernel is open after the end")
        logging.getLogger("vfiod").removeHandler(self.log)
        gc.collect(0)
        return problems + self.troubles


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and "iommu" in value and "groups" in value:
        return {key: one for key, one in value.items() if key != "id"}  # a container, listed in order
    if isinstance(value, dict):
        if value.get("name") in _VOLATILE and "value" in value:
            return None
        return {key: _plain(one) for key, one in value.items() if key not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return _INODE.sub("N", value) if isinstance(value, str) and "vfiod-faults-" in value else value


def _spans(mappings: Any) -> list[Any]:
    return sorted((iova, size, int(flags)) for iova, (size, _, flags) in mappings.items())


def _ioas(ioas: Any) -> Any:
    mapped = sorted((iova, one.size, int(one.flags), one.by_file) for iova, one in ioas.mappings.items())
    return mapped, [device.name for device in ioas.devices]


def _device(device: FakeDevice) -> Any:
    if device.opened:
        device.poll()
    common = {
        "opened": device.opened,
        "resets": device.resets,
        "hot resets": device.hot_resets,
        "token": device.vf_token,
        "features": dict(device.feature_values),
    }
    if isinstance(device, FakePlatformDevice):
        lines = [(one.trigger is not None, one.virqfd is not None, one.masked) for one in device.lines]
        return common | {"lines": lines if device.opened else []}
    config = b""
    if device.opened:
        config = os.pread(device.fd, 256, vfio.PciRegion.CONFIG << REGION_SHIFT)
    return common | {
        "mode": device.mode,
        "triggers": [one is not None for one in device.triggers] if device.mode is not None else [],
        "single": sorted(device.single),
        "unmask": device.unmask is not None,
        "masked": device.masked,
        "config": config.hex(),
    }


_INODE = re.compile(r"\[\d+\]|\d{6,}|/proc/\d+|vfiod-faults-\w+")


def _fds() -> Counter[str]:
    """This process's fds by what they are."""
    gc.collect(0)
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[_INODE.sub("N", os.readlink(f"/proc/self/fd/{name}"))] += 1
        except OSError:
            continue  # listdir's own
    return found


def open_fds() -> Counter[str]:
    """This process's fds by what they are, after all that nobody holds is gone."""
    gc.collect()
    return _fds()


def _mappings() -> Counter[tuple[int, str, str]]:
    """Mappings of files that programs share: size, protection, file."""
    found: Counter[tuple[int, str, str]] = Counter()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, mode, _, _, _, *path = line.split(maxsplit=5)
            if path and path[0].startswith("/memfd:"):
                low, high = (int(part, 16) for part in span.split("-"))
                found[high - low, mode, path[0].strip()] += 1
    return found
