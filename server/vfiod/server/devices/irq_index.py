"""The interrupt indexes of a device: their names, and what may be asked of which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.interrupts import IrqFlags
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor

__all__ = ["ERR", "INTX", "IRQ_NAMES", "REQ", "IrqIndex", "PciIrqIndex", "Started", "Wanted"]

IRQ_NAMES: Final = ("intx", "msi", "msix", "err", "req")
"""Names of the PCI interrupt indexes; one beyond them is ``irqN``."""

INTX: Final = int(vfio.PciIrq.INTX)
ERR: Final = int(vfio.PciIrq.ERR)
REQ: Final = int(vfio.PciIrq.REQ)

_KINDS: Final = {
    INTX: IrqKind.INTX,
    int(vfio.PciIrq.MSI): IrqKind.MSI,
    int(vfio.PciIrq.MSIX): IrqKind.MSIX,
}


class IrqIndex(Struct, frozen=True):
    """One interrupt index, as the device describes it.

    Attributes:
        device: what the device is called, for messages.
        info: from the device.

    """

    device: str
    info: vfio.IrqInfo

    @property
    def index(self) -> int:
        """VFIO index."""
        return self.info.index

    @property
    def name(self) -> str:
        """As commands know it."""
        return f"irq{self.index}"

    @property
    def kind(self) -> IrqKind:
        """Which kind it is when it is active; none for one that is no interrupt of the guest."""
        return IrqKind.NONE

    @property
    def reserved(self) -> bool:
        """Vfiod's own."""
        return False

    @property
    def flags(self) -> IrqFlags:
        """For ``query-irqs``."""
        return IrqFlags(
            eventfd=bool(self.info.flags & vfio.IrqFlags.EVENTFD),
            maskable=self.info.maskable,
            automasked=self.info.automasked,
            noresize=not self.info.resizable,
        )

    @property
    def requests(self) -> bool:
        """Whether it is REQ: the host wants the device back."""
        return False

    @property
    def passed_on(self) -> bool:
        """Whether vfiod hears it for whoever has the device, as it comes (a subchannel's I/O interrupt)."""
        return False

    def __str__(self) -> str:
        return f"Interrupt index {self.name} of device '{self.device}'"

    def check_free(self) -> None:
        """Refuse what belongs to vfiod. InvalidArgument."""
        if self.reserved:
            event = "DEVICE_REQUESTED" if self.requests else "DEVICE_ERROR"
            raise InvalidArgument(f"{self} belongs to vfiod: it becomes the event {event}")

    def check_vector(self, vector: int) -> None:
        """Refuse a vector it does not have. InvalidArgument."""
        if vector >= self.info.count:
            raise InvalidArgument(f"{self} has {self.info.count} vectors: there is no vector {vector}")

    def check_level(self) -> None:
        """Refuse what only a level interrupt can do. InvalidArgument."""
        if not self.info.automasked:
            raise InvalidArgument(f"{self} is edge triggered: there is nothing to complete")

    def check_maskable(self) -> None:
        """Refuse to mask what cannot be masked. InvalidArgument."""
        if not self.info.maskable:
            raise InvalidArgument(f"{self} cannot be masked or unmasked: it is not MASKABLE (VFIO_IRQ_INFO_MASKABLE)")

    def check_start(self, wanted: Sequence[Wanted]) -> None:
        """Refuse what could never be started. InvalidArgument."""
        self.check_free()
        self._check_present()
        if not self.info.flags & vfio.IrqFlags.EVENTFD:
            raise InvalidArgument(f"{self} cannot signal eventfds (VFIO_IRQ_INFO_EVENTFD)")
        seen: set[int] = set()
        for want in wanted:
            self.check_vector(want.vector)
            if want.vector in seen:
                raise InvalidArgument(f"Vector {want.vector} of {self.name} is named twice: name each once")
            seen.add(want.vector)
            if want.resample is not None and not self.info.automasked:
                raise InvalidArgument(
                    f"{self} is edge triggered: a resample eventfd (vector {want.vector}) completes level interrupts "
                    "only; leave it out"
                )

    def _check_present(self) -> None:
        """Refuse to start what is not there, or is no interrupt of the guest. InvalidArgument."""
        if not self.info.count:
            raise InvalidArgument(f"{self} has no interrupt (VFIO_DEVICE_GET_IRQ_INFO counts 0)")


class PciIrqIndex(IrqIndex, frozen=True):
    """One interrupt index of a PCI device: intx, msi, msix; err and req are vfiod's own."""

    @property
    def name(self) -> str:
        """As commands know it."""
        return IRQ_NAMES[self.index] if self.index < len(IRQ_NAMES) else f"irq{self.index}"

    @property
    def kind(self) -> IrqKind:
        """Which kind it is when it is active."""
        return _KINDS.get(self.index, IrqKind.NONE)

    @property
    def reserved(self) -> bool:
        """Vfiod's own."""
        return self.index in (ERR, REQ)

    @property
    def requests(self) -> bool:
        """Whether it is REQ."""
        return self.index == REQ

    def _check_present(self) -> None:
        if self.kind is IrqKind.NONE:
            raise InvalidArgument(f"{self} cannot be started: a PCI device's interrupts are intx, msi and msix")
        if not self.info.count:
            none = "it has no interrupt pin" if self.index == INTX else "it has no such capability"
            raise InvalidArgument(f"Device '{self.device}' has no {self.name}: {none}")


class Wanted(Struct, frozen=True):
    """One vector to start. Its eventfds belong to whoever takes the object.

    Attributes:
        vector: within the index.
        trigger: the consumer's eventfd; None: make one, or keep the one it has.
        resample: the consumer's eventfd that completes a level interrupt.

    """

    vector: int
    trigger: FileDescriptor | None = None
    resample: FileDescriptor | None = None


class Started(Struct, frozen=True):
    """One vector that was started. The fds are duplicates for the caller, when the caller brought none.

    ``message`` is what a source of a platform device is to be programmed with (extended IRQs).
    """

    index: int
    vector: int
    mode: IrqMode
    number: int | None = None
    trigger: FileDescriptor | None = None
    resample: FileDescriptor | None = None
    message: vfio.MsiMessage | None = None
