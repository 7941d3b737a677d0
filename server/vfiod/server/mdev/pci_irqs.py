"""The interrupts of a PCI device in Python, with the semantics of the kernel's vfio-pci.

A parent's device hands its :meth:`~vfiod.server.mdev.parent.MediatedDevice.set_irqs` to :meth:`PciIrqs.set_irqs`, and
says what its hardware does with :meth:`PciIrqs.set_line`, :meth:`PciIrqs.message`, :meth:`PciIrqs.error`.

Source: ``drivers/vfio/vfio_main.c`` (``vfio_set_irqs_validate_and_prepare``) and ``drivers/vfio/pci/vfio_pci_intrs.c``.
The rules that are easily missed:

* one kind is active at a time; another one is EINVAL until the first is disabled (TRIGGER, no data, count 0);
* INTx masks itself when it fires; UNMASK fires it again at once while the line is still up;
* the loopback trigger of INTx (no data, or BOOL) does not mask;
* MSI is enabled with as many vectors as the first request reaches, and does not grow; MSI-X too, unless it is made
  ``resizable`` (then no NORESIZE): vectors beyond come one by one;
* an MSI-X message to a vector without an eventfd stays pending, and is sent when it gets one; with MSI it is lost;
* MASK and UNMASK of anything but INTx is ENOTTY, MASK by eventfd as well;
* a second eventfd for UNMASK is EBUSY until -1 took the first away.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from typing import Final

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import VFIO_PCI_NUM_IRQS, IrqAction, IrqData, PciIrq, SetIrqs
from vfiod.server.mdev.eventfds import EventFd, drain, duplicate, open_all
from vfiod.server.mdev.parent import Host, IrqInfo, Saved, Watch

__all__ = ["PciIrqs"]

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_INTX: Final = PciIrq.INTX
_EVENTFD: Final = IrqData.EVENTFD
_NONE: Final = IrqData.NONE


class PciIrqs:
    """All interrupts of one PCI device. Its methods may be called from any thread, and never wait.

    Args:
        host: the device's host; watches the eventfd that unmasks INTx.
        intx: whether the device has an interrupt pin.
        msi: vectors of its MSI capability: 0, or a power of two to 32.
        err: whether it reports errors (a PCI Express device).
        granted: vectors that can really be had, to be asked for again when more are wanted; None: all.
        msix: vectors of its MSI-X capability: 0 to 2048.
        resizable: whether MSI-X vectors can be added while others are in use.

    """

    def __init__(
        self,
        host: Host,
        *,
        intx: bool = True,
        msi: int = 0,
        err: bool = False,
        granted: int | None = None,
        msix: int = 0,
        resizable: bool = False,
    ) -> None:
        self._host = host
        self._granted = max(msi, msix) if granted is None else granted
        self._resizable = resizable
        self._counts: Mapping[int, int] = {
            PciIrq.INTX: int(intx),
            PciIrq.MSI: msi,
            PciIrq.MSIX: msix,
            PciIrq.ERR: int(err),
            PciIrq.REQ: 1,
        }
        self._lock = threading.RLock()
        self._kind: PciIrq | None = None
        # INTx
        self._trigger: EventFd | None = None
        self._unmask: Watch | None = None
        self._unmask_fd: FileDescriptor | None = None  # the watch's
        self._masked = False
        self._line = False
        self._intx_disable = False
        # MSI, MSI-X: one entry per enabled vector
        self._vectors: list[EventFd | None] = []
        self._pending: set[int] = set()  # MSI-X
        # ERR and REQ
        self._single: dict[int, EventFd] = {}
        self._handlers: Mapping[tuple[int, IrqAction], Callable[[SetIrqs], int]] = {
            (PciIrq.INTX, IrqAction.MASK): self._intx_mask,
            (PciIrq.INTX, IrqAction.UNMASK): self._intx_unmask,
            (PciIrq.INTX, IrqAction.TRIGGER): self._intx_trigger,
            (PciIrq.MSI, IrqAction.TRIGGER): self._msi_trigger,
            (PciIrq.MSIX, IrqAction.TRIGGER): self._msi_trigger,
            (PciIrq.ERR, IrqAction.TRIGGER): self._single_trigger,
            (PciIrq.REQ, IrqAction.TRIGGER): self._single_trigger,
        }

    # --- the user's side: VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS ------------------------------

    def info(self, index: int) -> IrqInfo:
        """What an index has. Raises EINVAL for an unknown one, and for ERR on a device without it, as vfio-pci."""
        count = self._counts.get(index)
        if count is None or (index == PciIrq.ERR and not count):
            raise OSError(errno.EINVAL, f"there is no interrupt index {index}")
        intx = index == PciIrq.INTX
        noresize = not intx and not (index == PciIrq.MSIX and self._resizable)
        return IrqInfo(count=count, maskable=intx, automasked=intx, noresize=noresize)

    def fds(self) -> dict[str, int]:
        """The duplicates of its user's eventfds, by what they are for. INTx's unmasking one is its host's."""
        with self._lock:
            kind = "" if self._kind is None else self._kind.name.lower()
            named = {} if self._trigger is None else {"intx trigger": self._trigger}
            named |= {f"{kind}{number} trigger": one for number, one in enumerate(self._vectors) if one is not None}
            named |= {f"{PciIrq(index).name.lower()} trigger": one for index, one in self._single.items()}
            return {name: one.number for name, one in named.items() if one.number >= 0}

    def set_irqs(self, request: SetIrqs) -> int:
        """``VFIO_DEVICE_SET_IRQS``. Returns 0, or how many vectors can be had. Raises OSError as vfio-pci does."""
        index, start, count = request.index, request.start, request.count
        if not 0 <= index < VFIO_PCI_NUM_IRQS:
            raise OSError(errno.EINVAL, f"there is no interrupt index {index}")
        has = self._counts[index]
        if start < 0 or count < 0 or start >= has or start + count > has:
            raise OSError(errno.EINVAL, f"index {index} has {has} interrupts, not {start} to {start + count - 1}")
        handler = self._handlers.get((index, request.action))
        if handler is None:
            raise OSError(errno.ENOTTY, f"index {index} cannot do {request.action.name}")
        with self._lock:
            return handler(request)

    # --- over a change of the process ---------------------------------------------------------------

    def save(self) -> Saved:
        """What SET_IRQS set up, and what the device says meanwhile."""
        with self._lock:
            fds = {} if self._trigger is None else {"intx": self._trigger.fd}
            if self._unmask_fd is not None:
                fds["unmask"] = self._unmask_fd
            fds |= {f"vector{number}": one.fd for number, one in enumerate(self._vectors) if one is not None}
            fds |= {f"single{index}": one.fd for index, one in self._single.items()}
            return Saved(
                {
                    "kind": None if self._kind is None else int(self._kind),
                    "masked": self._masked,
                    "line": self._line,
                    "intx_disable": self._intx_disable,
                    "vectors": len(self._vectors),
                    "pending": sorted(self._pending),
                },
                fds,
            )

    def restore(self, saved: Saved) -> None:
        """Be as saved. Nothing fires by that: what was to fire has fired."""
        values, fds = saved.values, saved.fds
        with self._lock:
            self._kind = None if values["kind"] is None else PciIrq(values["kind"])
            self._masked, self._line, self._intx_disable = values["masked"], values["line"], values["intx_disable"]
            self._vectors = [None] * values["vectors"]
            self._pending = set(values["pending"])
            for name, fd in fds.items():
                if name == "intx":
                    self._trigger = EventFd.of(fd)
                elif name == "unmask":
                    self._watch_fd(fd)
                elif name.startswith("vector"):
                    self._vectors[int(name.removeprefix("vector"))] = EventFd.of(fd)
                else:
                    self._single[int(name.removeprefix("single"))] = EventFd.of(fd)

    # --- the device's side ------------------------------------------------------------------------

    @property
    def kind(self) -> PciIrq | None:
        """What is enabled: INTX, MSI, MSIX, or None."""
        return self._kind

    @property
    def vectors(self) -> int:
        """How many MSI or MSI-X vectors are enabled."""
        return len(self._vectors)

    @property
    def pending(self) -> frozenset[int]:
        """MSI-X vectors with a message that could not be sent (the bits of the PBA)."""
        return frozenset(self._pending)

    def forget_pending(self) -> None:
        """The device was reset: what it had to say is void."""
        with self._lock:
            self._pending.clear()

    def set_line(self, level: bool) -> None:
        """The device raises or lowers its INTx. A line that is up fires as soon as it is enabled and not masked."""
        with self._lock:
            self._line = level
            self._settle_intx()

    def set_intx_disable(self, disable: bool) -> None:
        """The Interrupt Disable bit of the command register: the device keeps its line to itself."""
        with self._lock:
            self._intx_disable = disable
            self._settle_intx()

    def message(self, vector: int) -> bool:
        """The device sends an MSI or MSI-X message; whether somebody listens to that vector."""
        with self._lock:
            trigger = self._vectors[vector] if vector < len(self._vectors) else None
            if trigger is not None:
                trigger.signal()
            elif self._kind is PciIrq.MSIX:
                self._pending.add(vector)
            return trigger is not None

    def error(self) -> bool:
        """An uncorrectable error happened (ERR); whether somebody listens."""
        return self._signal_single(PciIrq.ERR)

    def request(self) -> bool:
        """The host wants the device back (REQ); whether somebody listens."""
        return self._signal_single(PciIrq.REQ)

    def close(self) -> None:
        """Disable everything and let every eventfd go."""
        with self._lock:
            self._disable_intx()
            self._disable_msi()
            for trigger in self._single.values():
                trigger.close()
            self._single.clear()

    # --- INTx --------------------------------------------------------------------------------------

    def _settle_intx(self) -> None:
        if self._line and self._kind is PciIrq.INTX and not self._masked and not self._intx_disable:
            self._masked = True
            if self._trigger is not None:
                self._trigger.signal()

    def _intx_mask(self, request: SetIrqs) -> int:
        self._only_intx(request)
        if request.data is IrqData.EVENTFD:
            raise OSError(errno.ENOTTY, "INTx cannot be masked by an eventfd")
        if _applies(request, 0):
            self._masked = True
        return 0

    def _intx_unmask(self, request: SetIrqs) -> int:
        self._only_intx(request)
        if request.data is _EVENTFD:
            self._watch_unmask(request.fds[0])
        elif _applies(request, 0):
            self._do_unmask()
        return 0

    def _intx_trigger(self, request: SetIrqs) -> int:
        if self._kind is PciIrq.INTX and request.is_disable:
            self._disable_intx()
            return 0
        if self._kind not in (PciIrq.INTX, None) or request.count != 1:
            raise OSError(errno.EINVAL, _not_now(self._kind, request))
        if request.data is IrqData.EVENTFD:
            # Duplicated before anything changes: a bad fd leaves all as it was.
            trigger = EventFd(request.fds[0]) if request.fds[0] >= 0 else None
            old, self._trigger = self._trigger, trigger
            if old is not None:
                old.close()
            if self._kind is None:
                self._kind, self._masked = PciIrq.INTX, False
                self._settle_intx()
            return 0
        if self._kind is None:
            raise OSError(errno.EINVAL, "INTx is not enabled: give it an eventfd first")
        if _applies(request, 0) and self._trigger is not None and not self._intx_disable:
            self._trigger.signal()
        return 0

    def _only_intx(self, request: SetIrqs) -> None:
        if self._kind is not _INTX or request.count != 1:
            raise OSError(errno.EINVAL, _not_now(self._kind, request))

    def _do_unmask(self) -> None:
        self._masked = False
        self._settle_intx()

    def _watch_unmask(self, number: int) -> None:
        if number < 0:
            watch, self._unmask, self._unmask_fd = self._unmask, None, None
            if watch is not None:
                watch.cancel()
            return
        if self._unmask is not None:
            raise OSError(errno.EBUSY, "INTx has an eventfd that unmasks it: take it away with -1 first")
        self._watch_fd(duplicate(number))

    def _watch_fd(self, fd: FileDescriptor) -> None:
        lent = fd.number

        def ready() -> None:
            with self._lock:
                # Cancelled by another thread just now? Then the number may be somebody else's file already.
                if self._unmask is watch and drain(lent):
                    self._do_unmask()

        self._unmask_fd = fd
        watch = self._unmask = self._host.watch(fd, ready)

    def _disable_intx(self) -> None:
        if self._kind is not PciIrq.INTX:
            return
        self._watch_unmask(-1)
        if self._trigger is not None:
            self._trigger.close()
        self._trigger, self._kind, self._masked = None, None, False

    # --- MSI ---------------------------------------------------------------------------------------

    def _msi_trigger(self, request: SetIrqs) -> int:
        kind = PciIrq(request.index)
        if self._kind is kind and request.is_disable:
            self._disable_msi()
            return 0
        if self._kind not in (kind, None):
            raise OSError(errno.EINVAL, _not_now(self._kind, request))
        start, count = request.start, request.count
        if request.data is IrqData.EVENTFD:
            return self._msi_eventfds(kind, start, request.fds)
        if self._kind is None:
            raise OSError(errno.EINVAL, f"{kind.name} is not enabled: give it eventfds first")
        for vector in range(start, min(start + count, len(self._vectors))):
            trigger = self._vectors[vector]
            if trigger is not None and _applies(request, vector - start):
                trigger.signal()
        return 0

    def _msi_eventfds(self, kind: PciIrq, start: int, fds: tuple[int, ...]) -> int:
        end = start + len(fds)
        grows = kind is PciIrq.MSIX and self._resizable
        if self._kind is None and not fds:
            raise OSError(errno.EINVAL, f"{kind.name} is enabled with at least one vector")
        if self._kind is not None and end > len(self._vectors) and not grows:
            raise OSError(
                errno.EINVAL,
                f"{kind.name} is enabled with {len(self._vectors)} vectors and cannot grow: disable it first",
            )
        if end > self._granted:
            return self._granted
        try:
            fresh = open_all(fds)
        except OSError:
            # vfio_msi_set_block takes the eventfds of the whole block away when one is bad.
            if self._kind is not None:
                self._replace(start, [None] * min(len(fds), len(self._vectors) - start))
            raise
        self._kind = kind
        self._vectors += [None] * (end - len(self._vectors))
        self._replace(start, fresh)
        return 0

    def _replace(self, start: int, fresh: list[EventFd | None]) -> None:
        for vector, trigger in enumerate(fresh, start):
            old, self._vectors[vector] = self._vectors[vector], trigger
            if old is not None:
                old.close()
            if trigger is not None and vector in self._pending:
                self._pending.discard(vector)
                trigger.signal()

    def _disable_msi(self) -> None:
        if self._kind not in (PciIrq.MSI, PciIrq.MSIX):
            return
        self._replace(0, [None] * len(self._vectors))
        self._vectors, self._kind = [], None

    # --- ERR and REQ ---------------------------------------------------------------------------------

    def _single_trigger(self, request: SetIrqs) -> int:
        """``vfio_pci_set_ctx_trigger_single``."""
        index, has = request.index, self._single.get(request.index)
        if request.data is IrqData.NONE:
            if has is None:
                raise OSError(errno.EINVAL, f"index {index} has no eventfd")
            if request.count:
                has.signal()
            else:
                self._single.pop(index).close()
            return 0
        if not request.count:
            raise OSError(errno.EINVAL, f"index {index} takes a count of 1")
        if request.data is IrqData.BOOL:
            if has is not None and request.values[0]:
                has.signal()
            return 0
        fresh = EventFd(request.fds[0]) if request.fds[0] >= 0 else None
        if has is not None:
            self._single.pop(index).close()
        if fresh is not None:
            self._single[index] = fresh
        return 0

    def _signal_single(self, index: int) -> bool:
        with self._lock:
            trigger = self._single.get(index)
            if trigger is not None:
                trigger.signal()
            return trigger is not None


def _applies(request: SetIrqs, position: int) -> bool:
    return request.data is _NONE or (request.data is IrqData.BOOL and request.values[position])


def _not_now(kind: PciIrq | None, request: SetIrqs) -> str:
    return (
        f"{kind.name if kind is not None else 'nothing'} is enabled; index {request.index} with count {request.count}"
    )
