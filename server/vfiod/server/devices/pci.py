"""A PCI device on any backend: what ``device_add driver=vfio-pci`` makes (sections 4 to 6 of the reference)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from msgspec.structs import replace

from vfiod.protocol.catalogue.devices import DeviceInfo, Driver
from vfiod.protocol.catalogue.words import IrqKind
from vfiod.server.backends.base import Backend
from vfiod.server.devices.device import Device
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.guest_view import AS_QEMU, Shown
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.devices.model import Model, Options
from vfiod.server.devices.pci_config import Saved
from vfiod.server.devices.populate import PciModel, populate
from vfiod.server.devices.regions import CONFIG, Region
from vfiod.server.devices.romfile import RomFile

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ModelState, PciState

__all__ = ["PciDevice", "PciOptions"]


class PciOptions(Options, frozen=True):
    """The properties of ``device_add`` that shape a PCI device.

    Attributes:
        shown: what the guest sees differently (``multifunction``, ``rombar``, ``romfile``).

    """

    shown: Shown = AS_QEMU

    @property
    def romfile(self) -> RomFile | None:
        """``romfile``."""
        return self.shown.romfile


class PciDevice(Device):
    """One PCI device."""

    driver: ClassVar[Driver] = Driver.VFIO_PCI
    hot_resettable: ClassVar[bool] = True

    def populate(self, backend: Backend, environment: Environment) -> PciModel:
        """Read a PCI device: configuration space, BARs, ROM, INTx, MSI, MSI-X."""
        options = self.options
        return populate(
            self.name,
            backend,
            environment,
            no_mmap=options.no_mmap,
            mmap_timeout_ms=options.mmap_timeout_ms,
            shown=options.shown if isinstance(options, PciOptions) else AS_QEMU,
            on_trap=self._trap,
        )

    # --- over a change of the process -------------------------------------------------------------

    def keep_model(self, model: Model, given: Given) -> PciState:
        """See :meth:`Device.keep_model`."""
        from vfiod.server.state.machine import PciState

        pci, interrupts = _pci(model), model.interrupts
        assert isinstance(interrupts, DeviceInterrupts)  # noqa: S101 - populate made it
        values, kind = pci.virtual.keep()
        table = None if pci.table is None else pci.table.read(0, len(pci.table))
        return PciState(config=values, kind=kind.value, table=table, interrupts=interrupts.keep(given))

    def adopt_model(self, model: Model, state: ModelState, taken: Taken) -> None:
        """See :meth:`Device.adopt_model`."""
        from vfiod.server.state.machine import PciState

        pci, interrupts = _pci(model), model.interrupts
        assert isinstance(state, PciState)  # noqa: S101 - of a device of this driver
        assert isinstance(interrupts, DeviceInterrupts)  # noqa: S101 - populate made it
        pci.virtual.adopt(state.config, IrqKind(state.kind))
        if pci.table is not None and state.table is not None:
            pci.table.adopt(state.table)
        interrupts.adopt(state.interrupts, taken)

    def go_on(self, model: Model) -> None:
        """See :meth:`Device.go_on`."""
        assert isinstance(model.interrupts, DeviceInterrupts)  # noqa: S101 - populate made it
        model.interrupts.listen()

    def info(self) -> DeviceInfo:
        """For ``query-devices``: with the ids of configuration space."""
        info = super().info()
        model = self._model
        if not isinstance(model, PciModel):
            return info
        return replace(info, vendor_id=model.config.vendor_id, device_id=model.config.device_id)

    def _accessed(self, region: Region, *, written: bool = False, due: bool = True) -> None:
        super()._accessed(region, written=written, due=due)
        if written and region.index == CONFIG and self._model is not None:
            # It may have switched memory decoding off, or sent the device to sleep.
            self._model.regions.decodes = self._decodes(self._model)
            self._tell_fast_path()

    # --- reset ------------------------------------------------------------------------------------

    def _why_no_reset(self) -> str:
        return (
            f"Device '{self.name}' cannot be reset alone (no VFIO_DEVICE_FLAGS_RESET): only its whole bus can, "
            "by hot-reset; query-hot-reset says what that would touch"
        )

    def _stop_dma(self, model: Model) -> None:
        _pci(model).config.stop_dma()

    def _save(self, model: Model) -> Saved:
        """Bus mastering off; what a reset may lose is kept."""
        config = _pci(model).config
        saved = config.save()
        config.stop_bus_master(saved)
        return saved

    def _restore(self, model: Model, saved: Any) -> bool:
        """BARs and command register as they were, if anybody is there."""
        config = _pci(model).config
        answers = config.answers
        if answers:
            config.restore(saved)
        return answers

    def _decodes(self, model: Model) -> bool:
        return _pci(model).config.decodes()


def _pci(model: Model) -> PciModel:
    if not isinstance(model, PciModel):
        raise TypeError(f"A PCI device was populated as a {type(model).__name__}")
    return model
