"""Devices that are made by parents in Python, as backends: to a device model they look like the kernel's vfio.

:class:`ApiDriver` is the driver of the mediated bus for one device API: the bus probes it with each device that is
made. ``device_add mdev=UUID`` opens one (:class:`MediatedDevices`). Each opened device has an address space of its own.

What the kernel's ``vfio`` core checks before it calls a driver is checked here; what the parent gives back is checked
too, because a wrong answer of a parent must be the parent's failure and not vfiod's.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Check, GroupInfo
from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.errors import CommandError, DeviceNotActive, OperationFailed
from vfiod.server.backends.base import AddressSpace, Backend, FewerVectors
from vfiod.server.backends.mediated_drivers import DRIVEN_APIS, ApiDriver, checked_info, checked_irq
from vfiod.server.backends.mediated_regions import MediatedRegions, wrong
from vfiod.server.backends.mediated_space import MediatedSpace
from vfiod.server.kernel.memory import ACCESS_SIZES
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.parent import DeviceInfo, Doorbell, IrqInfo, MediatedDevice

__all__ = ["MediatedBackend", "MediatedDevices"]

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")


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
        self._drivers: dict[str, ApiDriver] = {api.value: ApiDriver(api) for api in DRIVEN_APIS}
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
            info = checked_info(instance)
        except CommandError as error:
            checks.append(Check(name="device", ok=False, detail=str(error)))
        else:
            detail = "device-reset works" if info.reset else "it cannot be reset; it is added without"
            checks.append(Check(name="reset", ok=info.reset, detail=detail))
        return tuple(checks)

    def waits(self, uuid: str) -> bool:
        """Whether a device may wait (it has not promised to be quick): then all its commands run in workers.

        False for one that is not there: adding it will say so.
        """
        try:
            return self._bus.look(uuid).calls.waits
        except CommandError:
            return False

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
        instance.call("open", instance.device.open, late=lambda _: instance.device.close())
        space = MediatedSpace(instance)
        try:
            self._attach_space(space)
            try:
                return MediatedBackend(instance, space, used.flags, checked_info(instance), self._close)
            except BaseException:
                self._detach_space(space)
                raise
        except BaseException:
            _close_device(instance, space)
            raise

    def adopt(self, uuid: str, user: str, driver: str) -> Backend:
        """Have a device open that was open in another process, for a user: as :meth:`open`, but it knows it already.

        Guest memory is mapped into its address space again. Raises as :meth:`open`.
        """
        instance = self._bus.acquire(uuid, user)
        space = MediatedSpace(instance)
        self._attach_space(space)
        return MediatedBackend(instance, space, self._drivers[driver].flags, checked_info(instance), self._close)

    def _close(self, instance: Instance, space: MediatedSpace) -> None:
        _close_device(instance, space)
        self._detach_space(space)
        self._bus.release(instance)


class MediatedBackend:
    """One opened mediated device (:class:`Backend`)."""

    kind = "mdev"
    given_out = False
    foreign = False
    compatible = None

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
        self._shown = MediatedRegions(instance)
        self._regions: dict[int, vfio.RegionInfo] = {}
        self._irqs: dict[int, vfio.IrqInfo] = {}
        self._irq_names: dict[int, str] = {}
        self._closed = False
        self._doorbells: tuple[Doorbell, ...] | None = None

    @property
    def prompt(self) -> bool:
        """See :class:`Backend`."""
        return not self._instance.calls.waits

    @property
    def may_block(self) -> bool:
        """Whether the device has not promised to be quick."""
        return self._instance.calls.waits

    def access_waits(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """See :class:`Backend`."""
        if not self._space.asks:  # nearly always
            return False
        try:
            return bool(self._device.may_dma(index, offset, length, write=write))
        except Exception:  # noqa: BLE001 - a parent's defect; then it is as if it said nothing
            _log.exception("may_dma of %s failed by a defect of its parent", self._instance.what)
            return True

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
            known = self._regions[index] = self._shown.info(index)
        return known

    def irq_info(self, index: int) -> vfio.IrqInfo:
        """See :class:`Backend`."""
        known = self._irqs.get(index)
        if known is None or known.type is not None:  # messages come and go; everything else is constant
            self._present(index, self._info.num_irqs, "VFIO_DEVICE_GET_IRQ_INFO")
            what = f"{self._instance.what} interrupt index {index}"
            told = checked_irq(what, self._call("irq_info", lambda: self._device.irq_info(index), what))
            flags = vfio.IrqFlags.EVENTFD if told.count else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.MASKABLE if told.maskable else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.AUTOMASKED if told.automasked else vfio.IrqFlags(0)
            flags |= vfio.IrqFlags.NORESIZE if told.noresize else vfio.IrqFlags(0)
            known = self._irqs[index] = vfio.IrqInfo(index, flags, told.count, _irq_capabilities(told))
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

    def doorbells(self, index: int) -> Sequence[tuple[int, bytes]]:
        """See :class:`Backend`. What cannot be one access of a region that is written is the parent's failure."""
        known = self._doorbells
        if known is None:
            told = self._call("doorbells", self._device.doorbells, self._instance.what)
            known = self._doorbells = tuple(self._checked_doorbell(one) for one in told)
        return [(one.offset, one.data) for one in known if one.region == index]

    def _checked_doorbell(self, one: Doorbell) -> Doorbell:
        size = len(one.data)
        info = self.region_info(one.region)
        if size not in ACCESS_SIZES or one.offset % size or not 0 <= one.offset <= info.size - size:
            raise wrong("doorbells", self._what(one.region), f"{size} bytes at 0x{one.offset:x} are no access of it")
        if not info.writable:
            raise wrong("doorbells", self._what(one.region), "it cannot be written")
        return one

    def feature(self, request: vfio.DeviceFeature, room: int) -> bytes:
        """See :meth:`probe_feature`. OperationFailed, ENOTTY."""
        del room
        what = f"{self._instance.what} feature {request.feature}"
        raise OperationFailed("VFIO_DEVICE_FEATURE", what, errno="ENOTTY", advice="a mediated device has no features")

    # --- access -------------------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, length: int) -> bytes:
        """See :class:`Backend`."""
        info = self.region_info(index)
        if not info.readable or offset < 0 or length < 0 or offset + length > info.size:
            raise self._refused("read", info, offset, length)
        device = self._ready()
        data = self._call("read", lambda: device.read(index, offset, length), self._what(index))
        if not isinstance(data, bytes) or len(data) != length:
            raise wrong("read", self._what(index), f"{length} bytes were asked for at offset 0x{offset:x}")
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
        self._call("write", lambda: device.write(index, offset, data), self._what(index))

    def region_fd(self, index: int) -> int | None:
        """See :class:`Backend`."""
        if not self.region_info(index).mappable:
            return None
        self._ready()
        return self._shown.file(index)

    def set_irqs(self, request: vfio.SetIrqs) -> None:
        """See :class:`Backend`."""
        info = self._irqs.get(request.index) or self.irq_info(request.index)
        what = self._irq_names.get(request.index)
        if what is None:
            what = self._irq_names[request.index] = f"{self._instance.what} interrupt index {request.index}"
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
        granted = self._call("VFIO_DEVICE_SET_IRQS", lambda: device.set_irqs(request), what)
        if not isinstance(granted, int) or granted < 0:
            raise wrong("set_irqs", what, f"it returned {granted!r}")
        if granted:
            raise FewerVectors(what, asked=request.start + request.count, granted=granted)

    def reset(self) -> None:
        """See :class:`Backend`."""
        device = self._ready()
        if not self._info.can_reset:
            raise OperationFailed(
                "VFIO_DEVICE_RESET", self._instance.what, errno=errno.ENOTTY, advice="this device cannot be reset"
            )
        self._call("VFIO_DEVICE_RESET", device.reset, self._instance.what)

    def watch_end(self, gone: Callable[[str], None]) -> None:
        """See :class:`Backend`. It goes with its parent."""
        self._instance.on_gone = gone

    def watch_return(self, back: Callable[[Sequence[int]], None]) -> None:
        """See :class:`Backend`: what is gone stays gone."""

    def close(self) -> bool:
        """See :class:`Backend`. True: nothing but vfiod itself holds a mediated device."""
        if not self._closed:
            self._closed = True
            self._instance.on_gone = None
            self._close(self._instance, self._space)
        return True

    # --- inside ---------------------------------------------------------------------------------------------

    def _call(self, operation: str, function: Callable[[], T], what: str) -> T:
        return self._instance.calls.run(operation, what, function)

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


def _irq_capabilities(told: IrqInfo) -> tuple[vfio.Capability, ...]:
    if told.type is None:
        return ()
    return (told.type, vfio.MsiDescs(told.messages)) if told.messages else (told.type,)


def _close_device(instance: Instance, space: MediatedSpace) -> None:
    """The user is gone, whatever the device says."""
    instance.host.memory = None
    if instance.gone is None:
        instance.calls.quietly("close", instance.what, instance.device.close)
    space.close()
