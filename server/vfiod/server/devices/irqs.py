"""A device's interrupts: eventfds in and out, direct or relayed, counted, and changed all or nothing.

The rules live below, in :mod:`vfiod.server.interrupts`: the INTx line, and the steps from one setup to another.
Here the steps are taken: ``SET_IRQS`` to the backend, eventfds watched on the loop, events sent. Everything runs on
the loop's thread, except :meth:`DeviceInterrupts.close`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import IrqInfo, IrqModeChanged
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.arming import Arming, InterruptsLost
from vfiod.server.devices.binding import Binder
from vfiod.server.devices.bound import Bound, bound_with, trace_change
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import INTX, IrqIndex, Started, Wanted
from vfiod.server.devices.irq_infos import irq_info
from vfiod.server.devices.relay import Relay
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.modes import NOTHING, plan

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import InterruptsState

__all__ = ["DeviceInterrupts"]


class DeviceInterrupts:
    """The interrupts of one PCI device.

    Args:
        device: what the device is called, for messages and events.
        backend: where it comes from.
        indexes: what it has, in the order of the indexes.
        environment: events, watching, timers.
        mmap_timeout_ms: before the fast path returns; 0: never.
        by_access: whether an access to a BAR may complete an INTx now.
        on_trap: called with True when accesses must be seen from now on, with False when not any more.
        on_kind: called with the active kind, and how many vectors it has allocated, when that may have changed.

    """

    def __init__(
        self,
        device: str,
        backend: Backend,
        indexes: Sequence[IrqIndex],
        environment: Environment,
        *,
        mmap_timeout_ms: int,
        by_access: Callable[[], bool],
        on_trap: Callable[[bool], None],
        on_kind: Callable[[IrqKind, int], None] = lambda kind, vectors: None,
    ) -> None:
        self.device = device
        self.indexes = tuple(indexes)
        self._backend = backend
        self._environment = environment
        self._timed = mmap_timeout_ms > 0
        self._by_access = by_access
        self._relay = Relay(device, backend, environment, mmap_timeout_ms=mmap_timeout_ms, on_trap=on_trap)
        self._arming = Arming(device, backend, self._relay)
        self._by_name = {one.name: one for one in self.indexes}
        self._bound = Bound()
        self._on_kind = on_kind
        self._binder = Binder(device)
        self._numbers: dict[tuple[int, int], int] = {}
        self._unrouted = False  # the INTx would be direct, but its route is disabled
        self.external = False
        """A client of an export has them: what the guest's capabilities say changes nothing here."""

    # --- looking --------------------------------------------------------------------------------------

    @property
    def kind(self) -> IrqKind:
        """The active kind."""
        return self._bound.kind

    @property
    def used(self) -> frozenset[int]:
        """The bound vectors of the active kind."""
        return frozenset(self._bound.vectors)

    def knows(self, one: IrqIndex, vector: int) -> bool:
        """Whether somebody holds the vector's eventfd already: it is bound, or parked."""
        return (self._bound.index == one.index and vector in self._bound.vectors) or self._binder.knows(
            one.index, vector
        )

    def find(self, wanted: int | str) -> IrqIndex:
        """An index by number or name; InvalidArgument when the device has none such."""
        if isinstance(wanted, str):
            found = self._by_name.get(wanted)
        else:
            found = self.indexes[wanted] if 0 <= wanted < len(self.indexes) else None
        if found is None:
            raise InvalidArgument(
                f"Device '{self.device}' has no interrupt index {wanted!r}; it has indexes 0 to "
                f"{len(self.indexes) - 1}: " + ", ".join(one.name for one in self.indexes)
            )
        return found

    def infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""
        return [irq_info(one, self._bound, self._binder.counts, self._numbers) for one in self.indexes]

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """Every eventfd of a bound vector, with a name that tells what it does."""
        bound = self._bound
        name = self.indexes[bound.index].name if bound.index >= 0 else ""
        live = [(f"{name}{v.number} {role}", fd) for v in bound.vectors.values() for role, fd in v.fds()]
        return live + [
            (f"{self.indexes[index].name}{vector} parked {role}", fd)
            for (index, vector), role, fd in self._binder.fds()
        ]

    # --- starting and stopping ----------------------------------------------------------------------------

    def start(
        self,
        one: IrqIndex,
        wanted: Sequence[Wanted],
        mode: IrqMode | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> list[Started]:
        """Start vectors of an index; ends another kind that is active. All or nothing.

        Vectors of the index that run and are not named go on. One that runs and brings no eventfds keeps those it
        has, and its mode when none is asked for.

        Args:
            one: the index.
            wanted: the vectors, each once; their eventfds are owned, and closed on failure.
            mode: direct or relayed; None: the choice of :func:`~vfiod.server.interrupts.modes.choose_mode`.
            numbers: interrupt numbers of the machine, by vector.

        Raises:
            InvalidArgument, OperationFailed: everything is as it was.

        """
        return self._set(one, wanted, mode=mode, numbers=numbers or {})

    def keep_enabled(self, one: IrqIndex, release: Iterable[int]) -> None:
        """Release vectors for good, as a client of an export does: an MSI-X without vectors stays enabled.

        Raises InvalidArgument, OperationFailed; then everything is as it was.
        """
        self.use(one, (), release=release)
        self._binder.forget_index()  # nothing comes back by itself

    def trigger_of(self, one: IrqIndex, vector: int) -> FileDescriptor | None:
        """The consumer's eventfd of a vector, lent; None when it is not started."""
        bound = self._bound
        found = bound.vectors.get(vector) if bound.index == one.index else None
        return None if found is None else found.trigger

    def use(self, one: IrqIndex, vectors: Iterable[int], *, release: Iterable[int] = ()) -> None:
        """What a guest does by its capabilities and its table: take vectors into use, and release others.

        Vectors get the eventfds they had before the guest switched them off, else new ones. What is released, or
        ends because another kind begins, keeps its eventfds for then. An MSI-X without vectors is enabled all the
        same. Raises InvalidArgument, OperationFailed; then everything is as it was.
        """
        wanted = [Wanted(vector) for vector in sorted(vectors)]
        self._set(one, wanted, release=frozenset(release) & self.used, guest=True)

    def _set(
        self,
        one: IrqIndex,
        wanted: Sequence[Wanted],
        *,
        mode: IrqMode | None = None,
        numbers: Mapping[int, int] = MappingProxyType({}),
        release: frozenset[int] = frozenset(),
        guest: bool = False,
    ) -> list[Started]:
        owned = [fd for want in wanted for fd in (want.trigger, want.resample) if fd is not None]
        fresh: dict[int, Vector] = {}
        started: list[Started] = []
        former = self._bound
        same = former.index == one.index
        leaving = release if same else frozenset(former.vectors if guest or former.index == INTX else ())
        try:
            one.check_start(wanted)
            for want in wanted:
                old = former.vectors.get(want.vector) if same else None
                fresh[want.vector] = self._binder.bind(one, want, old, mode, owned)
            for want in () if guest else wanted:
                number = numbers.get(want.vector, self._numbers.get((one.index, want.vector)))
                started.append(self._binder.started(one, want, fresh[want.vector], number))
            # Parked before it goes: whoever has no fd left for that must not lose the hypervisor's. The guest's
            # disabling of messages goes back to an INTx that irq-start ended, too.
            self._binder.park(former.index, {number: former.vectors[number] for number in leaving})
            vectors = {**(former.vectors if same else {}), **fresh}
            for number in release:
                del vectors[number]
            if (
                not same
                or any(vector is not former.vectors.get(number) for number, vector in fresh.items())
                or len(vectors) != len(former.vectors)
            ):
                self._change(self._next(one, vectors, former if same else None, stay=guest))
        except BaseException:
            self._binder.forget((former.index, number) for number in leaving)
            kept = set(map(id, former.vectors.values()))
            for vector in fresh.values():
                if id(vector) not in kept:
                    vector.close()
            close_all(owned)
            close_all(fd for done in started for fd in (done.trigger, done.resample) if fd is not None)
            raise
        self._binder.forget((one.index, number) for number in fresh)
        for vector_number, number in numbers.items():
            self._numbers[one.index, vector_number] = number
        if one.index == INTX:
            self._unrouted = False
        return started

    def _next(self, one: IrqIndex, vectors: Mapping[int, Vector], former: Bound | None, *, stay: bool = False) -> Bound:
        return bound_with(one, vectors, former, timed=self._timed, by_access=self._by_access, stay=stay)

    def stop(self, one: IrqIndex | None = None, vectors: Iterable[int] | None = None, *, reason: str) -> None:
        """Stop vectors of an index, a whole index, or whatever runs. What does not run is no error.

        Raises InvalidArgument, OperationFailed; then everything is as it was.
        """
        if one is not None:
            one.check_free()
            for vector in vectors or ():
                one.check_vector(vector)
        former = self._bound
        if one is None or vectors is None:
            self._binder.forget_index(None if one is None else one.index)
        else:
            self._binder.forget((one.index, vector) for vector in vectors)
        if former.kind is IrqKind.NONE or (one is not None and former.index != one.index):
            return
        gone = set(former.vectors if vectors is None else vectors)
        left = {number: vector for number, vector in former.vectors.items() if number not in gone}
        if left and len(left) == len(former.vectors):
            return
        self._change(self._next(self.indexes[former.index], left, former))
        self._unrouted = self._unrouted and self._bound.kind is IrqKind.INTX
        if self._bound.kind is IrqKind.NONE:
            self._environment.emit(IrqModeChanged(device=self.device, kind=IrqKind.NONE, reason=reason))

    def abandon(self, *, reason: str) -> None:
        """Stop whatever runs for good, and give no eventfd back later. What the kernel refuses is logged."""
        self._binder.forget_index()
        if self._bound.kind is not IrqKind.NONE:
            self._arming.abandon(self._bound)
            self._lost(reason)

    # --- single interrupts ----------------------------------------------------------------------------------

    def mask(self, one: IrqIndex, vector: int) -> None:
        """Mask a vector that is started. InvalidArgument, OperationFailed."""
        self._set_mask(one, vector, masked=True)

    def unmask(self, one: IrqIndex, vector: int) -> None:
        """Unmask a vector that is started; what is pending stays so until its EOI. InvalidArgument, OperationFailed."""
        self._set_mask(one, vector, masked=False)

    def _set_mask(self, one: IrqIndex, vector: int, *, masked: bool) -> None:
        word = "mask" if masked else "unmask"
        one.check_free()
        one.check_maskable()
        bound = self._active(one, vector, word)
        if bound.line is not None:
            self._relay.step(bound.line, bound.line.mask if masked else bound.line.unmask, bound.vectors[vector])
        else:
            if not self._relay.disabled:
                action = vfio.IrqAction.MASK if masked else vfio.IrqAction.UNMASK
                self._backend.set_irqs(vfio.SetIrqs.now(action, one.index, vector))
            self._bound = replace(bound, masked=bound.masked | {vector} if masked else bound.masked - {vector})
        point = trace.irq_mask if masked else trace.irq_unmask
        if point.on:
            point(device=self.device, index=one.index, vector=vector)

    def eoi(self, one: IrqIndex, vector: int) -> None:
        """Complete a level interrupt. With nothing pending it does nothing. InvalidArgument, OperationFailed."""
        one.check_free()
        one.check_vector(vector)
        one.check_level()
        bound = self._bound
        if bound.line is not None and bound.index == one.index and not self._relay.disabled:
            self._relay.step(bound.line, bound.line.eoi, bound.vectors[vector])
            if trace.irq_eoi.on:
                trace.irq_eoi(device=self.device, index=one.index, by="irq-eoi")

    def trigger(self, one: IrqIndex, vector: int) -> None:
        """Make the kernel signal the vector's eventfd (TRIGGER, DATA_NONE). InvalidArgument, OperationFailed."""
        self._active(one, vector, "trigger")
        self._backend.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.TRIGGER, one.index, vector))

    def _active(self, one: IrqIndex, vector: int, word: str) -> Bound:
        one.check_free()
        one.check_vector(vector)
        bound = self._bound
        if bound.index != one.index or vector not in bound.vectors:
            raise InvalidArgument(
                f"Cannot {word} vector {vector} of {one.name} of device '{self.device}': it has no trigger; "
                "irq-start it first"
            )
        return bound

    def route(self, one: IrqIndex, vector: int, number: int | None) -> None:
        """Say which interrupt number of the machine a vector has; None: none.

        An INTx whose route changes is torn down and set up again when it is direct, and completed once in case an EOI
        was missed. Without a route the direct mode ends: what fires stays pending here. Raises InvalidArgument,
        OperationFailed; then route and interrupts are as they were.
        """
        one.check_free()
        one.check_vector(vector)
        key = (one.index, vector)
        if self._numbers.get(key) == number:
            return
        if self._bound.index == one.index == INTX:
            if number is None:
                self._tear_down_direct()
            else:
                self._set_up_route()
        if number is None:
            del self._numbers[key]
        else:
            self._numbers[key] = number
        if trace.route_moved.on:
            trace.route_moved(device=self.device, index=one.index, vector=vector, number=number)

    def _tear_down_direct(self) -> None:
        if self._bound.vectors[0].mode is IrqMode.DIRECT:
            self._rebind_line(IrqMode.RELAYED)
            self._unrouted = True
            self._tell_mode(IrqMode.RELAYED, "its route was disabled")

    def _set_up_route(self) -> None:
        unrouted = self._unrouted
        if unrouted or self._bound.vectors[0].mode is IrqMode.DIRECT:
            self._rebind_line(IrqMode.DIRECT)
        bound = self._bound
        try:
            if bound.line is not None:
                self._relay.step(bound.line, bound.line.eoi, bound.vectors[0])
        except BaseException:
            if unrouted:
                # It had no route before, and has none now.
                self._rebind_line(IrqMode.RELAYED)
            raise
        if unrouted:
            self._unrouted = False
            self._tell_mode(IrqMode.DIRECT, "it has a route again")

    def _rebind_line(self, mode: IrqMode) -> None:
        """The same eventfds, set up anew."""
        former = self._bound
        one = self.indexes[INTX]
        again = self._binder.again(one, former.vectors[0], mode)
        try:
            self._change(self._next(one, {0: again}, former))
        except BaseException:
            again.close()
            raise

    def _tell_mode(self, mode: IrqMode, reason: str) -> None:
        self._environment.emit(
            IrqModeChanged(device=self.device, kind=IrqKind.INTX, vector=0, mode=mode, reason=reason)
        )

    # --- what others do that concerns interrupts ------------------------------------------------------------

    @property
    def awaits_access(self) -> bool:
        """Whether the INTx is up, and completed by accesses."""
        line = self._bound.line
        return line is not None and line.by_access and line.state.up

    def accessed(self) -> None:
        """A BAR was accessed through vfiod: the EOI, where that is how the INTx is completed. Never raises."""
        bound = self._bound
        line = bound.line
        if line is None or not line.by_access or not line.state.up or self._relay.disabled:
            return
        self._relay.quietly(self._relay.step, line, line.access, bound.vectors[0])
        if trace.irq_eoi.on:
            trace.irq_eoi(device=self.device, index=INTX, by="access")

    def given_out(self) -> None:
        """Another process maps a region: from now on accesses complete nothing."""
        if self._bound.line is not None:
            self._relay.stop_by_access(self._bound.line)

    def suspend(self) -> None:
        """Disable everything in the kernel for a reset; what is bound stays known. OperationFailed; then as it was."""
        bound = self._bound
        try:
            self._arming.change(bound, Bound())
        except InterruptsLost as error:
            self._lost(str(error))
            raise
        self._relay.disabled = True
        for vector in bound.vectors.values():
            # What came before the reset is delivered before it.
            self._relay.drain(bound.index, vector, vector)

    def resume(self) -> None:
        """Set up again what :meth:`suspend` took down, with the same eventfds and modes.

        Raises OperationFailed when that fails; then no interrupt is active, and an event has said so.
        """
        self._relay.disabled = False
        bound = self._bound
        try:
            for step in plan(NOTHING, bound.setup()).forward:
                self._arming.take(step, bound, bound)
        except CommandError as error:
            self._arming.abandon(bound)
            self._lost(f"Interrupts could not be set up again after the reset: {error}")
            raise

    def silence(self) -> None:
        """Stop listening, cancel the timer: the device is going. On the loop; :meth:`close` does the rest."""
        bound = self._bound
        for vector in bound.vectors.values():
            self._relay.unlisten(vector)
        if bound.line is not None:
            self._relay.release(bound.line)

    def close(self) -> None:
        """Disarm in the kernel, close every eventfd. Blocks; may be called in a thread, after :meth:`silence`."""
        bound, self._bound = self._bound, Bound()
        if not self._relay.disabled:
            self._arming.disarm(bound)
        for vector in bound.vectors.values():
            vector.close()
        self._binder.forget_index()

    # --- over a change of the process -------------------------------------------------------------------

    def keep(self, given: Given) -> InterruptsState:
        """Describe what is bound and parked, and what has been counted."""
        from vfiod.server.devices.keeping import keep_bound, keep_counts
        from vfiod.server.state.machine import InterruptsState

        owner = f"device:{self.device}"
        return InterruptsState(
            bound=keep_bound(self._bound, owner, given),
            parked=self._binder.keep(owner, given),
            counts=keep_counts(self._binder.counts),
            numbers=[(index, vector, number) for (index, vector), number in self._numbers.items()],
            unrouted=self._unrouted,
        )

    def adopt(self, state: InterruptsState, taken: Taken) -> None:
        """Have what :meth:`keep` described. The kernel has it, and is told nothing; :meth:`listen` begins to hear."""
        from vfiod.server.devices.keeping import counts_from, take_bound

        self._binder.counts.update(counts_from(state.counts))
        index = None if state.bound is None else state.bound.index
        counts = {vector: one for (of, vector), one in self._binder.counts.items() if of == index}
        one = None if index is None else self.indexes[index]
        self._bound = take_bound(state.bound, one, counts, taken, timed=self._timed)
        self._binder.adopt(state.parked, taken)
        self._numbers.update({(of, vector): number for of, vector, number in state.numbers})
        self._unrouted = state.unrouted

    def listen(self) -> None:
        """Hear what was adopted. On the loop, once."""
        bound = self._bound
        for vector in bound.vectors.values():
            self._relay.listen(bound.index, vector, bound.line)
        if bound.line is not None:
            self._relay.go_on(bound.line)

    # --- changing: all or nothing -----------------------------------------------------------------------

    def _change(self, new: Bound) -> None:
        """Go from what is bound to ``new``, and close what is no longer bound; or stay, and raise."""
        old = self._bound
        try:
            self._arming.change(old, new)
        except InterruptsLost as error:
            self._lost(str(error))
            raise
        self._bound = new
        self._on_kind(new.kind, new.block)
        trace_change(self.device, old, new)
        for number, vector in old.vectors.items():
            if new.vectors.get(number) is not vector:
                self._relay.drain(old.index, vector, new.vectors.get(number) if new.index == old.index else None)
                vector.close()

    def _lost(self, reason: str) -> None:
        """Nothing is active in the kernel any more, and nobody asked for that: say so."""
        old, self._bound = self._bound, Bound()
        self._on_kind(IrqKind.NONE, 0)
        self._unrouted = False
        for vector in old.vectors.values():
            vector.close()
        self._environment.emit(DeviceError(device=self.device, reason=reason))
        self._environment.emit(IrqModeChanged(device=self.device, kind=IrqKind.NONE, reason=reason))
