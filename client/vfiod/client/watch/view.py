"""What the person looks at, and what each key does to it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

__all__ = ["HELP", "Pane", "View", "keys_of"]


class Pane(enum.Enum):
    """A part of the picture; its value is its title."""

    MACHINES = "VMs"
    DEVICES = "Devices"
    INTERRUPTS = "Interrupts"
    MEMORY = "DMA maps"
    EXPORTS = "Exports"
    EVENTS = "Events"


HELP: Final = (
    ("Tab, right / left", "the next part, the one before"),
    ("up, down, PgUp, PgDn", "scroll it (in VMs: choose one)"),
    ("Enter, z", "that part alone, and back"),
    ("n, N", "the next VM, the one before"),
    ("t", "the topology as a tree"),
    ("p", "pause, and go on"),
    ("r", "reset the peaks"),
    ("?, h", "this"),
    ("q, Ctrl-C", "leave"),
)

_SEQUENCES: Final = {
    b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left",
    b"\x1bOA": "up", b"\x1bOB": "down", b"\x1bOC": "right", b"\x1bOD": "left",
    b"\x1b[Z": "left", b"\x1b[5~": "pgup", b"\x1b[6~": "pgdn",
    b"\t": "right", b"\r": "z", b"\n": "z", b"\x1b": "escape", b"k": "up", b"j": "down", b"h": "?",
}  # fmt: skip
LONGEST: Final = max(map(len, _SEQUENCES))


def keys_of(data: bytes) -> Iterator[str]:
    """Keys from what a terminal sent in one go. What is not known is its own character."""
    while data:
        for length in range(min(LONGEST, len(data)), 0, -1):
            if (name := _SEQUENCES.get(data[:length])) is not None:
                yield name
                data = data[length:]
                break
        else:
            yield data[:1].decode("latin-1")
            data = data[1:]


@dataclass(slots=True)
class View:
    """What is shown.

    Attributes:
        machine: which of the servers, from 0.
        pane: the selected part.
        offsets: lines each part is scrolled down.
        alone: only the selected part is shown.
        paused: nothing changes until it goes on.
        topology: the tree lies over the picture.
        help: the keys lie over the picture.
        leaving: the person has had enough.
        reset: peaks are to be reset; whoever does it sets it back.

    """

    machine: int = 0
    pane: Pane = Pane.INTERRUPTS
    offsets: dict[Pane, int] = field(default_factory=dict)
    alone: bool = False
    paused: bool = False
    topology: bool = False
    help: bool = False
    leaving: bool = False
    reset: bool = False

    def panes(self, machines: int) -> list[Pane]:
        """The parts there are: the list of VMs only where there are several."""
        return [pane for pane in Pane if pane is not Pane.MACHINES or machines > 1]

    def press(self, key: str, machines: int, page: int = 10) -> None:
        """What a key does, with so many servers; a page is so many lines. Unknown keys do nothing."""
        panes = self.panes(machines)
        match key:
            case "q" | "\x03" | "\x04":
                self.leaving = True
            case "right" | "left":
                step = 1 if key == "right" else -1
                here = panes.index(self.pane) if self.pane in panes else 0
                self.pane = panes[(here + step) % len(panes)]
            case "up" | "down" | "pgup" | "pgdn":
                self._scroll({"up": -1, "down": 1, "pgup": -page, "pgdn": page}[key], machines)
            case "n":
                self.machine = (self.machine + 1) % machines
            case "N":
                self.machine = (self.machine - 1) % machines
            case "z":
                self.alone = not self.alone
            case "p":
                self.paused = not self.paused
            case "r":
                self.reset = True
            case "t":
                self.topology, self.help = not self.topology, False
            case "?":
                self.help, self.topology = not self.help, False
            case "escape":
                self.help = self.topology = self.alone = False

    def _scroll(self, lines: int, machines: int) -> None:
        if self.pane is Pane.MACHINES:
            self.machine = min(max(self.machine + lines, 0), machines - 1)
        else:
            self.offsets[self.pane] = max(self.offsets.get(self.pane, 0) + lines, 0)

    def first_line(self, pane: Pane, lines: int, room: int) -> int:
        """The first line of a part to show. Scrolled too far is put right, so that the way back is not longer."""
        if pane is Pane.MACHINES:
            return max(0, min(self.machine, lines - room))
        offset = min(self.offsets.get(pane, 0), max(lines - room, 0))
        if pane in self.offsets:
            self.offsets[pane] = offset
        return offset
