"""One bound interrupt vector: its eventfds, its counts, and how fast it fires."""

from __future__ import annotations

import itertools
from typing import Final

from msgspec import Struct, field

from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.devices import eventfds
from vfiod.server.interrupts.modes import Binding

__all__ = ["STORM_PER_SECOND", "STORM_WINDOW_S", "Counts", "StormMeter", "Vector"]

STORM_PER_SECOND: Final = 100_000
"""Interrupts of one vector within a second that are called a storm. A busy 100 Gbit/s port moderates each of its
queues to some 20,000 a second; what fires faster than this does nothing else."""

STORM_WINDOW_S: Final = 1.0
"""Seconds over which they are counted."""

_tokens = itertools.count(1)


class StormMeter:
    """Counts interrupts per second; says so once per window when there are too many."""

    __slots__ = ("_count", "_since", "_told")

    def __init__(self) -> None:
        self._since = -STORM_WINDOW_S
        self._count = 0
        self._told = False

    def note(self, count: int, now: float) -> int | None:
        """So many more, at this monotonic time in seconds. Returns the window's count when it has become a storm."""
        if now - self._since >= STORM_WINDOW_S:
            self._since = now
            self._count = 0
            self._told = False
        self._count += count
        if self._count <= STORM_PER_SECOND or self._told:
            return None
        self._told = True
        return self._count


class Counts(Struct, eq=False):
    """What one vector of one index has seen in the device's whole life.

    Attributes:
        fired: interrupts that came from the device.
        delivered: interrupts that went on to the consumer.
        spurious: interrupts that came when the index was not enabled any more.

    """

    fired: int = 0
    delivered: int = 0
    spurious: int = 0
    storm: StormMeter = field(default_factory=StormMeter)


class Vector:
    """One bound vector. Owns its eventfds.

    Args:
        number: the vector within its index.
        mode: who hears the device.
        trigger: the consumer's eventfd.
        resample: the consumer's eventfd that completes a level interrupt.
        own: vfiod's eventfd, which the kernel signals; relayed mode only.
        counts: of this vector; they outlive the binding.

    Attributes:
        binding: as the plan of a change sees it; made once, as each change looks at every vector's.

    """

    __slots__ = ("binding", "consumer", "counts", "mode", "number", "own", "resample")

    def __init__(
        self,
        number: int,
        mode: IrqMode,
        trigger: FileDescriptor,
        resample: FileDescriptor | None,
        own: FileDescriptor | None,
        counts: Counts,
    ) -> None:
        if (own is not None) is not (mode is IrqMode.RELAYED):
            raise ValueError("A relayed vector has an eventfd of vfiod's own, a direct one has none")
        self.number = number
        self.mode = mode
        self.consumer = eventfds.Consumer(trigger)
        self.resample = resample
        self.own = own
        self.counts = counts
        self.binding = Binding(mode, resample is not None, next(_tokens))

    @property
    def trigger(self) -> FileDescriptor:
        """The consumer's eventfd."""
        return self.consumer.fd

    @property
    def kernel_side(self) -> FileDescriptor:
        """The eventfd the kernel signals: the consumer's own when direct, vfiod's when relayed."""
        return self.trigger if self.own is None else self.own

    def deliver(self, count: int) -> None:
        """Signal the consumer: so many interrupts."""
        self.consumer.signal(count)
        self.counts.delivered += count

    def fds(self) -> tuple[tuple[str, FileDescriptor], ...]:
        """Its eventfds by role."""
        roles = (("trigger", self.trigger), ("resample", self.resample), ("relay", self.own))
        return tuple((role, fd) for role, fd in roles if fd is not None)

    def close(self) -> None:
        """Close its eventfds; later calls do nothing."""
        for _, fd in self.fds():
            fd.close()
