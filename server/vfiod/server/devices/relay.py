"""The relayed mode: vfiod hears the device and passes it on.

The kernel signals vfiod's own eventfd; the loop reads it, counts, signals the consumer's eventfd, and says so in an
event. A level interrupt goes through its line (:mod:`vfiod.server.interrupts.intx`). On the loop's thread.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import Irq, IrqStorm
from vfiod.protocol.errors import CommandError
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices import eventfds
from vfiod.server.devices.environment import Environment, Timer
from vfiod.server.devices.irq_index import INTX
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.intx import Action, FastState, IntxLine, LineState
from vfiod.server.logs import about

__all__ = ["Relay", "tell_delivered", "tell_fired"]

_log: Final = logging.getLogger(__name__)


def tell_delivered(environment: Environment, device: str, index: int, vector: Vector) -> None:
    """A relayed interrupt went on to its consumer: the event ``IRQ``."""
    counts = vector.counts
    environment.emit(
        Irq(device=device, index=index, vector=vector.number, fired=counts.fired, delivered=counts.delivered)
    )


def tell_fired(environment: Environment, device: str, index: int, vector: Vector, count: int) -> None:
    """So many came from the device: trace it, and say so when it is a storm."""
    storm = vector.counts.storm.note(count, environment.now())
    if storm is not None:
        environment.emit(IrqStorm(device=device, index=index, vector=vector.number, per_second=storm))
    if trace.irq_fired.on:
        trace.irq_fired(device=device, index=index, vector=vector.number, count=count)


class Relay:
    """Listens to the relayed vectors of one device.

    Args:
        device: what the device is called, for messages and events.
        backend: where it comes from.
        environment: events, watching, timers.
        mmap_timeout_ms: before the fast path returns.
        on_trap: called with True when accesses must be seen from now on, with False when not any more.

    Attributes:
        disabled: the kernel has no interrupt of this device now (a reset is at work): it is told nothing.

    """

    def __init__(
        self,
        device: str,
        backend: Backend,
        environment: Environment,
        *,
        mmap_timeout_ms: int,
        on_trap: Callable[[bool], None],
    ) -> None:
        self.disabled = False
        self._device = device
        self._backend = backend
        self._environment = environment
        self._mmap_timeout_ms = mmap_timeout_ms
        self._on_trap = on_trap
        self._timer: Timer | None = None

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
            self._environment.unwatch(vector.own.number)
            if vector.resample is not None:
                self._environment.unwatch(vector.resample.number)

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
        self.quietly(lambda: self.step(line, line.fired, vector))
        if vector.counts.delivered != before:
            tell_delivered(self._environment, self._device, INTX, vector)
        elif trace.irq_pending.on:
            trace.irq_pending(device=self._device, index=INTX, state=line.state.value)
        tell_fired(self._environment, self._device, INTX, vector, count)

    def _resampled(self, vector: Vector, resample: eventfds.Foreign, line: IntxLine) -> None:
        if resample.take():
            if trace.irq_eoi.on:
                trace.irq_eoi(device=self._device, index=INTX, by="resample")
            self.quietly(lambda: self.step(line, line.eoi, vector))

    # --- the line -----------------------------------------------------------------------------------------

    def step(self, line: IntxLine, move: Callable[[], tuple[Action, ...]], vector: Vector) -> None:
        """Let the line move, and do what it says. OperationFailed when the kernel refuses: then it has not moved."""
        before, fast = line.state, line.fast_path
        actions = move()
        if not self.disabled:
            try:
                # The kernel first: what it refuses has not happened.
                for action in actions:
                    if action in _KERNEL:
                        self._backend.set_irqs(_REQUESTS[action])
            except CommandError:
                line.state, line.fast_path = before, fast
                raise
        for action in actions:
            if action is Action.RAISE:
                vector.deliver(1)
                if before is LineState.LATCHED and trace.irq_pending_injected.on:
                    trace.irq_pending_injected(device=self._device, index=INTX)
            elif action not in _KERNEL:
                self._perform(line, action)

    def go_on(self, line: IntxLine) -> None:
        """A line that another process kept: the fast path stays off if it was, and its timer begins anew."""
        if line.fast_path is FastState.OFF:
            self._perform(line, Action.FAST_PATH_OFF)
            if line.timed:
                self._perform(line, Action.START_TIMER)

    def release(self, line: IntxLine) -> None:
        """Known state: nothing pending, line down, fast path on, no timer. Tells the kernel nothing."""
        for action in line.clear():
            self._perform(line, action)

    def stop_by_access(self, line: IntxLine) -> None:
        """From now on accesses complete nothing."""
        for action in line.stop_by_access():
            self._perform(line, action)

    def _perform(self, line: IntxLine, action: Action) -> None:
        if action is Action.FAST_PATH_OFF:
            self._on_trap(True)
            if trace.fast_path_off.on:
                trace.fast_path_off(device=self._device)
        elif action is Action.FAST_PATH_ON:
            self._on_trap(False)
            if trace.fast_path_on.on:
                trace.fast_path_on(device=self._device)
        elif action is Action.START_TIMER:
            self._stop_timer()
            self._timer = self._environment.after(self._mmap_timeout_ms, lambda: self._timer_fired(line))
        elif action is Action.STOP_TIMER:
            self._stop_timer()

    def _timer_fired(self, line: IntxLine) -> None:
        self._timer = None
        if line.state.up and trace.timer_still_active.on:
            trace.timer_still_active(device=self._device, index=INTX)
        for action in line.timer():
            self._perform(line, action)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def quietly(self, move: Callable[[], None]) -> None:
        """For what nobody waits for: a failure becomes ``DEVICE_ERROR``."""
        try:
            move()
        except CommandError as error:
            _log.warning(
                "Device %s: completing an interrupt failed: %s", self._device, error, extra=about(device=self._device)
            )
            self._environment.emit(DeviceError(device=self._device, reason=f"An INTx could not be completed: {error}"))


_KERNEL: Final = {Action.HOST_MASK: vfio.IrqAction.MASK, Action.HOST_UNMASK: vfio.IrqAction.UNMASK}
_REQUESTS: Final = {action: vfio.SetIrqs.now(asked, INTX) for action, asked in _KERNEL.items()}
