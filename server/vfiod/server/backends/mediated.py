"""Devices that are made by parents in Python, as backends: to a device model they look like the kernel's vfio.

:class:`ApiDriver` is the driver of the mediated bus for one device API: the bus probes it with each device that is
made. ``device_add mdev=UUID`` opens one (:class:`MediatedDevices`). Each opened device has an address space of its own.

What the kernel's ``vfio`` core checks before it calls a driver is checked here; what the parent gives back is checked
too, because a wrong answer of a parent must be the parent's failure and not vfiod's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Sequence
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Check, GroupInfo
from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.errors import CommandError, DeviceNotActive, OperationFailed
from vfiod.protocol.limits import MAX_IRQ_INDEXES, MAX_REGION_INDEXES, MAX_VECTORS
from vfiod.server.backends.base import AddressSpace, Backend, FewerVectors, Mapping
from vfiod.server.kernel.syscalls import PAGE_SIZE
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.instance import Instance, guarded, quietly
from vfiod.server.mdev.parent import Area, DeviceInfo, IrqInfo, MapRequest, MediatedDevice, RegionInfo
from vfiod.server.mdev.space import Piece, Translation

__all__ = ["MediatedBackend", "MediatedDevices", "MediatedSpace"]

_log: Final = logging.getLogger(__name__)

_FLAGS: Final = {
    DeviceApi.VFIO_PCI: vfio.DeviceFlags.PCI,
    DeviceApi.VFIO_PLATFORM: vfio.DeviceFlags.PLATFORM,
}
"""The device APIs that have a driver here, and how ``VFIO_DEVICE_GET_INFO`` names them."""


class ApiDriver:
    """The driver of the mediated bus for one device API: probed with each device of it that is made."""

    def __init__(self, device_api: DeviceApi) -> None:
        self.name = device_api.value
        self.device_api = device_api
        self.flags = _FLAGS[device_api]

    def probe(self, instance: Instance) -> None:
        """Look whether the device can be what its type says. Raises OperationFailed."""
        info = _checked_info(instance)
        if self.device_api is DeviceApi.VFIO_PCI:
            _probe_pci(instance, info)
        else:
            _probe_platform(instance, info)

    def remove(self, instance: Instance) -> None:
        """Nothing is kept of a device that is not open."""


def _probe_pci(instance: Instance, info: DeviceInfo) -> None:
    if info.regions < vfio.VFIO_PCI_NUM_REGIONS or info.irqs < vfio.VFIO_PCI_NUM_IRQS:
        raise OperationFailed(
            "device_info",
            instance.what,
            errno=errno.EINVAL,
            advice=f"a vfio-pci device has at least {vfio.VFIO_PCI_NUM_REGIONS} regions and "
            f"{vfio.VFIO_PCI_NUM_IRQS} interrupt indexes, it has {info.regions} and {info.irqs}",
        )


def _probe_platform(instance: Instance, info: DeviceInfo) -> None:
    """Nothing is at a fixed index, so every index is looked at."""
    for index in range(info.irqs):
        what = f"{instance.what} interrupt index {index}"
        told = _checked_irq(what, guarded("irq_info", what, instance.device.irq_info, index))
        if told.type is None and told.count != 1:
            detail = f"an index of a vfio-platform device has one interrupt, it has {told.count}; messages need a type"
            raise OperationFailed("irq_info", what, errno=errno.EINVAL, advice=detail)
        if told.automasked and not told.maskable:
            raise OperationFailed(
                "irq_info", what, errno=errno.EINVAL, advice="an interrupt that masks itself must be maskable"
            )


class MediatedDevices:
    """Opens mediated devices.

    Args:
        bus: where they are.
        attach_space: replays all guest memory into a new address space, or raises and leaves nothing.
        detach_space: forgets an address space.

    """

    def __init__(
        self, bus: MdevBus, attach_space: Callable[[AddressSpace], None], detach_space: Callable[[AddressSpace], None]
    ) -> None:
        self._bus = bus
        self._attach_space = attach_space
        self._detach_space = detach_space
        self._drivers: dict[str, ApiDriver] = {api.value: ApiDriver(api) for api in _FLAGS}
        for driver in self._drivers.values():
            bus.register_driver(driver)

    # --- for device_add -------------------------------------------------------------------------------

    def check(self, uuid: str, driver: str = DeviceApi.VFIO_PCI) -> tuple[Check, ...]:
        """What ``device_add`` of that driver with ``x-dry-run`` says of it. Changes nothing; from any thread."""
        try:
            instance = self._bus.look(uuid)
        except CommandError as error:
            return (Check(name="mdev", ok=False, detail=str(error)),)
        checks = [Check(name="mdev", ok=True, detail=f"{instance.what} is a {instance.mdev_type.id}")]
        user = instance.user
        checks.append(
            Check(
                name="free",
                ok=user is None,
                detail="nobody uses it" if user is None else f"it is in use as device '{user}'; device_del that first",
            )
        )
        if instance.driver is not self._drivers.get(driver):
            detail = f"its device API is {instance.mdev_type.device_api}: use that driver, not {driver}"
            checks.append(Check(name="driver", ok=False, detail=detail))
            return tuple(checks)
        try:
            info = _checked_info(instance)
        except CommandError as error:
            checks.append(Check(name="device", ok=False, detail=str(error)))
        else:
            detail = "device-reset works" if info.reset else "it cannot be reset; it is added without"
            checks.append(Check(name="reset", ok=info.reset, detail=detail))
        return tuple(checks)

    def open(self, uuid: str, user: str, driver: str = DeviceApi.VFIO_PCI) -> Backend:
        """Open a device for a user (a device's id or path), with the device driver that is to have it.

        Blocks: in the topology lane. Unwinds on failure.

        Raises DeviceNotFound (no such mediated device), Busy (another user has it), DeviceNotActive (its device API
        is another driver's), OperationFailed (the parent, or mapping guest memory into it).
        """
        instance = self._bus.acquire(uuid, user)
        try:
            return self._opened(instance, driver)
        except BaseException:
            self._bus.release(instance)
            raise

    def _opened(self, instance: Instance, driver: str) -> MediatedBackend:
        used = self._drivers.get(driver)
        if used is None or instance.driver is not used:
            raise DeviceNotActive(
                f"{instance.what} has the device API {instance.mdev_type.device_api}: use that driver, not {driver}"
            )
        guarded("open", instance.what, instance.device.open)
        try:
            space = MediatedSpace(instance)
            self._attach_space(space)
            try:
                return MediatedBackend(instance, space, used.flags, _checked_info(instance), self._close)
            except BaseException:
                self._detach_space(space)
                raise
        except BaseException:
            _close_device(instance)
            raise

    def _close(self, instance: Instance, space: MediatedSpace) -> None:
        _close_device(instance)
        self._detach_space(space)
        self._bus.release(instance)


class MediatedSpace:
    """The address space of one mediated device: what its DMA can reach (:class:`AddressSpace`)."""

    page_size = PAGE_SIZE
    by_messages = True
    """The device asks for memory by calls: a client can answer them."""

    def __init__(self, instance: Instance) -> None:
        self.name = f"mdev:{instance.uuid}"
        self._instance = instance
        self._translation = Translation()
        instance.host.memory = self._translation

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Everything below 2**64: there is no IOMMU that could be narrower."""
        return ((0, (1 << 64) - 1),)

    def map(self, mapping: Mapping) -> None:
        """Make it reachable, unless the device refuses. Raises OperationFailed; then nothing has changed."""
        instance = self._instance
        if instance.gone is None:
            guarded(
                "memory_mapped",
                f"{instance.what} at 0x{mapping.iova:x} ({mapping.size} bytes)",
                instance.device.memory_mapped,
                mapping.iova,
                mapping.size,
                mapping.readonly,
            )
        self._translation.add(
            Piece(mapping.iova, mapping.size, mapping.memory, mapping.offset, mapping.readonly),
        )

    def unmap(self, iova: int, size: int) -> None:
        """Take pieces back, whole ones. When it returns, no DMA touches them."""
        instance = self._instance
        try:
            if instance.gone is None:
                guarded("memory_unmapped", instance.what, instance.device.memory_unmapped, iova, size)
        finally:
            # Whatever the device says: the memory is no longer its own.
            self._translation.remove(iova, size)


class MediatedBackend:
    """One opened mediated device (:class:`Backend`)."""

    kind = "mdev"
    given_out = False

    def __init__(
        self,
        instance: Instance,
        space: MediatedSpace,
        flags: vfio.DeviceFlags,
        info: DeviceInfo,
        close: Callable[[Instance, MediatedSpace], None],
    ) -> None:
        self.name = instance.uuid
        self._instance = instance
        self._device = instance.device
        self._space = space
        self._close = close
        self._info = vfio.DeviceInfo(
            flags | (vfio.DeviceFlags.RESET if info.reset else vfio.DeviceFlags(0)),
            info.regions,
            info.irqs,
        )
        self._regions: dict[int, vfio.RegionInfo] = {}
        self._irqs: dict[int, vfio.IrqInfo] = {}
        self._closed = False

    @property
    def address_space(self) -> AddressSpace:
        """Its own."""
        return self._space

    @property
    def group(self) -> GroupInfo | None:
        """None: its group is the mediated bus's, not one of ``/dev/vfio``."""
        return None

    def give_out(self) -> None:
        """Nothing to note: what is given out is the memory of a region, which does not keep the device."""

    # --- looking ----------------------------------------------------------------------------------------

    def info(self) -> vfio.DeviceInfo:
        """See :class:`Backend`."""
        return self._info

    def region_info(self, index: int) -> vfio.RegionInfo:
        """See :class:`Backend`."""
        known = self._regions.get(index)
        if known is None:
            self._present(index, self._info.num_regions, "VFIO_DEVICE_GET_REGION_INFO")
            told = guarded("region_info", self._what(index), self._device.region_info, index)
            known = self._regions[index] = guarded("region_info", self._what(index), self._region, index, told)
        return known

    def irq_info(self, index: int) -> vfio.IrqInfo:
        """See :class:`Backend`."""
        known = self._irqs.get(index)
        if known is None:
            self._present(index, self._info.num_irqs, "VFIO_DEVICE_GET_IRQ_INFO")
            what = f"{self._instance.what} interrupt index {index}"
            told = _checked_irq(what, guarded("irq_info", what, self._device.irq_info, index))
            flags = vfio.IrqFlags.EVENTFD if told.count else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.MASKABLE if told.maskable else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.AUTOMASKED if told.automasked else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.NORESIZE if told.noresize else vfio.IrqFlags(0)
            known = vfio.IrqInfo(index, flags, told.count, _irq_capabilities(told))
            if told.type is None:
                self._irqs[index] = known  # its messages come and go; everything else is constant
        return known

    def hot_reset_info(self) -> vfio.HotResetInfo:
        """A mediated device is alone: there is no bus to reset. OperationFailed, EOPNOTSUPP."""
        raise self._no_bus("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO")

    def hot_reset(self, group_fds: Sequence[int]) -> None:
        """See :meth:`hot_reset_info`."""
        raise self._no_bus("VFIO_DEVICE_PCI_HOT_RESET")

    def _no_bus(self, operation: str) -> OperationFailed:
        return OperationFailed(
            operation, self._instance.what, errno="EOPNOTSUPP", advice="a mediated device has no bus: use device-reset"
        )

    def probe_feature(self, feature: int) -> bool:
        """None: a mediated device has no ``VFIO_DEVICE_FEATURE``."""
        del feature
        return False

    # --- access -------------------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, length: int) -> bytes:
        """See :class:`Backend`."""
        info = self.region_info(index)
        if not info.readable or offset < 0 or length < 0 or offset + length > info.size:
            raise self._refused("read", info, offset, length)
        device = self._ready()
        data = guarded("read", self._what(index), device.read, index, offset, length)
        if not isinstance(data, bytes) or len(data) != length:
            raise _wrong("read", self._what(index), f"{length} bytes were asked for at offset 0x{offset:x}")
        return data

    def region_read_some(self, index: int, offset: int, length: int) -> bytes:
        """See :class:`Backend`. A mediated device has all the bytes it says it has."""
        return self.region_read(index, offset, length)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """See :class:`Backend`."""
        info = self.region_info(index)
        if not info.writable or offset < 0 or offset + len(data) > info.size:
            raise self._refused("write", info, offset, len(data))
        device = self._ready()
        guarded("write", self._what(index), device.write, index, offset, data)

    def region_fd(self, index: int) -> int | None:
        """See :class:`Backend`."""
        if not self.region_info(index).mappable:
            return None
        self._ready()
        return self._file(index)

    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """See :class:`Backend`."""
        info = self.irq_info(request.index)
        what = f"{self._instance.what} interrupt index {request.index}"
        # vfio_set_irqs_validate_and_prepare
        if (
            request.start < 0
            or request.count < 0
            or request.start >= info.count
            or (request.start + request.count > info.count)
        ):
            raise OperationFailed(
                "VFIO_DEVICE_SET_IRQS",
                what,
                errno=errno.EINVAL,
                advice=f"it has {info.count} interrupts, asked for {request.count} from {request.start}",
            )
        device = self._ready()
        granted = guarded("VFIO_DEVICE_SET_IRQS", what, device.set_irqs, request)
        if not isinstance(granted, int) or granted < 0:
            raise _wrong("set_irqs", what, f"it returned {granted!r}")
        if granted:
            raise FewerVectors(what, asked=request.start + request.count, granted=granted)

    def reset(self) -> None:
        """See :class:`Backend`."""
        device = self._ready()
        if not self._info.can_reset:
            raise OperationFailed(
                "VFIO_DEVICE_RESET", self._instance.what, errno=errno.ENOTTY, advice="this device cannot be reset"
            )
        guarded("VFIO_DEVICE_RESET", self._instance.what, device.reset)

    def close(self) -> bool:
        """See :class:`Backend`. True: nothing but vfiod itself holds a mediated device."""
        if not self._closed:
            self._closed = True
            self._close(self._instance, self._space)
        return True

    # --- inside ---------------------------------------------------------------------------------------------

    def _ready(self) -> MediatedDevice:
        if self._closed or self._instance.gone is not None:
            raise OperationFailed(
                "access", self._instance.what, errno=errno.ENODEV, advice=self._instance.gone or "it is closed"
            )
        return self._device

    def _present(self, index: int, count: int, operation: str) -> None:
        if not 0 <= index < count:
            raise OperationFailed(
                operation, self._instance.what, errno=errno.EINVAL, advice=f"index {index} is not below {count}"
            )

    def _what(self, index: int) -> str:
        return f"{self._instance.what} region {index}"

    def _refused(self, operation: str, info: vfio.RegionInfo, offset: int, length: int) -> OperationFailed:
        return OperationFailed(
            operation,
            f"{self._what(info.index)} offset 0x{offset:x} ({length} bytes)",
            errno=errno.EINVAL,
            advice=f"the region has {info.size} bytes{'' if info.readable else ', not readable'}"
            f"{'' if info.writable else ', not writable'}",
        )

    def _region(self, index: int, told: RegionInfo) -> vfio.RegionInfo:
        what = self._what(index)
        if not isinstance(told, RegionInfo) or not 0 <= told.size < 1 << 63:
            raise _wrong("region_info", what, f"it gave {told!r}")
        flags = vfio.RegionFlags.READ if told.readable else vfio.RegionFlags(0)
        flags |= vfio.RegionFlags.WRITE if told.writable else vfio.RegionFlags(0)
        # As the kernel: an index's region begins at its number times 2**40 of the device fd.
        offset = index << 40
        capabilities: tuple[vfio.Capability, ...] = ()
        if not told.size or not told.areas:
            return vfio.RegionInfo(index, flags if told.size else vfio.RegionFlags(0), told.size, offset)
        granted, offset = self._granted(index, told)
        if not granted:
            return vfio.RegionInfo(index, flags, told.size, offset)
        flags |= vfio.RegionFlags.MMAP
        if granted != (Area(0, told.size),):
            capabilities = (vfio.SparseMmap(granted),)
        return vfio.RegionInfo(index, flags, told.size, offset, capabilities)

    def _file(self, index: int) -> int | None:
        number = guarded("region_fd", self._what(index), self._device.region_fd, index)
        if number is not None and (not isinstance(number, int) or number < 0):
            raise _wrong("region_fd", self._what(index), f"it gave {number!r}")
        return number

    def _file_length(self, index: int) -> int:
        """Bytes that can be mapped of the file behind a region; a file whose end can move is refused."""
        what = self._what(index)
        number = self._file(index)
        if number is None:
            raise _wrong("region_fd", what, "it says that the region can be mapped, and has no file")
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                return 1 << 63  # a real device's file: its driver looks after its end
            seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
        except OSError as error:
            raise _wrong("region_fd", what, f"{number} is no memfd that can be sealed: {error.strerror}") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            # Whoever gets it by region-map could cut it, and the next access here would be SIGBUS.
            raise _wrong("region_fd", what, "its file must be sealed against shrinking (F_SEAL_SHRINK)")
        return status.st_size

    def _granted(self, index: int, told: RegionInfo) -> tuple[tuple[Area, ...], int]:
        """What may be mapped of a region, as the device's ``validate_map_request`` leaves it, and where in its file."""
        what = self._what(index)
        length = self._file_length(index)
        areas: list[Area] = []
        base: int | None = None
        for area in told.areas:
            asked = MapRequest(index, area.offset, area.size, file_offset=area.offset)
            try:
                granted = guarded("validate_map_request", what, self._device.validate_map_request, asked)
            except CommandError as error:
                _log.info("%s; it is left out of what may be mapped", error)
                continue
            if (
                not isinstance(granted, MapRequest)
                or granted.region != index
                or granted.size <= 0
                or granted.offset % PAGE_SIZE
                or granted.size % PAGE_SIZE
                or granted.file_offset % PAGE_SIZE
                or granted.offset < area.offset
                or granted.offset + granted.size > min(area.offset + area.size, told.size)
                or granted.file_offset < granted.offset
                or granted.file_offset + granted.size > length
            ):
                raise _wrong("validate_map_request", what, f"asked for {asked}, it granted {granted}")
            # One offset for the whole region: struct vfio_region_info has room for one.
            if base is not None and granted.file_offset - granted.offset != base:
                raise _wrong("validate_map_request", what, "areas of one region were moved by different distances")
            base = granted.file_offset - granted.offset
            areas.append(Area(granted.offset, granted.size))
        return tuple(areas), base or 0


def _checked_info(instance: Instance) -> DeviceInfo:
    info = guarded("device_info", instance.what, instance.device.device_info)
    if (
        not isinstance(info, DeviceInfo)
        or not 0 <= info.regions <= MAX_REGION_INDEXES
        or not 0 <= info.irqs <= MAX_IRQ_INDEXES
    ):
        most = f"at most {MAX_REGION_INDEXES} regions and {MAX_IRQ_INDEXES} interrupt indexes are taken"
        raise _wrong("device_info", instance.what, f"it gave {info!r}, {most}")
    return info


def _checked_irq(what: str, told: IrqInfo) -> IrqInfo:
    if not isinstance(told, IrqInfo) or not 0 <= told.count <= MAX_VECTORS:
        raise _wrong("irq_info", what, f"it gave {told!r}")
    if told.type is None and told.messages:
        raise _wrong("irq_info", what, "it gave messages for an index without a type")
    if told.type is not None and not _fits(told):
        raise _wrong("irq_info", what, f"it has {told.count} vectors, and gave {told!r:.200}")
    return told


def _fits(told: IrqInfo) -> bool:
    """Whether a stranger's messages can be told as the kernel would tell them."""
    kind = told.type
    return (
        isinstance(kind, vfio.IrqTypeCap)
        and 0 <= kind.type < 1 << 32
        and 0 <= kind.subtype < 1 << 32
        and isinstance(told.messages, tuple)
        and len(told.messages) <= told.count
        and all(isinstance(one, vfio.MsiMessage) for one in told.messages)
        and all(0 <= one.address < 1 << 64 and 0 <= one.data < 1 << 32 for one in told.messages)
    )


def _irq_capabilities(told: IrqInfo) -> tuple[vfio.Capability, ...]:
    if told.type is None:
        return ()
    return (told.type, vfio.MsiDescs(told.messages)) if told.messages else (told.type,)


def _close_device(instance: Instance) -> None:
    """The user is gone, whatever the device says."""
    instance.host.memory = None
    if instance.gone is None:
        quietly("close", instance.what, instance.device.close)


def _wrong(callback: str, what: str, detail: str) -> OperationFailed:
    return OperationFailed(callback, what, errno=errno.EIO, advice=f"the parent's answer cannot be: {detail}")
