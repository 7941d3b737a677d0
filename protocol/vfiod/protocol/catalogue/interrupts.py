"""Family "interrupts": starting, counting, completing."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, FdName, Force, IrqKind, IrqMode, IrqName, UnsetType, Vector
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, MAX_VECTORS

NUMBERS: Final = 1 << 32

Number = Annotated[
    int, Meta(ge=0, lt=NUMBERS, description="An interrupt number of the machine (GSI): 32 bits, as in kvm_irqfd.")
]


Vectors = Annotated[
    list[Vector], Meta(min_length=1, max_length=MAX_VECTORS, description="Vectors of the index; irq-start: [0].")
]


Indexes = Annotated[
    list[IrqName],
    Meta(min_length=1, max_length=MAX_VECTORS, description="Indexes of a platform device; irq-start: all it has."),
]


class VectorFds(Result, forbid_unknown_fields=True, kw_only=True):
    """The eventfds of one vector."""

    index: Annotated[IrqName | UnsetType, Meta(description="Of a platform device; default: the command's index.")] = (
        UNSET
    )
    vector: Vector = 0
    trigger: Annotated[FdName, Meta(description="Signalled when the interrupt fires.")]
    resample: Annotated[
        FdName | UnsetType, Meta(description="Signalled by the hypervisor to complete a level interrupt.")
    ] = UNSET


class Route(Result, forbid_unknown_fields=True, kw_only=True):
    """Which interrupt number of the machine an index has."""

    device: Annotated[str | UnsetType, Meta(description="Whose index it is, when the command names no device.")] = UNSET
    index: IrqName
    vector: Vector = 0
    number: Number


class IrqMessage(Result):
    """What a message source is programmed with so that it fires this vector (extended IRQs, experimental)."""

    vector: Vector
    address: Annotated[int, Meta(ge=0, description="Where it writes, 64 bits.")]
    data: Annotated[int, Meta(ge=0, lt=1 << 32, description="What it writes.")]


class StartedIrq(Result):
    """One started interrupt. An fd is attached to the reply only when the caller brought none."""

    device: str
    index: int
    vector: int
    mode: IrqMode
    number: int | UnsetType = UNSET
    trigger_fd: int | UnsetType = UNSET
    resample_fd: int | UnsetType = UNSET
    x_message: IrqMessage | UnsetType = UNSET


class IrqStartResult(Result):
    """What was started."""

    irqs: list[StartedIrq]


@command("irq-start", Family.INTERRUPTS, device="device")
class IrqStart(Arguments[IrqStartResult]):
    """Start interrupts of a device, with the caller's eventfds or with new ones that the reply carries.

    Without ``device`` it is the "machine complete" notification: it starts every platform device, numbers their
    interrupts from ``first-number`` or by ``routes``, and those of devices that are added later follow. A platform
    device has one interrupt per index: ``index``, ``indexes``, else all. A PCI device takes ``index`` (default
    ``intx``); starting one kind ends the others. Without ``mode``, MSI is direct, and INTx is direct when it has a
    resample eventfd; a platform interrupt is direct when its eventfds are taken (``x-irqfd``), and relayed when that
    cannot be set up. Starting again changes the eventfds or the mode, and is harmless.

    A platform device's index ``x-msi`` grants messages as a block from vector 0 on, perhaps fewer than were asked for,
    and the reply has the message of each.
    """

    device: str | UnsetType = UNSET
    index: IrqName | UnsetType = UNSET
    vectors: Vectors | UnsetType = UNSET
    eventfds: Annotated[list[VectorFds], Meta(min_length=1, max_length=MAX_FDS_PER_MESSAGE)] | UnsetType = UNSET
    first_number: Number | UnsetType = UNSET
    routes: list[Route] | UnsetType = UNSET
    mode: IrqMode | UnsetType = UNSET
    indexes: Indexes | UnsetType = UNSET
    force: Force = False


@command("irq-stop", Family.INTERRUPTS, device="device")
class IrqStop(Arguments[Empty]):
    """Stop the interrupts of a device, of one index, or some vectors of it."""

    device: str | UnsetType = UNSET
    index: IrqName | UnsetType = UNSET
    vectors: Vectors | UnsetType = UNSET
    force: Force = False


@command("irq-mask", Family.INTERRUPTS, oob=True, device="device")
class IrqMask(Arguments[Empty]):
    """Mask an interrupt. Its index must be maskable."""

    device: str
    index: IrqName
    vector: Vector = 0
    force: Force = False


@command("irq-unmask", Family.INTERRUPTS, device="device")
class IrqUnmask(Arguments[Empty]):
    """Unmask an interrupt. Its index must be maskable."""

    device: str
    index: IrqName
    vector: Vector = 0
    force: Force = False


@command("irq-eoi", Family.INTERRUPTS, oob=True, device="device")
class IrqEoi(Arguments[Empty]):
    """Complete a level interrupt: the line goes down and is unmasked. With nothing pending it does nothing."""

    device: str
    index: IrqName
    vector: Vector = 0
    force: Force = False


@command("irq-trigger", Family.INTERRUPTS, device="device")
class IrqTrigger(Arguments[Empty]):
    """Make the kernel signal an interrupt's eventfd as the device would (loopback)."""

    device: str
    index: IrqName
    vector: Vector = 0
    force: Force = False


@command("irq-route", Family.INTERRUPTS, device="device")
class IrqRoute(Arguments[Empty]):
    """Say which interrupt number a vector has now. Direct mode is torn down and set up again for a new route.

    Without ``number`` the route is disabled: torn down and left so. An unchanged route does nothing.
    """

    device: str
    index: IrqName
    vector: Vector = 0
    number: Number | UnsetType = UNSET
    force: Force = False


class IrqFlags(Result):
    """``VFIO_IRQ_INFO`` flags."""

    eventfd: bool
    maskable: bool
    automasked: bool
    noresize: bool


class VectorInfo(Result, kw_only=True):
    """One vector's life so far. Counts are null in direct mode: vfiod does not see those interrupts."""

    vector: int
    mode: IrqMode
    state: Annotated[
        str,
        Meta(
            description="INTx: inactive, pending, masked; MSI: armed, masked; platform: inactive, pending, active, "
            "direct, masked"
        ),
    ]
    number: int | UnsetType = UNSET
    fired: int | None
    delivered: int | None
    spurious: int


class IrqInfo(Result):
    """One interrupt index of a device."""

    device: str
    index: int
    name: str
    count: Annotated[int, Meta(description="Vectors the index has.")]
    active: bool
    flags: IrqFlags
    reserved: Annotated[bool, Meta(description="vfiod's own (err, req): irq commands refuse it.")]
    vectors: list[VectorInfo]
    fired: int | None
    delivered: int | None
    spurious: int
    x_messages: Annotated[
        list[IrqMessage] | UnsetType,
        Meta(description="Of a platform device's index x-msi: the message of each vector that was granted."),
    ] = UNSET


@command("query-irqs", Family.INTERRUPTS, oob=True, mutates=False)
class QueryIrqs(Arguments[list[IrqInfo]]):
    """List interrupt indexes and their vectors, with mode, state and counts."""

    device: str | UnsetType = UNSET


@event("IRQ", Family.INTERRUPTS, rate_key=("device", "index", "vector"))
class Irq(EventData):
    """A relayed interrupt was delivered. At most one event a second and vector; the counts tell the rest."""

    device: str
    index: int
    vector: int
    fired: int
    delivered: int


@event("IRQ_STORM", Family.INTERRUPTS, rate_key=("device", "index", "vector"))
class IrqStorm(EventData):
    """A vector fires faster than anything healthy does."""

    device: str
    index: int
    vector: int
    per_second: int


@event("IRQ_MODE_CHANGED", Family.INTERRUPTS)
class IrqModeChanged(EventData, kw_only=True):
    """A vector went from direct to relayed or back, or the active kind changed, other than by ``irq-start``."""

    device: str
    kind: IrqKind
    index: Annotated[int | UnsetType, Meta(description="Of a platform device: which interrupt.")] = UNSET
    vector: int | UnsetType = UNSET
    mode: IrqMode | UnsetType = UNSET
    reason: str
