"""An iommufd and its IO address spaces (``Documentation/userspace-api/iommufd.rst``).

An iommufd (``/dev/iommu``) holds what devices reach: IOASes, each one address space. A device bound to the iommufd
is attached to one of them. An IOAS goes with its last device, as a container's IOMMU does.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server import trace
from vfiod.server.backends.base import GuestFile, Mapping
from vfiod.server.backends.ioctls import call, failed
from vfiod.server.backends.mapped import forget_range
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

if TYPE_CHECKING:
    from vfiod.server.state.machine import IoasState, IommufdState

__all__ = ["Ioas", "Iommufd"]

_log: Final = logging.getLogger(__name__)

_FIRST_RANGES: Final = 16
"""Room for IOVA ranges: x86 has two or three, and one more hole per reserved region."""

_MAX_RANGES: Final = 1 << 16
_MAX_ATTEMPTS: Final = 8

_PROCESS_MODE: Final = 1
"""``IOMMU_OPTION_RLIMIT_MODE``: locked memory counts per process, as with type1."""

# memfd_pin_folios() takes memfds, shared memory and hugetlbfs (mm/gup.c); for another file it says EINVAL.
_NOT_BY_FILE: Final = errno.EINVAL


class Iommufd:
    """One passed iommufd.

    Args:
        calls: the system calls.
        object_id: the ``iommufd`` object's id.
        fd: its fd, lent for as long as a device is bound to it.

    Attributes:
        ioases: those that were made here; replaced, never changed.
        devices: how many devices are bound to it here.

    """

    __slots__ = ("_by_address", "calls", "devices", "fd", "ioases", "maps_files", "object_id")

    def __init__(self, calls: Syscalls, object_id: str, fd: FileDescriptor) -> None:
        self.calls = calls
        self.object_id = object_id
        self.fd = fd
        self.ioases: tuple[Ioas, ...] = ()
        self.devices = 0
        self.maps_files = True  # until the kernel says ENOTTY: IOMMU_IOAS_MAP_FILE came with Linux 6.13
        self._by_address: weakref.WeakSet[GuestFile] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """``iommufd ID``, for messages."""
        return f"iommufd {self.object_id}"

    def takes(self, memory: GuestFile) -> bool:
        """Whether a file is to be mapped as a file: nothing speaks against it so far."""
        return self.maps_files and memory not in self._by_address

    def not_by_file(self, memory: GuestFile) -> None:
        """A file turned out to be of a kind the kernel maps by address only."""
        self._by_address.add(memory)

    def allocate(self) -> Ioas:
        """``IOMMU_IOAS_ALLOC``. Raises OperationFailed."""
        argument = bytearray(vfio.IoasAlloc().pack())
        advice = {errno.ENOMEM: "the host has no memory left", errno.ENOTTY: "the fd is not one of /dev/iommu"}
        call(self.calls, self.fd.number, vfio.IommufdIoctl.IOMMU_IOAS_ALLOC, argument, self.name, advice)
        ioas = Ioas(self, vfio.IoasAlloc.unpack(argument).out_ioas_id)
        self.ioases = (*self.ioases, ioas)
        if trace.container_made.on:
            trace.container_made(container=ioas.name, iommu="iommufd", fd=self.fd.number, passed=True)
        return ioas

    def release(self, ioas: Ioas) -> None:
        """``IOMMU_DESTROY`` of an IOAS that none of our devices is attached to, and what is still mapped in it.

        Somebody who was given a device's fd may have attached that device to it again: the kernel then keeps the
        IOAS, empty.
        """
        self.ioases = tuple(one for one in self.ioases if one is not ioas)
        ioas.clear()
        argument = bytearray(vfio.IommuDestroy(ioas.id).pack())
        try:
            call(self.calls, self.fd.number, vfio.IommufdIoctl.IOMMU_DESTROY, argument, ioas.name)
        except OperationFailed as error:
            _log.warning("%s", error)
        if trace.container_closed.on:
            trace.container_closed(container=ioas.name, fd=self.fd.number)

    def keep(self) -> IommufdState:
        """Describe what was made in it. The fd is the object's."""
        from vfiod.server.state.machine import IommufdState

        return IommufdState(
            object_id=self.object_id, maps_files=self.maps_files, ioases=[one.keep() for one in self.ioases]
        )

    def adopt(self, state: IommufdState) -> None:
        """Make the IOASes again. The kernel is asked, and told nothing. OperationFailed."""
        self.maps_files = state.maps_files
        for one in state.ioases:
            ioas = Ioas(self, one.id)
            ioas.adopt(one)
            self.ioases = (*self.ioases, ioas)

    def rehome(self) -> str | None:
        """What is mapped by another process counts for this one now (``IOMMU_IOAS_CHANGE_PROCESS``, Linux 6.14).

        Devices are not disturbed either way. Returns why it could not be done, in a sentence; None when it was.
        """
        argument = bytearray(vfio.IoasChangeProcess().pack())
        try:
            self.calls.ioctl(self.fd.number, vfio.IommufdIoctl.IOMMU_IOAS_CHANGE_PROCESS, argument)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return f"{self.name}: the kernel cannot count locked memory for another process"
            if error.errno == errno.EINVAL:
                return f"{self.name}: memory is mapped by address, and only files can count for another process"
            return f"{self.name}: locked memory does not count for this process: {error.strerror}"
        return None

    def has_device(self, devid: int) -> bool | None:
        """Whether a device is still bound by this id; None: the kernel does not say (a kernel's mediated device)."""
        argument = bytearray(vfio.HwInfo(devid).pack())
        try:
            self.calls.ioctl(self.fd.number, vfio.IommufdIoctl.IOMMU_GET_HW_INFO, argument)
        except OSError as error:
            return False if error.errno == errno.ENOENT else None
        return True

    def counts_per_process(self) -> bool | None:
        """Whether locked memory counts per process, not per user; None: the kernel does not say."""
        question = vfio.IommuOption(vfio.IommufdOption.RLIMIT_MODE, vfio.IommufdOptionOp.GET)
        argument = bytearray(question.pack())
        try:
            self.calls.ioctl(self.fd.number, vfio.IommufdIoctl.IOMMU_OPTION, argument)
        except OSError:
            return None
        return vfio.IommuOption.unpack(argument).val64 == _PROCESS_MODE


class Ioas:
    """One IO address space (:class:`~vfiod.server.backends.base.AddressSpace`).

    Attributes:
        id: the kernel's, within its iommufd.
        name: ``ioas:OBJECT/ID``.
        devices: names of the devices attached to it here; replaced, never changed.
        attached: whether it is the guest memory's at this moment.

    """

    __slots__ = ("_iommufd", "_mapped", "_ranges", "attached", "devices", "id", "name", "page_size")

    def __init__(self, iommufd: Iommufd, number: int) -> None:
        self._iommufd = iommufd
        self.id = number
        self.name = f"ioas:{iommufd.object_id}/{number}"
        self.devices: tuple[str, ...] = ()
        self.attached = False
        self.page_size = PAGE_SIZE
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._mapped: dict[int, int] = {}  # iova -> size

    def refresh(self) -> None:
        """Read alignment and IOVA ranges again: each device that is attached may narrow them. OperationFailed."""
        room = _FIRST_RANGES
        for _ in range(_MAX_ATTEMPTS):
            ranges = bytearray(room * vfio.IovaRange.LAYOUT.size)
            held = (ctypes.c_char * len(ranges)).from_buffer(ranges)
            argument = bytearray(vfio.IoasIovaRanges(self.id, room, ctypes.addressof(held)).pack())
            request = vfio.IommufdIoctl.IOMMU_IOAS_IOVA_RANGES
            try:
                self._iommufd.calls.ioctl(self._iommufd.fd.number, request, argument)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise failed(request.name, self.name, error) from error
                room = vfio.IoasIovaRanges.unpack(argument).num_iovas
                if room > _MAX_RANGES:
                    break
                continue
            finally:
                del held
            answer = vfio.IoasIovaRanges.unpack(argument)
            layout = vfio.IovaRange.LAYOUT
            pieces = layout.iter_unpack(ranges[: min(answer.num_iovas, room) * layout.size])
            self._ranges = tuple((start, last) for start, last in pieces)
            self.page_size = max(PAGE_SIZE, answer.out_iova_alignment)
            return
        raise OperationFailed("IOMMU_IOAS_IOVA_RANGES", self.name, errno="EPROTO", advice="the ranges never fit")

    def keep(self) -> IoasState:
        """Describe it."""
        from vfiod.server.state.machine import IoasState

        return IoasState(id=self.id, attached=self.attached, mapped=list(self._mapped.items()))

    def adopt(self, state: IoasState) -> None:
        """Know what it has. OperationFailed."""
        self.attached = state.attached
        self._mapped.update(state.mapped)
        self.refresh()

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Return (first, last) inclusive, in bytes."""
        return self._ranges

    # --- mapping ---
    def map(self, mapping: Mapping) -> None:
        """Map a piece of a file: as a file where the kernel and the file can, else by its address in this process.

        Raises OperationFailed; ENOMEM names the limit and the need.
        """
        memory = mapping.memory
        if not self._iommufd.takes(memory):
            self._map_address(mapping)
        else:
            self._try_file(mapping)
        self._mapped[mapping.iova] = mapping.size

    def _try_file(self, mapping: Mapping) -> None:
        try:
            self._map_file(mapping)
        except OperationFailed as refusal:
            if refusal.errno == "ENOTTY":
                self._iommufd.maps_files = False
            elif refusal.errno != errno.errorcode[_NOT_BY_FILE]:
                raise
            # EINVAL may as well be the range's fault: then it is refused by address too, in the same words.
            self._map_address(mapping)
            if refusal.errno != "ENOTTY":
                self._iommufd.not_by_file(mapping.memory)

    def _map_file(self, mapping: Mapping) -> None:
        start = mapping.offset
        request = vfio.IoasMapFile(
            _flags(mapping), self.id, mapping.memory.number, start, mapping.size, mapping.iova
        ).pack()
        self._map(vfio.IommufdIoctl.IOMMU_IOAS_MAP_FILE, request, mapping)

    def _map_address(self, mapping: Mapping) -> None:
        address = mapping.memory.address() + mapping.offset
        request = vfio.IoasMap(_flags(mapping), self.id, address, mapping.size, mapping.iova).pack()
        self._map(vfio.IommufdIoctl.IOMMU_IOAS_MAP, request, mapping)

    def _map(self, request: vfio.IommufdIoctl, argument: bytes, mapping: Mapping) -> None:
        what = f"{self.name} (IOVA 0x{mapping.iova:x}, size 0x{mapping.size:x})"
        try:
            self._iommufd.calls.ioctl(self._iommufd.fd.number, request, bytearray(argument))
        except OSError as error:
            raise failed(request.name, what, error, {error.errno or 0: self._advice(error, mapping.size)}) from error

    def _advice(self, error: OSError, size: int) -> str:
        match error.errno:
            case errno.ENOMEM:
                return self._memory_advice(size)
            case errno.EADDRINUSE | errno.EEXIST:
                return "it overlaps a mapping this IOAS has"
            case errno.EINVAL:
                return f"IOVA and size must be whole pages of {self.page_size} bytes within the IOAS's ranges"
            case errno.ENOSPC:
                return "the IOAS is full"
            case errno.EFAULT:
                return "the file has no memory there: it was cut, or it cannot be pinned"
            case _:
                return ""

    def _memory_advice(self, size: int) -> str:
        calls = self._iommufd.calls
        limit = calls.memory_lock_limit()
        if limit is None or calls.may_lock_any_memory():
            return "the host has no memory left to pin (this process has no memory-lock limit)"
        if self._iommufd.counts_per_process():
            counted = f"of which this process uses {calls.memory_locked()}"
        else:
            counted = (
                "shared by all processes of this user (the manager may have it counted per process: "
                "IOMMU_OPTION_RLIMIT_MODE 1, before anything else is done with the iommufd)"
            )
        mapped = sum(self._mapped.values())
        return (
            f"RLIMIT_MEMLOCK is {limit} bytes, {counted}; this IOAS has {mapped} mapped and this mapping needs {size} "
            "more: raise the limit (ulimit -l, LimitMEMLOCK= of the service)"
        )

    def unmap(self, iova: int, size: int) -> None:
        """``IOMMU_IOAS_UNMAP``. Raises OperationFailed, with ENOENT when the kernel unmapped something else."""
        done = self._unmap(iova, size)
        if done != size:
            what = f"{self.name} (IOVA 0x{iova:x}, size 0x{size:x})"
            raise OperationFailed("IOMMU_IOAS_UNMAP", what, errno="ENOENT", advice=f"0x{done:x} bytes were unmapped")
        forget_range(self._mapped, iova, size)

    def _unmap(self, iova: int, size: int) -> int:
        what = f"{self.name} (IOVA 0x{iova:x}, size 0x{size:x})"
        argument = bytearray(vfio.IoasUnmap(self.id, iova, size).pack())
        advice = {errno.ENOENT: "nothing is mapped there, or it would split a mapping"}
        call(self._iommufd.calls, self._iommufd.fd.number, vfio.IommufdIoctl.IOMMU_IOAS_UNMAP, argument, what, advice)
        return vfio.IoasUnmap.unpack(argument).length

    def settle(self, mappings: Iterable[Mapping]) -> list[str]:
        """See :func:`vfiod.server.backends.settling.settle`."""
        from vfiod.server.backends.settling import settle

        known = list(mappings)
        self._mapped = {one.iova: one.size for one in known}
        return settle(self, known, self._unmap)

    def clear(self) -> None:
        """Unmap whatever is left; what the kernel keeps is logged."""
        mapped, self._mapped = self._mapped, {}
        for iova, size in mapped.items():
            try:
                self._unmap(iova, size)
            except OperationFailed as error:
                _log.error("%s", error)


def _flags(mapping: Mapping) -> vfio.IoasMapFlags:
    flags = vfio.IoasMapFlags.FIXED_IOVA | vfio.IoasMapFlags.READABLE
    return flags if mapping.readonly else flags | vfio.IoasMapFlags.WRITEABLE
