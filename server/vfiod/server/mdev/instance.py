"""One mediated device as the bus keeps it, and the world as the device sees it."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, ParamSpec, Protocol, TypeVar

from msgspec import Struct, field

from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.mdev.parent import DmaFault, MdevType, MediatedDevice, Watch

__all__ = ["GuestAccess", "Instance", "MdevHost", "MdevDriver", "guarded", "published", "quietly"]

_log: Final = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def guarded(operation: str, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call into a parent; whatever comes out of it is a CommandError that names operation and object.

    Args:
        operation: the callback's name, or the kernel's name of the operation.
        what: parent or device.
        function: what is called.
        args: its arguments.
        kwargs: its arguments by name.

    """
    try:
        return function(*args, **kwargs)
    except CommandError:
        raise
    except OSError as error:
        number = error.errno if error.errno is not None else errno.EIO
        raise OperationFailed(operation, what, errno=number, advice=error.strerror or str(error)) from error
    except (Exception, SystemExit) as error:
        # The parent is somebody else's program: its defects are reported, and never ours to die of.
        _log.exception("%s of %s raised %s", operation, what, type(error).__name__)
        advice = f"it raised {type(error).__name__}, which is a defect of the parent; the traceback is in the log"
        raise OperationFailed(operation, what, errno=errno.EIO, advice=advice) from error


def quietly(operation: str, what: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call into a parent whose opinion does not count: what comes out is logged."""
    try:
        guarded(operation, what, function, *args, **kwargs)
    except CommandError as error:
        _log.warning("%s", error)


def published(what: str, attributes: Callable[[], Mapping[str, str]]) -> dict[str, str]:
    """What a parent or device publishes, as text. A failing callback publishes its failure: queries never fail."""
    try:
        told = guarded("attributes", what, attributes)
        return guarded("attributes", what, lambda: {str(key): str(value) for key, value in told.items()})
    except CommandError as error:
        return {"error": str(error)}


class GuestAccess(Protocol):
    """Guest memory, as an address space gives it to a device."""

    def read(self, iova: int, length: int) -> bytes:
        """See :meth:`Host.read_memory`."""

    def write(self, iova: int, data: memoryview) -> None:
        """See :meth:`Host.write_memory`."""


class _Watch:
    """A watched fd of a device.

    ``cancel`` may come from any thread. The fd is closed on the loop, after the loop has let go of it: epoll would
    otherwise go on reporting a file that somebody else still has open.
    """

    __slots__ = ("_callback", "_cancelled", "_fd", "_host", "number")

    def __init__(self, host: MdevHost, fd: FileDescriptor, callback: Callable[[], None]) -> None:
        self._host = host
        self._fd = fd
        self.number = fd.number
        self._callback = callback
        self._cancelled = False

    def begin(self) -> None:
        if not self._cancelled:
            self._host.loop.add_reader(self.number, self._ready)

    def cancel(self) -> None:
        if self._cancelled:
            return
        self._cancelled = True
        self._host.on_loop(self._end)

    def _ready(self) -> None:
        if self._cancelled:
            return
        try:
            guarded("watch", self._host.what, self._callback)
        except CommandError as error:
            # A level-triggered callback that fails would fail for ever.
            _log.error("%s; it is watched no longer", error)
            self.cancel()

    def _end(self) -> None:
        if not self._host.loop.is_closed():
            self._host.loop.remove_reader(self.number)
        self._host.forget(self)
        self._fd.close()


class MdevHost:
    """The :class:`~vfiod.server.mdev.parent.Host` of one device.

    Args:
        what: the device, for messages.
        loop: where callbacks run. The host is made on its thread.

    Attributes:
        memory: guest memory, while the device is open; None: every address faults.

    """

    def __init__(self, what: str, loop: asyncio.AbstractEventLoop) -> None:
        self.what = what
        self.loop = loop
        self.memory: GuestAccess | None = None
        self._thread = threading.get_ident()
        self._watches: set[_Watch] = set()

    def read_memory(self, iova: int, length: int) -> bytes:
        """See :meth:`Host.read_memory`."""
        memory = self.memory
        if memory is None:
            raise DmaFault(iova, 0, write=False)
        return memory.read(iova, length)

    def write_memory(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`Host.write_memory`."""
        memory = self.memory
        if memory is None:
            raise DmaFault(iova, 0, write=True)
        memory.write(iova, memoryview(data))

    def watch(self, fd: FileDescriptor, callback: Callable[[], None]) -> Watch:
        """See :meth:`Host.watch`."""
        watch = _Watch(self, fd, callback)
        self._watches.add(watch)
        self.on_loop(watch.begin)
        return watch

    def watched(self) -> list[int]:
        """Numbers of the fds that are watched for the device at this moment, and owned here."""
        return sorted(watch.number for watch in tuple(self._watches))

    def forget(self, watch: _Watch) -> None:
        """Its fd is about to be closed."""
        self._watches.discard(watch)

    def on_loop(self, function: Callable[[], None]) -> None:
        """Run a function on the loop's thread: at once when this is it, else soon."""
        if threading.get_ident() == self._thread or self.loop.is_closed():
            function()
            return
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:  # closed between the question and the call: nothing is watched any more
            function()


class Instance(Struct, eq=False):
    """One mediated device. Members change on the loop's thread, or under the bus's lock.

    Attributes:
        uuid: its name, in lower case.
        parent: its parent's name.
        mdev_type: what it is.
        parameters: what it was made with.
        device: the parent's object.
        host: the world, as the device sees it.
        group: the number of its own group.
        driver: the bus's driver that took it; None when none matches its device API.
        user: who has it open (a device's id or path), or None.
        vm: the VM it was started for, or None.
        gone: why every further access fails, once it was taken away from a user who kept it.
        released: called when the user lets go.

    """

    uuid: str
    parent: str
    mdev_type: MdevType
    parameters: Mapping[str, Any]
    device: MediatedDevice
    host: MdevHost
    group: int
    driver: MdevDriver | None = None
    user: str | None = None
    vm: str | None = None
    gone: str | None = None
    released: Callable[[], object] | None = field(default=None)

    @property
    def what(self) -> str:
        """For messages: ``mdev UUID of parent 'primer'``."""
        return f"mdev {self.uuid} of parent '{self.parent}'"

    def fds(self) -> dict[str, int]:
        """Names and numbers of what it has open: as it says itself, and what is watched for it. Never raises."""
        own: dict[str, int] = {}
        try:
            told = guarded("fds", self.what, self.device.fds)
            own = guarded("fds", self.what, lambda: {str(name): int(number) for name, number in told.items()})
        except CommandError as error:
            _log.warning("%s", error)
        known = set(own.values())
        watched = (number for number in self.host.watched() if number not in known)
        return {**own, **{f"watch[{place}]": number for place, number in enumerate(watched)}}


class MdevDriver(Protocol):
    """A device driver of the mediated bus: it is probed with every device whose device API is its own."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def device_api(self) -> str:
        """What it matches: ``vfio-pci``."""

    def probe(self, instance: Instance) -> None:
        """A device appears; its group exists. Raise to make its creation fail. In a worker's thread."""

    def remove(self, instance: Instance) -> None:
        """A device goes; its group still exists. Must not fail. In a worker's thread."""
