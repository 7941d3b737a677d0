"""What ``query-irqs`` says of a device's interrupts."""

from __future__ import annotations

from collections.abc import Mapping

from vfiod.protocol.catalogue.interrupts import IrqInfo, VectorInfo
from vfiod.protocol.catalogue.words import UNSET, IrqMode
from vfiod.server.devices.bound import Bound
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.vectors import Counts, Vector

__all__ = ["irq_info"]


def irq_info(
    one: IrqIndex, bound: Bound, counts: Mapping[tuple[int, int], Counts], numbers: Mapping[tuple[int, int], int]
) -> IrqInfo:
    """One index.

    Args:
        one: the index.
        bound: what is bound now, of this index or another.
        counts: of every vector that ever was, by (index, vector).
        numbers: interrupt numbers of the machine, by (index, vector).

    """
    active = bound.index == one.index
    mine = [c for (index, _), c in tuple(counts.items()) if index == one.index]
    # A sum over some vectors only would look like the whole: vfiod does not see the direct ones.
    blind = active and any(vector.mode is IrqMode.DIRECT for vector in bound.vectors.values())
    info = one.info
    return IrqInfo(
        device=one.device,
        index=one.index,
        name=one.name,
        count=info.count,
        active=active,
        flags=one.flags,
        reserved=one.reserved,
        vectors=[_vector_info(bound, one, vector, numbers) for vector in bound.vectors.values()] if active else [],
        fired=None if blind else sum(c.fired for c in mine),
        delivered=None if blind else sum(c.delivered for c in mine),
        spurious=sum(c.spurious for c in mine),
    )


def _vector_info(bound: Bound, one: IrqIndex, vector: Vector, numbers: Mapping[tuple[int, int], int]) -> VectorInfo:
    if bound.line is not None:
        line = bound.line.state
        word = "masked" if line.masked else line.value
    else:
        word = "masked" if vector.number in bound.masked else "armed"
    seen = vector.mode is IrqMode.RELAYED
    return VectorInfo(
        vector=vector.number,
        mode=vector.mode,
        state=word,
        number=numbers.get((one.index, vector.number), UNSET),
        fired=vector.counts.fired if seen else None,
        delivered=vector.counts.delivered if seen else None,
        spurious=vector.counts.spurious,
    )
