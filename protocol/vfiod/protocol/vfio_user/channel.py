"""One socket between two sides, as a state machine: bytes in, requests and replies out. No I/O, no waiting.

The same class is either side: a channel *accepts* some commands and sends others. A server's accepts
``ASKED_OF_SERVER``, a client's ``ASKED_OF_CLIENT``, or nothing when the server's requests have a twin socket, which
then has a channel of its own (:meth:`Channel.twin`).

::

    owner ── receive(data, fds) ──► [Request | Reply | Failure | Rejected | Broken]
    owner ◄─ Outgoing ── reply(request, payload) │ refuse(request, errno) │ request(payload)

The owner sends every :class:`Outgoing` whole and in order, with its fds on the first byte.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from vfiod.protocol.errors import errno_name
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import VFIO_USER_MAX_FDS, VFIO_USER_MAX_MESSAGE, VFIO_USER_MAX_PENDING
from vfiod.protocol.vfio_user.framing import FrameError, Framer, Message
from vfiod.protocol.vfio_user.header import HEADER_SIZE, BadMessage, Command, Flags, Header, MessageType
from vfiod.protocol.vfio_user.messages import ASKED_OF_CLIENT, ASKED_OF_SERVER, COMMAND_OF, MESSAGES
from vfiod.protocol.vfio_user.payload import SPECIFIED, Payload, Wire

__all__ = ["Broken", "Channel", "Failure", "Happening", "Outgoing", "Rejected", "Reply", "Request", "errno_number"]

_ERROR_REPLY: Final = MessageType.REPLY | Flags.ERROR
# Found once: finding an Enum's member takes Python 3.11 its time, and these are asked with every message.
_REPLY: Final = int(MessageType.REPLY)
_VERSION: Final = Command.VERSION


class Outgoing(Struct, frozen=True, eq=False):
    """A message to send: all its bytes, the fds with the first of them.

    Attributes:
        data: header and body.
        fds: numbers, lent until they are sent.

    """

    data: bytes
    fds: tuple[int, ...] = ()


class Request(Struct, frozen=True, eq=False):
    """The peer asks for something. Answer it with :meth:`Channel.reply` or :meth:`Channel.refuse`.

    Attributes:
        header: as it came.
        command: what.
        payload: the body, checked for itself; whether regions, interrupts and addresses exist is the owner's to check.
        fds: what came along. The owner takes them, or closes the request.

    """

    header: Header
    command: Command
    payload: Payload
    fds: list[FileDescriptor]

    @property
    def no_reply(self) -> bool:
        """No reply is wanted, not even an error."""
        return self.header.no_reply

    def close(self) -> None:
        """Close the fds nobody took."""
        close_all(self.fds)
        self.fds.clear()


class Reply(Struct, frozen=True, eq=False):
    """The peer did what ``id`` asked for."""

    id: int
    command: Command
    payload: Payload
    fds: list[FileDescriptor]

    def close(self) -> None:
        """Close the fds nobody took."""
        close_all(self.fds)
        self.fds.clear()


class Failure(Struct, frozen=True, eq=False):
    """The peer refused what ``id`` asked for, or answered with nonsense.

    Attributes:
        id: of the request.
        command: its command.
        errno: the errno's name; ``EPROTO`` for nonsense, ``EIO`` when the peer gave none.
        desc: what was wrong with the reply; empty when the peer simply refused.

    """

    id: int
    command: Command
    errno: str
    desc: str = ""


class Rejected(Struct, frozen=True, eq=False):
    """Something came that cannot be used; its fds are closed. The stream goes on.

    Attributes:
        desc: what and why.
        outgoing: the error reply to send; None: it was a reply, or wanted none.

    """

    desc: str
    outgoing: Outgoing | None = None


class Broken(Struct, frozen=True, eq=False):
    """Nothing more can be understood: send ``outgoing`` if there is one, and end the connection."""

    desc: str
    outgoing: Outgoing | None = None


Happening = Request | Reply | Failure | Rejected | Broken


def errno_number(errno: str | int | None) -> int:
    """The number for the wire; EIO for a name the platform does not have."""
    if isinstance(errno, int):
        return errno
    return int(getattr(_errno, errno or "EIO", _errno.EIO))


class Channel:
    """One socket.

    Args:
        accepts: the commands the peer may send. ``ASKED_OF_SERVER`` makes it a server's, in which VERSION is the first.
        max_fds: fds of one message we take.

    """

    def __init__(self, accepts: frozenset[Command], *, max_fds: int = VFIO_USER_MAX_FDS) -> None:
        self._accepts = accepts
        self._framer: Final = Framer(max_message=VFIO_USER_MAX_MESSAGE, max_fds=max_fds)
        self._awaits_version = Command.VERSION in accepts
        self._ended = False
        self._pending: dict[int, Command | None] = {}  # by id; None: nobody waits for it any more
        self._next_id = 0
        self.wire: Wire = SPECIFIED
        """What was agreed on. The owner sets it after the handshake."""

    @classmethod
    def server(cls, *, max_fds: int = VFIO_USER_MAX_FDS) -> Channel:
        """The server's end of the main socket."""
        return cls(ASKED_OF_SERVER, max_fds=max_fds)

    @classmethod
    def client(cls, *, max_fds: int = VFIO_USER_MAX_FDS) -> Channel:
        """The client's end of the main socket."""
        return cls(ASKED_OF_CLIENT, max_fds=max_fds)

    def twin(self) -> Channel:
        """This side's end of the twin socket, on which only the server asks."""
        other = Channel(self._accepts & ASKED_OF_CLIENT)
        other.wire = self.wire
        return other

    def accept_nothing(self) -> None:
        """The peer's requests have a twin socket: here it may only answer from now on."""
        self._accepts = frozenset()

    # --- receiving ---
    def receive(self, data: bytes, fds: Sequence[FileDescriptor] = ()) -> list[Happening]:
        """Take what one ``recvmsg`` returned, and own the fds. Raises nothing; after Broken nothing comes any more."""
        happenings: list[Happening] = []
        for message in self._framer.receive_data(data, fds):
            if self._ended:
                # It came in the same data as what has ended the connection.
                if isinstance(message, Message):
                    message.close()
                continue
            happening = self._frame_error(message) if isinstance(message, FrameError) else self._message(message)
            if happening is not None:
                happenings.append(happening)
            if isinstance(happening, Broken):
                self._ended = True
                self._framer.close()
        return happenings

    @property
    def cut_short(self) -> int:
        """Bytes of a message that has not come whole: not 0 when the peer hung up in the middle of one."""
        return self._framer.pending

    def close(self) -> None:
        """Drop what has not come whole, and close its fds."""
        self._framer.close()

    # --- over a change of the process ---
    def keep(self) -> tuple[bytes, list[FileDescriptor]]:
        """What has come of a message that is not whole; the fds are lent."""
        return self._framer.keep()

    def adopt(self, wire: Wire | None, data: bytes, fds: list[FileDescriptor], *, next_id: int = 0) -> None:
        """Begin where another process's channel stood, between two requests. Owns the fds from here on.

        Args:
            wire: what was agreed on; None: VERSION has not come.
            data: what has come of the next message.
            fds: what came with that.
            next_id: of the next request of ours (:attr:`next_id`).

        """
        self._next_id = next_id
        if wire is not None:
            self.wire = wire
            self._awaits_version = False
        self._framer.adopt(data, fds)

    # --- sending ---
    def request(
        self, payload: Payload, fds: Sequence[int] = (), *, command: Command | None = None, no_reply: bool = False
    ) -> tuple[int, Outgoing]:
        """Ask the peer for something.

        Args:
            payload: the body.
            fds: numbers, lent until sent.
            command: needed for a body of its own kind alone (DEVICE_RESET).
            no_reply: do it, and say nothing.

        Returns:
            The request's id, with which its Reply or Failure comes, and what to send.

        Raises:
            BadMessage: ENOBUFS: too many requests wait for replies.

        """
        if command is None:
            command = COMMAND_OF[type(payload)]
        id = self._free_id()
        if not no_reply:
            self._pending[id] = command
        body = payload.pack(self.wire)
        header = Header(id, command, HEADER_SIZE + len(body), Flags.NO_REPLY if no_reply else 0)
        return id, Outgoing(header.pack() + body, tuple(fds))

    def forget(self, id: int) -> None:
        """Nobody waits for this reply any more: it is dropped when it comes, its fds closed."""
        if id in self._pending:
            self._pending[id] = None

    def waiting(self) -> tuple[int, ...]:
        """Ids whose reply has not come and somebody waits for."""
        return tuple(id for id, command in self._pending.items() if command is not None)

    @property
    def next_id(self) -> int:
        """The id of our next request, unless one is still out with it."""
        return self._next_id

    @property
    def unanswered(self) -> int:
        """Requests of ours whose reply has not come, whether or not anybody waits for it."""
        return len(self._pending)

    def reply(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> Outgoing | None:
        """Answer a request: None when none is wanted. ``payload`` None: a header alone."""
        header = request.header
        if header.no_reply:
            return None
        body = b"" if payload is None else payload.pack(self.wire)
        out = Header(header.id, header.command, HEADER_SIZE + len(body), _REPLY)
        return Outgoing(out.pack() + body, tuple(fds))

    def refuse(self, request: Request, errno: str | int) -> Outgoing | None:
        """Answer that it failed: None when no answer is wanted."""
        return self._refusal(request.header, errno)

    # --- inside ---
    def _free_id(self) -> int:
        pending = self._pending
        if len(pending) >= VFIO_USER_MAX_PENDING:
            raise BadMessage(f"{len(pending)} requests wait for replies of the peer", "ENOBUFS")
        id = self._next_id
        while id in pending:
            id = (id + 1) & 0xFFFF
        self._next_id = (id + 1) & 0xFFFF
        return id

    @staticmethod
    def _refusal(header: Header, errno: str | int) -> Outgoing | None:
        if header.no_reply:
            return None
        return Outgoing(Header(header.id, header.command, HEADER_SIZE, _ERROR_REPLY, errno_number(errno)).pack())

    def _frame_error(self, error: FrameError) -> Happening | None:
        header = error.header
        if error.fatal:
            answer = self._refusal(header, error.errno) if header is not None and header.is_request else None
            return Broken(error.desc, answer)
        if header is None:
            return Rejected(error.desc)
        if header.is_reply:
            waiting = self._pending.pop(header.id, None)
            return Rejected(error.desc) if waiting is None else Failure(header.id, waiting, "EPROTO", error.desc)
        return self._bad(header, error.desc, error.errno)

    def _message(self, message: Message) -> Happening | None:
        happening = self._reply_came(message) if message.header.is_reply else self._request_came(message)
        if not isinstance(happening, Request | Reply):
            message.close()
        return happening

    def _request_came(self, message: Message) -> Happening:
        header = message.header
        command = header.known
        if self._awaits_version:
            if command is not _VERSION:
                return Broken(f"{header.title} before VERSION", self._refusal(header, "EINVAL"))
        elif command is _VERSION:
            return self._reject(header, "VERSION came twice", "EINVAL")
        if command is None:
            return self._reject(header, f"{header.title} is not known here", "ENOSYS")
        if command not in self._accepts:
            return self._reject(header, f"{header.title} is not for this side", "ENOSYS")
        kind = MESSAGES[command]
        if 0 <= kind.request_fds < len(message.fds):
            desc = f"{header.title} came with {len(message.fds)} fds, it takes {kind.request_fds or 'none'}"
            return self._bad(header, desc, "EINVAL")
        try:
            payload = kind.request.unpack(message.body, self.wire)
        except BadMessage as error:
            return self._bad(header, str(error), error.errno)
        self._awaits_version = False
        return Request(header, command, payload, message.fds)

    def _bad(self, header: Header, desc: str, errno: str) -> Happening:
        """A request that cannot be used; without a handshake there is no connection."""
        if self._awaits_version:
            return Broken(desc, self._refusal(header, errno))
        return self._reject(header, desc, errno)

    def _reject(self, header: Header, desc: str, errno: str) -> Rejected:
        return Rejected(desc, self._refusal(header, errno))

    def _reply_came(self, message: Message) -> Happening | None:
        header = message.header
        if header.id not in self._pending:
            return Rejected(f"A reply to {header.title} came, which was not asked")
        command = self._pending.pop(header.id)
        if command is None:
            return None  # too late: nobody waits
        if header.command != command:
            return Failure(header.id, command, "EPROTO", f"the reply to {command.name} is one to {header.title}")
        if header.is_error:
            return Failure(header.id, command, errno_name(header.error) if header.error else "EIO")
        kind = MESSAGES[command]
        if 0 <= kind.reply_fds < len(message.fds):
            return Failure(header.id, command, "EPROTO", f"the reply came with {len(message.fds)} fds")
        try:
            payload = kind.reply.unpack(message.body, self.wire)
        except BadMessage as error:
            return Failure(header.id, command, "EPROTO", str(error))
        return Reply(header.id, command, payload, message.fds)
