r"""Devices come and go: adding with complete unwinding, removing with exactly one event.

Everything here runs on the event loop's thread; what blocks runs in a thread, inside a turn of the ``topology`` lane.

::

    add     reserved (realizing) --- realized, started ---> running      DEVICE_ADDED
                       \--- any failure ---> nothing
    remove  running ---> unplugging --- nobody holds it, or forced ---> closed   DEVICE_DELETED, once
                               \--- held when the time is over ---> running      DEVICE_UNPLUG_ERROR
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field

from vfiod.protocol.catalogue.devices import (
    Check,
    DeviceAdded,
    DeviceDeleted,
    DeviceUnplugError,
    Driver,
    Holder,
    OnRequest,
)
from vfiod.protocol.catalogue.words import UNSET, DeviceState, UnsetType
from vfiod.protocol.errors import CommandError, DeviceNotActive, DeviceNotFound
from vfiod.protocol.limits import DEFAULT_UNPLUG_TIMEOUT_MS, MAX_DEVICES
from vfiod.server import trace
from vfiod.server.events import EventHub
from vfiod.server.lanes import Lane, Turn
from vfiod.server.logs import about
from vfiod.server.machine.ending import Ending
from vfiod.server.machine.environment import AnyThreadEnvironment, LoopEnvironment
from vfiod.server.onloop import OnLoop

if TYPE_CHECKING:  # later: see Machine
    from vfiod.server.backends.base import Backend
    from vfiod.server.devices.device import Device
    from vfiod.server.devices.environment import Environment
    from vfiod.server.devices.model import Options
    from vfiod.server.devices.regions import Region
    from vfiod.server.machine.completion import Completion
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import BackendState
    from vfiod.server.state.machine import DeviceState as DeviceState_

__all__ = ["Devices", "NewDevice"]

_log: Final = logging.getLogger(__name__)

PERIPHERAL: Final = "/machine/peripheral/"
ANONYMOUS: Final = "/machine/peripheral-anon/device[{}]"


class NewDevice(Struct, frozen=True):
    """What ``device_add`` asked for, checked.

    Attributes:
        id: the user's; ``""`` for none.
        driver: which model it is.
        backend_kind: ``kernel-group`` or ``mdev``.
        host: host address or UUID, when known before it is open.
        options: properties of the device model.
        on_request_timeout_ms: with ``on-request=delete``, how long holders are waited for.
        in_workers: its backend may wait for another program: whatever is done to it is done in a worker's thread.
        open: opens it for a user (its id or path). Blocks; in a worker's thread; takes the origin's fds over,
            whatever comes of it, and unwinds itself on failure.
        discard: closes the origin's fds, when it does not come to ``open``.

    """

    id: str
    driver: Driver
    backend_kind: str
    host: str | None
    options: Options
    open: Callable[[str], Backend]
    discard: Callable[[], None]
    on_request_timeout_ms: int = DEFAULT_UNPLUG_TIMEOUT_MS
    in_workers: bool = False


class _Unplug(Struct, eq=False):
    """One removal that has begun.

    Attributes:
        deadline: of the wait for holders, in the loop's time.
        force: do not wait for holders (any longer).
        insist: when the time is over, force; else give up.
        closing: past the point of return.
        wake: something about it or about the holders has changed.

    """

    deadline: float
    force: bool
    insist: bool
    closing: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class _Added(Struct, eq=False):
    """One device, and what its life needs besides."""

    device: Device
    lane: Lane
    new: NewDevice
    unplug: _Unplug | None = None


class Devices:
    """The machine's devices, by name. A device's name is its id, or its path when it has none.

    Args:
        loop: the machine's event loop.
        hub: the machine's events.
        executor: the machine's threads.
        topology: the lane in which devices come and go.
        on_deleted: called on the loop after each ``DEVICE_DELETED``.

    Attributes:
        completion: how devices are started that are added after the machine was complete; None: it is not yet.
        anonymous: how many devices without an id have been added.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hub: EventHub,
        executor: Executor,
        topology: Lane,
        on_deleted: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._hub = hub
        self._executor = executor
        self._topology = topology
        self._on_deleted = on_deleted
        self._added: dict[str, _Added] = {}  # by name, oldest first
        self._tasks: set[asyncio.Task[Any]] = set()
        self.completion: Completion | None = None
        self.anonymous = 0
        self._refusal: CommandError | None = None
        self.before_close: Callable[[Device], Awaitable[None]] | None = None
        """Awaited before a device is stopped and closed: somebody else may hold its fds. Never raises."""
        self.on_gone: Callable[[str], None] | None = None
        """Called on the loop with the name of each device that is closed, before its ``DEVICE_DELETED``."""

    # --- looking ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._added)

    def get(self, name: str) -> Device:
        """The device with this id or path. Raises DeviceNotFound."""
        return self._find(name).device

    def all(self) -> tuple[Device, ...]:
        """Every device, in the order they were added; those being added too."""
        return tuple(added.device for added in self._added.values())

    def exists(self, name: str) -> bool:
        """Whether a device has this id or path."""
        return self._key(name) in self._added

    # --- adding ---------------------------------------------------------------------------------------

    def add(self, new: NewDevice) -> Awaitable[Device]:
        """Open a device, read what it has, and start it; or leave nothing behind.

        It goes on to its end when the caller is cancelled: the device is the machine's, not the session's. What
        ``new`` holds is taken over on every path.

        Raises CommandError: a duplicate id (QEMU's words) or too many devices, at once; or, when awaited, what
        opening it said.
        """
        try:
            added = self._reserve(new)
        except BaseException:
            new.discard()
            raise
        return asyncio.shield(self._own(self._realize(added)))

    def check(self, id: str) -> tuple[Check, ...]:
        """What a dry run says of the id and the number of devices."""
        named = f"'{id}'" if id else "none; the device would be known by its path"
        taken = bool(id) and id in self._added
        full = len(self._added) >= MAX_DEVICES
        return (
            Check(name="id", ok=not taken, detail=f"Duplicate device ID '{id}'" if taken else f"The id is {named}"),
            Check(name="devices", ok=not full, detail=f"{len(self._added)} of at most {MAX_DEVICES} devices are there"),
        )

    def _reserve(self, new: NewDevice, path: str | None = None) -> _Added:
        if self._refusal is not None:
            raise self._refusal
        if new.id and new.id in self._added:
            raise CommandError(f"Duplicate device ID '{new.id}'")
        if len(self._added) >= MAX_DEVICES:
            raise CommandError(f"This machine has {MAX_DEVICES} devices, no more are allowed: device_del some first")
        if path is not None:
            pass  # it had one in another process
        elif new.id:
            path = PERIPHERAL + new.id
        else:
            path = ANONYMOUS.format(self.anonymous)
            self.anonymous += 1
        name = new.id or path
        from vfiod.server.devices.models import device_class

        lane = Lane(f"device {name}", self._executor)
        device = device_class(new.driver)(
            id=new.id,
            path=path,
            backend_kind=new.backend_kind,
            host=new.host,
            environment=self._environment(new, lane),
            options=new.options,
            on_requested=self._requested,
        )
        added = self._added[name] = _Added(device, lane, new)
        lane.on_idle = lambda: self._wake(added)
        return added

    def _environment(self, new: NewDevice, lane: Lane) -> Environment:
        if new.in_workers:
            return AnyThreadEnvironment(OnLoop(self._loop), self._hub, lane)
        return LoopEnvironment(self._loop, self._hub, lane)

    async def _realize(self, added: _Added) -> Device:
        device = added.device
        taken_over = False

        def open_backend() -> Backend:
            nonlocal taken_over
            taken_over = True
            return added.new.open(device.name)

        def realize() -> None:
            device.realize(open_backend)
            if self._refusal is not None:  # it hung for so long that the machine has ended meanwhile
                device.close()
                raise self._refusal

        try:
            async with self._topology.turn(f"device_add {device.name}") as turn:
                await turn.run(realize)
                try:
                    device.start()
                    if self.completion is not None:
                        self.completion.added(device)
                except BaseException:
                    await self._shut(added, turn)
                    raise
        except BaseException:
            self._forget(added)
            if not taken_over:
                added.new.discard()
            raise
        self._hub.emit(DeviceAdded(device=_id(device), path=device.path))
        if trace.device_realized.on:
            trace.device_realized(device=device.name)
        return device

    # --- over a change of the process: on the loop, which does nothing else meanwhile -------------------

    def keep(self, given: Given, keep_backend: Callable[[Backend, Given], BackendState]) -> list[DeviceState_]:
        """Describe every device. CommandError: one that cannot be."""
        return [self._kept(added, given, keep_backend) for added in self._added.values()]

    def keep_one(self, name: str, given: Given, keep_backend: Callable[[Backend, Given], BackendState]) -> DeviceState_:
        """Describe one device. CommandError: it cannot be."""
        return self._kept(self._added[name], given, keep_backend)

    def _kept(
        self, added: _Added, given: Given, keep_backend: Callable[[Backend, Given], BackendState]
    ) -> DeviceState_:
        from vfiod.server.state.machine import UnplugState

        unplug = added.unplug
        new = {
            "in_workers": added.new.in_workers,
            "on_request_timeout_ms": added.new.on_request_timeout_ms,
            "unplug": None
            if unplug is None
            else UnplugState(
                left_ms=max(0, round((unplug.deadline - self._loop.time()) * 1000)),
                force=unplug.force,
                insist=unplug.insist,
            ),
        }
        device = added.device
        return device.keep(given, new=new, backend=lambda: keep_backend(device.backend, given))

    def adopt(self, new: NewDevice, backend: Backend, state: DeviceState_, taken: Taken) -> None:
        """Have a device again that was open in another process, and listen. CommandError."""
        added = self._reserve(new, state.path)
        try:
            added.device.adopt(backend, state, taken)
            added.device.start_again()
        except BaseException:
            self._forget(added)
            raise
        if state.unplug is not None:
            kept = state.unplug
            self._begin(added, _Unplug(self._loop.time() + kept.left_ms / 1000, force=kept.force, insist=kept.insist))

    # --- removing -------------------------------------------------------------------------------------

    def remove(self, name: str, *, force: bool = False, timeout_ms: int = DEFAULT_UNPLUG_TIMEOUT_MS) -> None:
        """Begin to remove a device; returns at once.

        Ends in one ``DEVICE_DELETED``; or, when somebody still holds it after ``timeout_ms`` and nobody forces, in
        one ``DEVICE_UNPLUG_ERROR``. A second call with ``force`` forces a removal that waits.

        Raises DeviceNotFound; DeviceNotActive while it is being added; CommandError in QEMU's words while it is
        being removed.
        """
        added = self._find(name)
        unplug = added.unplug
        if unplug is not None:
            if not force or unplug.force or unplug.closing:
                raise CommandError(f"Device {added.device.name} is already in the process of unplug")
            unplug.force = True
            unplug.wake.set()
            return
        if added.device.state is DeviceState.REALIZING:
            raise DeviceNotActive(
                f"Device '{added.device.name}' is still being added; wait for device_add's reply, then remove it"
            )
        self._begin(added, _Unplug(self._loop.time() + timeout_ms / 1000, force=force, insist=False))

    def _requested(self, device: Device) -> None:
        """The host wants the device back (REQ). With ``on-request=delete`` it gets it, by force when time is over."""
        added = self._added.get(device.name)
        if added is None or added.new.options.on_request is not OnRequest.DELETE:
            return
        deadline = self._loop.time() + added.new.on_request_timeout_ms / 1000
        if added.unplug is None:
            self._begin(added, _Unplug(deadline, force=False, insist=True))
        elif not added.unplug.insist:
            added.unplug.insist = True
            added.unplug.deadline = min(added.unplug.deadline, deadline)
            added.unplug.wake.set()

    def _begin(self, added: _Added, unplug: _Unplug) -> None:
        added.unplug = unplug
        former, added.device.state = added.device.state, DeviceState.UNPLUGGING
        if added.device.claim is not None:
            added.device.claim.asked_to_go()
        self._own(self._unplug_logged(added, unplug, former))

    async def _unplug_logged(self, added: _Added, unplug: _Unplug, former: DeviceState) -> None:
        try:
            await self._unplug(added, unplug, former)
        except CommandError:
            pass  # the topology lane was closed: the machine ends, and closes the device with all others
        except Exception:  # a defect; whoever asked has had the answer, so the log is the only place for it
            _log.exception(
                "Removing device %s failed by a defect of vfiod",
                added.device.name,
                extra=about(device=added.device.name),
            )
            raise

    async def _unplug(self, added: _Added, unplug: _Unplug, former: DeviceState) -> None:
        device = added.device
        while True:
            holders = await self._wait_for_holders(device, unplug)
            if holders:
                added.unplug = None
                device.state = former
                self._hub.emit(
                    DeviceUnplugError(device=_id(device), path=device.path, msg=_still_held(holders), held_by=holders)
                )
                return
            async with self._topology.turn(f"device_del {device.name}") as turn:
                # Somebody may have come while other work of the topology was waited for.
                if unplug.force or not device.holders():
                    unplug.closing = True
                    added.lane.close(DeviceNotFound.named(device.name))
                    released = await self._shut(added, turn)
                    self._forget(added)
                    self._tell_deleted(device, released)
                    return

    async def _wait_for_holders(self, device: Device, unplug: _Unplug) -> list[Holder]:
        """Wait until nobody holds it, somebody forces, or time is over; who still holds it then."""
        while not unplug.force:
            unplug.wake.clear()
            holders = device.holders()
            if not holders:
                break
            left = unplug.deadline - self._loop.time()
            if left <= 0:
                if not unplug.insist:
                    return holders
                unplug.force = True
                break
            waker = self._loop.call_later(left, unplug.wake.set)
            try:
                await unplug.wake.wait()
            finally:
                waker.cancel()
        return []

    async def _shut(self, added: _Added, turn: Turn) -> bool:
        """Stop and close it, whatever fails on the way. Returns whether the kernel let it go."""
        device = added.device
        if self.before_close is not None:
            await self.before_close(device)
        try:
            device.stop()
        except Exception:  # noqa: BLE001 - what it was is logged; closing goes on
            _log.exception(
                "Stopping device %s failed; it is closed all the same", device.name, extra=about(device=device.name)
            )
        try:
            return await turn.run(device.close)
        except Exception:  # noqa: BLE001 - a removal always ends
            _log.exception("Closing device %s failed", device.name, extra=about(device=device.name))
            return False

    def _tell_deleted(self, device: Device, released: bool) -> None:
        self._hub.emit(DeviceDeleted(device=_id(device), path=device.path, released=released))
        if trace.device_removed.on:
            trace.device_removed(device=device.name, released=released)
        self._on_deleted()

    # --- the rest of the machine ------------------------------------------------------------------------

    def holder_gone(self, name: str) -> None:
        """Somebody who held a device has let go of it: a removal may go on."""
        added = self._added.get(name)
        if added is not None:
            self._wake(added)

    def session_ended(self, session: int) -> None:
        """A monitor session ended: what it mapped no longer holds a device."""
        for added in tuple(self._added.values()):
            added.device.session_ended(session)
            self._wake(added)

    def unmap_region(self, device: Device, region: Region, session: int | None) -> None:
        """A session no longer holds a region of a device. InvalidArgument when it does not hold it."""
        device.unmap_region(region, session)
        added = self._added.get(device.name)
        if added is not None:
            self._wake(added)

    async def close(self, refusal: CommandError, ending: Ending) -> None:
        """Close every device, youngest first, and admit no more. Never raises: ``ending`` notes what goes wrong.

        The topology lane is closed before: who waited there is refused, who works there has ended or is stuck.
        """
        self._refusal = refusal
        for added in self._added.values():
            if added.unplug is not None:  # it no longer waits for holders: it is refused its turn, and ends
                added.unplug.force = True
                added.unplug.wake.set()
        await ending.wait(*self._tasks)
        for added in reversed(tuple(self._added.values())):
            await self._end(added, refusal, ending)

    async def _end(self, added: _Added, refusal: CommandError, ending: Ending) -> None:
        device = added.device
        added.lane.close(refusal)
        if not await ending.wait(added.lane.idle()):
            ending.note(f"Device {device.name}: {added.lane.current} is still running; it is closed all the same")
        try:
            device.stop()
        except Exception as error:  # noqa: BLE001 - closing goes on
            _log.exception("Stopping device %s failed", device.name, extra=about(device=device.name))
            ending.note(f"Stopping device {device.name} failed: {error}")
        closing = self._loop.run_in_executor(self._executor, device.close)
        released = await ending.step(f"Closing device {device.name}", closing)
        self._forget(added)
        self._tell_deleted(device, bool(released))

    # --- inside -----------------------------------------------------------------------------------------

    @staticmethod
    def _key(name: str) -> str:
        return name.removeprefix(PERIPHERAL)

    def _find(self, name: str) -> _Added:
        added = self._added.get(self._key(name))
        if added is None:
            raise DeviceNotFound.named(name)
        return added

    def _forget(self, added: _Added) -> None:
        added.lane.on_idle = None
        added.lane.close(DeviceNotFound.named(added.device.name))
        self._added.pop(added.device.name, None)
        if self.on_gone is not None:
            self.on_gone(added.device.name)

    @staticmethod
    def _wake(added: _Added) -> None:
        if added.unplug is not None:
            added.unplug.wake.set()

    def _own(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of the machine's own: it goes on when the session that asked for it is gone."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_swallow)
        return task


def _id(device: Device) -> str | UnsetType:
    return device.id or UNSET


def _still_held(holders: list[Holder]) -> str:
    return "The device is still held by " + ", ".join(f"{one.kind} ({one.detail})" for one in holders)


def _swallow(work: asyncio.Future[Any]) -> None:
    """Whoever asked has heard it, or is gone."""
    if not work.cancelled():
        work.exception()
