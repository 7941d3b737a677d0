"""Family "reset"."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, EventData, Family, command, event


@command("device-reset", Family.RESET, slow=True, device="id")
class DeviceReset(Arguments[Empty]):
    """Reset one device (``VFIO_DEVICE_RESET``): interrupts off, bus mastering off, reset, state restored."""

    id: str


@command("system_reset", Family.RESET, slow=True)
class SystemReset(Arguments[Empty]):
    """Reset every device that can be reset, as the machine's own reset does."""


@event("DEVICE_RESET", Family.RESET)
class DeviceResetDone(EventData):
    """A device was reset."""

    device: str
    method: Annotated[str, Meta(description="device")]
