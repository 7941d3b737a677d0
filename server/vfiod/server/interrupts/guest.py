"""What follows when a guest switches MSI or MSI-X on or off in its capabilities.

Enabling one kind disables the others; disabling goes back to INTx; a switch from one to the other passes through none
(reference on device behaviour, section 4). What may follow is one table, :data:`MOVES`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from vfiod.protocol.catalogue.words import IrqKind

__all__ = ["MOVES", "Move", "Switch", "moves", "switches"]


class Switch(enum.Enum):
    """What the guest did."""

    MSI_ON = "MSI enabled"
    MSI_OFF = "MSI disabled"
    MSIX_ON = "MSI-X enabled"
    MSIX_OFF = "MSI-X disabled"


class Move(enum.Enum):
    """What follows."""

    START_MSI = "start MSI with as many vectors as the guest allocated; whatever else is active ends"
    START_MSIX = "start MSI-X with the vectors the guest has unmasked; whatever else is active ends"
    TO_INTX = "back to INTx, where there is a pin"


_K = IrqKind
_W = Switch

MOVES: Final[Mapping[tuple[IrqKind, Switch], Move | None]] = {
    (_K.NONE, _W.MSI_ON): Move.START_MSI,
    (_K.NONE, _W.MSIX_ON): Move.START_MSIX,
    (_K.NONE, _W.MSI_OFF): None,  # it had been stopped by irq-stop
    (_K.NONE, _W.MSIX_OFF): None,
    (_K.INTX, _W.MSI_ON): Move.START_MSI,
    (_K.INTX, _W.MSIX_ON): Move.START_MSIX,
    (_K.INTX, _W.MSI_OFF): None,
    (_K.INTX, _W.MSIX_OFF): None,
    (_K.MSI, _W.MSI_ON): None,
    (_K.MSI, _W.MSIX_ON): Move.START_MSIX,
    (_K.MSI, _W.MSI_OFF): Move.TO_INTX,
    (_K.MSI, _W.MSIX_OFF): None,
    (_K.MSIX, _W.MSI_ON): Move.START_MSI,
    (_K.MSIX, _W.MSIX_ON): None,
    (_K.MSIX, _W.MSI_OFF): None,
    (_K.MSIX, _W.MSIX_OFF): Move.TO_INTX,
}


def switches(before: tuple[bool, bool], after: tuple[bool, bool]) -> tuple[Switch, ...]:
    """What one write did, given (MSI enabled, MSI-X enabled) before and after: what it switched on comes first.

    So a write that does both at once never passes through INTx.
    """
    on = [switch for switch, was, now in zip((_W.MSI_ON, _W.MSIX_ON), before, after, strict=True) if now and not was]
    off = [switch for switch, was, now in zip((_W.MSI_OFF, _W.MSIX_OFF), before, after, strict=True) if was and not now]
    return (*on, *off)


def moves(kind: IrqKind, switch: Switch) -> Move | None:
    """What follows while ``kind`` is active."""
    return MOVES[kind, switch]
