"""The mediated bus: parents, their devices, and the drivers that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.mediated import MdevTypeInfo
from vfiod.server.mdev.parent import Parent

__all__ = ["MdevBus"]


class MdevBus:
    """Keeps parents and mediated devices. Made and called on the loop's thread, except where it says otherwise.

    Args:
        emit: sends an event.
        executor: the machine's pool of threads.

    """

    def __init__(self, *, emit: Callable[[EventData], None], executor: Executor) -> None: ...

    def register(self, parent: Parent) -> None:
        """Offer a parent. EEXIST when one of that name is there."""
        raise NotImplementedError

    async def unregister(self, name: str, *, reason: str = "unregistered", patience: float = 1.0) -> None:
        """Take a parent away: hidden first, users told first, then every device goes, whatever it says."""
        raise NotImplementedError

    async def create(self, parent: str, mdev_type: str, uuid: str | None, parameters: Mapping[str, Any]) -> str:
        """Make a device; returns its UUID."""
        raise NotImplementedError

    async def destroy(self, uuid: str) -> None:
        """Destroy a device. Busy while it is added; refused when its parent refuses."""
        raise NotImplementedError

    async def start(self, vm: str) -> None:
        """All mediated devices are started for a VM, or none."""
        raise NotImplementedError

    async def shutdown(self, vm: str) -> None:
        """The VM has stopped."""
        raise NotImplementedError

    async def discover(self) -> None:
        """Load the parents that other packages offer, once. Blocks nobody."""
        raise NotImplementedError

    def types(self) -> list[MdevTypeInfo]:
        """All types and devices, as ``query-mdev-types`` shows them. Never waits."""
        raise NotImplementedError

    def uuids(self) -> list[str]:
        """The visible devices. Never waits."""
        raise NotImplementedError

    async def close(self) -> None:
        """Unregister every parent."""
        raise NotImplementedError
