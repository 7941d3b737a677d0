"""The state machine of a subchannel's requests, without any I/O.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import pytest

from vfiod.protocol.channel import Actl, Fctl, Scsw, Stctl
from vfiod.server.devices.subchannel import Action, Input, Requests, State, kind_of_status

PENDING = Stctl.STATUS_PENDING
ENDED = Scsw(fctl=Fctl.START, stctl=PENDING | Stctl.PRIMARY | Stctl.SECONDARY)


def feed(requests: Requests, *happened: Input) -> list[Action]:
    return [action for one in happened for action in requests.feed(one)]


def test_a_request() -> None:
    requests = Requests()
    assert feed(requests, Input.START) == [Action.WRITE]
    assert feed(requests, Input.ACCEPTED) == []
    assert feed(requests, Input.SIGNAL) == [Action.READ]
    assert feed(requests, Input.ANSWER) == [Action.REPLY]
    assert requests.state is State.IDLE


def test_an_interrupt_that_is_faster_than_the_hand_over() -> None:
    requests = Requests()
    assert feed(requests, Input.START, Input.SIGNAL, Input.SIGNAL) == [Action.WRITE]
    assert feed(requests, Input.ACCEPTED) == [Action.READ]
    assert feed(requests, Input.ANSWER) == [Action.REPLY]


def test_a_late_interrupt_is_not_the_next_requests() -> None:
    requests = Requests()
    assert feed(requests, Input.START, Input.ACCEPTED, Input.TIMEOUT) == [Action.WRITE, Action.GIVE_UP, Action.OWE]
    assert requests.owed == 1
    # The next program is taken just when the old one ends: its signal is an echo, the IRB was zeroed by the start.
    assert feed(requests, Input.START, Input.SIGNAL, Input.ACCEPTED) == [Action.WRITE, Action.READ]
    assert feed(requests, Input.EMPTY) == []
    assert (requests.state, requests.owed) == (State.WAITING, 0)
    assert feed(requests, Input.SIGNAL, Input.ANSWER) == [Action.READ, Action.REPLY]


def test_a_late_interrupt_is_told_as_such() -> None:
    requests = Requests()
    feed(requests, Input.START, Input.ACCEPTED, Input.TIMEOUT)
    assert not requests.settle(Scsw(stctl=PENDING | Stctl.ALERT))
    assert requests.settle(ENDED)
    assert not requests.settle(ENDED)


def test_a_busy_subchannel_still_owes() -> None:
    requests = Requests()
    feed(requests, Input.START, Input.ACCEPTED, Input.TIMEOUT)
    assert feed(requests, Input.START, Input.REFUSED) == [Action.WRITE, Action.FAIL]
    assert requests.owed == 1
    feed(requests, Input.RESET)
    assert requests.owed == 0


def test_a_hand_over_that_hangs() -> None:
    requests = Requests()
    assert feed(requests, Input.START, Input.TIMEOUT) == [Action.WRITE, Action.GIVE_UP]
    assert (requests.state, feed(requests, Input.SIGNAL)) == (State.STUCK, [])
    assert feed(requests, Input.ACCEPTED) == [Action.OWE, Action.READ]
    assert requests.state is State.IDLE
    feed(requests, Input.START, Input.SIGNAL, Input.TIMEOUT, Input.REFUSED)
    assert requests.state is State.IDLE


def test_what_the_device_says_on_its_own() -> None:
    requests = Requests()
    assert feed(requests, Input.SIGNAL, Input.UNASKED) == [Action.READ, Action.TELL]
    feed(requests, Input.START, Input.ACCEPTED)
    assert feed(requests, Input.SIGNAL, Input.UNASKED, Input.PROGRESS) == [Action.READ, Action.TELL, Action.TELL]
    assert feed(requests, Input.RESET) == [Action.ABORT]


def test_what_cannot_be_is_a_defect() -> None:
    for state, happened in ((State.IDLE, Input.ACCEPTED), (State.WAITING, Input.START), (State.STARTING, Input.ANSWER)):
        with pytest.raises(KeyError):
            Requests(state).feed(happened)


def test_kinds_of_status() -> None:
    cases = {
        Scsw(): Input.EMPTY,
        ENDED: Input.ANSWER,
        Scsw(stctl=PENDING | Stctl.ALERT): Input.UNASKED,
        Scsw(stctl=PENDING): Input.ANSWER,
        Scsw(cc=1, stctl=PENDING | Stctl.ALERT): Input.ANSWER,
        Scsw(stctl=PENDING | Stctl.INTERMEDIATE, actl=Actl.SUBCHANNEL_ACTIVE): Input.PROGRESS,
        Scsw(stctl=PENDING | Stctl.INTERMEDIATE, actl=Actl.SUSPENDED): Input.ANSWER,
        Scsw(stctl=PENDING | Stctl.PRIMARY, actl=Actl.DEVICE_ACTIVE): Input.ANSWER,
    }
    assert {scsw: kind_of_status(scsw) for scsw in cases} == cases


def test_the_end_of_a_clear_is_not_late() -> None:
    requests = Requests()
    feed(requests, Input.START, Input.ACCEPTED, Input.TIMEOUT)
    for function in (Fctl.CLEAR, Fctl.HALT, Fctl.START | Fctl.HALT):
        requests.owed = 1
        assert not requests.settle(Scsw(fctl=function, stctl=PENDING))
        assert requests.owed == 0  # nothing is left that could end


def test_a_device_that_goes() -> None:
    answers = {
        (): [],
        (Input.START,): [Action.FAIL],
        (Input.START, Input.SIGNAL): [Action.FAIL],
        (Input.START, Input.ACCEPTED): [Action.REPLY],
        (Input.START, Input.TIMEOUT): [],
    }
    for before, then in answers.items():
        requests = Requests()
        feed(requests, *before)
        assert feed(requests, Input.GONE) == then
        # Whoever took the program may return after all, and nobody is answered twice.
        if requests.state is State.STUCK:
            assert feed(requests, Input.REFUSED) == []
        assert (requests.state, requests.owed) == (State.IDLE, 0)
