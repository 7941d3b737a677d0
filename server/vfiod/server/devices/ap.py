"""Adapters of a vfio-ap device: no regions; a reset, REQ, and a notice when what is assigned changes.

Source: ``Documentation/arch/s390/vfio-ap.rst``. What a guest does with its adapters never passes here: the machine's
interpretation does it. A real one opens only for a VM that the hypervisor has associated with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.ccw import ApConfigChanged
from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.errors import CommandError
from vfiod.protocol.vfio.ccw import ApIrq
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.device import Device
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.model import Model
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.own_irqs import OwnInterrupts, OwnIrqIndex
from vfiod.server.devices.regions import Regions, describe

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ApState, ModelState

__all__ = ["ApDevice"]


class ApIrqIndex(OwnIrqIndex, frozen=True):
    """``req``, ``cfg-chg``."""

    NAMES = ("req", "cfg-chg")
    EVENTS = ("the event DEVICE_REQUESTED", "the event AP_CONFIG_CHANGED")


class ApModel(Model, frozen=True, kw_only=True):
    """Everything of an AP device that is open; ``own`` are its interrupts, to count them."""

    own: OwnInterrupts


class ApDevice(Device):
    """One matrix of adapters and domains."""

    driver: ClassVar[Driver] = Driver.VFIO_AP

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._changes = 0

    def populate(self, backend: Backend, environment: Environment) -> ApModel:
        """Read what it has. See :meth:`Device.populate`."""
        info = backend.info()
        if not info.flags & vfio.DeviceFlags.AP:
            raise CommandError(f"{backend.name} is not an AP device: driver vfio-ap cannot serve it", errno="EINVAL")
        regions = tuple(describe(index, backend.region_info(index)) for index in range(info.num_regions))
        indexes = [ApIrqIndex(self.name, backend.irq_info(index)) for index in range(info.num_irqs)]
        if trace.device_populated_irq.on:
            for one in indexes:
                trace.device_populated_irq(device=self.name, index=one.index, count=one.info.count)
        own = OwnInterrupts(self.name, indexes)
        known = {int(one) for one in ApIrq}
        notices = Notices(self.name, backend, tuple(one for one in indexes if one.info.count and one.index in known))
        return ApModel(
            backend, info, Regions(self.name, backend, regions, no_mmap=True), own, notices, migratable=False, own=own
        )

    def keep_model(self, model: Model, given: Given) -> ApState:
        """See :meth:`Device.keep_model`."""
        from vfiod.server.state.machine import ApState

        return ApState(heard=cast("ApModel", model).own.keep(), changes=self._changes)

    def adopt_model(self, model: Model, state: ModelState, taken: Taken) -> None:
        """See :meth:`Device.adopt_model`."""
        kept = cast("ApState", state)
        cast("ApModel", model).own.adopt(kept.heard)
        self._changes = kept.changes

    def _noticed(self, one: IrqIndex, count: int) -> None:
        cast("ApModel", self._active()).own.heard(one, count)
        if one.index != ApIrq.CFG_CHG:
            super()._noticed(one, count)
            return
        if self.claim is not None:
            self.claim.signalled(one.index)
        self._changes += count
        self._environment.emit(ApConfigChanged(device=self.name, count=self._changes))
