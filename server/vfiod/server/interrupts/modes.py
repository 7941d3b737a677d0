"""Which interrupts a device has set up, and the steps from one such setup to another.

One kind is active at a time: none, INTx, MSI, MSI-X. A
:class:`Setup` says which, and how each vector is bound; :func:`plan` gives the steps from one setup to the next
and the steps back, should one of them fail. Nothing here does anything: ``devices/irqs.py`` takes the steps.

The order of the steps is the reference's (device behaviour, section 4): *stop listening, mask, clear pending, line
down, set up, unmask*; and after leaving the direct mode, *listen first, then unmask*.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct, field

from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.server.interrupts.msix import Growth, growth, to_signal

__all__ = ["NOTHING", "Binding", "Do", "Plan", "Setup", "Side", "Step", "choose_mode", "plan"]


class Binding(Struct, frozen=True):
    """How one vector is bound.

    Attributes:
        mode: who hears the device: the consumer (direct), or vfiod, which passes it on (relayed).
        resample: the consumer completes a level interrupt by an eventfd.
        token: which eventfds: two bindings with the same token have the same ones.

    """

    mode: IrqMode
    resample: bool = False
    token: int = 0


class Setup(Struct, frozen=True):
    """Everything about a device's interrupts that the kernel has been told, or is to be.

    Attributes:
        kind: the active kind.
        vectors: the bound vectors of it.
        block: how many vectors the kernel has allocated, or is to allocate (MSI, MSI-X); 1 for INTx, 0 for none.
        masked: vectors that the user masked.
        maskable: whether the index can be masked (``VFIO_IRQ_INFO_MASKABLE``).
        resizable: whether the kernel allocates more vectors while others are in use (no ``VFIO_IRQ_INFO_NORESIZE``).

    """

    kind: IrqKind = IrqKind.NONE
    vectors: Mapping[int, Binding] = field(default_factory=lambda: MappingProxyType({}))
    block: int = 0
    masked: frozenset[int] = frozenset()
    maskable: bool = False
    resizable: bool = False

    def relayed(self, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """The relayed vectors, in order; only those of ``among`` when it is given."""
        vectors = self.vectors
        chosen = vectors if among is None else set(among)
        return tuple(v for v in sorted(chosen) if v in vectors and vectors[v].mode is IrqMode.RELAYED)


NOTHING: Final = Setup()
"""No interrupt at all: a device's first state, and its last."""


class Do(enum.Enum):
    """What one step does."""

    UNLISTEN = "stop listening to vfiod's own eventfds, and to resample eventfds"
    MASK = "mask in the kernel"
    CLEAR = "forget what is pending; the line goes down"
    DISARM_RESAMPLE = "take the resample eventfd from the kernel (UNMASK, EVENTFD, -1)"
    DISABLE = "disable the index (TRIGGER, NONE, count 0)"
    ARM = "give the kernel the eventfds (TRIGGER, EVENTFD); vectors that are not bound get -1"
    ARM_RESAMPLE = "give the kernel the resample eventfd (UNMASK, EVENTFD)"
    LISTEN = "listen to vfiod's own eventfds, and to resample eventfds"
    UNMASK = "unmask in the kernel"
    SIGNAL = "signal the consumer's eventfds once: an interrupt may have been lost meanwhile"


class Side(enum.Enum):
    """Whose eventfds a step means."""

    OLD = "old"
    NEW = "new"


class Step(Struct, frozen=True):
    """One step.

    Attributes:
        do: what.
        side: of which setup.
        vectors: which vectors of it.
        may_fail: failing is no reason to stop: it undoes what was perhaps never done.

    """

    do: Do
    side: Side
    vectors: tuple[int, ...] = ()
    may_fail: bool = False


class Plan(Struct, frozen=True):
    """The way from one setup to another, and the way back from anywhere on it."""

    forward: tuple[Step, ...]
    back: tuple[Step, ...]


def choose_mode(*, level: bool, wanted: IrqMode | None, resample: bool) -> IrqMode:
    """The mode of a vector: what was asked for; else MSI is direct, and INTx is when it has a resample eventfd."""
    if wanted is not None:
        return wanted
    return IrqMode.DIRECT if resample or not level else IrqMode.RELAYED


def plan(old: Setup, new: Setup) -> Plan:
    """The steps from ``old`` to ``new``, and those back. Equal setups: no steps."""
    if old == new:
        return Plan((), ())
    if old.kind is new.kind is IrqKind.INTX:
        return Plan(_replace_line(old, new), _restore_line(old, new))
    if old.kind is not new.kind or old.kind is IrqKind.NONE:
        lost: tuple[int, ...] = ()
    elif old.kind is IrqKind.MSIX:
        way = growth(old.block, new.block, resizable=new.resizable)
        if way is not Growth.AGAIN:
            return _within_block(old, new, signal=to_signal(way, old.vectors, new.vectors))
        lost = to_signal(way, old.vectors, new.vectors)
    elif new.block == old.block:
        return _within_block(old, new)
    else:
        # Growing a block of messages disables the index: what fired meanwhile is lost, so every used vector is
        # signalled once. The same holds for messages that come back after a change that failed.
        lost = tuple(v for v in sorted(old.vectors) if v in new.vectors)
    return Plan(
        forward=_leave(Side.OLD, old) + _enter(Side.NEW, new) + _signal(Side.NEW, lost),
        back=_return_to(old, new),
    )


def _return_to(old: Setup, new: Setup) -> tuple[Step, ...]:
    """From anywhere between leaving one kind and entering another, back: through nothing at all."""
    steps: tuple[Step, ...] = ()
    for side, setup in ((Side.NEW, new), (Side.OLD, old)):
        if setup.kind is not IrqKind.NONE:
            steps += _listen(Do.UNLISTEN, side, setup) + _disarm(side, setup, may_fail=True)
            steps += (Step(Do.DISABLE, side, may_fail=True),)
    if old.kind is IrqKind.INTX:
        # Should disabling have failed, it is still masked from before.
        return steps + _set_line(Side.OLD, old)
    return steps + _enter(Side.OLD, old) + _signal(Side.OLD, tuple(sorted(old.vectors)))


def _signal(side: Side, vectors: tuple[int, ...]) -> tuple[Step, ...]:
    return (Step(Do.SIGNAL, side, vectors),) if vectors else ()


def _disarm(side: Side, setup: Setup, *, may_fail: bool = False) -> tuple[Step, ...]:
    # A resample eventfd may outlive vfiod's own close of it: it is taken back explicitly.
    vectors = tuple(v for v, b in sorted(setup.vectors.items()) if b.resample and b.mode is IrqMode.DIRECT)
    return (Step(Do.DISARM_RESAMPLE, side, vectors, may_fail),) if vectors else ()


def _arm_resample(side: Side, setup: Setup) -> tuple[Step, ...]:
    vectors = tuple(v for v, b in sorted(setup.vectors.items()) if b.resample and b.mode is IrqMode.DIRECT)
    return (Step(Do.ARM_RESAMPLE, side, vectors),) if vectors else ()


def _listen(do: Do, side: Side, setup: Setup, among: Iterable[int] | None = None) -> tuple[Step, ...]:
    vectors = setup.relayed(among)
    return (Step(do, side, vectors),) if vectors else ()


def _leave(side: Side, setup: Setup) -> tuple[Step, ...]:
    if setup.kind is IrqKind.NONE:
        return ()
    steps = _listen(Do.UNLISTEN, side, setup)
    if setup.kind is IrqKind.INTX:
        # Masked before its eventfd goes: a level line must not fire into nothing.
        unmasked = tuple(v for v in sorted(setup.vectors) if v not in setup.masked)
        if setup.maskable and unmasked:
            steps += (Step(Do.MASK, side, unmasked),)
        steps += (Step(Do.CLEAR, side), *_disarm(side, setup))
    return (*steps, Step(Do.DISABLE, side))


def _enter(side: Side, setup: Setup) -> tuple[Step, ...]:
    if setup.kind is IrqKind.NONE:
        return ()
    steps: tuple[Step, ...] = (Step(Do.ARM, side, tuple(range(setup.block))), *_arm_resample(side, setup))
    # The kernel can mask only what is armed. An interrupt in between is latched, not lost (intx.py).
    if setup.masked:
        steps += (Step(Do.MASK, side, tuple(sorted(setup.masked))),)
    return steps + _listen(Do.LISTEN, side, setup)


def _replace_line(old: Setup, new: Setup) -> tuple[Step, ...]:
    steps = _listen(Do.UNLISTEN, Side.OLD, old)
    unmasked = tuple(v for v in sorted(old.vectors) if v not in old.masked)
    if old.maskable and unmasked:
        steps += (Step(Do.MASK, Side.OLD, unmasked),)
    steps += (Step(Do.CLEAR, Side.OLD), *_disarm(Side.OLD, old))
    return steps + _set_line(Side.NEW, new)


def _restore_line(old: Setup, new: Setup) -> tuple[Step, ...]:
    # The kernel takes a resample eventfd only where there is none (EBUSY): whichever it has now is taken back first.
    disarm = _disarm(Side.NEW, new, may_fail=True) or _disarm(Side.OLD, old, may_fail=True)
    return (*_listen(Do.UNLISTEN, Side.NEW, new), *disarm, *_set_line(Side.OLD, old))


def _set_line(side: Side, setup: Setup) -> tuple[Step, ...]:
    """Set up a line that may be masked from before, and unmask it unless the user masked it."""
    unmasked = tuple(v for v in sorted(setup.vectors) if v not in setup.masked)
    unmask = (Step(Do.UNMASK, side, unmasked),) if setup.maskable and unmasked else ()
    return (*_enter(side, setup), *unmask)


def _within_block(old: Setup, new: Setup, *, signal: tuple[int, ...] = ()) -> Plan:
    """Change single vectors of a block of messages: the others do not notice."""
    before, after = dict(old.vectors), dict(new.vectors)
    # Nearly all are the same objects: there may be 2,048, of which one changes.
    changed = tuple(
        sorted(
            [v for v, one in after.items() if (was := before.get(v)) is not one and was != one]
            + [v for v in before if v not in after]
        )
    )
    masked = tuple(v for v in changed if v in new.masked)
    remask = (Step(Do.MASK, Side.NEW, masked),) if masked else ()
    arm_new = (Step(Do.ARM, Side.NEW, changed),) if changed else ()
    arm_old = (Step(Do.ARM, Side.OLD, changed),) if changed else ()
    return Plan(
        forward=(
            *_listen(Do.UNLISTEN, Side.OLD, old, changed),
            *arm_new,
            *remask,
            *_listen(Do.LISTEN, Side.NEW, new, changed),
            *_signal(Side.NEW, signal),
        ),
        back=(
            *_listen(Do.UNLISTEN, Side.NEW, new, changed),
            *arm_old,
            *_listen(Do.LISTEN, Side.OLD, old, changed),
        ),
    )
