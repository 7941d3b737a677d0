"""Telling the kernel about one interrupt of a platform device: from one binding to another, or not at all.

Each change is bracketed by mask and unmask where the index is maskable, on failure too (section 7 of the reference):
a level line must not fire into nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import CommandError
from vfiod.server.backends.base import Backend
from vfiod.server.devices.arming import InterruptsLost
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.vectors import Vector

__all__ = ["PlatformArming", "ResampleRefused"]

_log: Final = logging.getLogger(__name__)

_MASK: Final = vfio.IrqAction.MASK
_UNMASK: Final = vfio.IrqAction.UNMASK
_TRIGGER: Final = vfio.IrqAction.TRIGGER


class ResampleRefused(CommandError):
    """The direct mode cannot be: the kernel took the trigger, but not the resample eventfd. All is as it was."""


class PlatformArming:
    """Changes the bindings of one device's interrupts in the kernel.

    Args:
        device: what the device is called, for messages.
        backend: where it comes from.

    """

    def __init__(self, device: str, backend: Backend) -> None:
        self._device = device
        self._backend = backend

    def change(self, one: IrqIndex, old: Vector | None, new: Vector | None, *, masked: bool) -> None:
        """Bind ``new`` in place of ``old``; None: not bound. Tells only the kernel.

        Args:
            one: the index.
            old: what the kernel has.
            new: what it shall have.
            masked: the user masked it: it stays so.

        Raises the CommandError that stopped it (ResampleRefused for the resample eventfd), and all is as it was; or
        :class:`InterruptsLost` when the way back failed too, and it is disabled.

        """
        if one.info.maskable and not masked:
            self._now(_MASK, one)
        try:
            if _resamples(old):
                self._bind(_UNMASK, one, -1)
            if new is None:
                # It stays masked: a line that nobody handles must not be let loose. The next binding unmasks it.
                self._backend.set_irqs(vfio.SetIrqs.disable(one.index))
            else:
                self._set(one, new)
                if one.info.maskable and not masked:
                    self._now(_UNMASK, one)
        except CommandError as error:
            self._back(one, old, new, masked=masked, cause=error)
            raise

    def _set(self, one: IrqIndex, new: Vector) -> None:
        self._bind(_TRIGGER, one, new.kernel_side.number)
        if not _resamples(new) or new.resample is None:
            return
        try:
            self._bind(_UNMASK, one, new.resample.number)
        except CommandError as error:
            raise ResampleRefused(str(error), errno=error.errno) from error

    def _back(
        self, one: IrqIndex, old: Vector | None, new: Vector | None, *, masked: bool, cause: CommandError
    ) -> None:
        if _resamples(new):
            self._quietly(one, lambda: self._bind(_UNMASK, one, -1))
        if old is None:
            self._quietly(one, lambda: self._backend.set_irqs(vfio.SetIrqs.disable(one.index)))
            if one.info.maskable:
                self._quietly(one, lambda: self._now(_UNMASK, one))
            return
        try:
            if _resamples(old):
                self._quietly(one, lambda: self._bind(_UNMASK, one, -1))
            self._set(one, old)
            if one.info.maskable and not masked:
                self._now(_UNMASK, one)
        except CommandError as error:
            self.disarm(one, old)
            raise InterruptsLost(
                "VFIO_DEVICE_SET_IRQS",
                f"{one.name} of device '{self._device}'",
                errno=error.errno or "EIO",
                advice=f"{cause}; then its former eventfds could not be set up again ({error}): "
                "it is stopped now, irq-start it again",
            ) from cause

    def disarm(self, one: IrqIndex, old: Vector) -> None:
        """Take everything back from the kernel, whatever fails. May be called in a thread."""
        if one.info.maskable:
            self._quietly(one, lambda: self._now(_MASK, one))
        if _resamples(old):
            # A resample eventfd may outlive vfiod's own close of it: it is taken back explicitly.
            self._quietly(one, lambda: self._bind(_UNMASK, one, -1))
        self._quietly(one, lambda: self._backend.set_irqs(vfio.SetIrqs.disable(one.index)))

    def unmask(self, one: IrqIndex) -> None:
        """Unmask it now: the EOI of a direct one. OperationFailed."""
        self._now(_UNMASK, one)

    def trigger(self, one: IrqIndex) -> None:
        """Make the kernel signal its eventfd. OperationFailed."""
        self._now(_TRIGGER, one)

    def _now(self, action: vfio.IrqAction, one: IrqIndex) -> None:
        self._backend.set_irqs(vfio.SetIrqs.now(action, one.index))

    def _bind(self, action: vfio.IrqAction, one: IrqIndex, fd: int) -> None:
        self._backend.set_irqs(vfio.SetIrqs.eventfds(action, one.index, (fd,)))

    def _quietly(self, one: IrqIndex, step: Callable[[], None]) -> None:
        try:
            step()
        except CommandError as error:
            _log.debug("Device %s: a step of disarming %s failed: %s", self._device, one.name, error)


def _resamples(vector: Vector | None) -> bool:
    """Whether the kernel has its resample eventfd."""
    return vector is not None and vector.mode is IrqMode.DIRECT and vector.resample is not None
