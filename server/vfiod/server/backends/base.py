"""What every backend offers: one opened device, wherever it comes from, and the memory it can reach.

Device models see these and nothing below: no ioctl, no fd of the kernel's interfaces. Calls may block; they are
made in the device's lane, or, where they change who is where (open, close, map, unmap), in the topology lane.
Errors are :class:`~vfiod.protocol.errors.OperationFailed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import GroupInfo
from vfiod.protocol.errors import OperationFailed

if TYPE_CHECKING:
    from vfiod.server.kernel.pins import PinnedMemory

__all__ = ["AddressSpace", "Backend", "FewerVectors", "GuestFile", "Mapping"]


class GuestFile(Protocol):
    """What guest memory is in: a file (:class:`~vfiod.server.kernel.memory.SharedMemory`), or what stands for one.

    Every method may raise OperationFailed: memory that a client reaches for us has neither fd nor address.
    """

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes of it."""
        ...

    @property
    def readonly(self) -> bool:
        """It is only ever read."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        ...

    @property
    def asks(self) -> bool:
        """Whether another program is asked for what is in it, and waited for: never on the event loop."""
        ...

    @property
    def number(self) -> int:
        """The file's fd, lent."""
        ...

    def address(self) -> int:
        """Where the whole of it is mapped in this process."""
        ...

    @property
    def is_mapped(self) -> bool:
        """Whether it is mapped in this process."""
        ...

    def unmap(self) -> None:
        """Take that mapping back: no IOMMU has it."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        ...

    def pin(self, offset: int, length: int, *, writable: bool) -> PinnedMemory:
        """Keep a piece mapped into this process, to be read and written directly."""
        ...

    def close(self) -> None:
        """Close it, once."""
        ...


class Mapping(Struct, frozen=True):
    """A piece of guest memory at an address devices use. All in bytes, whole pages of every address space.

    Attributes:
        iova: the first address.
        size: how much.
        memory: the file, or what stands for one.
        offset: where in the file.
        readonly: devices may not write it.

    """

    iova: int
    size: int
    memory: GuestFile
    offset: int
    readonly: bool

    @property
    def last(self) -> int:
        """The last address, inclusive."""
        return self.iova + self.size - 1


class FewerVectors(OperationFailed):
    """The host has fewer vectors than were asked for. Nothing was set up; ask again with ``granted`` or fewer.

    Attributes:
        asked: how many were asked for.
        granted: how many the kernel could give (a positive return of ``VFIO_DEVICE_SET_IRQS``); None when it only
            said ENOSPC.

    """

    def __init__(self, what: str, *, asked: int, granted: int | None) -> None:
        super().__init__(
            "VFIO_DEVICE_SET_IRQS",
            what,
            errno="ENOSPC",
            advice=f"{asked} vectors were asked for, the host can give {'fewer' if granted is None else granted}",
        )
        self.asked = asked
        self.granted = granted


class AddressSpace(Protocol):
    """What a device, or several, can reach by DMA: a container, or a mediated device's own."""

    @property
    def name(self) -> str:
        """``container:3``, ``mdev:UUID``; unique in the machine."""
        ...

    @property
    def page_size(self) -> int:
        """The smallest page, in bytes."""
        ...

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Return what can be mapped: (first, last) inclusive, in bytes. Empty: unknown, anything may be tried."""
        ...

    def map(self, mapping: Mapping) -> None:
        """Make it reachable. Blocks while pages are pinned. Raises OperationFailed, and then has changed nothing."""
        ...

    def unmap(self, iova: int, size: int) -> None:
        """Take back exactly what one or several former :meth:`map` calls gave, whole ones."""
        ...


class Backend(Protocol):
    """One opened device."""

    @property
    def name(self) -> str:
        """Host address or UUID, for messages."""
        ...

    @property
    def kind(self) -> str:
        """``kernel-group``, ``kernel-cdev``, ``mdev`` or ``vfio-user``."""
        ...

    @property
    def prompt(self) -> bool:
        """Whether nothing of it ever waits, not even starting a channel program (``MediatedDevice.quick``)."""
        ...

    @property
    def may_block(self) -> bool:
        """Whether its calls wait for another program, which may never answer: then none is made on the event loop.

        There :meth:`set_irqs` alone may be called, to mask, unmask or trigger; it returns without waiting.
        """
        ...

    def access_waits(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """Whether this access of a region may wait although the device's calls do not (:attr:`may_block`).

        The device may do DMA in it, to memory that another program has to be asked for: then it is made in a worker,
        and whoever asked for it waits. Never blocks.
        """
        ...

    @property
    def foreign(self) -> bool:
        """Whether what maps its regions is another program's: it may be cut at any time, which is SIGBUS here.

        It is given out, but never mapped in this process.
        """
        ...

    @property
    def address_space(self) -> AddressSpace | None:
        """Its address space; None: noiommu, where nothing can be mapped."""
        ...

    @property
    def group(self) -> GroupInfo | None:
        """The VFIO group it came from; None: a cdev or a mediated device."""
        ...

    @property
    def compatible(self) -> tuple[str, ...] | None:
        """What the host's device tree says a platform device is; None: nothing, or it is no such device."""
        ...

    @property
    def given_out(self) -> bool:
        """Whether the device's fd was given to another process: then only the kernel knows who still has it."""
        ...

    def give_out(self) -> None:
        """Note that an fd from :meth:`region_fd` goes to another process; there is no way back."""
        ...

    def info(self) -> vfio.DeviceInfo:
        """``VFIO_DEVICE_GET_INFO``. Read once, when opened: never blocks."""
        ...

    def region_info(self, index: int) -> vfio.RegionInfo:
        """``VFIO_DEVICE_GET_REGION_INFO``, capabilities parsed; kept after the first call.

        An index the device has no region for (VGA, mostly) is OperationFailed with EINVAL: treat it as absent.
        """
        ...

    def irq_info(self, index: int) -> vfio.IrqInfo:
        """``VFIO_DEVICE_GET_IRQ_INFO``; EINVAL for an index the device does not have (ERR on a conventional bus)."""
        ...

    def region_read(self, index: int, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` of a region; a short read is OperationFailed with EIO."""
        ...

    def region_read_some(self, index: int, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset`` of a region: fewer, or none, when the device has no more (ROMs)."""
        ...

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write all of ``data`` at ``offset`` of a region; a short write is OperationFailed with EIO."""
        ...

    def region_fd(self, index: int) -> int | None:
        """The fd that maps this region at ``region_info(index).offset``, lent; None: it cannot be mapped."""
        ...

    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """``VFIO_DEVICE_SET_IRQS``. Raises FewerVectors when the host grants fewer than asked for."""
        ...

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``."""
        ...

    def hot_reset_info(self) -> vfio.HotResetInfo:
        """``VFIO_DEVICE_GET_PCI_HOT_RESET_INFO``: every function that a reset of its bus or slot affects.

        With the flag DEV_ID (a cdev) the entries hold devids, and the kernel resets only if DEV_ID_OWNED is set;
        without, they hold group numbers. ENODEV: the bus cannot be reset. EOPNOTSUPP: nothing of that kind here.
        """
        ...

    def hot_reset(self, group_fds: Sequence[int]) -> None:
        """``VFIO_DEVICE_PCI_HOT_RESET``.

        Args:
            group_fds: the fds of all affected groups, lent, each once; none for a cdev. EINVAL otherwise.

        """
        ...

    def probe_feature(self, feature: int) -> bool:
        """Whether the device has this ``VFIO_DEVICE_FEATURE``; a kernel that knows none has none."""
        ...

    def watch_end(self, gone: Callable[[str], None]) -> None:
        """Call ``gone`` with the reason, on the loop, each time the device goes away by itself, until it is closed.

        The kernel never tells: REQ asks for the device, and calls fail with ENODEV once it is gone.
        """
        ...

    def watch_return(self, back: Callable[[Sequence[int]], None]) -> None:
        """Call ``back``, on the loop, each time the device is there again, with all that was armed and mapped.

        With the indexes of the regions whose memory is another file than before: who has mapped that sees nothing of
        the device any more. Only devices of other programs come back.
        """
        ...

    def doorbells(self, index: int) -> Sequence[tuple[int, bytes]]:
        """Registers of a region that are doorbells: offset, and what is written there. Few; never blocks."""
        ...

    def feature(self, request: vfio.DeviceFeature, room: int) -> bytes:
        """``VFIO_DEVICE_FEATURE``: get, set or probe a feature; what a GET gives, at most ``room`` bytes.

        OperationFailed; ENOTTY: the device does not have it.
        """
        ...

    def close(self) -> bool:
        """Close everything of this device, once; a second call does nothing. Close windows and eventfds before it.

        Returns:
            True when the kernel really let the device go; False when an fd given out still holds it.

        """
        ...
