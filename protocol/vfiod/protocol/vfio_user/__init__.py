"""vfio-user: the protocol between a hypervisor and a program that is a device, sans-I/O, for both sides.

Source: QEMU ``docs/interop/vfio-user.rst`` (QEMU 10.1 and later), and what QEMU and libvfio-user really send.

::

    bytes, fds ──► framing ──► channel ──► Request, Reply, …        one socket, either side
                  whole        ids, who may ask what
                  messages     messages: which body which command has
                               version │ device │ regions │ dma: the bodies
"""

from __future__ import annotations

from vfiod.protocol.vfio_user.channel import (
    Broken,
    Channel,
    Failure,
    Happening,
    Outgoing,
    Rejected,
    Reply,
    Request,
    errno_number,
)
from vfiod.protocol.vfio_user.device import (
    DeviceFeature,
    DeviceInfoReply,
    GetDeviceInfo,
    GetIrqInfo,
    IrqInfoReply,
    MigrationData,
    MigrationRead,
    MigrationWrite,
    SetIrqs,
    split_irqs,
)
from vfiod.protocol.vfio_user.dma import DmaData, DmaFlags, DmaMap, DmaRead, DmaUnmap, DmaWrite, DmaWritten
from vfiod.protocol.vfio_user.framing import FrameError, Framer, Message
from vfiod.protocol.vfio_user.header import (
    HEADER_SIZE,
    BadMessage,
    Command,
    Direction,
    Flags,
    Header,
    MessageType,
)
from vfiod.protocol.vfio_user.messages import ASKED_OF_CLIENT, ASKED_OF_SERVER, COMMAND_OF, MESSAGES, MessageKind
from vfiod.protocol.vfio_user.payload import SPECIFIED, CountWidth, Nothing, Payload, Wire
from vfiod.protocol.vfio_user.regions import (
    GetRegionInfo,
    GetRegionIoFds,
    IoFdFlags,
    IoFdType,
    OneWrite,
    RegionData,
    RegionInfoReply,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    RegionWritten,
    SubRegion,
    WriteMulti,
    WroteMulti,
)
from vfiod.protocol.vfio_user.version import (
    MAJOR,
    MINOR,
    OURS,
    Agreement,
    Capabilities,
    TwinSocket,
    Version,
    agree,
    answer,
)

__all__ = [
    "ASKED_OF_CLIENT",
    "ASKED_OF_SERVER",
    "Agreement",
    "BadMessage",
    "Broken",
    "COMMAND_OF",
    "Capabilities",
    "Channel",
    "Command",
    "CountWidth",
    "DeviceFeature",
    "DeviceInfoReply",
    "Direction",
    "DmaData",
    "DmaFlags",
    "DmaMap",
    "DmaRead",
    "DmaUnmap",
    "DmaWrite",
    "DmaWritten",
    "Failure",
    "Flags",
    "FrameError",
    "Framer",
    "GetDeviceInfo",
    "GetIrqInfo",
    "GetRegionInfo",
    "GetRegionIoFds",
    "HEADER_SIZE",
    "Happening",
    "Header",
    "IoFdFlags",
    "IoFdType",
    "IrqInfoReply",
    "MAJOR",
    "MESSAGES",
    "MINOR",
    "Message",
    "MessageKind",
    "MessageType",
    "MigrationData",
    "MigrationRead",
    "MigrationWrite",
    "Nothing",
    "OURS",
    "OneWrite",
    "Outgoing",
    "Payload",
    "RegionData",
    "RegionInfoReply",
    "RegionIoFds",
    "RegionRead",
    "RegionWrite",
    "RegionWritten",
    "Rejected",
    "Reply",
    "Request",
    "SPECIFIED",
    "SetIrqs",
    "SubRegion",
    "TwinSocket",
    "Version",
    "Wire",
    "WriteMulti",
    "WroteMulti",
    "agree",
    "answer",
    "errno_number",
    "split_irqs",
]
