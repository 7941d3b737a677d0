"""The interrupts of a platform device in Python, with the semantics of the kernel's vfio-platform.

A parent's device hands its :meth:`~vfiod.server.mdev.parent.MediatedDevice.set_irqs` to :meth:`PlatformIrqs.set_irqs`,
and says what its hardware does with :meth:`PlatformIrqs.set_line`, :meth:`PlatformIrqs.pulse` and
:meth:`PlatformIrqs.message`. Each IRQ is an index of its own, with a count of 1; messages share one index, the last.

Source: ``drivers/vfio/platform/vfio_platform_irq.c``; for messages the RFC "vfio/platform: add support for msi" (v3).
The rules that are easily missed:

* a level IRQ is MASKABLE and AUTOMASKED, an edge IRQ neither: MASK and UNMASK of it are EINVAL;
* an IRQ without a trigger is disabled: a line that is up, or an edge that came, fires as soon as it has one;
* a trigger given, changed or taken away leaves the mask as it is;
* the loopback trigger of a level IRQ (no data, or BOOL) masks it as a real one does, and does nothing while masked;
* UNMASK fires again at once while the line is still up;
* MASK and UNMASK may each have one eventfd; a second is EBUSY until -1 took the first away;
* messages are granted as a block by the first request, which a failure undoes whole; the block does not grow (EINVAL),
  and is released whole (TRIGGER, no data, count 0).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import Final

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import IrqAction, IrqData, IrqType, IrqTypeCap, MsiMessage, SetIrqs
from vfiod.server.mdev.eventfds import EventFd, drain, duplicate, open_all
from vfiod.server.mdev.parent import Host, IrqInfo, Saved, Watch

__all__ = ["PlatformIrqs"]

DOORBELL: Final = 0x0802_0040
"""Where messages go: MSI_SETSPI_NS of a GICv2m frame, where QEMU's ``virt`` board has it."""

FIRST_DATA: Final = 0x50
"""The data of the first message; the others follow."""

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_TRIGGER: Final = IrqAction.TRIGGER
_MASK: Final = IrqAction.MASK
_EVENTFD: Final = IrqData.EVENTFD
_NONE: Final = IrqData.NONE


class _Irq:
    """One interrupt: ``struct vfio_platform_irq``."""

    __slots__ = ("level", "line", "masked", "pending", "trigger", "watched", "watches")

    def __init__(self, level: bool) -> None:
        self.level = level
        self.trigger: EventFd | None = None
        self.masked = False
        self.line = False
        self.pending = False  # an edge came while it was disabled (IRQS_PENDING of the kernel's irq core)
        self.watches: dict[IrqAction, Watch] = {}
        self.watched: dict[IrqAction, FileDescriptor] = {}  # the watches'

    def fire(self) -> None:
        """``vfio_automasked_irq_handler`` or ``vfio_irq_handler``."""
        if self.masked:
            return
        self.masked = self.level
        if self.trigger is not None:
            self.trigger.signal()

    def settle(self) -> None:
        """Fire what waits, if it may now."""
        if self.trigger is not None and (self.line or self.pending):
            self.pending = False
            self.fire()


class PlatformIrqs:
    """All interrupts of one platform device. Its methods may be called from any thread, and never wait.

    Args:
        host: the device's host; watches the eventfds that mask and unmask.
        level: level IRQs: the first indexes.
        edge: edge IRQs: the indexes after them.
        messages: messages of the last index (extended IRQs, experimental); 0: there is no such index.
        granted: messages that can really be had, to be asked for again when more are wanted; None: all.

    """

    def __init__(
        self, host: Host, *, level: int = 1, edge: int = 0, messages: int = 0, granted: int | None = None
    ) -> None:
        self._host = host
        self._irqs: Sequence[_Irq] = tuple(_Irq(index < level) for index in range(level + edge))
        self._messages = messages
        self._granted = messages if granted is None else granted
        self._vectors: list[EventFd | None] = []
        self._lock = threading.RLock()

    @property
    def count(self) -> int:
        """How many indexes there are."""
        return len(self._irqs) + (self._messages > 0)

    # --- the user's side: VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS ------------------------------

    def info(self, index: int) -> IrqInfo:
        """What an index has. Raises EINVAL for an unknown one."""
        if 0 <= index < len(self._irqs):
            level = self._irqs[index].level
            return IrqInfo(count=1, maskable=level, automasked=level, noresize=False)
        if index == len(self._irqs) and self._messages:
            with self._lock:
                messages = tuple(MsiMessage(DOORBELL, FIRST_DATA + at) for at in range(len(self._vectors)))
            return IrqInfo(count=self._messages, type=IrqTypeCap(IrqType.MSI, 0), messages=messages)
        raise OSError(errno.EINVAL, f"there is no interrupt index {index}")

    def set_irqs(self, request: SetIrqs) -> int:
        """``VFIO_DEVICE_SET_IRQS``. Returns 0, or how many messages can be had. Raises OSError as vfio-platform."""
        index, start, count = request.index, request.start, request.count
        has = 1 if 0 <= index < len(self._irqs) else self.info(index).count
        if start < 0 or count < 0 or start >= has or start + count > has:
            raise OSError(errno.EINVAL, f"index {index} has {has} interrupts, not {start} to {start + count - 1}")
        with self._lock:
            if index == len(self._irqs):
                return self._set_messages(request)
            irq = self._irqs[index]
            if request.action is _TRIGGER:
                self._set_trigger(irq, request)
            else:
                self._set_mask(irq, request)
            return 0

    # --- over a change of the process ---------------------------------------------------------------

    def save(self) -> Saved:
        """What SET_IRQS set up, and what the device says meanwhile."""
        fds: dict[str, FileDescriptor] = {}
        with self._lock:
            for index, irq in enumerate(self._irqs):
                if irq.trigger is not None:
                    fds[f"irq{index}"] = irq.trigger.fd
                fds |= {f"watch{index}.{int(action)}": fd for action, fd in irq.watched.items()}
            fds |= {f"vector{number}": one.fd for number, one in enumerate(self._vectors) if one is not None}
            irqs = [[irq.masked, irq.line, irq.pending] for irq in self._irqs]
            return Saved({"irqs": irqs, "vectors": len(self._vectors)}, fds)

    def restore(self, saved: Saved) -> None:
        """Be as saved. Nothing fires by that: what was to fire has fired."""
        with self._lock:
            for irq, (masked, line, pending) in zip(self._irqs, saved.values["irqs"], strict=True):
                irq.masked, irq.line, irq.pending = masked, line, pending
            self._vectors = [None] * saved.values["vectors"]
            for name, fd in saved.fds.items():
                if name.startswith("vector"):
                    self._vectors[int(name.removeprefix("vector"))] = EventFd.of(fd)
                elif name.startswith("irq"):
                    self._irqs[int(name.removeprefix("irq"))].trigger = EventFd.of(fd)
                else:
                    index, _, action = name.removeprefix("watch").partition(".")
                    self._watch_fd(self._irqs[int(index)], IrqAction(int(action)), fd)

    # --- the device's side ------------------------------------------------------------------------

    def line(self, index: int) -> bool:
        """Whether a level IRQ's line is up."""
        return self._irqs[index].line

    def set_line(self, index: int, level: bool) -> None:
        """The device raises or lowers the line of a level IRQ. One that is up fires when it is enabled, not masked."""
        with self._lock:
            irq = self._irqs[index]
            irq.line = level
            irq.settle()

    def pulse(self, index: int) -> None:
        """The device sends an edge. One that comes while the IRQ has no trigger is kept; more of them are one."""
        with self._lock:
            irq = self._irqs[index]
            irq.pending = True
            irq.settle()

    def message(self, address: int, data: int) -> bool:
        """A source writes ``data`` to ``address``; whether that is a message somebody listens to."""
        with self._lock:
            vector = data - FIRST_DATA
            trigger = self._vectors[vector] if address == DOORBELL and 0 <= vector < len(self._vectors) else None
            if trigger is not None:
                trigger.signal()
            return trigger is not None

    def quiet(self) -> None:
        """The device was reset: all lines are down, and what it had to say is void."""
        with self._lock:
            for irq in self._irqs:
                irq.line = irq.pending = False

    def close(self) -> None:
        """Disable everything and let every eventfd go."""
        with self._lock:
            for irq in self._irqs:
                for watch in irq.watches.values():
                    watch.cancel()
                irq.watches.clear()
                irq.watched.clear()
                if irq.trigger is not None:
                    irq.trigger.close()
                irq.trigger, irq.masked, irq.pending, irq.line = None, False, False, False
            self._release()

    # --- level and edge -----------------------------------------------------------------------------

    def _set_trigger(self, irq: _Irq, request: SetIrqs) -> None:
        """``vfio_platform_set_irq_trigger``."""
        if request.is_disable:
            self._bind(irq, -1)
        elif request.count != 1:
            raise OSError(errno.EINVAL, f"index {request.index} takes a count of 1")
        elif request.data is IrqData.EVENTFD:
            self._bind(irq, request.fds[0])
        elif _applies(request, 0):
            irq.fire()

    def _bind(self, irq: _Irq, number: int) -> None:
        """``vfio_set_trigger``: the old one is gone even when the new one is refused."""
        old, irq.trigger = irq.trigger, None
        if old is not None:
            old.close()
        if number >= 0:
            irq.trigger = EventFd(number)
            irq.settle()

    def _set_mask(self, irq: _Irq, request: SetIrqs) -> None:
        """``vfio_platform_set_irq_mask``, ``vfio_platform_set_irq_unmask``."""
        if request.count != 1:
            raise OSError(errno.EINVAL, f"index {request.index} takes a count of 1")
        if not irq.level:
            raise OSError(errno.EINVAL, f"index {request.index} is an edge interrupt: it cannot be masked")
        if request.data is _EVENTFD:
            self._watch(irq, request)
        elif _applies(request, 0):
            _mask(irq, request.action)

    def _watch(self, irq: _Irq, request: SetIrqs) -> None:
        """``vfio_virqfd_enable``, ``vfio_virqfd_disable``."""
        action, number = request.action, request.fds[0]
        if number < 0:
            gone = irq.watches.pop(action, None)
            irq.watched.pop(action, None)
            if gone is not None:
                gone.cancel()
            return
        if action in irq.watches:
            raise OSError(
                errno.EBUSY, f"index {request.index} has an eventfd for {action.name}: take it away with -1 first"
            )
        self._watch_fd(irq, action, duplicate(number))

    def _watch_fd(self, irq: _Irq, action: IrqAction, fd: FileDescriptor) -> None:
        lent = fd.number

        def ready() -> None:
            with self._lock:
                # Cancelled by another thread just now? Then the number may be somebody else's file already.
                if irq.watches.get(action) is watch and drain(lent):
                    _mask(irq, action)

        irq.watched[action] = fd
        watch = irq.watches[action] = self._host.watch(fd, ready)

    # --- messages -------------------------------------------------------------------------------------

    def _set_messages(self, request: SetIrqs) -> int:
        if request.action is not IrqAction.TRIGGER:
            raise OSError(errno.EINVAL, f"index {request.index} holds messages: they cannot be masked")
        if request.is_disable:
            self._release()
            return 0
        start, count = request.start, request.count
        if request.data is IrqData.EVENTFD:
            return self._set_block(start, request.fds)
        if not self._vectors:
            raise OSError(errno.EINVAL, f"index {request.index} has no messages yet: give it eventfds first")
        for vector in range(start, min(start + count, len(self._vectors))):
            trigger = self._vectors[vector]
            if trigger is not None and _applies(request, vector - start):
                trigger.signal()
        return 0

    def _set_block(self, start: int, fds: Sequence[int]) -> int:
        end, granted = start + len(fds), len(self._vectors)
        if not fds:
            raise OSError(errno.EINVAL, "a block of messages has at least one")
        if granted and end > granted:
            raise OSError(
                errno.EINVAL, f"{granted} messages were granted, and a block does not grow: release it and ask again"
            )
        if end > self._granted:
            if not self._granted:
                raise OSError(errno.ENOSPC, "no message can be had")
            return self._granted
        try:
            fresh = open_all(fds)
        except OSError:
            if granted:
                self._replace(start, [None] * len(fds))  # as vfio_msi_set_block: what it covers has none any more
            raise
        if not granted:
            self._vectors = [None] * end
        self._replace(start, fresh)
        return 0

    def _replace(self, start: int, fresh: Sequence[EventFd | None]) -> None:
        for vector, trigger in enumerate(fresh, start):
            old, self._vectors[vector] = self._vectors[vector], trigger
            if old is not None:
                old.close()

    def _release(self) -> None:
        self._replace(0, [None] * len(self._vectors))
        self._vectors = []


def _mask(irq: _Irq, action: IrqAction) -> None:
    irq.masked = action is _MASK
    if not irq.masked:
        irq.settle()


def _applies(request: SetIrqs, position: int) -> bool:
    return request.data is _NONE or (request.data is IrqData.BOOL and request.values[position])
