"""Listening sockets: made safely from a path, or inherited; and the loop that accepts.

A socket file is made in three steps, so that nobody but its owner ever finds it open: bind, set mode and group,
listen. A file left by a server that died is replaced; one that answers is not. Servers that start at once in
one directory take turns by a lock on that directory.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from vfiod.protocol.errors import VfiodError
from vfiod.server.kernel import confinement, open_files

if TYPE_CHECKING:
    import asyncio

__all__ = ["ListenError", "Listener", "SocketFile", "inherit", "open_path"]

_log: Final = logging.getLogger(__name__)

PATH_BYTES: Final = 107
"""Longest path of a Unix socket: ``sun_path`` has 108 bytes with the final NUL (``unix(7)``)."""

NAME_BYTES: Final = 60
"""Longest name of a socket that has not appeared yet; with ``/proc/self/fd/N/`` before it, it stays an address."""

ACCEPTS: Final = 16
"""Connections accepted in one go: then sessions have their turn."""

RETRY_SECONDS: Final = 0.5
"""How long to leave a listening socket alone when no fd is free for another connection."""

OWNER_MODE: Final = 0o600
GROUP_MODE: Final = 0o660


class ListenError(VfiodError):
    """A socket cannot be listened on."""


def open_path(path: str, gid: int | None = None, mode: int | None = None) -> socket.socket:
    """Listen on a new Unix socket at ``path``, mode 0600; with ``gid`` 0660 and that group; or with ``mode``.

    A socket file that nobody listens on any more is replaced. Raises ListenError, naming the path, when somebody
    does, when it is no socket, or when it cannot be made.
    """
    if len(os.fsencode(path)) > PATH_BYTES:
        raise ListenError(f"The socket path '{path}' is too long: at most {PATH_BYTES} bytes are possible")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory_lock(os.path.dirname(path) or "."):
            _remove_dead(path)
            _appear(listening, path, gid, mode)
    except OSError as error:
        listening.close()
        raise ListenError(
            f"Cannot listen on '{path}': {os.strerror(error.errno or 0)}{confinement.advice(error.errno)}"
        ) from error
    except ListenError:
        listening.close()
        raise
    return listening


def _appear(listening: socket.socket, path: str, gid: int | None, mode: int | None) -> None:
    """Bind and listen, and only then let the path appear: who waits for the file may connect as soon as it is there."""
    folder, final = os.path.split(path)
    directory = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".vfiod-{os.getpid()}-{final}"[:NAME_BYTES]
    try:
        if mode is None:
            mode = OWNER_MODE if gid is None else GROUP_MODE
        # The file gets the socket's mode, less the umask. By its name the sandbox lets nothing be changed.
        os.fchmod(listening.fileno(), mode)
        umask = os.umask(0)
        try:
            # By way of /proc the address stays short, however long the directory's name is.
            listening.bind(f"/proc/self/fd/{directory}/{name}")
        finally:
            os.umask(umask)
        try:
            if gid is not None:
                os.chown(name, -1, gid, dir_fd=directory)
            listening.listen(socket.SOMAXCONN)
            # A link, as a rename would replace whatever somebody has put there in the meantime.
            os.link(name, final, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def inherit(number: int) -> socket.socket:
    """Take over an inherited listening Unix stream socket. Raises ListenError, saying what the fd is instead."""
    try:
        listening = socket.socket(fileno=number)
    except OSError as error:
        raise ListenError(f"fd {number} is no inherited socket: {os.strerror(error.errno or 0)}") from error
    wrong = None
    if listening.family != socket.AF_UNIX or listening.type != socket.SOCK_STREAM:
        wrong = "no Unix stream socket"
    elif not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        wrong = "a socket that does not listen"
    if wrong is not None:
        listening.detach()  # not what we were promised: leave it as it is
        raise ListenError(f"fd {number} is {wrong}")
    listening.set_inheritable(False)
    return listening


@contextmanager
def _directory_lock(directory: str) -> Iterator[None]:
    """Keep other servers from making sockets in a directory. No lock (not ours to open) is no reason to fail."""
    try:
        number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _remove_dead(path: str) -> None:
    """Remove the socket file of a server that is gone. Raises ListenError when it is alive or no socket at all."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"Cannot listen on '{path}': it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a live server with a full queue says EAGAIN
        found = probe.connect_ex(path)
    if found == errno.ECONNREFUSED:
        _log.info("Replacing the socket '%s', which nobody listens on", path)
        os.unlink(path)
    elif found == errno.EPERM and confinement.is_confined():
        raise ListenError(
            f"Cannot listen on '{path}': it exists, and the sandbox keeps this server from asking whether somebody "
            "listens there: remove it, or start the server with --allow-connect"
        )
    elif found != errno.ENOENT:
        raise ListenError(f"Cannot listen on '{path}': another program listens there")


class SocketFile:
    """The file of a socket that is ours, as it is now; removed only while it still is that one.

    Attributes:
        path: where it is.

    """

    __slots__ = ("_identity", "path")

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._identity = _identity(path)

    def remove(self) -> None:
        """Remove it. What is not there, is not ours any more or may not be removed stays as it is."""
        with suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


class Listener:
    """Accepts connections on one listening socket, which it owns.

    Args:
        loop: the event loop.
        listening: a listening Unix socket.
        admit: takes each connection, non-blocking, and owns it.

    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listening: socket.socket, admit: Callable[[socket.socket], None]
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._admit = admit
        self._file: SocketFile | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._paused = False
        listening.setblocking(False)
        loop.add_reader(listening.fileno(), self._readable)

    def remove_at_close(self, path: str) -> None:
        """Remove the socket file when this closes, if it is still the one that is there now. OSError: none is."""
        self._file = SocketFile(path)

    @property
    def path(self) -> str | None:
        """The socket file that is ours; None: it was inherited."""
        return None if self._file is None else self._file.path

    @property
    def name(self) -> str:
        """What it listens on, for a person."""
        return self._file.path if self._file is not None else "inherited socket"

    def fileno(self) -> int:
        """The listening fd, lent."""
        return self._listening.fileno()

    def _readable(self) -> None:
        for _ in range(ACCEPTS):
            if self._paused:
                return
            try:
                connection, _address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # EMFILE, ENFILE, ENOMEM: the connection stays in the queue, and the socket stays readable. Leave it
                # alone for a moment, or this would spin.
                self._wait(str(error))
                return
            if open_files.are_scarce((connection.fileno(),)):
                connection.close()
                self._wait("the open files that are left are reserved for the bus")
                return
            connection.setblocking(False)
            try:
                self._admit(connection)
            except OSError as error:  # it could not be asked about, or watched: whoever it was is not kept waiting
                _log.error("Cannot take a connection on %s: %s", self.name, error)
                connection.close()

    def _wait(self, why: str) -> None:
        _log.error("Cannot accept a connection on %s: %s", self.name, why)
        self._loop.remove_reader(self._listening.fileno())
        self._retry = self._loop.call_later(RETRY_SECONDS, self._resume)

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listening.fileno(), self._readable)

    def pause(self) -> None:
        """Leave who comes in the kernel's queue, until :meth:`resume`."""
        self._paused = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._loop.remove_reader(self._listening.fileno())

    def resume(self) -> None:
        """Accept again."""
        self._paused = False
        self._resume()

    def close(self) -> None:
        """Accept nobody any more."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listening.fileno())
        self._listening.close()
        if self._file is not None:
            self._file.remove()
