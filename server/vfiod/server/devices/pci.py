"""A PCI device on any backend: what ``device_add driver=vfio-pci`` makes.

Its life, and who calls what (behaviour: sections 1, 3, 4 and 6 of the reference)::

    device = PciDevice(...)            loop     state realizing; queries already answer
    device.realize(open)               worker   topology lane; on failure everything is closed again
    device.start()                     loop     interrupts are listened to; state running
      ... commands ...
    device.stop()                      loop     listens to nothing, no timer; nothing of the loop is left
    released = device.close()          worker   topology lane; disarms, unmaps, closes; True when the kernel let it go

``stop`` and ``close`` may be called again, and after a ``realize`` that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vfiod.server.backends.base import Backend

from vfiod.protocol.catalogue.devices import DeviceInfo, Holder, OnRequest
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.regions import RegionInfo
from vfiod.protocol.catalogue.words import DeviceState
from vfiod.protocol.limits import DEFAULT_MMAP_TIMEOUT_MS
from vfiod.server.devices.environment import Environment

__all__ = ["PciDevice", "PciOptions"]


@dataclass(frozen=True, slots=True)
class PciOptions:
    """The properties of ``device_add`` that shape a device's behaviour.

    Attributes:
        mmap_timeout_ms: before the fast path returns after an INTx; 0: it stays off after the first.
        share_fd: whether ``region-map`` may give the device's fd away.
        no_mmap: never map regions (``x-no-mmap``).
        on_request: what a host's request for the device does.

    """

    mmap_timeout_ms: int = DEFAULT_MMAP_TIMEOUT_MS
    share_fd: bool = True
    no_mmap: bool = False
    on_request: OnRequest = OnRequest.EVENT


class PciDevice:
    """One PCI device.

    Args:
        id: the user's id; ``""`` for a device without one.
        path: ``/machine/peripheral/ID`` or ``/machine/peripheral-anon/device[N]``.
        backend_kind: what :attr:`DeviceInfo.backend` says before the backend is open.
        host: host address or mediated device's UUID, when known.
        environment: the machine around it.
        options: its properties.
        on_requested: called on the loop each time the host asks for the device, after ``DEVICE_REQUESTED`` went out.

    Attributes:
        state: where it is in its life; the machine sets ``UNPLUGGING`` and back.

    """

    def __init__(
        self,
        *,
        id: str,
        path: str,
        backend_kind: str,
        host: str | None,
        environment: Environment,
        options: PciOptions,
        on_requested: Callable[[PciDevice], None] | None = None,
    ) -> None:
        self.id = id
        self.path = path
        self.state = DeviceState.REALIZING

    @property
    def name(self) -> str:
        """What replies and events call it: its id, or its path when it has none."""
        raise NotImplementedError

    # --- life -------------------------------------------------------------------------------------

    def realize(self, open_backend: Callable[[], Backend]) -> None:
        """Open the device and read what it has. Blocks; in a worker. On failure closes everything, and raises."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to listen; state ``running``. On the loop, once, after :meth:`realize`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Listen to nothing any more, cancel timers. On the loop."""
        raise NotImplementedError

    def close(self) -> bool:
        """Disarm every interrupt, unmap, close. Blocks; in a worker, after :meth:`stop`.

        Returns whether the kernel really let the device go: False when an fd given out keeps it open.
        """
        raise NotImplementedError

    # --- looking: on the loop, at any time, never waiting -----------------------------------------------

    def info(self) -> DeviceInfo:
        """For ``query-devices``."""
        raise NotImplementedError

    def irq_infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""
        raise NotImplementedError

    def region_infos(self) -> list[RegionInfo]:
        """For ``query-regions``."""
        raise NotImplementedError

    def fds(self) -> Sequence[FdInfo]:
        """The fds this device holds (its interrupts' eventfds), for ``query-fds``. The device fd is the backend's."""
        raise NotImplementedError

    def holders(self) -> list[Holder]:
        """Who keeps it from being removed: running and waiting operations, sessions that mapped a region."""
        raise NotImplementedError

    def session_ended(self, session: int) -> None:
        """A monitor session ended: it no longer holds what it mapped."""
        raise NotImplementedError
