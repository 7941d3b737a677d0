"""The configuration space a guest sees.

Every bit is either the device's or emulated. Emulated: base addresses (which are sized by writing ones, and never show
where the host put the device), the ROM's address, the MSI and MSI-X capabilities, the multifunction bit, the
interrupt line and pin, and pointers of capability chains that were cut. Writes go to the device as well; that is the
caller's business, and the kernel filters what is unsafe (``drivers/vfio/pci/vfio_pci_config.c``).

Follows QEMU ``hw/vfio/pci.c`` (``vfio_pci_read_config``, ``vfio_pci_write_config``, ``vfio_pci_add_capabilities``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vfiod.protocol.catalogue.words import IrqKind
from vfiod.server.devices.config import layout as at
from vfiod.server.devices.config.capabilities import Capability, Chains, walk

__all__ = ["Guest", "MsixPlace", "VirtualConfig"]

_DWORD: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Guest:
    """What the guest has switched on.

    Attributes:
        msi: vectors it has enabled of MSI; 0: MSI is off.
        msix: MSI-X is on.
        masked: with MSI-X: all vectors are masked together ("function mask").

    """

    msi: int = 0
    msix: bool = False
    masked: bool = False


@dataclass(frozen=True, slots=True)
class MsixPlace:
    """Where a device's MSI-X structures are.

    Attributes:
        vectors: entries of the table.
        table_bar, table_offset: the table: BAR, and bytes into it.
        pba_bar, pba_offset: the pending bits: BAR, and bytes into it.

    """

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return self.vectors * at.ENTRY_SIZE

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits: whole quadwords (PCI 3.0, 6.8.2.5)."""
        return -(-self.vectors // 64) * 8


class VirtualConfig:
    """One device's configuration space as its guest sees it.

    Args:
        image: the device's own, whole: 256 or 4096 bytes.
        bars: bytes of each BAR, by number; a BAR that is not named, or has none, is absent.
        rom: bytes of the ROM as the guest sees it; 0: it sees none.
        intx: whether the device has an INTx that can be used.
        multifunction: whether the multifunction bit is set.

    Attributes:
        chains: the capabilities.
        msix: where the MSI-X structures are; None without the capability.
        warnings: sentences about what is wrong with the device's own space.

    """

    def __init__(
        self, image: bytes, *, bars: Mapping[int, int], rom: int = 0, intx: bool = True, multifunction: bool = False
    ) -> None:
        self._kind = IrqKind.NONE
        self._emulated = bytearray(len(image))
        self._values = bytearray(len(image))
        self._writable = bytearray(len(image))
        self.chains: Final[Chains] = walk(image)
        warnings = list(self.chains.warnings)
        self._emulate(at.HEADER_TYPE, 1, at.MULTIFUNCTION, at.MULTIFUNCTION if multifunction else 0)
        self._place_bars(image, bars)
        self._place_rom(rom)
        self._emulate(at.INTERRUPT_LINE, 1, 0xFF, image[at.INTERRUPT_LINE], writable=0xFF)
        self._emulate(at.INTERRUPT_PIN, 1, 0xFF, image[at.INTERRUPT_PIN] if intx else 0)
        for cut in self.chains.cuts:
            self._emulate(cut.offset, cut.size, cut.mask, 0)
        self._msi = self._place_msi(image, self.chains.find(at.MSI_ID), warnings)
        self._msix = self._place_msix(self.chains.find(at.MSIX_ID), warnings)
        self.msix: Final = None if self._msix is None else _msix_place(image, self._msix, bars, warnings)
        self.warnings: Final = tuple(warnings)

    # --- making it --------------------------------------------------------------------------------

    def _emulate(self, offset: int, size: int, mask: int, value: int, *, writable: int = 0) -> None:
        """From now on these bits are emulated, with this value; the guest can write the writable ones."""
        for array, bits in (
            (self._emulated, mask),
            (self._values, value & mask),
            (self._writable, writable & mask),
        ):
            old = int.from_bytes(array[offset : offset + size], "little")
            array[offset : offset + size] = (old & ~mask | bits).to_bytes(size, "little")

    def _place_bars(self, image: bytes, bars: Mapping[int, int]) -> None:
        number = 0
        while number < at.BAR_COUNT:
            where = at.BAR0 + 4 * number
            size = _power_of_two(bars.get(number, 0))
            own = int.from_bytes(image[where : where + 4], "little")
            flags = own & (at.BAR_IO_FLAGS if own & at.BAR_IO else at.BAR_MEMORY_FLAGS)
            wide = not own & at.BAR_IO and own & at.BAR_TYPE == at.BAR_64 and number + 1 < at.BAR_COUNT
            width, every = (8, 2**64 - 1) if wide and size else (4, _DWORD)
            mask = -size & every & ~(at.BAR_IO_FLAGS if own & at.BAR_IO else at.BAR_MEMORY_FLAGS) if size else 0
            self._emulate(where, width, every, flags if size else 0, writable=mask)
            number += width // 4

    def _place_rom(self, size: int) -> None:
        mask = (-max(_power_of_two(size), at.ROM_LEAST) & at.ROM_ADDRESS) | at.ROM_ENABLE if size else 0
        self._emulate(at.ROM, 4, _DWORD, 0, writable=mask)

    def _place_msi(self, image: bytes, found: Capability | None, warnings: list[str]) -> Capability | None:
        if found is None or not self._fits("MSI", found, 4, warnings):
            return None
        where = found.offset
        flags = int.from_bytes(image[where + at.MSI_FLAGS : where + at.MSI_FLAGS + 2], "little")
        wide, maskable = flags & at.MSI_64, flags & at.MSI_MASKABLE
        data = where + (12 if wide else 8)
        size = data + (12 if maskable else 2) - where
        if not self._fits("MSI", found, size, warnings):
            return None
        flags &= ~(at.MSI_ENABLE | at.MSI_COUNT)
        self._emulate(where + at.MSI_FLAGS, 2, 0xFFFF, flags, writable=at.MSI_ENABLE | at.MSI_COUNT)
        self._emulate(where + 4, 4, _DWORD, 0, writable=0xFFFF_FFFC)
        if wide:
            self._emulate(where + 8, 4, _DWORD, 0, writable=_DWORD)
        self._emulate(data, 2, 0xFFFF, 0, writable=0xFFFF)
        if maskable:
            self._emulate(data + 4, 4, _DWORD, 0, writable=_DWORD)
        return found

    def _place_msix(self, found: Capability | None, warnings: list[str]) -> Capability | None:
        if found is None or not self._fits("MSI-X", found, at.MSIX_SIZE, warnings):
            return None
        self._emulate(found.offset + at.MSIX_FLAGS + 1, 1, 0xC0, 0, writable=(at.MSIX_ENABLE | at.MSIX_MASK_ALL) >> 8)
        return found

    def _fits(self, name: str, found: Capability, size: int, warnings: list[str]) -> bool:
        if size <= found.size:
            return True
        warnings.append(
            f"The {name} capability at 0x{found.offset:02x} needs {size} bytes and has {found.size}: the guest sees "
            "the device's own, and it switches nothing"
        )
        return False

    # --- looking ------------------------------------------------------------------------------------

    def virtual(self, offset: int, size: int) -> bool:
        """Whether anything of this range is emulated."""
        return any(self._emulated[offset : offset + size])

    def merge(self, offset: int, own: bytes) -> bytes:
        """What the guest reads where the device says ``own``."""
        end = offset + len(own)
        mask = int.from_bytes(self._emulated[offset:end], "little")
        if not mask:
            return own
        value = int.from_bytes(self._values[offset:end], "little")
        return (int.from_bytes(own, "little") & ~mask | value).to_bytes(len(own), "little")

    def switches(self, offset: int, size: int) -> bool:
        """Whether a write there may switch MSI or MSI-X on or off."""
        end = offset + size
        if self._msi is not None and offset <= self._msi.offset + at.MSI_FLAGS < end:
            return True
        return self._msix is not None and offset <= self._msix.offset + at.MSIX_FLAGS + 1 < end

    @property
    def guest(self) -> Guest:
        """What the guest has switched on now."""
        msi = flags = 0
        if self._msi is not None:
            control = self._values[self._msi.offset + at.MSI_FLAGS]
            if control & at.MSI_ENABLE:
                msi = 1 << min(control >> at.MSI_COUNT_SHIFT & 7, control >> at.MSI_MOST_SHIFT & 7)
        if self._msix is not None:
            flags = self._values[self._msix.offset + at.MSIX_FLAGS + 1] << 8
        return Guest(msi, bool(flags & at.MSIX_ENABLE), bool(flags & at.MSIX_MASK_ALL))

    # --- changing -------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> bytes:
        """Take the guest's write, as far as it is to emulated bits. Returns what was there, for :meth:`undo`."""
        end = offset + len(data)
        old = bytes(self._values[offset:end])
        mask = int.from_bytes(self._writable[offset:end], "little")
        if mask:
            value = int.from_bytes(old, "little") & ~mask | int.from_bytes(data, "little") & mask
            self._values[offset:end] = value.to_bytes(len(data), "little")
            self._limit_msi()
        return old

    def undo(self, offset: int, old: bytes) -> None:
        """Take a write back."""
        self._values[offset : offset + len(old)] = old

    def sync(self, kind: IrqKind, vectors: int) -> None:
        """Show which kind of interrupt is active, and, of MSI, how many vectors are allocated.

        Whoever changes it, the guest by its capabilities or the monitor by ``irq-start``, there is one truth. Disabling
        sets the number of MSI vectors to 1 (field 0).
        """
        if self._msi is not None:
            where = self._msi.offset + at.MSI_FLAGS
            control = self._values[where]
            # Before it is enabled, the guest may have written how many it will want: that stays.
            if IrqKind.MSI in (kind, self._kind):
                control &= ~(at.MSI_ENABLE | at.MSI_COUNT)
            if kind is IrqKind.MSI:
                control |= at.MSI_ENABLE | max(vectors - 1, 0).bit_length() << at.MSI_COUNT_SHIFT
            self._values[where] = control
        if self._msix is not None:
            where = self._msix.offset + at.MSIX_FLAGS + 1
            flags = self._values[where] & ~(at.MSIX_ENABLE >> 8)
            self._values[where] = flags | (at.MSIX_ENABLE >> 8 if kind is IrqKind.MSIX else 0)
        self._kind = kind

    # --- over a change of the process -----------------------------------------------------------------

    def keep(self) -> tuple[bytes, IrqKind]:
        """The emulated bits as they are, and the kind of interrupt that is shown as active."""
        return bytes(self._values), self._kind

    def adopt(self, values: bytes, kind: IrqKind) -> None:
        """Have them again. ValueError: of a configuration space of another size."""
        if len(values) != len(self._values):
            raise ValueError(f"The configuration space has {len(self._values)} bytes, {len(values)} were kept")
        self._values[:] = values
        self._kind = kind

    def _limit_msi(self) -> None:
        """More MSI vectors than the device has are cut to what it has."""
        if self._msi is None:
            return
        where = self._msi.offset + at.MSI_FLAGS
        control = self._values[where]
        most = control >> at.MSI_MOST_SHIFT & 7
        if control >> at.MSI_COUNT_SHIFT & 7 > most:
            self._values[where] = control & ~at.MSI_COUNT | most << at.MSI_COUNT_SHIFT


def _power_of_two(size: int) -> int:
    """The next power of two: that is how base addresses are sized."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def _msix_place(image: bytes, found: Capability, bars: Mapping[int, int], warnings: list[str]) -> MsixPlace | None:
    flags, table, pba = (
        int.from_bytes(image[found.offset + place : found.offset + place + size], "little")
        for place, size in ((at.MSIX_FLAGS, 2), (at.MSIX_TABLE, 4), (at.MSIX_PBA, 4))
    )
    place = MsixPlace(
        (flags & at.MSIX_COUNT) + 1,
        table & at.MSIX_BIR,
        table & ~at.MSIX_BIR,
        pba & at.MSIX_BIR,
        pba & ~at.MSIX_BIR,
    )
    for name, bar, offset, size in (
        ("table", place.table_bar, place.table_offset, place.table_size),
        ("pending bits", place.pba_bar, place.pba_offset, place.pba_size),
    ):
        if offset + size > bars.get(bar, 0):
            warnings.append(
                f"The MSI-X {name} ({size} bytes at 0x{offset:x}) are not within BAR {bar} "
                f"({bars.get(bar, 0)} bytes): they are not virtualised"
            )
            return None
    return place
