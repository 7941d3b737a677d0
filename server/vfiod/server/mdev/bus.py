"""The mediated bus: parents, their devices, and the drivers that use them.

A device's life, and what may come in between (behaviour: section 8 of the reference)::

    mdev-create    name reserved, instance counted        loop     a second one with this UUID is refused from here on
                   parent.create                          worker   in the parent's own lane
                   group made, driver.probe               worker   failing unwinds: driver, group, parent.destroy
                   visible                                loop     unless the parent was unregistered meanwhile
    device_add     acquire: one user at a time
    mdev-destroy   refused while it has a user
                   hidden, driver.remove                  worker
                   parent.destroy; refused: back to visible
                   group and name free, MDEV_REMOVED      loop

Every parent has a lane of its own: a slow one holds nobody up but itself, and one that hangs is given up after a time
(``calls``). ``start`` and ``shutdown`` take the lanes of all parents that have devices (``starting``).
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.mediated import MdevInfo, MdevRemoved, MdevTypeInfo
from vfiod.protocol.catalogue.words import UUID_PATTERN
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, DeviceNotFound, InvalidArgument, OperationFailed
from vfiod.protocol.limits import MDEV_CALL_MS
from vfiod.server import trace
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.mdev.calls import guarded
from vfiod.server.mdev.discovery import Discovery, find_type
from vfiod.server.mdev.instance import Instance, MdevDriver, MdevHost
from vfiod.server.mdev.leaving import Leaving
from vfiod.server.mdev.parent import ENTRY_POINTS, MdevType, Parent, Saved
from vfiod.server.mdev.registered import CallLimits, Registered, info_of
from vfiod.server.mdev.starting import Starting

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import KeepEach, MdevState

__all__ = ["BUILT_IN", "MdevBus"]

_log: Final = logging.getLogger(__name__)

BUILT_IN: Final[Mapping[str, str]] = {
    "primer": "vfiod.server.mdev.samples.pci:Primer",
    "platform": "vfiod.server.mdev.samples.platform:Platform",
    "serial": "vfiod.server.mdev.samples.serial:Serial",
    "fba": "vfiod.server.mdev.samples.fba:Fba",
    "terminal3270": "vfiod.server.mdev.samples.terminal:Terminal",
    "matrix": "vfiod.server.mdev.samples.ap:Matrix",
}
"""The parents that come with vfiod. Imported when somebody first looks for parents."""

PATIENCE: Final = 1.0
"""Seconds that ``unregister`` waits for users after asking for the devices, before it takes them."""

T = TypeVar("T")


class MdevBus:
    """Keeps parents and mediated devices.

    Called on the loop's thread, except where it says otherwise. What a method has begun it finishes, even when its
    caller is cancelled meanwhile: a session that ends leaves no half-made device.

    Args:
        emit: sends an event.
        executor: the machine's pool of threads.
        built_in: parents to load at :meth:`discover`, ``name: "module:attribute"``.
        entry_points: the group of entry points to load parents from; None: none.
        call_limit_s: seconds after which a call into a parent is given up.

    """

    def __init__(
        self,
        *,
        emit: Callable[[EventData], None],
        executor: Executor,
        built_in: Mapping[str, str] = BUILT_IN,
        entry_points: str | None = ENTRY_POINTS,
        call_limit_s: float = MDEV_CALL_MS / 1000,
    ) -> None:
        self._emit = emit
        self._executor = executor
        self._parents: dict[str, Registered] = {}
        self._leaving: set[str] = set()
        self._names: set[str] = set()
        self._groups: set[int] = set()
        self._drivers: list[MdevDriver] = []
        # Visible devices. The lock makes "who has it" one decision: acquire and release come from workers too.
        self._visible: dict[str, Instance] = {}
        self._lock = threading.Lock()
        self._limits = CallLimits(threading.get_ident(), call_limit_s)
        self._starting = Starting(self._parents, emit)
        self._discovery = Discovery(built_in, entry_points, executor, self._limits, self._admit)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # --- parents and drivers ----------------------------------------------------------------------

    def register(self, parent: Parent) -> None:
        """Offer a parent.

        Raises OperationFailed with EEXIST when one of that name is there (or still leaving), InvalidArgument when its
        name or types cannot be, DeviceNotActive when the bus is closed.
        """
        what = f"mdev parent {type(parent).__name__}"
        self._admit(guarded("register", what, Registered, parent, self._executor, self._limits))

    def _admit(self, record: Registered) -> None:
        if self._closed:
            raise DeviceNotActive(f"{record.what} comes too late: vfiod ends")
        if record.name in self._parents or record.name in self._leaving:
            raise OperationFailed("register", record.what, errno="EEXIST", advice="unregister the other one first")
        self._parents[record.name] = record

    async def unregister(
        self, name: str, *, reason: str = "its parent was unregistered", patience: float = PATIENCE
    ) -> None:
        """Take a parent away.

        Hidden first, so that creates racing with it fail; users are asked for their devices (REQ) and given
        ``patience`` seconds; then every device goes, whatever the parent or its users say.
        """
        record = self._parents.pop(name, None)
        if record is None:
            raise InvalidArgument(f"mdev parent '{name}' not found; {self._known_parents()}")
        record.hidden = True
        self._leaving.add(name)
        with self._lock:
            for uuid in record.devices:
                self._visible.pop(uuid, None)
        await self._finish(self._unregister(record, reason, patience))

    def register_driver(self, driver: MdevDriver) -> None:
        """Offer a device driver: probed with every device made from now on that has its device API."""
        self._drivers.append(driver)

    async def discover(self) -> None:
        """Load the built-in parents and those of other packages (entry points), once.

        A parent that cannot be loaded is logged and left out, and named in the errors of those who ask for it.
        """
        await self._discovery.everything()

    async def find_type(self, name: str) -> tuple[str, MdevType]:
        """The type of this name, ``TYPE`` or ``PARENT/TYPE``, and its parent's name: what :meth:`create` takes.

        Raises InvalidArgument: there is none, or several parents have it, or its parent could not be loaded.
        """
        await self.discover()
        record, found = find_type(name, self._parents.values(), self._known_parents, self._discovery.broken)
        return record.name, found

    # --- devices ----------------------------------------------------------------------------------

    async def create(
        self, parent: str, mdev_type: str, uuid: str | None = None, parameters: Mapping[str, Any] | None = None
    ) -> str:
        """Make a device.

        Args:
            parent: a parent's name.
            mdev_type: one of its types.
            uuid: the device's name; None: a random one.
            parameters: what the type takes.

        Returns:
            Its UUID, in lower case.

        Raises:
            InvalidArgument: unknown parent, type or parameter, not a UUID.
            OperationFailed: EEXIST: there is one; ENOSPC: no more instances; or what the parent said.

        """
        await self._discovery.built_in()
        if parent not in self._parents:  # a built-in one does not wait for what others have installed
            await self.discover()
        record, made_of = self._find(parent, mdev_type)
        values = dict(parameters or {})
        for name in values:
            if name not in made_of.parameters:
                known = ", ".join(made_of.parameters) or "no parameters"
                raise InvalidArgument(f"Parameter 'parameters.{name}' is unexpected; type '{mdev_type}' takes {known}")
        if uuid is None:
            import uuid as uuids  # a server without mediated devices need not import it

            uuid = str(uuids.uuid4())
        name = _canonical(uuid)
        what = f"mdev {name}"
        if name in self._names:
            raise OperationFailed("mdev-create", what, errno="EEXIST", advice="a device has this UUID already")
        if record.available(made_of) < 1 and record.room.get(made_of.id) is None:
            raise record.full(made_of, name)  # what the parent says of its room, it is asked when its turn has come
        self._names.add(name)
        record.making[made_of.id] += 1
        await self._finish(self._create(record, made_of, name, values))
        return name

    async def destroy(self, uuid: str) -> None:
        """Destroy a device. Raises DeviceNotFound, Busy (somebody uses it), or what its parent refuses with."""
        with self._lock:
            instance = self._get(uuid)
            _not_used(instance)
        await self._finish(self._destroy(self._parents[instance.parent], instance))

    async def start(self, vm: str) -> None:
        """Start all mediated devices for a VM: every one, or none.

        Those already started for it stay as they are. Raises Busy when one is started for another VM, or what a
        parent refused with, after the parents that had started were shut down again.
        """
        await self._finish(self._starting.start(_canonical(vm)))

    async def shutdown(self, vm: str) -> None:
        """The VM has stopped: its devices are shut down.

        Every parent is told, even when one fails; then the first failure is raised. Raises DeviceNotActive when no
        device was started for this VM.
        """
        await self._finish(self._starting.shutdown(_canonical(vm)))

    def acquire(self, uuid: str, user: str) -> Instance:
        """Take a device into use. From any thread. Raises DeviceNotFound, Busy."""
        with self._lock:
            instance = self._get(uuid)
            _not_used(instance)
            instance.user = user
            return instance

    def release(self, instance: Instance) -> None:
        """The user lets go. From any thread."""
        with self._lock:
            instance.user = None
            released = instance.released
        if released is not None:
            released()

    def look(self, uuid: str) -> Instance:
        """A visible device, to ask about it. From any thread. Raises DeviceNotFound."""
        with self._lock:
            return self._get(uuid)

    def knows(self, parent: str, mdev_type: str) -> bool:
        """Whether there is such a type, after :meth:`discover`."""
        record = self._parents.get(parent)
        return record is not None and mdev_type in record.types

    # --- over a change of the process: on the loop, which does nothing else meanwhile ---------------

    @property
    def under_way(self) -> str | None:
        """What is being made or taken apart, for a person; None: nothing."""
        busy = next((one.lane.current for one in self._parents.values() if one.lane.busy), None)
        return busy if busy is not None else "a mediated device comes or goes" if self._tasks else None

    def keep(self, given: Given, each: KeepEach | None = None) -> list[MdevState]:
        """Describe every device, by its own account. CommandError: one cannot be saved, or is being taken away.

        ``each`` gets a device's name and what describes it, and may give an older description instead.
        """
        described = [(uuid, partial(self._keep_one, instance, given)) for uuid, instance in self._visible.items()]
        return [one() if each is None else each(uuid, one) for uuid, one in described]

    def _keep_one(self, instance: Instance, given: Given) -> MdevState:
        from vfiod.server.state.machine import MdevState

        if instance.gone is not None:
            raise DeviceNotActive(f"{instance.what} is gone ({instance.gone}): it cannot be handed over")
        saved = instance.call("save", instance.device.save)
        return MdevState(
            uuid=instance.uuid,
            parent=instance.parent,
            type=instance.mdev_type.id,
            parameters=dict(instance.parameters),
            group=instance.group,
            vm=instance.vm,
            values=saved.values,
            fds={name: given.give(fd, f"mdev:{instance.uuid}/{name}") for name, fd in saved.fds.items()},
        )

    def adopt(self, states: list[MdevState], taken: Taken) -> None:
        """Make them again, and start those that were started. After :meth:`discover`. CommandError."""
        started: dict[tuple[str, str], list[Instance]] = {}
        for state in states:
            record, made_of = self._find(state.parent, state.type)
            host = MdevHost(f"mdev {state.uuid} of parent '{record.name}'", asyncio.get_running_loop())
            saved = Saved(state.values, {name: taken.take(place) for name, place in state.fds.items()})
            instance = record.remake(host, made_of, state, saved, tuple(self._drivers))
            self._names.add(state.uuid)
            self._groups.add(state.group)
            record.devices[state.uuid] = self._visible[state.uuid] = instance
            if state.vm is not None:
                instance.vm = state.vm
                started.setdefault((record.name, state.vm), []).append(instance)
        for (name, vm), instances in started.items():
            self._parents[name].start(vm, instances)

    # --- looking: never waits ----------------------------------------------------------------------

    def types(self) -> list[MdevTypeInfo]:
        """All types with their devices, as ``query-mdev-types`` shows them: what is known, nobody is asked."""
        return [
            record.info(one, self._visible) for record in tuple(self._parents.values()) for one in record.types.values()
        ]

    async def ask(self) -> list[MdevTypeInfo]:
        """The same, after every parent was found and asked what it publishes, all at once and not for long."""
        await self.discover()
        loop = asyncio.get_running_loop()
        records = tuple(self._parents.values())
        await asyncio.gather(*(loop.run_in_executor(self._executor, record.ask) for record in records))
        return self.types()

    def info(self, uuid: str) -> MdevInfo | None:
        """One visible device, as ``query-devices`` shows it; None when there is none of that name."""
        instance = self._visible.get(uuid)
        return None if instance is None else info_of(instance)

    def uuids(self) -> list[str]:
        """The visible devices' names."""
        return sorted(self._visible)

    def fd_infos(self) -> Iterator[FdInfo]:
        """What the visible devices have open, for ``query-fds``. One that is being made has none of its own yet."""
        for uuid, instance in sorted(self._visible.items()):
            for name, number in instance.fds().items():
                try:
                    kind = kind_of(number)
                except OSError:
                    continue  # closed between the two looks, or never open: a defect of the parent
                yield FdInfo(owner=f"mdev:{uuid}", name=name, kind=kind, number=number)

    async def close(self) -> None:
        """Unregister every parent, without patience, and admit no other."""
        self._closed = True
        for name in tuple(self._parents):
            await self.unregister(name, reason="vfiod ends", patience=0)
        while self._tasks:
            await asyncio.gather(*tuple(self._tasks), return_exceptions=True)
        self._limits.threads.close()

    # --- inside: parents ----------------------------------------------------------------------------

    async def _unregister(self, record: Registered, reason: str, patience: float) -> None:
        await Leaving(self._lock, self._emit, self._forget).take_away(record, reason, patience)
        self._leaving.discard(record.name)

    def _find(self, parent: str, mdev_type: str) -> tuple[Registered, MdevType]:
        record = self._parents.get(parent)
        if record is None:
            why = self._discovery.broken.get(parent)
            hint = f"it could not be loaded: {why}" if why is not None else self._known_parents()
            raise InvalidArgument(f"Parameter 'parent': mdev parent '{parent}' not found; {hint}")
        found = record.types.get(mdev_type)
        if found is None:
            raise InvalidArgument(
                f"Parameter 'type': {record.what} has no type '{mdev_type}'; it has {', '.join(record.types)}"
            )
        return record, found

    def _known_parents(self) -> str:
        there = f"there is {', '.join(self._parents)}" if self._parents else "there is none"
        return there + "".join(f"; '{name}' could not be loaded: {why}" for name, why in self._discovery.broken.items())

    # --- inside: devices ------------------------------------------------------------------------------

    def _get(self, uuid: str) -> Instance:
        instance = self._visible.get(_canonical(uuid))
        if instance is None:
            raise DeviceNotFound(f"Mediated device '{uuid}' not found; make it with mdev-create")
        return instance

    async def _create(self, record: Registered, mdev_type: MdevType, uuid: str, parameters: Mapping[str, Any]) -> None:
        host = MdevHost(f"mdev {uuid} of parent '{record.name}'", asyncio.get_running_loop())
        group: int | None = None
        made = False
        try:
            async with record.lane.turn(f"mdev-create {uuid}") as turn:
                if record.hidden:
                    raise _left(record, uuid)
                group = next(number for number in range(len(self._groups) + 1) if number not in self._groups)
                self._groups.add(group)
                make = partial(record.make, host, mdev_type, uuid, parameters, group, tuple(self._drivers))
                instance = await turn.run(make)
                if record.hidden:
                    await turn.run(partial(record.unmake, instance))
                    raise _left(record, uuid)
                record.devices[uuid] = instance
                with self._lock:
                    self._visible[uuid] = instance
                made = True
        finally:
            record.making[mdev_type.id] -= 1
            if not made:
                self._names.discard(uuid)
                if group is not None:
                    self._groups.discard(group)
        if trace.mdev_created.on:
            trace.mdev_created(device=uuid, parent=record.name, type=mdev_type.id)

    async def _destroy(self, record: Registered, instance: Instance) -> None:
        uuid = instance.uuid
        async with record.lane.turn(f"mdev-destroy {uuid}") as turn:
            with self._lock:
                if self._get(uuid) is not instance:  # destroyed while this one waited, and made again
                    raise DeviceNotFound(f"Mediated device '{uuid}' not found; it was destroyed meanwhile")
                _not_used(instance)
                del self._visible[uuid]
            try:
                await turn.run(partial(record.destroy, instance, tuple(self._drivers)))
            except CommandError:
                if not record.hidden:
                    with self._lock:
                        self._visible[uuid] = instance
                raise
            self._forget(record, instance)
            self._emit(MdevRemoved(uuid=uuid, parent=record.name, reason="destroyed"))

    def _forget(self, record: Registered, instance: Instance) -> None:
        """It no longer exists: its group, its name and its instance are free."""
        record.devices.pop(instance.uuid, None)
        self._groups.discard(instance.group)
        self._names.discard(instance.uuid)
        if trace.mdev_destroyed.on:
            trace.mdev_destroyed(device=instance.uuid, parent=record.name)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it to the end in a task of its own: cancelling the caller leaves nothing half done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def _canonical(uuid: str) -> str:
    # "$" also matches before a final newline.
    if len(uuid) != 36 or re.match(UUID_PATTERN, uuid) is None:
        raise InvalidArgument(f"'{uuid}' is not a UUID in its 8-4-4-4-12 form (RFC 9562)")
    return uuid.lower()


def _not_used(instance: Instance) -> None:
    if instance.user is not None:
        raise Busy(f"{instance.what} is in use as device '{instance.user}'; device_del it first")


def _left(record: Registered, uuid: str) -> CommandError:
    return OperationFailed(
        "mdev-create", f"mdev {uuid}", errno="ENODEV", advice=f"{record.what} was unregistered meanwhile"
    )
