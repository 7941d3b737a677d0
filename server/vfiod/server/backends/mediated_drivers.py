"""The drivers of the mediated bus: one for each device API, probed with every device of it that is made.

What a device says of itself is checked here, before anybody can add it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.limits import MAX_IRQ_INDEXES, MAX_REGION_INDEXES, MAX_VECTORS
from vfiod.protocol.vfio.ccw import VFIO_CCW_NUM_REGIONS
from vfiod.server.backends.mediated_regions import wrong
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.parent import DeviceInfo, IrqInfo

__all__ = ["DRIVEN_APIS", "ApiDriver", "checked_info", "checked_irq"]

DRIVEN_APIS: Final = {
    DeviceApi.VFIO_PCI: vfio.DeviceFlags.PCI,
    DeviceApi.VFIO_PLATFORM: vfio.DeviceFlags.PLATFORM,
    DeviceApi.VFIO_CCW: vfio.DeviceFlags.CCW,
    DeviceApi.VFIO_AP: vfio.DeviceFlags.AP,
}
"""The device APIs that have a driver here, and how ``VFIO_DEVICE_GET_INFO`` names them."""


class ApiDriver:
    """The driver of the mediated bus for one device API: probed with each device of it that is made."""

    def __init__(self, device_api: DeviceApi) -> None:
        self.name = device_api.value
        self.device_api = device_api
        self.flags = DRIVEN_APIS[device_api]

    def probe(self, instance: Instance) -> None:
        """Look whether the device can be what its type says. Raises OperationFailed."""
        _PROBES[self.device_api](instance, checked_info(instance))

    def remove(self, instance: Instance) -> None:
        """Nothing is kept of a device that is not open."""


def _probe_pci(instance: Instance, info: DeviceInfo) -> None:
    if info.regions < vfio.VFIO_PCI_NUM_REGIONS or info.irqs < vfio.VFIO_PCI_NUM_IRQS:
        raise OperationFailed(
            "device_info",
            instance.what,
            errno=errno.EINVAL,
            advice=f"a vfio-pci device has at least {vfio.VFIO_PCI_NUM_REGIONS} regions and "
            f"{vfio.VFIO_PCI_NUM_IRQS} interrupt indexes, it has {info.regions} and {info.irqs}",
        )


def _probe_platform(instance: Instance, info: DeviceInfo) -> None:
    """Nothing is at a fixed index, so every index is looked at."""
    for index in range(info.irqs):
        what = f"{instance.what} interrupt index {index}"
        told = checked_irq(what, instance.call("irq_info", partial(instance.device.irq_info, index), of=what))
        if told.type is None and told.count != 1:
            detail = f"an index of a vfio-platform device has one interrupt, it has {told.count}; messages need a type"
            raise OperationFailed("irq_info", what, errno=errno.EINVAL, advice=detail)
        if told.automasked and not told.maskable:
            raise OperationFailed(
                "irq_info", what, errno=errno.EINVAL, advice="an interrupt that masks itself must be maskable"
            )


def _probe_ccw(instance: Instance, info: DeviceInfo) -> None:
    if info.regions < VFIO_CCW_NUM_REGIONS or info.irqs < 1:
        raise OperationFailed(
            "device_info",
            instance.what,
            errno=errno.EINVAL,
            advice=f"a vfio-ccw device has an I/O region and an I/O interrupt, it has {info.regions} regions and "
            f"{info.irqs} interrupt indexes",
        )


def _probe_ap(instance: Instance, info: DeviceInfo) -> None:
    if info.regions:
        detail = f"a vfio-ap device has no regions, it has {info.regions}"
        raise OperationFailed("device_info", instance.what, errno=errno.EINVAL, advice=detail)


_PROBES: Final[Mapping[DeviceApi, Callable[[Instance, DeviceInfo], None]]] = {
    DeviceApi.VFIO_PCI: _probe_pci,
    DeviceApi.VFIO_PLATFORM: _probe_platform,
    DeviceApi.VFIO_CCW: _probe_ccw,
    DeviceApi.VFIO_AP: _probe_ap,
}


def checked_info(instance: Instance) -> DeviceInfo:
    """What a device has, if that can be. Raises OperationFailed."""
    info = instance.call("device_info", instance.device.device_info)
    if (
        not isinstance(info, DeviceInfo)
        or not 0 <= info.regions <= MAX_REGION_INDEXES
        or not 0 <= info.irqs <= MAX_IRQ_INDEXES
    ):
        most = f"at most {MAX_REGION_INDEXES} regions and {MAX_IRQ_INDEXES} interrupt indexes are taken"
        raise wrong("device_info", instance.what, f"it gave {info!r}, {most}")
    return info


def checked_irq(what: str, told: IrqInfo) -> IrqInfo:
    """What a device said of an interrupt index, if that can be. Raises OperationFailed."""
    if not isinstance(told, IrqInfo) or not 0 <= told.count <= MAX_VECTORS:
        raise wrong("irq_info", what, f"it gave {told!r}")
    if told.type is None and told.messages:
        raise wrong("irq_info", what, "it gave messages for an index without a type")
    if told.type is not None and not _fits(told):
        raise wrong("irq_info", what, f"it has {told.count} vectors, and gave {told!r:.200}")
    return told


def _fits(told: IrqInfo) -> bool:
    """Whether a stranger's messages can be told as the kernel would tell them."""
    kind = told.type
    return (
        isinstance(kind, vfio.IrqTypeCap)
        and 0 <= kind.type < 1 << 32
        and 0 <= kind.subtype < 1 << 32
        and isinstance(told.messages, tuple)
        and len(told.messages) <= told.count
        and all(isinstance(one, vfio.MsiMessage) for one in told.messages)
        and all(0 <= one.address < 1 << 64 and 0 <= one.data < 1 << 32 for one in told.messages)
    )
