"""An IOMMU container and the memory its devices reach (type1).

A container (``/dev/vfio/vfio``) is harmless alone. The first group that enters it allows ``VFIO_SET_IOMMU``, and
from then on it is an address space; when the last group leaves, the kernel takes the IOMMU away again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import ContainerInfo
from vfiod.protocol.errors import Busy, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server import trace
from vfiod.server.backends.base import Mapping
from vfiod.server.backends.ioctls import call, call_info, failed
from vfiod.server.backends.mapped import forget_range
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls
from vfiod.server.kernel.sysfs import Sysfs

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ContainerState

__all__ = ["Container", "Type1Space", "check_api_version"]

_log: Final = logging.getLogger(__name__)

_NAMES: Final = {
    vfio.Extension.TYPE1v2_IOMMU: "type1v2",
    vfio.Extension.TYPE1_IOMMU: "type1",
    vfio.Extension.NOIOMMU_IOMMU: "noiommu",
}

# What VFIO_IOMMU_GET_INFO says on a container without an IOMMU: EINVAL (drivers/vfio/container.c), and ENODEV where
# iommufd stands in for containers (drivers/iommu/iommufd/vfio_compat.c).
_NO_IOMMU_YET: Final = (errno.EINVAL, errno.ENODEV)

_SET_IOMMU_ADVICE: Final = {
    errno.EPERM: (
        "the platform does not isolate interrupts: switch interrupt remapping on in the firmware, or load "
        "vfio_iommu_type1 with allow_unsafe_interrupts=1 if every guest is trusted (noiommu needs CAP_SYS_RAWIO)"
    ),
    errno.EINVAL: "the IOMMU does not take this group, or the container has an IOMMU already",
    errno.ENODEV: "no IOMMU driver takes this group",
}


def check_api_version(calls: Syscalls, fd: int, what: str) -> None:
    """Raises OperationFailed when the kernel's VFIO is not version 0."""
    version = call(calls, fd, vfio.ContainerIoctl.VFIO_GET_API_VERSION, 0, what)
    if version != vfio.VFIO_API_VERSION:
        raise OperationFailed(
            "VFIO_GET_API_VERSION",
            what,
            errno="EPROTONOSUPPORT",
            advice=f"the kernel speaks version {version}, vfiod version {vfio.VFIO_API_VERSION}",
        )


class Type1Space:
    """The address space of a container with a type1 IOMMU (:class:`~vfiod.server.backends.base.AddressSpace`).

    Args:
        calls: the system calls.
        fd: the container's, lent.
        name: ``container:N``.
        version: which type1.

    """

    __slots__ = ("_calls", "_exact", "_fd", "_mapped", "_ranges", "_sysfs", "name", "page_size")

    def __init__(self, calls: Syscalls, fd: int, name: str, version: vfio.Extension) -> None:
        self._calls = calls
        self._sysfs = Sysfs(calls)
        self._fd = fd
        self.name = name
        self.page_size = PAGE_SIZE
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._mapped: dict[int, int] = {}  # iova -> size
        # type1 before v2 may unmap more than it was asked for, and says so.
        self._exact = version is vfio.Extension.TYPE1v2_IOMMU
        self.refresh()

    def refresh(self) -> None:
        """Read page sizes and IOVA ranges again: each group that enters may narrow them."""
        question = vfio.Type1Info.WITH_CAPS.pack(vfio.Type1Info.WITH_CAPS.size, 0, 0, 0)
        answer = call_info(self._calls, self._fd, vfio.ContainerIoctl.VFIO_IOMMU_GET_INFO, question, self.name)
        try:
            info = vfio.Type1Info.unpack(answer)
        except vfio.BadStructure as error:
            raise OperationFailed("VFIO_IOMMU_GET_INFO", self.name, errno="EPROTO", advice=str(error)) from error
        self.page_size = info.page_size or PAGE_SIZE
        self._ranges = info.iova_ranges

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Return (first, last) inclusive, in bytes; empty: a kernel before 5.4, which does not say."""
        return self._ranges

    def map(self, mapping: Mapping) -> None:
        """``VFIO_IOMMU_MAP_DMA``: pins the pages. Raises OperationFailed; ENOMEM names the limit and the need."""
        request = vfio.ContainerIoctl.VFIO_IOMMU_MAP_DMA
        flags = vfio.DmaMapFlags.READ if mapping.readonly else vfio.DmaMapFlags.READ | vfio.DmaMapFlags.WRITE
        vaddr = mapping.memory.address() + mapping.offset
        argument = bytearray(vfio.DmaMap(flags, vaddr, mapping.iova, mapping.size).pack())
        try:
            self._calls.ioctl(self._fd, request, argument)
        except OSError as error:
            what = f"{self.name} (IOVA 0x{mapping.iova:x}, size 0x{mapping.size:x})"
            raise failed(request.name, what, error, {error.errno or 0: self._advice(error, mapping.size)}) from error
        self._mapped[mapping.iova] = mapping.size

    def _advice(self, error: OSError, size: int) -> str:
        match error.errno:
            case errno.ENOMEM:
                limit = self._calls.memory_lock_limit()
                if limit is None or self._calls.may_lock_any_memory():
                    return "the host has no memory left to pin (this process has no memory-lock limit)"
                locked = self._calls.memory_locked()
                return (
                    f"RLIMIT_MEMLOCK is {limit} bytes, of which {locked} are used, and this mapping needs {size} more: "
                    f"raise the limit to {locked + size} or above (ulimit -l, LimitMEMLOCK= of the service)"
                )
            case errno.ENOSPC:
                limit_text = self._sysfs.mapping_limit() or "65535"
                return f"the container takes {limit_text} mappings (dma_entry_limit of vfio_iommu_type1)"
            case errno.EEXIST:
                return "it overlaps a mapping this container has"
            case errno.EINVAL:
                return f"IOVA and size must be whole pages of {self.page_size} bytes within the IOMMU's ranges"
            case errno.EFAULT:
                return "the file has no memory there: it was cut, or it cannot be pinned"
            case _:
                return ""

    def unmap(self, iova: int, size: int) -> None:
        """``VFIO_IOMMU_UNMAP_DMA``. Raises OperationFailed, with ENOENT when the kernel unmapped something else."""
        what = f"{self.name} (IOVA 0x{iova:x}, size 0x{size:x})"
        done = self._unmap(iova, size, what)
        if done != size and (self._exact or done < size):
            raise OperationFailed(
                "VFIO_IOMMU_UNMAP_DMA", what, errno="ENOENT", advice=f"0x{done:x} bytes were unmapped"
            )
        forget_range(self._mapped, iova, size)

    def _unmap(self, iova: int, size: int, what: str) -> int:
        argument = bytearray(vfio.DmaUnmap(iova, size).pack())
        call(self._calls, self._fd, vfio.ContainerIoctl.VFIO_IOMMU_UNMAP_DMA, argument, what)
        return vfio.DmaUnmap.unpack(bytes(argument)).size

    def mapped(self) -> list[tuple[int, int]]:
        """What the IOMMU has: IOVA and size of each mapping."""
        return list(self._mapped.items())

    def adopt(self, mapped: Iterable[tuple[int, int]]) -> None:
        """Know what the IOMMU has: another process mapped it."""
        self._mapped.update(mapped)

    def settle(self, mappings: Iterable[Mapping]) -> list[str]:
        """See :func:`vfiod.server.backends.settling.settle`."""
        from vfiod.server.backends.settling import settle

        known = list(mappings)
        self._mapped = {one.iova: one.size for one in known}
        return settle(self, known, lambda iova, size: self._unmap(iova, size, f"{self.name} (0x{iova:x} and above)"))

    def rehome(self, mappings: Iterable[Mapping]) -> str | None:
        """The mappings that another process made are this one's now: their addresses, and what they lock.

        Devices are not disturbed: pages and translations stay (``VFIO_DMA_MAP_FLAG_VADDR``, ``<linux/vfio.h>``,
        "VFIO_UPDATE_VADDR"). Where the kernel has no such thing, or not for this container, the pages stay pinned and
        translated all the same; only what a group that comes later pins is not looked up at the old addresses, and the
        locked memory counts for nobody. Returns why it could not be done, in a sentence; None when it was.
        """
        ioctl, fd = self._calls.ioctl, self._fd
        try:
            if ioctl(fd, vfio.ContainerIoctl.VFIO_CHECK_EXTENSION, vfio.Extension.UPDATE_VADDR) <= 0:
                return f"{self.name}: the kernel cannot update addresses (VFIO_UPDATE_VADDR)"
            every = vfio.DmaUnmapFlags.VADDR | vfio.DmaUnmapFlags.ALL
            ioctl(fd, vfio.ContainerIoctl.VFIO_IOMMU_UNMAP_DMA, bytearray(vfio.DmaUnmap(0, 0, every).pack()))
        except OSError as error:
            return f"{self.name}: addresses cannot be updated: {error.strerror}"
        missing = dict(self._mapped)
        for mapping in mappings:
            vaddr = mapping.memory.address() + mapping.offset
            argument = bytearray(vfio.DmaMap(vfio.DmaMapFlags.VADDR, vaddr, mapping.iova, mapping.size).pack())
            try:
                ioctl(fd, vfio.ContainerIoctl.VFIO_IOMMU_MAP_DMA, argument)
            except OSError as error:
                return f"{self.name}: the address of IOVA 0x{mapping.iova:x} cannot be updated: {error.strerror}"
            missing.pop(mapping.iova, None)
        return f"{self.name}: {len(missing)} mappings have no address here" if missing else None

    def clear(self) -> None:
        """Unmap whatever is left: when no device of ours uses the container any more, none may reach the guest.

        A mapping that the kernel keeps is logged; it goes with the IOMMU, whose end must not be held up.
        """
        mapped, self._mapped = self._mapped, {}
        for iova, size in mapped.items():
            try:
                self._unmap(iova, size, f"{self.name} (IOVA 0x{iova:x}, size 0x{size:x})")
            except OperationFailed as error:
                _log.error("%s", error)


class Container:
    """One container.

    Args:
        calls: the system calls.
        number: its id in this machine.
        fd: the object owns it from here on.
        passed: whether the manager passed it.
        object_id: the ``vfio-container`` object it came from.

    Attributes:
        groups: the groups in it; replaced, never changed.
        iommu: what is set; None before :meth:`set_iommu`.
        space: its address space; None before :meth:`set_iommu`, and for noiommu.
        attached: whether the address space is the guest memory's at this moment.
        devices: how many devices of ours are in its groups.

    """

    __slots__ = ("_calls", "attached", "devices", "fd", "groups", "id", "iommu", "object_id", "passed", "space")

    def __init__(
        self, calls: Syscalls, number: int, fd: FileDescriptor, *, passed: bool, object_id: str | None = None
    ) -> None:
        self._calls = calls
        self.id = number
        self.fd = fd
        self.passed = passed
        self.object_id = object_id
        self.groups: tuple[int, ...] = ()
        self.iommu: vfio.Extension | None = None
        self.space: Type1Space | None = None
        self.attached = False
        self.devices = 0

    def keep(self, given: Given) -> ContainerState:
        """Describe it."""
        from vfiod.server.state.machine import ContainerState

        return ContainerState(
            id=self.id,
            fd=given.give(self.fd, self.name),
            passed=self.passed,
            object_id=self.object_id,
            iommu=None if self.iommu is None else int(self.iommu),
            attached=self.attached,
            mapped=[] if self.space is None else self.space.mapped(),
        )

    @classmethod
    def adopt(cls, calls: Syscalls, state: ContainerState, taken: Taken) -> Container:
        """Make it again around its fd: the kernel is asked, and told nothing. OperationFailed."""
        made = cls(calls, state.id, taken.take(state.fd), passed=state.passed, object_id=state.object_id)
        if state.iommu is not None:
            made.iommu = vfio.Extension(state.iommu)
            if not made.noiommu:
                made.space = Type1Space(calls, made.fd.number, made.name, made.iommu)
                made.space.adopt(state.mapped)
        made.attached = state.attached
        return made

    @property
    def name(self) -> str:
        """``container:3``."""
        return f"container:{self.id}"

    @property
    def noiommu(self) -> bool:
        """Whether its groups have no IOMMU."""
        return self.iommu is vfio.Extension.NOIOMMU_IOMMU

    def check(self) -> None:
        """Check a fresh container: version 0, and, when passed, no IOMMU of somebody else's in it.

        Raises OperationFailed, Busy.
        """
        check_api_version(self._calls, self.fd.number, self.name)
        if not self.passed:
            return
        question = bytearray(vfio.Type1Info.WITH_CAPS.pack(vfio.Type1Info.WITH_CAPS.size, 0, 0, 0))
        try:
            self._calls.ioctl(self.fd.number, vfio.ContainerIoctl.VFIO_IOMMU_GET_INFO, question)
        except OSError as error:
            if error.errno in _NO_IOMMU_YET:
                return
        raise Busy(
            "The container that was passed has an IOMMU already, set up by somebody else, whose mappings are not known "
            "here: pass a container no group is in"
        )

    def choose_iommu(self, *, noiommu: bool) -> vfio.Extension:
        """The best IOMMU the kernel offers. Raises OperationFailed."""
        kinds = (
            (vfio.Extension.NOIOMMU_IOMMU,) if noiommu else (vfio.Extension.TYPE1v2_IOMMU, vfio.Extension.TYPE1_IOMMU)
        )
        for kind in kinds:
            if call(self._calls, self.fd.number, vfio.ContainerIoctl.VFIO_CHECK_EXTENSION, kind, self.name) > 0:
                return kind
        raise OperationFailed(
            "VFIO_CHECK_EXTENSION",
            self.name,
            errno="ENODEV",
            advice=(
                "noiommu is off: write 1 to /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
                if noiommu
                else "there is no type1 IOMMU: load vfio_iommu_type1"
            ),
        )

    def set_iommu(self, *, noiommu: bool) -> None:
        """Set the best IOMMU; a group must be in it. Raises OperationFailed."""
        kind = self.choose_iommu(noiommu=noiommu)
        number = self.fd.number
        call(
            self._calls,
            number,
            vfio.ContainerIoctl.VFIO_SET_IOMMU,
            kind,
            f"{self.name} ({_NAMES[kind]})",
            _SET_IOMMU_ADVICE,
        )
        if kind is not vfio.Extension.NOIOMMU_IOMMU:
            self.space = Type1Space(self._calls, number, self.name, kind)
        self.iommu = kind
        if trace.container_made.on:
            trace.container_made(container=self.id, iommu=_NAMES[kind], fd=number, passed=self.passed)

    def forget_iommu(self) -> None:
        """The last group left: the kernel has taken the IOMMU away."""
        self.iommu = self.space = None

    def close(self) -> None:
        """Close it, once."""
        if trace.container_closed.on and not self.fd.closed:
            trace.container_closed(container=self.id, fd=self.fd.number)
        self.fd.close()

    def describe(self) -> ContainerInfo:
        """For ``query-machine``."""
        iommu = self.iommu
        return ContainerInfo(
            id=self.id,
            iommu=_NAMES[iommu] if iommu is not None else "none",
            passed=self.passed,
            groups=list(self.groups),
        )
