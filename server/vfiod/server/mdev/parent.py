"""The interface of parents: what one implements to make mediated devices in Python.

A :class:`Parent` offers types and makes devices of them; a :class:`MediatedDevice` is one device. vfiod's device
model talks to it exactly as it talks to the kernel's VFIO driver: regions, interrupt indexes, ``SET_IRQS``, reset.
``samples/pci.py`` and ``samples/platform.py`` are complete examples. Other packages offer parents by entry points::

    [project.entry-points."vfiod.mdev_parents"]
    mycard = "mycard.vfio:MyParent"          # called without arguments, gives the Parent

**What may be left out.** Only the abstract methods are required. The others have the meaning of "absent" by default:

======================================  ==============================================================
absent                                  means
======================================  ==============================================================
``Parent.destroy``                      it always agrees
``Parent.start``, ``Parent.shutdown``   it does not care when the VM runs
``Parent.available_instances``          the type's ``max_instances`` less what exists
``Parent.attributes``                   nothing to publish
``Parent.restore``                      made by ``create``, then told by ``MediatedDevice.restore``
``MediatedDevice.quick``                False: every call of it is made in a thread, with a time limit
``MediatedDevice.open``, ``close``      nothing to do for a new or leaving user
``MediatedDevice.reset``                cannot be reset (``device_info().reset`` is false; ``ENOTTY``)
``MediatedDevice.region_fd``            no region can be mapped: every access is a ``read`` or ``write``
``MediatedDevice.validate_map_request`` every mapping within an area is granted as asked
``MediatedDevice.doorbells``            no register is a doorbell: the hypervisor waits for every write
``MediatedDevice.may_dma``              any register access may make it do DMA before it returns
``MediatedDevice.memory_mapped``        every mapping of guest memory is welcome
``MediatedDevice.memory_unmapped``      keeps nothing of guest memory
``MediatedDevice.request``              cannot tell its user that it must go: it just goes
``MediatedDevice.save``, ``restore``    vfiod cannot be replaced while such a device exists (``--take-over``)
``MediatedDevice.attributes``           nothing to publish
``MediatedDevice.fds``                  ``query-fds`` lists those it watches through its host, and no others
======================================  ==============================================================

**Errors.** Refuse with ``OSError(errno.EINVAL, "what was wrong and what would be right")``, in the kernel's errnos, or
with a :class:`~vfiod.protocol.errors.CommandError`. Anything else that comes out is taken for a defect of the parent:
the caller gets ``EIO`` naming parent and callback, the traceback goes to the log, and vfiod runs on.

**Threads and time.** ``create``, ``destroy``, ``start`` and ``shutdown`` of one parent run one at a time, in a thread
of their own, and may block: other parents go on. So do all calls of a device, unless it says of itself that it is
``quick``: then they run where they are needed, mostly on the event loop's thread, where blocking stops everybody.
None of one device's calls overlap, except ``set_irqs``, ``request``, the callbacks of :meth:`Host.watch` (always on the
loop's thread), and those that only inform (``*_info``, ``attributes``): they come at any time, even during a reset.

A call that has not returned after :data:`~vfiod.protocol.limits.MDEV_CALL_MS` (those that everybody must wait for:
:data:`~vfiod.protocol.limits.MDEV_LOOP_CALL_MS`) is given up: its caller gets ``ETIMEDOUT``, and until it returns all
others ``EBUSY``. What it did meanwhile is undone then: a device that was made is destroyed, one that was opened is
closed, a VM that was started is shut down. ``close`` and a forced ``destroy`` that fell into that time are made up for.

**Trust.** The framework checks index, offset, length, alignment of areas and what the kernel checks in ``SET_IRQS``.
What the values *mean* only the device knows: registers, descriptors, addresses and programs come from an enemy.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

from msgspec import Struct

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import Area, IrqTypeCap, MsiMessage, RegionTypeCap, SetIrqs

__all__ = [
    "ENTRY_POINTS",
    "Area",
    "DeviceApi",
    "DeviceInfo",
    "DmaFault",
    "Doorbell",
    "Host",
    "IrqInfo",
    "MapRequest",
    "MdevType",
    "MediatedDevice",
    "Parent",
    "Pin",
    "Saved",
    "SetIrqs",
    "RegionInfo",
    "Watch",
]

ENTRY_POINTS: Final = "vfiod.mdev_parents"
"""The group of entry points through which other packages offer parents."""


class MdevType(Struct, frozen=True):
    """What can be made: ``mdev_supported_types/TYPE`` of the kernel's mediated bus.

    Attributes:
        id: its name in ``mdev-create``; a letter, then letters, digits, ``-``, ``.``, ``_``.
        name: for people.
        description: what it is, in a sentence.
        device_api: which device driver can use it.
        max_instances: how many may exist at once. A ``vfio-ccw`` type has one (a subchannel cannot be shared).
        parameters: what ``mdev-create`` takes for it: name, and what it means. Others are refused before ``create``.

    """

    id: str
    name: str
    description: str
    device_api: DeviceApi
    max_instances: int
    parameters: Mapping[str, str]


class DeviceInfo(Struct, frozen=True):
    """``VFIO_DEVICE_GET_INFO``: how many region and interrupt indexes there are, and whether it can be reset.

    For ``vfio-pci`` the indexes are the kernel's: 9 regions (BAR0 to BAR5, ROM, config, VGA) and 5 interrupts
    (INTx, MSI, MSI-X, ERR, REQ), of which any may be absent. For ``vfio-platform`` there is one of each per region and
    interrupt the device has.
    """

    regions: int
    irqs: int
    reset: bool = False


class RegionInfo(Struct, frozen=True):
    """``VFIO_DEVICE_GET_REGION_INFO``. Size 0 (the default) says that the region is absent.

    Attributes:
        size: bytes.
        readable: ``read`` works.
        writable: ``write`` works.
        areas: what may be mapped, in whole pages; the whole region, or parts of it (sparse mmap). Needs ``region_fd``.
        type: what a region beyond the fixed indexes of its device API is (``vfio_region_info_cap_type``).

    """

    size: int = 0
    readable: bool = False
    writable: bool = False
    areas: tuple[Area, ...] = ()
    type: RegionTypeCap | None = None


class IrqInfo(Struct, frozen=True):
    """``VFIO_DEVICE_GET_IRQ_INFO``. Count 0 (the default) says that the index has no interrupts.

    Attributes:
        count: vectors of the index.
        maskable: MASK and UNMASK work.
        automasked: it masks itself when it fires (a level interrupt).
        noresize: the number of vectors in use cannot grow without disabling the index first.
        type: what an index beyond a platform device's own IRQs is (extended IRQs, experimental); None: its own.
        messages: with a type: the message of each vector that SET_IRQS granted; none before. May change.

    """

    count: int = 0
    maskable: bool = False
    automasked: bool = False
    noresize: bool = True
    type: IrqTypeCap | None = None
    messages: tuple[MsiMessage, ...] = ()


class Doorbell(Struct, frozen=True):
    """A register that only matters for being written, always with the same bytes.

    A hypervisor may have its kernel tell vfiod of it by an eventfd, instead of waiting for each write. Rings that come
    at once are one write, and later accesses of other registers may overtake it.

    Attributes:
        region: index.
        offset: within the region, in bytes; a multiple of the width.
        data: what is written: 1, 2, 4 or 8 bytes. Anything else that is written there is an ordinary write.

    """

    region: int
    offset: int
    data: bytes


class Saved(Struct, frozen=True):
    """A device's own account of itself (:meth:`MediatedDevice.save`).

    Attributes:
        values: what JSON can hold: numbers, strings, lists, mappings of strings. Bytes as hexadecimal.
        fds: its fds by name: those it has open, and the eventfds it was given.

    """

    values: dict[str, Any]
    fds: dict[str, FileDescriptor]


class MapRequest(Struct, frozen=True):
    """Somebody wants to map a part of a region (the kernel series' ``validate_map_request``).

    Attributes:
        region: index.
        offset: of the part within the region, in bytes, page-aligned.
        size: in bytes, whole pages.
        file_offset: where the part begins in the file of ``region_fd``, in bytes, page-aligned.

    """

    region: int
    offset: int
    size: int
    file_offset: int


class DmaFault(Exception):
    """Guest memory could not be reached.

    Attributes:
        iova: the first address that could not be reached.
        done: bytes before it that were read or written.
        write: whether it was a write.
        readonly: there is memory, but the device may not write it.

    """

    def __init__(self, iova: int, done: int, *, write: bool, readonly: bool = False) -> None:
        why = "is read-only" if readonly else "is not mapped"
        super().__init__(f"DMA {'write' if write else 'read'} at 0x{iova:x}: the address {why}")
        self.iova = iova
        self.done = done
        self.write = write
        self.readonly = readonly


class Watch(Protocol):
    """What :meth:`Host.watch` gives back."""

    def want(self, *, readable: bool, writable: bool) -> None:
        """Call back when ``fd`` is readable, writable, either, or not at all. From any thread.

        Ask for ``writable`` while something waits to be written, and no longer: a pipe with room is always writable.
        """

    def cancel(self) -> None:
        """Never call back again, and close the fd. From any thread; later calls do nothing."""


class Pin(Protocol):
    """What :meth:`Host.pin` gives back."""

    @property
    def view(self) -> memoryview:
        """The bytes. ValueError once it was released; slices and casts of it then show empty pages."""

    @property
    def released(self) -> bool:
        """Whether it was taken back, by whomever."""

    def release(self) -> None:
        """Give it back. From any thread; later calls do nothing."""


class Host(Protocol):
    """What the world gives to a device. Every method may be called from any thread."""

    @property
    def memory_at_hand(self) -> bool:
        """Whether guest memory is read and written without asking another program, which may take its time.

        A ``quick`` device that reaches for guest memory in one of its methods asks first.
        """

    def read_memory(self, iova: int, length: int) -> bytes:
        """DMA from guest memory: exactly ``length`` bytes from ``iova``, across as many mappings as it takes.

        Raises DmaFault; nothing that the caller sees was read then. Before the device is open, all addresses fault.
        """

    def write_memory(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """DMA to guest memory. Raises DmaFault, whose ``done`` says how many bytes were written before it."""

    def pin(self, iova: int, size: int, *, writable: bool = True) -> Pin:
        """Guest memory in this process, for as long as it is mapped there: for rings, queues, and the like.

        Before an unmap takes any of it away, :meth:`MediatedDevice.memory_unmapped` is called; what is then still
        pinned there is released before the unmap is over, whatever the device does.

        Args:
            iova: the first address; any.
            size: bytes. They must lie in one mapping.
            writable: whether the device will write it.

        Raises DmaFault: not mapped, or read-only; OSError: EINVAL: in more than one mapping; EPERM: the memory's file
        is not sealed against shrinking (F_SEAL_SHRINK), so :meth:`read_memory` is the way.

        """

    def watch(self, fd: FileDescriptor, callback: Callable[[], None]) -> Watch:
        """Call back on the loop whenever ``fd`` is readable (level triggered). Takes the fd over."""


class MediatedDevice(ABC):
    """One mediated device, made by :meth:`Parent.create`. What the methods may raise: see the module."""

    # ruff: noqa: B027 - what is not abstract here may be left out; the module says what that means.

    quick: ClassVar[bool] = False
    """A promise: none of its methods ever waits, for a lock, a file, or a peer. Its calls are cheaper then."""

    @abstractmethod
    def device_info(self) -> DeviceInfo:
        """What it has. Constant while it is open."""

    @abstractmethod
    def region_info(self, index: int) -> RegionInfo:
        """One region; raise ``EINVAL`` for an index it does not know. Constant while it is open."""

    @abstractmethod
    def irq_info(self, index: int) -> IrqInfo:
        """One interrupt index; raise ``EINVAL`` for one it does not know. Constant while open, but for messages."""

    @abstractmethod
    def read(self, index: int, offset: int, length: int) -> bytes:
        """Read from a region, within its size. Gives exactly ``length`` bytes; 1, 2, 4 or 8 are one access."""

    @abstractmethod
    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region, within its size. 1, 2, 4 or 8 bytes are one access."""

    @abstractmethod
    def set_irqs(self, request: SetIrqs) -> int:
        """``VFIO_DEVICE_SET_IRQS``. Eventfds are lent: duplicate what is kept.

        Returns 0; or, when fewer vectors can be had than asked for, how many (nothing has changed then).
        """

    def open(self) -> None:
        """A user comes: be as after power-on. Guest memory is mapped after this."""

    def close(self) -> None:
        """The user is gone: stop everything and let its eventfds and memory go. Must not fail."""

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``: registers as after power-on. What SET_IRQS set up stays."""
        raise OSError(errno.ENOTTY, "this device cannot be reset")

    def region_fd(self, index: int) -> int | None:
        """The file that holds a region's memory, lent, or None.

        A device's file, or a memfd sealed against shrinking: whoever gets it keeps it, and could cut it.
        """
        return None

    def validate_map_request(self, request: MapRequest) -> MapRequest:
        """Grant a mapping, move it in the file, make it smaller, or refuse it by raising."""
        return request

    def doorbells(self) -> Sequence[Doorbell]:
        """Its doorbells. Constant while it is open."""
        return ()

    def may_dma(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """Whether such an access may reach guest memory before :meth:`read` or :meth:`write` returns.

        Asked of ``quick`` devices, on the loop, before each access while some guest memory has to be asked for by
        messages (a hypervisor that shares not all of it): such an access is made in a thread. Must be cheap, and
        must not say False where DMA follows: on the loop that memory cannot be reached, and faults.
        """
        return True

    def memory_mapped(self, iova: int, size: int, readonly: bool) -> None:
        """Guest memory is about to be mapped, in bytes. Raise to refuse: then no address space gets it."""

    def memory_unmapped(self, iova: int, size: int) -> None:
        """Guest memory is about to go; when this returns the device must not touch it. Must not fail."""

    def request(self, count: int) -> None:
        """Ask the user to give the device back (the REQ interrupt); the ``count``-th time, from 0."""

    def save(self) -> Saved:
        """Its whole state, open or not, for another process to go on with it; changes nothing.

        The fds are lent. What it got by SET_IRQS is part of it: nobody will set that up again. What it pinned is not:
        guest memory is mapped again by :meth:`memory_mapped`, and pinned anew then. Raise ``EOPNOTSUPP`` to refuse.
        """
        raise OSError(errno.EOPNOTSUPP, "its parent cannot save it: it has no 'save' (MediatedDevice.save)")

    def restore(self, saved: Saved) -> None:
        """Be as :meth:`save` told in another process; called once, after ``create``, and nothing was open before.

        The fds of ``saved`` belong to the device from here on; on failure it may leave them, or take them.
        """
        raise OSError(errno.EOPNOTSUPP, "its parent cannot restore it: it has no 'restore' (MediatedDevice.restore)")

    def attributes(self) -> Mapping[str, str]:
        """What to publish of this device."""
        return {}

    def fds(self) -> Mapping[str, int]:
        """What it has open, by a name that tells what for: ``query-fds`` lists them as the device's. At any time."""
        return {}


class Parent(ABC):
    """Makes mediated devices. It need not be physical."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in ``mdev-create``; a letter, then letters, digits, ``-``, ``.``, ``_``. Constant."""

    @property
    @abstractmethod
    def types(self) -> Sequence[MdevType]:
        """What it can make. Constant."""

    @abstractmethod
    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> MediatedDevice:
        """Make a device. The values of ``parameters`` are JSON from a stranger: check them."""

    def restore(
        self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any], saved: Saved
    ) -> MediatedDevice:
        """Make a device again that another process saved. Whoever opens things in :meth:`create` does otherwise here.

        :meth:`start` follows, with the VM it was started for.
        """
        device = self.create(host, uuid, mdev_type, parameters)
        device.restore(saved)
        return device

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Take a device apart. Raise to refuse, unless ``forced``: then it is gone whatever this says."""

    def start(self, vm: str, uuids: Sequence[str]) -> None:
        """The VM is about to run with these devices. Raise to prevent it."""

    def shutdown(self, vm: str, uuids: Sequence[str]) -> None:
        """The VM has stopped, or did not start after all."""

    def available_instances(self, mdev_type: MdevType) -> int | None:
        """How many more of a type could be made now, when types share a resource; None: count by type."""
        return None

    def attributes(self) -> Mapping[str, str]:
        """What to publish of the parent."""
        return {}
