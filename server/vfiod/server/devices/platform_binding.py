"""Making the bindings of a platform device's interrupts: which eventfds one gets, and who hears it.

An index is set up when the device is added: with a trigger eventfd, and a resample eventfd when it is automasked.
They stay the same over stopping and starting; what the hypervisor brings goes before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.devices import eventfds
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.devices.vectors import Counts, Vector

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ParkedState

__all__ = ["PlatformBinder", "Request"]


class Request(Struct, frozen=True):
    """One interrupt to start.

    Attributes:
        one: its index.
        want: the eventfds the caller brought, owned; ``want.vector`` is 0.
        number: its interrupt number in the machine; None: the one it has, or none.
        give: whether the answer has duplicates of the eventfds that were not brought.

    """

    one: IrqIndex
    want: Wanted = Wanted(0)
    number: int | None = None
    give: bool = True

    @property
    def brought(self) -> bool:
        """Whether the caller brought eventfds."""
        return self.want.trigger is not None


class _Made(Struct, frozen=True):
    """The eventfds an index was set up with."""

    trigger: FileDescriptor
    resample: FileDescriptor | None = None

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        named = [("trigger", self.trigger), ("resample", self.resample)]
        return [(role, fd) for role, fd in named if fd is not None]


class PlatformBinder:
    """Makes the bindings of one device.

    Args:
        device: what the device is called, for messages.
        irqfd: whether interrupts may be direct (``x-irqfd``).

    """

    def __init__(self, device: str, *, irqfd: bool) -> None:
        self._device = device
        self._irqfd = irqfd
        self._made: dict[int, _Made] = {}
        self._counts: dict[int, Counts] = {}

    # --- setting up -----------------------------------------------------------------------------------

    def prepare(self, indexes: Sequence[IrqIndex]) -> None:
        """Make the eventfds of every index. OperationFailed, and then none is there."""
        try:
            for one in indexes:
                what = self._what(one)
                made = self._made[one.index] = _Made(eventfds.make(what))
                if one.info.automasked:
                    self._made[one.index] = _Made(made.trigger, eventfds.make(what))
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Close what :meth:`prepare` made."""
        made, self._made = self._made, {}
        close_all(fd for one in made.values() for _, fd in one.fds())

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """What :meth:`prepare` made, with a name that tells what it does."""
        return [
            (f"irq{index} set-up {role}", fd) for index, made in tuple(self._made.items()) for role, fd in made.fds()
        ]

    def keep(self, owner: str, given: Given) -> list[ParkedState]:
        """Describe what :meth:`prepare` made."""
        from vfiod.server.state.machine import ParkedState

        return [
            ParkedState(
                index=index,
                vector=0,
                mode="",
                trigger=given.give(made.trigger, f"{owner}/irq{index} set-up trigger"),
                resample=given.perhaps(made.resample, f"{owner}/irq{index} set-up resample"),
            )
            for index, made in self._made.items()
        ]

    def adopt(self, states: list[ParkedState], counts: Mapping[tuple[int, int], Counts], taken: Taken) -> None:
        """Instead of :meth:`prepare`: have what :meth:`keep` described."""
        for one in states:
            self._made[one.index] = _Made(taken.take(one.trigger), taken.perhaps(one.resample))
        self._counts.update({index: one for (index, _), one in counts.items()})

    def all_counts(self) -> dict[tuple[int, int], Counts]:
        """The counts of all, by index and vector."""
        return {(index, 0): one for index, one in self._counts.items()}

    def counts(self, one: IrqIndex) -> Counts | None:
        """What an interrupt has seen in its whole life; None when it never was started."""
        return self._counts.get(one.index)

    # --- binding --------------------------------------------------------------------------------------

    def check(self, request: Request, mode: IrqMode | None) -> None:
        """Refuse what could never be bound. InvalidArgument."""
        one = request.one
        one.check_start([request.want])
        if mode is IrqMode.DIRECT and not self._irqfd:
            raise InvalidArgument(
                f"{one} cannot be direct: the device was added with x-irqfd=false; leave 'mode' out, or ask for relayed"
            )

    def bind(
        self,
        request: Request,
        old: Vector | None,
        mode: IrqMode | None,
        owned: list[FileDescriptor],
        *,
        taken: bool,
    ) -> Vector:
        """The binding as it will be; the one it has when nothing changes.

        Args:
            request: which, and what the caller brought.
            old: the one it has.
            mode: as asked for; None: direct where that can be and somebody takes the eventfds.
            owned: what is opened here is added.
            taken: whether somebody takes the eventfds that vfiod makes.

        Raises OperationFailed (EMFILE).

        """
        one, want = request.one, request.want
        if old is not None and not request.brought and mode in (None, old.mode):
            return old
        made = self._made[one.index]
        resample = want.resample if request.brought else made.resample
        if mode is None:
            able = self._irqfd and (resample is not None or not one.info.automasked)
            mode = IrqMode.DIRECT if able and (taken or request.brought) else IrqMode.RELAYED
        trigger = want.trigger
        if trigger is None:
            trigger = self._duplicate(made.trigger if old is None else old.trigger, one, owned)
        if mode is IrqMode.RELAYED:
            # Only a resample eventfd that the caller brings completes a relayed interrupt; else accesses do.
            return self.relayed(one, trigger, want.resample, owned)
        if not request.brought and resample is not None:
            kept = old.resample if old is not None and old.resample is not None else resample
            resample = self._duplicate(kept, one, owned)
        return Vector(0, mode, trigger, resample, None, self._counts_of(one))

    def relayed(
        self, one: IrqIndex, trigger: FileDescriptor, resample: FileDescriptor | None, owned: list[FileDescriptor]
    ) -> Vector:
        """A relayed binding with an eventfd of vfiod's own, which is added to ``owned``. OperationFailed (EMFILE)."""
        own = eventfds.make(self._what(one))
        owned.append(own)
        return Vector(0, IrqMode.RELAYED, trigger, resample, own, self._counts_of(one))

    def again(
        self, one: IrqIndex, old: Vector, mode: IrqMode, owned: list[FileDescriptor], *, resample: bool
    ) -> Vector:
        """The same eventfds in another mode, or anew; the resample eventfd only if asked for. OperationFailed."""
        trigger = self._duplicate(old.trigger, one, owned)
        kept = self._duplicate(old.resample, one, owned) if resample and old.resample is not None else None
        if mode is IrqMode.RELAYED:
            return self.relayed(one, trigger, kept, owned)
        return Vector(0, mode, trigger, kept, None, old.counts)

    def answer(self, request: Request, vector: Vector, number: int | None) -> Started:
        """What the caller is told, with duplicates of the eventfds it did not bring. OperationFailed (EMFILE)."""
        one = request.one
        if not request.give or request.brought:
            return Started(one.index, 0, vector.mode, number)
        owned: list[FileDescriptor] = []
        try:
            trigger = self._duplicate(vector.trigger, one, owned)
            resample = None if vector.resample is None else self._duplicate(vector.resample, one, owned)
        except BaseException:
            close_all(owned)
            raise
        return Started(one.index, 0, vector.mode, number, trigger, resample)

    # --- inside ---------------------------------------------------------------------------------------

    def _what(self, one: IrqIndex) -> str:
        return f"{one.name} of device '{self._device}'"

    def _counts_of(self, one: IrqIndex) -> Counts:
        return self._counts.setdefault(one.index, Counts())

    def _duplicate(self, fd: FileDescriptor, one: IrqIndex, owned: list[FileDescriptor]) -> FileDescriptor:
        copy = eventfds.duplicate(fd, self._what(one))
        owned.append(copy)
        return copy
