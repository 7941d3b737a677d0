"""Messages, bytes and fds of a hand-over on a blocking Unix socket."""

from __future__ import annotations

import socket
import struct
import time
from typing import Final

from vfiod.protocol.fd import FileDescriptor, close_all, rights_of
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE, MAX_STATE_BYTES, MAX_STATE_FDS
from vfiod.server.takeover.conversation import BadHandOver, Message, Whole, decode_message, encode_message

__all__ = ["AGAIN_S", "HEADER", "Ended", "Wire", "check_whole", "message_size", "packed"]

HEADER: Final = struct.Struct(">I")
"""Bytes of the JSON text that follows."""

MAX_TEXT: Final = 1 << 20
"""Bytes of one message; the state itself is none."""

AGAIN_S: Final = 0.01
"""Seconds until the kernel is asked again what it could not say for want of memory."""

_FD_SPACE: Final = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * 4)


class Ended(BadHandOver):
    """The other end has hung up, or is dead."""


def packed(message: Message) -> bytes:
    """A message as it is sent."""
    text = encode_message(message)
    return HEADER.pack(len(text)) + text


def message_size(header: bytes) -> int:
    """Bytes of the text after a header. Raises BadHandOver."""
    size: int = HEADER.unpack(header)[0]
    if size > MAX_TEXT:
        raise BadHandOver(f"A message of {size} bytes was announced, at most {MAX_TEXT} are taken")
    return size


def check_whole(whole: Whole) -> None:
    """Raises BadHandOver: more than is taken."""
    if not 0 <= whole.size <= MAX_STATE_BYTES or not 0 <= whole.fds <= MAX_STATE_FDS:
        raise BadHandOver(
            f"A state of {whole.size} bytes and {whole.fds} fds was announced, at most {MAX_STATE_BYTES} and "
            f"{MAX_STATE_FDS} are taken"
        )


class Wire:
    """One end. Every method blocks, for at most the socket's timeout (TimeoutError).

    Args:
        connection: connected; lent.

    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, message: Message) -> None:
        """Raises Ended."""
        try:
            self._socket.sendall(packed(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Ended("The other end is gone") from error

    def receive(self, *, to_the_end: bool = False) -> Message:
        """Raises BadHandOver; Ended; OSError.

        Args:
            to_the_end: what the kernel may say for a while (ENOMEM) is no answer: only the other end's word is one, or
                that it is gone.

        """
        size = message_size(self._exactly(HEADER.size, to_the_end))
        return decode_message(self._exactly(size, to_the_end))

    def send_whole(self, data: bytes, fds: list[int]) -> None:
        """The state and its fds, as :class:`Whole` has announced them. Raises Ended, OSError."""
        try:
            self._socket.sendall(data)
            # A byte for each load of fds: they go with it, and no read goes beyond it.
            for first in range(0, len(fds), MAX_FDS_PER_MESSAGE):
                load = fds[first : first + MAX_FDS_PER_MESSAGE]
                rights = struct.pack(f"={len(load)}i", *load)
                self._socket.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Ended("The other end is gone") from error

    def receive_whole(self, whole: Whole) -> tuple[bytes, list[FileDescriptor]]:
        """What was announced; the caller owns the fds. Raises BadHandOver, Ended; then none is left open."""
        check_whole(whole)
        data = self._exactly(whole.size)
        fds: list[FileDescriptor] = []
        try:
            while len(fds) < whole.fds:
                fds += self._load()
            if len(fds) > whole.fds:
                close_all(fds[whole.fds :])  # as many as were announced is what the state counts
                del fds[whole.fds :]
        except BaseException:
            close_all(fds)
            raise
        return data, fds

    def _load(self) -> list[FileDescriptor]:
        """One load of fds, with its byte."""
        byte, ancillary, flags, _ = self._socket.recvmsg(1, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        came = rights_of(ancillary)
        if byte and came and not flags & socket.MSG_CTRUNC:
            return came
        close_all(came)
        if not byte:
            raise Ended("The other end is gone")
        raise BadHandOver("fds were lost on arrival: raise the limit of open files (RLIMIT_NOFILE)")

    def _exactly(self, size: int, to_the_end: bool = False) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(min(size - len(parts), 1 << 20))
            except ConnectionResetError as error:
                raise Ended("The other end is gone") from error
            except OSError:
                if not to_the_end:
                    raise
                time.sleep(AGAIN_S)
                continue
            if not part:
                raise Ended("The other end is gone")
            parts += part
        return bytes(parts)
