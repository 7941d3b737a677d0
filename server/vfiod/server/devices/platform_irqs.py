"""A platform device's interrupts: one per index, set up when it is added, started when the machine is complete.

Set up means: each index has a trigger eventfd of vfiod's own making, and an automasked one a resample eventfd. They
stay the same over stopping and starting, unless the hypervisor brings its own. On the loop's thread, except
:meth:`PlatformInterrupts.prepare` and :meth:`PlatformInterrupts.close`. Rules: section 7 of the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import IrqInfo, IrqModeChanged
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.arming import InterruptsLost
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.devices.platform_arming import PlatformArming, ResampleRefused
from vfiod.server.devices.platform_binding import PlatformBinder, Request
from vfiod.server.devices.platform_infos import platform_irq_info
from vfiod.server.devices.platform_messages import PlatformMessages
from vfiod.server.devices.platform_relay import PlatformRelay
from vfiod.server.devices.vectors import Counts, Vector
from vfiod.server.logs import about

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import LinesState, PlatformState

__all__ = ["PlatformInterrupts", "Request"]

_log: Final = logging.getLogger(__name__)


class PlatformInterrupts:
    """The interrupts of one platform device.

    Args:
        device: what the device is called, for messages and events.
        backend: where it comes from.
        indexes: what it has, in the order of the indexes.
        environment: events, watching, timers.
        mmap_timeout_ms: before the fast path returns; 0: never.
        irqfd: whether interrupts may be direct (``x-irqfd``).
        messages: its messages (extended IRQs), which stand at one of the indexes; None: it has none.
        on_trap: called with True when accesses must be seen from now on, with False when not any more.

    """

    def __init__(
        self,
        device: str,
        backend: Backend,
        indexes: Sequence[IrqIndex],
        environment: Environment,
        *,
        mmap_timeout_ms: int,
        irqfd: bool,
        on_trap: Callable[[bool], None],
        messages: PlatformMessages | None = None,
    ) -> None:
        self.device = device
        self.indexes = tuple(indexes)
        self.messages: Final = messages
        self.own: Final = tuple(one for one in self.indexes if messages is None or one is not messages.index)
        self._environment = environment
        self._binder = PlatformBinder(device, irqfd=irqfd)
        self._relay = PlatformRelay(device, backend, environment, mmap_timeout_ms=mmap_timeout_ms, on_trap=on_trap)
        self._arming = PlatformArming(device, backend)
        self._by_name = {one.name: one for one in self.indexes}
        self._bound: dict[int, Vector] = {}
        self._numbers: dict[int, int] = {}
        self._unrouted: set[int] = set()  # would be direct, but the route is disabled
        self._kept_lines: LinesState | None = None  # adopted, and not heard yet

    def prepare(self) -> None:
        """Set every index up: make its eventfds. Blocks; in a worker. OperationFailed, and then none is set up."""
        self._binder.prepare(self.own)

    # --- looking --------------------------------------------------------------------------------------

    @property
    def kind(self) -> IrqKind:
        """``platform`` when any is started."""
        messages = self.messages is not None and self.messages.fds()
        return IrqKind.PLATFORM if self._bound or messages else IrqKind.NONE

    @property
    def numbers(self) -> Mapping[int, int]:
        """The interrupt numbers of the machine, by index."""
        return self._numbers

    def started(self, one: IrqIndex) -> bool:
        """Whether it is started."""
        return one.index in self._bound

    def find(self, wanted: int | str) -> IrqIndex:
        """An index by number or name; InvalidArgument when the device has none such."""
        if isinstance(wanted, str):
            found = self._by_name.get(wanted)
        else:
            found = self.indexes[wanted] if 0 <= wanted < len(self.indexes) else None
        if found is None:
            last = len(self.indexes) - 1
            has = f"it has {self.indexes[0].name} to {self.indexes[last].name}" if self.indexes else "it has none"
            raise InvalidArgument(f"Device '{self.device}' has no interrupt index {wanted!r}; {has}")
        return found

    def infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""
        return [
            self.messages.info()
            if self.messages is not None and one is self.messages.index
            else platform_irq_info(
                one,
                self._bound.get(one.index),
                self._binder.counts(one),
                self._numbers.get(one.index),
                self._relay.lines,
            )
            for one in self.indexes
        ]

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """Every eventfd, with a name that tells what it does."""
        bound = tuple(self._bound.items())
        messages = [] if self.messages is None else self.messages.fds()
        live = [(f"irq{index} {role}", fd) for index, vector in bound for role, fd in vector.fds()]
        return self._binder.fds() + live + messages

    # --- starting ---------------------------------------------------------------------------------------

    def start(
        self,
        one: IrqIndex,
        wanted: Sequence[Wanted],
        mode: IrqMode | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> list[Started]:
        """Start one index, which may be that of the messages; see :meth:`start_all`."""
        if self.messages is not None and one is self.messages.index:
            return self.messages.start(wanted, mode, numbers)
        number = (numbers or {}).get(0)
        return self.start_all([Request(one, want, number) for want in wanted], mode)

    def start_all(
        self, requests: Sequence[Request], mode: IrqMode | None = None, *, taken: bool = True
    ) -> list[Started]:
        """Start indexes, all or nothing. One that runs and brings nothing new goes on as it is.

        Args:
            requests: each index once; their eventfds are owned, and closed on failure.
            mode: direct or relayed; None: direct where that can be, and the mode it has for one that runs.
            taken: whether somebody takes the eventfds: else what is not brought is relayed by default.

        Raises:
            InvalidArgument, OperationFailed: everything is as it was.

        """
        owned = [fd for r in requests for fd in (r.want.trigger, r.want.resample) if fd is not None]
        fresh: dict[int, Vector] = {}
        done: list[tuple[IrqIndex, Vector | None]] = []
        started: list[Started] = []
        try:
            for request in requests:
                self._binder.check(request, mode)
            for request in requests:
                old = self._bound.get(request.one.index)
                fresh[request.one.index] = self._binder.bind(request, old, mode, owned, taken=taken)
            for request in requests:
                index = request.one.index
                old = self._bound.get(index)
                if fresh[index] is not old:
                    fresh[index] = self._replace(request.one, old, fresh[index], brought=request.brought)
                    done.append((request.one, old))
            for request in requests:
                number = self._numbers.get(request.one.index) if request.number is None else request.number
                started.append(self._binder.answer(request, fresh[request.one.index], number))
        except BaseException:
            for one, old in reversed(done):
                self._undo(one, old)
            for index, vector in fresh.items():
                if vector is not self._bound.get(index):
                    vector.close()
            close_all(owned)
            close_all(fd for reply in started for fd in (reply.trigger, reply.resample) if fd is not None)
            raise
        for _, old in done:
            if old is not None:
                old.close()
        for request in requests:
            self._unrouted.discard(request.one.index)
            if request.number is not None:
                self._numbers[request.one.index] = request.number
        return started

    def _replace(self, one: IrqIndex, old: Vector | None, new: Vector, *, brought: bool) -> Vector:
        """Bind it; relayed when the direct mode cannot be set up. Returns what is bound; does not close ``old``."""
        try:
            self._switch(one, old, new)
        except ResampleRefused as refusal:
            owned: list[FileDescriptor] = []
            try:
                relayed = self._binder.again(one, new, IrqMode.RELAYED, owned, resample=brought)
                self._switch(one, old, relayed)
            except BaseException:
                close_all(owned)
                raise
            new.close()
            _log.info("Device %s: %s is relayed: %s", self.device, one.name, refusal, extra=about(device=self.device))
            self._tell_mode(one, IrqMode.RELAYED, f"the direct mode could not be set up: {refusal}")
            return relayed
        return new

    def _switch(self, one: IrqIndex, old: Vector | None, new: Vector | None) -> None:
        """From one binding to another, or as it was. Nothing is heard in between: this is one step of the loop."""
        if not self._relay.disabled:
            try:
                self._arming.change(one, old, new, masked=one.index in self._relay.lines.masked)
            except InterruptsLost as error:
                self._lost(one, str(error))
                raise
        left = self._relay.unlisten(one)
        if new is None:
            del self._bound[one.index]
            if old is not None:
                old.counts.spurious += left
        else:
            self._bound[one.index] = new
            self._relay.listen(one, new)
            self._pass_on(one, new, left)
        self._trace(one, old, new)

    def _pass_on(self, one: IrqIndex, new: Vector, left: int) -> None:
        """What arrived for the former binding and was not delivered. A level that is still asserted fires again."""
        if new.own is not None:
            self._relay.inherit(one, left)
        elif left and not one.info.automasked:
            new.deliver(1)

    def _undo(self, one: IrqIndex, old: Vector | None) -> None:
        new = self._bound[one.index]
        try:
            self._switch(one, new, old)
        except CommandError as error:
            _log.warning(
                "Device %s: %s could not be set back: %s", self.device, one.name, error, extra=about(device=self.device)
            )
            if one.index in self._bound:
                self._relay.unlisten(one)
                self._arming.disarm(one, new)
                self._lost(one, str(error))
        else:
            new.close()

    # --- stopping ---------------------------------------------------------------------------------------

    def stop(self, one: IrqIndex | None = None, vectors: Iterable[int] | None = None, *, reason: str) -> None:
        """Stop an index, or all; they lose their numbers. What does not run is no error.

        Raises InvalidArgument; OperationFailed for the first that fails, when the others are stopped all the same.
        """
        if one is not None:
            for vector in vectors or ():
                one.check_vector(vector)
        failure: CommandError | None = None
        ran = self.kind
        if self.messages is not None and one in (None, self.messages.index):
            try:
                self.messages.stop(None if vectors is None else list(vectors))
            except CommandError as error:
                failure = error
        for each in self.own if one is None else (one,):
            old = self._bound.get(each.index)
            if old is None:
                self._numbers.pop(each.index, None)
                self._relay.lines.masked -= {each.index}
                continue
            try:
                self._switch(each, old, None)
            except CommandError as error:
                failure = failure or error
                continue
            old.close()
            self._numbers.pop(each.index, None)
            self._unrouted.discard(each.index)
            self._relay.lines.masked -= {each.index}
        if ran is IrqKind.PLATFORM and self.kind is IrqKind.NONE:
            self._environment.emit(IrqModeChanged(device=self.device, kind=IrqKind.NONE, reason=reason))
        if failure is not None:
            raise failure

    def abandon(self, *, reason: str) -> None:
        """Stop whatever runs for good. What the kernel refuses is logged."""
        for one in self.own:
            vector = self._bound.get(one.index)
            if vector is not None:
                self._relay.unlisten(one)
                self._arming.disarm(one, vector)
                self._lost(one, reason)

    # --- single interrupts ------------------------------------------------------------------------------

    def mask(self, one: IrqIndex, vector: int) -> None:
        """Mask an interrupt that is started. InvalidArgument, OperationFailed."""
        one.check_maskable()
        self._active(one, vector, "mask")
        self._relay.perform(self._relay.lines.mask, one.index)
        if trace.irq_mask.on:
            trace.irq_mask(device=self.device, index=one.index, vector=vector)

    def unmask(self, one: IrqIndex, vector: int) -> None:
        """Unmask an interrupt that is started. InvalidArgument, OperationFailed."""
        one.check_maskable()
        self._active(one, vector, "unmask")
        self._relay.perform(self._relay.lines.unmask, one.index)
        if trace.irq_unmask.on:
            trace.irq_unmask(device=self.device, index=one.index, vector=vector)

    def set_mask(self, one: IrqIndex, *, masked: bool) -> None:
        """MASK or UNMASK, as the kernel's interface has them (``vfio_platform_set_irq_mask``, ``_unmask``).

        Before it is started, too: then it starts masked. UNMASK of one that nobody masked completes it.
        InvalidArgument, OperationFailed.
        """
        one.check_maskable()
        lines = self._relay.lines
        if masked:
            self._relay.perform(lambda: lines.mask(one.index))
        elif one.index in lines.masked or one.index not in self._bound:
            self._relay.perform(lambda: lines.unmask(one.index))
        else:
            self.eoi(one, 0)

    def trigger_of(self, one: IrqIndex) -> FileDescriptor | None:
        """The consumer's eventfd, lent; None: it is not started."""
        bound = self._bound.get(one.index)
        return None if bound is None else bound.trigger

    def eoi(self, one: IrqIndex, vector: int) -> None:
        """Complete an interrupt. With nothing active it does nothing; direct, it unmasks. OperationFailed."""
        one.check_vector(vector)
        bound = self._bound.get(one.index)
        if bound is None or self._relay.disabled:
            return
        if bound.mode is IrqMode.RELAYED:
            self._relay.eoi(one.index, "irq-eoi")
        elif one.info.automasked and one.index not in self._relay.lines.masked:
            self._arming.unmask(one)

    def trigger(self, one: IrqIndex, vector: int) -> None:
        """Make the kernel signal the interrupt's eventfd (TRIGGER, DATA_NONE). InvalidArgument, OperationFailed."""
        if self.messages is not None and one is self.messages.index:
            self.messages.trigger(vector)
            return
        self._active(one, vector, "trigger")
        self._arming.trigger(one)

    def _active(self, one: IrqIndex, vector: int, word: str) -> Vector:
        one.check_vector(vector)
        bound = self._bound.get(one.index)
        if bound is None:
            raise InvalidArgument(f"Cannot {word} {one.name} of device '{self.device}': irq-start it first")
        return bound

    def route(self, one: IrqIndex, vector: int, number: int | None) -> None:
        """Say which interrupt number of the machine it has; None: none.

        A direct one is torn down and set up again for the new route, and completed once in case an EOI was missed.
        Without a route the direct mode ends. Raises InvalidArgument, OperationFailed; then all is as it was.
        """
        if self.messages is not None and one is self.messages.index:
            self.messages.route(vector, number)
            return
        one.check_vector(vector)
        index = one.index
        if self._numbers.get(index) == number:
            return
        bound = self._bound.get(index)
        if bound is not None and (bound.mode is IrqMode.DIRECT or index in self._unrouted):
            self._reroute(one, bound, IrqMode.RELAYED if number is None else IrqMode.DIRECT)
        if number is None:
            del self._numbers[index]
        else:
            self._numbers[index] = number
        if trace.route_moved.on:
            trace.route_moved(device=self.device, index=index, vector=0, number=number)

    def _reroute(self, one: IrqIndex, old: Vector, mode: IrqMode) -> None:
        """The same eventfds, set up anew: setting up unmasks, which is the EOI that may have been missed."""
        owned: list[FileDescriptor] = []
        try:
            self._switch(one, old, self._binder.again(one, old, mode, owned, resample=True))
        except BaseException:
            close_all(owned)
            raise
        old.close()
        if mode is old.mode:
            return
        self._unrouted.symmetric_difference_update({one.index})
        gone = mode is IrqMode.RELAYED
        self._tell_mode(one, mode, "its route was disabled" if gone else "it has a route again")

    # --- what others do that concerns interrupts ----------------------------------------------------------

    @property
    def awaits_access(self) -> bool:
        """Whether one is active: the next access completes it, where that is how."""
        return self._relay.lines.active is not None

    def accessed(self) -> None:
        """A region was accessed through vfiod: the completion of what is active. Never raises."""
        if self._relay.lines.active is not None:
            self._relay.accessed()

    def given_out(self) -> None:
        """Another process maps a region: from now on accesses complete nothing."""
        self._relay.stop_by_access()

    def suspend(self) -> None:
        """Disable everything in the kernel for a reset; what is bound stays known. OperationFailed; then as it was."""
        done: list[IrqIndex] = []
        try:
            for one, vector in self._each():
                self._arming.change(one, vector, None, masked=one.index in self._relay.lines.masked)
                done.append(one)
        except CommandError:
            for one in done:
                self._rearm(one)
            raise
        self._relay.disabled = True
        for vector, left in self._relay.silence():
            # What came before the reset is delivered before it.
            if left:
                vector.deliver(1)

    def resume(self) -> None:
        """Set up again what :meth:`suspend` took down, with the same eventfds and modes.

        Raises the last OperationFailed; the interrupts that failed are stopped then, and events have said so.
        """
        self._relay.disabled = False
        failure: CommandError | None = None
        for one, vector in self._each():
            try:
                self._arming.change(one, None, vector, masked=one.index in self._relay.lines.masked)
                self._relay.listen(one, vector)
            except CommandError as error:
                failure = error
                self._lost(one, f"{one.name} could not be set up again after the reset: {error}")
        if failure is not None:
            raise failure

    def _rearm(self, one: IrqIndex) -> None:
        try:
            self._arming.change(one, None, self._bound[one.index], masked=one.index in self._relay.lines.masked)
        except CommandError as error:
            self._relay.unlisten(one)
            self._lost(one, str(error))

    def _each(self) -> list[tuple[IrqIndex, Vector]]:
        return [(self.indexes[index], vector) for index, vector in self._bound.items()]

    def silence(self) -> None:
        """Stop listening, cancel the timer: the device is going. On the loop; :meth:`close` does the rest."""
        self._relay.silence()

    def close(self) -> None:
        """Disarm in the kernel, close every eventfd. Blocks; may be called in a thread, after :meth:`silence`."""
        for one, vector in self._each():
            if not self._relay.disabled:
                self._arming.disarm(one, vector)
            vector.close()
        self._bound.clear()
        if self.messages is not None:
            self.messages.close()
        self._binder.forget()

    # --- over a change of the process ----------------------------------------------------------------------

    def keep(self, given: Given) -> PlatformState:
        """Describe what was set up, what is bound, and where its lines are."""
        from vfiod.server.devices.keeping import keep_counts, keep_vector
        from vfiod.server.state.machine import PlatformState

        owner = f"device:{self.device}"
        messages, numbers = ([], []) if self.messages is None else self.messages.keep(owner, given)
        return PlatformState(
            made=self._binder.keep(owner, given),
            bound=[keep_vector(vector, index, owner, given) for index, vector in self._bound.items()],
            counts=keep_counts(self._binder.all_counts()),
            numbers=list(self._numbers.items()),
            unrouted=sorted(self._unrouted),
            lines=self._relay.lines.keep(),
            messages=messages,
            message_numbers=numbers,
        )

    def adopt(self, state: PlatformState, taken: Taken) -> None:
        """Have what :meth:`keep` described. The kernel has it, and is told nothing; :meth:`listen` begins to hear."""
        from vfiod.server.devices.keeping import counts_from, take_vector

        self._binder.adopt(state.made, counts_from(state.counts), taken)
        for one in state.bound:
            counts = self._binder.counts(self.indexes[one.index]) or Counts()
            self._bound[one.index] = take_vector(one, counts, taken)
        self._numbers.update(state.numbers)
        self._unrouted.update(state.unrouted)
        self._kept_lines = state.lines
        if self.messages is not None:
            self.messages.adopt(state.messages, state.message_numbers, taken)

    def listen(self) -> None:
        """Hear what was adopted. On the loop, once."""
        for one, vector in self._each():
            self._relay.listen(one, vector)
        if self._kept_lines is not None:
            self._relay.go_on(self._kept_lines)
            self._kept_lines = None

    # --- telling --------------------------------------------------------------------------------------------

    def _lost(self, one: IrqIndex, reason: str) -> None:
        """It is stopped, and nobody asked for that: say so."""
        vector = self._bound.pop(one.index, None)
        if vector is not None:
            self._relay.unlisten(one)
            vector.close()
        self._environment.emit(DeviceError(device=self.device, reason=reason))
        event = IrqModeChanged(device=self.device, kind=self.kind, index=one.index, vector=0, reason=reason)
        self._environment.emit(event)

    def _tell_mode(self, one: IrqIndex, mode: IrqMode, reason: str) -> None:
        self._environment.emit(
            IrqModeChanged(
                device=self.device, kind=IrqKind.PLATFORM, index=one.index, vector=0, mode=mode, reason=reason
            )
        )

    def _trace(self, one: IrqIndex, old: Vector | None, new: Vector | None) -> None:
        if old is not None and old.mode is IrqMode.DIRECT and trace.direct_ended.on:
            trace.direct_ended(device=self.device, index=one.index, vector=0)
        point = trace.direct_started_level if one.info.automasked else trace.direct_started_edge
        if new is not None and new.mode is IrqMode.DIRECT and point.on:
            point(device=self.device, index=one.index, vector=0, fd=new.trigger.number)
