"""Arguments and results with the fds in them. Written by ``vfiod.client.generate``: do not edit."""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

from msgspec import UNSET, UnsetType

from vfiod.client.fds import Fd, HoldsFds, LentFds, OwnedFds
from vfiod.protocol.catalogue import interrupts, regions
from vfiod.protocol.catalogue.interrupts import IrqMessage
from vfiod.protocol.catalogue.regions import Area
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.fd import FileDescriptor

__all__ = ["OWN", "IrqStartResult", "RegionMapResult", "StartedIrq", "VectorFds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFds:
    """The eventfds of one vector.

    The client's picture of it: fds are open ones, lent, or names the server knows.
    """

    index: int | str | UnsetType = UNSET
    """Of a platform device; default: the command's index."""
    vector: int = 0
    """An interrupt within its index (VFIO sub-index), from 0 (0 to 2047)."""
    trigger: Fd
    """Signalled when the interrupt fires. An open fd, lent; or a name the server knows (length 1 to 255)."""
    resample: Fd | UnsetType = UNSET
    """Signalled by the hypervisor to complete a level interrupt. An open fd, lent; or a name the server knows (length 1 to 255)."""

    def lend(self, lent: LentFds) -> interrupts.VectorFds:
        """As the catalogue has it, with a name for each open fd."""
        return interrupts.VectorFds(
            index=self.index, vector=self.vector, trigger=lent.name(self.trigger), resample=lent.name(self.resample)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedIrq(HoldsFds):
    """One started interrupt. An fd is attached to the reply only when the caller brought none.

    The client's picture of it: fds are objects, and the caller's to close.
    """

    device: str
    index: int
    vector: int
    mode: IrqMode
    number: int | UnsetType = UNSET
    trigger_fd: FileDescriptor | UnsetType = UNSET
    resample_fd: FileDescriptor | UnsetType = UNSET
    x_message: IrqMessage | UnsetType = UNSET

    @classmethod
    def own(cls, result: interrupts.StartedIrq, fds: OwnedFds) -> Self:
        """From the catalogue's, taking each fd it refers to."""
        return cls(
            device=result.device,
            index=result.index,
            vector=result.vector,
            mode=result.mode,
            number=result.number,
            trigger_fd=fds.take(result.trigger_fd),
            resample_fd=fds.take(result.resample_fd),
            x_message=result.x_message,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IrqStartResult(HoldsFds):
    """What was started.

    The client's picture of it: fds are objects, and the caller's to close.
    """

    irqs: list[StartedIrq]

    @classmethod
    def own(cls, result: interrupts.IrqStartResult, fds: OwnedFds) -> Self:
        """From the catalogue's, taking each fd it refers to."""
        return cls(irqs=[StartedIrq.own(part, fds) for part in result.irqs])


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionMapResult(HoldsFds):
    """Map the attached fd at ``offset`` plus an area's offset, page by page.

    The client's picture of it: fds are objects, and the caller's to close.
    """

    map_fd: FileDescriptor
    offset: int
    """Where the region begins in the fd, in bytes."""
    size: int
    areas: list[Area]

    @classmethod
    def own(cls, result: regions.RegionMapResult, fds: OwnedFds) -> Self:
        """From the catalogue's, taking each fd it refers to."""
        return cls(map_fd=fds.take(result.map_fd), offset=result.offset, size=result.size, areas=result.areas)


OWN: Final[dict[str, Callable[[Any, OwnedFds], Any]]] = {
    "irq-start": IrqStartResult.own,
    "region-map": RegionMapResult.own,
}
"""For each command whose result carries fds: how the client's picture is made of it."""
