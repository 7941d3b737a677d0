"""Every command, once: what its request and its reply are made of, who asks, and which fds may come along."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from vfiod.protocol.vfio_user import device, dma, regions
from vfiod.protocol.vfio_user.header import Command, Direction
from vfiod.protocol.vfio_user.payload import Nothing, Payload
from vfiod.protocol.vfio_user.version import Version

__all__ = ["ASKED_OF_CLIENT", "ASKED_OF_SERVER", "COMMAND_OF", "MESSAGES", "MessageKind"]

ANY: Final = -1


class MessageKind(Struct, frozen=True):
    """One command.

    Attributes:
        request: the request's body.
        reply: the reply's body; an error reply has none, whatever the command.
        direction: who asks.
        request_fds: fds a request may have; -1: what the body says (DEVICE_SET_IRQS).
        reply_fds: fds a reply may have; -1: up to the asker's limit.

    """

    request: type[Payload]
    reply: type[Payload]
    direction: Direction = Direction.TO_SERVER
    request_fds: int = 0
    reply_fds: int = 0


MESSAGES: Final[dict[Command, MessageKind]] = {
    Command.VERSION: MessageKind(Version, Version, reply_fds=ANY),
    Command.DMA_MAP: MessageKind(dma.DmaMap, Nothing, request_fds=1),
    Command.DMA_UNMAP: MessageKind(dma.DmaUnmap, Nothing),
    Command.DEVICE_GET_INFO: MessageKind(device.GetDeviceInfo, device.DeviceInfoReply),
    Command.DEVICE_GET_REGION_INFO: MessageKind(regions.GetRegionInfo, regions.RegionInfoReply, reply_fds=ANY),
    Command.DEVICE_GET_REGION_IO_FDS: MessageKind(regions.GetRegionIoFds, regions.RegionIoFds, reply_fds=ANY),
    Command.DEVICE_GET_IRQ_INFO: MessageKind(device.GetIrqInfo, device.IrqInfoReply),
    Command.DEVICE_SET_IRQS: MessageKind(device.SetIrqs, Nothing, request_fds=ANY),
    Command.REGION_READ: MessageKind(regions.RegionRead, regions.RegionData),
    Command.REGION_WRITE: MessageKind(regions.RegionWrite, regions.RegionWritten),
    Command.DMA_READ: MessageKind(dma.DmaRead, dma.DmaData, Direction.TO_CLIENT),
    Command.DMA_WRITE: MessageKind(dma.DmaWrite, dma.DmaWritten, Direction.TO_CLIENT),
    Command.DEVICE_RESET: MessageKind(Nothing, Nothing),
    Command.REGION_WRITE_MULTI: MessageKind(regions.WriteMulti, regions.WroteMulti),
    Command.DEVICE_FEATURE: MessageKind(device.DeviceFeature, device.DeviceFeature),
    Command.MIG_DATA_READ: MessageKind(device.MigrationRead, device.MigrationData),
    Command.MIG_DATA_WRITE: MessageKind(device.MigrationWrite, Nothing),
}
"""The reply to DMA_UNMAP is the request again (a :class:`~vfiod.protocol.vfio_user.dma.DmaUnmap` may be sent); what is
in it tells nothing, so it is read as nothing."""

ASKED_OF_SERVER: Final = frozenset(c for c, kind in MESSAGES.items() if kind.direction is Direction.TO_SERVER)
"""What a server answers."""

ASKED_OF_CLIENT: Final = frozenset(c for c, kind in MESSAGES.items() if kind.direction is Direction.TO_CLIENT)
"""What a client answers, on the same socket or on the twin socket."""

COMMAND_OF: Final[dict[type[Payload], Command]] = {
    kind.request: command for command, kind in MESSAGES.items() if kind.request is not Nothing
}
"""The command a request's body belongs to; DEVICE_RESET has none."""
