"""A parent for the benchmark of many vectors: primers with the most MSI-X vectors there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.server.mdev.parent import Host, MdevType, Parent
from vfiod.server.mdev.samples.pci import PrimerDevice

__all__ = ["VECTORS", "Wide"]

VECTORS: Final = 2048
"""MSI-X vectors of each (PCI's limit)."""


class Wide(Parent):
    """Makes them."""

    name = "wide"
    types: Sequence[MdevType] = (
        MdevType(
            id="wide-pci",
            name="Wide",
            description=f"A primer with {VECTORS} MSI-X vectors",
            device_api=DeviceApi.VFIO_PCI,
            max_instances=16,
            parameters={"resizable": "whether vectors can be added while others are in use"},
        ),
    )

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PrimerDevice:
        """Make one."""
        return PrimerDevice(
            host, memory=1 << 16, vectors=32, msix=VECTORS, resizable=bool(parameters.get("resizable", False))
        )
