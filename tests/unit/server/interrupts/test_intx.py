"""The INTx line and its fast path: every rule of the reference, section 4, and the properties that must always hold."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiod.protocol.catalogue.words import IrqMode
from vfiod.server.interrupts.intx import (
    DIRECT,
    FAST_PATH,
    RELAYED,
    Action,
    FastEvent,
    FastState,
    IntxLine,
    LineEvent,
    LineState,
)


def relayed(**options: bool) -> IntxLine:
    return IntxLine(IrqMode.RELAYED, **options)


# --- the tables are whole ---------------------------------------------------------------------------


def test_the_relayed_table_says_what_happens_in_every_state() -> None:
    assert set(RELAYED) == set(itertools.product(LineState, LineEvent))


def test_the_direct_table_has_no_interrupts_and_nothing_pending() -> None:
    heard = {LineEvent.EOI, LineEvent.MASK, LineEvent.UNMASK, LineEvent.CLEAR}
    assert set(DIRECT) == set(itertools.product((LineState.INACTIVE, LineState.MASKED), heard))


def test_the_fast_path_table_is_whole() -> None:
    assert set(FAST_PATH) == set(itertools.product(FastState, FastEvent))


@pytest.mark.parametrize("table", [RELAYED, DIRECT])
def test_the_line_is_raised_exactly_where_it_goes_up_and_lowered_where_it_goes_down(table: object) -> None:
    for (before, event), (after, actions) in table.items():  # type: ignore[attr-defined]
        assert (Action.RAISE in actions) is (after.up and not before.up), (before, event)
        assert (Action.LOWER in actions) is (before.up and not after.up), (before, event)


# --- the rules, one by one ----------------------------------------------------------------------------


def test_an_interrupt_makes_it_pending_and_raises_the_line() -> None:
    line = relayed(by_access=False)
    assert line.fired() == (Action.RAISE,)
    assert line.state is LineState.PENDING


def test_an_eoi_lowers_the_line_and_unmasks() -> None:
    line = relayed(by_access=False)
    line.fired()
    assert line.eoi() == (Action.LOWER, Action.HOST_UNMASK)
    assert line.state is LineState.INACTIVE


def test_an_eoi_with_nothing_pending_does_nothing() -> None:
    line = relayed()
    assert line.eoi() == ()
    assert line.access() == ()


def test_an_index_that_does_not_mask_itself_is_not_unmasked_by_an_eoi() -> None:
    line = relayed(automasked=False, by_access=False)
    line.fired()
    assert line.eoi() == (Action.LOWER,)


def test_the_first_access_is_an_eoi_and_the_fast_path_goes_off_for_it() -> None:
    line = relayed()
    assert line.fired() == (Action.RAISE, Action.FAST_PATH_OFF, Action.START_TIMER)
    assert line.access() == (Action.LOWER, Action.HOST_UNMASK)
    assert line.fast_path is FastState.OFF
    assert line.timer() == (Action.FAST_PATH_ON,)


def test_the_timer_is_started_again_while_the_line_is_up() -> None:
    line = relayed()
    line.fired()
    assert line.timer() == (Action.START_TIMER,)
    assert line.fast_path is FastState.OFF


def test_a_timer_of_zero_leaves_the_fast_path_off_after_the_first_interrupt() -> None:
    line = relayed(timed=False)
    assert line.fired() == (Action.RAISE, Action.FAST_PATH_OFF)
    line.access()
    assert line.fast_path is FastState.OFF
    assert Action.FAST_PATH_ON in line.clear()


def test_accesses_complete_nothing_when_another_process_maps_a_region() -> None:
    line = relayed(by_access=False)
    assert Action.FAST_PATH_OFF not in line.fired()
    assert line.access() == ()
    assert line.state is LineState.PENDING


def test_a_region_mapped_while_an_interrupt_is_pending_gives_the_fast_path_back_and_ends_eoi_by_access() -> None:
    line = relayed()
    line.fired()
    assert line.stop_by_access() == (Action.STOP_TIMER, Action.FAST_PATH_ON)
    assert line.access() == ()
    assert line.eoi() == (Action.LOWER, Action.HOST_UNMASK)


def test_an_interrupt_that_arrives_while_masked_is_delivered_when_unmasked() -> None:
    line = relayed(by_access=False)
    assert line.mask() == (Action.HOST_MASK,)
    assert line.fired() == ()
    assert line.eoi() == ()
    assert line.unmask() == (Action.RAISE,)
    assert line.eoi() == (Action.LOWER, Action.HOST_UNMASK)


def test_an_eoi_does_not_undo_the_users_mask() -> None:
    line = relayed(by_access=False)
    line.fired()
    line.mask()
    assert line.eoi() == (Action.LOWER,)
    assert line.state is LineState.MASKED
    assert line.unmask() == (Action.HOST_UNMASK,)


def test_clearing_keeps_the_users_mask() -> None:
    line = relayed(by_access=False, masked=True)
    line.fired()
    assert line.clear() == ()
    assert line.state is LineState.MASKED


def test_the_direct_mode_unmasks_on_every_eoi_unless_the_user_masked() -> None:
    line = IntxLine(IrqMode.DIRECT)
    assert line.eoi() == (Action.HOST_UNMASK,)
    line.mask()
    assert line.eoi() == ()
    assert line.access() == ()
    with pytest.raises(KeyError):
        line.fired()


# --- what must hold whatever happens -------------------------------------------------------------------


class Host(RuleBasedStateMachine):
    """A device that asserts its line, the kernel's INTx between it and vfiod, and the line under test."""

    def __init__(self) -> None:
        super().__init__()
        self.line = relayed()
        self.asserted = False  # the device's line
        self.host_masked = False  # in the kernel
        self.eventfd = 0  # signalled, not yet read
        self.up = False  # the virtual line
        self.fast = True
        self.timer = False
        self.delivered = 0
        self.owed = False  # an interrupt arrived and was neither delivered nor completed

    def kernel(self) -> None:
        if self.asserted and not self.host_masked:
            self.host_masked = True
            self.eventfd += 1

    def act(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if action is Action.RAISE:
                assert not self.up, "the line went up twice"
                self.up = True
                self.delivered += 1
                self.owed = False
            elif action is Action.LOWER:
                assert self.up, "the line went down twice"
                self.up = False
            elif action is Action.HOST_MASK:
                self.host_masked = True
            elif action is Action.HOST_UNMASK:
                self.host_masked = False
                self.kernel()
            elif action is Action.FAST_PATH_OFF:
                assert self.fast
                self.fast = False
            elif action is Action.FAST_PATH_ON:
                assert not self.fast
                self.fast = True
            elif action is Action.START_TIMER:
                self.timer = True
            elif action is Action.STOP_TIMER:
                self.timer = False

    @rule()
    def device_asserts(self) -> None:
        self.asserted = True
        self.kernel()

    @rule()
    def device_deasserts(self) -> None:
        self.asserted = False

    @rule()
    def loopback(self) -> None:
        self.eventfd += 1  # TRIGGER with DATA_NONE signals, and does not mask

    @precondition(lambda self: self.eventfd > 0)
    @rule()
    def read(self) -> None:
        self.eventfd = 0
        self.owed = not self.up
        self.act(self.line.fired())

    @rule()
    def eoi(self) -> None:
        self.act(self.line.eoi())

    @rule()
    def access(self) -> None:
        self.act(self.line.access())

    @rule()
    def mask(self) -> None:
        self.act(self.line.mask())

    @rule()
    def unmask(self) -> None:
        self.act(self.line.unmask())

    @precondition(lambda self: self.timer)
    @rule()
    def timer_fires(self) -> None:
        self.timer = False
        self.act(self.line.timer())

    @rule()
    def another_process_maps(self) -> None:
        self.act(self.line.stop_by_access())

    @invariant()
    def the_virtual_line_is_what_the_state_says(self) -> None:
        assert self.up is self.line.state.up

    @invariant()
    def the_fast_path_is_what_the_state_says(self) -> None:
        assert self.fast is (self.line.fast_path is FastState.ON)

    @invariant()
    def the_fast_path_always_has_a_way_back(self) -> None:
        assert self.fast or self.timer

    @invariant()
    def an_owed_interrupt_waits_for_the_unmask_only(self) -> None:
        assert not self.owed or self.line.state is LineState.LATCHED

    @invariant()
    def an_asserted_line_is_never_lost(self) -> None:
        """Whoever asserts is on its way, up, or held by a mask that the user or the EOI will take away."""
        if self.asserted and not self.eventfd and not self.up:
            assert self.line.state.masked

    def teardown(self) -> None:
        """Whatever happened: unmask, read, complete until the device is quiet; then nothing is left behind."""
        self.asserted = False
        self.act(self.line.unmask())
        for _ in range(3):
            if self.eventfd:
                self.eventfd = 0
                self.act(self.line.fired())
            self.act(self.line.eoi())
        assert self.line.state is LineState.INACTIVE
        assert not self.up
        assert not self.host_masked
        while self.timer:
            self.timer = False
            self.act(self.line.timer())
        assert self.fast, "the fast path did not come back"


TestIntxProperties = Host.TestCase
TestIntxProperties.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
