"""What was seen of one server, and how fast its interrupts come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from vfiod.client.events import Event
from vfiod.protocol.catalogue.devices import MachineInfo
from vfiod.protocol.catalogue.exports import ExportInfo

__all__ = ["Picture", "Vector"]

Vector: TypeAlias = tuple[str, int, int]
"""Device, index, vector."""

KEPT_EVENTS: Final = 200
KEPT_RATES: Final = 60
"""Rates kept for a sparkline: a minute, at one a second."""


@dataclass(slots=True)
class Picture:
    """What was seen last, and what changed since the time before.

    Attributes:
        path: the server's socket.
        machine: the last snapshot.
        exports: as they were then.
        topology: ``query-topology format=tree``, when somebody looks at it.
        rates: deliveries a second of each relayed vector, since the snapshot before; empty at first.
        history: the rates before, oldest first.
        peaks: the highest rate of each vector since they were reset.
        events: the latest, oldest first.
        problem: why the picture is old, when it is.

    """

    path: str = ""
    machine: MachineInfo | None = None
    exports: list[ExportInfo] = field(default_factory=list)
    topology: str = ""
    rates: dict[Vector, float] = field(default_factory=dict)
    history: dict[Vector, deque[float]] = field(default_factory=dict)
    peaks: dict[Vector, float] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    problem: str = ""
    _counts: dict[Vector, int] = field(default_factory=dict)
    _when: float = 0.0

    def update(self, machine: MachineInfo, when: float) -> None:
        """A new snapshot, taken at a monotonic time in seconds."""
        counts = {
            (index.device, index.index, vector.vector): vector.delivered
            for index in machine.irqs
            for vector in index.vectors
            if vector.delivered is not None
        }
        passed = when - self._when
        # A count that fell belongs to interrupts that were started anew.
        self.rates = {
            key: (count - self._counts[key]) / passed
            for key, count in counts.items()
            if key in self._counts and count >= self._counts[key] and passed > 0
        }
        self.history = {key: self.history.get(key, deque(maxlen=KEPT_RATES)) for key in counts}
        for key, rate in self.rates.items():
            self.history[key].append(rate)
        self.peaks = {key: max(self.peaks.get(key, 0.0), rate) for key, rate in self.rates.items()}
        self.machine, self._counts, self._when = machine, counts, when
        self.problem = ""

    def reset_peaks(self) -> None:
        """From here on."""
        self.peaks = dict(self.rates)

    @property
    def name(self) -> str:
        """The VM's; before it is known, its socket's."""
        return self.machine.name if self.machine is not None else self.path

    def total(self) -> list[float]:
        """All vectors' rates together, oldest first: as long as the longest history."""
        longest = max(map(len, self.history.values()), default=0)
        padded = ([0.0] * (longest - len(rates)) + list(rates) for rates in self.history.values())
        return [sum(rates) for rates in zip(*padded, strict=True)]
