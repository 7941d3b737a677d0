"""The block of messages: every way it can go, against an index that behaves in every way it might.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol import vfio
from vfiod.server.interrupts.extended import TRANSITIONS, Act, Answer, Block, BlockRefused, MessageBlock

INDEX = 5
TYPE = vfio.IrqTypeCap(vfio.IrqType.MSI, 0)


def info(*messages: vfio.MsiMessage, index: int = INDEX) -> vfio.IrqInfo:
    flags = vfio.IrqFlags.EVENTFD | vfio.IrqFlags.CAPS
    return vfio.IrqInfo(index, flags, 8, (TYPE, vfio.MsiDescs(messages)) if messages else (TYPE,))


def messages(count: int) -> tuple[vfio.MsiMessage, ...]:
    return tuple(vfio.MsiMessage(0x1000, 32 + at) for at in range(count))


def granted(count: int) -> MessageBlock:
    block = MessageBlock(INDEX, 8)
    assert block.ask(count) is Act.SET
    assert block.done() is Act.READ
    assert block.read(info(*messages(count))) == (Act.NOTHING, "")
    return block


def test_asked_for_read_back_released() -> None:
    block = granted(3)
    assert (block.state, block.messages) == (Block.GRANTED, messages(3))
    assert block.release() is Act.RELEASE
    assert block.done() is Act.NOTHING
    assert (block.state, block.messages) == (Block.FREE, ())
    assert block.release() is Act.NOTHING, "nothing to release is no error"


def test_a_short_host_is_asked_again_for_what_it_has() -> None:
    block = MessageBlock(INDEX, 8)
    block.ask(8)
    assert block.fewer(3) is Act.SET
    assert (block.wanted, block.done()) == (3, Act.READ)
    block.read(info(*messages(3)))
    assert len(block.messages) == 3


@pytest.mark.parametrize("told", [None, 0, 8, 9])
def test_a_short_host_that_does_not_say_what_it_has(told: int | None) -> None:
    block = MessageBlock(INDEX, 8)
    block.ask(8)
    assert block.fewer(told) is Act.NOTHING
    assert block.state is Block.FREE


def test_fewer_messages_than_eventfds_are_what_was_granted() -> None:
    block = MessageBlock(INDEX, 8)
    block.ask(4)
    block.done()
    block.read(info(*messages(2)))
    assert (len(block.messages), block.wanted) == (2, 2)


def test_more_messages_than_eventfds_are_not_reported() -> None:
    block = MessageBlock(INDEX, 8)
    block.ask(2)
    block.done()
    block.read(info(*messages(6)))
    assert block.messages == messages(2)


@pytest.mark.parametrize("useless", [(), messages(1) * 2])
def test_useless_messages_release_the_block(useless: tuple[vfio.MsiMessage, ...]) -> None:
    block = MessageBlock(INDEX, 8)
    block.ask(2)
    block.done()
    act, why = block.read(info(*useless))
    assert act is Act.RELEASE and why
    block.done()
    assert (block.state, block.messages) == (Block.FREE, ())


def test_a_granted_block_cannot_grow_and_its_eventfds_can_change() -> None:
    block = granted(3)
    with pytest.raises(BlockRefused, match="does not grow"):
        block.ask(4)
    assert (block.state, block.messages) == (Block.GRANTED, messages(3)), "refused, nothing has changed"
    assert block.ask(2) is Act.SET
    assert block.done() is Act.NOTHING
    assert (block.state, block.messages) == (Block.GRANTED, messages(3))


def test_a_failure_in_the_middle_undoes_the_block() -> None:
    block = granted(3)
    block.ask(3)
    assert block.failed() is Act.RELEASE
    assert block.done() is Act.NOTHING
    assert (block.state, block.messages) == (Block.FREE, ())


@pytest.mark.parametrize("count", [0, 9, -1])
def test_a_number_that_it_does_not_have(count: int) -> None:
    with pytest.raises(BlockRefused, match="has 8 messages"):
        MessageBlock(INDEX, 8).ask(count)


def test_what_comes_out_of_turn_is_refused() -> None:
    block = MessageBlock(INDEX, 8)
    for call in (block.done, block.failed, lambda: block.read(info(*messages(1)))):
        with pytest.raises(BlockRefused):
            call()
    block.ask(1)
    with pytest.raises(BlockRefused):
        block.ask(1)
    with pytest.raises(BlockRefused):
        block.release()


def test_every_state_can_be_left() -> None:
    left = {state for state, _ in TRANSITIONS}
    reached = {state for state, _ in TRANSITIONS.values()}
    assert left == reached == set(Block)
    assert {answer for _, answer in TRANSITIONS} == set(Answer)


# --- against any host -----------------------------------------------------------------------------------


class Host:
    """An index that has ``has`` messages, tells ``tells`` of them, and fails at the calls in ``failing``."""

    def __init__(self, has: int, tells: int, failing: set[int]) -> None:
        self.has, self.tells, self.failing = has, tells, failing
        self.calls = 0
        self.held = 0

    def carry_out(self, block: MessageBlock, act: Act) -> None:
        while act is not Act.NOTHING:
            self.calls += 1
            assert self.calls < 100, "it does not end"
            if self.calls in self.failing:
                if act is Act.RELEASE or block.state is Block.REBINDING:
                    self.held = 0
                act = block.failed()
            elif act is Act.SET and not self.held and block.wanted > self.has:
                act = block.fewer(self.has or None)
            elif act is Act.SET:
                self.held = self.held or block.wanted
                act = block.done()
            elif act is Act.READ:
                act, _ = block.read(info(*messages(min(self.held, self.tells))))
            else:
                self.held = 0
                act = block.done()


@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.sets(st.integers(1, 20)),
    st.lists(st.one_of(st.integers(1, 8), st.none()), max_size=8),
)
def test_it_always_rests_with_what_the_host_holds(
    has: int, tells: int, failing: set[int], wishes: list[int | None]
) -> None:
    """After every call it is free or granted; free holds nothing at the host, granted has messages of what it holds."""
    block, host = MessageBlock(INDEX, 8), Host(has, tells, failing)
    for wish in wishes:
        try:
            act = block.release() if wish is None else block.ask(wish)
        except BlockRefused:
            assert block.state is Block.GRANTED and wish is not None and wish > len(block.messages)
            continue
        host.carry_out(block, act)
        assert block.state in (Block.FREE, Block.GRANTED)
        if block.state is Block.FREE:
            assert (host.held, block.messages) == (0, ())
        else:
            assert 1 <= len(block.messages) <= min(host.held, tells)
