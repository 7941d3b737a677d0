"""What every relay does alike: the fast path with its timer, and what is said of an interrupt that was passed on.

A relay hears a device's interrupts and passes them on: :mod:`vfiod.server.devices.relay` those of a PCI device,
:mod:`vfiod.server.devices.platform_relay` those of a platform device. On the loop's thread.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable
from typing import Final, Generic, ParamSpec, Protocol, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import Irq, IrqStorm
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.environment import Environment, Timer
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.intx import Action, FastState
from vfiod.server.logs import about

__all__ = ["KERNEL", "RelayBase", "tell_delivered", "tell_fired"]

_log: Final = logging.getLogger(__name__)

KERNEL: Final = {Action.HOST_MASK: vfio.IrqAction.MASK, Action.HOST_UNMASK: vfio.IrqAction.UNMASK}
"""What the kernel does of the actions, and what it is asked for."""

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_OFF: Final = Action.FAST_PATH_OFF
_ON: Final = Action.FAST_PATH_ON
_START: Final = Action.START_TIMER
_STOP: Final = Action.STOP_TIMER


class Lines(Protocol):
    """The state machine of a relay, as far as the fast path is concerned.

    Attributes:
        fast_path: whether regions may be accessed by their mapping.
        timed: whether a timer brings the fast path back.

    """

    fast_path: FastState
    timed: bool


LinesT = TypeVar("LinesT", bound=Lines)
P = ParamSpec("P")


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


class RelayBase(abc.ABC, Generic[LinesT]):
    """Passes on the relayed interrupts of one device.

    Args:
        device: what the device is called, for messages and events.
        backend: where it comes from.
        environment: events, watching, timers.
        mmap_timeout_ms: before the fast path returns; 0: never.
        on_trap: called with True when accesses must be seen from now on, with False when not any more.

    Attributes:
        disabled: the kernel has no interrupt of this device now (a reset is at work): it is told nothing.

    """

    _ONE: str
    """What one of its interrupts is called in a message."""

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

    def _unwatch(self, vector: Vector, own: FileDescriptor) -> None:
        self._environment.unwatch(own.number)
        if vector.resample is not None:
            self._environment.unwatch(vector.resample.number)

    # --- the fast path ------------------------------------------------------------------------------------

    def _perform(self, lines: LinesT, action: Action) -> None:
        """Do an action that is neither the kernel's nor a vector's."""
        if action is _OFF:
            self._on_trap(True)
            if trace.fast_path_off.on:
                trace.fast_path_off(device=self._device)
        elif action is _ON:
            self._on_trap(False)
            if trace.fast_path_on.on:
                trace.fast_path_on(device=self._device)
        elif action is _START:
            self._stop_timer()
            self._timer = self._environment.after(self._mmap_timeout_ms, functools.partial(self._timer_fired, lines))
        elif action is _STOP:
            self._stop_timer()

    def _perform_again(self, lines: LinesT) -> None:
        """Lines that another process kept: the fast path stays off if it was, and its timer begins anew."""
        if lines.fast_path is FastState.OFF:
            self._perform(lines, Action.FAST_PATH_OFF)
            if lines.timed:
                self._perform(lines, Action.START_TIMER)

    @abc.abstractmethod
    def _timer_fired(self, lines: LinesT) -> None:
        """The time without an interrupt is over: ``_timer`` is none any more, and the lines say what follows."""

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def quietly(self, move: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """For what nobody waits for: a failure becomes ``DEVICE_ERROR``."""
        try:
            move(*args, **kwargs)
        except CommandError as error:
            _log.warning(
                "Device %s: completing an interrupt failed: %s", self._device, error, extra=about(device=self._device)
            )
            reason = f"{self._ONE} could not be completed: {error}"
            self._environment.emit(DeviceError(device=self._device, reason=reason))
