"""The relayed mode: vfiod hears the device and passes it on.

The kernel signals vfiod's own eventfd; the loop reads it, counts, signals the consumer's eventfd, and says so in an
event. A level interrupt goes through its line (:mod:`vfiod.server.interrupts.intx`). On the loop's thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.server import trace
from vfiod.server.devices import eventfds
from vfiod.server.devices.irq_index import INTX
from vfiod.server.devices.relay_base import KERNEL, RelayBase, tell_delivered, tell_fired
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.intx import Action, IntxLine, LineState

__all__ = ["Relay"]

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_RAISE: Final = Action.RAISE
_LATCHED: Final = LineState.LATCHED

_REQUESTS: Final = {action: vfio.SetIrqs.now(asked, INTX) for action, asked in KERNEL.items()}


class Relay(RelayBase[IntxLine]):
    """Listens to the relayed vectors of one PCI device."""

    _ONE = "An INTx"

    # --- listening --------------------------------------------------------------------------------------

    def listen(self, index: int, vector: Vector, line: IntxLine | None) -> None:
        """Hear a relayed vector from now on, and what completes it."""
        if vector.own is None:
            return
        if line is None:
            self._environment.watch(vector.own.number, functools.partial(self._message_fired, index, vector))
            return
        self._environment.watch(vector.own.number, functools.partial(self._line_fired, vector, line))
        if vector.resample is not None:
            heard = functools.partial(self._resampled, vector, eventfds.Foreign(vector.resample), line)
            self._environment.watch(vector.resample.number, heard)

    def unlisten(self, vector: Vector) -> None:
        """Hear it no more. What has arrived stays in its eventfd."""
        if vector.own is not None:
            self._unwatch(vector, vector.own)

    def drain(self, index: int, vector: Vector, heir: Vector | None) -> None:
        """What had arrived for a vector that is bound no more: goes to its heir, or is counted as spurious."""
        count = 0 if vector.own is None else eventfds.take(vector.own)
        if not count:
            return
        if heir is None:
            vector.counts.spurious += count
            if trace.irq_spurious.on:
                trace.irq_spurious(device=self._device, index=index, vector=vector.number, count=count)
        elif index != INTX:
            # A level line needs no heir: a device that still asserts it fires again.
            vector.counts.fired += count
            heir.deliver(count)

    # --- what is heard ------------------------------------------------------------------------------------

    def _message_fired(self, index: int, vector: Vector) -> None:
        # The consumer first, and by few steps: everything else can wait until it has its interrupt.
        if vector.own is None or not (count := eventfds.take(vector.own)):
            return
        vector.consumer.signal(count)
        counts = vector.counts
        counts.fired += count
        counts.delivered += count
        tell_delivered(self._environment, self._device, index, vector)
        tell_fired(self._environment, self._device, index, vector, count)

    def _line_fired(self, vector: Vector, line: IntxLine) -> None:
        if vector.own is None or not (count := eventfds.take(vector.own)):
            return
        vector.counts.fired += count
        before = vector.counts.delivered
        self.quietly(self.step, line, line.fired, vector)
        if vector.counts.delivered != before:
            tell_delivered(self._environment, self._device, INTX, vector)
        elif trace.irq_pending.on:
            trace.irq_pending(device=self._device, index=INTX, state=line.state.value)
        tell_fired(self._environment, self._device, INTX, vector, count)

    def _resampled(self, vector: Vector, resample: eventfds.Foreign, line: IntxLine) -> None:
        if resample.take():
            if trace.irq_eoi.on:
                trace.irq_eoi(device=self._device, index=INTX, by="resample")
            self.quietly(self.step, line, line.eoi, vector)

    # --- the line -----------------------------------------------------------------------------------------

    def step(self, line: IntxLine, move: Callable[[], tuple[Action, ...]], vector: Vector) -> None:
        """Let the line move, and do what it says. OperationFailed when the kernel refuses: then it has not moved."""
        before, fast = line.state, line.fast_path
        actions = move()
        if not self.disabled:
            try:
                # The kernel first: what it refuses has not happened.
                for action in actions:
                    if action in KERNEL:
                        self._backend.set_irqs(_REQUESTS[action])
            except CommandError:
                line.state, line.fast_path = before, fast
                raise
        for action in actions:
            if action is _RAISE:
                vector.deliver(1)
                if before is _LATCHED and trace.irq_pending_injected.on:
                    trace.irq_pending_injected(device=self._device, index=INTX)
            elif action not in KERNEL:
                self._perform(line, action)

    def go_on(self, line: IntxLine) -> None:
        """A line that another process kept: the fast path stays off if it was, and its timer begins anew."""
        self._perform_again(line)

    def release(self, line: IntxLine) -> None:
        """Known state: nothing pending, line down, fast path on, no timer. Tells the kernel nothing."""
        for action in line.clear():
            self._perform(line, action)

    def stop_by_access(self, line: IntxLine) -> None:
        """From now on accesses complete nothing."""
        for action in line.stop_by_access():
            self._perform(line, action)

    def _timer_fired(self, line: IntxLine) -> None:
        self._timer = None
        if line.state.up and trace.timer_still_active.on:
            trace.timer_still_active(device=self._device, index=INTX)
        for action in line.timer():
            self._perform(line, action)
