"""Opening devices that other programs serve: by the path of a socket, or by a connected socket that was passed."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.devices import Check, Driver
from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import DEFAULT_MSG_TIMEOUT_MS
from vfiod.server.backends.base import AddressSpace, Backend, Mapping
from vfiod.server.backends.vfio_user.device import VfioUserBackend, VfioUserSpace
from vfiod.server.backends.vfio_user.peer import Peer
from vfiod.server.kernel import confinement
from vfiod.server.onloop import OnLoop
from vfiod.server.state.format import CannotKeep

if TYPE_CHECKING:
    from vfiod.server.state.fds import Taken
    from vfiod.server.state.machine import BackendState

__all__ = ["VfioUserDevices", "VfioUserOrigin"]


class VfioUserOrigin(Struct, frozen=True):
    """What ``device_add`` was told: a path, or a connected socket.

    Attributes:
        driver: what the program is to serve a device of: ``vfio-pci``, ``vfio-platform``, ``vfio-ccw``, ``vfio-ap``.
        path: of the server's socket; None: ``fd`` is connected to it.
        fd: a duplicate; whoever is given the origin owns it.
        name: what the fd was called.
        timeout_ms: how long a reply may take, in milliseconds.
        reconnect_ms: after which time to connect again, in milliseconds; 0: never. Only with a path.

    """

    driver: str
    path: str | None = None
    fd: FileDescriptor | None = None
    name: str = ""
    timeout_ms: int = DEFAULT_MSG_TIMEOUT_MS
    reconnect_ms: int = 0

    @property
    def what(self) -> str:
        """The server, for messages."""
        return self.path if self.path is not None else f"fd '{self.name}'"

    def fds(self) -> Iterator[FileDescriptor]:
        """Every fd that came with it."""
        if self.fd is not None:
            yield self.fd


class VfioUserDevices:
    """Opens them. Any thread.

    Args:
        attach_space: replays all guest memory into a new address space, or raises and leaves nothing.
        detach_space: forgets an address space.
        on_loop: the machine's loop.
        executor: the machine's threads.
        emit: sends an event; on the loop.

    """

    def __init__(
        self,
        attach_space: Callable[[AddressSpace], None],
        detach_space: Callable[[AddressSpace], None],
        *,
        on_loop: OnLoop,
        executor: Executor,
        emit: Callable[[EventData], None],
    ) -> None:
        self._attach_space = attach_space
        self._detach_space = detach_space
        self._on_loop = on_loop
        self._executor = executor
        self._emit = emit
        self._open: dict[int, VfioUserBackend] = {}  # by identity of their address space

    def open(self, origin: VfioUserOrigin, user: str) -> Backend:
        """Connect, look, and give it guest memory. Blocks: in the topology lane. Takes the origin's fd over.

        Raises OperationFailed: nobody there, no vfio-user, refused; InvalidArgument: another class of device.
        """
        peer = Peer(
            lambda: _connected(origin),
            origin.what,
            user,
            path=origin.path,
            on_loop=self._on_loop,
            executor=self._executor,
            emit=self._emit,
            timeout_ms=origin.timeout_ms,
            reconnect_ms=origin.reconnect_ms if origin.path is not None else 0,
        )
        peer.open()
        try:
            _check_class(origin, peer.facts.info)
            space = VfioUserSpace(peer)
            self._attach_space(space)
        except BaseException:
            peer.close()
            raise
        return self._made(peer, space)

    def _made(self, peer: Peer, space: VfioUserSpace) -> VfioUserBackend:
        backend = VfioUserBackend(peer, space, self._left)
        self._open[id(space)] = backend
        return backend

    def _left(self, space: AddressSpace) -> None:
        self._open.pop(id(space), None)
        self._detach_space(space)

    # --- over a change of the process: on the loop ---------------------------------------------------------

    @property
    def under_way(self) -> str | None:
        """Which server is not at rest, for a person; None: all are."""
        return next((what for one in tuple(self._open.values()) if (what := one.peer.under_way) is not None), None)

    def adopt_device(
        self,
        state: BackendState,
        user: str,
        taken: Taken,
        adopt_space: Callable[[AddressSpace], Iterable[Mapping]],
    ) -> VfioUserBackend:
        """Have a device again that another process had. CommandError, OSError, LookupError.

        It is asked nothing until :meth:`VfioUserBackend.look_again`.

        Args:
            state: what was described.
            user: its id or path.
            taken: the fds.
            adopt_space: knows an address space that has all guest memory already; gives the mappings.

        """
        from vfiod.server.backends.vfio_user.keeping import adopt_peer, seen_of

        served = state.served
        if served is None:
            raise CannotKeep(f"Device '{user}': what is known of {state.name} is not in the state")
        origin = VfioUserOrigin("", path=served.path, timeout_ms=served.timeout_ms)
        peer = adopt_peer(
            served,
            state.name,
            user,
            taken,
            connect=lambda: _connected(origin),
            on_loop=self._on_loop,
            executor=self._executor,
            emit=self._emit,
        )
        space = VfioUserSpace(peer)
        for mapping in adopt_space(space):
            space.know(mapping)
        backend = self._made(peer, space)
        backend.recall(seen_of(served))
        return backend

    def adopted(self, backend: Backend, *, made: bool) -> None:
        """The device around it is made again, or could not be. One that is not ours is passed over."""
        if isinstance(backend, VfioUserBackend):
            if made:
                backend.look_again()
            else:
                backend.forsake()

    def check(self, origin: VfioUserOrigin) -> tuple[Check, ...]:
        """What ``device_add`` with ``x-dry-run`` says. Connects to nothing: a server may end with its client."""
        try:
            if origin.path is None:
                return (Check(name="socket", ok=True, detail=f"{origin.what} is a socket"),)
            return (_check_path(origin.path),)
        finally:
            for fd in origin.fds():
                fd.close()


_SERVED: Final[dict[vfio.DeviceFlags, tuple[str, Driver]]] = {
    vfio.DeviceFlags.PCI: ("a PCI device", Driver.VFIO_PCI),
    vfio.DeviceFlags.PLATFORM: ("a platform device", Driver.VFIO_PLATFORM),
    vfio.DeviceFlags.CCW: ("a subchannel", Driver.VFIO_CCW),
    vfio.DeviceFlags.AP: ("an AP matrix", Driver.VFIO_AP),
}
"""What a server says it has (DEVICE_GET_INFO), in words, and the driver that takes it."""


def _check_class(origin: VfioUserOrigin, info: vfio.DeviceInfo) -> None:
    """Refuse what is of another class than the driver. InvalidArgument says what is served, and the driver for it."""
    served = [known for flag, known in _SERVED.items() if flag in info.flags]
    if any(driver == origin.driver for _, driver in served):
        return
    if served:
        words, driver = served[0]
        why = f"{words}: give driver={driver} instead of '{origin.driver}'"
    else:
        why = f"a device of a class that vfiod has no driver for (DEVICE_GET_INFO has the flags 0x{int(info.flags):x})"
    raise InvalidArgument(f"The vfio-user server {origin.what} serves {why}", errno="EINVAL")


def _check_path(path: str) -> Check:
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        return Check(name="socket", ok=False, detail=f"{path} cannot be looked at: {error.strerror}")
    if not stat.S_ISSOCK(mode):
        return Check(name="socket", ok=False, detail=f"{path} is not a socket: a vfio-user server listens on one")
    return Check(name="socket", ok=True, detail=f"{path} is a socket")


def _connected(origin: VfioUserOrigin) -> socket.socket:
    """A connected socket. Blocks. Takes the origin's fd over."""
    if origin.fd is not None:
        return _passed(origin, origin.fd)
    path = origin.path or ""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(origin.timeout_ms / 1000)
        sock.connect(path)
    except OSError as error:
        sock.close()
        advice = {
            "ENOENT": "no server listens there; start it first",
            "ECONNREFUSED": "no server listens there any more; start it first",
            "EPERM": "a server in a sandbox connects by itself only with --allow-connect: pass socket-fd"
            if confinement.is_confined()
            else "",
            "EACCES": "this server may not connect to it: give its user the socket, or pass socket-fd",
        }
        failed = OperationFailed("connect", path, errno=error.errno or "ETIMEDOUT")
        raise OperationFailed(
            "connect", path, errno=failed.errno or "EIO", advice=advice.get(failed.errno or "", "")
        ) from error
    return sock


def _passed(origin: VfioUserOrigin, fd: FileDescriptor) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd.number)
    except OSError:
        fd.close()
        raise InvalidArgument(f"Parameter 'socket-fd': {origin.what} is not a socket") from None
    fd.give_away()
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise InvalidArgument(f"Parameter 'socket-fd': {origin.what} is not a Unix stream socket")
    return sock
