"""Doors for hypervisors, as the machine sees what stands above it (:mod:`vfiod.server.exports`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from vfiod.protocol.catalogue.fds import FdInfo

if TYPE_CHECKING:
    from vfiod.protocol.catalogue.exports import ExportInfo

__all__ = ["Doors"]


class Doors(Protocol):
    """All exports of one machine. On the loop."""

    def __len__(self) -> int:
        """How many there are."""

    def delete(self, id: str, *, force: bool) -> None:
        """End one. DeviceNotFound; Busy."""

    def begin_end(self) -> None:
        """The machine ends: nobody comes in any more, and who is there is disconnected."""

    async def ended(self) -> None:
        """Wait until every client has gone."""

    def infos(self) -> list[ExportInfo]:
        """For ``query-device-exports``."""

    def fd_infos(self) -> Iterator[FdInfo]:
        """For ``query-fds``."""
