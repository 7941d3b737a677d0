"""One export: a socket, and at most one client at a time. On the loop.

::

    listening ─ somebody connects, may come in ─► negotiating ─ VERSION ─► attached      DEVICE_EXPORT_ATTACHED
        ▲                                             │                      │ the client goes, is dropped, or dies
        └────────────── all is taken back ◄───────────┴──── detaching ◄──────┘           DEVICE_EXPORT_DETACHED

What a client leaves behind is taken back in this order: the device masters its bus no more, its interrupts are
disarmed, the client's memory is unmapped. The device is otherwise as the client left it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Final

from vfiod.protocol.catalogue.devices import Holder
from vfiod.protocol.catalogue.exports import (
    DeviceExportAttached,
    DeviceExportDeleted,
    DeviceExportDetached,
    ExportClient,
    ExportInfo,
    ExportState,
    ExportType,
)
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.words import UNSET, DeviceState
from vfiod.protocol.errors import Busy, CommandError
from vfiod.protocol.fd import FdKind
from vfiod.server import trace
from vfiod.server.devices.device import Device
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.exports.session import ClientSession
from vfiod.server.logs import about
from vfiod.server.sockets.access import Access, Peer, peer_of
from vfiod.server.sockets.listener import Listener

if TYPE_CHECKING:
    from vfiod.server.machine import Machine
    from vfiod.server.state.doors import ExportState as ExportState_
    from vfiod.server.state.fds import Given, Taken

__all__ = ["Export"]

_log: Final = logging.getLogger(__name__)


class Export:
    """One export (:class:`~vfiod.server.devices.claims.Claim` of its device, while a client is attached).

    Args:
        machine: the machine.
        id: its id.
        device: the device.
        access: who may come in.
        gone: called once, when it has ended.

    Attributes:
        id: as given.
        device: as given.
        state: where it is.

    """

    def __init__(
        self, machine: Machine, id: str, device: Device, access: Access, gone: Callable[[Export], None]
    ) -> None:
        self.id: Final = id
        self.device: Final = device
        self.state = ExportState.LISTENING
        self._machine = machine
        self._access = access
        self._gone = gone
        self._listener: Listener | None = None
        self._path: str | None = None
        self._session: ClientSession | None = None
        self._attached = 0
        self._closing = False
        self._device_going = False
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"export '{self.id}'"

    # --- the socket -----------------------------------------------------------------------------------

    def listen(self, listening: socket.socket, path: str | None) -> None:
        """Accept clients here, one at a time; the socket is the export's from here on."""
        self._listener = Listener(self._machine.loop, listening, self._admit)
        if path is not None:
            self._listener.remove_at_close(path)
            self._path = path

    def serve(self, connection: socket.socket) -> None:
        """Serve this one client, which is connected already; the export ends with it."""
        connection.setblocking(False)
        self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        sentence = self._access.refusal(peer, self.name)
        if sentence is not None:
            _log.warning("Refused a client of uid %d, pid %d: %s", peer.uid, peer.pid, sentence)
            connection.close()
            if self._listener is None:
                self._end()
            return
        if self._listener is not None:
            self._listener.pause()  # the next waits in the kernel's queue until this one is gone
        self._begin(connection, peer).start()

    def _begin(self, connection: socket.socket, peer: Peer) -> ClientSession:
        self.state = ExportState.NEGOTIATING
        session = self._session = ClientSession(
            self._machine,
            self.device,
            self.name,
            connection,
            peer,
            attached=self._on_attached,
            ended=self._on_ended,
        )
        return session

    # --- attached and detached ------------------------------------------------------------------------

    def _on_attached(self) -> None:
        device, session = self.device, self._session
        if session is None:
            return
        if device.claim is not None:
            raise Busy(f"Device '{device.name}' is attached to by the client of {device.claim.name}")
        if device.state is not DeviceState.RUNNING or self._closing:
            raise Busy(f"Device '{device.name}' is {device.state}: nobody can attach to it any more")
        device.check_free()
        self._claim()
        self._attached += 1
        self._machine.hub.emit(
            DeviceExportAttached(id=self.id, device=device.name, pid=session.peer.pid, uid=session.peer.uid)
        )
        if trace.export_attached.on:
            trace.export_attached(export=self.id, device=device.name, pid=session.peer.pid)

    def _claim(self) -> None:
        """The device is the client's."""
        device = self.device
        device.claim = self
        if isinstance(device.interrupts, DeviceInterrupts):
            device.interrupts.external = True
        self.state = ExportState.ATTACHED

    def _on_ended(self, reason: str) -> None:
        self.state = ExportState.DETACHING
        _log.info("The client of %s is gone: %s", self.name, reason)
        self._task = self._machine.loop.create_task(self._detach(reason))

    async def _detach(self, reason: str) -> None:
        session = self._session
        assert session is not None  # noqa: S101 - nothing ends that has not begun
        try:
            await session.settled()
            mine = self.device.claim is self
            if mine and not self._device_going:
                await self._quiet(reason)
            await self._release()
        except Exception:  # noqa: BLE001 - detaching goes on
            _log.exception("Taking back what the client of %s had failed by a defect of vfiod", self.name)
        finally:
            if self.device.claim is self:
                self._let_guest()
                self._detached(reason)
            self._session = None
            session.interrupts.close()
            self._machine.devices.holder_gone(self.device.name)
            self._task = None
            if self._closing or self._listener is None:
                self._end()
            else:
                self.state = ExportState.LISTENING
                self._listener.resume()

    def _detached(self, reason: str) -> None:
        """The device is nobody's again."""
        self.device.claim = None
        self._machine.hub.emit(DeviceExportDetached(id=self.id, device=self.device.name, reason=reason))
        if trace.export_detached.on:
            trace.export_detached(export=self.id, device=self.device.name, reason=reason)

    async def _quiet(self, reason: str) -> None:
        """The device does nothing by itself any more: no DMA, no interrupt. What fails is logged."""
        try:
            try:
                await self.device.lane.run(f"detaching the client of {self.name}", self.device.client_gone)
            except CommandError as error:
                _log.warning(
                    "DMA of device '%s' could not be stopped: %s",
                    self.device.name,
                    error,
                    extra=about(device=self.device.name),
                )
            await self.device.stop_interrupts(reason=f"the client of {self.name} is gone: {reason}", whatever=True)
        except CommandError as error:
            _log.info(
                "Device '%s' is not disarmed after its client: %s",
                self.device.name,
                error,
                extra=about(device=self.device.name),
            )

    async def _release(self) -> None:
        """Its memory, in the lane where memory changes. When that is closed, the device's own end has done it."""
        if self._session is None or self._session.memory is None:
            return
        try:
            await self._machine.topology.run(f"detaching the client of {self.name}", self.release_memory)
        except CommandError as error:
            _log.info("The memory of %s is left to its device's end: %s", self.name, error)

    def _let_guest(self) -> None:
        if self.device.realized and not self._device_going and isinstance(self.device.interrupts, DeviceInterrupts):
            self.device.interrupts.external = False

    # --- the device's claim ---------------------------------------------------------------------------

    def holder(self) -> Holder:
        """See :class:`~vfiod.server.devices.claims.Claim`."""
        pid = 0 if self._session is None else self._session.peer.pid
        return Holder(kind="export", detail=f"{self.id}: process {pid}")

    def asked_to_go(self) -> None:
        """Tell the client by REQ, as the kernel would: QEMU unplugs the device then."""
        if self._session is not None and not self._session.interrupts.notice(request=True):
            _log.info("The client of %s does not listen to requests to let go of the device", self.name)

    def signalled(self, index: int) -> None:
        """Pass it on, if the client listens to it."""
        if self._session is not None:
            self._session.interrupts.pass_on(index)

    def failed(self) -> None:
        """Tell the client by ERR."""
        if self._session is not None:
            self._session.interrupts.notice(request=False)

    def memory_replaced(self, regions: Collection[int]) -> None:
        """Tell the client by ERR, and hang up, when it may have mapped one of them: it would write into nothing."""
        session = self._session
        if session is None or session.mapped.isdisjoint(regions):
            return
        session.interrupts.notice(request=False)
        session.end(
            f"The program that serves device '{self.device.name}' was restarted: the memory that the client had mapped "
            "is the former one's; attach again"
        )

    def device_stops(self) -> None:
        """The device goes: so does its client."""
        self._device_going = True
        self._closing = True
        if self._session is not None:
            self._session.end(f"Device '{self.device.name}' is removed")

    def device_closed(self) -> None:
        """The device is closed: interrupts, DMA and memory of its client are gone. Said before ``DEVICE_DELETED``."""
        reason = f"Device '{self.device.name}' is removed"
        if self.device.claim is self:
            self._detached(reason)
        self.close(reason)

    def release_memory(self) -> None:
        """Blocks; in a worker, in the ``topology`` lane."""
        session = self._session
        if session is not None and session.memory is not None:
            session.memory.leave()

    # --- over a change of the process -----------------------------------------------------------------

    def hold(self) -> None:
        """Admit nobody, and take nothing more from who is there."""
        if self._listener is not None and self._session is None:
            self._listener.pause()
        if self._session is not None:
            self._session.hold()

    def release(self) -> None:
        """Go on."""
        if self._session is not None:
            self._session.release()
        elif self._listener is not None and self._task is None:
            self._listener.resume()

    @property
    def under_way(self) -> str | None:
        """What has begun, for a person; None: it could be described."""
        if self._task is not None or self._closing:
            return f"the end of the client of {self.name}"
        what = None if self._session is None else self._session.under_way
        return None if what is None else f"{what} of {self.name}"

    def keep(self, given: Given) -> ExportState_:
        """Describe it, with its client."""
        from vfiod.server.state.doors import ExportState as State

        owner = f"export:{self.id}"
        return State(
            id=self.id,
            device=self.device.name,
            attached=self._attached,
            fd=None if self._listener is None else given.give(self._listener.fileno(), owner),
            path=self._path,
            client=None if self._session is None else self._session.keep(owner, given),
        )

    def adopt(self, state: ExportState_, taken: Taken) -> None:
        """Have the socket and the client again that another process had."""
        self._attached = state.attached
        if state.fd is not None:
            self.listen(socket.socket(fileno=taken.take(state.fd).give_away()), state.path)
        if state.client is None:
            return
        if self._listener is not None:
            self._listener.pause()
        connection = socket.socket(fileno=taken.take(state.client.fd).give_away())
        connection.setblocking(False)
        session = self._begin(connection, Peer(state.client.pid, state.client.uid))
        if session.adopt(state.client, taken):
            self._claim()
        session.start()

    # --- looking --------------------------------------------------------------------------------------

    def info(self) -> ExportInfo:
        """For ``query-device-exports``."""
        session = self._session
        return ExportInfo(
            id=self.id,
            type=ExportType.VFIO_USER,
            device=self.device.name,
            state=self.state,
            path=UNSET if self._path is None else self._path,
            client=UNSET if session is None or session.version is None else _client(session),
            attached=self._attached,
        )

    def fd_infos(self) -> Iterator[FdInfo]:
        """Its sockets and its client's eventfds, for ``query-fds``."""
        owner = f"export:{self.id}"
        if self._listener is not None:
            yield FdInfo(
                owner=owner, name=self._listener.name, kind=FdKind.LISTENING_SOCKET, number=self._listener.fileno()
            )
        if self._session is not None:
            if self._session.fileno() >= 0:
                yield FdInfo(owner=owner, name="client", kind=FdKind.SOCKET, number=self._session.fileno())
            for name, fd in self._session.fds():
                yield FdInfo(owner=owner, name=name, kind=FdKind.EVENTFD, number=fd.number)

    # --- the end --------------------------------------------------------------------------------------

    def delete(self, *, force: bool) -> None:
        """Begin to end. Busy while a client is attached, unless forced: then it is disconnected."""
        if self._session is not None and self._session.version is not None and not force:
            raise Busy(
                f"{self.name.capitalize()} is attached to by process {self._session.peer.pid}: give force=true to "
                "disconnect it"
            )
        self.close("The export is deleted")

    def close(self, reason: str) -> None:
        """End: accept nobody any more, disconnect who is there. ``DEVICE_EXPORT_DELETED`` follows, perhaps later."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._session is not None:
            self._session.end(reason)
        elif self._task is None:
            self._end()

    async def ended(self) -> None:
        """Wait until a client that is going has gone."""
        while self._task is not None:
            await asyncio.wait([self._task])

    def _end(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._gone(self)
        self._machine.hub.emit(DeviceExportDeleted(id=self.id, device=self.device.name))


def _client(session: ClientSession) -> ExportClient:
    version, memory = session.version, session.memory
    return ExportClient(
        pid=session.peer.pid,
        uid=session.peer.uid,
        version="" if version is None else f"{version.major}.{version.minor}",
        mappings=0 if memory is None else memory.mappings,
        mapped_bytes=0 if memory is None else memory.mapped_bytes,
        unreachable_bytes=0 if memory is None or memory.by_messages else memory.unreachable_bytes,
        requests=session.requests,
        errors=session.errors,
        failed_reads=session.failed_reads,
    )
