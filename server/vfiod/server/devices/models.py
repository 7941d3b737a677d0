"""Which device model serves which driver of ``device_add``. A model is imported when its first device is added."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final, cast

from msgspec import Struct

from vfiod.protocol.catalogue.devices import Driver
from vfiod.server.devices.device import Device

__all__ = ["MODELS", "ModelClass", "device_class"]


class ModelClass(Struct, frozen=True):
    """Where a model's class is.

    Attributes:
        module: within ``vfiod.server.devices``.
        device: the class of its devices, derived from :class:`~vfiod.server.devices.device.Device`.

    """

    module: str
    device: str


MODELS: Final[Mapping[Driver, ModelClass]] = {
    Driver.VFIO_PCI: ModelClass("pci", "PciDevice"),
    Driver.VFIO_PLATFORM: ModelClass("platform", "PlatformDevice"),
    Driver.VFIO_CCW: ModelClass("ccw", "CcwDevice"),
    Driver.VFIO_AP: ModelClass("ap", "ApDevice"),
}
"""Every driver of the catalogue has its model here; a test holds it."""


def device_class(driver: Driver) -> type[Device]:
    """The class of a driver's devices, imported now if it was not before."""
    model = MODELS[driver]
    module = importlib.import_module(f"vfiod.server.devices.{model.module}")
    return cast("type[Device]", getattr(module, model.device))
