"""Who may come in: the kernel says who is at the other end of a Unix socket, and nobody else is believed.

``SO_PEERCRED`` (``unix(7)``) gives the peer's process and user as they were when it connected. Allowed are the
superuser, the server's own user, and the users named by ``--allow-uid``.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from msgspec import Struct

__all__ = ["DEFAULT_OVERFLOW_UID", "Access", "Peer", "overflow_uid", "peer_of"]

DEFAULT_OVERFLOW_UID: Final = 65534
"""The kernel's default, should /proc be absent (``include/linux/highuid.h``)."""

_UCRED: Final = struct.Struct("iII")  # struct ucred, <sys/socket.h>: pid, uid, gid


class Peer(Struct, frozen=True):
    """Who is at the other end: process (0 when it lives in another pid namespace) and user."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who connected."""
    pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


def overflow_uid(path: str | os.PathLike[str] = "/proc/sys/kernel/overflowuid") -> int:
    """The uid that stands for every user this namespace has no number for. Nobody may be trusted by it."""
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return DEFAULT_OVERFLOW_UID


class Access:
    """Decides on a peer.

    Args:
        allowed: further users, by ``--allow-uid``.
        own: the server's user.
        overflow: never let in: it may be anybody.

    """

    __slots__ = ("_uids",)

    def __init__(self, allowed: frozenset[int] = frozenset(), *, own: int | None = None, overflow: int | None = None):
        own = os.geteuid() if own is None else own
        overflow = overflow_uid() if overflow is None else overflow
        self._uids: Final = (frozenset({0, own}) | allowed) - {overflow}

    def refusal(self, peer: Peer, door: str = "monitor") -> str | None:
        """None when the peer may come in by this door, else the sentence to tell it."""
        if peer.uid in self._uids:
            return None
        return f"User {peer.uid} may not use this {door}: start the server with --allow-uid {peer.uid} to allow it"
