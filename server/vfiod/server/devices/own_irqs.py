"""Interrupts that are all vfiod's own: what a CCW or AP device has. Nothing of them is the guest's to start.

A guest hears of its subchannel by the reply to ``ccw-request`` and by events, not by an eventfd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NoReturn

from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted

__all__ = ["OwnInterrupts", "OwnIrqIndex"]


class OwnIrqIndex(IrqIndex, frozen=True):
    """One interrupt index that belongs to vfiod. Subclasses know the names of their device class."""

    NAMES: ClassVar[Sequence[str]] = ()
    EVENTS: ClassVar[Sequence[str]] = ()

    @property
    def name(self) -> str:
        """As commands know it."""
        return self.NAMES[self.index] if self.index < len(self.NAMES) else f"irq{self.index}"

    @property
    def event(self) -> str:
        """What it becomes."""
        return self.EVENTS[self.index] if self.index < len(self.EVENTS) else "nothing that is known here"

    @property
    def reserved(self) -> bool:
        """Every one is vfiod's own."""
        return True

    @property
    def requests(self) -> bool:
        """Whether it is REQ."""
        return self.name == "req"

    @property
    def passed_on(self) -> bool:
        """All but REQ."""
        return not self.requests

    def check_free(self) -> NoReturn:
        """Refuse: it belongs to vfiod. InvalidArgument."""
        raise InvalidArgument(f"{self} belongs to vfiod: it becomes {self.event}")


class OwnInterrupts:
    """The interrupts of such a device (:class:`~vfiod.server.devices.model.Interrupts`).

    Args:
        device: what the device is called, for messages.
        indexes: in the order of their numbers.

    """

    def __init__(self, device: str, indexes: Sequence[OwnIrqIndex]) -> None:
        self._device = device
        self.indexes: Sequence[IrqIndex] = tuple(indexes)
        self._heard = dict.fromkeys((one.index for one in indexes), 0)

    @property
    def kind(self) -> IrqKind:
        """None: no interrupt of the guest."""
        return IrqKind.NONE

    def heard(self, one: IrqIndex, count: int) -> None:
        """Count what came."""
        self._heard[one.index] += count

    def keep(self) -> list[tuple[int, int]]:
        """What was counted, by index."""
        return list(self._heard.items())

    def adopt(self, heard: list[tuple[int, int]]) -> None:
        """Have that again."""
        self._heard.update(heard)

    def find(self, wanted: int | str) -> IrqIndex:
        """By number or name; InvalidArgument says what there is."""
        for one in self.indexes:
            if wanted in (one.index, one.name):
                return one
        known = ", ".join(f"{one.name} ({one.index})" for one in self.indexes)
        raise InvalidArgument(f"Device '{self._device}' has no interrupt index {wanted!r}; it has {known}")

    def infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""
        return [
            IrqInfo(
                device=self._device,
                index=one.index,
                name=one.name,
                count=one.info.count,
                active=one.info.count > 0,
                flags=one.flags,
                reserved=True,
                vectors=[],
                fired=self._heard[one.index],
                delivered=self._heard[one.index],
                spurious=0,
            )
            for one in self.indexes
        ]

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """None: those of the notices are all there are."""
        return []

    def start(
        self,
        one: IrqIndex,
        wanted: Sequence[Wanted],
        mode: IrqMode | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> list[Started]:
        """Refuse. InvalidArgument; the eventfds are closed."""
        close_all(fd for want in wanted for fd in (want.trigger, want.resample) if fd is not None)
        one.check_free()
        return []

    def stop(self, one: IrqIndex | None = None, vectors: Iterable[int] | None = None, *, reason: str) -> None:
        """Nothing runs that could be stopped; naming an index is refused. InvalidArgument."""
        if one is not None:
            one.check_free()

    def abandon(self, *, reason: str) -> None:
        """Nothing runs that could be stopped."""

    def mask(self, one: IrqIndex, vector: int) -> None:
        """Refuse. InvalidArgument."""
        one.check_free()

    def unmask(self, one: IrqIndex, vector: int) -> None:
        """Refuse. InvalidArgument."""
        one.check_free()

    def eoi(self, one: IrqIndex, vector: int) -> None:
        """Refuse. InvalidArgument."""
        one.check_free()

    def trigger(self, one: IrqIndex, vector: int) -> None:
        """Refuse. InvalidArgument."""
        one.check_free()

    def route(self, one: IrqIndex, vector: int, number: int | None) -> None:
        """Refuse. InvalidArgument."""
        one.check_free()

    @property
    def awaits_access(self) -> bool:
        """Never."""
        return False

    def accessed(self) -> None:
        """No access completes anything."""

    def given_out(self) -> None:
        """No access completes anything."""

    def suspend(self) -> None:
        """They stay armed during a reset (``VFIO_DEVICE_RESET`` keeps eventfds)."""

    def resume(self) -> None:
        """They stayed armed."""

    def silence(self) -> None:
        """The notices do it."""

    def close(self) -> None:
        """The notices do it."""
