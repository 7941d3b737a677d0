"""What stands between an access to a region and the device: bytes the guest sees that are not the device's.

A region has at most one overlay; it is asked first. Its methods are given the way to the device itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from vfiod.protocol.errors import CommandError
from vfiod.server.devices.config.space import Guest, MsixPlace, VirtualConfig
from vfiod.server.devices.config.table import MsixTable
from vfiod.server.devices.rom import Rom

__all__ = ["ConfigOverlay", "MsixOverlay", "Overlay", "Read", "RomOverlay", "Write"]

_log: Final = logging.getLogger(__name__)

Read = Callable[[int, int], bytes]
"""(offset, length): the device's own bytes."""

Write = Callable[[int, bytes], None]
"""(offset, data): to the device."""


class Overlay(Protocol):
    """Virtual bytes of a region."""

    @property
    def ready(self) -> bool:
        """Whether :meth:`read` gives no cause to wait."""
        ...

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """The range in order, in pieces: (offset, bytes, whether it is virtual)."""
        ...

    def covers(self, offset: int, size: int) -> bool:
        """Whether an access to this range must go through it."""
        ...

    def read(self, offset: int, length: int, own: Read) -> bytes:
        """What the guest reads."""
        ...

    def write(self, offset: int, data: bytes, own: Write) -> None:
        """Take what the guest writes. On the loop. CommandError: the virtual state is as it was."""
        ...


class ConfigOverlay:
    """Configuration space.

    Args:
        config: as the guest sees it.
        written: called after each write with what the guest had switched on before it; may raise CommandError.
        read: the way to the device itself.

    """

    def __init__(self, config: VirtualConfig, written: Callable[[Guest], None], read: Read) -> None:
        self._config = config
        self._written = written
        self._read = read

    ready = True

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """All of it: single bits are virtual."""
        return [(offset, length, True)]

    def covers(self, offset: int, size: int) -> bool:
        """Whether anything there is emulated."""
        return self._config.virtual(offset, size)

    def read(self, offset: int, length: int, own: Read) -> bytes:
        """The device's bits, and the emulated ones."""
        return self._config.merge(offset, own(offset, length))

    def write(self, offset: int, data: bytes, own: Write) -> None:
        """To the device, which filters it, and to what is emulated; then what follows from that."""
        # Only what switches interrupts can be refused after the device has it: then it gets back what it had.
        had = self._read(offset, len(data)) if self._config.switches(offset, len(data)) else None
        own(offset, data)
        before = self._config.guest
        old = self._config.write(offset, data)
        try:
            self._written(before)
        except CommandError:
            self._config.undo(offset, old)
            if had is not None:
                _give_back(own, offset, had)
            raise


class MsixOverlay:
    """The MSI-X table and the pending bits within one BAR.

    Args:
        place: where they are.
        bar: of which BAR this is.
        table: the guest's.
        all_masked: whether the guest has all vectors masked together.
        written: called with the vectors whose mask has changed; may raise CommandError.

    """

    def __init__(
        self,
        place: MsixPlace,
        bar: int,
        table: MsixTable,
        all_masked: Callable[[], bool],
        written: Callable[[frozenset[int]], None],
    ) -> None:
        self._table = table
        self._all_masked = all_masked
        self._written = written
        self._table_at = (place.table_offset, place.table_offset + place.table_size) if bar == place.table_bar else None
        self._pba_at = (place.pba_offset, place.pba_offset + place.pba_size) if bar == place.pba_bar else None

    ready = True

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Table, pending bits, and what is neither."""
        return [(at, size, area is not None) for at, size, area in self._split(offset, length)]

    def covers(self, offset: int, size: int) -> bool:
        """Whether the range touches the table or the pending bits."""
        return any(
            area is not None and offset < area[1] and area[0] < offset + size for area in (self._table_at, self._pba_at)
        )

    def read(self, offset: int, length: int, own: Read) -> bytes:
        """The guest's table; the device's pending bits, as far as they are the guest's business; else the device's."""
        parts = []
        for at, size, area in self._split(offset, length):
            if area is not None and area is self._table_at:
                parts.append(self._table.read(at - area[0], size))
            elif area is not None:
                parts.append(self._table.pending(at - area[0], own(at, size), all_masked=self._all_masked()))
            else:
                parts.append(own(at, size))
        return b"".join(parts)

    def write(self, offset: int, data: bytes, own: Write) -> None:
        """To the guest's table; pending bits are read-only; else to the device."""
        for at, size, area in self._split(offset, len(data)):
            part = data[at - offset : at - offset + size]
            if area is None:
                own(at, part)
            elif area is self._table_at:
                changed, old = self._table.write(at - area[0], part)
                try:
                    self._written(changed)
                except CommandError:
                    self._table.undo(at - area[0], old)
                    raise

    def _split(self, offset: int, length: int) -> list[tuple[int, int, tuple[int, int] | None]]:
        """The range in pieces: (offset, bytes, the area it lies in; None: neither)."""
        pieces: list[tuple[int, int, tuple[int, int] | None]] = []
        at, end = offset, offset + length
        areas = sorted(area for area in (self._table_at, self._pba_at) if area is not None)
        while at < end:
            area = next((one for one in areas if one[1] > at), None)
            if area is None or area[0] >= end:
                until, inside = end, None
            elif area[0] > at:
                until, inside = area[0], None
            else:
                until, inside = min(area[1], end), area
            # The caller compares by identity: the two areas may be equal only if the device lies about them.
            if inside is not None:
                inside = self._table_at if inside == self._table_at else self._pba_at
            pieces.append((at, until - at, inside))
            at = until
        return pieces


class RomOverlay:
    """A ROM.

    Args:
        rom: its bytes, or the way to them.

    """

    def __init__(self, rom: Rom) -> None:
        self._rom = rom

    @property
    def ready(self) -> bool:
        """Whether it has been read from the device."""
        return self._rom.loaded

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """All of it."""
        return [(offset, length, True)]

    def covers(self, offset: int, size: int) -> bool:
        """Always."""
        return True

    def read(self, offset: int, length: int, own: Read) -> bytes:
        """The ROM's bytes, wherever they came from. Blocks the first time: the whole ROM is read then."""
        del own  # the ROM is read whole, not as the guest happens to ask
        return self._rom.read(offset, length)

    def write(self, offset: int, data: bytes, own: Write) -> None:
        """A ROM takes none; its region refuses before it comes to this."""


def _give_back(own: Write, offset: int, had: bytes) -> None:
    try:
        own(offset, had)
    except CommandError as error:
        _log.warning("Configuration space at 0x%x could not be given back what it had: %s", offset, error)
