"""The two ends of a hand-over as tables: whatever one of them hears last, exactly one owns everything."""

import itertools

import pytest

from vfiod.server.takeover.conversation import (
    Abort,
    BadHandOver,
    Begin,
    Commit,
    Giver,
    GiverState,
    Hello,
    Message,
    Owned,
    Ready,
    Refuse,
    Taker,
    TakerState,
    Welcome,
    Whole,
    decode_message,
    encode_message,
)

MESSAGES: tuple[Message, ...] = (
    Hello(1, 1, "0.1.0"),
    Welcome("vm", "u", "0.1.0", ["exports"], ["operator"], ["/run/qmp"]),
    Refuse("no"),
    Begin(),
    Whole(10, 2),
    Ready(),
    Commit(),
    Abort("no"),
    Owned(),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_a_message_is_the_same_after_its_way(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("data", [b"", b"{}", b'{"type":"never"}', b'{"type":"whole","size":"x","fds":1}', b"\xff"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(BadHandOver):
        decode_message(data)


def test_the_whole_conversation() -> None:
    giver, taker = Giver(), Taker()
    giver.hear(MESSAGES[0])
    taker.hear(MESSAGES[1])
    taker.say(Begin())
    giver.hear(Begin())
    taker.hear(Whole(10, 2))
    taker.say(Ready())
    giver.hear(Ready())
    assert (giver.owns, taker.state) == (True, TakerState.READY)
    taker.hear(Commit())
    assert taker.state is TakerState.OWNER
    giver.hear(Owned())
    assert not giver.owns


def test_the_giver_owns_it_after_every_sequence_but_the_one() -> None:
    """All that a taker may say, in every order, to the length of a whole conversation."""
    gone = 0
    for said in itertools.product(MESSAGES, repeat=4):
        giver = Giver()
        for message in said:
            try:
                giver.hear(message)
            except BadHandOver:
                break
        gone += not giver.owns
        assert giver.owns is (tuple(map(type, said)) != (Hello, Begin, Ready, Owned))
    assert gone == 1


def test_the_taker_owns_it_by_commit_or_by_a_death_once_it_is_ready() -> None:
    for state in TakerState:
        taker = Taker()
        taker.state = state
        assert taker.giver_died() is (state in (TakerState.READY, TakerState.OWNER))
        for message in MESSAGES:
            taker.state = state
            try:
                taker.hear(message)
            except BadHandOver:
                assert taker.state is state
            if taker.state is TakerState.OWNER and state is not TakerState.OWNER:
                assert (state, type(message)) == (TakerState.READY, Commit)


def test_after_an_end_nothing_is_heard() -> None:
    giver = Giver()
    giver.hear(Refuse("no"))
    assert giver.state is GiverState.ENDED
    for message in MESSAGES:
        with pytest.raises(BadHandOver):
            giver.hear(message)
