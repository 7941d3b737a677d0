"""Sockets of the bus: where they listen, and who may come in.

``ipc:PATH`` is a Unix socket of our own making (mode 0600, in a directory that nobody else can enter), handed to
ZeroMQ, which lets in the users the monitor lets in (``ZMQ_IPC_FILTER_UID``). ``tcp:HOST:PORT`` needs CURVE keys: the
server's own pair, and the public keys of the clients that may come in, as ``zmq.auth`` writes them
(``zmq_curve(7)``, RFC 26 and 27 of ZeroMQ).
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, Any, Final

import zmq
from msgspec import Struct, structs

from vfiod.protocol.limits import BUS_HANDSHAKE_MS, BUS_QUEUE
from vfiod.server.monitor.bus_gate import Gate
from vfiod.server.sockets import listener
from vfiod.server.sockets.listener import ListenError

if TYPE_CHECKING:
    from zmq.auth.asyncio import AsyncioAuthenticator

__all__ = ["Address", "BusSocket"]

SHARED_BITS: Final = 0o077
"""Permission bits that would let others into a directory."""


class Address(Struct, frozen=True):
    """Where to listen: a path, or host and port with keys.

    Attributes:
        path: of ``ipc:PATH``.
        host: of ``tcp:HOST:PORT``.
        port: of ``tcp:HOST:PORT``.
        secret_key: the file of the server's pair; with ``tcp`` only.
        client_keys: the directory of the clients' public keys; with ``tcp`` only.
        uids: users let in on ``ipc``, besides root and our own.

    """

    path: str | None = None
    host: str = ""
    port: int = 0
    secret_key: str = ""
    client_keys: str = ""
    uids: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return f"ipc:{self.path}" if self.path is not None else f"tcp:{self.host}:{self.port}"


class BusSocket:
    """One ZeroMQ socket with a context of its own, bound by :meth:`bind`.

    Attributes:
        address: as given; once bound with the port it has got.
        socket: the socket, with high-water marks set.
        gate: keeps its connections few.

    """

    def __init__(self, address: Address, kind: int, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._loop = loop
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.setsockopt(zmq.SNDHWM, BUS_QUEUE)
        self.socket.setsockopt(zmq.RCVHWM, BUS_QUEUE)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, BUS_HANDSHAKE_MS)
        self.gate: Final = Gate(self.socket, self._context, str(address))
        self._authenticator: AsyncioAuthenticator | None = None
        self._file: listener.SocketFile | None = None

    def bind(self) -> None:
        """Listen. Raises ListenError, and then everything is closed."""
        try:
            if self.address.path is not None:
                self._bind_path(self.address.path)
            else:
                self._bind_tcp()
        except (zmq.ZMQError, OSError) as error:
            self.close()
            words = os.strerror(error.errno or 0)
            raise ListenError(f"Cannot listen on '{self.address}': {words}") from error
        except ListenError:
            self.close()
            raise

    def _bind_path(self, path: str) -> None:
        _check_private(path)
        listening = listener.open_path(path)
        try:
            self._file = listener.SocketFile(path)
            self.socket.setsockopt(zmq.USE_FD, listening.fileno())
            for uid in {0, os.geteuid(), *self.address.uids}:
                self.socket.setsockopt(zmq.IPC_FILTER_UID, uid)
            self.gate.place = listening.getsockname()
            self.socket.bind(f"ipc://{path}")
        except BaseException:
            listening.close()
            raise
        listening.detach()  # ZeroMQ closes it

    def _bind_tcp(self) -> None:
        from zmq import auth
        from zmq.auth.asyncio import AsyncioAuthenticator

        try:
            public, secret = auth.load_certificate(self.address.secret_key)
        except (OSError, ValueError) as error:
            raise ListenError(f"Cannot read the key file '{self.address.secret_key}': {error}") from error
        if secret is None:
            raise ListenError(f"The key file '{self.address.secret_key}' has no secret key: give the *.key_secret file")
        if os.stat(self.address.secret_key).st_mode & SHARED_BITS:
            raise ListenError(f"The key file '{self.address.secret_key}' is readable by others: chmod 600 it")
        if not os.path.isdir(self.address.client_keys):
            raise ListenError(f"'{self.address.client_keys}' is no directory: it holds the clients' public keys")
        self._authenticator = AsyncioAuthenticator(self._context, self._loop)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=self.address.client_keys)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.bind(f"tcp://{self.address.host}:{self.address.port}")
        port = int(self.endpoint.rpartition(":")[2])  # port 0 gets a free one
        self.address = structs.replace(self.address, port=port)
        self.gate.place = port

    @property
    def endpoint(self) -> str:
        """Where ZeroMQ says that it listens."""
        return bytes(self.socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def stats(self) -> dict[str, int]:
        """For ``query-stats``."""
        return {"bus-connections": self.gate.connections, "bus-connections-refused": self.gate.refused}

    def close(self, linger_ms: int = 0) -> None:
        """Close it, and remove its file; what waits for peers may take so many milliseconds to leave."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self.gate.close()
        self.socket.close(linger_ms)
        self._context.term()
        if self._file is not None:
            self._file.remove()


def _check_private(path: str) -> None:
    """Raises ListenError: somebody else can enter the directory, and could take the socket's place."""
    directory = os.path.dirname(path) or "."
    found = os.stat(directory)
    if found.st_uid not in (0, os.geteuid()):
        raise ListenError(f"The directory '{directory}' of the bus belongs to uid {found.st_uid}: use one of our own")
    mode = stat.S_IMODE(found.st_mode)
    if mode & SHARED_BITS:
        raise ListenError(
            f"The directory '{directory}' of the bus can be entered by others (mode {mode:04o}): "
            "a bus on ipc: needs one of mode 0700"
        )
