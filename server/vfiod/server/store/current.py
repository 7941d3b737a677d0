"""Keeps the store, and the state beside it, as the machine is: a server may be killed at any instruction.

What a command has changed is written before its answer leaves; what changes in small steps (registers of devices that
live in this process, masks, counts) soon after. In this order, so that whoever dies in between leaves a whole picture::

    new fds into the store ── the state names them, written whole (slots) ── what it names no more out of the store

Before a device of the kernel is closed, the store lets go of it: an fd there would keep the kernel's device open.

While the machine's topology changes nothing is written; it is, as soon as that has ended. A device that is being
worked on is written as it was before.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from vfiod.protocol.catalogue.exports import ExportState as ExportState_
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.server.state.doors import DoorsState, ExportState, StoreState
from vfiod.server.state.format import CannotKeep, State, encode
from vfiod.server.state.machine import DeviceState, KernelState, MachineState, MdevState
from vfiod.server.store.fdstore import FdStore, StoreError
from vfiod.server.store.places import Places, name_of
from vfiod.server.store.slots import SlotError, Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiod.server.devices.device import Device
    from vfiod.server.events import Event
    from vfiod.server.machine import Machine
    from vfiod.server.state.fds import Given, Place

__all__ = ["STATE", "Current"]

STATE: Final = "vfiod-state"
"""What the store calls the state's two files."""

_log: Final = logging.getLogger(__name__)

SMALL: Final = frozenset(
    {
        "region-write", "region-map", "region-unmap", "irq-mask", "irq-unmask", "irq-eoi", "irq-trigger", "ccw-request",
        "ccw-halt", "ccw-clear", "trace-event-set-state", "quit",
    }
)  # fmt: skip
"""Commands whose answers do not wait for the state: what they change is a step of what a guest does."""

AT_ONCE: Final = frozenset({"DEVICE_EXPORT_ATTACHED"})
"""Events before which the state is written: the device is its client's from here on."""

SOON_AFTER: Final = frozenset({"IRQ_MODE_CHANGED", "DEVICE_EXPORT_DETACHED", "DEVICE_EXPORT_DELETED", "DEVICE_DELETED"})
"""Events after which the state is written in the same turn of the loop: what they tell is half done when they come."""

SOON_SECONDS: Final = 0.02
"""How much later small changes are written: what a crash may take back of them."""

AGAIN_SECONDS: Final = 0.005
"""When it is looked again whether the machine can be described: its topology changes now."""


class Current:
    """The store and the state of one machine, kept current. On the loop.

    Args:
        machine: the machine.
        store: keeps the fds.
        slots: keep the state; owned.
        places: the fds that are in the store already.
        program: our version, for a person.

    """

    def __init__(self, machine: Machine, store: FdStore, slots: Slots, places: Places, program: str) -> None:
        self._machine = machine
        self._store = store
        self._slots = slots
        self._places = places
        self._program = program
        self._last: State | None = None
        self._former: dict[str, tuple[DeviceState, frozenset[Place]]] = {}  # by path
        self._former_mediated: dict[str, tuple[MdevState, frozenset[Place]]] = {}  # by UUID
        self._left_out: list[str] = []
        self._told: dict[str, str] = {}  # what cannot be restored, by path, as it was said
        self._dirty = False
        self._timer: asyncio.TimerHandle | None = None
        self._over = False
        self._behind = False
        self._unsubscribe = machine.hub.subscribe(self._heard)

    # --- something has changed ------------------------------------------------------------------------------

    def ended(self, command: str) -> None:
        """A command that may have changed something has ended; its answer has not left."""
        if command in SMALL:
            self.touched()
        else:
            self.changed()

    def changed(self) -> None:
        """Write it now; if the topology is changing, as soon as that has ended."""
        self._dirty = True
        self._try()

    def _heard(self, event: Event) -> None:
        """What changes without a command has an event. A client of an export comes in before it is told so."""
        if event.spec.name in AT_ONCE:
            self.changed()
        elif event.spec.name in SOON_AFTER:
            self._dirty = True
            self._machine.loop.call_soon(self._try)
        else:
            self.touched()

    def touched(self) -> None:
        """Write it soon."""
        self._dirty = True
        if self._timer is None and not self._over:
            self._timer = self._machine.loop.call_later(SOON_SECONDS, self._due)

    def _due(self) -> None:
        self._timer = None
        self._try()

    def _try(self) -> None:
        if self._over or not self._dirty:
            return
        machine = self._machine
        if not machine.closing and (machine.topology.busy or machine.sources.under_way is not None):
            if self._timer is None:
                self._timer = machine.loop.call_later(AGAIN_SECONDS, self._due)
            return
        self._dirty = False
        try:
            self._write(self._described())
            self._behind = False
        except CommandError as error:
            self._behind = True
            self._tell("", f"what changes is not kept: {error}")
        except (StoreError, SlotError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._over = True
        _log.error("From now on a crash of this server loses its devices: %s", error)

    def _tell(self, path: str, sentence: str) -> None:
        if self._told.get(path) != sentence:
            self._told[path] = sentence
            _log.warning("After a crash of this server, %s", sentence)

    # --- the order of things ----------------------------------------------------------------------------------

    def _write(self, state: State) -> None:
        for place, number in self._places.to_store():
            self._store.store(name_of(place), [number])
        self._slots.write(encode(state))
        self._last = state
        self._store.remove(map(name_of, self._places.unused()))

    def _described(self) -> State:
        """The machine as it is, and those of its devices that are being worked on as they were."""
        from vfiod.server.machine.keeping import keep_machine, needs_of

        self._places.begin()
        machine = keep_machine(self._machine, self._places, self._devices, self._mediated)
        present = {one.uuid for one in machine.mdevs}
        self._former_mediated = {uuid: one for uuid, one in self._former_mediated.items() if uuid in present}
        exports = self._exports()
        return State(
            machine=machine,
            program=self._program,
            needs=needs_of(machine),
            names=[],
            doors=DoorsState(exports=exports),
            left_out=list(self._left_out),
        )

    def _mediated(self, uuid: str, describe: Callable[[], MdevState]) -> MdevState:
        """A mediated device as it is; or as it was, while it is at work and cannot say (EBUSY)."""
        first = len(self._places.order)
        try:
            state = describe()
        except OperationFailed as error:
            former = self._former_mediated.get(uuid)
            if error.errno != "EBUSY" or former is None:
                raise
            self._places.use(former[1])
            self.touched()
            return former[0]
        self._former_mediated[uuid] = state, frozenset(self._places.order[first:])
        return state

    def _devices(self) -> list[DeviceState]:
        devices, states = self._machine.devices, []
        former, self._former = self._former, {}
        self._left_out.clear()
        for device in devices.all():
            path = device.path
            if device.under_way is not None:
                if path in former:
                    self._former[path] = former[path]
                    self._places.use(former[path][1])
                    states.append(former[path][0])
                self.touched()
                continue
            first = len(self._places.order)
            try:
                state = devices.keep_one(device.name, self._places, self._machine.sources.keep_backend)
            except CannotKeep as error:
                self._left_out.append(f"device '{device.name}': {error}")
                self._tell(path, f"there is no {self._left_out[-1]}")
                continue
            self._former[path] = state, frozenset(self._places.order[first:])
            states.append(state)
        return states

    def _exports(self) -> list[ExportState]:
        """Those that listen: a client that is connected is not restored, and one passed connected is its export."""
        doors = self._machine.doors
        if doors is None:
            return []
        sockets = {one.owner: one.number for one in doors.fd_infos() if one.kind == "listening-socket"}
        return [
            ExportState(
                id=one.id,
                device=one.device,
                attached=one.attached,
                fd=self._places.give(sockets[f"export:{one.id}"], f"export:{one.id}"),
                path=one.path or None,
                client=None,
                occupied=one.state is not ExportState_.LISTENING,
            )
            for one in doors.infos()
            if f"export:{one.id}" in sockets
        ]

    async def let_go(self, device: Device) -> None:
        """A device is about to be closed: from now on the state has it no more, nor the store its fds."""
        if self._over or self._last is None or not device.realized:
            return
        closing = self._machine.sources.closes_with(device.backend)
        gone = {place for fd in closing if (place := self._places.place_here(fd)) is not None}
        if not gone:
            return
        self._former.pop(device.path, None)
        try:
            self._slots.write(encode(_without(self._last, device.path, gone)))
            self._store.remove(map(name_of, sorted(gone)))
            self._places.forget(gone)
            await self._machine.loop.run_in_executor(self._machine.executor, self._store.barrier)
        except (StoreError, SlotError) as error:
            self._give_up(error)

    # --- another process takes our place -------------------------------------------------------------------------

    def hand_over(self, given: Given, watchdog: float | None) -> StoreState:
        """Write what is not written yet, and describe the store to who goes on with it; that changes nothing here.

        Raises CannotKeep: the store is not as the machine is.
        """
        self.changed()
        if self._over or self._behind or self._dirty:
            raise CannotKeep("The store of fds is not current (the log says why): restart the service instead")
        return StoreState(
            notify=given.give(self._store.number, "store/notify"),
            slots=[given.give(one.number, "store/state") for one in self._slots.files],
            places={place: given.give(number, f"store/{place}") for place, number in self._places.here().items()},
            following=self._places.next,
            unit=self._store.unit,
            watchdog=watchdog,
        )

    @property
    def unit(self) -> str | None:
        """The control group that is the keeper's unit; None: the keeper is vfiod's own."""
        return self._store.unit

    async def announce(self, pid: int) -> None:
        """This process is about to be given everything: should we die, it must be gone before a next server begins.

        Returns when who keeps the store knows. Raises StoreError: it does not.
        """
        self._store.announce(pid)
        await self._machine.loop.run_in_executor(self._machine.executor, self._store.barrier)

    def pass_on(self, pid: int) -> None:
        """Whoever keeps the store follows this process from now on, and starts a server anew when that one dies.

        The store stays as it is. Raises StoreError: nothing was said. Afterwards nothing here is ours, come what may.
        """
        self._store.follow(pid)
        try:
            self._store.barrier()  # what comes from that process is believed from here on
        except StoreError as error:
            _log.warning("%s: it is told that process %d is the server now, and will hear it", error, pid)

    def take_up(self) -> None:
        """Go on with the store of the server whose place we have: what it names is ours, the rest leaves it."""
        self.changed()
        if not (self._over or self._behind or self._dirty):
            self._places.settled()

    # --- the end ------------------------------------------------------------------------------------------------

    async def end(self) -> None:
        """The machine ends by itself: nobody has to follow it. Nothing is left in the store."""
        over, self._over = self._over, True
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()
        try:
            if not over:
                self._slots.clear()
                self._places.begin()
                self._store.remove(map(name_of, self._places.unused()))
                self._store.remove([STATE])
                await self._machine.loop.run_in_executor(self._machine.executor, self._store.barrier)
        except StoreError as error:
            _log.warning("The store of fds may keep some of ours: %s", error)
        finally:
            self._slots.close()


def _without(state: State, path: str, gone: set[Place]) -> State:
    """The state without a device, and without what closes with it."""
    machine: MachineState = state.machine
    kernel = machine.kernel
    if kernel is not None:
        kernel = KernelState(
            containers=[one for one in kernel.containers if one.fd not in gone],
            next_container=kernel.next_container,
            groups=[one for one in kernel.groups if one.fd not in gone],
            iommufds=kernel.iommufds,
        )
    devices = [one for one in machine.devices if one.path != path]
    return replace(state, machine=replace(machine, devices=devices, kernel=kernel))
