"""What vfiod itself does with a PCI device's configuration space: looks, and keeps it over a reset.

What a guest sees of it, BARs sized and capabilities virtualised, is :mod:`vfiod.server.devices.config`; its ``layout``
has the offsets. Those of power management, which only this module reads: PCI Power Management 1.2, 3.2.
"""

from __future__ import annotations

import logging
from typing import Final

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.errors import CommandError
from vfiod.server.backends.base import Backend
from vfiod.server.devices.config import layout

__all__ = ["HEADER_BYTES", "ConfigSpace", "Saved"]

_log: Final = logging.getLogger(__name__)

_CONFIG: Final = int(vfio.PciRegion.CONFIG)

HEADER_BYTES: Final = layout.HEADER_SIZE
"""Bytes of the standard header: the first read of a device must give all of them."""

_COMMAND: Final = 0x04
_COMMAND_MEMORY: Final = 1 << 1
_COMMAND_MASTER: Final = 1 << 2
_POWER_MANAGEMENT: Final = 0x01
_PMCSR: Final = 0x04
_POWER_STATE: Final = 0b11
_D3HOT: Final = 3
_ALL_ONES: Final = 0xFFFF_FFFF

_CHAIN_LIMIT: Final = (layout.STANDARD_SIZE - HEADER_BYTES) // 4
"""Capabilities a chain can have: each takes at least four bytes behind the header. A longer one is a loop."""


class Saved(Struct, frozen=True):
    """What a reset may lose.

    Attributes:
        command: the command register.
        bars: the six base address registers.
        rom: the expansion ROM's base address register.

    """

    command: int
    bars: tuple[int, ...]
    rom: int


class ConfigSpace:
    """Configuration space of one device. Every method may block, and raises OperationFailed.

    Args:
        backend: where the device comes from.

    """

    __slots__ = ("_backend", "_power", "device_id", "vendor_id")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        header = backend.region_read(_CONFIG, 0, HEADER_BYTES)
        self.vendor_id = int.from_bytes(header[0:2], "little")
        self.device_id = int.from_bytes(header[2:4], "little")
        self._power = self._find_power(header)

    def _find_power(self, header: bytes) -> int | None:
        """Where the power management capability is. A chain that loops or leaves the space is cut."""
        if not header[layout.STATUS] & layout.STATUS_CAPABILITIES:
            return None
        at = header[layout.CAPABILITIES] & ~3
        for _ in range(_CHAIN_LIMIT):
            if at < HEADER_BYTES:
                return None
            kind, following = self._backend.region_read(_CONFIG, at, 2)
            if kind == _POWER_MANAGEMENT:
                return at
            at = following & ~3
        return None

    def _read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._backend.region_read(_CONFIG, offset, size), "little")

    def _write(self, offset: int, size: int, value: int) -> None:
        self._backend.region_write(_CONFIG, offset, value.to_bytes(size, "little"))

    @property
    def answers(self) -> bool:
        """Whether somebody is there: a device that is gone reads as all ones."""
        return self._read(0, 4) != _ALL_ONES

    def decodes(self) -> bool:
        """Whether the device decodes memory now. When it cannot be told, it does not. Never raises.

        While it does not, the kernel answers an access to a mapped BAR with SIGBUS
        (``__vfio_pci_memory_enabled``, ``drivers/vfio/pci/vfio_pci_core.c``).
        """
        try:
            if not self._read(_COMMAND, 2) & _COMMAND_MEMORY:
                return False
            return self._power is None or self._read(self._power + _PMCSR, 2) & _POWER_STATE != _D3HOT
        except CommandError as error:
            _log.warning("%s: whether it decodes memory could not be read: %s", self._backend.name, error)
            return False

    def save(self) -> Saved:
        """What :meth:`restore` gives back."""
        bars = tuple(self._read(layout.BAR0 + 4 * number, 4) for number in range(layout.BAR_COUNT))
        return Saved(self._read(_COMMAND, 2), bars, self._read(layout.ROM, 4))

    def stop_bus_master(self, saved: Saved) -> None:
        """No DMA from now on."""
        self._write(_COMMAND, 2, saved.command & ~_COMMAND_MASTER)

    def stop_dma(self) -> None:
        """No DMA from now on. A device whose command register cannot be read is switched off altogether."""
        try:
            command = self._read(_COMMAND, 2)
        except CommandError as error:
            _log.warning("%s: its command register could not be read, and is cleared: %s", self._backend.name, error)
            command = 0
        self._write(_COMMAND, 2, command & ~_COMMAND_MASTER)

    def restore(self, saved: Saved) -> None:
        """BARs first, then the command register: nothing decodes at an address that is not its own."""
        for number, value in enumerate(saved.bars):
            self._write(layout.BAR0 + 4 * number, 4, value)
        self._write(layout.ROM, 4, saved.rom)
        self.restore_command(saved)

    def restore_command(self, saved: Saved) -> None:
        """The command register alone."""
        self._write(_COMMAND, 2, saved.command)
