"""The configuration space of a small PCI Express endpoint, as vfio-pci shows it.

Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 3.0, section 7.8; and, for what a
user of vfio sees, ``drivers/vfio/pci/vfio_pci_config.c``: BARs hold what the guest wrote and are sized by writing ones,
memory is enabled and bus mastering is off when a user opens the device, and MSI's enable bit shows only while
``SET_IRQS`` has MSI enabled.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["ConfigSpace"]

SIZE: Final = 4096

COMMAND: Final = 0x04
STATUS: Final = 0x06
BAR0: Final = 0x10
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
MSI: Final = 0x40
EXPRESS: Final = 0x60
MSIX: Final = 0xA0

COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_PARITY: Final = 1 << 6
COMMAND_SERR: Final = 1 << 8
COMMAND_INTX_DISABLE: Final = 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4
BAR_64: Final = 0b100
BAR_PREFETCH: Final = 0b1000
MSI_ENABLE: Final = 1 << 0
MSIX_ENABLE: Final = 1 << 15
MSI_QSIZE: Final = 0b111 << 4
MSI_64: Final = 1 << 7
EXPRESS_DEVICE_CONTROL: Final = EXPRESS + 8
INITIATE_FLR: Final = 1 << 15


class ConfigSpace:
    """Configuration space, 4 KiB, little-endian.

    Args:
        vendor: vendor id.
        device: device id.
        bars: per BAR its size in bytes (a power of two), and whether it is 64-bit prefetchable (takes two slots).
        msi_vectors: of the MSI capability; a power of two.
        msix: vectors of the MSI-X capability, and where its table and its pending bits are in BAR0, bytes; None: it
            has no such capability.

    Attributes:
        msi_on: whether ``SET_IRQS`` has MSI enabled.
        msix_on: whether ``SET_IRQS`` has MSI-X enabled.

    """

    size: Final = SIZE

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        bars: Mapping[int, tuple[int, bool]],
        msi_vectors: int,
        msix: tuple[int, int, int] | None = None,
    ) -> None:
        self.msi_on = False
        self.msix_on = False
        self._power_on = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        self._set(0x00, "HH", vendor, device)
        self._set(COMMAND, "HH", COMMAND_MEMORY, STATUS_CAPABILITIES)
        self._allow(
            COMMAND, "H", COMMAND_MEMORY | COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
        )
        self._set(0x08, "I", 0xFF << 24 | 0x01)  # class 0xff0000: fits no other; revision 1
        self._set(0x2C, "HH", vendor, device)
        self._set(CAPABILITIES, "B", MSI)
        self._set(INTERRUPT_LINE, "BB", 0xFF, 1)
        self._allow(INTERRUPT_LINE, "B", 0xFF)
        for number, (size, wide) in bars.items():
            at = BAR0 + 4 * number
            if wide:
                self._set(at, "Q", BAR_64 | BAR_PREFETCH)
                self._allow(at, "Q", -size & 0xFFFF_FFFF_FFFF_FFF0)
            else:
                self._allow(at, "I", -size & 0xFFFF_FFF0)
        self._has_msix = msix is not None
        self._msi_most = msi_vectors.bit_length() - 1
        self._set(MSI, "BBH", 0x05, EXPRESS, MSI_64 | self._msi_most << 1)
        self._allow(MSI + 2, "H", MSI_ENABLE | MSI_QSIZE)
        self._allow(MSI + 4, "IIH", 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF)
        # Express capability, version 2, endpoint; function level reset; a link of one lane at 2.5 GT/s.
        self._set(
            EXPRESS, "BBHIHHIHH", 0x10, 0 if msix is None else MSIX, 0x0002, 1 << 28 | 1 << 15, 0x2810, 0, 0x11, 0, 0x11
        )
        self._allow(EXPRESS_DEVICE_CONTROL, "H", 0x7FFF)
        if msix is not None:
            # Both in BAR0. Neither bit of the control can be written: the kernel's users cannot either.
            self._set(MSIX, "BBHII", 0x11, 0, msix[0] - 1, msix[1], msix[2])
        self._bytes = bytearray(self._power_on)

    def reset(self) -> None:
        """As after power-on."""
        self._bytes[:] = self._power_on

    def save(self) -> dict[str, Any]:
        """Its bytes, and what SET_IRQS switched on."""
        return {"bytes": self._bytes.hex(), "msi_on": self.msi_on, "msix_on": self.msix_on}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Be as saved."""
        self._bytes[:] = bytes.fromhex(saved["bytes"])
        self.msi_on, self.msix_on = saved["msi_on"], saved["msix_on"]

    @property
    def bus_master(self) -> bool:
        """Whether the device may write to memory."""
        return bool(self._bytes[COMMAND] & COMMAND_MASTER)

    @property
    def intx_disable(self) -> bool:
        """Whether it must keep its INTx line to itself."""
        return bool(self._bytes[COMMAND + 1] & COMMAND_INTX_DISABLE >> 8)

    def read(self, offset: int, length: int, *, intx: bool) -> bytes:
        """Bytes within the space; ``intx``: whether an interrupt is pending (a status bit)."""
        data = self._bytes
        data[STATUS] = data[STATUS] & ~STATUS_INTERRUPT | STATUS_INTERRUPT * intx
        if not self.msi_on:
            data[MSI + 2] &= ~MSI_ENABLE
        if self._has_msix:
            data[MSIX + 3] = data[MSIX + 3] & ~(MSIX_ENABLE >> 8) | (MSIX_ENABLE >> 8) * self.msix_on
        return bytes(data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> bool:
        """Write what may be written; whether it asked for a function level reset."""
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | value & mask
        # More messages than the capability has are cut to what it has.
        queue = min((self._bytes[MSI + 2] & MSI_QSIZE) >> 4, self._msi_most)
        self._bytes[MSI + 2] = self._bytes[MSI + 2] & ~MSI_QSIZE | queue << 4
        high = EXPRESS_DEVICE_CONTROL + 1 - offset
        return 0 <= high < len(data) and bool(data[high] & INITIATE_FLR >> 8)

    def _set(self, at: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, self._power_on, at, *values)

    def _allow(self, at: int, layout: str, *masks: int) -> None:
        struct.pack_into("<" + layout, self._writable, at, *masks)
