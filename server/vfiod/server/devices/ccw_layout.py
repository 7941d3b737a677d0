"""What a subchannel has: its regions, found by their type capability, and its interrupts. Read once, when it is opened.

Source: ``include/uapi/linux/vfio_ccw.h``; the sizes are those of its structures.
"""

from __future__ import annotations

from typing import Final

from msgspec import structs

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.protocol.vfio.ccw import (
    CRW_REGION_SIZE,
    SCHIB_REGION_SIZE,
    CcwCmdRegion,
    CcwIoRegion,
    CcwIrq,
    CcwRegion,
    CcwSubtype,
)
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.model import Model
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.own_irqs import OwnInterrupts, OwnIrqIndex
from vfiod.server.devices.regions import Region, Regions, describe

__all__ = ["CcwIrqIndex", "CcwModel", "open_subchannel"]

_NAMES: Final = {CcwSubtype.ASYNC_CMD: "command", CcwSubtype.SCHIB: "schib", CcwSubtype.CRW: "crw"}
_SIZES: Final = {
    CcwSubtype.ASYNC_CMD: CcwCmdRegion.LAYOUT.size,
    CcwSubtype.SCHIB: SCHIB_REGION_SIZE,
    CcwSubtype.CRW: CRW_REGION_SIZE,
}
_KNOWN: Final = frozenset(int(one) for one in CcwIrq)


class CcwIrqIndex(OwnIrqIndex, frozen=True):
    """``io``, ``crw``, ``req``."""

    NAMES = ("io", "crw", "req")
    EVENTS = ("the reply to ccw-request, or the event CCW_IO", "the event CCW_CRW", "the event DEVICE_REQUESTED")


class CcwModel(Model, frozen=True, kw_only=True):
    """Everything of a subchannel that is open.

    Attributes:
        own: its interrupts, to count them.
        io: index of the I/O region.
        found: indexes of the others, as far as the kernel has them.

    """

    own: OwnInterrupts
    io: int
    found: dict[CcwSubtype, int]


def open_subchannel(device: str, backend: Backend) -> CcwModel:
    """Read a subchannel. Blocks; in a worker.

    Args:
        device: what it is called, for messages.
        backend: where it comes from; left open when this fails.

    Raises CommandError: it is no CCW device, has less than one must have, or a region of a wrong size; OperationFailed.

    """
    info = backend.info()
    if not info.flags & vfio.DeviceFlags.CCW:
        raise CommandError(f"{backend.name} is not a CCW device: driver vfio-ccw cannot serve it", errno="EINVAL")
    if info.num_regions < 1 or info.num_irqs < 1:
        raise CommandError(
            f"{backend.name} has {info.num_regions} regions and {info.num_irqs} interrupt indexes: a CCW device "
            "has an I/O region and an I/O interrupt at least",
            errno="EINVAL",
        )
    regions, found = _regions(device, backend, info.num_regions)
    indexes = [_irq(device, backend, index) for index in range(info.num_irqs)]
    if not indexes[CcwIrq.IO].info.count:
        raise CommandError(f"{backend.name} has no I/O interrupt: no request could end", errno="EINVAL")
    own = OwnInterrupts(device, indexes)
    notices = Notices(device, backend, tuple(one for one in indexes if one.info.count and one.index in _KNOWN))
    return CcwModel(
        backend,
        info,
        Regions(device, backend, tuple(regions), no_mmap=True),
        own,
        notices,
        migratable=False,
        own=own,
        io=int(CcwRegion.CONFIG),
        found=found,
    )


def _regions(device: str, backend: Backend, count: int) -> tuple[list[Region], dict[CcwSubtype, int]]:
    """Every region, described for reading only: they are written by commands. Which is which, by capability."""
    regions: list[Region] = []
    found: dict[CcwSubtype, int] = {}
    for index in range(count):
        info = backend.region_info(index)
        name = "io" if index == CcwRegion.CONFIG else None
        kind = next((one for one in info.capabilities if isinstance(one, vfio.RegionTypeCap)), None)
        if kind is not None and kind.type == vfio.RegionType.CCW and kind.subtype in set(CcwSubtype):
            subtype = CcwSubtype(kind.subtype)
            name = _NAMES[subtype]
            _check_size(backend, name, info.size, _SIZES[subtype])
            found.setdefault(subtype, index)
        elif index == CcwRegion.CONFIG:
            _check_size(backend, "io", info.size, CcwIoRegion.LAYOUT.size)
        shown = structs.replace(info, flags=info.flags & vfio.RegionFlags.READ)
        region = describe(index, shown, name)
        region.note = "written by the ccw commands"
        regions.append(region)
        if trace.device_populated_region.on:
            trace.device_populated_region(device=device, region=region.name, size=f"0x{info.size:x}", flags=info.flags)
    return regions, found


def _check_size(backend: Backend, name: str, size: int, wanted: int) -> None:
    if size != wanted:
        raise CommandError(
            f"The {name} region of {backend.name} has {size} bytes, it must have {wanted}", errno="EINVAL"
        )


def _irq(device: str, backend: Backend, index: int) -> CcwIrqIndex:
    one = CcwIrqIndex(device, backend.irq_info(index))
    if trace.device_populated_irq.on:
        trace.device_populated_irq(device=device, index=index, count=one.info.count, flags=one.info.flags)
    return one
