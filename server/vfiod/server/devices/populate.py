"""Reading what a PCI device has when it is added, and refusing what cannot work.

Follows QEMU ``hw/vfio/pci.c`` (``vfio_pci_populate_device``, ``vfio_pci_size_rom``), and section 1 of the reference
on device behaviour.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError, OperationFailed
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.config.space import VirtualConfig
from vfiod.server.devices.config.table import MsixTable
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.guest_view import Shown, lay_over, place_rom, virtual_config
from vfiod.server.devices.irq_index import INTX, IRQ_NAMES, PciIrqIndex
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.devices.model import Model
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.pci_config import HEADER_BYTES, ConfigSpace
from vfiod.server.devices.regions import CONFIG, ROM, VGA, Region, Regions, describe_pci
from vfiod.server.logs import about

__all__ = ["PciModel", "populate"]

_log: Final = logging.getLogger(__name__)

_LEAST_REGIONS: Final = CONFIG + 1
"""BARs, ROM and config: VGA came later, and not every backend lists it."""

_LEAST_IRQS: Final = int(vfio.PciIrq.MSIX) + 1
"""INTx, MSI, MSI-X: ERR and REQ came later."""


class PciModel(Model, frozen=True, kw_only=True):
    """Everything of a PCI device that is open.

    Attributes:
        config: configuration space.
        virtual: the same as the guest sees it.
        table: the guest's MSI-X table; None: it has none that is virtualised.

    """

    config: ConfigSpace
    virtual: VirtualConfig
    table: MsixTable | None


def populate(
    device: str,
    backend: Backend,
    environment: Environment,
    *,
    no_mmap: bool,
    mmap_timeout_ms: int,
    on_trap: Callable[[bool], None],
    shown: Shown,
) -> PciModel:
    """Read a device. Blocks; in a worker. Nothing is armed; the backend stays open when it fails.

    Raises CommandError: it is no PCI device, or has less than one must have; OperationFailed.
    """
    info = backend.info()
    if not info.flags & vfio.DeviceFlags.PCI:
        raise CommandError(f"{backend.name} is not a PCI device: driver vfio-pci cannot serve it", errno="EINVAL")
    if info.num_regions < _LEAST_REGIONS or info.num_irqs < _LEAST_IRQS:
        raise CommandError(
            f"{backend.name} has {info.num_regions} regions and {info.num_irqs} interrupt indexes: a PCI device has at "
            f"least {_LEAST_REGIONS} and {_LEAST_IRQS}",
            errno="EINVAL",
        )
    regions = tuple(_region(device, backend, index) for index in range(info.num_regions))
    indexes = tuple(_irq(device, backend, index) for index in range(info.num_irqs))
    config = _config(backend, regions[CONFIG])
    place_rom(device, backend, regions[ROM], shown)
    virtual = virtual_config(device, backend, regions, has_intx=indexes[INTX].info.count > 0, shown=shown)
    migratable = backend.probe_feature(int(vfio.Feature.MIGRATION))
    model_regions = Regions(device, backend, regions, no_mmap=no_mmap, foreign=backend.foreign)
    model_regions.decodes = config.decodes()
    interrupts = DeviceInterrupts(
        device,
        backend,
        indexes,
        environment,
        mmap_timeout_ms=mmap_timeout_ms,
        by_access=lambda: not model_regions.shared,
        on_trap=on_trap,
        on_kind=virtual.sync,
    )
    table = lay_over(
        device,
        regions,
        virtual,
        interrupts,
        environment,
        read=lambda offset, length: backend.region_read(CONFIG, offset, length),
    )
    notices = Notices(device, backend, tuple(one for one in indexes if one.reserved and one.info.count))
    return PciModel(
        backend, info, model_regions, interrupts, notices, migratable, config=config, virtual=virtual, table=table
    )


def _region(device: str, backend: Backend, index: int) -> Region:
    try:
        info = backend.region_info(index)
    except OperationFailed as error:
        # VGA, and what a later kernel may list, is absent; the others belong to every PCI device.
        if index < VGA or error.errno != "EINVAL":
            raise
        info = vfio.RegionInfo(index)
    region = describe_pci(index, info)
    if trace.device_populated_region.on:
        trace.device_populated_region(device=device, region=region.name, size=f"0x{info.size:x}", flags=info.flags)
    return region


def _irq(device: str, backend: Backend, index: int) -> PciIrqIndex:
    try:
        info = backend.irq_info(index)
    except OperationFailed as error:
        # The kernel has no ERR on a conventional bus, and mediated drivers say EINVAL to whatever they do not have
        # (mtty to MSI-X, ERR and REQ).
        if error.errno != "EINVAL":
            raise
        info = vfio.IrqInfo(index)
    one = PciIrqIndex(device, info)
    if one.reserved and not info.count and index < len(IRQ_NAMES):
        _log.info("Device %s has no %s interrupt", device, one.name, extra=about(device=device))
    if trace.device_populated_irq.on:
        trace.device_populated_irq(device=device, index=index, count=info.count, flags=info.flags)
    return one


def _config(backend: Backend, region: Region) -> ConfigSpace:
    if region.info.size < HEADER_BYTES:
        raise CommandError(
            f"{backend.name} has a configuration space of {region.info.size} bytes: a PCI device has at least "
            f"{HEADER_BYTES}",
            errno="EINVAL",
        )
    config = ConfigSpace(backend)
    if not config.answers:
        raise CommandError(
            f"The configuration space of {backend.name} reads all ones: the device does not answer; "
            "it may be powered down, or gone",
            errno="EIO",
        )
    return config
