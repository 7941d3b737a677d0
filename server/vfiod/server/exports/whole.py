"""A client's accesses to regions that are requests and answers: those of a subchannel (``Device.whole_regions``).

The monitor shows such a region, and its commands write it. A client has what the kernel gives: the region as it is,
each access one access of the device, and the errno of what is refused, which says how the function ended (EBUSY:
condition code 2). So nothing is split, and a read that fails is not all ones.
"""

from __future__ import annotations

from collections.abc import Awaitable

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.errors import InvalidArgument
from vfiod.server.devices.device import Device
from vfiod.server.devices.regions import Region
from vfiod.server.exports.connection import Answer

__all__ = ["WholeRegions"]


class WholeRegions:
    """The regions of one device, for its client. On the loop.

    Args:
        device: the device.

    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def info(self, region: Region) -> vfio.RegionInfo:
        """As the device itself says. OperationFailed."""
        return self._device.backend.region_info(region.index)

    def read(self, region: Region, offset: int, count: int) -> Answer | Awaitable[Answer]:
        """REGION_READ, in the device's order: never while it takes a program. InvalidArgument, OperationFailed."""
        device = self._device
        device.regions.check(region, offset, count, write=False)

        def read() -> Answer:
            data = device.backend.region_read(region.index, offset, count)
            return Answer(vfio_user.RegionData(region.index, offset, data))

        return device.in_order("REGION_READ of an export", read)

    def write(self, region: Region, offset: int, data: bytes, done: Answer) -> Answer | Awaitable[Answer]:
        """REGION_WRITE: what the device takes it takes whole, in a thread unless it promised never to wait."""
        device = self._device
        if not self.info(region).writable:
            raise InvalidArgument(
                f"Region {region.name} of device '{device.name}' cannot be written: it is read-only", errno="EACCES"
            )
        device.regions.check(region, offset, len(data), write=False)  # its size: what may be written is said above
        if device.backend.prompt and device.lane.free:
            device.backend.region_write(region.index, offset, data)
            return done
        return self._write(region.index, offset, data, done)

    async def _write(self, index: int, offset: int, data: bytes, done: Answer) -> Answer:
        device = self._device
        async with device.lane.turn("REGION_WRITE of an export") as turn:
            backend = device.backend
            await turn.run(lambda: backend.region_write(index, offset, data))
        return done
