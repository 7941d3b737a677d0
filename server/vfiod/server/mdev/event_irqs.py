"""Interrupt indexes that are one eventfd each: what the kernel's vfio-ccw and vfio-ap have.

Source: ``drivers/s390/cio/vfio_ccw_ops.c`` (``vfio_ccw_mdev_set_irqs``), ``drivers/s390/crypto/vfio_ap_ops.c``. TRIGGER
is all they can do; with an eventfd it replaces the one that was there, -1 takes it away.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import IrqAction, IrqData, SetIrqs
from vfiod.server.mdev.eventfds import EventFd
from vfiod.server.mdev.parent import IrqInfo

__all__ = ["EventIrqs"]


class EventIrqs:
    """The interrupts of one device. Its methods may be called from any thread, and never wait.

    Args:
        count: how many indexes there are, from 0.

    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._triggers: dict[int, EventFd] = {}

    def info(self, index: int) -> IrqInfo:
        """One interrupt per index. Raises EINVAL for an unknown one."""
        if not 0 <= index < self._count:
            raise OSError(errno.EINVAL, f"there is no interrupt index {index}")
        return IrqInfo(count=1)

    def set_irqs(self, request: SetIrqs) -> int:
        """``VFIO_DEVICE_SET_IRQS``. Returns 0; raises OSError as the kernel's drivers do."""
        self.info(request.index)
        if request.action is not IrqAction.TRIGGER:
            raise OSError(errno.EINVAL, f"index {request.index} cannot do {request.action.name}")
        with self._lock:
            has = self._triggers.get(request.index)
            if request.data is IrqData.EVENTFD and request.fds:
                fresh = EventFd(request.fds[0]) if request.fds[0] >= 0 else None
                if has is not None:
                    self._triggers.pop(request.index).close()
                if fresh is not None:
                    self._triggers[request.index] = fresh
            elif has is not None and (request.data is IrqData.NONE or (request.values and request.values[0])):
                has.signal()
        return 0

    def signal(self, index: int) -> bool:
        """It fires; whether somebody listens."""
        with self._lock:
            trigger = self._triggers.get(index)
            if trigger is not None:
                trigger.signal()
            return trigger is not None

    def save(self) -> dict[str, FileDescriptor]:
        """The eventfds by index, lent."""
        with self._lock:
            return {f"irq{index}": one.fd for index, one in self._triggers.items()}

    def restore(self, fds: Mapping[str, FileDescriptor]) -> None:
        """Have those again; other names are passed over."""
        with self._lock:
            for name, fd in fds.items():
                if name.startswith("irq"):
                    self._triggers[int(name.removeprefix("irq"))] = EventFd.of(fd)

    def close(self) -> None:
        """Let every eventfd go."""
        with self._lock:
            for trigger in self._triggers.values():
                trigger.close()
            self._triggers.clear()

    def fds(self) -> Mapping[str, int]:
        """What it has open."""
        with self._lock:
            return {f"irq{index} trigger": one.number for index, one in self._triggers.items() if one.number >= 0}
