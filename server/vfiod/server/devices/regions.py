"""A device's regions: what may be accessed how, and the two ways to do it.

Every region has a slow path (read and write through the backend). One that may be mapped also has a fast path: a
window onto an area of it, where an access is one load or store (:class:`~vfiod.server.kernel.memory.RegionWindow`).
Everything that can be refused is refused before any system call.

The fast path is taken only while all of this holds: the device may be mapped (no ``x-no-mmap``); no INTx waits for
the access that completes it; the device decodes memory (else the kernel answers a mapped access with SIGBUS,
``vfio_pci_mmap_fault``), and nobody else can switch that off (no fd of it was given out).
"""

from __future__ import annotations

import logging
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.regions import Area, RegionInfo
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.limits import MAX_REGION_TRANSFER
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.overlays import Overlay
from vfiod.server.kernel.memory import ACCESS_SIZES, RegionWindow
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

__all__ = [
    "BAR_COUNT",
    "CONFIG",
    "INLINE_BYTES",
    "REGION_NAMES",
    "ROM",
    "VGA",
    "Region",
    "Regions",
    "describe",
    "describe_pci",
]

_log: Final = logging.getLogger(__name__)
_calls: Final = Syscalls()

_READ: Final = int(vfio.RegionFlags.READ)
_WRITE: Final = int(vfio.RegionFlags.WRITE)

BAR_COUNT: Final = 6
ROM: Final = int(vfio.PciRegion.ROM)
CONFIG: Final = int(vfio.PciRegion.CONFIG)
VGA: Final = int(vfio.PciRegion.VGA)
REGION_NAMES: Final = ("bar0", "bar1", "bar2", "bar3", "bar4", "bar5", "rom", "config", "vga")
"""Names of the PCI regions, by index; any other region N, of any device, is ``regionN``."""

INLINE_BYTES: Final = 4096
"""Bytes of a transfer that are moved at once on the loop: config space whole. More goes to a thread, and there by
the slow path only, which waits in the kernel and computes nothing (the interpreter's lock is the loop's)."""


class Region(Struct, eq=False):
    """One region.

    Attributes:
        index: of VFIO.
        name: as commands know it.
        info: as the device says; size 0 when it is absent or was dropped.
        areas: what may be mapped, in whole pages: (offset, size) in bytes.
        note: why it is slow or absent, when that needs saying.
        windows: the mapped areas, once one was needed.
        overlay: what the guest sees in place of the device's own bytes.
        completes: whether an access to it can complete an interrupt.
        by_bytes: it is configuration space: read and written as bytes, at any offset.

    """

    index: int
    name: str
    info: vfio.RegionInfo
    areas: tuple[tuple[int, int], ...] = ()
    note: str | None = None
    windows: tuple[tuple[int, int, RegionWindow], ...] | None = None
    overlay: Overlay | None = None
    completes: bool = False
    by_bytes: bool = False

    @property
    def ready(self) -> bool:
        """Whether few bytes of it can be read at once, on the loop."""
        return self.overlay is None or self.overlay.ready

    def leave_out(self, offset: int, size: int, why: str) -> None:
        """Take the pages of a range out of what may be mapped, before anything is."""
        first, end = offset // PAGE_SIZE * PAGE_SIZE, -(-(offset + size) // PAGE_SIZE) * PAGE_SIZE
        kept: list[tuple[int, int]] = []
        for start, length in self.areas:
            stop = start + length
            kept += [(a, b - a) for a, b in ((start, min(stop, first)), (max(start, end), stop)) if b > a]
        if self.areas and not kept:
            self.note = why
        self.areas = tuple(kept)


def describe(index: int, info: vfio.RegionInfo, name: str | None = None) -> Region:
    """A region as the device describes it: which whole pages of it may be mapped, and why not."""
    region = Region(index, f"region{index}" if name is None else name, info)
    if not info.present or not info.mappable:
        return region
    if info.size < PAGE_SIZE:
        region.note = f"smaller than a page of {PAGE_SIZE} bytes: every access is a read or write"
        return region
    areas = []
    for area in info.areas:
        first = -(-area.offset // PAGE_SIZE) * PAGE_SIZE
        end = min(area.offset + area.size, info.size) // PAGE_SIZE * PAGE_SIZE
        if end > first:
            areas.append((first, end - first))
    region.areas = tuple(areas)
    if not areas:
        region.note = f"no whole page of {PAGE_SIZE} bytes of it may be mapped: every access is a read or write"
    elif info.offset % PAGE_SIZE:
        region.areas = ()
        region.note = "it does not begin on a page of its fd: every access is a read or write"
    return region


def describe_pci(index: int, info: vfio.RegionInfo) -> Region:
    """A region of a PCI device: with its name there, and what an access to it means."""
    region = describe(index, info, REGION_NAMES[index] if index < len(REGION_NAMES) else None)
    # QEMU's vfio_region_ops, which carry vfio_eoi, serve the BARs and VGA.
    region.completes = index < BAR_COUNT or index == VGA
    region.by_bytes = index == CONFIG
    return region


class Regions:
    """The regions of one device.

    Args:
        device: what the device is called, for messages.
        backend: where it comes from.
        regions: in the order of their indexes.
        no_mmap: never map any (``x-no-mmap``).
        foreign: what maps them is another program's memory (``Backend.foreign``): never map any either.

    Attributes:
        trapped: an INTx waits for the access that completes it.
        shared: an fd that maps a region was given out.
        decodes: the device decodes memory, and is awake.

    """

    def __init__(
        self,
        device: str,
        backend: Backend,
        regions: tuple[Region, ...],
        *,
        no_mmap: bool = False,
        foreign: bool = False,
    ) -> None:
        self.device = device
        self.all = regions
        self.no_mmap = no_mmap or foreign
        self._foreign = foreign
        self.trapped = False
        self.shared = False
        self.decodes = True
        self._backend = backend
        self._by_name = {region.name: region for region in regions}
        self._closed = False

    # --- looking --------------------------------------------------------------------------------------

    @property
    def can_map(self) -> bool:
        """Whether any region could be accessed by its mapping."""
        return not self.no_mmap and any(region.areas for region in self.all)

    @property
    def fast_path(self) -> bool:
        """Whether mapped access is on at this moment."""
        return not self.trapped and self.decodes and not self.shared and self.can_map and not self._closed

    def find(self, wanted: int | str) -> Region:
        """A region by index or name. InvalidArgument when the device has none such; an absent one is found."""
        if isinstance(wanted, str):
            region = self._by_name.get(wanted)
        else:
            region = self.all[wanted] if 0 <= wanted < len(self.all) else None
        if region is None:
            raise InvalidArgument(
                f"Device '{self.device}' has no region {wanted!r}; it has indexes 0 to {len(self.all) - 1}: "
                + ", ".join(one.name for one in self.all)
            )
        return region

    def infos(self) -> list[RegionInfo]:
        """For ``query-regions``."""
        fast = self.fast_path
        return [self._info(region, fast) for region in self.all]

    def _info(self, region: Region, fast: bool) -> RegionInfo:
        info = region.info
        kind = info.type
        return RegionInfo(
            device=self.device,
            region=region.index,
            name=region.name,
            size=info.size,
            readable=info.present and info.readable,
            writable=info.present and info.writable,
            mappable=bool(region.areas),
            mapped=fast and bool(region.areas),
            areas=[Area(offset=offset, size=size) for offset, size in region.areas],
            type=UNSET if kind is None else kind.type,
            subtype=UNSET if kind is None else kind.subtype,
            msix_mappable=info.msix_mappable,
            note=self._note(region) or UNSET,
        )

    def _note(self, region: Region) -> str | None:
        if region.note is not None or not region.areas:
            return region.note
        if self._foreign:
            return "its memory is another program's: vfiod gives it out, and accesses it by read and write"
        if self.no_mmap:
            return "x-no-mmap: every access is a read or write"
        if self.shared:
            return "its fd was given out, and its receiver can switch memory decoding off: access is by read and write"
        if not self.decodes:
            return "the device decodes no memory (command register, power state): access is by read and write"
        if self.trapped:
            return "an INTx is pending: accesses are by read and write until it is completed"
        return None

    def look_again(self) -> None:
        """A program that serves the device may have been restarted: its regions begin elsewhere in their files."""
        for region in self.all if self._foreign else ():
            if region.info.present:
                offset = self._backend.region_info(region.index).offset
                region.info = replace(region.info, offset=offset)

    # --- access ---------------------------------------------------------------------------------------

    def check(self, region: Region, offset: int, size: int, *, write: bool) -> None:
        """Refuse what can never work: an absent region, a wrong direction, a range outside. InvalidArgument."""
        info = region.info
        if not info.present:
            why = f" ({region.note})" if region.note else ""
            raise InvalidArgument(f"Device '{self.device}' has no {region.name}: its size is 0{why}")
        if not (info.writable if write else info.readable):
            raise InvalidArgument(
                f"Region {region.name} of device '{self.device}' cannot be {'written' if write else 'read'}: "
                f"it is {'read-only' if write else 'write-only'}",
                errno="EACCES",
            )
        if size > MAX_REGION_TRANSFER:
            raise InvalidArgument(
                f"{size} bytes of region {region.name} of device '{self.device}' are too many at once: "
                f"at most {MAX_REGION_TRANSFER}"
            )
        if offset < 0 or size < 1 or offset + size > info.size:
            raise InvalidArgument(
                f"Region {region.name} of device '{self.device}' has {info.size} bytes (0x{info.size:x}): "
                f"{size} bytes at offset {offset} (0x{offset:x}) are out of range"
            )

    def check_sized(self, region: Region, offset: int, size: int, *, write: bool) -> None:
        """Refuse what cannot be one access of this width. InvalidArgument."""
        info = region.info
        # Nearly every access passes all of it: asked here in one go, by the integer below the flags, whose own "&" is
        # slow. What does not pass is told below what is wrong with it.
        allowed = int.__and__(info.flags, _WRITE if write else _READ)
        if allowed and size in ACCESS_SIZES and not offset % size and 0 <= offset <= info.size - size:
            return
        if size not in ACCESS_SIZES:
            raise InvalidArgument(f"An access has 1, 2, 4 or 8 bytes, not {size}")
        self.check(region, offset, size, write=write)
        if offset % size and not region.by_bytes:  # configuration space is read and written as bytes
            raise InvalidArgument(
                f"Offset {offset} (0x{offset:x}) of region {region.name} of device '{self.device}' is not a multiple "
                f"of {size}: no single access can do that; ask for smaller accesses, or for bytes "
                f"({'data' if write else 'length'})"
            )

    def load(self, region: Region, offset: int, size: int) -> int:
        """One access of ``size`` bytes, little-endian. Checked before any system call. OperationFailed."""
        self.check_sized(region, offset, size, write=False)
        overlay = region.overlay
        window = None
        if overlay is not None and overlay.covers(offset, size):
            value = int.from_bytes(self._read_through(region, overlay, offset, size), "little")
        elif (window := self._window(region, offset, size)) is not None:
            value = window[1].load(offset - window[0], size)
        else:
            value = int.from_bytes(self._read(region, offset, size), "little")
        if trace.region_read.on or trace.config_read.on:
            self._trace(region, offset, size, f"0x{value:x}", window is not None, write=False)
        return value

    def store(self, region: Region, offset: int, size: int, value: int) -> None:
        """One access of ``size`` bytes, little-endian. InvalidArgument when the value does not fit; OperationFailed."""
        self.check_sized(region, offset, size, write=True)
        if not 0 <= value < 1 << 8 * size:
            raise InvalidArgument(
                f"Value {value} does not fit {size} bytes at offset {offset} (0x{offset:x}) of region {region.name} "
                f"of device '{self.device}': it must be 0 to {(1 << 8 * size) - 1}"
            )
        overlay = region.overlay
        window = None
        if overlay is not None and overlay.covers(offset, size):
            self._write_through(region, overlay, offset, value.to_bytes(size, "little"))
        elif (window := self._window(region, offset, size)) is not None:
            window[1].store(offset - window[0], size, value)
        else:
            self._write(region, offset, value.to_bytes(size, "little"))
        if trace.region_write.on or trace.config_write.on:
            self._trace(region, offset, size, f"0x{value:x}", window is not None, write=True)

    def read(self, region: Region, offset: int, length: int) -> bytes:
        """Bytes, by the widest aligned accesses that fit. Blocks as long as the backend; may be called in a thread.

        On the slow path the kernel splits the same way (``vfio_pci_core_do_io_rw``).
        """
        self.check(region, offset, length, write=False)
        overlay = region.overlay
        if overlay is not None and overlay.covers(offset, length):
            data, window = self._read_through(region, overlay, offset, length), None
        elif (window := self._window(region, offset, length) if length <= INLINE_BYTES else None) is None:
            data = self._read(region, offset, length)
        else:
            begin, mapped = window
            data = b"".join(
                mapped.load(at - begin, width).to_bytes(width, "little") for at, width in widest(offset, length)
            )
        if trace.region_read.on or trace.config_read.on:
            self._trace(region, offset, length, "...", window is not None, write=False)
        return data

    def write(self, region: Region, offset: int, data: bytes) -> None:
        """Bytes, by the widest aligned accesses that fit. Blocks as long as the backend; may be called in a thread."""
        self.check(region, offset, len(data), write=True)
        overlay = region.overlay
        if overlay is not None and overlay.covers(offset, len(data)):
            self._write_through(region, overlay, offset, data)
            window = None
        elif (window := self._window(region, offset, len(data)) if len(data) <= INLINE_BYTES else None) is None:
            self._write(region, offset, data)
        else:
            begin, mapped = window
            for at, width in widest(offset, len(data)):
                part = data[at - offset : at - offset + width]
                mapped.store(at - begin, width, int.from_bytes(part, "little"))
        if trace.region_write.on or trace.config_write.on:
            self._trace(region, offset, len(data), "...", window is not None, write=True)

    # --- inside ---------------------------------------------------------------------------------------

    def _window(self, region: Region, offset: int, size: int) -> tuple[int, RegionWindow] | None:
        """Where the area begins, and its window, when the fast path can do this access."""
        # As fast_path, without looking whether any region can be mapped: this one can.
        if not region.areas or self.trapped or self.shared or not self.decodes or self.no_mmap or self._closed:
            return None
        windows = region.windows
        if windows is None:
            windows = self._map(region)
        for first, end, window in windows:
            if first <= offset and offset + size <= end:
                return first, window
        return None

    def _map(self, region: Region) -> tuple[tuple[int, int, RegionWindow], ...]:
        """Map a region's areas when one is first needed: most are only ever mapped by the hypervisor."""
        windows: list[tuple[int, int, RegionWindow]] = []
        fd = self._backend.region_fd(region.index)
        try:
            if fd is not None:
                for offset, size in region.areas:
                    window = RegionWindow(
                        _calls,
                        fd,
                        region.info.offset + offset,
                        size,
                        readable=region.info.readable,
                        writable=region.info.writable,
                    )
                    windows.append((offset, offset + size, window))
        except OSError as error:
            # The slow path does the same: an accelerator that is missing is no error of the access.
            for _, _, window in windows:
                window.close()
            windows.clear()
            region.note = f"mapping it failed ({OperationFailed('mmap', region.name, errno=error.errno or 0).errno})"
            _log.warning("Mapping region %s of device %s failed: %s", region.name, self.device, error)
        region.windows = tuple(windows)
        return region.windows

    def _read_through(self, region: Region, overlay: Overlay, offset: int, length: int) -> bytes:
        return overlay.read(offset, length, lambda at, size: self._read(region, at, size))

    def _write_through(self, region: Region, overlay: Overlay, offset: int, data: bytes) -> None:
        overlay.write(offset, data, lambda at, part: self._write(region, at, part))

    def pieces(self, region: Region, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """A range in order, in pieces: (offset, bytes, whether a write there must be made on the loop)."""
        if region.overlay is None or not region.overlay.covers(offset, length):
            return [(offset, length, False)]
        return region.overlay.pieces(offset, length)

    def _read(self, region: Region, offset: int, length: int) -> bytes:
        try:
            return self._backend.region_read(region.index, offset, length)
        except OperationFailed as error:
            raise self._explained(region, error) from error

    def _write(self, region: Region, offset: int, data: bytes) -> None:
        try:
            self._backend.region_write(region.index, offset, data)
        except OperationFailed as error:
            raise self._explained(region, error) from error

    def _explained(self, region: Region, error: OperationFailed) -> OperationFailed:
        if region.completes and not self.decodes and error.errno == "EIO" and not error.advice:
            advice = "the device decodes no memory: set bit 1 of the command register (config, offset 4)"
            return OperationFailed(error.operation, error.what, errno="EIO", advice=advice)
        return error

    def _trace(self, region: Region, offset: int, size: int, value: str, mapped: bool, *, write: bool) -> None:
        if region.by_bytes:
            point = trace.config_write if write else trace.config_read
        else:
            point = trace.region_write if write else trace.region_read
        if point.on:
            path = "mapped" if mapped else "trapped"
            point(device=self.device, region=region.name, offset=f"0x{offset:x}", size=size, value=value, path=path)

    def close(self) -> None:
        """Unmap everything, once."""
        self._closed = True
        for region in self.all:
            for _, _, window in region.windows or ():
                window.close()
            region.windows = None


def widest(offset: int, length: int) -> list[tuple[int, int]]:
    """Split a range into the widest aligned accesses: (offset, width in bytes)."""
    pieces = []
    end = offset + length
    while offset < end:
        width = next(w for w in reversed(ACCESS_SIZES) if not offset % w and offset + w <= end)
        pieces.append((offset, width))
        offset += width
    return pieces
