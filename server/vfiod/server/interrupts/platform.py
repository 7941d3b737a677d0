"""The relayed interrupts of one platform device: who has the line, who waits, and the fast path meanwhile.

A platform device has one interrupt for each of its indexes, and vfiod learns of its completion by an access to any
region. An access cannot say which interrupt it completes: so at most one is ACTIVE at a time, and the others wait in
a queue. What may happen to one interrupt in which state is one table, :data:`RELAYED`; what it does not list cannot
happen. What mapped access does meanwhile is :data:`~vfiod.server.interrupts.intx.FAST_PATH`, as for INTx.

An edge that fires while it is ACTIVE is coalesced: the access that completes it comes after the edge, so the
handler sees what it was about. Completed in another way (``irq-eoi``), it is delivered once more. When accesses
complete nothing any more (another process maps a region), nothing would ever complete an edge: it passes through.

Source: QEMU ``hw/vfio/platform.c`` (``vfio_intp_interrupt``, ``vfio_platform_eoi``, ``vfio_intp_mmap_enable``), and
section 7 of the reference on device behaviour.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.server.interrupts.intx import FAST_PATH, Action, FastEvent, FastState

if TYPE_CHECKING:
    from vfiod.server.state.machine import LinesState

__all__ = ["RELAYED", "Act", "IrqEvent", "IrqState", "Line", "Mark", "PlatformLines"]


class IrqState(enum.Enum):
    """Where one interrupt is."""

    INACTIVE = "inactive"
    PENDING = "pending"
    ACTIVE = "active"

    # By identity: Enum's own is a step in Python, and the tables are looked up with every interrupt.
    __hash__ = object.__hash__


class IrqEvent(enum.Enum):
    """What happens to one interrupt."""

    FIRED = "it arrived, and the line is free"
    FIRED_LATER = "it arrived while one is active, or while the user masks it"
    PASSED = "it arrived, or was unmasked: an edge, and accesses complete nothing"
    TURN = "the line is free, and it is the first of those that wait"
    COMPLETED = "it was completed: by an access, irq-eoi, or its resample eventfd"
    STOPPED = "it is stopped"

    # By identity: Enum's own is a step in Python, and the tables are looked up with every interrupt.
    __hash__ = object.__hash__


_S = IrqState
_E = IrqEvent

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_INACTIVE: Final = IrqState.INACTIVE
_PENDING: Final = IrqState.PENDING
_ACTIVE: Final = IrqState.ACTIVE
_FIRED: Final = IrqEvent.FIRED
_COMPLETED: Final = IrqEvent.COMPLETED

RELAYED: Final[Mapping[tuple[IrqState, IrqEvent], tuple[IrqState, tuple[Action, ...]]]] = {
    (_S.INACTIVE, _E.FIRED): (_S.ACTIVE, (Action.RAISE,)),
    (_S.INACTIVE, _E.FIRED_LATER): (_S.PENDING, ()),
    (_S.INACTIVE, _E.PASSED): (_S.INACTIVE, (Action.RAISE,)),
    (_S.INACTIVE, _E.COMPLETED): (_S.INACTIVE, ()),
    (_S.INACTIVE, _E.STOPPED): (_S.INACTIVE, ()),
    # Never queued twice: it is delivered once when its turn comes, and its handler sees all of it.
    (_S.PENDING, _E.FIRED_LATER): (_S.PENDING, ()),
    (_S.PENDING, _E.PASSED): (_S.INACTIVE, (Action.RAISE,)),
    (_S.PENDING, _E.TURN): (_S.ACTIVE, (Action.RAISE,)),
    # An EOI of something that was not delivered yet completes nothing.
    (_S.PENDING, _E.COMPLETED): (_S.PENDING, ()),
    (_S.PENDING, _E.STOPPED): (_S.INACTIVE, ()),
    # A level that is still asserted fires again when it is unmasked. For an edge: see above.
    (_S.ACTIVE, _E.FIRED_LATER): (_S.ACTIVE, ()),
    (_S.ACTIVE, _E.COMPLETED): (_S.INACTIVE, (Action.LOWER, Action.HOST_UNMASK)),
    (_S.ACTIVE, _E.STOPPED): (_S.INACTIVE, (Action.LOWER,)),
}
"""One interrupt in relayed mode: ``(state, event) -> (next state, actions)``."""


class Line(Struct, frozen=True):
    """What an interrupt is.

    Attributes:
        automasked: level: the host masks it when it fires, so that its completion must unmask.
        by_access: whether an access may complete it (it has no resample eventfd).

    """

    automasked: bool
    by_access: bool = True


class Act(Struct, frozen=True):
    """One thing the caller must do, in the order given. ``index`` is -1 for what concerns the whole device."""

    action: Action
    index: int = -1


class Mark(Struct, frozen=True):
    """Where everything stood, for :meth:`PlatformLines.go_back`."""

    active: int | None
    waiting: tuple[int, ...]
    masked: frozenset[int]
    fast_path: FastState
    again: bool


@functools.lru_cache(maxsize=1024)
def _acts(actions: tuple[Action, ...], index: int) -> tuple[Act, ...]:
    """The same few, over and over."""
    return tuple(Act(action, index) for action in actions)


_FAST: Final = {(state, event): tuple(map(Act, actions)) for (state, event), (_, actions) in FAST_PATH.items()}


class PlatformLines:
    """The relayed interrupts of one device.

    Args:
        timed: whether a timer brings the fast path back (``mmap-timeout-ms`` is not 0).
        by_access: whether accesses complete interrupts (no region is mapped by another process).

    Attributes:
        active: the index that is ACTIVE.
        waiting: the PENDING ones, in order.
        masked: those the user masked.
        fast_path: whether regions may be accessed by their mapping.

    """

    __slots__ = ("_again", "_lines", "active", "by_access", "fast_path", "masked", "timed", "waiting")

    def __init__(self, *, timed: bool = True, by_access: bool = True) -> None:
        self.timed = timed
        self.by_access = by_access
        self.active: int | None = None
        self.waiting: dict[int, None] = {}
        self.masked: frozenset[int] = frozenset()
        self.fast_path = FastState.ON
        self._again = False  # the active one, an edge, fired again
        self._lines: dict[int, Line] = {}

    # --- looking --------------------------------------------------------------------------------------

    def __contains__(self, index: int) -> bool:
        """Whether this interrupt is relayed."""
        return index in self._lines

    def state(self, index: int) -> IrqState:
        """Where an interrupt is; INACTIVE for one that is not relayed."""
        if index == self.active:
            return IrqState.ACTIVE
        return IrqState.PENDING if index in self.waiting else IrqState.INACTIVE

    def mark(self) -> Mark:
        """Where everything stands now."""
        return Mark(self.active, tuple(self.waiting), self.masked, self.fast_path, self._again)

    def go_back(self, mark: Mark) -> None:
        """Back to where it stood: what the last call asked for could not be done. Interrupts stay as they are."""
        self.active = mark.active
        self.waiting = dict.fromkeys(mark.waiting)
        self.masked = mark.masked
        self.fast_path = mark.fast_path
        self._again = mark.again

    # --- over a change of the process -------------------------------------------------------------------

    def keep(self) -> LinesState:
        """Where everything stands, as a value."""
        from vfiod.server.state.machine import LinesState

        return LinesState(
            active=self.active,
            waiting=list(self.waiting),
            masked=sorted(self.masked),
            fast_path=self.fast_path.name,
            again=self._again,
            by_access=self.by_access,
        )

    def adopt(self, state: LinesState) -> None:
        """Have that again, after every interrupt that is relayed was added."""
        mark = Mark(
            state.active, tuple(state.waiting), frozenset(state.masked), FastState[state.fast_path], state.again
        )
        self.go_back(mark)
        self.by_access = state.by_access

    # --- what there is ----------------------------------------------------------------------------------

    def add(self, index: int, line: Line) -> None:
        """An interrupt is relayed from now on. KeyError: it is already."""
        if index in self._lines:
            raise KeyError(index)
        self._lines[index] = line

    def remove(self, index: int) -> tuple[Act, ...]:
        """It is relayed no more; who waits comes after it. The user's mask stays. KeyError: it is not relayed."""
        acts = self._step(index, IrqEvent.STOPPED)
        del self._lines[index]
        acts += self._next()
        # Nothing relayed: no access completes anything.
        return acts if self._lines else acts + self._fast(FastEvent.RELEASED)

    def clear(self) -> tuple[Act, ...]:
        """Nothing is relayed any more, and who waited is forgotten; the user's masks stay."""
        acts = () if self.active is None else self._step(self.active, IrqEvent.STOPPED)
        self.waiting.clear()
        self._lines.clear()
        return acts + self._fast(FastEvent.RELEASED)

    # --- what happens -----------------------------------------------------------------------------------

    def fired(self, index: int) -> tuple[Act, ...]:
        """It arrived, once or more. KeyError: it is not relayed."""
        line = self._lines[index]
        if not line.automasked and not self.by_access and index not in self.masked:
            return self._step(index, IrqEvent.PASSED)
        if self.active is None and index not in self.masked:
            return self._step(index, _FIRED)
        if index == self.active and not line.automasked:
            self._again = True
        return self._step(index, IrqEvent.FIRED_LATER)

    def access(self) -> tuple[Act, ...]:
        """A region was accessed where vfiod sees it: the completion of what is active, where that is how."""
        active = self.active
        if active is None or not self.by_access or not self._lines[active].by_access:
            return ()
        return self._complete(active)

    def eoi(self, index: int) -> tuple[Act, ...]:
        """Complete it. What is not active is not completed. KeyError: it is not relayed."""
        if index != self.active:
            return self._step(index, IrqEvent.COMPLETED)
        again = self._again
        acts = self._complete(index)
        # No access came after the edge, so nobody may have seen what it was about.
        return acts + self.fired(index) if again else acts

    def mask(self, index: int) -> tuple[Act, ...]:
        """The user masks it: what arrives waits until :meth:`unmask`. What is active stays so until its completion."""
        if index in self.masked:
            return ()
        self.masked |= {index}
        return (Act(Action.HOST_MASK, index),)

    def unmask(self, index: int) -> tuple[Act, ...]:
        """The user unmasks it. What the host masked when it fired stays masked until the completion."""
        self.masked -= {index}
        line = self._lines.get(index)
        acts: tuple[Act, ...] = ()
        if line is None or not line.automasked or self.state(index) is IrqState.INACTIVE:
            acts = (Act(Action.HOST_UNMASK, index),)
        if line is not None and index in self.waiting and not line.automasked and not self.by_access:
            return acts + self._step(index, IrqEvent.PASSED)
        return acts + self._next()

    def timer(self) -> tuple[Act, ...]:
        """The timer of START_TIMER fired."""
        return self._fast(FastEvent.TIMER_IDLE if self.active is None else FastEvent.TIMER_ACTIVE)

    def stop_by_access(self) -> tuple[Act, ...]:
        """From now on accesses complete nothing: another process maps a region, and vfiod no longer sees them all.

        Edges that are active or wait pass through; levels go on, and need ``irq-eoi`` or a resample eventfd.
        """
        self.by_access = False
        acts: tuple[Act, ...] = ()
        if self.active is not None and not self._lines[self.active].automasked:
            active, again = self.active, self._again
            acts += self._finish(active)
            acts += self._step(active, IrqEvent.PASSED) if again and active not in self.masked else ()
        for index in tuple(self.waiting):
            if not self._lines[index].automasked and index not in self.masked:
                acts += self._step(index, IrqEvent.PASSED)
        return acts + self._next() + self._fast(FastEvent.RELEASED)

    # --- inside -----------------------------------------------------------------------------------------

    def _complete(self, index: int) -> tuple[Act, ...]:
        acts = self._finish(index)
        return acts + self._next() if self.waiting else acts

    def _finish(self, index: int) -> tuple[Act, ...]:
        acts = self._step(index, _COMPLETED)
        if self._lines[index].automasked and index not in self.masked:
            return acts
        # Nothing masked it, or the user does: there is nothing to unmask.
        return tuple(act for act in acts if act.action is not Action.HOST_UNMASK)

    def _next(self) -> tuple[Act, ...]:
        """Give a free line to the first that waits and is not masked."""
        if self.active is None:
            for index in self.waiting:
                if index not in self.masked:
                    return self._step(index, IrqEvent.TURN)
        return ()

    def _step(self, index: int, event: IrqEvent) -> tuple[Act, ...]:
        line = self._lines[index]
        before = _ACTIVE if index == self.active else _PENDING if index in self.waiting else _INACTIVE
        after, actions = RELAYED[before, event]
        if after is not before:
            if before is _ACTIVE:
                self.active = None
            elif before is _PENDING:
                del self.waiting[index]
            if after is _ACTIVE:
                self.active = index
                self._again = False
            elif after is _PENDING:
                self.waiting[index] = None
        acts = _acts(actions, index) if actions else ()
        trapped = after is _ACTIVE and self.by_access and line.by_access
        # A timer that runs re-arms itself while one is active; only a fresh interrupt starts it anew.
        if trapped and (event is _FIRED or (event is IrqEvent.TURN and self.fast_path is FastState.ON)):
            acts += self._fast(FastEvent.RAISED)
        return acts

    def _fast(self, event: FastEvent) -> tuple[Act, ...]:
        acts = _FAST[self.fast_path, event]
        self.fast_path = FAST_PATH[self.fast_path, event][0]
        return acts if self.timed else tuple(act for act in acts if act.action is not Action.START_TIMER)
