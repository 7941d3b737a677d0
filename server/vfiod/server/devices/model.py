"""What every device model is made of: the options it takes, its interrupts as commands see them, its parts when open.

A model is one kind of device (PCI, platform): a class derived from :class:`~vfiod.server.devices.device.Device`, and
the class of its options. :mod:`vfiod.server.devices.models` is the table of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import OnRequest
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import DEFAULT_MMAP_TIMEOUT_MS
from vfiod.server.backends.base import Backend
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.regions import Regions

if TYPE_CHECKING:
    from vfiod.server.devices.romfile import RomFile

__all__ = ["Interrupts", "Model", "Options", "Quiesced"]


class Options(Struct, frozen=True):
    """The properties of ``device_add`` that shape the behaviour of any device.

    Attributes:
        mmap_timeout_ms: before the fast path returns after a level interrupt; 0: it stays off after the first.
        share_fd: whether ``region-map`` may give the device's fd away.
        no_mmap: never map regions (``x-no-mmap``).
        on_request: what a host's request for the device does.

    """

    mmap_timeout_ms: int = DEFAULT_MMAP_TIMEOUT_MS
    share_fd: bool = True
    no_mmap: bool = False
    on_request: OnRequest = OnRequest.EVENT

    @property
    def romfile(self) -> RomFile | None:
        """A file to be read before the device is opened; owned. None: the model takes none, or was given none."""
        return None


class Interrupts(Protocol):
    """A device's interrupts. On the loop's thread, except :meth:`close`; none of it waits."""

    @property
    def indexes(self) -> Sequence[IrqIndex]:
        """What the device has, in the order of the indexes."""

    @property
    def kind(self) -> IrqKind:
        """What is active."""

    def find(self, wanted: int | str) -> IrqIndex:
        """An index by number or name; InvalidArgument when the device has none such."""

    def infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """Every eventfd, with a name that tells what it does."""

    def start(
        self,
        one: IrqIndex,
        wanted: Sequence[Wanted],
        mode: IrqMode | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> list[Started]:
        """Start vectors of an index, all or nothing. InvalidArgument, OperationFailed; then everything is as before.

        Args:
            one: the index.
            wanted: the vectors, each once; their eventfds are owned, and closed on failure.
            mode: direct or relayed; None: the model's choice.
            numbers: interrupt numbers of the machine, by vector.

        """

    def stop(self, one: IrqIndex | None = None, vectors: Iterable[int] | None = None, *, reason: str) -> None:
        """Stop vectors of an index, a whole index, or whatever runs. What does not run is no error."""

    def abandon(self, *, reason: str) -> None:
        """Stop whatever runs for good, whatever the kernel says: whose interrupts they were is gone. Never raises."""

    def mask(self, one: IrqIndex, vector: int) -> None:
        """Mask a vector that is started. InvalidArgument, OperationFailed."""

    def unmask(self, one: IrqIndex, vector: int) -> None:
        """Unmask a vector that is started. InvalidArgument, OperationFailed."""

    def eoi(self, one: IrqIndex, vector: int) -> None:
        """Complete a level interrupt. With nothing pending it does nothing. InvalidArgument, OperationFailed."""

    def trigger(self, one: IrqIndex, vector: int) -> None:
        """Make the kernel signal the vector's eventfd. InvalidArgument, OperationFailed."""

    def route(self, one: IrqIndex, vector: int, number: int | None) -> None:
        """Say which interrupt number of the machine a vector has; None: none. InvalidArgument, OperationFailed."""

    @property
    def awaits_access(self) -> bool:
        """Whether an interrupt is up that an access to a region completes."""

    def accessed(self) -> None:
        """A region whose accesses complete interrupts was accessed through vfiod. Never raises."""

    def given_out(self) -> None:
        """Another process maps a region: from now on accesses complete nothing."""

    def suspend(self) -> None:
        """Disable everything in the kernel for a reset; what is bound stays known. OperationFailed; then as it was."""

    def resume(self) -> None:
        """Set up again what :meth:`suspend` took down. OperationFailed; then an event has said what is lost."""

    def silence(self) -> None:
        """Stop listening, cancel timers: the device is going. On the loop; :meth:`close` does the rest."""

    def close(self) -> None:
        """Disarm in the kernel, close every eventfd. Blocks; may be called in a thread, after :meth:`silence`."""


class Model(Struct, frozen=True):
    """Everything of a device that is open.

    Attributes:
        backend: where it comes from.
        info: of the device.
        regions: its regions.
        interrupts: its interrupts.
        notices: vfiod's own interrupts (REQ, ERR), as far as it has them.
        migratable: whether it has ``VFIO_DEVICE_FEATURE_MIGRATION``.

    """

    backend: Backend
    info: vfio.DeviceInfo
    regions: Regions
    interrupts: Interrupts
    notices: Notices
    migratable: bool


class Quiesced(Struct, frozen=True):
    """A device between its ``quiesce`` and its ``revive``.

    Attributes:
        model: what it has.
        saved: what a reset may lose, by the model's own account.
        method: how it is reset.

    """

    model: Model
    saved: Any
    method: str
