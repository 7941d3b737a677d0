"""A device that a dead process has left: its interrupts are brought to where nothing is waited for."""

from __future__ import annotations

import contextlib

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import OperationFailed
from vfiod.server.devices.device import Device

__all__ = ["settle"]


def settle(device: Device, *, all_off: bool) -> None:
    """Whoever served it died, and where it was with its interrupts is not known. On the loop. CommandError.

    Level interrupts are completed and unmasked, and one that is still up fires again; what its user masked stays
    masked. What is not known to be armed is disarmed.

    Args:
        device: it was made again from what the dead process left, and listens.
        all_off: it belonged to somebody who is gone, and armed what nobody knows.

    """
    interrupts, backend = device.interrupts, device.backend
    if all_off:
        interrupts.stop(reason="the server that served its client has died")
    if not any(info.active for info in interrupts.infos()):
        for one in interrupts.indexes:
            if not one.reserved and one.info.count:
                with contextlib.suppress(OperationFailed):  # EINVAL: another index of the device is armed, or none
                    backend.set_irqs(vfio.SetIrqs.disable(one.index))
    for one, info in zip(interrupts.indexes, interrupts.infos(), strict=True):
        if one.reserved or not one.info.automasked or not info.active:
            continue
        for vector in info.vectors:
            if vector.mode == IrqMode.RELAYED:
                interrupts.eoi(one, vector.vector)
                if "masked" not in vector.state:
                    interrupts.unmask(one, vector.vector)
