"""Family "mediated": devices made by a parent."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, UnsetType, Uuid


class DeviceApi(enum.StrEnum):
    """``device_api`` of a mediated device type (Documentation/driver-api/vfio-mediated-device.rst)."""

    VFIO_PCI = "vfio-pci"
    VFIO_PLATFORM = "vfio-platform"
    VFIO_CCW = "vfio-ccw"
    VFIO_AP = "vfio-ap"


class MdevInfo(Result, kw_only=True):
    """One mediated device."""

    uuid: str
    parent: str
    type: str
    started: Annotated[bool, Meta(description="mdev-start was called for its VM.")]
    device: Annotated[str | UnsetType, Meta(description="The id it was added with.")] = UNSET
    attributes: dict[str, str]


class MdevTypeInfo(Result):
    """One type of a parent."""

    parent: str
    type: str
    name: str
    description: str
    device_api: DeviceApi
    available_instances: int
    parameters: Annotated[dict[str, str], Meta(description="What mdev-create takes for it: name, and what it means.")]
    parent_attributes: Annotated[dict[str, str], Meta(description="What the parent publishes of itself.")]
    devices: list[MdevInfo]


@command("query-mdev-types", Family.MEDIATED, oob=True, mutates=False)
class QueryMdevTypes(Arguments[list[MdevTypeInfo]]):
    """List what mediated devices can be made, and which exist."""


class MdevCreateResult(Result):
    """The device's name: what ``device_add`` takes as ``mdev``."""

    uuid: str


@command("mdev-create", Family.MEDIATED, slow=True)
class MdevCreate(Arguments[MdevCreateResult]):
    """Make a mediated device. Refused beyond the type's available instances."""

    parent: str
    type: str
    uuid: Uuid | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET


@command("mdev-destroy", Family.MEDIATED, slow=True)
class MdevDestroy(Arguments[Empty]):
    """Destroy a mediated device. Refused while it is added, or when its parent refuses."""

    uuid: Uuid


@command("mdev-start", Family.MEDIATED, slow=True)
class MdevStart(Arguments[Empty]):
    """Tell the parents of this VM's mediated devices that the VM is about to run. All start, or none."""

    uuid: Annotated[Uuid | UnsetType, Meta(description="The VM; default: this machine's.")] = UNSET


@command("mdev-shutdown", Family.MEDIATED, slow=True)
class MdevShutdown(Arguments[Empty]):
    """Tell the parents of this VM's mediated devices that the VM has stopped."""

    uuid: Annotated[Uuid | UnsetType, Meta(description="The VM; default: this machine's.")] = UNSET


@event("MDEV_STARTED", Family.MEDIATED)
class MdevStarted(EventData):
    """A mediated device was started for its VM."""

    uuid: str
    vm: str


@event("MDEV_SHUTDOWN", Family.MEDIATED)
class MdevStopped(EventData):
    """A mediated device was shut down."""

    uuid: str
    vm: str


@event("MDEV_REMOVED", Family.MEDIATED)
class MdevRemoved(EventData):
    """A mediated device went away: destroyed, or its parent unregistered."""

    uuid: str
    parent: str
    reason: str
