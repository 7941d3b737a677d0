"""Who has a device for itself: the client of an export. The monitor may look at such a device, and changes nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from vfiod.protocol.catalogue.devices import Holder

__all__ = ["Claim"]


class Claim(Protocol):
    """Somebody to whom a device belongs for a while. Everything on the loop, unless it says otherwise."""

    @property
    def name(self) -> str:
        """For messages: ``export 'e0'``."""

    def holder(self) -> Holder:
        """For ``query-devices``."""

    def asked_to_go(self) -> None:
        """The device is to be removed, or its host wants it back: let go soon, in one's own time."""

    def signalled(self, index: int) -> None:
        """An interrupt that vfiod hears for every device of the class has come, and is whose the device is."""

    def failed(self) -> None:
        """The device has reported an error."""

    def memory_replaced(self, regions: Collection[int]) -> None:
        """What these regions were mapped from is the device's no more: its program was restarted."""

    def device_stops(self) -> None:
        """The device goes now: ask nothing of it any more."""

    def release_memory(self) -> None:
        """Take back what was mapped for it. Blocks; in a worker, in the ``topology`` lane, after the interrupts."""
