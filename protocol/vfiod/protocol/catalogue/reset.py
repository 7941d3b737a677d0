"""Family "reset"."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, Result, command, event
from vfiod.protocol.catalogue.words import UNSET, FdName, Force, UnsetType
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE


@command("device-reset", Family.RESET, slow=True, device="id")
class DeviceReset(Arguments[Empty]):
    """Reset one device (``VFIO_DEVICE_RESET``): interrupts off, bus mastering off, reset, state restored."""

    id: str
    force: Force = False


class AffectedFunction(Result):
    """One PCI function that a hot reset would reset."""

    address: Annotated[str, Meta(description="DDDD:BB:DD.F")]
    group: Annotated[
        int | UnsetType, Meta(description="Its VFIO group, when the device asked about came from one.")
    ] = UNSET
    devid: Annotated[
        int | UnsetType, Meta(description="Its id in the iommufd: above 0; 0 owned by its group; -1 not owned (cdev).")
    ] = UNSET
    held_as: Annotated[str | UnsetType, Meta(description="The id of the device here that is this function.")] = UNSET
    reason: Annotated[
        str | UnsetType, Meta(description="Why this function stands in the way, and what would help.")
    ] = UNSET


class HotResetReport(Result, kw_only=True):
    """Whether a hot reset would be done, and what it would touch."""

    possible: bool
    reason: Annotated[str | UnsetType, Meta(description="Why not.")] = UNSET
    affected: list[AffectedFunction]


@command("query-hot-reset", Family.RESET, oob=True, mutates=False)
class QueryHotReset(Arguments[HotResetReport]):
    """List every function that a hot reset of this device would reset, and say whether and why not it would be done."""

    id: str


@command("hot-reset", Family.RESET, slow=True, device="id")
class HotReset(Arguments[HotResetReport]):
    """Reset the bus or slot of a device (``VFIO_DEVICE_PCI_HOT_RESET``), with every function on it.

    Each affected function must be held here, or lie in a group whose fd is lent for the call and that is attached to
    no container. All quiesce, the bus is reset once, each is restored and has its ``DEVICE_RESET``. Refused, nothing
    is touched.
    """

    id: str
    group_fds: (
        Annotated[
            list[FdName],
            Meta(max_length=MAX_FDS_PER_MESSAGE, description="Groups lent for this call (group devices only)."),
        ]
        | UnsetType
    ) = UNSET
    force: Force = False


@command("system_reset", Family.RESET, slow=True)
class SystemReset(Arguments[Empty]):
    """Reset every device that can be reset, as the machine's own reset does."""

    force: Force = False


@event("DEVICE_RESET", Family.RESET)
class DeviceResetDone(EventData):
    """A device was reset."""

    device: str
    method: Annotated[str, Meta(description="device, hot")]
