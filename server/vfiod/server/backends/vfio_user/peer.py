"""A vfio-user server over time: connecting, losing it, finding it again with everything as it was.

::

    CONNECTED ── lost ──► LOST ── reconnect-ms ──► connects, looks, compares, replays ──► CONNECTED   DEVICE_RECONNECTED
        │                  │  ▲                              │ refused, or nobody there
        │                  │  └──────────────────────────────┘
        │                  │                                 └ another device: ──► ANOTHER   DEVICE_ERROR
        └── close ─────────┴──► CLOSED

What a server is told that must outlive it is kept here: mappings of guest memory, what was written to configuration
space (BARs, command register, capabilities), and armed interrupts; given again in this order. Everything else
(registers, memory, what the device was at) was the server's, and is lost with it unless it keeps it.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final

from msgspec.structs import replace

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.devices import DeviceError, DeviceReconnected
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import VFIO_USER_PATIENCE
from vfiod.protocol.vfio_user import (
    Agreement,
    BadMessage,
    Command,
    DmaData,
    DmaFlags,
    DmaMap,
    DmaRead,
    DmaWrite,
    DmaWritten,
    Payload,
    RegionWrite,
    Reply,
    Request,
    TwinSocket,
    Version,
    agree,
    split_irqs,
)
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.vfio_user.armed import Armed
from vfiod.server.backends.vfio_user.facts import Facts, look
from vfiod.server.backends.vfio_user.kept_config import KeptConfig, Read
from vfiod.server.backends.vfio_user.link import Link
from vfiod.server.mdev.parent import DmaFault
from vfiod.server.mdev.space import Translation
from vfiod.server.onloop import OnLoop

__all__ = ["Peer"]

PROPOSED: Final = Version(capabilities=replace(vfio_user.OURS, twin_socket=TwinSocket(True)))
"""What vfiod says of itself to a server."""


class _State(enum.Enum):
    CONNECTED = "connected"
    LOST = "lost"
    ANOTHER = "another device answers"
    CLOSED = "closed"


class Peer:
    """The server of one device.

    Args:
        connect: gives a connected socket; blocks. Raises OperationFailed.
        what: the server, for messages.
        user: the device's id or path, for events.
        path: of its socket; None: it was passed.
        on_loop: the machine's loop.
        executor: the machine's threads.
        emit: sends an event; on the loop.
        timeout_ms: how long a reply may take, in milliseconds.
        reconnect_ms: how long after a loss, and after each attempt, it is tried to connect again; 0: never.

    It is of use after :meth:`open`; or when it has got all that another process knew of the server
    (:mod:`~vfiod.server.backends.vfio_user.keeping`).

    Attributes:
        facts: what it says of its device.
        when_lost: called on the loop with the reason each time the server is lost.
        when_back: called on the loop each time it is found again, with the indexes of the regions whose memory is
            another file now: who has mapped the former one sees nothing of the device any more.

    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        what: str,
        user: str,
        *,
        path: str | None,
        on_loop: OnLoop,
        executor: Executor,
        emit: Callable[[EventData], None],
        timeout_ms: int,
        reconnect_ms: int,
    ) -> None:
        self.what = what
        self.user = user
        self.path = path
        self.translation: Final = Translation()
        self.on_loop = on_loop
        self.when_lost: Callable[[str], None] | None = None
        self.when_back: Callable[[Sequence[int]], None] | None = None
        self._connect = connect
        self._executor = executor
        self._emit = emit
        self._timeout_ms = timeout_ms
        self._reconnect_ms = reconnect_ms
        self._armed = Armed()
        self._mappings: dict[int, Mapping] = {}  # by address
        self._config = KeptConfig()
        self._told = ""  # why it was not found again, the last time that was said
        # Held while the connection is made again, and while what is kept changes: neither sees the other half done.
        self._keeping = threading.RLock()
        self._state = _State.LOST
        self._reason = "it is not connected"
        self._making: Link | None = None  # a connection that is not usable yet
        self._again_begun = False  # a worker tries to connect again
        self._link: Link | None = None  # the last one; None: another process had it
        self._agreement: Agreement
        self.facts: Facts

    def open(self) -> None:
        """Connect, shake hands, look. Blocks; once. Raises OperationFailed, and leaves nothing open then."""
        self._link, self._agreement, self.facts = self._opened()
        self._state = _State.CONNECTED
        self._watch(self._link)

    # --- asking ---------------------------------------------------------------------------------------------

    @property
    def agreement(self) -> Agreement:
        """What was agreed on."""
        return self._agreement

    def ask(self, payload: Payload, fds: Sequence[int] = (), *, command: Command | None = None) -> Reply:
        """See :meth:`Link.ask`. On the loop it would stop everything: RuntimeError, a defect of vfiod's own."""
        if self.on_loop.here:
            raise RuntimeError(f"{self.what} was to be waited for on the event loop: {type(payload).__name__}")
        return self._live(payload).ask(payload, fds, command=command)

    def post(self, payload: Payload) -> None:
        """Ask without waiting; a refusal becomes ``DEVICE_ERROR``."""
        self._live(payload).post(payload, lambda error: self._tell(str(error)))

    def _live(self, payload: Payload) -> Link:
        return self.check_there(f"VFIO_USER_{vfio_user.COMMAND_OF.get(type(payload), Command.DEVICE_RESET).name}")

    def check_there(self, operation: str) -> Link:
        """The connection. OperationFailed, ENOTCONN: there is none of use."""
        link = self._connected
        if link is None:
            raise OperationFailed(operation, self.what, errno="ENOTCONN", advice=self._reason)
        return link

    @property
    def _connected(self) -> Link | None:
        """The connection; None: there is none of use."""
        return self._link if self._state is _State.CONNECTED else None

    # --- what is kept over a loss -----------------------------------------------------------------------------

    def map(self, mapping: Mapping) -> None:
        """Guest memory. While the server is away it is only noted. Blocks. Raises OperationFailed; then not noted."""
        with self._keeping:
            if len(self._mappings) >= self._agreement.dma_maps:
                raise OperationFailed(
                    "VFIO_USER_DMA_MAP",
                    self.what,
                    errno="ENOSPC",
                    advice=f"the server takes {self._agreement.dma_maps} mappings",
                )
            link = self._connected
            if link is not None:
                self._send_mapping(link, self._agreement, mapping)
            self._mappings[mapping.iova] = mapping

    def know(self, mapping: Mapping) -> None:
        """Guest memory that the server was told of by another process."""
        self._mappings[mapping.iova] = mapping

    @staticmethod
    def _send_mapping(link: Link, agreement: Agreement, mapping: Mapping) -> None:
        flags = DmaFlags.READ if mapping.readonly else DmaFlags.READ | DmaFlags.WRITE
        # A server that takes no fds asks for what it needs (DMA_READ, DMA_WRITE).
        fds = (mapping.memory.number,) if agreement.send_fds else ()
        request = DmaMap(mapping.iova, mapping.size, mapping.offset if fds else 0, flags)
        link.ask(request, fds).close()

    def unmap(self, iova: int, size: int) -> None:
        """Take mappings back, whole ones. When it returns, the server has let them go, or is gone. Blocks."""
        with self._keeping:
            inside = [one for one in self._mappings.values() if iova <= one.iova and one.last < iova + size]
            for mapping in inside:
                link = self._connected
                if link is not None:
                    self._forget_mapping(link, mapping)
                del self._mappings[mapping.iova]

    @staticmethod
    def _forget_mapping(link: Link, mapping: Mapping) -> None:
        try:
            link.ask(vfio_user.DmaUnmap(mapping.iova, mapping.size)).close()
        except OperationFailed as error:
            if error.errno != "ENOTCONN":  # it went away, and its mappings with it
                raise

    def write_config(self, offset: int, write: Callable[[], None], data: bytes, read: Read) -> None:
        """Write to configuration space, and keep what it shows then. Blocks. Raises OperationFailed; then not kept.

        Args:
            offset: in bytes.
            write: does it.
            data: what is written.
            read: reads configuration space.

        """
        with self._keeping:
            try:
                write()
            except OperationFailed as error:
                if error.errno == "ENOTCONN":
                    self._config.refused(offset, data)
                raise
            self._config.written(offset, data, read)

    def reset(self, read: Read) -> None:
        """Reset the device; what that undoes in configuration space is not kept. Blocks. Raises OperationFailed."""
        with self._keeping:
            self.ask(vfio_user.Nothing(), command=Command.DEVICE_RESET).close()
            self._config.look(read)

    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """Interrupts. Taking away, while the server is away, is only noted. Raises OperationFailed.

        On the loop, where nothing may wait, a refusal comes later as ``DEVICE_ERROR``.
        """
        if self.on_loop.here:
            for message, fds in split_irqs(request, 1):
                if fds:
                    raise RuntimeError(f"{self.what} was to be given eventfds on the event loop")
                # One that was not found again since a crash is told when it is.
                if self._link is not None or self._again_begun or not _takes_away(request):
                    self.post(message)
            self._armed.note(request)
            return
        with self._keeping:
            link = self._connected
            if link is not None:
                self._send_irqs(link, self._agreement, request)
            elif not _takes_away(request):
                self._live(vfio_user.SetIrqs(request.index, 0, 0, request.action))
            self._armed.note(request)

    def _send_irqs(self, link: Link, agreement: Agreement, request: vfio.SetIrqs) -> None:
        messages = split_irqs(request, max(1, agreement.send_fds))
        for place, (message, fds) in enumerate(messages):
            try:
                link.ask(message, fds).close()
            except OperationFailed:
                if place:
                    self._as_before(link, agreement, request.index)
                raise

    def _as_before(self, link: Link, agreement: Agreement, index: int) -> None:
        """Some of several messages were obeyed, one was refused: all or nothing. If that fails too, so be it."""
        with contextlib.suppress(OperationFailed):
            link.ask(split_irqs(vfio.SetIrqs.disable(index), 1)[0][0]).close()
            for former in self._armed.requests(index):
                for message, fds in split_irqs(former, agreement.send_fds):
                    link.ask(message, fds).close()

    # --- the server's own requests ------------------------------------------------------------------------------

    def _serve(self, request: Request) -> Payload | str:
        """DMA_READ and DMA_WRITE, within what is mapped, and written only where it may be. In any thread."""
        asked = request.payload
        try:
            if isinstance(asked, DmaRead):
                return DmaData(asked.address, self.translation.read(asked.address, asked.count))
            if isinstance(asked, DmaWrite):
                self.translation.write(asked.address, memoryview(asked.data))
                return DmaWritten(asked.address, len(asked.data))
        except DmaFault as fault:
            return "EPERM" if fault.readonly else "EFAULT"
        except OperationFailed as error:
            return error.errno or "EIO"
        return "ENOSYS"

    # --- coming and going -----------------------------------------------------------------------------------------

    def _opened(self) -> tuple[Link, Agreement, Facts]:
        """Connect, shake hands, look. Blocks. Raises OperationFailed, and leaves nothing open then."""
        link = self._new_link(self._connect())
        self._making = link
        if self._state is _State.CLOSED:
            link.hang_up()
        link.until = time.monotonic() + VFIO_USER_PATIENCE * self._timeout_ms / 1000
        try:
            agreement = _shake_hands(link)
            facts = look(link, takes_fds=agreement.send_fds > 0)
            link.until = float("inf")
        except BaseException:
            link.close()
            raise
        finally:
            self._making = None
        return link, agreement, facts

    def _new_link(self, sock: socket.socket) -> Link:
        link = Link(sock, self.what, timeout_ms=self._timeout_ms, serve=self._serve, lost=lambda _: None)
        link.on_lost = lambda reason: self.on_loop.soon(lambda: self._lost(link, reason))
        return link

    def _watch(self, link: Link) -> None:
        def watch() -> None:
            if self._state is not _State.CONNECTED or link is not self._link:
                return
            if link.lost is None:
                self.on_loop.loop.add_reader(link.fileno(), link.ready)
            else:
                self._lost(link, link.lost)

        self.on_loop.soon(watch)

    @property
    def has_link(self) -> bool:
        """Whether it has, or ever had, a connection here."""
        return self._link is not None

    @property
    def under_way(self) -> str | None:
        """Why it cannot be described with its connection now, for a person; None: it can. On the loop."""
        if self._again_begun:
            return f"connecting to {self.what} again"
        link = self._connected
        return None if link is None else link.under_way

    def _unwatch(self, link: Link) -> None:
        self.on_loop.run(lambda: self.on_loop.loop.remove_reader(link.fileno()))

    def _lost(self, link: Link, reason: str) -> None:
        """On the loop."""
        if self._state is not _State.CONNECTED or link is not self._link:
            return
        self.on_loop.loop.remove_reader(link.fileno())
        self._state = _State.LOST
        again = f"; vfiod tries to reach it again every {self._reconnect_ms} ms" if self._reconnect_ms else ""
        self._reason = f"the server is gone: {reason}{again}"
        self._tell(f"Its vfio-user server {self.what} is gone: {reason}{again}")
        if self.when_lost is not None:
            self.when_lost(self._reason)
        self._later()

    def _tell(self, reason: str) -> None:
        self.on_loop.soon(lambda: self._emit(DeviceError(device=self.user, reason=reason)))

    def _later(self) -> None:
        """On the loop: try again after a while, unless that is not wanted."""
        if self._reconnect_ms and self._state is _State.LOST:
            self.on_loop.loop.call_later(self._reconnect_ms / 1000, self._begin_again)

    def _begin_again(self) -> None:
        if self._state is _State.LOST:
            self._again_begun = True
            self._executor.submit(self._again)

    def _again(self) -> None:
        """Connect again. Blocks; in a worker."""
        try:
            self._try_again()
        finally:
            self.on_loop.soon(self._ended_again)

    def _ended_again(self) -> None:
        self._again_begun = False

    def _try_again(self) -> None:
        try:
            with self._keeping:
                if self._state is not _State.LOST:
                    return
                outcome = self._revive()
        except OperationFailed as error:
            # That nobody is there is what DEVICE_ERROR has said; that it may not be looked for, or that somebody does
            # not take it all, is news, once.
            forbidden = error.operation == "connect" and error.errno in ("EPERM", "EACCES")
            if (forbidden or error.operation != "connect") and str(error) != self._told:
                self._told = str(error)
                how = "cannot be reached" if forbidden else "is there again, and cannot be used"
                self._tell(f"Its vfio-user server {how}: {error}")
            self.on_loop.soon(self._later)
            return
        if isinstance(outcome, str):
            self._tell(outcome)
        else:
            self._told = ""
            self.on_loop.soon(lambda: self._back(outcome))

    def _back(self, changed: Sequence[int]) -> None:
        """On the loop: found again. Whoever listens may tell more than that."""
        if self.when_back is not None:
            self.when_back(changed)
        else:
            self._emit(DeviceReconnected(device=self.user, remapped=[]))

    def _revive(self) -> str | Sequence[int]:
        """Find it again. The indexes of regions with other memory than before; or why it is of no use for ever."""
        link, agreement, facts = self._opened()
        try:
            difference = self.facts.differs(facts)
            if difference is None:
                for mapping in self._mappings.values():
                    self._send_mapping(link, agreement, mapping)
                for offset, data in self._config.writes():
                    link.ask(RegionWrite(int(vfio.PciRegion.CONFIG), offset, data)).close()
                for request in self._armed.requests():
                    self._send_irqs(link, agreement, request)
        except BaseException:
            link.close()
            facts.close()
            raise
        if difference is not None:
            link.close()
            facts.close()
            self._state = _State.ANOTHER
            self._reason = f"another device answers: {difference}"
            return f"Another device answers at its vfio-user server {self.what}: {difference}; device_del it"
        former, self._link, self._agreement = self._link, link, agreement
        if former is not None:
            former.close()
        old, self.facts = self.facts, facts
        changed = old.other_files(facts)
        old.close()
        self._state = _State.CONNECTED
        self._watch(link)
        return changed

    def close(self) -> None:
        """Hang up; the server lets go of memory and interrupts. Never waits for it. Once; in a worker."""
        if self._state is _State.CLOSED:
            return
        former, self._state = self._state, _State.CLOSED
        self._reason = "it is closed"
        making = self._making
        if making is not None:
            making.hang_up()
        link = self._link
        if former is _State.CONNECTED and link is not None:
            link.hang_up()  # whoever waits for it, also with the lock held, hears that at once
        with self._keeping:
            if self._link is not None:
                self._unwatch(self._link)
                self._link.close()
            self.facts.close()
            self._armed.close()
            self.translation.clear()


def _takes_away(request: vfio.SetIrqs) -> bool:
    """Whether it needs no server: disabling, taking eventfds away, masking."""
    if request.data is vfio.IrqData.EVENTFD:
        return all(fd < 0 for fd in request.fds)
    return request.is_disable or request.action is not vfio.IrqAction.TRIGGER


def _shake_hands(link: Link) -> Agreement:
    reply = link.ask(PROPOSED)
    try:
        told = reply.payload
        if not isinstance(told, Version):
            raise TypeError("The reply to VERSION is no VERSION")
        try:
            agreement = agree(PROPOSED, told, fds=len(reply.fds))
        except BadMessage as error:
            raise _no_handshake(link, str(error)) from None
        twin: socket.socket | None = None
        if agreement.twin_fd_index is not None:
            twin = _as_socket(link, reply.fds[agreement.twin_fd_index])
        link.agreed(agreement.wire, twin)
        return agreement
    finally:
        reply.close()


def _as_socket(link: Link, fd: FileDescriptor) -> socket.socket:
    copy = fd.duplicate()
    try:
        made = socket.socket(fileno=copy.number)
    except OSError:
        copy.close()
        raise _no_handshake(link, "its twin_socket is no socket") from None
    copy.give_away()
    if made.family != socket.AF_UNIX or made.type != socket.SOCK_STREAM:
        made.close()
        raise _no_handshake(link, "its twin_socket is no Unix stream socket")
    return made


def _no_handshake(link: Link, why: str) -> OperationFailed:
    return OperationFailed("VFIO_USER_VERSION", link.what, errno="EPROTO", advice=why)
