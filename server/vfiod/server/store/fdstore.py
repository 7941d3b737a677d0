"""The conversation with whoever keeps our fds: ``sd_notify(3)``, and what came back from the last time.

One datagram stores fds under a name, one removes all of a name; both are in the receiver's queue when ``send`` returns,
and stay there when we die. A store has each open file once: a second fd of the same file is thrown away
(``service_add_fd_store`` in systemd's ``src/core/service.c``), which is why :mod:`vfiod.server.store.current` looks.
fds come back from number 3 on, named in ``LISTEN_FDNAMES``, behind the sockets of a socket unit (``sd_listen_fds(3)``).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Final

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.fd import SCM_RIGHTS, SOL_SOCKET, FileDescriptor

__all__ = ["PREFIX", "FdStore", "StoreError", "inherited"]

PREFIX: Final = "vfiod-"
"""What the names of our fds begin with."""

FDS_PER_MESSAGE: Final = 200
"""fds of one datagram: the kernel takes 253 (SCM_MAX_FD)."""

PATIENCE_SECONDS: Final = 10.0
"""How long the store may take to empty its queue before it is given up: systemd reads it before anything else."""

_FIRST: Final = 3
"""SD_LISTEN_FDS_START."""


class StoreError(VfiodError):
    """The store does not take what it is told."""


class FdStore:
    """The store, by a connected datagram socket, lent: :class:`~vfiod.server.notify.Notifier` owns it.

    Args:
        notifier: the socket.
        unit: the control group that is its keeper's unit: it follows no process outside, and ends all inside before it
            starts a new server (systemd). None: it is ``vfiod keeper``, which follows any, and is told whom to end.

    """

    def __init__(self, notifier: socket.socket, unit: str | None) -> None:
        self._socket = notifier
        self.unit: Final = unit

    def store(self, name: str, fds: Sequence[int]) -> None:
        """Keep duplicates of these fds, whatever becomes of us. Raises StoreError."""
        for first in range(0, len(fds), FDS_PER_MESSAGE):
            # FDPOLL=0: a device fd or a socket that says "hang-up" is not to be thrown away.
            self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fds[first : first + FDS_PER_MESSAGE])

    def remove(self, names: Iterable[str]) -> None:
        """Close all of these names. It has been done after the next :meth:`barrier`. Raises StoreError."""
        for name in names:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    @property
    def number(self) -> int:
        """The socket's number, lent."""
        return self._socket.fileno()

    def announce(self, pid: int) -> None:
        """This process will have all of ours, and owns nothing: it is ended before a next server begins. StoreError."""
        if self.unit is None:
            self._send(f"X_VFIOD_TAKER={pid}")

    def follow(self, pid: int) -> None:
        """From now on the process to be watched, and started again, is this one, and its word counts. StoreError."""
        self._send(f"MAINPID={pid}")

    def barrier(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until everything said so far was done (``sd_notify_barrier(3)``). Blocks. Raises StoreError."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._send("BARRIER=1", [writing])
            finally:
                os.close(writing)
            poll = select.poll()
            poll.register(reading, 0)  # the hang-up comes unasked
            if not poll.poll(seconds * 1000):
                raise StoreError(f"The store of fds has not answered within {seconds:g} s")
        finally:
            os.close(reading)

    def _send(self, text: str, fds: Sequence[int] = ()) -> None:
        rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self._socket.sendmsg([text.encode()], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not _room(self._socket, deadline - time.monotonic()):
                    raise StoreError(f"The store of fds has not read within {PATIENCE_SECONDS:g} s") from None
            except OSError as error:
                raise StoreError(f"The store of fds cannot be told: {os.strerror(error.errno or 0)}") from error
            else:
                return


def _room(sock: socket.socket, seconds: float) -> bool:
    """Wait until its peer has read something; False: it has not."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def inherited(environment: dict[str, str] | os._Environ[str], pid: int) -> dict[str, list[FileDescriptor]]:
    """Our fds that came with the process, by name; owned. Those of others (a socket unit's) are left alone.

    ``LISTEN_PID``, ``LISTEN_FDS`` and ``LISTEN_FDNAMES`` are taken out of the environment: nobody takes them twice.

    Args:
        environment: of the process.
        pid: ours: what is meant for another process is left alone.

    """
    meant, count, names = (environment.get(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
    if meant != str(pid) or not count.isdecimal():
        return {}
    found: dict[str, list[FileDescriptor]] = {}
    for number, name in zip(range(_FIRST, _FIRST + int(count)), names.split(":"), strict=False):
        os.set_inheritable(number, False)
        if name.startswith(PREFIX):
            found.setdefault(name, []).append(FileDescriptor(number))
    for key in ("PID", "FDS", "FDNAMES"):
        environment.pop(f"LISTEN_{key}", None)
    return found
