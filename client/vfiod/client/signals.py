"""Ctrl-C comes where it may: not between a thing that was made and the note that it has to be taken back.

Python's handlers of signals raise between any two instructions: between the making of a directory and the ``try`` that
removes it, even inside ``tempfile``'s own look at ``/tmp``. What is made in :func:`held` is made whole: a signal that
comes meanwhile is handled at the end of it. In what may take long, :func:`let_in` lets it through again::

    with held():
        directory = mkdtemp()
        process = Popen(...)
        with let_in():
            connect_and_wait()

Handlers run in the main thread; elsewhere, neither does anything.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

__all__ = ["held", "let_in"]

HELD: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those for which programs raise. One without a handler of Python's ends the process, and is not touched."""

Handler = Callable[[int, FrameType | None], object]

_former: dict[int, Handler] = {}
_open: list[bool] = []
"""One for each block that we are in, the innermost last: whether it lets signals in."""

_waiting: list[int] = []


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals that come in this block are handled when it ends, each kind once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _open:
        _install()
    _open.append(False)  # last: what raises before has changed nothing, and from here nothing does
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            _uninstall()
        _deliver()


@contextlib.contextmanager
def let_in() -> Iterator[None]:
    """In this block, and at its beginning, signals raise as they do where nobody holds them."""
    if threading.current_thread() is not threading.main_thread() or not _open:
        yield
        return
    depth = len(_open)
    try:
        _open.append(True)
        _deliver()
        yield
    finally:
        del _open[depth:]


def _arrived(number: int, frame: FrameType | None) -> None:
    if not _open or _open[-1]:
        _former[number](number, frame)
    elif number not in _waiting:
        _waiting.append(number)


def _install() -> None:
    for number in HELD:
        handler = signal.getsignal(number)
        if handler is not _arrived and callable(handler):
            _former[number] = handler
            signal.signal(number, _arrived)


def _uninstall() -> None:
    # When a signal raises in the middle of this, the others go on to call the former handler.
    for number, handler in _former.items():
        if signal.getsignal(number) is _arrived:
            signal.signal(number, handler)


def _deliver() -> None:
    while _waiting and (not _open or _open[-1]):
        signal.raise_signal(_waiting.pop(0))
