"""``--daemonize``: the server goes on in the background, and who started it is told how that began.

Its parent ends, so it becomes the child of whoever looks after orphans. Under systemd that is systemd, which is told of
the end of no others: so a server that took the place of another, started by ``ExecReload=``, is looked after as the
first one was.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import Self

from vfiod.protocol.fd import FileDescriptor

__all__ = ["Daemon"]


class Daemon:
    """The child; its parent waits in the constructor, which does not return there.

    The parent ends with 0 as soon as the child is :meth:`ready`, and with 1 when that has ended sooner: what was wrong
    is on its standard error, which both have.
    """

    def __init__(self) -> None:
        reading, writing = (FileDescriptor(number) for number in os.pipe2(os.O_CLOEXEC))
        if os.fork():
            writing.close()
            # It is not waited for: its end is the news of who looks after orphans.
            os._exit(0 if os.read(reading.number, 1) else 1)
        reading.close()
        self._parent = writing

    def ready(self) -> None:
        """It serves: the parent may end."""
        with contextlib.suppress(BrokenPipeError):  # somebody has ended it
            os.write(self._parent.number, b"+")
        self._parent.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.close()
