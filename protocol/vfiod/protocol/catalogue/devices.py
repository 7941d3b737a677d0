"""Family "devices": adding, removing, looking."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any, Final

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.fds import FdsetInfo
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.mediated import MdevInfo
from vfiod.protocol.catalogue.memory import MappingInfo
from vfiod.protocol.catalogue.monitor import MachineRestored, StatusInfo
from vfiod.protocol.catalogue.objects import ObjectInfo
from vfiod.protocol.catalogue.words import (
    UNSET,
    DeviceState,
    FdName,
    Id,
    IrqKind,
    Milliseconds,
    UnsetType,
    Uuid,
)
from vfiod.protocol.limits import DEFAULT_MMAP_TIMEOUT_MS, DEFAULT_MSG_TIMEOUT_MS, DEFAULT_UNPLUG_TIMEOUT_MS


class Driver(enum.StrEnum):
    """Device drivers, by QEMU's names."""

    VFIO_PCI = "vfio-pci"
    VFIO_PLATFORM = "vfio-platform"
    VFIO_CCW = "vfio-ccw"
    VFIO_AP = "vfio-ap"


SECRET: Final = frozenset({"vf-token"})
"""Arguments whose values stand in no log and in no error."""

ONLY_OF: Final[Mapping[str, frozenset[Driver]]] = {
    "vf-token": frozenset({Driver.VFIO_PCI}),
    "romfile": frozenset({Driver.VFIO_PCI}),
    "rombar": frozenset({Driver.VFIO_PCI}),
    "multifunction": frozenset({Driver.VFIO_PCI}),
    "x-intx-mmap-timeout-ms": frozenset({Driver.VFIO_PCI}),
    "mmap-timeout-ms": frozenset({Driver.VFIO_PCI, Driver.VFIO_PLATFORM}),
    "x-irqfd": frozenset({Driver.VFIO_PLATFORM}),
    "x-no-mmap": frozenset({Driver.VFIO_PCI, Driver.VFIO_PLATFORM}),
}
"""Properties of ``device_add`` that not every driver has; those that are not here, every driver has."""


def has_property(driver: Driver, name: str) -> bool:
    """Whether a driver has the property of this name (as on the wire)."""
    return driver in ONLY_OF.get(name, (driver,))


class OnRequest(enum.StrEnum):
    """What a host's request for the device (the REQ interrupt) does."""

    EVENT = "event"
    DELETE = "delete"


class Check(Result):
    """One check of ``device_add``, as ``x-dry-run`` reports it."""

    name: Annotated[
        str, Meta(description="viable, container, memory-lock, open-files, interrupt-remapping, reset, ...")
    ]
    ok: bool
    detail: Annotated[str, Meta(description="What was found; when not ok, what would be right.")]


class DeviceAddResult(Result):
    """``{}``, unless it was a dry run."""

    possible: bool | UnsetType = UNSET
    checks: list[Check] | UnsetType = UNSET


@command("device_add", Family.DEVICES, slow=True, device="id")
class DeviceAdd(Arguments[DeviceAddResult]):
    """Add a device from exactly one origin.

    Kernel group: ``host`` or ``sysfsdev`` with ``group-fd`` (once per group; later devices of the group need
    none), and ``container-fd``, or ``container`` with the id of an object, when the manager passes its own.
    Kernel cdev: ``fd`` with the device's own fd (``/dev/vfio/devices/vfioN``) and ``iommufd`` with the id of an object.
    Served by another program (vfio-user): ``socket``, or ``socket-fd`` with a socket that is connected to it.
    Mediated: ``mdev``. Opened here: ``host`` alone, when the server was started with ``--allow-open``.

    Succeeding consumes the fd names it was given; failing leaves them, and the machine, as they were.
    """

    # A plain string: QEMU's error for an unknown driver names it as a device model.
    driver: Annotated[str, Meta(description="The device driver: vfio-pci, vfio-platform, vfio-ccw or vfio-ap.")]
    id: Id | UnsetType = UNSET
    host: Annotated[
        str | UnsetType, Meta(description="Host address: [[DDDD:]BB:]DD.F, or a platform device's name.")
    ] = UNSET
    sysfsdev: Annotated[str | UnsetType, Meta(description="The host device's directory in sysfs.")] = UNSET
    group_fd: FdName | UnsetType = UNSET
    container_fd: FdName | UnsetType = UNSET
    container: Annotated[Id | UnsetType, Meta(description="The id of a vfio-container object.")] = UNSET
    fd: Annotated[FdName | UnsetType, Meta(description="The device's own fd (cdev).")] = UNSET
    iommufd: Annotated[Id | UnsetType, Meta(description="The id of an iommufd object.")] = UNSET
    mdev: Uuid | UnsetType = UNSET
    socket: Annotated[str | UnsetType, Meta(description="The path of a vfio-user server's socket.")] = UNSET
    socket_fd: Annotated[FdName | UnsetType, Meta(description="A socket that is connected to a vfio-user server.")] = (
        UNSET
    )
    x_msg_timeout: Annotated[
        Milliseconds | UnsetType,
        Meta(description=f"vfio-user: how long a reply may take; default {DEFAULT_MSG_TIMEOUT_MS} (QEMU's)."),
    ] = UNSET
    reconnect_ms: Annotated[
        Milliseconds | UnsetType,
        Meta(description="vfio-user: after which time to connect again to a server that went away; 0, default: never."),
    ] = UNSET
    vf_token: Annotated[
        Uuid | UnsetType,
        Meta(
            description="SR-IOV: the secret the users of a PF and of its VFs share (VFIO_DEVICE_FEATURE_PCI_VF_TOKEN)."
        ),
    ] = UNSET
    romfile: Annotated[
        str | UnsetType, Meta(description="A file whose bytes stand in for the device's ROM; empty: no ROM.")
    ] = UNSET
    rombar: Annotated[bool | UnsetType, Meta(description="Whether the guest sees a ROM BAR; default: true.")] = UNSET
    multifunction: Annotated[
        bool | UnsetType, Meta(description="Set or clear the multifunction bit; default: cleared (QEMU's).")
    ] = UNSET
    mmap_timeout_ms: Annotated[
        Milliseconds | UnsetType,
        Meta(description=f"Before the fast path returns after a level interrupt; default {DEFAULT_MMAP_TIMEOUT_MS}."),
    ] = UNSET
    x_intx_mmap_timeout_ms: Annotated[
        Milliseconds | UnsetType, Meta(description="QEMU's name for mmap-timeout-ms.")
    ] = UNSET
    share_fd: Annotated[bool, Meta(description="Whether region-map may give the device's fd away.")] = True
    on_request: OnRequest = OnRequest.EVENT
    on_request_timeout_ms: Annotated[
        Milliseconds, Meta(description="With on-request=delete: how long to wait for holders before forcing.")
    ] = DEFAULT_UNPLUG_TIMEOUT_MS
    x_irqfd: Annotated[
        bool | UnsetType,
        Meta(description="Whether interrupts may be direct, signalled by the kernel to the hypervisor; default: true."),
    ] = UNSET
    x_no_mmap: Annotated[
        bool | UnsetType, Meta(description="Never map regions: every access is a read or write; default: false.")
    ] = UNSET
    x_noiommu: Annotated[bool, Meta(description="Accept a noiommu group: the device can reach all memory.")] = False
    export: Annotated[
        str | UnsetType,
        Meta(
            description="Offer it to a hypervisor by a vfio-user socket at this path; the export's id is the device's."
        ),
    ] = UNSET
    x_dry_run: Annotated[bool, Meta(description="Make every check and report it; change nothing.")] = False


@command("device_del", Family.DEVICES, device="id")
class DeviceDel(Arguments[Empty]):
    """Start to remove a device; returns at once.

    Ends in one ``DEVICE_DELETED``, or, when holders remain after ``timeout-ms`` and ``force`` is not set, in
    one ``DEVICE_UNPLUG_ERROR`` that names them, and the device runs on. With ``force`` holders are not waited for.
    """

    id: Annotated[str, Meta(description="The device's id, or its path.")]
    force: bool = False
    timeout_ms: Milliseconds = DEFAULT_UNPLUG_TIMEOUT_MS


class PropertyInfo(Result):
    """QEMU's ``ObjectPropertyInfo``."""

    name: str
    type: str
    description: str
    default_value: Any | UnsetType = UNSET


@command("device-list-properties", Family.DEVICES, oob=True, mutates=False)
class DeviceListProperties(Arguments[list[PropertyInfo]]):
    """List what ``device_add`` takes for a driver."""

    typename: str


class Holder(Result):
    """Who keeps a device from being removed."""

    kind: Annotated[str, Meta(description="operation, mapping, export")]
    detail: str


class GroupInfo(Result):
    """The VFIO group a device came from."""

    id: int
    container: int
    noiommu: bool


class DeviceInfo(Result, kw_only=True):
    """One device."""

    id: str
    path: str
    driver: Driver
    backend: Annotated[str, Meta(description="kernel-group, kernel-cdev, mdev, vfio-user")]
    host: Annotated[str | UnsetType, Meta(description="Host address, or a mediated device's UUID.")] = UNSET
    state: DeviceState
    reset: Annotated[bool, Meta(description="Whether device-reset can reset it (VFIO_DEVICE_FLAGS_RESET).")]
    regions: Annotated[int, Meta(description="Region indexes the device has.")]
    irq_indexes: Annotated[int, Meta(description="Interrupt indexes the device has.")]
    irq_kind: IrqKind
    vendor_id: int | UnsetType = UNSET
    device_id: int | UnsetType = UNSET
    compatible: Annotated[
        list[str] | UnsetType | None,
        Meta(
            description="Of a platform device: compatible of its node in the host's device tree, best first; null: it "
            "has no such node (ACPI, a mediated device, a device of another program)."
        ),
    ] = UNSET
    group: GroupInfo | UnsetType = UNSET
    mdev: Annotated[
        MdevInfo | UnsetType, Meta(description="Of a mediated device: its type, parent and attributes.")
    ] = UNSET
    migratable: bool
    share_fd: bool
    fast_path: Annotated[bool, Meta(description="Whether mapped access is on at this moment.")]
    on_request: OnRequest
    requested: Annotated[int, Meta(description="How often the host has asked for the device.")]
    held_by: list[Holder]


@command("query-devices", Family.DEVICES, oob=True, mutates=False)
class QueryDevices(Arguments[list[DeviceInfo]]):
    """List devices with their state and who still holds them."""

    id: str | UnsetType = UNSET


class ContainerInfo(Result):
    """One IOMMU container."""

    id: int
    iommu: Annotated[str, Meta(description="type1v2, type1, noiommu")]
    passed: Annotated[bool, Meta(description="Passed in by the manager, rather than made here.")]
    groups: list[int]


class SessionInfo(Result):
    """One monitor session."""

    id: int
    dialect: str
    uid: int
    pid: int
    negotiated: bool
    events_lost: int
    role: Annotated[str, Meta(description="What it may do: operator, observer, or a role of --role.")]


class TopologyNode(Result, kw_only=True):
    """One thing of the picture."""

    id: Annotated[str, Meta(description="container:N, ioas:ID, mdev:UUID, group:N, device:ID, reset:N, host:ADDRESS")]
    kind: Annotated[str, Meta(description="machine, container, ioas, space, group, device, function, reset-domain")]
    label: str
    attributes: dict[str, str]


class TopologyEdge(Result):
    """What stands under what."""

    parent: str
    child: str


class Topology(Result, kw_only=True):
    """Containers, address spaces, groups, devices and reset domains, as a graph; or as text when one was asked for."""

    nodes: list[TopologyNode]
    edges: list[TopologyEdge]
    text: Annotated[str | UnsetType, Meta(description="With format=tree, dot or svg.")] = UNSET


class TopologyFormat(enum.StrEnum):
    """How ``query-topology`` draws."""

    JSON = "json"
    TREE = "tree"
    DOT = "dot"
    SVG = "svg"


@command("query-topology", Family.DEVICES, oob=True, mutates=False)
class QueryTopology(Arguments[Topology]):
    """Show containers, address spaces, groups, devices and reset domains: as a graph, a tree, or a picture."""

    format: TopologyFormat = TopologyFormat.JSON


class MachineInfo(Result):
    """Everything, at one moment."""

    seq: Annotated[int, Meta(description="The last event that is part of this picture.")]
    name: str
    uuid: str
    status: StatusInfo
    devices: list[DeviceInfo]
    irqs: list[IrqInfo]
    objects: list[ObjectInfo]
    containers: list[ContainerInfo]
    address_spaces: Annotated[
        list[str], Meta(description="container:N, mdev:UUID, vfio-user:ID; each has every mapping.")
    ]
    mappings: list[MappingInfo]
    fdsets: list[FdsetInfo]
    mdevs: list[str]
    sessions: list[SessionInfo]
    restored: Annotated[
        MachineRestored | UnsetType,
        Meta(description="What the event MACHINE_RESTORED said, when this server followed one that died."),
    ] = UNSET


@command("query-machine", Family.MONITOR, oob=True, mutates=False)
class QueryMachine(Arguments[MachineInfo]):
    """Return one consistent snapshot of everything, with the event sequence number it belongs to."""


@event("DEVICE_ADDED", Family.DEVICES)
class DeviceAdded(EventData, kw_only=True):
    """A device was added and works."""

    device: str | UnsetType = UNSET
    path: str


@event("DEVICE_DELETED", Family.DEVICES)
class DeviceDeleted(EventData, kw_only=True):
    """A device is gone; its id may be used again. Comes exactly once per device."""

    device: str | UnsetType = UNSET
    path: str
    released: Annotated[
        bool,
        Meta(description="False: an fd given out keeps the kernel's device open, the host cannot have it yet."),
    ]


@event("DEVICE_UNPLUG_ERROR", Family.DEVICES)
class DeviceUnplugError(EventData, kw_only=True):
    """``device_del`` gave up after its time; the device runs on."""

    device: str | UnsetType = UNSET
    path: str
    msg: str
    held_by: list[Holder]


@event("DEVICE_REQUESTED", Family.DEVICES)
class DeviceRequested(EventData):
    """The host wants the device back (REQ interrupt): a driver is being unbound, or the device unplugged."""

    device: str
    count: Annotated[int, Meta(description="The kernel's count: it asks again until the device is released.")]
    action: OnRequest


@event("DEVICE_ERROR", Family.DEVICES)
class DeviceError(EventData):
    """The device or its backend failed (ERR interrupt, an unrecoverable error, a peer that died)."""

    device: str
    reason: str


@event("DEVICE_RECONNECTED", Family.DEVICES)
class DeviceReconnected(EventData):
    """A device's vfio-user server is there again, and has guest memory, configuration space and interrupts as before.

    What else it knew (registers, what it was at) is as the server made it: reset the device, or have its driver do so.
    """

    device: str
    remapped: Annotated[
        list[str],
        Meta(
            description="The regions whose memory is another file now. Who had mapped one of them by `region-map` maps "
            "it again; a client of an export is told by ERR, and disconnected."
        ),
    ]
