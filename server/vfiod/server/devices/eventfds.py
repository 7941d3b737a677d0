"""Eventfds at the rim: vfiod's own, which it reads, and those of others, which it signals.

An eventfd is a counter of the kernel (``eventfd(2)``). vfiod's own never block. One that came from outside may: its
owner chose its flags, and may fill its counter. So it is asked first, every time.
"""

from __future__ import annotations

import logging
import os
import select
from typing import Final

from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel import signalling
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["Consumer", "Foreign", "duplicate", "make", "take", "take_foreign"]

_calls: Final = Syscalls()
_log: Final = logging.getLogger(__name__)

_FULL: Final = (1 << 64) - 2
"""The most a counter holds: ULLONG_MAX - 1 (eventfd(2))."""


def make(what: str) -> FileDescriptor:
    """A new eventfd: counter 0, non-blocking, close-on-exec. OperationFailed (EMFILE) names what it was for."""
    try:
        return FileDescriptor(_calls.eventfd())
    except OSError as error:
        raise OperationFailed(
            "eventfd", what, errno=error.errno or 0, advice="the open-file limit (RLIMIT_NOFILE) may be too low"
        ) from error


def duplicate(fd: FileDescriptor | int, what: str) -> FileDescriptor:
    """A second fd on the same open file. OperationFailed (EMFILE) names what it was for."""
    try:
        return FileDescriptor.duplicate_of(fd if isinstance(fd, int) else fd.number)
    except OSError as error:
        raise OperationFailed(
            "dup", what, errno=error.errno or 0, advice="the open-file limit (RLIMIT_NOFILE) may be too low"
        ) from error


def take(fd: FileDescriptor) -> int:
    """Read one of vfiod's own eventfds and set it to zero; 0 when nothing was there."""
    try:
        return os.eventfd_read(fd.number)
    except BlockingIOError:
        return 0


class Foreign:
    """An eventfd that came from outside, to be read: asked first each time, because reading an empty one might wait.

    Args:
        fd: an eventfd, lent.

    """

    __slots__ = ("_fd", "_readable")

    def __init__(self, fd: FileDescriptor) -> None:
        self._fd = fd
        asked = select.poll()
        asked.register(fd.number, select.POLLIN)
        self._readable = asked.poll

    def take(self) -> int:
        """Read it and set it to zero; 0 when nothing was there."""
        if not self._readable(0):
            return 0
        try:
            return os.eventfd_read(self._fd.number)
        except BlockingIOError:
            return 0


def take_foreign(fd: FileDescriptor) -> int:
    """The same, once: whoever reads one often makes a :class:`Foreign`."""
    return Foreign(fd).take()


class Consumer:
    """An eventfd of somebody else, to be signalled. Owns its duplicate.

    Args:
        fd: an eventfd; the object owns it from here on.

    """

    __slots__ = ("_given_up", "_writable", "fd")

    def __init__(self, fd: FileDescriptor) -> None:
        self.fd = fd
        self._given_up = False
        asked = select.poll()
        asked.register(fd.number, select.POLLOUT)
        self._writable = asked.poll

    def signal(self, count: int) -> None:
        """Add to its counter, without waiting for its owner: one that is full already says all there is to say.

        Who fills it in the moment between the question and the write does so on purpose: he is signalled no more.
        """
        if self._given_up or not self._writable(0):
            return
        if count > 1:
            count = min(count, self._room())
        try:
            signalling.write(self.fd.number, count)
        except BlockingIOError:
            return
        except InterruptedError:
            self._given_up = True
            _log.warning("An eventfd's counter was filled while it was signalled: it is signalled no more")

    def _room(self) -> int:
        """How much the counter can take, at least one; one when the kernel does not tell (proc(5), fdinfo)."""
        try:
            lines = _calls.read_text(f"/proc/self/fdinfo/{self.fd.number}").splitlines()
            counter = next(int(line.split()[1], 16) for line in lines if line.startswith("eventfd-count:"))
        except (OSError, StopIteration):
            return 1
        return max(1, _FULL - counter)
