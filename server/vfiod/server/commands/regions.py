"""Family "regions": registers and device memory."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.regions import (
    Area,
    QueryRegions,
    RegionInfo,
    RegionMap,
    RegionMapResult,
    RegionRead,
    RegionReadResult,
    RegionUnmap,
    RegionWrite,
)
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.server.commands.call import Call, Handler

if TYPE_CHECKING:  # with the first device
    from vfiod.server.devices.device import Device
    from vfiod.server.devices.regions import Region

__all__ = ["HANDLERS"]


def query_regions(call: Call, arguments: QueryRegions) -> list[RegionInfo]:
    """List the regions of a device, or of all."""
    if arguments.device is not UNSET:
        return call.machine.device(arguments.device).region_infos()
    return [info for device in call.machine.devices.all() for info in device.region_infos()]


def region_read(call: Call, arguments: RegionRead) -> RegionReadResult | Awaitable[RegionReadResult]:
    """Read a register, or bytes."""
    device = call.machine.device(arguments.device)
    region = device.regions.find(arguments.region)
    offset, size, length = arguments.offset, arguments.size, arguments.length
    if size is not UNSET:
        if length is not UNSET:
            raise InvalidArgument("Parameters 'size' and 'length' exclude each other: a register, or bytes")
        if not region.ready or device.access_waits(region, offset, size, write=False):
            device.regions.check_sized(region, offset, size, write=False)
            return _read_sized(device, region, offset, size)
        return device.in_order("region-read", lambda: RegionReadResult(value=device.load(region, offset, size)))
    if length is UNSET:
        raise InvalidArgument("Parameter 'size' is missing: give 'size' for a register, or 'length' for bytes")
    from vfiod.server.devices.regions import INLINE_BYTES

    if length > INLINE_BYTES or not region.ready or device.access_waits(region, offset, length, write=False):
        return _read_long(device, region, offset, length)
    return device.in_order("region-read", lambda: RegionReadResult(data=device.read_now(region, offset, length)))


async def _read_sized(device: Device, region: Region, offset: int, size: int) -> RegionReadResult:
    return RegionReadResult(value=int.from_bytes(await device.read(region, offset, size), "little"))


async def _read_long(device: Device, region: Region, offset: int, length: int) -> RegionReadResult:
    return RegionReadResult(data=await device.read(region, offset, length))


def region_write(call: Call, arguments: RegionWrite) -> Empty | Awaitable[Empty]:
    """Write a register, or bytes."""
    device = call.device_to_change(arguments.device)
    region = device.regions.find(arguments.region)
    offset, size, value, data = arguments.offset, arguments.size, arguments.value, arguments.data
    if data is not UNSET:
        if size is not UNSET or value is not UNSET:
            raise InvalidArgument("Parameter 'data' excludes 'size' and 'value': a register, or bytes")
        return _write_bytes(device, region, offset, data)
    if size is UNSET or value is UNSET:
        missing = "size" if size is UNSET else "value"
        raise InvalidArgument(
            f"Parameter '{missing}' is missing: give 'size' and 'value' for a register, or 'data' for bytes"
        )

    def store() -> Empty:
        device.store(region, offset, size, value)
        return Empty()

    if device.access_waits(region, offset, size, write=True):
        return _write_sized(device, region, offset, size, value)
    return device.in_order("region-write", store)


def _write_bytes(device: Device, region: Region, offset: int, data: bytes) -> Empty | Awaitable[Empty]:
    from vfiod.server.devices.regions import INLINE_BYTES

    def write() -> Empty:
        device.write_now(region, offset, data)
        return Empty()

    if len(data) <= INLINE_BYTES and not device.access_waits(region, offset, len(data), write=True):
        return device.in_order("region-write", write)
    return _write_long(device, region, offset, data)


async def _write_sized(device: Device, region: Region, offset: int, size: int, value: int) -> Empty:
    device.regions.check_sized(region, offset, size, write=True)
    if not 0 <= value < 1 << 8 * size:
        raise InvalidArgument(f"Parameter 'value' is {value}, which does not fit {size} bytes")
    return await _write_long(device, region, offset, value.to_bytes(size, "little"))


async def _write_long(device: Device, region: Region, offset: int, data: bytes) -> Empty:
    await device.write(region, offset, data)
    return Empty()


def region_map(call: Call, arguments: RegionMap) -> RegionMapResult | Awaitable[RegionMapResult]:
    """Give out the fd through which a region can be mapped."""
    device = call.device_to_change(arguments.device)
    region = device.regions.find(arguments.region)
    session = call.session
    if session is None or not call.carries_fds:
        raise InvalidArgument("region-map gives out an fd, and this reply can carry none: ask singly, on a Unix socket")

    def give() -> RegionMapResult:
        return RegionMapResult(
            map_fd=call.attach(device.map_region(region, session.id)),
            offset=region.info.offset,
            size=region.info.size,
            areas=[Area(offset=offset, size=size) for offset, size in region.areas],
        )

    return device.in_order_on_loop("region-map", give)


def region_unmap(call: Call, arguments: RegionUnmap) -> Empty | Awaitable[Empty]:
    """This session no longer holds a region. At once, whatever the device is at: nothing of the device is touched."""
    device = call.machine.device(arguments.device)
    region = device.regions.find(arguments.region)
    session = call.session
    call.machine.unmap_region(device, region, None if session is None else session.id)
    return Empty()


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    QueryRegions: query_regions,
    RegionRead: region_read,
    RegionWrite: region_write,
    RegionMap: region_map,
    RegionUnmap: region_unmap,
}
