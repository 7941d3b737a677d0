"""Signals that are held, and let in: each is really sent, to this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from vfiod.client.signals import held, let_in


class TermError(Exception):
    pass


def term(number: int, frame: object) -> None:
    raise TermError


@pytest.fixture(autouse=True)
def raising() -> Iterator[None]:
    """As in a program: Ctrl-C raises KeyboardInterrupt, and SIGTERM something; afterwards all is as it was."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: term}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    found = {number: signal.signal(number, handler) for number, handler in former.items()}
    assert found == handlers


def test_it_comes_when_the_block_ends() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("made")
    assert done == ["made"]


def test_what_was_made_is_known_to_who_takes_it_back() -> None:
    made = None
    try:
        with held():
            signal.raise_signal(signal.SIGTERM)
            made = "directory"
        pytest.fail("it has to come at the end")
    except TermError:
        assert made == "directory"


def test_blocks_in_blocks() -> None:
    done: list[str] = []
    with pytest.raises(TermError), held():
        with held():
            signal.raise_signal(signal.SIGTERM)
        done.append("the outer one holds it still")
    assert len(done) == 1


def test_it_is_let_in() -> None:
    done: list[str] = []
    with held():
        with pytest.raises(KeyboardInterrupt), let_in():
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TermError), let_in():
            done.append("not reached: one was waiting")
        with let_in():
            with pytest.raises(KeyboardInterrupt), held():
                signal.raise_signal(signal.SIGINT)
                done.append("held again")
            done.append("and came at its end")
    assert done == ["held again", "and came at its end"]


def test_it_may_end_with_another_error() -> None:
    """Both are told: the signal is what counts, and the error its context."""
    with pytest.raises(KeyboardInterrupt) as caught, held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_one_without_a_handler_is_left_alone() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_let_in_where_nobody_holds() -> None:
    with pytest.raises(KeyboardInterrupt), let_in():
        signal.raise_signal(signal.SIGINT)


def test_other_threads_have_no_signals_to_hold() -> None:
    done: list[str] = []

    def work() -> None:
        with held(), let_in():
            done.append(str(signal.getsignal(signal.SIGTERM) is term))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["True"]
