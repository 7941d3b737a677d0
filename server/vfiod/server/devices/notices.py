"""The two interrupts that are vfiod's own: REQ, the host wants the device back, and ERR, the device has failed.

Every device arms them when it is added and keeps them until it is closed, whatever the guest does with the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Backend
from vfiod.server.devices import eventfds
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import IrqIndex

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Place, Taken

__all__ = ["Notices"]

_log: Final = logging.getLogger(__name__)


class Notices:
    """REQ and ERR of one device, as far as it has them.

    Args:
        device: what the device is called, for messages.
        backend: where it comes from.
        indexes: the reserved indexes that are present.

    """

    def __init__(self, device: str, backend: Backend, indexes: tuple[IrqIndex, ...]) -> None:
        self._device = device
        self._backend = backend
        self._indexes = indexes
        self._armed: dict[IrqIndex, FileDescriptor] = {}
        self._environment: Environment | None = None

    def arm(self) -> None:
        """Give the kernel an eventfd for each. Blocks; in a worker. CommandError, and then none is armed."""
        try:
            for one in self._indexes:
                fd = eventfds.make(f"{one.name} of device '{self._device}'")
                self._armed[one] = fd
                self._backend.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, one.index, (fd.number,)))
        except BaseException:
            self.close()
            raise

    def keep(self, given: Given) -> list[tuple[int, Place]]:
        """Describe what is armed: index and eventfd."""
        owner = f"device:{self._device}"
        return [(one.index, given.give(fd, f"{owner}/{one.name}")) for one, fd in self._armed.items()]

    def adopt(self, armed: list[tuple[int, Place]], taken: Taken) -> None:
        """Instead of :meth:`arm`: the kernel has these eventfds already, and goes on signalling them. CommandError."""
        known = {one.index: one for one in self._indexes}
        for index, place in armed:
            if index not in known:
                raise CommandError(f"Device '{self._device}' says that it has no interrupt {index}, which was armed")
            self._armed[known[index]] = taken.take(place)

    def start(self, environment: Environment, hear: Callable[[IrqIndex, int], None]) -> None:
        """Listen; ``hear`` gets the index and how many came. On the loop."""
        self._environment = environment
        for one, fd in self._armed.items():
            environment.watch(fd.number, lambda one=one, fd=fd: self._heard(one, fd, hear))  # type: ignore[misc]

    def _heard(self, one: IrqIndex, fd: FileDescriptor, hear: Callable[[IrqIndex, int], None]) -> None:
        count = eventfds.take(fd)
        if count:
            hear(one, count)

    def take(self, index: int) -> int:
        """What an index has signalled and nobody has heard yet; it is void then. 0: nothing. On the loop."""
        return sum(eventfds.take(fd) for one, fd in self._armed.items() if one.index == index)

    def stop(self) -> None:
        """Listen no more. On the loop; later calls do nothing."""
        environment, self._environment = self._environment, None
        if environment is not None:
            for fd in self._armed.values():
                environment.unwatch(fd.number)

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """The eventfds, with their names."""
        return [(one.name, fd) for one, fd in tuple(self._armed.items())]

    def close(self) -> None:
        """Take them from the kernel, whatever fails, and close them. Blocks; in a worker."""
        armed, self._armed = self._armed, {}
        for one, fd in armed.items():
            try:
                self._backend.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, one.index, (-1,)))
            except CommandError as error:
                _log.debug("Device %s: disarming %s failed: %s", self._device, one.name, error)
            fd.close()
