"""The description of a machine: objects, memory, what is open of the kernel's, mediated devices, devices.

Every member that names an fd is a :data:`Place`. Addresses, sizes and offsets are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

__all__ = [
    "AgreementState",
    "ArmedState",
    "BackendState",
    "BoundState",
    "CcwState",
    "CompletionState",
    "ConnectionState",
    "ContainerState",
    "CountsState",
    "DeviceState",
    "ApState",
    "GroupState",
    "HeldState",
    "HostState",
    "InterruptsState",
    "IoasState",
    "IommufdState",
    "KernelState",
    "LineState",
    "LinesState",
    "MachineState",
    "MappingState",
    "MdevState",
    "MemoryState",
    "ModelState",
    "ObjectState",
    "OptionsState",
    "ParkedState",
    "PciState",
    "Place",
    "PlatformState",
    "RomFileState",
    "ServedIrqState",
    "ServedRegionState",
    "ServedState",
    "SideState",
    "UnplugState",
    "VectorState",
]


Place = int
"""Which of the fds that belong to a description, from 0."""


# --- memory and objects ---------------------------------------------------------------------------------------


class HeldState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fd of a set or of a session."""

    fd: Place
    opaque: str | None = None


class MemoryState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of guest memory."""

    fd: Place
    size: int
    name: str
    readonly: bool = False


class ObjectState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What ``object-add`` made: a memory, or an fd alone."""

    id: str
    type: str
    memory: MemoryState | None = None
    fd: Place | None = None


class MappingState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One mapping of the machine's: a piece of an object's memory, or of its own."""

    iova: int
    size: int
    offset: int
    readonly: bool
    backend: str | None = None
    memory: MemoryState | None = None


# --- the kernel's ---------------------------------------------------------------------------------------------


class ContainerState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A container: ``mapped`` is what its IOMMU has, by IOVA and size."""

    id: int
    fd: Place
    passed: bool
    object_id: str | None
    iommu: int | None
    attached: bool
    mapped: list[tuple[int, int]]


class GroupState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A group, and the container it is in."""

    id: int
    fd: Place
    noiommu: bool
    given_out: bool
    container: int | None


class IoasState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One address space of an iommufd."""

    id: int
    attached: bool
    mapped: list[tuple[int, int]]


class IommufdState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An iommufd that devices are bound to: the fd is that of the object."""

    object_id: str
    maps_files: bool
    ioases: list[IoasState]


class KernelState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is open of VFIO's."""

    containers: list[ContainerState] = field(default_factory=list)
    next_container: int = 0
    groups: list[GroupState] = field(default_factory=list)
    iommufds: list[IommufdState] = field(default_factory=list)


class HostState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was known of a host device when it was opened."""

    name: str
    bus: str
    path: str
    driver: str | None
    group: int | None
    device_api: str


class SideState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One socket to a program, and what has come of its next message."""

    fd: Place
    input: bytes
    input_fds: list[Place]


class ConnectionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A connection to a program, at rest: no request is out. ``twin``: where the program's own requests come."""

    main: SideState
    next_id: int
    twin: SideState | None = None


class AgreementState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was agreed on in the handshake (:class:`~vfiod.protocol.vfio_user.Agreement`)."""

    minor: int
    max_transfer: int
    send_fds: int
    dma_maps: int
    page_size: int
    multi: bool
    twin: bool


class ServedRegionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a program has said of a region: ``struct vfio_region_info``, and the flags that hold; or its refusal."""

    info: bytes
    flags: int
    file: Place | None = None
    errno: str | None = None


class ServedIrqState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a program has said of an interrupt index; or its refusal."""

    flags: int
    count: int
    errno: str | None = None


class ArmedState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An eventfd that a program was given: for which index, action (as the kernel numbers them) and interrupt."""

    index: int
    action: int
    vector: int
    fd: Place


class ServedState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A device that another program serves (vfio-user): all that vfiod knows of it, so that it need not be asked.

    Attributes:
        path: of the program's socket; None: a connected one was passed.
        timeout_ms: how long a reply may take, in milliseconds.
        reconnect_ms: after which time to connect again, in milliseconds; 0: never.
        state: ``connected``, ``lost``, ``another`` (device answers).
        reason: of the state.
        agreement: of the handshake.
        flags: of the device.
        regions: by index.
        irqs: by index.
        identity: the bytes of configuration space that say which device it is.
        config: configuration space as it was last seen.
        written: what of it is given to the program again when it is found again: offset, and bytes.
        rom: whether the ROM could be read.
        features: by number, whether the program has them, as far as it was asked.
        armed: eventfds.
        masked: interrupts by index.
        connection: what it is connected by; None: nothing, or a dead process was.

    """

    path: str | None
    timeout_ms: int
    reconnect_ms: int
    state: str
    reason: str
    agreement: AgreementState
    flags: int
    regions: list[ServedRegionState]
    irqs: list[ServedIrqState]
    identity: bytes
    config: bytes
    written: list[tuple[int, bytes]]
    rom: bool
    features: list[tuple[int, bool]]
    armed: list[ArmedState]
    masked: list[tuple[int, list[int]]]
    connection: ConnectionState | None = None


class BackendState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an open device comes from; which members there are depends on ``kind``."""

    kind: str
    name: str
    given_out: bool = False
    fd: Place | None = None
    group: int | None = None
    host: HostState | None = None
    iommufd: str | None = None
    devid: int | None = None
    ioas: int | None = None
    served: ServedState | None = None


class MdevState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A mediated device: ``values`` and ``fds`` are its own account of itself (``MediatedDevice.save``)."""

    uuid: str
    parent: str
    type: str
    parameters: dict[str, Any]
    group: int
    vm: str | None
    values: dict[str, Any]
    fds: dict[str, Place]


KeepEach = Callable[[str, Callable[[], MdevState]], MdevState]
"""Gives a mediated device's description: gets its UUID, and what describes it now."""


# --- devices --------------------------------------------------------------------------------------------------


class RomFileState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file that stands in for a ROM, read already."""

    name: str
    image: bytes


class OptionsState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Properties of ``device_add``; those that are unset belong to other models."""

    mmap_timeout_ms: int
    share_fd: bool
    no_mmap: bool
    on_request: str
    multifunction: bool | UnsetType = UNSET
    rombar: bool | UnsetType = UNSET
    romfile: RomFileState | None = None
    irqfd: bool | UnsetType = UNSET


class CountsState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one vector has seen."""

    index: int
    vector: int
    fired: int
    delivered: int
    spurious: int


class VectorState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bound vector and its eventfds."""

    index: int
    number: int
    mode: str
    trigger: Place
    resample: Place | None
    own: Place | None


class ParkedState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The eventfds of a vector its guest switched off."""

    index: int
    vector: int
    mode: str
    trigger: Place
    resample: Place | None


class LineState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An INTx line."""

    state: str
    fast_path: str
    by_access: bool


class BoundState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The active kind of a PCI device's interrupts."""

    index: int
    vectors: list[VectorState]
    block: int
    masked: list[int]
    line: LineState | None = None


class InterruptsState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The interrupts of a PCI device."""

    bound: BoundState | None
    parked: list[ParkedState]
    counts: list[CountsState]
    numbers: list[tuple[int, int, int]]
    unrouted: bool = False


class PciState(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pci"):
    """A PCI device: the guest's configuration space (emulated bits), its MSI-X table, its interrupts."""

    config: bytes
    kind: str
    table: bytes | None
    interrupts: InterruptsState


class LinesState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The relayed interrupts of a platform device."""

    active: int | None
    waiting: list[int]
    masked: list[int]
    fast_path: str
    again: bool
    by_access: bool


class PlatformState(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="platform"):
    """A platform device: what it was set up with, what is bound, its lines and its messages."""

    made: list[ParkedState]
    bound: list[VectorState]
    counts: list[CountsState]
    numbers: list[tuple[int, int]]
    unrouted: list[int]
    lines: LinesState
    messages: list[Place]
    message_numbers: list[tuple[int, int]]


class ApState(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ap"):
    """An AP device."""

    heard: list[tuple[int, int]]
    changes: int


class CcwState(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ccw"):
    """A subchannel that no request is under way on."""

    heard: list[tuple[int, int]]
    owed: int
    started: int


ModelState = PciState | PlatformState | ApState | CcwState


class UnplugState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A removal that waits for who holds the device."""

    left_ms: int
    force: bool
    insist: bool


class DeviceState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device."""

    id: str
    path: str
    driver: str
    backend_kind: str
    host: str | None
    in_workers: bool
    on_request_timeout_ms: int
    options: OptionsState
    backend: BackendState
    notices: list[tuple[int, Place]]
    requested: int
    fast_path_told: bool
    shared: bool
    mapped_by: list[tuple[int, list[str]]]
    model: ModelState
    unplug: UnplugState | None = None


class CompletionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How platform interrupts are started since the machine is complete."""

    first: int | None
    following: int | None
    mode: str | None
    taken: bool


class MachineState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One machine."""

    name: str
    uuid: str
    started: float
    seq: int
    anonymous: int
    fdsets: list[tuple[int, list[HeldState]]] = field(default_factory=list)
    objects: list[ObjectState] = field(default_factory=list)
    mappings: list[MappingState] = field(default_factory=list)
    kernel: KernelState | None = None
    mdevs: list[MdevState] = field(default_factory=list)
    devices: list[DeviceState] = field(default_factory=list)
    completion: CompletionState | None = None
