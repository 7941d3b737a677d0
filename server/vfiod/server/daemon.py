"""``--daemonize``: the server goes on in the background, and who started it is told how that began.

It is an orphan before it says anything to anybody: the child of whoever looks after orphans. Under systemd that is
systemd, which is told of the end of no others: so a server that took the place of another, started by ``ExecReload=``,
is looked after as the first one was. One that became an orphan later could die with its parent, and systemd would take
that for an orderly end.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import Self

from vfiod.protocol.fd import FileDescriptor

__all__ = ["Daemon"]


class Daemon:
    """The server's process. The constructor returns there alone; where it was called, it waits.

    It ends with status 0 as soon as the server is :meth:`ready`, and with 1 when that has ended sooner: what was wrong
    is on its standard error, which both have.
    """

    def __init__(self) -> None:
        ready, self._ready = _pipe()
        alone, parted = _pipe()
        between = os.fork()
        if between:
            self._ready.close()
            alone.close()
            os.waitpid(between, 0)
            parted.close()
            os._exit(0 if os.read(ready.number, 1) else 1)
        if os.fork():
            os._exit(0)
        ready.close()
        parted.close()
        with alone:
            os.read(alone.number, 1)  # its end: who was between has gone, and we are an orphan

    def ready(self) -> None:
        """It serves: who started it may go on."""
        with contextlib.suppress(BrokenPipeError):  # somebody has ended that one
            os.write(self._ready.number, b"+")
        self._ready.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ready.close()


def _pipe() -> tuple[FileDescriptor, FileDescriptor]:
    """To read from, and to write to."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    return FileDescriptor(reading), FileDescriptor(writing)
