"""MSI-X vector by vector: behaviour.md, section 4; and what follows from a guest's enable bits."""

from __future__ import annotations

import itertools

import pytest

from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.server.interrupts.guest import MOVES, Move, Switch, moves, switches
from vfiod.server.interrupts.modes import Binding, Do, Setup, Side, Step, plan
from vfiod.server.interrupts.msix import USED, Growth, growth, to_signal, wanted


def msix(*used: int, block: int | None = None, resizable: bool = False, token: int = 10) -> Setup:
    vectors = {v: Binding(IrqMode.DIRECT, token=token + v) for v in used}
    return Setup(IrqKind.MSIX, vectors, max(used, default=0) + 1 if block is None else block, resizable=resizable)


def did(steps: tuple[Step, ...]) -> list[tuple[Do, tuple[int, ...]]]:
    return [(step.do, step.vectors) for step in steps]


def test_a_higher_vector_disables_and_enables_again_with_all_and_signals_every_used_one() -> None:
    """ "using a higher one disables the index and enables it again with all used vectors (unused are -1)"; "so every
    used vector is then signalled once"."""
    assert did(plan(msix(0, 2), msix(0, 2, 5)).forward) == [
        (Do.DISABLE, ()),
        (Do.ARM, (0, 1, 2, 3, 4, 5)),
        (Do.SIGNAL, (0, 2, 5)),
    ]


def test_where_the_kernel_allows_growing_only_the_new_one_is_set() -> None:
    """ "or, where the kernel allows growing (no NORESIZE flag), sets only the new one"."""
    way = plan(msix(0, resizable=True), msix(0, 5, resizable=True))
    assert did(way.forward) == [(Do.ARM, (5,))]
    assert way.back == (Step(Do.ARM, Side.OLD, (5,)),)


def test_within_range_just_that_vector_is_set_and_signalled() -> None:
    """ "Using a vector within range sets just that vector and signals it once"."""
    assert did(plan(msix(0, 5), msix(0, 3, 5)).forward) == [(Do.ARM, (3,)), (Do.SIGNAL, (3,))]


def test_releasing_sets_minus_one() -> None:
    """ "Releasing sets -1": ARM of a vector that is not bound any more."""
    new = msix(0, block=6)
    assert did(plan(msix(0, 5), new).forward) == [(Do.ARM, (5,))]
    assert 5 not in new.vectors


def test_enabled_without_a_vector() -> None:
    """The guest's enable bit alone enables the index: one vector, -1."""
    assert did(plan(Setup(), msix(block=1)).forward) == [(Do.ARM, (0,))]
    assert did(plan(msix(block=1), msix(0)).forward) == [(Do.ARM, (0,)), (Do.SIGNAL, (0,))]


@pytest.mark.parametrize(
    ("allocated", "needed", "resizable", "way"),
    [
        (4, 4, False, Growth.WITHIN),
        (4, 1, True, Growth.WITHIN),
        (4, 5, False, Growth.AGAIN),
        (4, 5, True, Growth.ADD),
    ],
)
def test_growth(allocated: int, needed: int, resizable: bool, way: Growth) -> None:
    assert growth(allocated, needed, resizable=resizable) is way


def test_whom_to_signal() -> None:
    assert to_signal(Growth.AGAIN, {0}, {0, 4}) == (0, 4)
    assert to_signal(Growth.WITHIN, {0, 4}, {0, 2}) == (2,)
    assert to_signal(Growth.ADD, {0}, {0, 4}) == ()


def test_a_vector_is_used_only_when_nothing_masks_it() -> None:
    assert set(USED) == set(itertools.product((False, True), repeat=3))
    assert [key for key, used in USED.items() if used] == [(True, False, False)]
    assert wanted(enabled=True, all_masked=False, unmasked={1, 4}) == {1, 4}
    assert wanted(enabled=True, all_masked=True, unmasked={1, 4}) == frozenset()


def test_every_switch_in_every_kind_has_its_move() -> None:
    kinds = [kind for kind in IrqKind if kind is not IrqKind.PLATFORM]  # which has no enable bits
    assert set(MOVES) == set(itertools.product(kinds, Switch))
    for kind in kinds:
        assert moves(kind, Switch.MSI_ON) is (None if kind is IrqKind.MSI else Move.START_MSI)
        assert moves(kind, Switch.MSIX_ON) is (None if kind is IrqKind.MSIX else Move.START_MSIX)
        assert moves(kind, Switch.MSI_OFF) is (Move.TO_INTX if kind is IrqKind.MSI else None)
        assert moves(kind, Switch.MSIX_OFF) is (Move.TO_INTX if kind is IrqKind.MSIX else None)


def test_a_switch_from_one_to_the_other_never_passes_through_intx() -> None:
    """ "switching between them ... end at none": the one that begins comes first."""
    assert switches((True, False), (False, True)) == (Switch.MSIX_ON, Switch.MSI_OFF)
    assert moves(IrqKind.MSIX, Switch.MSI_OFF) is None
    assert switches((False, False), (False, False)) == ()
