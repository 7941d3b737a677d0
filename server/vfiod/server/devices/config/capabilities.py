"""Walking the two chains of capabilities: the standard one, and from 0x100 the extended one.

Both are written by the device, so both may lie. A chain that comes back to itself or leaves its space is cut where it
does, the guest sees it end there, and a warning says so. The order is the device's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from vfiod.server.devices.config.layout import (
    CAPABILITIES,
    EXPRESS_SIZE,
    HEADER_SIZE,
    STANDARD_SIZE,
    STATUS,
    STATUS_CAPABILITIES,
)

__all__ = ["Capability", "Chains", "Cut", "walk"]

_ABSENT: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability.

    Attributes:
        id: of the specification; the two chains have ids of their own.
        offset: in configuration space, bytes.
        size: bytes it may have at most: up to the next one, or the end of its space.
        extended: of the extended chain.
        version: extended ones have one; else 0.

    """

    id: int
    offset: int
    size: int
    extended: bool = False
    version: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """A pointer that must read as zero, so that the guest's walk ends where ours did.

    Attributes:
        offset: of the pointer, bytes.
        mask: its bits, little-endian.
        size: bytes of it.

    """

    offset: int
    mask: int
    size: int


@dataclass(frozen=True, slots=True)
class Chains:
    """Both chains of one device.

    Attributes:
        standard: in the chain's order.
        extended: in the chain's order; empty on a conventional bus.
        cuts: pointers that must not be followed.
        warnings: one sentence for each cut.

    """

    standard: tuple[Capability, ...]
    extended: tuple[Capability, ...]
    cuts: tuple[Cut, ...]
    warnings: tuple[str, ...]

    def find(self, id: int) -> Capability | None:
        """The first standard capability with this id."""
        return next((one for one in self.standard if one.id == id), None)


def walk(image: bytes) -> Chains:
    """Walk both chains of a configuration space, given whole (256 or 4096 bytes)."""
    cuts: list[Cut] = []
    warnings: list[str] = []
    standard = _standard(image, cuts, warnings)
    extended = _extended(image, cuts, warnings) if len(image) >= EXPRESS_SIZE else []
    return Chains(_bounded(standard, STANDARD_SIZE), _bounded(extended, EXPRESS_SIZE), tuple(cuts), tuple(warnings))


def _standard(image: bytes, cuts: list[Cut], warnings: list[str]) -> list[Capability]:
    found: list[Capability] = []
    if not image[STATUS] & STATUS_CAPABILITIES:
        return found
    seen: set[int] = set()
    pointer = CAPABILITIES
    while at := image[pointer] & 0xFC:  # the two lowest bits are reserved (PCI 3.0, 6.7)
        why = _why_not(at, HEADER_SIZE, min(STANDARD_SIZE, len(image)), seen)
        if why:
            cuts.append(Cut(pointer, 0xFF, 1))
            warnings.append(f"The capability chain is cut at 0x{pointer:02x}: the pointer there, 0x{at:02x}, {why}")
            break
        seen.add(at)
        found.append(Capability(image[at], at, 0))
        pointer = at + 1
    return found


def _extended(image: bytes, cuts: list[Cut], warnings: list[str]) -> list[Capability]:
    found: list[Capability] = []
    seen: set[int] = set()
    pointer, at = 0, STANDARD_SIZE
    while at:
        header = int.from_bytes(image[at : at + 4], "little")
        why = _why_not(at, STANDARD_SIZE, EXPRESS_SIZE, seen)
        if not why and found and header in (0, _ABSENT):
            why = "leads to no capability"
        if why:
            cuts.append(Cut(pointer, 0xFFF0, 2))
            warnings.append(
                f"The extended capability chain is cut at 0x{pointer - 2:03x}: the pointer there, 0x{at:03x}, {why}"
            )
            break
        if header in (0, _ABSENT):
            break  # none at all (PCI Express 3.0, 7.9.1)
        seen.add(at)
        found.append(Capability(header & 0xFFFF, at, 0, extended=True, version=header >> 16 & 0xF))
        pointer, at = at + 2, header >> 20 & 0xFFC
    return found


def _why_not(at: int, first: int, end: int, seen: set[int]) -> str | None:
    if at in seen:
        return "leads back into the chain"
    if not first <= at <= end - 4:
        return f"leaves the space of the chain (0x{first:x} to 0x{end - 1:x})"
    return None


def _bounded(found: list[Capability], end: int) -> tuple[Capability, ...]:
    """With the size that the next one, by place, leaves them."""
    ends = {}
    following = end
    for one in sorted(found, key=lambda one: one.offset, reverse=True):
        ends[one.offset] = following
        following = one.offset
    return tuple(replace(one, size=ends[one.offset] - one.offset) for one in found)
