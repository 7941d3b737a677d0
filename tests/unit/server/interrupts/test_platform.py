"""Relayed platform interrupts: the table, and random lives in which nothing is lost, nothing doubled.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfiod.server.interrupts import tables
from vfiod.server.interrupts.intx import FAST_PATH, Action, FastState
from vfiod.server.interrupts.platform import RELAYED, Act, IrqEvent, IrqState, Line, PlatformLines

S, E, A = IrqState, IrqEvent, Action
LEVEL, EDGE = Line(automasked=True), Line(automasked=False)


def lines(*kinds: Line, timed: bool = True) -> PlatformLines:
    made = PlatformLines(timed=timed)
    for index, kind in enumerate(kinds):
        made.add(index, kind)
    return made


def words(acts: tuple[Act, ...]) -> list[str]:
    """``raise 0``, ``host_unmask 0``, ``start_timer``."""
    return [act.action.name.lower() + (f" {act.index}" if act.index >= 0 else "") for act in acts]


# --- the table --------------------------------------------------------------------------------------


def test_what_can_happen_and_nothing_else() -> None:
    """Section 7, state by state. What is missing cannot happen: a missing key is the error."""
    assert {key: (state, actions) for key, (state, actions) in RELAYED.items()} == {
        (S.INACTIVE, E.FIRED): (S.ACTIVE, (A.RAISE,)),
        (S.INACTIVE, E.FIRED_LATER): (S.PENDING, ()),
        (S.INACTIVE, E.PASSED): (S.INACTIVE, (A.RAISE,)),
        (S.INACTIVE, E.COMPLETED): (S.INACTIVE, ()),
        (S.INACTIVE, E.STOPPED): (S.INACTIVE, ()),
        (S.PENDING, E.FIRED_LATER): (S.PENDING, ()),
        (S.PENDING, E.PASSED): (S.INACTIVE, (A.RAISE,)),
        (S.PENDING, E.TURN): (S.ACTIVE, (A.RAISE,)),
        (S.PENDING, E.COMPLETED): (S.PENDING, ()),
        (S.PENDING, E.STOPPED): (S.INACTIVE, ()),
        (S.ACTIVE, E.FIRED_LATER): (S.ACTIVE, ()),
        (S.ACTIVE, E.COMPLETED): (S.INACTIVE, (A.LOWER, A.HOST_UNMASK)),
        (S.ACTIVE, E.STOPPED): (S.INACTIVE, (A.LOWER,)),
    }


@pytest.mark.parametrize("move", ["fired", "eoi", "remove"])
def test_what_is_not_relayed_is_an_error(move: str) -> None:
    with pytest.raises(KeyError):
        getattr(lines(LEVEL), move)(7)


def test_added_twice_is_an_error() -> None:
    with pytest.raises(KeyError):
        lines(LEVEL).add(0, EDGE)


def test_the_documentation_has_the_tables() -> None:
    """``make docs`` writes the page again."""
    page = tables.page()
    assert (Path(__file__).parents[4] / "docs" / "platform-interrupts.md").read_text() == page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == len(RELAYED) + len(FAST_PATH) + 2


# --- single stories ---------------------------------------------------------------------------------


def test_one_level() -> None:
    one = lines(LEVEL)
    assert words(one.fired(0)) == ["raise 0", "fast_path_off", "start_timer"]
    assert words(one.timer()) == ["start_timer"]
    assert words(one.access()) == ["lower 0", "host_unmask 0"]
    assert words(one.access()) == []
    assert words(one.timer()) == ["fast_path_on"]


def test_an_edge_is_not_unmasked() -> None:
    one = lines(EDGE)
    one.fired(0)
    assert words(one.access()) == ["lower 0"]


def test_the_next_one_comes_with_the_completion_of_the_first() -> None:
    both = lines(LEVEL, LEVEL)
    both.fired(0)
    assert words(both.fired(1)) == []
    assert words(both.access()) == ["lower 0", "host_unmask 0", "raise 1"]


def test_without_a_timer_it_stays_off_until_nothing_is_relayed() -> None:
    one = lines(LEVEL, timed=False)
    assert words(one.fired(0)) == ["raise 0", "fast_path_off"]
    one.access()
    assert one.fast_path is FastState.OFF
    assert words(one.remove(0)) == ["stop_timer", "fast_path_on"]


def test_a_stopped_one_gives_its_place_to_the_next() -> None:
    both = lines(LEVEL, EDGE)
    both.fired(0)
    both.fired(1)
    assert words(both.remove(0)) == ["lower 0", "raise 1"]


def test_one_that_came_while_masked_switches_the_fast_path_off_when_its_turn_comes() -> None:
    one = lines(EDGE)
    assert words(one.mask(0)) == ["host_mask 0"]
    assert words(one.fired(0)) == []
    assert words(one.unmask(0)) == ["host_unmask 0", "raise 0", "fast_path_off", "start_timer"]


def test_clear_forgets_who_waited() -> None:
    both = lines(LEVEL, EDGE)
    both.fired(0)
    both.fired(1)
    assert words(both.clear()) == ["lower 0", "stop_timer", "fast_path_on"]
    assert not both.waiting
    assert 0 not in both


def test_a_move_that_could_not_be_made_is_taken_back() -> None:
    both = lines(LEVEL, EDGE)
    both.fired(0)
    both.fired(1)
    mark = both.mark()
    both.access()
    assert both.active == 1
    both.go_back(mark)
    assert both.mark() == mark
    assert (both.state(0), both.state(1)) == (S.ACTIVE, S.PENDING)


# --- random lives -----------------------------------------------------------------------------------

COUNT = 4
INDEX = st.integers(0, COUNT - 1)


class Life(RuleBasedStateMachine):
    """A device, the kernel and a guest around the lines; the model knows who is owed an interrupt.

    An edge is owed from firing until it is raised, or until an access completes it (its handler sees it then). A level
    is owed as long as the device asserts it. What the kernel masked does not fire.
    """

    @initialize(kinds=st.tuples(*[st.booleans()] * COUNT), timed=st.booleans(), shared=st.booleans())
    def begin(self, kinds: tuple[bool, ...], timed: bool, shared: bool) -> None:
        self.shared = shared  # a region may be given out
        self.lines = PlatformLines(timed=timed)
        self.levels = kinds
        self.timed = timed
        self.present = [False] * COUNT
        self.asserted = [False] * COUNT
        self.latched = [False] * COUNT  # an edge, while the kernel has it masked
        self.masked = [False] * COUNT  # in the kernel
        self.user = [False] * COUNT  # by the user
        self.owed = [False] * COUNT
        self.up: set[int] = set()
        self.fast = True
        self.timer_runs = False
        for index in range(COUNT):
            self.start(index)

    def perform(self, acts: tuple[Act, ...]) -> None:
        unmasked = []
        for act in acts:
            match act.action:
                case A.RAISE:
                    assert not self.user[act.index], "masked by the user"
                    self.owed[act.index] = False
                    if self.lines.by_access or self.levels[act.index]:
                        assert not self.up, "two at once"
                        self.up.add(act.index)
                case A.LOWER:
                    self.up.discard(act.index)
                case A.HOST_MASK:
                    self.masked[act.index] = True
                case A.HOST_UNMASK:
                    self.masked[act.index] = False
                    unmasked.append(act.index)
                case A.FAST_PATH_OFF:
                    self.fast = False
                case A.FAST_PATH_ON:
                    self.fast = True
                case A.START_TIMER:
                    self.timer_runs = True
                case A.STOP_TIMER:
                    self.timer_runs = False
        for index in unmasked:
            if self.asserted[index] or self.latched[index]:
                self.kernel_fires(index)

    def kernel_fires(self, index: int) -> None:
        if not self.present[index]:
            return
        if self.masked[index]:
            self.latched[index] = not self.levels[index]
            return
        self.latched[index] = False
        self.masked[index] = self.levels[index]
        self.owed[index] = not self.levels[index]
        self.perform(self.lines.fired(index))

    @rule(index=INDEX)
    def fire(self, index: int) -> None:
        self.asserted[index] = self.levels[index]
        self.kernel_fires(index)

    @rule(index=INDEX)
    def arrive_late(self, index: int) -> None:
        """It was in its eventfd already when the user masked it."""
        if self.present[index] and self.user[index] and not self.levels[index]:
            self.owed[index] = True
            self.perform(self.lines.fired(index))

    @rule(index=INDEX)
    def burst(self, index: int) -> None:
        """It fires, and again, and is completed without an access."""
        self.fire(index)
        self.fire(index)
        self.eoi(index)

    @rule(acknowledges=st.booleans())
    def access(self, acknowledges: bool) -> None:
        """The guest's handler looks at the device."""
        active = self.lines.active
        completes = active is not None and self.lines.by_access
        if active is not None and acknowledges:
            self.asserted[active] = False
        if completes and active is not None:
            self.owed[active] = False
        self.perform(self.lines.access())

    @rule(index=INDEX)
    def eoi(self, index: int) -> None:
        if self.present[index]:
            if index == self.lines.active:
                self.asserted[index] = False
            self.perform(self.lines.eoi(index))

    @precondition(lambda self: self.timer_runs)
    @rule()
    def timer(self) -> None:
        self.timer_runs = False
        self.perform(self.lines.timer())

    @rule(index=INDEX)
    def mask(self, index: int) -> None:
        if self.present[index]:
            self.perform(self.lines.mask(index))
            self.user[index] = True

    @rule(index=INDEX)
    def unmask(self, index: int) -> None:
        if self.present[index]:
            self.user[index] = False
            self.perform(self.lines.unmask(index))

    @rule(index=INDEX)
    def stop(self, index: int) -> None:
        if self.present[index]:
            self.present[index] = self.owed[index] = self.latched[index] = False
            self.perform(self.lines.remove(index))

    @rule(index=INDEX)
    def start(self, index: int) -> None:
        if not self.present[index]:
            self.present[index] = True
            self.lines.add(index, Line(automasked=self.levels[index]))
            self.masked[index] = self.user[index]
            if self.asserted[index]:
                self.kernel_fires(index)

    @precondition(lambda self: self.shared and self.lines.by_access)
    @rule()
    def region_is_given_out(self) -> None:
        self.perform(self.lines.stop_by_access())

    @invariant()
    def the_states_agree(self) -> None:
        if not hasattr(self, "lines"):
            return
        active = {index for index in range(COUNT) if self.lines.state(index) is S.ACTIVE}
        assert active == self.up
        assert self.fast is (self.lines.fast_path is FastState.ON)
        if active and self.lines.by_access:
            assert not self.fast, "the access that completes it would not be seen"
        if self.timed and not self.fast:
            assert self.timer_runs, "nothing would bring the fast path back"
        if not any(self.present):
            assert self.fast
        if not active:
            assert all(self.user[index] for index in self.lines.waiting), "one waits, and the line is free"

    def teardown(self) -> None:
        """The user unmasks, the guest handles whatever comes: then nobody is owed anything."""
        if not hasattr(self, "lines"):
            return
        for index in range(COUNT):
            self.unmask(index)
        for _ in range(4 * COUNT):
            if self.lines.active is not None:
                if self.lines.by_access:
                    self.access(acknowledges=True)
                else:
                    self.eoi(self.lines.active)
        assert self.lines.active is None
        assert not self.lines.waiting
        assert not any(self.owed), "an edge was lost"
        assert not any(self.asserted[i] and self.present[i] for i in range(COUNT)), "a level was lost"
        if self.timer_runs:
            self.timer()
        if self.timed:
            assert self.fast


Life.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLife = Life.TestCase
