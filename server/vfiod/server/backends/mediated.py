"""Devices that are made by parents in Python, as backends: to a device model they look like the kernel's vfio.

:class:`MediatedDevices` is the driver of the mediated bus for ``vfio-pci``: the bus probes it with each device that is
made, and ``device_add mdev=UUID`` opens one of them. Each opened device has an address space of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from vfiod.protocol.catalogue.devices import Check
from vfiod.server.backends.base import AddressSpace, Backend
from vfiod.server.mdev.bus import MdevBus

__all__ = ["MediatedDevices"]


class MediatedDevices:
    """Opens mediated devices.

    Args:
        bus: where they are.
        attach_space: replays all guest memory into a new address space, or raises and leaves nothing.
        detach_space: forgets an address space.

    """

    def __init__(
        self, bus: MdevBus, attach_space: Callable[[AddressSpace], None], detach_space: Callable[[AddressSpace], None]
    ) -> None: ...

    def check(self, uuid: str) -> tuple[Check, ...]:
        """What ``device_add`` with ``x-dry-run`` says of it. Changes nothing."""
        raise NotImplementedError

    def open(self, uuid: str, user: str) -> Backend:
        """Open a device for a user (a device's id or path). Blocks: in the topology lane. Unwinds on failure.

        Raises DeviceNotFound (no such mediated device), Busy (another user has it), OperationFailed.
        """
        raise NotImplementedError
