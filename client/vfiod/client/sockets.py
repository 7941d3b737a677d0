"""The rim: bytes and fds through a Unix socket, without blocking. Both skins stand on it."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from typing import Final

from vfiod.client.connection import Outgoing
from vfiod.client.errors import ConnectFailed
from vfiod.protocol.errors import errno_name
from vfiod.protocol.fd import FD_BYTES, MSG_CMSG_CLOEXEC, MSG_CTRUNC, FileDescriptor, rights_of
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, READ_CHUNK

__all__ = ["adopt", "connect_failed", "new_socket", "path_of", "receive", "send"]

ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * FD_BYTES)
ADVICE: Final = {
    errno.ENOENT: "there is no such socket; start the server with 'vfiod serve --name VM --qmp unix:PATH'",
    errno.ECONNREFUSED: "the socket is there, but nobody listens: the server has ended",
    errno.EACCES: "this user may not open the socket; --socket-group or --allow-uid let others in",
    errno.EPERM: "this user may not open the socket; --socket-group or --allow-uid let others in",
    errno.ENOTSOCK: "this is not a socket",
    errno.EPROTOTYPE: "this is not a stream socket",
    errno.EAGAIN: "the server is not accepting; it may be overloaded",
    errno.ENAMETOOLONG: "a Unix socket's path has at most 107 bytes",
}


def new_socket() -> socket.socket:
    """A Unix stream socket that never blocks."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def adopt(sock: socket.socket) -> socket.socket:
    """An existing, connected socket, made to never block. Raises ConnectFailed when it is not a Unix stream socket."""
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ConnectFailed(f"A connected Unix stream socket is needed, got {sock!r}")
    sock.setblocking(False)
    return sock


def path_of(where: str | os.PathLike[str]) -> str:
    """A socket's path; ``unix:PATH``, as the server's options name it, is the same."""
    return os.fspath(where).removeprefix("unix:")


def connect_failed(path: str | os.PathLike[str], error: OSError) -> ConnectFailed:
    """What went wrong, and what to do about it."""
    if error.errno is None:  # CPython: "AF_UNIX path too long"
        return ConnectFailed(f"Cannot connect to {os.fspath(path)}: ENAMETOOLONG: {ADVICE[errno.ENAMETOOLONG]}")
    advice = ADVICE.get(error.errno)
    return ConnectFailed(
        f"Cannot connect to {os.fspath(path)}: {errno_name(error.errno)}" + (f": {advice}" if advice else "")
    )


def receive(sock: socket.socket) -> tuple[bytes, list[FileDescriptor], bool]:
    """One read: bytes, the fds that came, and whether the kernel had to drop some. No bytes: the end.

    Raises OSError; BlockingIOError when there is nothing.
    """
    data, ancillary, flags, _ = sock.recvmsg(READ_CHUNK, ANCILLARY, MSG_CMSG_CLOEXEC)
    fds = rights_of(ancillary)
    return data, fds, bool(flags & MSG_CTRUNC)


def send(sock: socket.socket, waiting: deque[Outgoing]) -> bool:
    """Send what the socket takes. True when all of it went; what did not stays in the queue.

    fds go with the first byte of their message, and our duplicates of them are closed then. Raises OSError.
    """
    while waiting:
        out = waiting[0]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, out.rights())] if out.fds else []
        try:
            sent = sock.sendmsg([out.data], rights)
        except BlockingIOError:
            return False
        out.close()
        del out.data[:sent]
        if not out.data:
            waiting.popleft()
    return True
