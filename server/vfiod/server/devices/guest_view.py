"""Laying what a guest sees over what the device is: configuration space, MSI-X table, ROM.

Follows QEMU ``hw/vfio/pci.c`` (``vfio_pci_size_rom``, ``vfio_pci_fixup_msix_region``) and sections 4 and 5 of the
reference on device behaviour.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.server.backends.base import Backend
from vfiod.server.devices.config.layout import EXPRESS_SIZE, ROM_LEAST, STANDARD_SIZE
from vfiod.server.devices.config.space import VirtualConfig
from vfiod.server.devices.config.table import MsixTable
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.guest_irqs import MSIX, GuestInterrupts
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.devices.overlays import ConfigOverlay, MsixOverlay, Read, RomOverlay
from vfiod.server.devices.regions import BAR_COUNT, CONFIG, ROM, Region
from vfiod.server.devices.rom import Rom, read_rom
from vfiod.server.devices.romfile import RomFile
from vfiod.server.logs import about

__all__ = ["AS_QEMU", "Shown", "lay_over", "place_rom", "virtual_config"]

_log: Final = logging.getLogger(__name__)

_ROM_PROBE: Final = 2
"""Bytes read of a ROM to see that it can be read: its signature."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What the guest sees otherwise than the device is.

    Attributes:
        multifunction: the multifunction bit.
        rombar: whether it sees a ROM.
        romfile: a file that it sees as the ROM, read already; None: the device's own.

    """

    multifunction: bool = False
    rombar: bool = True
    romfile: RomFile | None = None


AS_QEMU: Final = Shown()
"""QEMU's defaults."""


def place_rom(device: str, backend: Backend, region: Region, shown: Shown) -> None:
    """Decide what the ROM region is. One that cannot be read is dropped with a warning, no failure. Blocks."""
    if not shown.rombar:
        _drop_rom(region, "rombar=false, or an empty romfile: the guest sees no ROM")
    elif shown.romfile is not None:
        _stand_in(region, shown.romfile)
    elif region.info.present:
        try:
            backend.region_read(ROM, 0, min(_ROM_PROBE, region.info.size))
        except CommandError as error:
            _log.warning(
                "The ROM of device %s cannot be read and is left out: %s", device, error, extra=about(device=device)
            )
            _drop_rom(region, f"the device has a ROM of {region.info.size} bytes, which cannot be read: {error}")
            return
        size = region.info.size
        region.overlay = RomOverlay(Rom(size, lambda: read_rom(backend, ROM, size)))
        region.areas = ()


def _drop_rom(region: Region, why: str) -> None:
    region.note = why
    region.info = replace(region.info, size=0)
    region.areas = ()


def _stand_in(region: Region, romfile: RomFile) -> None:
    image = romfile.image
    size = max(1 << (len(image) - 1).bit_length(), ROM_LEAST)
    region.info = vfio.RegionInfo(ROM, vfio.RegionFlags.READ, size)
    region.note = f"romfile '{romfile.name}': {len(image)} bytes, in place of the device's own"
    region.areas = ()
    region.overlay = RomOverlay(Rom(size, lambda: image))


def virtual_config(
    device: str, backend: Backend, regions: Sequence[Region], *, has_intx: bool, shown: Shown
) -> VirtualConfig:
    """Read configuration space whole, and make the guest's of it. Blocks. OperationFailed."""
    whole = regions[CONFIG].info.size
    size = EXPRESS_SIZE if whole >= EXPRESS_SIZE else min(STANDARD_SIZE, whole)
    image = backend.region_read(CONFIG, 0, size).ljust(STANDARD_SIZE, b"\0")
    config = VirtualConfig(
        image,
        bars={index: regions[index].info.size for index in range(BAR_COUNT)},
        rom=regions[ROM].info.size,
        intx=has_intx,
        multifunction=shown.multifunction,
    )
    for warning in config.warnings:
        _log.warning("Device %s: %s", device, warning, extra=about(device=device))
    return config


def lay_over(
    device: str,
    regions: Sequence[Region],
    config: VirtualConfig,
    interrupts: DeviceInterrupts,
    environment: Environment,
    *,
    read: Read,
) -> MsixTable | None:
    """Put the guest's configuration space and MSI-X table over the device's, and let them drive its interrupts.

    Gives the table; None: it has none.
    """
    place = config.msix if interrupts.indexes[MSIX].info.count else None
    table = None if place is None else MsixTable(place.vectors)
    guest = GuestInterrupts(device, config, table, interrupts, environment)
    regions[CONFIG].overlay = ConfigOverlay(config, guest.config_written, read)
    if place is None or table is None:
        return None
    for bar in {place.table_bar, place.pba_bar}:
        regions[bar].overlay = MsixOverlay(place, bar, table, lambda: config.guest.masked, guest.table_written)
    region = regions[place.table_bar]
    if not region.info.msix_mappable:
        why = "the MSI-X table takes all of its pages, and the host lets nobody map it (no MSIX_MAPPABLE)"
        region.leave_out(place.table_offset, place.table_size, why)
    return table
