"""Resets that reach more than one device: the hot reset of a bus or slot, and the machine's own.

A hot reset is one transaction in a turn of the ``topology`` lane: no device comes or goes meanwhile, a function of the
reset domain that is being added waits. It is judged first (:mod:`vfiod.server.backends.hot_reset`), and a refusal
touches nothing. Then every affected device of the machine, in a turn of its own lane, drops its interrupts and its
bus mastering; the bus is reset once; and each is restored, whatever the others come to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.reset import HotResetReport
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import CommandError, DeviceNotActive, InvalidArgument, PermissionRefused
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.backends.base import Backend
from vfiod.server.backends.cdev import KernelCdev
from vfiod.server.backends.hot_reset import Held, Lent, Surroundings, Verdict, judge, look_at_lent
from vfiod.server.devices.device import Device, Quiesced
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import Sysfs
from vfiod.server.lanes import Lane, Turn
from vfiod.server.logs import about
from vfiod.server.machine.lifecycle import Devices
from vfiod.server.machine.sources import Sources

__all__ = ["Resets"]

T = TypeVar("T")

_log: Final = logging.getLogger(__name__)


class Resets:
    """The machine's resets. All methods are called on the loop.

    Args:
        calls: the system calls.
        executor: the machine's threads, for looking.
        topology: the lane in which devices come and go.
        devices: the machine's.
        sources: where they come from.

    """

    def __init__(self, calls: Syscalls, executor: Executor, topology: Lane, devices: Devices, sources: Sources) -> None:
        self._calls = calls
        self._sysfs = Sysfs(calls)
        self._executor = executor
        self._topology = topology
        self._devices = devices
        self._sources = sources
        # What the kernel said of devices that are in a hot reset: until it is over, asking it again would wait.
        self._under_way: dict[str, vfio.HotResetInfo] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop keeps only weak references

    # --- looking: never in a lane, so that it answers at once ---------------------------------------------

    async def query(self, name: str) -> HotResetReport:
        """Whether a hot reset of this device would be done, and what it would touch. Waits for nothing.

        Raises DeviceNotFound, DeviceNotActive. What the kernel refuses to say is the report's reason.
        """
        device = self._devices.get(name)
        backend = device.backend
        if not device.hot_resettable:
            return HotResetReport(possible=False, reason=_no_hot_reset(device), affected=[])
        around = self._surroundings({})
        try:
            verdict = await self._in_thread(lambda: self._judge(device.name, backend, around))
        except CommandError as error:
            if not device.realized:
                raise DeviceNotActive(f"Device '{name}' was removed meanwhile") from error
            return HotResetReport(possible=False, reason=str(error), affected=[])
        return verdict.report

    async def domains(self) -> dict[str, HotResetReport]:
        """What a hot reset of each device would touch, by its name; those that cannot be hot reset are left out."""
        opened = [
            (device.name, device.backend) for device in self._devices.all() if device.realized and device.hot_resettable
        ]
        around = self._surroundings({})

        def look() -> dict[str, HotResetReport]:
            found = {}
            for name, backend in opened:
                try:
                    found[name] = self._judge(name, backend, around).report
                except CommandError:
                    continue
            return found

        return await self._in_thread(look)

    def _surroundings(self, lent: dict[int, Lent]) -> Surroundings:
        """Everything but the drivers, on the loop."""
        lingering = frozenset(self._sources.lingering())
        return Surroundings(
            held=tuple(_held(one.name, one.backend) for one in self._devices.all() if one.realized),
            groups=frozenset(number for one in self._sources.containers() for number in one.groups),
            lingering=lingering,
            lent=lent,
        )

    def _judge(self, name: str, backend: Backend, around: Surroundings) -> Verdict:
        """Ask the kernel and sysfs. Blocks. Raises OperationFailed: the device has no hot reset."""
        try:
            info = self._under_way.get(name) or backend.hot_reset_info()
        except ValueError as error:  # its fd was closed in this moment
            raise DeviceNotActive(f"Device '{name}' was removed meanwhile") from error
        drivers = {}
        virtual = frozenset(one.address for one in info.devices if self._sysfs.is_virtual_function(one.address))
        for function in info.devices:
            known, driver = self._driver(function.address)
            if known:
                drivers[function.address] = driver
        whole = Surroundings(around.held, around.groups, around.lingering, around.lent, drivers, virtual)
        return judge(_held(name, backend), info, whole)

    def _driver(self, address: str) -> tuple[bool, str | None]:
        if not self._sysfs.readable:
            return False, None
        try:
            return True, self._sysfs.find(host=address, sysfsdev=None).driver
        except CommandError:
            return False, None

    # --- hot reset ------------------------------------------------------------------------------------------

    def hot_reset(
        self, name: str, group_fds: Sequence[FileDescriptor], *, force: bool = False
    ) -> Awaitable[HotResetReport]:
        """Reset the bus or slot of a device, with everything on it; goes on to its end when the caller is gone.

        Args:
            name: the device's.
            group_fds: groups lent for the call; taken over, and closed when it ends.
            force: also when a device that it reaches belongs to the client of an export.

        Raises:
            DeviceNotFound, DeviceNotActive, InvalidArgument, PermissionRefused, Busy: refused, and nothing was touched.
            OperationFailed: the kernel refused or failed; every device is as it was.
            CommandError: the reset was done, and some device did not come back as it was.

        """

        async def work() -> HotResetReport:
            try:
                return await self._hot_reset(name, group_fds, force)
            finally:
                close_all(group_fds)

        return asyncio.shield(self._own(work()))

    async def _hot_reset(self, name: str, group_fds: Sequence[FileDescriptor], force: bool) -> HotResetReport:
        self._devices.get(name)
        async with self._topology.turn(f"hot-reset {name}") as turn:
            device = self._devices.get(name)
            backend = device.backend
            if not device.hot_resettable:
                raise CommandError(_no_hot_reset(device), errno="EOPNOTSUPP")
            if group_fds and isinstance(backend, KernelCdev):
                raise InvalidArgument(
                    f"Parameter 'group-fds' is for devices of a group: '{name}' was added by its cdev, and the two do "
                    "not mix"
                )
            lent = await turn.run(lambda: look_at_lent(self._calls, group_fds))
            around = self._surroundings(lent)
            verdict = await turn.run(lambda: self._judge(device.name, backend, around))
            if verdict.report.reason is not UNSET:
                raise PermissionRefused(f"Device '{name}' is not hot reset: {verdict.report.reason}", errno="EPERM")
            strangers = sorted(lent.keys() - set(verdict.groups))
            if strangers:
                raise InvalidArgument(
                    f"Parameter 'group-fds': the reset of '{name}' does not reach group "
                    f"{', '.join(map(str, strangers))}: lend only groups that query-hot-reset names"
                )
            for affected in verdict.devices:
                self._devices.get(affected).check_unclaimed(f"hot-reset of device '{name}'", force=force)
            await self._carry_out(turn, backend, verdict, lent)
        return verdict.report

    async def _carry_out(self, turn: Turn, backend: Backend, verdict: Verdict, lent: dict[int, Lent]) -> None:
        """Quiesce all, reset once, restore all. In a turn of the topology lane."""
        fds = self._fds(verdict, lent)
        failure: Exception | None = None
        quiesced: list[tuple[Device, Turn, Quiesced]] = []
        async with AsyncExitStack() as stays:
            turns = []
            for name in verdict.devices:
                device = self._devices.get(name)
                turns.append((device, await stays.enter_async_context(device.lane.turn("hot-reset"))))
            self._under_way = dict.fromkeys(verdict.devices, verdict.info)
            try:
                for device, own in turns:
                    quiesced.append((device, own, await device.quiesce(own, "hot")))
                await turn.run(lambda: backend.hot_reset(fds))
            except Exception as error:  # noqa: BLE001 - every device is revived first, then it is raised
                failure = error
            self._under_way = {}
            troubles = await _revive(quiesced, failure)
        if failure is not None:
            raise failure
        if troubles:
            raise CommandError(
                f"The bus was reset, but not every device came back as it was: {'; '.join(troubles)}", errno="EIO"
            )

    def _fds(self, verdict: Verdict, lent: dict[int, Lent]) -> list[int]:
        """The fds of every affected group: the one held here, else the one that was lent."""
        fds = []
        for number in verdict.groups:
            own = self._sources.groups.group_fd(number)
            fds.append(lent[number].fd.number if own is None else own)
        return fds

    # --- the machine's reset ----------------------------------------------------------------------------------

    def system_reset(self, *, force: bool = False) -> Awaitable[None]:
        """Reset every device that can be reset; goes on to its end when the caller is gone.

        Those that have no reset of their own come first, each bus once; then the others. One that can be reset in
        neither way is passed over, as hardware does. Raises Busy, before anything is touched, when one that would be
        reset belongs to the client of an export, unless forced; CommandError that names the devices whose reset failed.
        """
        return asyncio.shield(self._own(self._system_reset(force)))

    async def _system_reset(self, force: bool) -> None:
        failed: dict[str, str] = {}
        tried: set[str] = set()
        async with self._topology.turn("system_reset") as turn:
            devices = [device for device in self._devices.all() if device.realized]
            for device in devices:
                if device.claim is not None and not force and await self._would_reset(device, turn):
                    device.check_unclaimed("system_reset", force=False)
            for device in devices:
                if not device.can_reset and device.name not in tried:
                    await self._reset_bus_of(device, turn, tried, failed)
            alone = [device for device in devices if device.can_reset and device.name not in tried]
            results = await asyncio.gather(*(device.reset() for device in alone), return_exceptions=True)
        for device, result in zip(alone, results, strict=True):
            tried.add(device.name)
            if isinstance(result, CommandError):
                failed[device.name] = str(result)
            elif isinstance(result, BaseException):
                raise result
        if failed:
            raise CommandError(
                f"{len(failed)} of {len(tried)} devices could not be reset, the others were: "
                + "; ".join(f"device '{name}': {why}" for name, why in failed.items())
            )

    async def _would_reset(self, device: Device, turn: Turn) -> bool:
        """Whether a reset of the machine resets this device: by itself, or with its bus."""
        if device.can_reset or not device.hot_resettable:
            return device.can_reset
        backend, around = device.backend, self._surroundings({})
        try:
            verdict = await turn.run(lambda: self._judge(device.name, backend, around))
        except CommandError:
            return False
        return verdict.report.possible

    async def _reset_bus_of(self, device: Device, turn: Turn, tried: set[str], failed: dict[str, str]) -> None:
        """Hot reset the bus of a device that cannot be reset alone, with what else is on it."""
        if not device.hot_resettable:
            _log.info(
                "system_reset passes over device %s, which cannot be reset",
                device.name,
                extra=about(device=device.name),
            )
            return
        backend = device.backend
        around = self._surroundings({})
        try:
            verdict = await turn.run(lambda: self._judge(device.name, backend, around))
        except CommandError as error:
            _log.info(
                "system_reset passes over device %s, which can be reset in no way: %s",
                device.name,
                error,
                extra=about(device=device.name),
            )
            return
        if not verdict.report.possible:
            _log.warning(
                "system_reset passes over device %s: %s",
                device.name,
                verdict.report.reason,
                extra=about(device=device.name),
            )
            return
        tried.update(verdict.devices)
        try:
            await self._carry_out(turn, backend, verdict, {})
        except CommandError as error:
            failed[device.name] = str(error)

    # --- inside -----------------------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked has it, or is gone

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, work)


async def _revive(quiesced: Sequence[tuple[Device, Turn, Quiesced]], failure: Exception | None) -> list[str]:
    """Bring every one of them back, the last first; what goes wrong with one keeps no other from it."""
    troubles, defects = [], []
    for device, own, one in reversed(quiesced):
        try:
            await device.revive(own, one, failure)
        except CommandError as error:
            if error is not failure:
                _log.error(
                    "Device %s did not come back from a hot reset as it was: %s",
                    device.name,
                    error,
                    extra=about(device=device.name),
                )
                troubles.append(f"device '{device.name}': {error}")
        except Exception as error:  # noqa: BLE001 - raised when all are back
            defects.append(error)
    if failure is None and defects:
        raise defects[0]
    return troubles


def _no_hot_reset(device: Device) -> str:
    return (
        f"Device '{device.name}' cannot be hot reset: that is for PCI devices, and driver {device.driver} has no bus "
        "reset that others share; device-reset resets it where the host can"
    )


def _held(name: str, backend: Backend) -> Held:
    if isinstance(backend, KernelCdev):
        return Held(name, backend.name, iommufd=backend.iommufd.object_id, devid=backend.devid)
    group = backend.group
    return Held(name, backend.name, group=None if group is None else group.id)
