"""Names of PCI vendors, devices and classes from ``pci.ids`` (pciutils), where the host has the file."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["PLACES", "PciNames", "system_names"]

PLACES: Final = (
    "/var/lib/pciutils/pci.ids",  # what update-pciids fetches on Debian
    "/usr/share/hwdata/pci.ids",
    "/usr/share/misc/pci.ids",
    "/usr/share/pci.ids",
    "/usr/share/misc/pci.ids.gz",
)
# The classes worth a name without the file (PCI Code and ID Assignment Specification, section 1).
CLASSES: Final = {
    0x0101: "IDE interface", 0x0106: "SATA controller", 0x0107: "SAS controller", 0x0108: "NVMe controller",
    0x0200: "Ethernet controller", 0x0280: "Network controller", 0x0300: "VGA controller", 0x0302: "3D controller",
    0x0403: "Audio device", 0x0600: "Host bridge", 0x0601: "ISA bridge", 0x0604: "PCI bridge",
    0x0700: "Serial controller", 0x0880: "System peripheral", 0x0C03: "USB controller", 0x0C05: "SMBus",
    0x1200: "Processing accelerator",
}  # fmt: skip


class PciNames:
    """The names in one ``pci.ids``. ``place``: the file; None: there is none, and ids are shown as numbers."""

    def __init__(self, lines: Iterable[str] = (), place: str | None = None) -> None:
        self.place = place
        self._vendors: dict[int, str] = {}
        self._devices: dict[tuple[int, int], str] = {}
        self._classes: dict[int, str] = dict(CLASSES)
        vendor = base = None
        for line in lines:
            text = line.rstrip("\n")
            if not text or text.startswith(("#", "\t\t")):
                continue
            code, _, name = text.strip().partition("  ")
            try:
                if text.startswith("C "):
                    vendor, base = None, int(code[2:], 16)
                    self._classes.setdefault(base << 8, name)
                elif not text.startswith("\t"):
                    vendor, base = int(code, 16), None
                    self._vendors[vendor] = name
                elif vendor is not None:
                    self._devices[vendor, int(code, 16)] = name
                elif base is not None:
                    self._classes[base << 8 | int(code, 16)] = name
            except ValueError:
                continue  # a line of another kind: newer files may have more

    def vendor(self, vendor: int) -> str | None:
        """A vendor's name, or None."""
        return self._vendors.get(vendor)

    def device(self, vendor: int, device: int) -> str | None:
        """A device's name, or None."""
        return self._devices.get((vendor, device))

    def kind(self, code: int) -> str:
        """What a class code (24 bits: base, sub, interface) stands for; ``class 0604`` where nobody knows."""
        return self._classes.get(code >> 8) or self._classes.get(code >> 16 << 8) or f"class {code >> 8:04x}"


@functools.cache
def system_names(places: tuple[str, ...] = PLACES) -> PciNames:
    """The host's file, the newest place first; without one, ids are shown as numbers."""
    for place in places:
        path = Path(place)
        try:
            if path.suffix == ".gz":
                with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
                    return PciNames(lines, place)
            with path.open(encoding="utf-8", errors="replace") as lines:
                return PciNames(lines, place)
        except OSError:
            continue
    return PciNames()
