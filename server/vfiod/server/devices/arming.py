"""How what the kernel has been told about a device's interrupts is changed: all of it, or nothing.

:class:`Arming` takes the steps that :mod:`vfiod.server.interrupts.modes` plans from what is bound
(:mod:`vfiod.server.devices.bound`) to what is to be; when one fails it takes the steps back.
"""

from __future__ import annotations

import logging
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.words import IrqKind
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.server.backends.base import Backend, FewerVectors
from vfiod.server.devices.bound import Bound
from vfiod.server.devices.relay import Relay
from vfiod.server.interrupts.messages import next_try, runs
from vfiod.server.interrupts.modes import NOTHING, Do, Side, Step, plan
from vfiod.server.logs import about

__all__ = ["Arming", "InterruptsLost", "NotEnough"]

_log: Final = logging.getLogger(__name__)


class InterruptsLost(OperationFailed):
    """A change failed, and so did the way back: the device has no interrupt now."""


class NotEnough(OperationFailed):
    """The host has fewer vectors than were asked for; everything is as it was.

    Attributes:
        asked: how many vectors were asked for.
        granted: how many the host has; None when it does not say.

    """

    def __init__(self, operation: str, what: str, *, errno: str, advice: str, asked: int, granted: int | None) -> None:
        super().__init__(operation, what, errno=errno, advice=advice)
        self.asked = asked
        self.granted = granted


class Arming:
    """Takes the steps of a change. On the loop's thread.

    Args:
        device: what the device is called, for messages.
        backend: where it comes from.
        relay: listens, and keeps the line.

    """

    def __init__(self, device: str, backend: Backend, relay: Relay) -> None:
        self._device = device
        self._backend = backend
        self._relay = relay

    def change(self, old: Bound, new: Bound) -> None:
        """Go from ``old`` to ``new``.

        Raises the CommandError that stopped it, when everything is as it was again; :class:`InterruptsLost` when it
        is not, because the way back failed too: then the kernel has been told to disable everything.
        """
        way = plan(old.setup(), new.setup())
        try:
            for step in way.forward:
                self.take(step, old, new)
        except BaseException as error:
            self._go_back(way.back, old, new, error)
            if isinstance(error, FewerVectors):
                raise _fewer(error, new.kind) from error
            raise

    def _go_back(self, steps: tuple[Step, ...], old: Bound, new: Bound, cause: BaseException) -> None:
        for step in steps:
            try:
                self.take(step, old, new)
            except CommandError as error:
                if step.may_fail:
                    _log.debug("Device %s: %s failed on the way back: %s", self._device, step.do.name, error)
                    continue
                self.abandon(old)
                self.abandon(new)
                raise InterruptsLost(
                    "VFIO_DEVICE_SET_IRQS",
                    f"device '{self._device}'",
                    errno=error.errno or "EIO",
                    advice=f"{cause}; then the former interrupts could not be set up again ({error}): "
                    "it has no interrupt now, irq-start it again",
                ) from cause

    def abandon(self, bound: Bound) -> None:
        """Stop listening and disable, whatever fails: for what cannot be kept."""
        for vector in bound.vectors.values():
            self._relay.unlisten(vector)
        if bound.line is not None:
            self._relay.release(bound.line)
        self.disarm(bound)

    def disarm(self, bound: Bound) -> None:
        """Take everything back from the kernel, whatever fails. May be called in a thread."""
        for step in plan(bound.setup(), NOTHING).forward:
            if step.do in (Do.DISARM_RESAMPLE, Do.DISABLE):
                try:
                    self.take(step, bound, bound)
                except CommandError as error:
                    _log.warning(
                        "Device %s: %s failed: %s", self._device, step.do.name, error, extra=about(device=self._device)
                    )

    def take(self, step: Step, old: Bound, new: Bound) -> None:
        """One step. Raises CommandError, having done nothing (a run of vectors: those before it)."""
        bound = old if step.side is Side.OLD else new
        match step.do:
            case Do.UNLISTEN:
                for number in step.vectors:
                    self._relay.unlisten(bound.vectors[number])
            case Do.LISTEN:
                for number in step.vectors:
                    self._relay.listen(bound.index, bound.vectors[number], bound.line)
            case Do.MASK | Do.UNMASK:
                action = vfio.IrqAction.MASK if step.do is Do.MASK else vfio.IrqAction.UNMASK
                for start, count in runs(step.vectors):
                    self._backend.set_irqs(vfio.SetIrqs.now(action, bound.index, start, count))
            case Do.CLEAR:
                if bound.line is not None:
                    self._relay.release(bound.line)
            case Do.DISABLE:
                self._backend.set_irqs(vfio.SetIrqs.disable(bound.index))
            case Do.ARM:
                for start, count in runs(step.vectors):
                    bindings = map(bound.vectors.get, range(start, start + count))
                    fds = tuple(-1 if vector is None else vector.kernel_side.number for vector in bindings)
                    self._backend.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, bound.index, fds, start))
            case Do.ARM_RESAMPLE | Do.DISARM_RESAMPLE:
                for number in step.vectors:
                    resample = bound.vectors[number].resample
                    fd = -1 if resample is None or step.do is Do.DISARM_RESAMPLE else resample.number
                    self._backend.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.UNMASK, bound.index, (fd,), number))
            case Do.SIGNAL:
                for number in step.vectors:
                    bound.vectors[number].consumer.signal(1)


def _fewer(error: FewerVectors, kind: IrqKind) -> NotEnough:
    # MSI comes in powers of two, MSI-X does not; without the host's number halving is the best guess for both.
    if kind is IrqKind.MSI or error.granted is None:
        available, power = next_try(error.asked, error.granted), " (a power of two)"
    else:
        available, power = error.granted, ""
    if error.granted is None:
        advice = (
            f"{error.asked} vectors were asked for, the host has fewer and does not say how many: "
            f"try {available}{power}, vectors 0 to {available - 1}"
        )
    else:
        advice = f"{error.asked} vectors were asked for, the host has {error.granted}: " + (
            f"{available} are available{power}, start vectors 0 to {available - 1}"
            if available
            else "none are available"
        )
    return NotEnough(
        error.operation,
        error.what,
        errno=error.errno or "ENOSPC",
        advice=advice,
        asked=error.asked,
        granted=error.granted,
    )
