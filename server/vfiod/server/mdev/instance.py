"""One mediated device as the bus keeps it, and the world as the device sees it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

from msgspec import Struct, field

from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MDEV_LOOK_MS
from vfiod.server.mdev.calls import Calls, guarded, published
from vfiod.server.mdev.parent import DmaFault, MdevType, MediatedDevice, Pin, Watch

__all__ = ["GuestAccess", "Instance", "MdevDriver", "MdevHost"]

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")


class GuestAccess(Protocol):
    """Guest memory, as an address space gives it to a device."""

    @property
    def at_hand(self) -> bool:
        """See :meth:`Host.memory_at_hand`."""

    def read(self, iova: int, length: int) -> bytes:
        """See :meth:`Host.read_memory`."""

    def write(self, iova: int, data: memoryview) -> None:
        """See :meth:`Host.write_memory`."""

    def pin(self, iova: int, size: int, *, writable: bool) -> Pin:
        """See :meth:`Host.pin`."""


class _Watch:
    """A watched fd of a device.

    ``cancel`` may come from any thread. The fd is closed on the loop, after the loop has let go of it: epoll would
    otherwise go on reporting a file that somebody else still has open.
    """

    __slots__ = ("_callback", "_cancelled", "_fd", "_host", "_wanted", "_watched", "number")

    def __init__(self, host: MdevHost, fd: FileDescriptor, callback: Callable[[], None]) -> None:
        self._host = host
        self._fd = fd
        self.number = fd.number
        self._callback = callback
        self._cancelled = False
        self._wanted = (True, False)
        self._watched = (False, False)

    def want(self, *, readable: bool, writable: bool) -> None:
        """See :meth:`Watch.want`."""
        if self._wanted != (readable, writable):
            self._wanted = (readable, writable)
            self._host.on_loop(self.settle)

    def settle(self) -> None:
        """Let the loop watch what is wanted now. On the loop."""
        if self._cancelled:
            return
        loop, number = self._host.loop, self.number
        (reads, writes), (read, written) = self._wanted, self._watched
        if reads != read:
            loop.add_reader(number, self._ready) if reads else loop.remove_reader(number)
        if writes != written:
            loop.add_writer(number, self._ready) if writes else loop.remove_writer(number)
        self._watched = (reads, writes)

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
            self._host.loop.remove_writer(self.number)
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

    @property
    def memory_at_hand(self) -> bool:
        """See :meth:`Host.memory_at_hand`."""
        memory = self.memory
        return memory is None or memory.at_hand

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

    def pin(self, iova: int, size: int, *, writable: bool = True) -> Pin:
        """See :meth:`Host.pin`."""
        memory = self.memory
        if memory is None:
            raise DmaFault(iova, 0, write=writable)
        return memory.pin(iova, size, writable=writable)

    def watch(self, fd: FileDescriptor, callback: Callable[[], None]) -> Watch:
        """See :meth:`Host.watch`."""
        watch = _Watch(self, fd, callback)
        self._watches.add(watch)
        self.on_loop(watch.settle)
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
        calls: how it is called.
        group: the number of its own group.
        driver: the bus's driver that took it; None when none matches its device API.
        user: who has it open (a device's id or path), or None.
        vm: the VM it was started for, or None.
        gone: why every further access fails, once it was taken away from a user who kept it.
        released: called when the user lets go.
        on_gone: called on the loop with that reason when it is taken away; the user's.
        told: what it published when it was last asked.

    """

    uuid: str
    parent: str
    mdev_type: MdevType
    parameters: Mapping[str, Any]
    device: MediatedDevice
    host: MdevHost
    calls: Calls
    group: int
    driver: MdevDriver | None = None
    user: str | None = None
    vm: str | None = None
    gone: str | None = None
    released: Callable[[], object] | None = field(default=None)
    on_gone: Callable[[str], None] | None = field(default=None)
    told: dict[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """For messages: ``mdev UUID of parent 'primer'``."""
        return f"mdev {self.uuid} of parent '{self.parent}'"

    def call(
        self,
        operation: str,
        function: Callable[[], T],
        *,
        of: str | None = None,
        late: Callable[[T], object] | None = None,
    ) -> T:
        """Call one of the device's methods; see :meth:`Calls.run`. ``of`` names what it is about."""
        return self.calls.run(operation, of or self.what, function, late=late)

    def attributes(self) -> dict[str, str]:
        """Ask it what it publishes. Blocks for a moment at most; what fails is published instead."""
        self.told = published(
            self.what,
            lambda: self.calls.run("attributes", self.what, self.device.attributes, limit_s=MDEV_LOOK_MS / 1000),
        )
        return self.told

    def fds(self) -> dict[str, int]:
        """Names and numbers of what it has open: as it says itself, and what is watched for it. Never raises."""
        own: dict[str, int] = {}
        try:
            told = self.call("fds", self.device.fds)
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
