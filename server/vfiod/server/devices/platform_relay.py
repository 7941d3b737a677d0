"""The relayed interrupts of a platform device, at the rim: eventfds heard and signalled, a timer, the kernel's mask.

What happens when is decided in :mod:`vfiod.server.interrupts.platform`; here it is done. On the loop's thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, ParamSpec

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices import eventfds
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.relay_base import KERNEL, RelayBase, tell_delivered, tell_fired
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.intx import Action
from vfiod.server.interrupts.platform import Act, IrqState, Line, PlatformLines

if TYPE_CHECKING:
    from vfiod.server.state.machine import LinesState

__all__ = ["PlatformRelay"]

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_RAISE: Final = Action.RAISE

P = ParamSpec("P")

_request: Final = functools.lru_cache(maxsize=1024)(vfio.SetIrqs.now)
"""One completed interrupt asks what the next one asks."""


class PlatformRelay(RelayBase[PlatformLines]):
    """Listens to the relayed interrupts of one platform device.

    Attributes:
        lines: what is active, what waits, what is masked.

    """

    _ONE = "An interrupt"

    def __init__(
        self,
        device: str,
        backend: Backend,
        environment: Environment,
        *,
        mmap_timeout_ms: int,
        on_trap: Callable[[bool], None],
    ) -> None:
        super().__init__(device, backend, environment, mmap_timeout_ms=mmap_timeout_ms, on_trap=on_trap)
        self.lines = PlatformLines(timed=mmap_timeout_ms > 0)
        self._vectors: dict[int, Vector] = {}

    # --- listening --------------------------------------------------------------------------------------

    def listen(self, one: IrqIndex, vector: Vector) -> None:
        """Hear a relayed interrupt from now on, and what completes it."""
        if vector.own is None:
            return
        index = one.index
        self._vectors[index] = vector
        self.lines.add(index, Line(automasked=one.info.automasked, by_access=vector.resample is None))
        self._environment.watch(vector.own.number, functools.partial(self._fired, index, vector))
        if vector.resample is not None:
            heard = functools.partial(self._resampled, index, eventfds.Foreign(vector.resample))
            self._environment.watch(vector.resample.number, heard)

    def unlisten(self, one: IrqIndex) -> int:
        """Hear it no more; whoever waits behind it comes next.

        Returns how many arrived that were not delivered: one that waited, and what is still in its eventfd.
        """
        vector = self._vectors.pop(one.index, None)
        if vector is None or vector.own is None:
            return 0
        self._unwatch(vector, vector.own)
        left = eventfds.take(vector.own)
        vector.counts.fired += left
        waited = self.lines.state(one.index) is IrqState.PENDING
        self._do(self.lines.remove(one.index))
        return left + waited

    def silence(self) -> list[tuple[Vector, int]]:
        """Hear nothing any more, and let nobody come next: the vectors, each with what was not delivered of it."""
        undelivered = []
        for index, vector in self._vectors.items():
            if vector.own is not None:
                self._unwatch(vector, vector.own)
                left = eventfds.take(vector.own)
                vector.counts.fired += left
                undelivered.append((vector, left + (index in self.lines.waiting)))
        self._vectors.clear()
        self._do(self.lines.clear())
        return undelivered

    # --- what is heard ------------------------------------------------------------------------------------

    def _fired(self, index: int, vector: Vector) -> None:
        if vector.own is None or not (count := eventfds.take(vector.own)):
            return
        vector.counts.fired += count
        self._do(self.lines.fired(index), index)
        if trace.irq_pending.on and index in self.lines.waiting:
            trace.irq_pending(device=self._device, index=index, state=IrqState.PENDING.value)
        tell_fired(self._environment, self._device, index, vector, count)

    def _resampled(self, index: int, resample: eventfds.Foreign) -> None:
        if resample.take():
            self.quietly(self.eoi, index, "resample")

    def inherit(self, one: IrqIndex, count: int) -> None:
        """What arrived for a former binding of this edge interrupt: it fires now."""
        if count and not one.info.automasked:
            self._do(self.lines.fired(one.index), one.index)

    def go_on(self, state: LinesState) -> None:
        """Lines that another process kept: who is active stays so, who waits too, and the timer begins anew."""
        self.lines.adopt(state)
        self._perform_again(self.lines)

    def stop_by_access(self) -> None:
        """From now on accesses complete nothing."""
        self._do(self.lines.stop_by_access())

    def accessed(self) -> None:
        """A region was accessed through vfiod. Never raises."""
        active = self.lines.active
        if active is None or self.disabled:
            return
        self.quietly(self.perform, self.lines.access)
        if trace.irq_eoi.on and self.lines.active != active:
            trace.irq_eoi(device=self._device, index=active, by="access")

    def eoi(self, index: int, by: str) -> None:
        """Complete an interrupt. OperationFailed when the kernel refuses: then it is not completed."""
        if trace.irq_eoi.on and index == self.lines.active:
            trace.irq_eoi(device=self._device, index=index, by=by)
        self.perform(self.lines.eoi, index)

    # --- doing --------------------------------------------------------------------------------------------

    def perform(self, move: Callable[P, tuple[Act, ...]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Let the lines move, and do what they say. OperationFailed when the kernel refuses: then nothing moved."""
        lines = self.lines
        mark = lines.mark()
        acts = move(*args, **kwargs)
        # The kernel first: what it refuses has not happened.
        try:
            for act in acts:
                if act.action in KERNEL and not self.disabled:
                    self._backend.set_irqs(_request(KERNEL[act.action], act.index))
        except CommandError:
            lines.go_back(mark)
            raise
        self._do(acts)

    def _do(self, acts: tuple[Act, ...], fired: int = -1) -> None:
        """Everything but the kernel's part. ``fired``: the index that just arrived."""
        for act in acts:
            if act.action is _RAISE:
                vector = self._vectors[act.index]
                vector.deliver(1)
                tell_delivered(self._environment, self._device, act.index, vector)
                if act.index != fired and trace.irq_pending_injected.on:
                    trace.irq_pending_injected(device=self._device, index=act.index)
            elif act.index < 0:
                self._perform(self.lines, act.action)

    def _timer_fired(self, lines: PlatformLines) -> None:
        self._timer = None
        if lines.active is not None and trace.timer_still_active.on:
            trace.timer_still_active(device=self._device, index=lines.active)
        self._do(lines.timer())
