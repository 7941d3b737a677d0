"""From one setup to another: in the reference's order, and back from any step that fails.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.server.interrupts.modes import NOTHING, Binding, Do, Plan, Setup, Side, Step, choose_mode, plan

D, R = IrqMode.DIRECT, IrqMode.RELAYED


def intx(mode: IrqMode, *, resample: bool = False, token: int = 1, masked: bool = False) -> Setup:
    binding = Binding(mode, resample, token)
    return Setup(IrqKind.INTX, {0: binding}, 1, frozenset({0} if masked else ()), maskable=True)


def msi(*modes: IrqMode | None, token: int = 10) -> Setup:
    vectors = {v: Binding(m, token=token + v) for v, m in enumerate(modes) if m is not None}
    return Setup(IrqKind.MSI, vectors, len(modes))


def did(steps: tuple[Step, ...]) -> list[Do]:
    return [step.do for step in steps]


@pytest.mark.parametrize(
    ("level", "wanted", "resample", "mode"),
    [
        (False, None, False, D),  # MSI is direct
        (True, None, True, D),  # INTx is, when it has a resample eventfd
        (True, None, False, R),
        (True, D, False, D),
        (False, R, False, R),
        (True, R, True, R),
    ],
)
def test_the_mode_when_none_is_asked_for(level: bool, wanted: IrqMode | None, resample: bool, mode: IrqMode) -> None:
    assert choose_mode(level=level, wanted=wanted, resample=resample) is mode


def test_from_relayed_to_direct_goes_through_a_known_state() -> None:
    steps = plan(intx(R), intx(D, resample=True, token=2)).forward
    assert did(steps) == [Do.UNLISTEN, Do.MASK, Do.CLEAR, Do.ARM, Do.ARM_RESAMPLE, Do.UNMASK]


def test_leaving_the_direct_mode_listens_first_and_then_unmasks() -> None:
    steps = plan(intx(D, resample=True), intx(R, token=2)).forward
    assert did(steps) == [Do.MASK, Do.CLEAR, Do.DISARM_RESAMPLE, Do.ARM, Do.LISTEN, Do.UNMASK]


def test_a_mask_of_the_user_outlives_a_change_of_mode() -> None:
    steps = plan(intx(R, masked=True), intx(D, token=2, masked=True)).forward
    assert Do.UNMASK not in did(steps)


def test_removal_ends_at_none_and_disarms_the_resample_eventfd() -> None:
    steps = plan(intx(D, resample=True), NOTHING).forward
    assert did(steps) == [Do.MASK, Do.CLEAR, Do.DISARM_RESAMPLE, Do.DISABLE]


def test_one_kind_at_a_time() -> None:
    steps = plan(intx(R), msi(D, D)).forward
    assert did(steps) == [Do.UNLISTEN, Do.MASK, Do.CLEAR, Do.DISABLE, Do.ARM]
    assert steps[-1] == Step(Do.ARM, Side.NEW, (0, 1))


def test_a_vector_within_the_block_is_set_alone() -> None:
    old, new = msi(D, D, D), msi(D, D, D)
    new = Setup(IrqKind.MSI, {**old.vectors, 1: Binding(R, token=99)}, 3)
    assert plan(old, new).forward == (Step(Do.ARM, Side.NEW, (1,)), Step(Do.LISTEN, Side.NEW, (1,)))


def test_growing_disables_and_signals_every_vector_that_was_in_use() -> None:
    steps = plan(msi(D), msi(D, D)).forward
    assert did(steps) == [Do.DISABLE, Do.ARM, Do.SIGNAL]
    assert steps[-1].vectors == (0,)


def test_nothing_to_do() -> None:
    assert plan(msi(D, R), msi(D, R)) == Plan((), ())


# --- any change, failing at any step, ends where it began ------------------------------------------------


@dataclass
class Kernel:
    """What the steps do to a kernel, and to who listens: a table, so that the plan alone is tested."""

    kind: IrqKind = IrqKind.NONE
    triggers: dict[int, int] = field(default_factory=dict)  # vector -> token; -1 entries left out
    resample: int | None = None
    masked: set[int] = field(default_factory=set)
    listening: set[tuple[int, int]] = field(default_factory=set)  # (vector, token)
    allocated: int = 0

    def take(self, step: Step, setup: Setup) -> None:
        bindings = {v: setup.vectors.get(v) for v in step.vectors}
        match step.do:
            case Do.LISTEN:
                self.listening |= {(v, b.token) for v, b in bindings.items() if b}
            case Do.UNLISTEN:
                self.listening -= {(v, b.token) for v, b in bindings.items() if b}
            case Do.MASK:
                self._only(setup)
                self.masked |= set(step.vectors)
            case Do.UNMASK:
                self._only(setup)
                self.masked -= set(step.vectors)
            case Do.ARM:
                if self.kind is IrqKind.NONE:
                    self.kind = setup.kind
                    self.masked.clear()
                    self.allocated = max(step.vectors) + 1
                self._only(setup)
                if max(step.vectors) >= self.allocated and not setup.resizable:
                    raise OSError("EINVAL")
                for vector, binding in bindings.items():
                    self.triggers.pop(vector, None)
                    if binding:
                        self.triggers[vector] = binding.token
            case Do.ARM_RESAMPLE:
                self._only(setup)
                if self.resample is not None:
                    raise OSError("EBUSY")
                self.resample = setup.vectors[0].token
            case Do.DISARM_RESAMPLE:
                self._only(setup)
                self.resample = None
            case Do.DISABLE:
                self._only(setup)
                self.kind, self.resample = IrqKind.NONE, None
                self.triggers.clear()
                self.masked.clear()

    def _only(self, setup: Setup) -> None:
        if self.kind is not setup.kind:
            raise OSError("EINVAL")

    def become(self, setup: Setup) -> None:
        for step in plan(NOTHING, setup).forward:
            self.take(step, setup)

    @property
    def state(self) -> tuple[object, ...]:
        return self.kind, dict(self.triggers), self.resample, set(self.masked), set(self.listening)


def bindings() -> st.SearchStrategy[Binding]:
    return st.builds(Binding, st.sampled_from(IrqMode), st.just(False), st.integers(1, 10**6))


def setups() -> st.SearchStrategy[Setup]:
    line = st.builds(
        lambda mode, resample, token, masked: intx(mode, resample=resample, token=token, masked=masked),
        st.sampled_from(IrqMode),
        st.booleans(),
        st.integers(1, 10**6),
        st.booleans(),
    )
    messages = st.builds(
        lambda vectors: Setup(IrqKind.MSI, vectors, max(vectors) + 1),
        st.dictionaries(st.integers(0, 7), bindings(), min_size=1),
    )
    msix = st.builds(
        lambda vectors, more: Setup(IrqKind.MSIX, vectors, max(vectors, default=0) + 1 + more),
        st.dictionaries(st.integers(0, 7), bindings()),
        st.integers(0, 2),
    )
    return st.just(NOTHING) | line | messages | msix


def able(setup: Setup, resizable: bool) -> Setup:
    """The same device cannot be both."""
    return replace(setup, resizable=resizable and setup.kind is IrqKind.MSIX)


@given(setups(), setups(), st.booleans())
@settings(deadline=None)
def test_every_change_arrives(old: Setup, new: Setup, resizable: bool) -> None:
    old, new = able(old, resizable), able(new, resizable)
    kernel, expected = Kernel(), Kernel()
    kernel.become(old)
    expected.become(new)
    for step in plan(old, new).forward:
        kernel.take(step, old if step.side is Side.OLD else new)
    assert kernel.state == expected.state


@given(setups(), setups(), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_every_change_that_fails_anywhere_ends_where_it_began(
    old: Setup, new: Setup, resizable: bool, data: st.DataObject
) -> None:
    old, new = able(old, resizable), able(new, resizable)
    way = plan(old, new)
    if not way.forward:
        return
    kernel, expected = Kernel(), Kernel()
    kernel.become(old)
    expected.become(old)
    for step in way.forward[: data.draw(st.integers(0, len(way.forward) - 1))]:
        kernel.take(step, old if step.side is Side.OLD else new)
    for step in way.back:
        try:
            kernel.take(step, old if step.side is Side.OLD else new)
        except OSError:
            assert step.may_fail, step
    assert kernel.state == expected.state
