"""The MSI-X table and the pending bits a guest sees in place of the device's.

The device's own table holds the host's messages: the kernel hides it (``vfio_pci_bar_rw`` reads ones and drops writes).
The guest's is kept here: it has no effect but through its mask bits. Source: PCI 3.0, 6.8.2.
"""

from __future__ import annotations

from vfiod.server.devices.config.layout import ENTRY_CONTROL, ENTRY_MASKED, ENTRY_SIZE

__all__ = ["MsixTable"]

_WRITABLE = (0xFFFF_FFFC).to_bytes(4, "little") + b"\xff" * 8 + ENTRY_MASKED.to_bytes(4, "little")


class MsixTable:
    """The table of one device. Every vector begins masked, as after a reset of the device.

    Args:
        vectors: entries.

    """

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self._bytes = bytearray((bytes(ENTRY_CONTROL) + ENTRY_MASKED.to_bytes(4, "little")) * vectors)

    def __len__(self) -> int:
        """Bytes of it."""
        return len(self._bytes)

    def adopt(self, data: bytes) -> None:
        """Have it as it was kept. ValueError: of another size."""
        if len(data) != len(self._bytes):
            raise ValueError(f"The MSI-X table has {len(self._bytes)} bytes, {len(data)} were kept")
        self._bytes[:] = data

    def masked(self, vector: int) -> bool:
        """Whether the guest has this vector masked."""
        return bool(self._bytes[vector * ENTRY_SIZE + ENTRY_CONTROL] & ENTRY_MASKED)

    def unmasked(self) -> frozenset[int]:
        """Every vector that is not masked."""
        return frozenset(vector for vector in range(self.vectors) if not self.masked(vector))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the table, any width and alignment."""
        return bytes(self._bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> tuple[frozenset[int], bytes]:
        """Take the guest's write. Returns the vectors whose mask has changed, and what was there (:meth:`undo`)."""
        end = offset + len(data)
        old = bytes(self._bytes[offset:end])
        first, last = offset // ENTRY_SIZE, (end - 1) // ENTRY_SIZE
        before = {vector: self.masked(vector) for vector in range(first, last + 1)}
        for place, (was, value) in enumerate(zip(old, data, strict=True), offset):
            mask = _WRITABLE[place % ENTRY_SIZE]
            self._bytes[place] = was & ~mask | value & mask
        return frozenset(vector for vector, was in before.items() if self.masked(vector) is not was), old

    def undo(self, offset: int, old: bytes) -> None:
        """Take a write back."""
        self._bytes[offset : offset + len(old)] = old

    def pending(self, offset: int, own: bytes, *, all_masked: bool = False) -> bytes:
        """Pending bits, where the device's own say ``own``: only a vector that is masked can be pending.

        The device keeps the bit of a vector that the host has masked; one that is unmasked is delivered, and what the
        host's table says of it meanwhile is not the guest's business.
        """
        bits = int.from_bytes(own, "little")
        shown = 0
        vector = offset * 8
        for bit in range(len(own) * 8):
            if not bits >> bit & 1 or vector + bit >= self.vectors:
                continue
            if all_masked or self.masked(vector + bit):
                shown |= 1 << bit
        return shown.to_bytes(len(own), "little")
