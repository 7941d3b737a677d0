"""A device fd of the kernel, as a backend: handed out by a group, or a cdev that was bound to an iommufd."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import GroupInfo
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import AddressSpace, FewerVectors
from vfiod.server.backends.ioctls import call, call_info, failed
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import Sysfs

__all__ = ["KernelDevice"]

T = TypeVar("T")

_IRQ_ADVICE: Final = {
    errno.EINVAL: "the device cannot do this with these interrupts in its present mode",
    errno.ENOSPC: "the host has no interrupt vectors left",
    errno.EBUSY: "the host shares this interrupt line with a driver that does not share",
    errno.ENOTTY: "the device has no such interrupt",
}

_ACCESS_ADVICE: Final = {
    errno.EIO: "the device does not answer there: is memory or I/O space enabled in its command register?",
    errno.EINVAL: "the region is not there, or the access leaves it",
}

_RESET_ADVICE: Final = {
    errno.EINVAL: "the device has no reset of its own",
    errno.ENOTTY: "the device has no reset of its own",
    errno.EAGAIN: "another device of its bus is being reset: try again",
}

_HOT_RESET_INFO_ADVICE: Final = {
    errno.ENODEV: "neither its bus nor its slot can be reset",
    errno.EPERM: "one of the functions there is in no IOMMU group",
    errno.ENOTTY: "its driver has no hot reset",
}

_HOT_RESET_ADVICE: Final = {
    errno.EINVAL: "not every affected device is held here, or lies in a group whose fd was given",
    errno.EBUSY: "an affected device is in use at this moment: try again",
    errno.ENODEV: "neither its bus nor its slot can be reset",
    errno.ENOTTY: "its driver has no hot reset; or its bus was reset and did not come back (the host's log says)",
}

_FIRST_FUNCTIONS: Final = 8
"""Room for a slot full of functions: enough, mostly."""

_MAX_ATTEMPTS: Final = 8

_MAX_FUNCTIONS: Final = 1 << 16
"""A PCI segment has 256 buses of 256 functions: an answer that wants more is broken."""


class KernelDevice:
    """One opened device (:class:`~vfiod.server.backends.base.Backend`).

    Args:
        calls: the system calls.
        fd: the device's; the object owns it from here on. A failing constructor leaves it to the caller.
        name: host address.
        kind: the origin: ``kernel-group``, ``kernel-cdev``.
        address_space: what it can reach; None: noiommu.
        group: where it came from; None: a cdev.
        left: called once when the fd is closed; says whether the kernel let the device go.

    Raises:
        OperationFailed: the device does not say what it is.

    """

    may_block: Final = False
    prompt: Final = False
    foreign: Final = False

    def __init__(
        self,
        calls: Syscalls,
        fd: FileDescriptor,
        name: str,
        *,
        kind: str,
        address_space: AddressSpace | None,
        group: GroupInfo | None,
        left: Callable[[KernelDevice], bool],
    ) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self.address_space: Final = address_space
        self.group: Final[GroupInfo | None] = group
        self._calls = calls
        self._left = left
        self._given_out = False
        self._released: bool | None = None
        self._regions: dict[int, vfio.RegionInfo] = {}
        self._irqs: dict[int, vfio.IrqInfo] = {}
        self._info = self._read_info(fd.number)
        platform = bool(self._info.flags & vfio.DeviceFlags.PLATFORM)
        self.compatible: Final = Sysfs(calls).compatible(name) if platform else None
        self.fd = fd

    def _read_info(self, number: int) -> vfio.DeviceInfo:
        size = vfio.DeviceInfo.WITH_CAPS.size
        question = vfio.DeviceInfo.WITH_CAPS.pack(size, 0, 0, 0, 0)
        request = vfio.DeviceIoctl.VFIO_DEVICE_GET_INFO
        return self._parsed(
            vfio.DeviceInfo.unpack, call_info(self._calls, number, request, question, self.name), request
        )

    def _parsed(self, unpack: Callable[[bytes], T], answer: bytes, request: vfio.Ioctl) -> T:
        try:
            return unpack(answer)
        except vfio.BadStructure as error:
            raise OperationFailed(request.name, self.name, errno="EPROTO", advice=str(error)) from error

    # --- what it is ---
    def info(self) -> vfio.DeviceInfo:
        """``VFIO_DEVICE_GET_INFO``, as it was when the device was opened."""
        return self._info

    def region_info(self, index: int) -> vfio.RegionInfo:
        """``VFIO_DEVICE_GET_REGION_INFO``; kept after the first call."""
        known = self._regions.get(index)
        if known is not None:
            return known
        request = vfio.DeviceIoctl.VFIO_DEVICE_GET_REGION_INFO
        question = vfio.RegionInfo.LAYOUT.pack(vfio.RegionInfo.LAYOUT.size, 0, index, 0, 0, 0)
        answer = call_info(self._calls, self.fd.number, request, question, self._region(index))
        region = self._parsed(vfio.RegionInfo.unpack, answer, request)
        self._regions[index] = region
        return region

    def irq_info(self, index: int) -> vfio.IrqInfo:
        """``VFIO_DEVICE_GET_IRQ_INFO``; asked each time: some change with the device's mode."""
        request = vfio.DeviceIoctl.VFIO_DEVICE_GET_IRQ_INFO
        question = vfio.IrqInfo(index).pack()
        answer = call_info(self._calls, self.fd.number, request, question, f"{self.name} interrupt index {index}")
        return self._parsed(vfio.IrqInfo.unpack, answer, request)

    def doorbells(self, index: int) -> Sequence[tuple[int, bytes]]:
        """None that we know of."""
        del index
        return ()

    def access_waits(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """False: the kernel waits for nobody."""
        del index, offset, length, write
        return False

    def probe_feature(self, feature: int) -> bool:
        """``VFIO_DEVICE_FEATURE`` with PROBE; any errno means no: kernels differ in which."""
        question = bytearray(vfio.DeviceFeature(feature, vfio.FeatureFlags.PROBE).pack())
        try:
            self._calls.ioctl(self.fd.number, vfio.DeviceIoctl.VFIO_DEVICE_FEATURE, question)
        except OSError:
            return False
        return True

    def feature(self, request: vfio.DeviceFeature, room: int) -> bytes:
        """``VFIO_DEVICE_FEATURE``; see :class:`~vfiod.server.backends.base.Backend`."""
        getting = vfio.FeatureFlags.GET in request.flags and vfio.FeatureFlags.PROBE not in request.flags
        whole = replace(request, data=request.data.ljust(room, b"\0")) if getting else request
        buffer = bytearray(whole.pack())
        try:
            self._calls.ioctl(self.fd.number, vfio.DeviceIoctl.VFIO_DEVICE_FEATURE, buffer)
        except OSError as error:
            what = f"{self.name} feature {request.feature}"
            raise OperationFailed("VFIO_DEVICE_FEATURE", what, errno=error.errno or "EIO") from error
        return vfio.DeviceFeature.unpack(bytes(buffer)).data if getting else b""

    # --- regions ---
    def region_read(self, index: int, offset: int, length: int) -> bytes:
        """``pread`` at the region's place in the fd; exactly ``length`` bytes or OperationFailed."""
        data = self.region_read_some(index, offset, length)
        if len(data) != length:
            what = self._region(index, offset, length)
            raise OperationFailed("pread", what, errno="EIO", advice=f"the device gave {len(data)} bytes")
        return data

    def region_read_some(self, index: int, offset: int, length: int) -> bytes:
        """``pread`` at the region's place in the fd; what it gives, or OperationFailed."""
        try:
            return self._calls.pread(self.fd.number, length, self.region_info(index).offset + offset)
        except OSError as error:
            raise failed("pread", self._region(index, offset, length), error, _ACCESS_ADVICE) from error

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """``pwrite`` at the region's place in the fd; all of it or OperationFailed."""
        what = self._region(index, offset, len(data))
        try:
            done = self._calls.pwrite(self.fd.number, data, self.region_info(index).offset + offset)
        except OSError as error:
            raise failed("pwrite", what, error, _ACCESS_ADVICE) from error
        if done != len(data):
            raise OperationFailed("pwrite", what, errno="EIO", advice=f"the device took {done} bytes")

    def region_fd(self, index: int) -> int | None:
        """The device's own fd, lent; None when nothing of the region may be mapped."""
        return self.fd.number if self.region_info(index).areas else None

    def _region(self, index: int, offset: int | None = None, length: int = 0) -> str:
        where = f"{self.name} region {index}"
        return where if offset is None else f"{where} (offset 0x{offset:x}, {length} bytes)"

    # --- interrupts, reset ---
    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """``VFIO_DEVICE_SET_IRQS``; a positive return is a smaller grant, ENOSPC one not told: FewerVectors."""
        what = f"{self.name} interrupt index {request.index} ({request.describe()})"
        argument = bytearray(request.pack())
        try:
            granted = call(
                self._calls, self.fd.number, vfio.DeviceIoctl.VFIO_DEVICE_SET_IRQS, argument, what, _IRQ_ADVICE
            )
        except OperationFailed as error:
            if error.errno == "ENOSPC" and request.count > 1:
                raise FewerVectors(what, asked=request.count, granted=None) from error
            raise
        if granted > 0:
            raise FewerVectors(what, asked=request.count, granted=granted)

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``."""
        call(self._calls, self.fd.number, vfio.DeviceIoctl.VFIO_DEVICE_RESET, 0, self.name, _RESET_ADVICE)

    def hot_reset_info(self) -> vfio.HotResetInfo:
        """``VFIO_DEVICE_GET_PCI_HOT_RESET_INFO``, asked until there is room for every function."""
        request = vfio.DeviceIoctl.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO
        fixed, entry = vfio.HotResetInfo.LAYOUT.size, vfio.DependentDevice.LAYOUT.size
        room = _FIRST_FUNCTIONS
        for _ in range(_MAX_ATTEMPTS):
            buffer = bytearray(fixed + room * entry)
            vfio.HotResetInfo.LAYOUT.pack_into(buffer, 0, len(buffer), 0, 0)
            try:
                self._calls.ioctl(self.fd.number, request, buffer)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    continue  # functions came or went between the kernel's count and its list
                if error.errno != errno.ENOSPC:
                    raise failed(request.name, self.name, error, _HOT_RESET_INFO_ADVICE) from error
                room = vfio.HotResetInfo.count_in(bytes(buffer))
                if room > _MAX_FUNCTIONS:
                    break
            else:
                return self._parsed(vfio.HotResetInfo.unpack, bytes(buffer), request)
        raise OperationFailed(request.name, self.name, errno="EAGAIN", advice="what is on its bus keeps changing")

    def hot_reset(self, group_fds: Sequence[int]) -> None:
        """``VFIO_DEVICE_PCI_HOT_RESET``: no fds for a cdev, all affected groups' for a device of a group."""
        argument = bytearray(vfio.HotReset(tuple(group_fds)).pack())
        request = vfio.DeviceIoctl.VFIO_DEVICE_PCI_HOT_RESET
        call(self._calls, self.fd.number, request, argument, self.name, _HOT_RESET_ADVICE)

    # --- the end ---
    @property
    def given_out(self) -> bool:
        """Whether its fd was given to another process."""
        return self._given_out

    def give_out(self) -> None:
        """Note that its fd goes to another process."""
        self._given_out = True

    def watch_end(self, gone: Callable[[str], None]) -> None:
        """See :class:`Backend`: the kernel never tells."""

    def watch_return(self, back: Callable[[Sequence[int]], None]) -> None:
        """See :class:`Backend`: what is gone stays gone."""

    def close(self) -> bool:
        """Close the device, then let its group go if it was the last. The second call says what the first said."""
        if self._released is None:
            self._released = False  # whatever happens below happens once
            self.fd.close()
            self._released = self._left(self)
        return self._released
