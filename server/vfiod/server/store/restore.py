"""A server begins: with what a dead one has left in the store, or with nothing.

What a crash leaves is not what a hand-over gives: the last steps before it may be missing in the state, and nobody was
told to stop. So what cannot be known is brought to where it does no harm:

* guest memory: what the state has not is unmapped in every address space, what only the state has is mapped again;
* level interrupts: completed and unmasked once, whatever they were; a line that is still up fires again;
* clients of exports: their connections died with the server; their devices stop (bus master off, interrupts off);
* what is new in the store and not in the state is closed.

A device that cannot be made again is left out, by name; the others are there.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from vfiod.protocol.catalogue.monitor import MachineRestored
from vfiod.protocol.errors import CommandError, VfiodError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.logs import about
from vfiod.server.state.format import BadState, State, decode
from vfiod.server.store.current import STATE, Current
from vfiod.server.store.fdstore import FdStore, inherited
from vfiod.server.store.places import Found, Places, name_of, place_of
from vfiod.server.store.slots import COUNT, Slots

if TYPE_CHECKING:
    from vfiod.server.machine import Machine
    from vfiod.server.state.doors import ExportState, StoreState
    from vfiod.server.state.fds import Taken

__all__ = ["begin", "go_on"]

_log: Final = logging.getLogger(__name__)

MOST_TRIES: Final = 3
"""Servers that may die while they begin with a state: then it is what kills them, and the next begins with nothing."""

SEQ_GAP: Final = 1_000_000
"""Numbers of events that are skipped: those the dead server gave after it last wrote the state are not given again."""


async def begin(machine: Machine, store: FdStore, program: str) -> Current:
    """Begin with what is there, and keep the store current from now on.

    Args:
        machine: has nothing yet; its loop runs, and does nothing else.
        store: keeps our fds.
        program: our version, for a person.

    Raises:
        StoreError, SlotError: nothing can be kept. OSError: EMFILE.

    """
    came = inherited(os.environ, os.getpid())
    places = Places()
    slots = _slots(came.pop(STATE, []), store)
    text = slots.read()
    found = Found({place: fds[0] for name, fds in came.items() if (place := place_of(name)) is not None})
    close_all(fd for name, fds in came.items() for fd in fds[1 if place_of(name) is not None else 0 :])
    restored: MachineRestored | None = None
    if text is not None:
        restored = await _restored(machine, text, found, slots.try_again())
    nobodys = places.adopt(found)
    found.close()
    store.remove(map(name_of, nobodys))
    current = Current(machine, store, slots, places, program)
    machine.devices.before_close = current.let_go
    current.changed()
    if restored is not None:
        machine.restored = restored
        machine.hub.emit(restored)
    return current


def go_on(machine: Machine, state: StoreState, taken: Taken, notify: socket.socket, program: str) -> Current:
    """Go on with the store of a server whose place is taken, by :meth:`Current.take_up`; until then nothing is written.

    Args:
        machine: has nothing yet; it is made of what that server has given, before anything is written.
        state: its store.
        taken: the fds that came with it, all there yet.
        notify: connected to whoever keeps fds; lent.
        program: our version, for a person.

    Raises SlotError, IndexError: what came is no store; OSError: EMFILE.

    """
    slots = Slots([taken.take(place) for place in state.slots])
    places = Places()
    places.go_on({place: taken.copy(number) for place, number in state.places.items()}, state.following)
    current = Current(machine, FdStore(notify, state.unit), slots, places, program)
    machine.devices.before_close = current.let_go
    return current


def _slots(files: list[FileDescriptor], store: FdStore) -> Slots:
    """The state's memory: the dead server's, or new, and in the store."""
    if len(files) == COUNT:
        return Slots(files)
    close_all(files)
    if files:
        store.remove([STATE])
        store.barrier()
    slots = Slots()
    try:
        store.store(STATE, [one.number for one in slots.files])
    except BaseException:
        slots.close()
        raise
    return slots


async def _restored(machine: Machine, text: bytes, found: Found, tries: int) -> MachineRestored:
    """Make the machine again as far as it goes; says what is there, and what is not."""
    lost: list[str] = []
    try:
        if tries > MOST_TRIES:
            raise BadState(f"{tries - 1} servers have died while they began with it")
        state = decode(text)
        if state.machine.name != machine.name:
            raise BadState(f"It is of the VM '{state.machine.name}'")
        await _machine(machine, state, found, lost)
    except (VfiodError, OSError, LookupError) as error:
        _log.error("What the server before has left is of no use: %s", error)
        lost.append(f"everything: {error}")
    for sentence in lost:
        _log.warning("Not restored: %s", sentence)
    names = [device.name for device in machine.devices.all()]
    _log.warning("Restored after the death of the server before: %s", ", ".join(names) or "no device")
    return MachineRestored(devices=names, lost=lost)


async def _machine(machine: Machine, state: State, found: Found, lost: list[str]) -> None:
    from vfiod.server.devices.settling import settle
    from vfiod.server.machine.keeping import adopt_device, adopt_machine, rehome

    if state.machine.mdevs:
        await machine.mdevs.discover()
    adopt_machine(machine, state.machine, found, devices=False)
    lost += state.left_out
    machine.hub.seq += SEQ_GAP
    for one in state.machine.devices:
        try:
            adopt_device(machine, replace(one, mapped_by=[]), found)  # who had mapped regions: sessions that are gone
        except (CommandError, OSError, LookupError) as error:
            lost.append(f"device '{one.id or one.path}': {error}")
    lost += machine.sources.settle()
    for sentence in rehome(machine):
        _log.info("%s", sentence)
    occupied = {one.device for one in state.doors.exports if one.occupied}
    for device in machine.devices.all():
        try:
            settle(device, all_off=device.name in occupied)
        except CommandError as error:
            lost.append(f"interrupts of device '{device.name}': {error}")
    for export in state.doors.exports:
        try:
            await _export(machine, export, found, lost)
        except (CommandError, OSError, LookupError) as error:
            lost.append(f"export '{export.id}': {error}")


async def _export(machine: Machine, state: ExportState, found: Found, lost: list[str]) -> None:
    """Listen again, on the same socket: who has connected meanwhile is in its queue."""
    from vfiod.server.exports.registry import NewExport, exports_of

    if state.fd is None:
        return
    device = machine.device(state.device)
    if state.occupied:
        reason = f"export '{state.id}': its client's connection; it attaches again"
        lost.append(reason)
        try:
            await device.lane.run("a crash of the server", device.stop_dma)
        except CommandError as error:
            _log.warning(
                "Bus mastering of device '%s' could not be switched off: %s",
                device.name,
                error,
                extra=about(device=device.name),
            )
    with found.take(state.fd) as fd:
        listening = socket.socket(fileno=os.dup(fd.number))
    exports_of(machine).add(NewExport(state.id, listening, state.path, True), device)
