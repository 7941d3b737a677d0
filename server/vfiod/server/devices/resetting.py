"""A device's reset, step by step: interrupts off, state kept, DMA off; the reset; everything back, and said.

What must be saved is the model's to say (``Device._save``, ``_restore``, ``_decodes``). Used by a device that is reset
alone, and by a hot reset, which does it to several. In turns of the device's lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.reset import DeviceResetDone
from vfiod.protocol.errors import CommandError, DeviceNotActive, OperationFailed
from vfiod.server import trace
from vfiod.server.devices.model import Quiesced

if TYPE_CHECKING:
    from vfiod.server.devices.device import Device
    from vfiod.server.lanes import Turn

__all__ = ["quiesce", "reset_alone", "revive"]


async def reset_alone(device: Device) -> None:
    """``VFIO_DEVICE_RESET`` and all around it. OperationFailed."""
    async with device.lane.turn("device-reset") as turn:
        quiesced = await device.quiesce(turn, "device")
        failure: Exception | None = None
        try:
            await device._in_thread(turn, quiesced.model.backend.reset)
        except Exception as error:  # noqa: BLE001 - the device is revived first, then it is raised
            failure = error
        await device.revive(turn, quiesced, failure)


async def quiesce(device: Device, turn: Turn, method: str) -> Quiesced:
    """See :meth:`Device.quiesce`, whose part this is."""
    model = device._active()
    if trace.reset_begin.on:
        trace.reset_begin(device=device.name, method=method)
    await device._step(turn, model.interrupts.suspend)
    try:
        saved = await device._in_thread(turn, lambda: device._save(model))
    except Exception:
        if not device._going:
            await device._step(turn, model.interrupts.resume)
        raise
    return Quiesced(model, saved, method)


async def revive(device: Device, turn: Turn, quiesced: Quiesced, failure: Exception | None) -> None:
    """See :meth:`Device.revive`, whose part this is."""
    model = quiesced.model
    try:
        if not await device._in_thread(turn, lambda: device._restore(model, quiesced.saved)):
            failure = failure or _silent(device, quiesced.method)
    except Exception as error:  # noqa: BLE001 - interrupts come back first, then it is raised
        failure = failure or error
    if not device._going:
        model.regions.decodes = await device._in_thread(turn, lambda: device._decodes(model))
    if device._going:
        raise DeviceNotActive(f"Device '{device.name}' was removed during its reset") from failure
    try:
        await device._step(turn, model.interrupts.resume)
    except CommandError as error:
        failure = failure or error
    device._tell_fast_path()
    if trace.reset_end.on:
        trace.reset_end(device=device.name, method=quiesced.method, failed=failure)
    if failure is not None:
        raise failure
    device._environment.emit(DeviceResetDone(device=device.name, method=quiesced.method))


def _silent(device: Device, method: str) -> OperationFailed:
    reason = "Its registers read all ones after a reset: the device does not answer"
    device._environment.emit(DeviceError(device=device.name, reason=reason))
    operation = "VFIO_DEVICE_PCI_HOT_RESET" if method == "hot" else "VFIO_DEVICE_RESET"
    return OperationFailed(operation, f"device '{device.name}'", errno="EIO", advice=reason)
