"""Writing to the eventfd of somebody else, without waiting for him.

Its owner may have made it blocking, and shares the counter: whoever asks first whether there is room (``poll``) may
find it filled when he writes, and would wait for as long as the owner likes. There is no write to an eventfd that never
waits (``pwritev2`` with RWF_NOWAIT gives EOPNOTSUPP, and it cannot be opened again). But a wait can be interrupted: a
thread looks from time to time whether a write is still the same, and sends its thread a signal then (:data:`SIGNAL`,
which does nothing but that). It sleeps while nothing is signalled.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from types import FrameType
from typing import Final

__all__ = ["SIGNAL", "interruptible", "write"]

SIGNAL: Final = signal.SIGURG
"""Ignored where nobody has asked for it, and used by nothing else here."""

PERIOD_S: Final = 0.05
"""Seconds between two looks: a write that has not ended in one to two of them waits for its owner."""

QUIET: Final = 20
"""Looks without a write after which the thread sleeps."""

_serials: Final = itertools.count()
_inside: Final[dict[int, int]] = {}
"""Who is writing: thread, and which of all writes it is."""

_wake: Final = threading.Event()
_starting: Final = threading.Lock()
_rescuer: threading.Thread | None = None
_awake = False


def interruptible() -> None:
    """Let :data:`SIGNAL` interrupt. In the main thread, once; without it a write may wait."""
    signal.signal(SIGNAL, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python starts no interrupted call again whose result says that it was."""


def write(number: int, count: int) -> None:
    """Add to a counter. Raises BlockingIOError: it has no room; InterruptedError: nor had it when it had to wait."""
    me = threading.get_ident()
    _inside[me] = next(_serials)
    if not _awake:
        _rouse()
    try:
        os.eventfd_write(number, count)
    finally:
        del _inside[me]


def _rouse() -> None:
    global _awake, _rescuer
    with _starting:
        if _rescuer is None:
            _rescuer = threading.Thread(target=_watch, name="vfiod-signalling", daemon=True)
            _rescuer.start()
    _awake = True
    _wake.set()


def _watch() -> None:
    global _awake
    before: dict[int, int] = {}
    quiet = 0
    while True:
        _wake.wait()
        time.sleep(PERIOD_S)
        now = dict(_inside)
        for thread, serial in now.items():
            if before.get(thread) == serial:
                signal.pthread_kill(thread, SIGNAL)
        quiet = 0 if now else quiet + 1
        before = now
        if quiet > QUIET:
            quiet = 0
            _wake.clear()
            _awake = False
            if _inside:  # somebody came who still saw us awake
                _awake = True
                _wake.set()
