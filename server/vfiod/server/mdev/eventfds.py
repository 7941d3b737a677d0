"""Eventfds that a stranger gave: signalled and drained without ever waiting for him.

The other end shares the counter, and the file's flags. A full counter makes a blocking ``write`` wait, an empty one a
blocking ``read``; the kernel's own ``eventfd_signal`` never waits, and neither may a device.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Iterable
from typing import Final

from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.kernel import signalling
from vfiod.server.kernel.kinds import kind_of

__all__ = ["EventFd", "drain", "open_all"]

_log: Final = logging.getLogger(__name__)


class EventFd:
    """A duplicate of an eventfd that was lent, to be signalled (``eventfd_ctx`` of the kernel).

    Args:
        number: the lent fd.

    Raises OSError: EBADF, EMFILE; EINVAL when it is no eventfd, as ``eventfd_ctx_fdget`` says.

    """

    __slots__ = ("_fd", "_given_up", "_poll")

    def __init__(self, number: int) -> None:
        self._fd = duplicate(number)
        self._given_up = False
        self._poll = select.poll()
        self._poll.register(self._fd.number, select.POLLOUT)

    @classmethod
    def of(cls, fd: FileDescriptor) -> EventFd:
        """One that is ours already: it is taken over."""
        made = cls(fd.number)
        fd.close()
        return made

    @property
    def fd(self) -> FileDescriptor:
        """The duplicate, lent."""
        return self._fd

    @property
    def number(self) -> int:
        """The duplicate's number, lent; -1 once it is closed."""
        return -1 if self._fd.closed else self._fd.number

    def signal(self) -> None:
        """Add one. A counter that is full stays full: its reader will wake anyway."""
        # Asked first because a full blocking eventfd would hold the loop. Who fills it between the two calls does so
        # on purpose, and is signalled no more.
        if not self._given_up and self._poll.poll(0):
            try:
                signalling.write(self._fd.number, 1)
            except BlockingIOError:
                return
            except InterruptedError:
                self._given_up = True
                _log.warning("An eventfd's counter was filled while it was signalled: it is signalled no more")

    def close(self) -> None:
        """Let go of it. Later calls do nothing."""
        self._fd.close()


def duplicate(number: int) -> FileDescriptor:
    """A duplicate of a lent eventfd. Raises OSError: EBADF, EMFILE; EINVAL when it is no eventfd."""
    if number < 0:
        raise OSError(errno.EBADF, f"{number} is no file descriptor")
    fd = FileDescriptor.duplicate_of(number)
    kind = kind_of(fd.number)
    if kind is not FdKind.EVENTFD:
        fd.close()
        raise OSError(errno.EINVAL, f"an eventfd is expected, got a {kind}")
    return fd


def drain(number: int) -> bool:
    """Take the counter of an eventfd down to zero; whether it was above."""
    try:
        # Not eventfd_read: that waits when somebody else was faster and the file is a blocking one.
        return os.preadv(number, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False


def open_all(numbers: Iterable[int]) -> list[EventFd | None]:
    """Duplicates of lent eventfds, None where the number is negative; all of them, or OSError and none."""
    fresh: list[EventFd | None] = []
    try:
        for number in numbers:
            fresh.append(EventFd(number) if number >= 0 else None)
    except OSError:
        for trigger in fresh:
            if trigger is not None:
                trigger.close()
        raise
    return fresh
