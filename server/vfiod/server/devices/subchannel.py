"""One subchannel's requests: a state machine as a table, free of I/O. A missing key is the error.

One program at a time. The caller of :class:`Requests` hands a program over (a write that may block, in a thread),
hears the I/O interrupt (an eventfd, on the loop), and reads the IRB; here is decided what each of these means.

=========  =====================================================================================
idle       nothing is pending
starting   the program is being handed over
heard      so, and an interrupt came meanwhile: whose it is shows when the hand-over has returned
waiting    it was accepted, its interrupt has not come
stuck      the time was over before the hand-over returned
=========  =====================================================================================

Whose an interrupt is: each start writes the I/O region with an IRB of zeros. So an IRB without status, read after the
start was accepted, is an echo of an interrupt from before; and whatever has status came after. That is how the late
interrupt of a program that was given up is never taken for the next one's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from vfiod.protocol.channel import Actl, Fctl, Scsw, Stctl

__all__ = ["Action", "Input", "Requests", "State", "kind_of_status"]


class State(enum.Enum):
    """Where the subchannel's request is."""

    IDLE = "idle"
    STARTING = "starting"
    HEARD = "heard"
    WAITING = "waiting"
    STUCK = "stuck"


class Input(enum.Enum):
    """What happens."""

    START = "a program is handed over"
    ACCEPTED = "the hand-over succeeded"
    REFUSED = "the hand-over failed"
    SIGNAL = "the I/O eventfd fired"
    ANSWER = "the IRB answers a function, and the program waits for no more"
    PROGRESS = "the IRB answers a function that goes on"
    UNASKED = "the IRB is the device's own"
    EMPTY = "the IRB has no status"
    TIMEOUT = "the time is over"
    RESET = "the subchannel is as new"
    GONE = "the device went away by itself"


class Action(enum.Enum):
    """What is to be done."""

    WRITE = "write the I/O region, in a thread"
    READ = "read the IRB"
    REPLY = "answer the request with the IRB"
    FAIL = "answer the request with what the hand-over failed with"
    TELL = "send CCW_IO"
    GIVE_UP = "answer the request: time is over"
    ABORT = "answer the request: the subchannel was reset"
    OWE = "note that an interrupt is still to come"


_TABLE: Final[Mapping[tuple[State, Input], tuple[State, tuple[Action, ...]]]] = {
    (State.IDLE, Input.START): (State.STARTING, (Action.WRITE,)),
    (State.IDLE, Input.SIGNAL): (State.IDLE, (Action.READ,)),
    (State.IDLE, Input.ANSWER): (State.IDLE, (Action.TELL,)),
    (State.IDLE, Input.PROGRESS): (State.IDLE, (Action.TELL,)),
    (State.IDLE, Input.UNASKED): (State.IDLE, (Action.TELL,)),
    (State.IDLE, Input.EMPTY): (State.IDLE, ()),
    (State.IDLE, Input.RESET): (State.IDLE, ()),
    (State.STARTING, Input.SIGNAL): (State.HEARD, ()),
    (State.STARTING, Input.ACCEPTED): (State.WAITING, ()),
    (State.STARTING, Input.REFUSED): (State.IDLE, (Action.FAIL,)),
    (State.STARTING, Input.TIMEOUT): (State.STUCK, (Action.GIVE_UP,)),
    (State.HEARD, Input.SIGNAL): (State.HEARD, ()),
    (State.HEARD, Input.ACCEPTED): (State.WAITING, (Action.READ,)),
    (State.HEARD, Input.REFUSED): (State.IDLE, (Action.FAIL, Action.READ)),
    (State.HEARD, Input.TIMEOUT): (State.STUCK, (Action.GIVE_UP,)),
    (State.WAITING, Input.SIGNAL): (State.WAITING, (Action.READ,)),
    (State.WAITING, Input.ANSWER): (State.IDLE, (Action.REPLY,)),
    (State.WAITING, Input.PROGRESS): (State.WAITING, (Action.TELL,)),
    (State.WAITING, Input.UNASKED): (State.WAITING, (Action.TELL,)),
    (State.WAITING, Input.EMPTY): (State.WAITING, ()),
    (State.WAITING, Input.TIMEOUT): (State.IDLE, (Action.GIVE_UP, Action.OWE)),
    (State.WAITING, Input.RESET): (State.IDLE, (Action.ABORT,)),
    (State.STUCK, Input.SIGNAL): (State.STUCK, ()),
    (State.STUCK, Input.ACCEPTED): (State.IDLE, (Action.OWE, Action.READ)),
    (State.STUCK, Input.REFUSED): (State.IDLE, ()),
    # Not handed over yet: it waits for its turn behind the reset.
    (State.STARTING, Input.RESET): (State.STARTING, ()),
    (State.HEARD, Input.RESET): (State.STARTING, ()),
    (State.STUCK, Input.RESET): (State.STUCK, ()),
    # Whoever takes the program has not returned yet: nobody waits for it any more.
    (State.IDLE, Input.GONE): (State.IDLE, ()),
    (State.STARTING, Input.GONE): (State.STUCK, (Action.FAIL,)),
    (State.HEARD, Input.GONE): (State.STUCK, (Action.FAIL,)),
    (State.WAITING, Input.GONE): (State.IDLE, (Action.REPLY,)),
    (State.STUCK, Input.GONE): (State.STUCK, ()),
}

# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_OWE: Final = Action.OWE
_ENDS_FORMER: Final = (Input.RESET, Input.ACCEPTED, Input.GONE)
_ASKED: Final = int(Fctl.HALT | Fctl.CLEAR)
_INTERMEDIATE: Final = int(Stctl.INTERMEDIATE)
_ENDS: Final = int(Stctl.PRIMARY | Stctl.SECONDARY | Stctl.ALERT)
_SUSPENDED: Final = int(Actl.SUSPENDED)


class Requests(Struct, eq=False):
    """The requests of one subchannel.

    Attributes:
        state: see :class:`State`.
        owed: programs given up whose interrupt has not come.

    """

    state: State = State.IDLE
    owed: int = 0

    @property
    def pending(self) -> bool:
        """Whether a program is being handed over, or waits for its interrupt."""
        return self.state is not State.IDLE

    def feed(self, happened: Input) -> tuple[Action, ...]:
        """What is to be done, in order. A KeyError is a defect: this cannot happen in this state."""
        self.state, actions = _TABLE[self.state, happened]
        if _OWE in actions:
            self.owed += 1
        elif happened in _ENDS_FORMER:
            self.owed = 0  # a subchannel that takes a program has ended the one before
        return actions

    def settle(self, scsw: Scsw) -> bool:
        """Whether a status that is told is the late end of a program given up; it is owed no longer then.

        The end of a halt or clear is not: it was asked for, and is in time. But after it no program is left to end.
        """
        if int.__and__(scsw.fctl, _ASKED):
            self.owed = 0
            return False
        if not self.owed or not scsw.solicited:
            return False
        if not scsw.active:
            self.owed -= 1
        return True


def kind_of_status(scsw: Scsw) -> Input:
    """What an SCSW that was read means."""
    if not scsw.pending:
        return Input.EMPTY
    if not scsw.solicited:
        return Input.UNASKED
    # A program-controlled interruption alone: the program runs on. One that suspended itself waits for the guest.
    stctl = int(scsw.stctl)
    if stctl & _INTERMEDIATE and not stctl & _ENDS and not int.__and__(scsw.actl, _SUSPENDED) and not scsw.cc:
        return Input.PROGRESS
    return Input.ANSWER
