"""The other end of a serial port: a pseudo-terminal, or a Unix socket. Nothing here waits.

``pty``              a pseudo-terminal; its path is an attribute of the device
``pty:LINK``         the same, with a symbolic link to it
``socket:PATH``      a Unix socket that one program at a time connects to; it is the modem's carrier
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel import confinement
from vfiod.server.mdev.parent import Host, Saved, Watch

__all__ = ["Line", "PtyLine", "SocketLine", "open_line", "take_line"]

CHUNK: Final = 4096
"""Bytes written at most at once; a port has 16."""


class Line:
    """One end of a line, as a port sees it. Its callbacks come on the loop's thread.

    Args:
        host: watches its fds.
        ready: called when something can be read or written.
        carrier: called when somebody comes (True) or goes (False).

    Attributes:
        path: where the other end is.

    """

    path = ""

    def __init__(self, host: Host, ready: Callable[[], None], carrier: Callable[[bool], None]) -> None:
        self._host = host
        self._ready = ready
        self._carrier = carrier
        self._fd: FileDescriptor | None = None  # the watch's
        self._number = -1
        self._watch: Watch | None = None

    @property
    def connected(self) -> bool:
        """Whether there is somebody to send to."""
        return self._watch is not None

    def read(self, most: int) -> bytes:
        """At most so many bytes; empty: there are none now."""
        try:
            data = os.read(self._number, most) if self._watch is not None else b""
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data and self._watch is not None:
            self._lost()
        return data

    def write(self, data: bytes) -> int:
        """How many bytes the line took. Nobody there: all of them, as any line that leads nowhere."""
        if self._watch is None:
            return len(data)
        try:
            return os.write(self._number, data[:CHUNK])
        except BlockingIOError:
            return 0
        except OSError:
            self._lost()
            return len(data)

    def want(self, *, readable: bool, writable: bool) -> None:
        """What to be called back for. Not asked for, nothing wakes vfiod: there is no busy waiting for a full port."""
        if self._watch is not None:
            self._watch.want(readable=readable, writable=writable)

    def save(self) -> Saved:
        """Its ends, lent, for another process (:func:`take_line`). What nobody has read yet waits in them."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything. Later calls do nothing."""
        watch, self._watch, self._fd = self._watch, None, None
        if watch is not None:
            watch.cancel()

    def _take(self, fd: FileDescriptor) -> None:
        os.set_blocking(fd.number, False)
        self._number, self._fd = fd.number, fd
        self._watch = self._host.watch(fd, self._ready)
        self._watch.want(readable=False, writable=False)

    def _lost(self) -> None:
        Line.close(self)
        self._carrier(False)


class PtyLine(Line):
    """A pseudo-terminal.

    Its terminal side is kept open here: without, the master side hangs up whenever the last program leaves, and says
    so without end. What nobody reads waits in the kernel's buffer (4 KiB); then the port's transmitter is full.
    """

    def __init__(
        self,
        host: Host,
        ready: Callable[[], None],
        carrier: Callable[[bool], None],
        ends: tuple[FileDescriptor, FileDescriptor],
        path: str,
        link: Path | None,
    ) -> None:
        super().__init__(host, ready, carrier)
        master, self._slave = ends
        self.path = path
        self._link = link
        self._take(master)

    @classmethod
    def open(
        cls, host: Host, ready: Callable[[], None], carrier: Callable[[bool], None], link: str | None = None
    ) -> PtyLine:
        """A new one. OSError: there is no pseudo-terminal left, or the link cannot be made."""
        numbers = os.openpty()
        with contextlib.ExitStack() as undo:
            master, slave = (undo.enter_context(FileDescriptor(number)) for number in numbers)
            tty.setraw(slave.number)  # neither echo nor line editing: every byte as it is
            path = os.ttyname(slave.number)
            made = None if link is None else Path(link)
            if made is not None:
                made.symlink_to(path)
            undo.pop_all()
        return cls(host, ready, carrier, (master, slave), path, made)

    def save(self) -> Saved:
        """Both sides."""
        fds = {"terminal": self._slave}
        if self._fd is not None:
            fds["master"] = self._fd
        return Saved({"path": self.path, "link": None if self._link is None else str(self._link)}, fds)

    def close(self) -> None:
        """The link goes, if it is still the one that was made."""
        super().close()
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(OSError):
                if str(link.readlink()) == self.path:
                    link.unlink()
        self._slave.close()


class SocketLine(Line):
    """A Unix socket to connect to, mode 0600. One at a time; the next one waits until the first has gone."""

    def __init__(
        self,
        host: Host,
        ready: Callable[[], None],
        carrier: Callable[[bool], None],
        door: FileDescriptor,
        path: str,
        inode: int,
    ) -> None:
        super().__init__(host, ready, carrier)
        self.path = path
        self._listener = socket.socket(fileno=door.duplicate().give_away())
        self._inode = inode
        self._made = threading.Lock()
        with self._made:  # somebody may connect before this is over, and it is called back on the loop
            self._door = door
            self._listening = host.watch(door, self._accept)

    @classmethod
    def open(cls, host: Host, ready: Callable[[], None], carrier: Callable[[bool], None], path: str) -> SocketLine:
        """A new one. OSError: something is at that path, or it cannot be made there."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
            os.fchmod(listener.fileno(), 0o600)  # before bind: the file is made with it
            listener.bind(path)
            inode = os.lstat(path).st_ino
            listener.listen(1)
            door = FileDescriptor.duplicate_of(listener.fileno())
        return cls(host, ready, carrier, door, path, inode)

    def save(self) -> Saved:
        """The listening socket, and the one who is there."""
        fds = {"listener": self._door}
        if self._fd is not None:
            fds["peer"] = self._fd
        return Saved({"path": self.path, "inode": self._inode}, fds)

    def resume(self, peer: FileDescriptor) -> None:
        """Another process had this one at the line: he is still there, and others wait until he has gone."""
        self._listening.want(readable=False, writable=False)
        self._take(peer)

    def _accept(self) -> None:
        with self._made:
            listening = self._listening
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        listening.want(readable=False, writable=False)
        self._take(FileDescriptor(peer.detach()))
        self._carrier(True)

    def _lost(self) -> None:
        super()._lost()
        self._listening.want(readable=True, writable=False)

    def close(self) -> None:
        """The path goes, if it is still this socket's."""
        super().close()
        self._listening.cancel()
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def open_line(name: str, text: object, host: Host, ready: Callable[[], None], carrier: Callable[[bool], None]) -> Line:
    """The line that a parameter describes. Raises OSError: EINVAL names the parameter; what opening it says."""
    expected = f'\'{name}\' is "pty", "pty:LINK" or "socket:PATH" with absolute paths, got {text!r:.200}'
    if not isinstance(text, str):
        raise OSError(errno.EINVAL, expected)
    kind, colon, path = text.partition(":")
    if "\0" in path or (colon and not path.startswith("/")) or kind not in ("pty", "socket" if colon else "pty"):
        raise OSError(errno.EINVAL, expected)
    try:
        if kind == "socket":
            return SocketLine.open(host, ready, carrier, path)
        return PtyLine.open(host, ready, carrier, path if colon else None)
    except OSError as error:
        why = f"{error.strerror or error}{confinement.advice(error.errno)}"
        raise OSError(error.errno or errno.EIO, f"'{name}': {text}: {why}") from error


def take_line(saved: Saved, host: Host, ready: Callable[[], None], carrier: Callable[[bool], None]) -> Line:
    """The line that another process saved; nothing is read from it or written to it, and nobody is called back.

    The fds are taken over. KeyError, OSError: they are not a line's.
    """
    values, fds = saved.values, saved.fds
    if "listener" not in fds:
        link = None if values["link"] is None else Path(values["link"])
        return PtyLine(host, ready, carrier, (fds["master"], fds["terminal"]), values["path"], link)
    line = SocketLine(host, ready, carrier, fds["listener"], values["path"], values["inode"])
    if "peer" in fds:
        line.resume(fds["peer"])
    return line
