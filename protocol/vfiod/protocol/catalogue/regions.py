"""Family "regions": registers and device memory."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, Force, RegionName, UnsetType
from vfiod.protocol.limits import MAX_REGION_TRANSFER

Offset = Annotated[int, Meta(ge=0, description="Where in the region, in bytes.")]
AccessSize = Annotated[Literal[1, 2, 4, 8], Meta(description="One access of this many bytes, little-endian.")]
Length = Annotated[
    int, Meta(ge=1, le=MAX_REGION_TRANSFER, description="How many bytes, by the widest accesses that fit.")
]


class Area(Result):
    """A part of a region that may be mapped."""

    offset: int
    size: int


class RegionInfo(Result):
    """One region of a device."""

    device: str
    region: Annotated[int, Meta(description="VFIO index.")]
    name: str
    size: Annotated[int, Meta(description="Bytes; 0 when the device has no such region.")]
    readable: bool
    writable: bool
    mappable: bool
    mapped: Annotated[bool, Meta(description="Whether commands go by the fast path at this moment.")]
    areas: Annotated[list[Area], Meta(description="What may be mapped.")]
    type: Annotated[int | UnsetType, Meta(description="VFIO_REGION_INFO_CAP_TYPE.")] = UNSET
    subtype: int | UnsetType = UNSET
    msix_mappable: bool = False
    note: Annotated[str | UnsetType, Meta(description="Why it is slow, when it is.")] = UNSET


@command("query-regions", Family.REGIONS, oob=True, mutates=False)
class QueryRegions(Arguments[list[RegionInfo]]):
    """List the regions of a device, or of all."""

    device: str | UnsetType = UNSET


class RegionReadResult(Result):
    """``value`` for a sized access, ``data`` for bytes."""

    value: int | UnsetType = UNSET
    data: Annotated[bytes | UnsetType, Meta(description="base64")] = UNSET


@command("region-read", Family.REGIONS, device="device", mutates=False)
class RegionRead(Arguments[RegionReadResult]):
    """Read a register (``size``), or bytes (``length``). Reading a device may change it."""

    device: str
    region: RegionName
    offset: Offset
    size: AccessSize | UnsetType = UNSET
    length: Length | UnsetType = UNSET


@command("region-write", Family.REGIONS, device="device")
class RegionWrite(Arguments[Empty]):
    """Write a register (``size`` and ``value``), or bytes (``data``)."""

    device: str
    region: RegionName
    offset: Offset
    size: AccessSize | UnsetType = UNSET
    value: Annotated[int, Meta(ge=0, description="Below 2**(8*size).")] | UnsetType = UNSET
    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_REGION_TRANSFER, description="base64")] | UnsetType = UNSET
    force: Force = False


class RegionMapResult(Result):
    """Map the attached fd at ``offset`` plus an area's offset, page by page."""

    map_fd: int
    offset: Annotated[int, Meta(description="Where the region begins in the fd, in bytes.")]
    size: int
    areas: list[Area]


@command("region-map", Family.REGIONS, device="device")
class RegionMap(Arguments[RegionMapResult]):
    """Give out the fd through which a region can be mapped.

    For a kernel device this is the device's own fd: its receiver has full control of the device and keeps it
    open. ``share-fd=false`` forbids it. From then on vfiod cannot see every access, so an INTx is no longer
    completed by the first access: use ``irq-eoi`` or a resample eventfd.
    """

    device: str
    region: RegionName
    force: Force = False


@command("region-unmap", Family.REGIONS, device="device")
class RegionUnmap(Arguments[Empty]):
    """This session no longer holds a region that ``region-map`` gave it: it has unmapped it and closed the fd.

    A session that ends does so by itself. Nothing is taken back: an fd that is kept nevertheless keeps the device
    (``released`` of ``DEVICE_DELETED`` says so), and the slow path stays until the device is gone, because vfiod
    cannot know who else has the fd by now.
    """

    device: str
    region: RegionName


@event("REGION_MMAP_CHANGED", Family.REGIONS, rate_key=("device",))
class RegionMmapChanged(EventData):
    """The fast path of a device's regions went off (an INTx is pending) or came back."""

    device: str
    enabled: bool
