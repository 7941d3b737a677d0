"""What a guest has written to configuration space, so that a server that starts anew can be given it again.

Kept is what the device itself shows after a write, of the bytes that anybody ever wrote: bits that clear themselves,
or that the device does not have, are gone by then, and what a reset has undone is not brought back. Registers that a
fresh device has no use for are left out: the status (error bits are cleared by writing ones) and BIST (writing starts
it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from vfiod.protocol.errors import OperationFailed

__all__ = ["KeptConfig", "Read"]

_COMMAND: Final = range(0x04, 0x06)
_MASTER: Final = 0b100
"""The bit of the command register, in its first byte, that lets a device master its bus."""

_LEFT_OUT: Final = frozenset({0x06, 0x07, 0x0F})
"""Status and BIST (PCI 3.0, 6.2.3 and 6.2.4)."""

_STANDARD: Final = 0x100
"""Bytes of configuration space without the extended one: looked at in one message."""

Read = Callable[[int, int], bytes]
"""(offset, length): what the device shows."""


class KeptConfig:
    """Bytes of configuration space by offset."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def written(self, offset: int, data: bytes, read: Read) -> None:
        """The device has taken these bytes. Looks at it; what cannot be read is kept as it was written."""
        for place, value in enumerate(data, offset):
            if place not in _LEFT_OUT:
                self._bytes[place] = value
        self.look(read)

    def look(self, read: Read) -> None:
        """Take what the device shows now: after a write, which may have reset it, and after a reset."""
        inside = [place for place in self._bytes if place < _STANDARD]
        spans = [(min(inside), max(inside) + 1)] if inside else []
        spans += [(place, end) for place, end in _dwords(place for place in self._bytes if place >= _STANDARD)]
        for first, end in spans:
            try:
                shown = read(first, end - first)
            except OperationFailed:
                continue  # it was just lost, or does not like to be read there
            for place in [place for place in self._bytes if first <= place < end]:
                self._bytes[place] = shown[place - first]

    def refused(self, offset: int, data: bytes) -> None:
        """Nobody was there to take these bytes. What takes the device its DMA holds all the same.

        Once it is found again, it must do none to memory that is another's by then.
        """
        first = _COMMAND.start
        if offset <= first < offset + len(data) and not data[first - offset] & _MASTER:
            self._bytes[first] = self._bytes.get(first, data[first - offset]) & ~_MASTER

    def keep(self) -> list[tuple[int, bytes]]:
        """Describe it: runs of bytes, with the offset of each."""
        runs: list[tuple[int, bytearray]] = []
        for place in sorted(self._bytes):
            if not runs or runs[-1][0] + len(runs[-1][1]) != place:
                runs.append((place, bytearray()))
            runs[-1][1].append(self._bytes[place])
        return [(first, bytes(run)) for first, run in runs]

    def adopt(self, runs: Iterable[tuple[int, bytes]]) -> None:
        """Have again what :meth:`keep` gave."""
        for first, run in runs:
            self._bytes.update(enumerate(run, first))

    def writes(self) -> list[tuple[int, bytes]]:
        """What to write to a device that knows nothing, in order: (offset, 1, 2 or 4 bytes, aligned).

        The command register comes last: nothing decodes at an address, or masters the bus, before all else is set.
        """
        pieces: list[tuple[int, bytes]] = []
        for first, end in _dwords(self._bytes):
            at = first
            while at < end:
                width = next(width for width in (4, 2, 1) if not at % width and at + width <= end)
                if all(place in self._bytes for place in range(at, at + width)):
                    pieces.append((at, bytes(self._bytes[place] for place in range(at, at + width))))
                    at += width
                elif at in self._bytes:
                    pieces.append((at, bytes((self._bytes[at],))))
                    at += 1
                else:
                    at += 1
        return sorted(pieces, key=lambda piece: piece[0] in _COMMAND)


def _dwords(places: Iterable[int]) -> list[tuple[int, int]]:
    """The aligned double words that hold these bytes, in order: (first, end), cut to what is there."""
    held: dict[int, list[int]] = {}
    for place in sorted(places):
        held.setdefault(place // 4, []).append(place)
    return [(min(inside), max(inside) + 1) for _, inside in sorted(held.items())]
