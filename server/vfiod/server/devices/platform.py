"""A platform device on any backend: what ``device_add driver=vfio-platform`` makes (section 7 of the reference)."""

from __future__ import annotations

from typing import ClassVar

from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.errors import CommandError
from vfiod.server.backends.base import Backend
from vfiod.server.devices.device import Device
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.model import Model, Options

__all__ = ["PlatformDevice", "PlatformOptions"]


class PlatformOptions(Options, frozen=True):
    """The properties of ``device_add`` that shape a platform device.

    Attributes:
        irqfd: whether interrupts may be direct (``x-irqfd``).

    """

    irqfd: bool = True


class PlatformDevice(Device):
    """One platform device."""

    driver: ClassVar[Driver] = Driver.VFIO_PLATFORM

    def populate(self, backend: Backend, environment: Environment) -> Model:
        """Read a platform device: as many regions and interrupts as it says it has."""
        raise CommandError("The platform model comes with the next change")
