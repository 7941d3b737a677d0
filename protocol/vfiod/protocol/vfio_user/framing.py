"""Bytes and fds of a Unix stream socket, cut into whole vfio-user messages.

A message is complete, its fds included, before anybody acts on it; a handler can never leave the stream out of step.

Which fds belong to which message: Linux never lets one ``recvmsg`` read beyond data that fds came with
(``unix_stream_read_generic``), so the fds of a read belong to its *last* data: to the last message that begins in
it, or, when none begins, to the one that goes on. Senders attach fds to the first byte of a message (QEMU,
libvfio-user, rust-vmm's ``vfio_user``: header and fds in one ``sendmsg``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import VFIO_USER_MAX_FDS, VFIO_USER_MAX_MESSAGE
from vfiod.protocol.vfio_user.header import HEADER_SIZE, Header

__all__ = ["FrameError", "Framer", "Message"]


class Message(Struct, frozen=True, eq=False):
    """One whole message.

    Attributes:
        header: its header; its size is that of header and body.
        body: what follows the header.
        fds: what came with it. The receiver owns them: take them out of the list, or :meth:`close` it.

    """

    header: Header
    body: bytes
    fds: list[FileDescriptor]

    def close(self) -> None:
        """Close the fds nobody took."""
        close_all(self.fds)
        self.fds.clear()


class FrameError(Struct, frozen=True):
    """What arrived is no message.

    Attributes:
        desc: what was wrong.
        errno: the errno's name, for the reply, if there can be one.
        header: the header it is about; None: there was none, or it is not to be answered.
        fatal: nothing after it can be understood: the connection must end.

    """

    desc: str
    errno: str
    header: Header | None
    fatal: bool


class Framer:
    """One direction of one connection.

    Args:
        max_message: bytes of one message, header included; more is fatal.
        max_fds: fds of one message; a message with more is refused, its fds are closed, and the stream goes on.

    """

    def __init__(self, *, max_message: int = VFIO_USER_MAX_MESSAGE, max_fds: int = VFIO_USER_MAX_FDS) -> None:
        self._max_message: Final = max_message
        self._max_fds: Final = max_fds
        self._buffer = bytearray()
        self._header: Header | None = None  # of the message that is coming in
        self._fds: list[FileDescriptor] = []  # of the message that is coming in
        self._surplus = 0  # fds of it that were closed because they were too many
        self._broken = False

    @property
    def broken(self) -> bool:
        """Whether a fatal error was found: everything that comes after it is dropped, and its fds are closed."""
        return self._broken

    @property
    def pending(self) -> int:
        """Bytes of a message that has not come whole; not 0 at the end of a stream: it was cut short."""
        return len(self._buffer)

    def receive_data(self, data: bytes, fds: Sequence[FileDescriptor] = ()) -> list[Message | FrameError]:
        """Take what one ``recvmsg`` returned. Owns the fds from here on; raises nothing.

        Args:
            data: the bytes, any number of them.
            fds: all fds of the same call, in order.

        """
        if self._broken:
            close_all(fds)
            return []
        out: list[Message | FrameError] = []
        buffer = self._buffer
        buffer += data
        position = 0
        while True:
            header = self._header
            if header is None:
                if len(buffer) - position < HEADER_SIZE:
                    break
                header = Header.unpack(memoryview(buffer)[position : position + HEADER_SIZE])
                problem = self._look(header)
                if problem is not None:
                    out.append(self._break(problem, fds))
                    return out
                self._header = header
            end = position + header.size
            if len(buffer) < end:
                break
            # Is this the last message that begins in this data? Then the fds are its own.
            if fds and end == len(buffer):
                self._take(fds)
                fds = ()
            out.append(self._complete(header, bytes(memoryview(buffer)[position + HEADER_SIZE : end])))
            position = end
        if position:
            del buffer[:position]
        if fds:
            # They came with the beginning, or in the middle, of a message that has not come whole.
            self._take(fds)
        return out

    def keep(self) -> tuple[bytes, list[FileDescriptor]]:
        """What has come of a message that is not whole; the fds are lent."""
        return bytes(self._buffer), list(self._fds)

    def adopt(self, data: bytes, fds: list[FileDescriptor]) -> None:
        """Begin where another framer stood (:meth:`keep`). Owns the fds from here on."""
        self._buffer += data
        self._fds += fds
        if len(data) >= HEADER_SIZE:
            self._header = Header.unpack(memoryview(data)[:HEADER_SIZE])

    def close(self) -> None:
        """Drop what has not come whole, and close its fds. Nothing is received afterwards."""
        self._broken = True
        self._reset()

    # --- inside ---
    def _look(self, header: Header) -> FrameError | None:
        if header.size < HEADER_SIZE:
            desc = f"{header.title} says it has {header.size} bytes, its header alone has {HEADER_SIZE}"
            return FrameError(desc, "EINVAL", header, fatal=True)
        if header.size > self._max_message:
            desc = f"{header.title} says it has {header.size} bytes, at most {self._max_message} are taken"
            return FrameError(desc, "E2BIG", header, fatal=True)
        if not header.is_request and not header.is_reply:
            desc = f"{header.title} is neither a command nor a reply: its flags are 0x{header.flags:x}"
            return FrameError(desc, "EINVAL", None, fatal=True)
        return None

    def _take(self, fds: Sequence[FileDescriptor]) -> None:
        room = self._max_fds - len(self._fds)
        if self._surplus or len(fds) > room:
            # A few of them would be worse than none: positions would mean something else.
            self._surplus += len(self._fds) + len(fds)
            close_all(self._fds)
            self._fds.clear()
            close_all(fds)
            return
        self._fds.extend(fds)

    def _complete(self, header: Header, body: bytes) -> Message | FrameError:
        fds, self._fds = self._fds, []
        surplus, self._surplus = self._surplus, 0
        self._header = None
        if surplus:
            desc = f"{header.title} came with {surplus} fds, at most {self._max_fds} are taken"
            return FrameError(desc, "EINVAL", header, fatal=False)
        return Message(header, body, fds)

    def _break(self, error: FrameError, fds: Sequence[FileDescriptor]) -> FrameError:
        close_all(fds)
        self._broken = True
        self._reset()
        return error

    def _reset(self) -> None:
        close_all(self._fds)
        self._fds.clear()
        self._surplus = 0
        self._buffer.clear()
        self._header = None
