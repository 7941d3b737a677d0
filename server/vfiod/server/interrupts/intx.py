"""An INTx line, and the fast path that goes off while one is pending.

The line is level triggered, and the host masks it by itself when it fires (``VFIO_IRQ_INFO_AUTOMASKED``). Relayed,
vfiod is the line's keeper: an interrupt makes it pending and the virtual line goes up; the EOI takes the line down and
unmasks. What may happen in which state is one table, :data:`RELAYED`; what it does not list cannot happen.

The fast path (mapped access to regions) goes off while an interrupt is pending whose only completion is the first
access to a BAR: so that the access is seen. A timer brings it back when no interrupt is active any more. That is
the second table, :data:`FAST_PATH`.

Source: QEMU ``hw/vfio/pci.c`` (``vfio_intx_interrupt``, ``vfio_pci_intx_eoi``, ``vfio_intx_mmap_enable``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from vfiod.protocol.catalogue.words import IrqMode

__all__ = ["Action", "DIRECT", "FAST_PATH", "FastEvent", "FastState", "IntxLine", "LineEvent", "LineState", "RELAYED"]


class LineState(enum.Enum):
    """Where a line is. Only in the two PENDING states the virtual line is up."""

    INACTIVE = "inactive"
    PENDING = "pending"
    MASKED = "masked"
    MASKED_PENDING = "masked, pending"  # delivered, then masked by the user before its EOI
    LATCHED = "masked, latched"  # arrived while masked by the user: delivered when unmasked

    # By identity: Enum's own is a step in Python, and the tables are looked up with every interrupt.
    __hash__ = object.__hash__

    @property
    def up(self) -> bool:
        """Whether the virtual line is up: delivered, not completed."""
        return self in (LineState.PENDING, LineState.MASKED_PENDING)

    @property
    def masked(self) -> bool:
        """Whether the user masked it; what the host masks by itself until the EOI does not count."""
        return self in (LineState.MASKED, LineState.MASKED_PENDING, LineState.LATCHED)


class LineEvent(enum.Enum):
    """What happens to a line."""

    FIRED = "the device's interrupt arrived"
    EOI = "the interrupt was completed"
    MASK = "the user masks it"
    UNMASK = "the user unmasks it"
    CLEAR = "known state: nothing pending, line down"

    __hash__ = object.__hash__  # see LineState


class Action(enum.Enum):
    """What the caller must do, in the order given."""

    RAISE = "line up: signal the consumer"
    LOWER = "line down"
    HOST_MASK = "mask in the kernel"
    HOST_UNMASK = "unmask in the kernel"
    FAST_PATH_OFF = "regions are accessed slowly from now on"
    FAST_PATH_ON = "regions may be accessed by their mapping again"
    START_TIMER = "call timer() after mmap-timeout-ms; replaces one that runs"
    STOP_TIMER = "no timer any more"

    __hash__ = object.__hash__  # see LineState


_S = LineState
_E = LineEvent
_A = Action

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_FIRED: Final = LineEvent.FIRED
_EOI: Final = LineEvent.EOI
_RAISE: Final = Action.RAISE

RELAYED: Final[Mapping[tuple[LineState, LineEvent], tuple[LineState, tuple[Action, ...]]]] = {
    (_S.INACTIVE, _E.FIRED): (_S.PENDING, (_A.RAISE,)),
    (_S.INACTIVE, _E.EOI): (_S.INACTIVE, ()),
    (_S.INACTIVE, _E.MASK): (_S.MASKED, (_A.HOST_MASK,)),
    (_S.INACTIVE, _E.UNMASK): (_S.INACTIVE, (_A.HOST_UNMASK,)),
    (_S.INACTIVE, _E.CLEAR): (_S.INACTIVE, ()),
    # The host masked it when it fired. One more is a loopback trigger: the line is up already, and a device that
    # still asserts its line fires again when the EOI unmasks it. So nothing is lost.
    (_S.PENDING, _E.FIRED): (_S.PENDING, ()),
    (_S.PENDING, _E.EOI): (_S.INACTIVE, (_A.LOWER, _A.HOST_UNMASK)),
    (_S.PENDING, _E.MASK): (_S.MASKED_PENDING, (_A.HOST_MASK,)),
    # The user never masked it; the host's own mask ends with the EOI, not before.
    (_S.PENDING, _E.UNMASK): (_S.PENDING, ()),
    (_S.PENDING, _E.CLEAR): (_S.INACTIVE, (_A.LOWER,)),
    # It was on its way when the mask came: kept, and delivered when the mask goes.
    (_S.MASKED, _E.FIRED): (_S.LATCHED, ()),
    (_S.MASKED, _E.EOI): (_S.MASKED, ()),
    (_S.MASKED, _E.MASK): (_S.MASKED, ()),
    (_S.MASKED, _E.UNMASK): (_S.INACTIVE, (_A.HOST_UNMASK,)),
    (_S.MASKED, _E.CLEAR): (_S.MASKED, ()),
    (_S.MASKED_PENDING, _E.FIRED): (_S.MASKED_PENDING, ()),
    (_S.MASKED_PENDING, _E.EOI): (_S.MASKED, (_A.LOWER,)),
    (_S.MASKED_PENDING, _E.MASK): (_S.MASKED_PENDING, ()),
    (_S.MASKED_PENDING, _E.UNMASK): (_S.PENDING, ()),
    (_S.MASKED_PENDING, _E.CLEAR): (_S.MASKED, (_A.LOWER,)),
    (_S.LATCHED, _E.FIRED): (_S.LATCHED, ()),
    (_S.LATCHED, _E.EOI): (_S.LATCHED, ()),
    (_S.LATCHED, _E.MASK): (_S.LATCHED, ()),
    (_S.LATCHED, _E.UNMASK): (_S.PENDING, (_A.RAISE,)),
    (_S.LATCHED, _E.CLEAR): (_S.MASKED, ()),
}
"""The relayed mode: ``(state, event) -> (next state, actions)``."""

DIRECT: Final[Mapping[tuple[LineState, LineEvent], tuple[LineState, tuple[Action, ...]]]] = {
    (_S.INACTIVE, _E.EOI): (_S.INACTIVE, (_A.HOST_UNMASK,)),
    (_S.INACTIVE, _E.MASK): (_S.MASKED, (_A.HOST_MASK,)),
    (_S.INACTIVE, _E.UNMASK): (_S.INACTIVE, (_A.HOST_UNMASK,)),
    (_S.INACTIVE, _E.CLEAR): (_S.INACTIVE, ()),
    (_S.MASKED, _E.EOI): (_S.MASKED, ()),
    (_S.MASKED, _E.MASK): (_S.MASKED, ()),
    (_S.MASKED, _E.UNMASK): (_S.INACTIVE, (_A.HOST_UNMASK,)),
    (_S.MASKED, _E.CLEAR): (_S.MASKED, ()),
}
"""The direct mode: vfiod hears no interrupt, so it cannot know what is pending; an EOI always unmasks."""


class FastState(enum.Enum):
    """Whether regions may be accessed by their mapping, as far as the line is concerned."""

    ON = "on"
    OFF = "off"

    __hash__ = object.__hash__  # see LineState


class FastEvent(enum.Enum):
    """What happens to the fast path."""

    RAISED = "the line went up, and the first access to a BAR will complete it"
    TIMER_ACTIVE = "the timer fired while the line was up"
    TIMER_IDLE = "the timer fired while the line was down"
    RELEASED = "no access will complete anything any more"

    __hash__ = object.__hash__  # see LineState


FAST_PATH: Final[Mapping[tuple[FastState, FastEvent], tuple[FastState, tuple[Action, ...]]]] = {
    (FastState.ON, FastEvent.RAISED): (FastState.OFF, (_A.FAST_PATH_OFF, _A.START_TIMER)),
    (FastState.ON, FastEvent.TIMER_ACTIVE): (FastState.ON, ()),
    (FastState.ON, FastEvent.TIMER_IDLE): (FastState.ON, ()),
    (FastState.ON, FastEvent.RELEASED): (FastState.ON, ()),
    (FastState.OFF, FastEvent.RAISED): (FastState.OFF, (_A.START_TIMER,)),
    (FastState.OFF, FastEvent.TIMER_ACTIVE): (FastState.OFF, (_A.START_TIMER,)),
    (FastState.OFF, FastEvent.TIMER_IDLE): (FastState.ON, (_A.FAST_PATH_ON,)),
    (FastState.OFF, FastEvent.RELEASED): (FastState.ON, (_A.STOP_TIMER, _A.FAST_PATH_ON)),
}
"""The fast path: ``(state, event) -> (next state, actions)``. With a timer of 0 it starts none: it stays off."""

_TABLES: Final = {IrqMode.RELAYED: RELAYED, IrqMode.DIRECT: DIRECT}


class IntxLine:
    """One line: its state, and what to do when something happens to it.

    Args:
        mode: who hears it.
        by_access: whether the first access to a BAR completes it (no resample eventfd, no region mapped outside).
        timed: whether a timer brings the fast path back (``mmap-timeout-ms`` is not 0).
        automasked: whether the host masks it when it fires, so that an EOI must unmask.
        masked: whether the user has masked it already.

    Attributes:
        state: of the line.
        fast_path: whether the line lets regions be accessed by their mapping.

    """

    __slots__ = ("automasked", "by_access", "fast_path", "mode", "state", "timed")

    def __init__(
        self,
        mode: IrqMode,
        *,
        by_access: bool = True,
        timed: bool = True,
        automasked: bool = True,
        masked: bool = False,
    ) -> None:
        self.mode = mode
        self.by_access = by_access and mode is IrqMode.RELAYED
        self.timed = timed
        self.automasked = automasked
        self.state = LineState.MASKED if masked else LineState.INACTIVE
        self.fast_path = FastState.ON

    def fired(self) -> tuple[Action, ...]:
        """The device's interrupt arrived (once or more: a line is up or down). Relayed mode only: else KeyError."""
        return self._step(_FIRED)

    def eoi(self) -> tuple[Action, ...]:
        """Complete it. With nothing pending it does nothing (direct: it unmasks, in case)."""
        return self._step(_EOI)

    def access(self) -> tuple[Action, ...]:
        """A BAR was accessed where vfiod sees it: an EOI, when that is how this line is completed."""
        return self._step(_EOI) if self.by_access else ()

    def mask(self) -> tuple[Action, ...]:
        """The user masks it: nothing is delivered until :meth:`unmask`."""
        return self._step(LineEvent.MASK)

    def unmask(self) -> tuple[Action, ...]:
        """The user unmasks it. A pending interrupt stays pending until its EOI."""
        return self._step(LineEvent.UNMASK)

    def clear(self) -> tuple[Action, ...]:
        """Known state: nothing pending, line down, fast path on, no timer. The user's mask stays."""
        return self._step(LineEvent.CLEAR) + self._fast(FastEvent.RELEASED)

    def timer(self) -> tuple[Action, ...]:
        """The timer of START_TIMER fired."""
        return self._fast(FastEvent.TIMER_ACTIVE if self.state.up else FastEvent.TIMER_IDLE)

    def stop_by_access(self) -> tuple[Action, ...]:
        """From now on accesses complete nothing: another process maps a region, and vfiod no longer sees them all."""
        self.by_access = False
        return self._fast(FastEvent.RELEASED)

    def _step(self, event: LineEvent) -> tuple[Action, ...]:
        self.state, actions = _TABLES[self.mode][self.state, event]
        if event is _EOI and not self.automasked:
            # Nothing masked it, so there is nothing to unmask.
            actions = tuple(action for action in actions if action is not Action.HOST_UNMASK)
        if self.by_access and _RAISE in actions:
            actions += self._fast(FastEvent.RAISED)
        return actions

    def _fast(self, event: FastEvent) -> tuple[Action, ...]:
        self.fast_path, actions = FAST_PATH[self.fast_path, event]
        if not self.timed:
            actions = tuple(action for action in actions if action is not Action.START_TIMER)
        return actions
