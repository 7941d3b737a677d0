"""Offsets and bits of PCI configuration space.

Sources: PCI Local Bus Specification 3.0, chapter 6 and section 6.8 (MSI, MSI-X); PCI Express Base Specification 3.0,
section 7.9 (extended capabilities).
"""

from __future__ import annotations

from typing import Final

STANDARD_SIZE: Final = 256
EXPRESS_SIZE: Final = 4096
HEADER_SIZE: Final = 64

STATUS: Final = 0x06
STATUS_CAPABILITIES: Final = 1 << 4
HEADER_TYPE: Final = 0x0E
MULTIFUNCTION: Final = 1 << 7
BAR0: Final = 0x10
BAR_COUNT: Final = 6
ROM: Final = 0x30
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

BAR_IO: Final = 1 << 0
BAR_IO_FLAGS: Final = 0b11
BAR_TYPE: Final = 0b110
BAR_64: Final = 0b100
BAR_MEMORY_FLAGS: Final = 0b1111

ROM_ENABLE: Final = 1 << 0
ROM_ADDRESS: Final = 0xFFFF_F800
ROM_LEAST: Final = 1 << 11
"""Bytes: bits 10 to 1 of the ROM's register are reserved, so no ROM is smaller."""

MSI_ID: Final = 0x05
MSI_FLAGS: Final = 2
MSI_ENABLE: Final = 1 << 0
MSI_MOST_SHIFT: Final = 1
MSI_COUNT_SHIFT: Final = 4
MSI_COUNT: Final = 0b111 << MSI_COUNT_SHIFT
MSI_64: Final = 1 << 7
MSI_MASKABLE: Final = 1 << 8

MSIX_ID: Final = 0x11
MSIX_FLAGS: Final = 2
MSIX_TABLE: Final = 4
MSIX_PBA: Final = 8
MSIX_SIZE: Final = 12
MSIX_ENABLE: Final = 1 << 15
MSIX_MASK_ALL: Final = 1 << 14
MSIX_COUNT: Final = 0x7FF
MSIX_BIR: Final = 0b111

ENTRY_SIZE: Final = 16
"""Bytes of one entry of the MSI-X table: address, upper address, data, vector control."""
ENTRY_CONTROL: Final = 12
ENTRY_MASKED: Final = 1 << 0
