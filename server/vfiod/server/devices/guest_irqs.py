"""The guest's hand on the interrupts: what it writes to its MSI and MSI-X capabilities, and to its MSI-X table.

The configuration space and the table remember what was written (:mod:`vfiod.server.devices.config`); what follows is
decided in :mod:`vfiod.server.interrupts.guest` and :mod:`vfiod.server.interrupts.msix`; here it is done. On the loop.
"""

from __future__ import annotations

import logging
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import CommandError
from vfiod.server.devices.arming import NotEnough
from vfiod.server.devices.config.space import Guest, VirtualConfig
from vfiod.server.devices.config.table import MsixTable
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.irq_index import INTX
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.interrupts.guest import Move, moves, switches
from vfiod.server.interrupts.messages import next_try
from vfiod.server.interrupts.msix import wanted
from vfiod.server.logs import about

__all__ = ["GuestInterrupts"]

_log: Final = logging.getLogger(__name__)

MSI: Final = int(vfio.PciIrq.MSI)
MSIX: Final = int(vfio.PciIrq.MSIX)


class GuestInterrupts:
    """Does what a guest's writes ask for.

    Args:
        device: what the device is called, for events.
        config: its configuration space, as the guest sees it.
        table: its MSI-X table; None: it has none that is virtualised.
        interrupts: its interrupts.
        environment: events.

    """

    def __init__(
        self,
        device: str,
        config: VirtualConfig,
        table: MsixTable | None,
        interrupts: DeviceInterrupts,
        environment: Environment,
    ) -> None:
        self._device = device
        self._config = config
        self._table = table
        self._interrupts = interrupts
        self._environment = environment

    def config_written(self, before: Guest) -> None:
        """The guest has written to its configuration space. CommandError; then interrupts are as they were."""
        after = self._config.guest
        if after == before or self._interrupts.external:
            return
        switched = switches((before.msi > 0, before.msix), (after.msi > 0, after.msix))
        for switch in switched:
            move = moves(self._interrupts.kind, switch)
            if move is Move.START_MSI:
                self._start_msi(after.msi)
            elif move is Move.START_MSIX:
                self._follow_table()
                self._told(IrqKind.MSIX, "the guest enabled MSI-X")
            elif move is Move.TO_INTX:
                self._to_intx(switch.value)
        if not switched and after.masked is not before.masked and self._interrupts.kind is IrqKind.MSIX:
            self._follow_table()

    def table_written(self, changed: frozenset[int]) -> None:
        """The guest has masked or unmasked these vectors. CommandError; then interrupts are as they were."""
        if changed and self._interrupts.kind is IrqKind.MSIX and not self._interrupts.external:
            self._follow_table(changed)

    # --- moves ------------------------------------------------------------------------------------

    def _start_msi(self, count: int) -> None:
        """As many as the guest allocated, or fewer when the host has no more: then it finds so in its field."""
        one = self._interrupts.indexes[MSI]
        asked = count
        while True:
            try:
                self._interrupts.use(one, range(count))
            except CommandError as error:
                if not isinstance(error, NotEnough) and error.errno != "ENOSPC":
                    raise
                fewer = next_try(count, error.granted if isinstance(error, NotEnough) else None)
                if not fewer:
                    raise
                _log.info(
                    "Device %s: the host has no %d MSI vectors, %d are tried",
                    self._device,
                    count,
                    fewer,
                    extra=about(device=self._device),
                )
                count = fewer
            else:
                break
        less = "" if count == asked else f"; it allocated {asked}, the host has no more"
        self._told(IrqKind.MSI, f"the guest enabled MSI: {count} vectors{less}")

    def _follow_table(self, among: frozenset[int] | None = None) -> None:
        """Use what the guest uses, release what it does not; only of ``among`` when it is given."""
        guest, interrupts = self._config.guest, self._interrupts
        one = interrupts.indexes[MSIX]
        unmasked = frozenset() if self._table is None else self._table.unmasked()
        now = wanted(enabled=guest.msix, all_masked=guest.masked, unmasked=unmasked)
        used = interrupts.used if interrupts.kind is IrqKind.MSIX else frozenset()
        use, release = now - used, used - now
        if among is not None:
            use, release = use & among, release & among
        if not use and not release and interrupts.kind is IrqKind.MSIX:
            return
        new = [vector for vector in sorted(use) if not interrupts.knows(one, vector)]
        interrupts.use(one, use, release=release)
        for vector in new:
            reason = "the guest uses the vector: irq-start it to have its eventfd"
            self._told(IrqKind.MSIX, reason, vector=vector, mode=IrqMode.DIRECT)

    def _to_intx(self, what: str) -> None:
        one = self._interrupts.indexes[INTX]
        if one.info.count:
            self._interrupts.use(one, (0,))
            self._told(IrqKind.INTX, f"{what} by the guest")
        else:
            self._interrupts.stop(reason=f"{what} by the guest; it has no interrupt pin")

    def _told(self, kind: IrqKind, reason: str, *, vector: int | None = None, mode: IrqMode | None = None) -> None:
        if vector is None or mode is None:
            self._environment.emit(IrqModeChanged(device=self._device, kind=kind, reason=reason))
        else:
            event = IrqModeChanged(device=self._device, kind=kind, vector=vector, mode=mode, reason=reason)
            self._environment.emit(event)
