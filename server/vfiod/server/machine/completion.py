"""The machine is complete: interrupts of platform devices are started, and numbered as on QEMU's platform bus.

What is remembered is how to start a device that is added later, and nothing of any device: each keeps its own
numbers (``query-irqs``), so that none can dangle here. Source: QEMU ``hw/core/platform-bus.c``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vfiod.protocol.catalogue.interrupts import NUMBERS
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.server.devices.platform import PlatformDevice
from vfiod.server.devices.platform_irqs import Request

if TYPE_CHECKING:
    from vfiod.server.devices.device import Device
    from vfiod.server.devices.irq_index import IrqIndex, Started

__all__ = ["Completion", "check_numbers", "numbers_in_use", "startable"]


class Completion:
    """How interrupts are started since the machine is complete.

    Args:
        first: the first interrupt number of the platform bus; None: interrupts have no numbers by themselves.
        mode: what was asked for.
        taken: whether somebody takes the eventfds.

    Attributes:
        following: the next interrupt number; None like ``first``.

    """

    def __init__(self, first: int | None, mode: IrqMode | None, *, taken: bool) -> None:
        self.first = first
        self.following = first
        self.mode = mode
        self.taken = taken

    def number(self, device: PlatformDevice, one: IrqIndex) -> int | None:
        """The number this interrupt has, or the following one, which is used up then. InvalidArgument: none is left."""
        known = device.platform.numbers.get(one.index)
        if known is not None or self.following is None:
            return known
        number = self.following
        if number >= NUMBERS:
            raise InvalidArgument(
                f"{one} would get interrupt number {number}, and a number has 32 bits: begin with a lower first-number"
            )
        self.following = number + 1
        return number

    def added(self, device: Device) -> list[Started]:
        """Start a device that was added since. InvalidArgument, OperationFailed; then nothing of it is started."""
        if not isinstance(device, PlatformDevice):
            return []
        before = self.following
        try:
            requests = [Request(one, number=self.number(device, one), give=False) for one in startable(device)]
            return device.platform.start_all(requests, self.mode, taken=self.taken)
        except BaseException:
            self.following = before
            raise


def startable(device: PlatformDevice) -> list[IrqIndex]:
    """The indexes that have an interrupt to be started."""
    return [one for one in device.platform.own if one.info.count]


def numbers_in_use(devices: Iterable[Device]) -> dict[int, tuple[str, int]]:
    """By interrupt number: the device and index that has it."""
    return {
        number: (device.name, index)
        for device in devices
        if isinstance(device, PlatformDevice) and device.realized
        for index, number in device.platform.numbers.items()
    }


def check_numbers(wanted: Iterable[tuple[str, int, int]], devices: Iterable[Device]) -> None:
    """Refuse a number that two interrupts would have. InvalidArgument.

    Args:
        wanted: device, index and number of each that is to get one.
        devices: all.

    """
    wanted = list(wanted)
    changed = {(device, index) for device, index, _ in wanted}
    used = {number: owner for number, owner in numbers_in_use(devices).items() if owner not in changed}
    for device, index, number in wanted:
        other = used.setdefault(number, (device, index))
        if other != (device, index):
            raise InvalidArgument(
                f"Interrupt number {number} for irq{index} of device '{device}' is that of irq{other[1]} of device "
                f"'{other[0]}': give each a number of its own"
            )
