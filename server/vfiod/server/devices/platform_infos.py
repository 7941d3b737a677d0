"""What ``query-irqs`` says of a platform device's interrupt."""

from __future__ import annotations

from vfiod.protocol.catalogue.interrupts import IrqInfo, VectorInfo
from vfiod.protocol.catalogue.words import UNSET, IrqMode
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.vectors import Counts, Vector
from vfiod.server.interrupts.platform import PlatformLines

__all__ = ["platform_irq_info"]


def platform_irq_info(
    one: IrqIndex, bound: Vector | None, counts: Counts | None, number: int | None, lines: PlatformLines
) -> IrqInfo:
    """One index.

    Args:
        one: the index.
        bound: how it is bound now; None: it is not started.
        counts: of its whole life; None: it never was started.
        number: its interrupt number in the machine.
        lines: the device's relayed interrupts.

    """
    info = one.info
    seen = counts or Counts()
    # Vfiod does not see what is direct: a count of the relayed ones alone would look like the whole.
    blind = bound is not None and bound.mode is IrqMode.DIRECT
    fired = None if blind else seen.fired
    delivered = None if blind else seen.delivered
    vectors = []
    if bound is not None:
        state = "direct" if blind else lines.state(one.index).value
        if one.index in lines.masked:
            state = "masked" if state in ("inactive", "direct") else f"masked, {state}"
        vectors = [
            VectorInfo(
                vector=0,
                mode=bound.mode,
                state=state,
                number=UNSET if number is None else number,
                fired=fired,
                delivered=delivered,
                spurious=seen.spurious,
            )
        ]
    return IrqInfo(
        device=one.device,
        index=one.index,
        name=one.name,
        count=info.count,
        active=bound is not None,
        flags=one.flags,
        reserved=one.reserved,
        vectors=vectors,
        fired=fired,
        delivered=delivered,
        spurious=seen.spurious,
    )
