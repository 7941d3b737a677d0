"""Making vectors: which eventfds one gets, and which it had before a guest switched it off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.devices import eventfds
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.devices.vectors import Counts, Vector
from vfiod.server.interrupts.modes import choose_mode

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ParkedState

__all__ = ["Binder", "Parked"]


@dataclass(frozen=True, slots=True)
class Parked:
    """The eventfds of a vector that its guest switched off: it gets the same ones when it comes back.

    The hypervisor holds the other ends, and does not hear of what its guest does.
    """

    mode: IrqMode
    trigger: FileDescriptor
    resample: FileDescriptor | None

    def close(self) -> None:
        """Close them."""
        self.trigger.close()
        if self.resample is not None:
            self.resample.close()


class Binder:
    """Makes the vectors of one device.

    Args:
        device: what the device is called, for messages.

    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.counts: dict[tuple[int, int], Counts] = {}
        self._parked: dict[tuple[int, int], Parked] = {}

    def counts_of(self, index: int, vector: int) -> Counts:
        """The counts of a vector, which outlive its bindings."""
        return self.counts.setdefault((index, vector), Counts())

    # --- making -----------------------------------------------------------------------------------

    def bind(
        self, one: IrqIndex, want: Wanted, old: Vector | None, mode: IrqMode | None, owned: list[FileDescriptor]
    ) -> Vector:
        """The vector as it will be; the old one itself when nothing changes. Adds what it opens to ``owned``."""
        what = f"{one.name} vector {want.vector} of device '{self._device}'"
        brought = want.trigger is not None
        level = one.info.automasked
        if old is not None and not brought and mode in (None, old.mode):
            return old
        before = old if old is not None else self._parked.get((one.index, want.vector))
        trigger, resample = want.trigger, want.resample
        if trigger is None and before is not None:
            trigger = _duplicate(before.trigger, what, owned)
            if before.resample is not None:
                resample = _duplicate(before.resample, what, owned)
            mode = mode or before.mode
        if trigger is None:
            trigger = _make(what, owned)
        chosen = choose_mode(level=level, wanted=mode, resample=resample is not None)
        if chosen is IrqMode.DIRECT and level and resample is None and not brought:
            resample = _make(what, owned)
        own = _make(what, owned) if chosen is IrqMode.RELAYED else None
        return Vector(want.vector, chosen, trigger, resample, own, self.counts_of(one.index, want.vector))

    def again(self, one: IrqIndex, old: Vector, mode: IrqMode) -> Vector:
        """The same vector with duplicates of its eventfds, in another mode or anew."""
        owned: list[FileDescriptor] = []
        what = f"{one.name} of device '{self._device}'"
        try:
            trigger = _duplicate(old.trigger, what, owned)
            resample = None if old.resample is None else _duplicate(old.resample, what, owned)
            own = _make(what, owned) if mode is IrqMode.RELAYED else None
        except BaseException:
            close_all(owned)
            raise
        return Vector(old.number, mode, trigger, resample, own, old.counts)

    def started(self, one: IrqIndex, want: Wanted, vector: Vector, number: int | None) -> Started:
        """What the caller is told, with duplicates of the eventfds when it brought none."""
        if want.trigger is not None:
            return Started(one.index, want.vector, vector.mode, number)
        what = f"the reply about {one.name} vector {want.vector} of device '{self._device}'"
        trigger = eventfds.duplicate(vector.trigger, what)
        try:
            resample = None if vector.resample is None else eventfds.duplicate(vector.resample, what)
        except CommandError:
            trigger.close()
            raise
        return Started(one.index, want.vector, vector.mode, number, trigger, resample)

    # --- parking ----------------------------------------------------------------------------------

    def knows(self, index: int, vector: int) -> bool:
        """Whether the vector's eventfds are parked."""
        return (index, vector) in self._parked

    def park(self, index: int, vectors: Mapping[int, Vector]) -> None:
        """Keep duplicates of these vectors' eventfds. OperationFailed (EMFILE), and then none are kept."""
        kept: dict[tuple[int, int], Parked] = {}
        owned: list[FileDescriptor] = []
        try:
            for number, vector in vectors.items():
                what = f"vector {number} of device '{self._device}'"
                trigger = _duplicate(vector.trigger, what, owned)
                resample = None if vector.resample is None else _duplicate(vector.resample, what, owned)
                kept[index, number] = Parked(vector.mode, trigger, resample)
        except BaseException:
            close_all(owned)
            raise
        self.forget(kept)
        self._parked.update(kept)

    def forget(self, keys: Iterable[tuple[int, int]]) -> None:
        """Close what is parked for these (index, vector)."""
        for key in keys:
            parked = self._parked.pop(key, None)
            if parked is not None:
                parked.close()

    def forget_index(self, index: int | None = None) -> None:
        """Close what is parked for an index; for all when None."""
        self.forget([key for key in self._parked if index in (None, key[0])])

    def keep(self, owner: str, given: Given) -> list[ParkedState]:
        """Describe what is parked."""
        from vfiod.server.state.machine import ParkedState

        return [
            ParkedState(
                index=index,
                vector=vector,
                mode=parked.mode.value,
                trigger=given.give(parked.trigger, f"{owner}/irq{index}.{vector} parked trigger"),
                resample=given.perhaps(parked.resample, f"{owner}/irq{index}.{vector} parked resample"),
            )
            for (index, vector), parked in self._parked.items()
        ]

    def adopt(self, states: Iterable[ParkedState], taken: Taken) -> None:
        """Have what :meth:`keep` described."""
        for one in states:
            parked = Parked(IrqMode(one.mode), taken.take(one.trigger), taken.perhaps(one.resample))
            self._parked[one.index, one.vector] = parked

    def fds(self) -> list[tuple[tuple[int, int], str, FileDescriptor]]:
        """Parked eventfds: (index, vector), role, fd."""
        return [
            (key, role, fd)
            for key, parked in tuple(self._parked.items())
            for role, fd in (("trigger", parked.trigger), ("resample", parked.resample))
            if fd is not None
        ]


def _duplicate(fd: FileDescriptor, what: str, owned: list[FileDescriptor]) -> FileDescriptor:
    copy = eventfds.duplicate(fd, what)
    owned.append(copy)
    return copy


def _make(what: str, owned: list[FileDescriptor]) -> FileDescriptor:
    made = eventfds.make(what)
    owned.append(made)
    return made
