"""A platform device on any backend: what ``device_add driver=vfio-platform`` makes (section 7 of the reference).

Regions and interrupts are discovered: as many as the device says, none of them special. Follows QEMU
``hw/vfio/platform.c`` (``vfio_populate_device``), except that nothing is started before ``irq-start``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import DeviceInfo, Driver
from vfiod.protocol.errors import CommandError
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.device import Device
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.model import Model, Options
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.platform_irqs import PlatformInterrupts
from vfiod.server.devices.platform_messages import MessageIndex, PlatformMessages
from vfiod.server.devices.regions import Region, Regions, describe

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ModelState, PlatformState

__all__ = ["PlatformDevice", "PlatformModel", "PlatformOptions"]


class PlatformOptions(Options, frozen=True):
    """The properties of ``device_add`` that shape a platform device.

    Attributes:
        irqfd: whether interrupts may be direct (``x-irqfd``).

    """

    irqfd: bool = True


class PlatformModel(Model, frozen=True, kw_only=True):
    """Everything of a platform device that is open.

    Attributes:
        platform: its interrupts, by their own class.

    """

    platform: PlatformInterrupts


class PlatformDevice(Device):
    """One platform device."""

    driver: ClassVar[Driver] = Driver.VFIO_PLATFORM
    on_platform_bus: ClassVar[bool] = True

    def populate(self, backend: Backend, environment: Environment) -> PlatformModel:
        """Read a platform device. See :meth:`Device.populate`."""
        info = backend.info()
        if not info.flags & vfio.DeviceFlags.PLATFORM:
            raise CommandError(
                f"{backend.name} is not a platform device: driver vfio-platform cannot serve it", errno="EINVAL"
            )
        options = self.options
        regions = tuple(self._region(backend, index) for index in range(info.num_regions))
        indexes = tuple(self._irq(backend, index) for index in range(info.num_irqs))
        found = next((one for one in indexes if isinstance(one, MessageIndex)), None)
        interrupts = PlatformInterrupts(
            self.name,
            backend,
            indexes,
            environment,
            mmap_timeout_ms=options.mmap_timeout_ms,
            irqfd=options.irqfd if isinstance(options, PlatformOptions) else True,
            on_trap=self._trap,
            messages=None if found is None else PlatformMessages(backend, found),
        )
        return PlatformModel(
            backend,
            info,
            Regions(self.name, backend, regions, no_mmap=options.no_mmap, foreign=backend.foreign),
            interrupts,
            Notices(self.name, backend, ()),  # the kernel's vfio-platform has neither REQ nor ERR
            False,
            platform=interrupts,
        )

    def set_up(self, model: Model) -> None:
        """Make the eventfds of its interrupts. On failure none is there."""
        _platform(model).platform.prepare()

    # --- over a change of the process -------------------------------------------------------------

    def keep_model(self, model: Model, given: Given) -> PlatformState:
        """See :meth:`Device.keep_model`."""
        return _platform(model).platform.keep(given)

    def adopt_model(self, model: Model, state: ModelState, taken: Taken) -> None:
        """See :meth:`Device.adopt_model`."""
        _platform(model).platform.adopt(cast("PlatformState", state), taken)

    def go_on(self, model: Model) -> None:
        """See :meth:`Device.go_on`."""
        _platform(model).platform.listen()

    def info(self) -> DeviceInfo:
        """For ``query-devices``: with what the host's device tree says it is."""
        info = super().info()
        if self._model is None:
            return info
        compatible = self._model.backend.compatible
        return replace(info, compatible=None if compatible is None else list(compatible))

    def _region(self, backend: Backend, index: int) -> Region:
        info = backend.region_info(index)
        region = describe(index, info)
        region.completes = True
        if trace.device_populated_region.on:
            trace.device_populated_region(
                device=self.name, region=region.name, size=f"0x{info.size:x}", flags=info.flags
            )
        return region

    def _irq(self, backend: Backend, index: int) -> IrqIndex:
        info = backend.irq_info(index)
        if trace.device_populated_irq.on:
            trace.device_populated_irq(device=self.name, index=index, count=info.count, flags=info.flags)
        return MessageIndex(self.name, info) if MessageIndex.matches(info) else IrqIndex(self.name, info)

    @property
    def platform(self) -> PlatformInterrupts:
        """Its interrupts. DeviceNotActive while they are not bound: it is being added, or goes."""
        return _platform(self._active()).platform


def _platform(model: Model) -> PlatformModel:
    if not isinstance(model, PlatformModel):
        raise TypeError(f"A platform device was populated as a {type(model).__name__}")
    return model
