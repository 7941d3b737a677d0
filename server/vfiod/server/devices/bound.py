"""What is bound of a PCI device's interrupts, as one value; what follows it; and how a change is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct, field

from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.server import trace
from vfiod.server.devices.irq_index import INTX, IrqIndex
from vfiod.server.devices.vectors import Vector
from vfiod.server.interrupts.intx import IntxLine
from vfiod.server.interrupts.modes import NOTHING, Setup

__all__ = ["Bound", "bound_with", "trace_change"]

_OF_VECTORS: Final = (
    *(trace.direct_ended, trace.vector_released, trace.vector_used),
    *(trace.direct_started_edge, trace.direct_started_level),
)
"""What a change says of its vectors, when anybody listens."""


class Bound(Struct, frozen=True, eq=False):
    """What is bound. Replaced whole, by one assignment.

    Attributes:
        kind: the active kind.
        index: its VFIO index; -1: none.
        vectors: by number, in order.
        block: vectors the kernel has allocated for it.
        masked: messages that the user masked. (An INTx has its mask in its line.)
        line: of INTx.
        maskable: whether the index can be masked.
        resizable: whether the block can grow while it is in use.

    """

    kind: IrqKind = IrqKind.NONE
    index: int = -1
    vectors: Mapping[int, Vector] = field(default_factory=lambda: MappingProxyType({}))
    block: int = 0
    masked: frozenset[int] = frozenset()
    line: IntxLine | None = None
    maskable: bool = False
    resizable: bool = False

    def setup(self) -> Setup:
        """As the plan of a change sees it."""
        if self.kind is IrqKind.NONE:
            return NOTHING
        masked = self.masked
        if self.line is not None:
            masked = frozenset((0,)) if self.line.state.masked else frozenset()
        bindings = {number: vector.binding for number, vector in self.vectors.items()}
        return Setup(self.kind, bindings, self.block, masked, self.maskable, self.resizable)


def bound_with(
    one: IrqIndex,
    vectors: Mapping[int, Vector],
    former: Bound | None,
    *,
    timed: bool,
    by_access: Callable[[], bool],
    stay: bool,
) -> Bound:
    """The state with these vectors; the mask, and a block that is large enough, are kept.

    Args:
        one: the index.
        vectors: of it.
        former: the state of this index until now; None: another one is active.
        timed: whether a timer brings the fast path back.
        by_access: whether an access to a BAR may complete an INTx now.
        stay: an MSI-X without vectors is enabled nevertheless: the guest's is, and some devices look.

    """
    if not vectors and not (stay and one.kind is IrqKind.MSIX):
        return Bound()
    ordered = MappingProxyType(dict(sorted(vectors.items())))
    masked = frozenset() if former is None else former.masked & ordered.keys()
    line = None
    if one.index == INTX:
        vector = ordered[0]
        line = IntxLine(
            vector.mode,
            by_access=vector.resample is None and by_access(),
            timed=timed,
            automasked=one.info.automasked,
            masked=former is not None and former.line is not None and former.line.state.masked,
        )
        masked = frozenset()
    block = max(max(ordered, default=0) + 1, 0 if former is None else former.block)
    info = one.info
    return Bound(one.kind, one.index, ordered, block, masked, line, info.maskable, info.resizable)


def trace_change(device: str, old: Bound, new: Bound) -> None:
    """Say of each vector how it changed, when anybody listens."""
    if not any(point.on for point in _OF_VECTORS):
        return
    for number, vector in old.vectors.items():
        if vector is new.vectors.get(number):
            continue
        if vector.mode is IrqMode.DIRECT and trace.direct_ended.on:
            trace.direct_ended(device=device, index=old.index, vector=number)
        if old.line is None and trace.vector_released.on:
            trace.vector_released(device=device, index=old.index, vector=number)
    for number, vector in new.vectors.items():
        if vector is old.vectors.get(number):
            continue
        if new.line is None and trace.vector_used.on:
            trace.vector_used(device=device, index=new.index, vector=number)
        started = trace.direct_started_edge if new.line is None else trace.direct_started_level
        if vector.mode is IrqMode.DIRECT and started.on:
            started(device=device, index=new.index, vector=number, fd=vector.trigger.number)
