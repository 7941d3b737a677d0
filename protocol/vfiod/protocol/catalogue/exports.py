"""Family "exports": doors for hypervisors, one per device."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, FdName, Id, UnsetType

__all__ = [
    "DeviceExportAdd",
    "DeviceExportAttached",
    "DeviceExportDel",
    "DeviceExportDeleted",
    "DeviceExportDetached",
    "ExportClient",
    "ExportInfo",
    "ExportState",
    "ExportType",
    "QueryDeviceExports",
    "SocketMode",
]

SocketMode = Annotated[
    int,
    Meta(ge=0, le=0o777, description="Permission bits of the socket file, as a number: 384 is 0600, 432 is 0660."),
]


class ExportType(enum.StrEnum):
    """What an export speaks."""

    VFIO_USER = "vfio-user"


class ExportState(enum.StrEnum):
    """Where an export is. ``detaching``: its client is gone, and what it had is being taken back."""

    LISTENING = "listening"
    NEGOTIATING = "negotiating"
    ATTACHED = "attached"
    DETACHING = "detaching"


class ExportClient(Result):
    """Who has attached."""

    pid: Annotated[int, Meta(description="Its process; 0 in another pid namespace.")]
    uid: int
    version: Annotated[str, Meta(description="The version it proposed.")]
    mappings: Annotated[int, Meta(description="Pieces of memory it has mapped.")]
    mapped_bytes: int
    unreachable_bytes: Annotated[
        int, Meta(description="How much of it the device cannot reach: it came without a file (share=on is missing).")
    ]
    requests: Annotated[int, Meta(description="Requests it has sent.")]
    errors: Annotated[int, Meta(description="Requests that failed.")]
    failed_reads: Annotated[int, Meta(description="Reads of registers that failed, and gave it all ones.")]


class ExportInfo(Result, kw_only=True):
    """One export."""

    id: str
    type: ExportType
    device: str
    state: ExportState
    path: Annotated[str | UnsetType, Meta(description="Its socket; absent: the socket was passed as an fd.")] = UNSET
    client: ExportClient | UnsetType = UNSET
    attached: Annotated[int, Meta(description="How many clients have attached so far.")]


@command("device-export-add", Family.EXPORTS, slow=True, device="device")
class DeviceExportAdd(Arguments[Empty]):
    """Offer a device to a hypervisor by a socket: ``-device vfio-user-pci`` of QEMU attaches there.

    One client at a time; the next may attach when it is gone. While one is attached the monitor may look at the
    device, but changes nothing of it unless ``force`` is given. Sockets are for the server's own user and root
    (mode 0600), and for the users of ``--allow-uid`` with a mode and group that let them in.
    """

    id: Id
    type: ExportType
    device: Annotated[str, Meta(description="The device's id, or its path.")]
    path: Annotated[str | UnsetType, Meta(description="Of the socket to make.")] = UNSET
    fd: Annotated[
        FdName | UnsetType, Meta(description="Instead: a Unix socket that listens, or one that is connected already.")
    ] = UNSET
    socket_mode: SocketMode | UnsetType = UNSET
    socket_group: Annotated[
        str | UnsetType, Meta(description="The socket's group, by name or number; its mode is 0660 then.")
    ] = UNSET


@command("device-export-del", Family.EXPORTS)
class DeviceExportDel(Arguments[Empty]):
    """Close an export. Refused while a client is attached, unless ``force`` is given: then it is disconnected.

    Ends in one ``DEVICE_EXPORT_DELETED``. The device stays.
    """

    id: Id
    force: bool = False


@command("query-device-exports", Family.EXPORTS, oob=True, mutates=False)
class QueryDeviceExports(Arguments[list[ExportInfo]]):
    """List exports, and who is attached."""


@event("DEVICE_EXPORT_ATTACHED", Family.EXPORTS)
class DeviceExportAttached(EventData):
    """A client has attached to an export."""

    id: str
    device: str
    pid: int
    uid: int


@event("DEVICE_EXPORT_DETACHED", Family.EXPORTS)
class DeviceExportDetached(EventData):
    """A client is gone.

    Its memory is unmapped, its interrupts are disarmed, the device masters the bus no more.
    """

    id: str
    device: str
    reason: str


@event("DEVICE_EXPORT_DELETED", Family.EXPORTS)
class DeviceExportDeleted(EventData):
    """An export is gone."""

    id: str
    device: str
