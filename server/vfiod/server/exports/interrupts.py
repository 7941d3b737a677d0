"""A client's hand on its device's interrupts: DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS.

The eventfds of the client go to the kernel as they are, so that interrupts pass vfiod by. What is set up is known to
the device model nevertheless: ``query-irqs`` shows it, a reset brings it back, and it ends with the client. While a
client is there, this alone changes the interrupts: what is written to MSI and MSI-X capabilities is only remembered
(QEMU writes them through to us, and says what it wants by SET_IRQS).

REQ and ERR are vfiod's own. The client is offered indexes of the same numbers that vfiod signals: REQ when the device
is to be given back (QEMU then unplugs it), ERR when it has failed. So are all interrupts of a subchannel and of an AP
matrix, which vfiod hears whoever has the device: they are passed on, and what they tell of is the client's to read.

A platform device's are masked and unmasked as the kernel has it: before they have an eventfd too, and UNMASK completes.
Its messages (extended IRQs) are not there for a client: vfio-user has no place for what a source is programmed with.

One message carries at most 16 eventfds: a block of messages comes in pieces, which the kernel would refuse for MSI; the
device model makes the block grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, cast

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.words import IrqKind, IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.vfio_user import SetIrqs
from vfiod.server.devices import eventfds
from vfiod.server.devices.device import Device
from vfiod.server.devices.irq_index import INTX, IrqIndex, Wanted
from vfiod.server.devices.irqs import DeviceInterrupts
from vfiod.server.kernel.kinds import kind_of

if TYPE_CHECKING:
    from vfiod.server.devices.platform_irqs import PlatformInterrupts
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import Place

__all__ = ["ClientInterrupts"]

_OFFERED: Final = vfio.IrqFlags.EVENTFD | vfio.IrqFlags.NORESIZE


class ClientInterrupts:
    """The interrupts of a device, as its client sees and sets them. On the loop.

    Args:
        device: the device.
        client: who, for the reasons of events.

    """

    def __init__(self, device: Device, client: str) -> None:
        self._device = device
        self._client = client
        self._notices: dict[int, eventfds.Consumer] = {}  # by index

    # --- looking --------------------------------------------------------------------------------------

    def info(self, index: int) -> vfio.IrqInfo:
        """One index. InvalidArgument for one it does not have."""
        one = self._find(index)
        if not one.reserved:
            return one.info if one.info.type is None else vfio.IrqInfo(index)
        # REQ is vfiod's own wish too, so every device has it; ERR only one that can report.
        present = one.requests or one.info.count > 0
        return vfio.IrqInfo(index, _OFFERED, 1) if present else vfio.IrqInfo(index)

    def _find(self, index: int) -> IrqIndex:
        return self._device.interrupts.find(index)

    # --- setting --------------------------------------------------------------------------------------

    def check(self, request: SetIrqs, fds: Sequence[FileDescriptor]) -> vfio.SetIrqs:
        """Refuse what can never be done, whatever state the device is in. InvalidArgument, BadMessage."""
        whole = request.with_fds([fd.number for fd in fds])
        info = self.info(request.index)
        if whole.is_disable and not request.start:
            return whole
        if not request.count or request.start + request.count > info.count:
            raise InvalidArgument(
                f"{self._find(request.index)} has {info.count} interrupts for its client: {whole.describe()} is not "
                "among them"
            )
        for fd in fds:
            kind = kind_of(fd.number)
            if kind is not FdKind.EVENTFD:
                raise InvalidArgument(f"DEVICE_SET_IRQS came with a {kind}: interrupts are signalled to eventfds")
        return whole

    def set(self, whole: vfio.SetIrqs, fds: list[FileDescriptor]) -> None:
        """Do what was checked. Takes the fds over on success, out of the list. CommandError; then all is as before."""
        one = self._find(whole.index)
        if one.reserved:
            self._set_notice(one, whole, fds)
        elif whole.is_disable:
            self._device.interrupts.stop(one, reason=f"{self._client} disabled it")
        elif whole.data is vfio.IrqData.EVENTFD:
            if whole.action is vfio.IrqAction.TRIGGER:
                self._assign(one, whole, fds)
            elif whole.action is vfio.IrqAction.UNMASK:
                self._resample(one, fds)
            else:
                raise InvalidArgument(f"{one} cannot be masked by an eventfd", errno="ENOTTY")
        else:
            self._now(one, whole)

    def _assign(self, one: IrqIndex, whole: vfio.SetIrqs, fds: list[FileDescriptor]) -> None:
        vectors = range(whole.start, whole.start + whole.count)
        interrupts = self._device.interrupts
        if fds:
            given = _taken(fds)
            wanted = [Wanted(vector, trigger=fd) for vector, fd in zip(vectors, given, strict=True)]
            interrupts.start(one, wanted, IrqMode.DIRECT)
        elif one.kind is IrqKind.MSIX and isinstance(interrupts, DeviceInterrupts):
            interrupts.keep_enabled(one, vectors)
        else:
            interrupts.stop(one, vectors, reason=f"{self._client} took its eventfds away")

    def _resample(self, one: IrqIndex, fds: list[FileDescriptor]) -> None:
        """The eventfd by which a level interrupt is completed: given, or taken away."""
        one.check_level()
        interrupts = self._device.interrupts
        platform = self._platform()
        if platform is not None:
            trigger = platform.trigger_of(one)
        elif isinstance(interrupts, DeviceInterrupts) and one.index == INTX:
            trigger = interrupts.trigger_of(one, 0)
        else:
            raise InvalidArgument(f"{one} takes no eventfd that unmasks", errno="ENOTTY")
        if trigger is None:
            if not fds:
                return
            raise InvalidArgument(f"{one} has no trigger: give that first")
        resample = _taken(fds)[0] if fds else None
        try:
            again = eventfds.duplicate(trigger, str(one))
        except BaseException:
            if resample is not None:
                resample.close()
            raise
        interrupts.start(one, [Wanted(0, trigger=again, resample=resample)], IrqMode.DIRECT)

    def _platform(self) -> PlatformInterrupts | None:
        """The interrupts of a platform device; None: it is another. Its class is imported with the first of them."""
        return cast("PlatformInterrupts", self._device.interrupts) if self._device.on_platform_bus else None

    def _now(self, one: IrqIndex, whole: vfio.SetIrqs) -> None:
        interrupts = self._device.interrupts
        platform = self._platform()
        if platform is not None and whole.action is not vfio.IrqAction.TRIGGER:
            if whole.data is vfio.IrqData.NONE or whole.values[0]:
                platform.set_mask(one, masked=whole.action is vfio.IrqAction.MASK)
            return
        chosen = [
            whole.start + place
            for place in range(whole.count)
            if whole.data is vfio.IrqData.NONE or whole.values[place]
        ]
        for vector in chosen:
            match whole.action:
                case vfio.IrqAction.MASK:
                    interrupts.mask(one, vector)
                case vfio.IrqAction.UNMASK:
                    interrupts.unmask(one, vector)
                case _:
                    interrupts.trigger(one, vector)

    # --- REQ and ERR ----------------------------------------------------------------------------------

    def _set_notice(self, one: IrqIndex, whole: vfio.SetIrqs, fds: list[FileDescriptor]) -> None:
        if whole.action is not vfio.IrqAction.TRIGGER:
            raise InvalidArgument(f"{one} cannot be masked")
        if whole.data is vfio.IrqData.EVENTFD or whole.is_disable:
            old = self._notices.pop(one.index, None)
            if old is not None:
                old.fd.close()
            if fds:
                self._notices[one.index] = eventfds.Consumer(_taken(fds)[0])
        elif whole.data is vfio.IrqData.NONE or whole.values[0]:
            self._signal(one)

    def _signal(self, one: IrqIndex) -> None:
        consumer = self._notices.get(one.index)
        if consumer is not None:
            consumer.signal(1)

    def notice(self, *, request: bool) -> bool:
        """Tell the client: the device is wanted back, or has failed. Whether it listens."""
        told = False
        for one in self._device.interrupts.indexes:
            if one.reserved and not one.passed_on and one.requests is request and one.index in self._notices:
                self._signal(one)
                told = True
        return told

    def pass_on(self, index: int) -> None:
        """An interrupt that vfiod has heard is the client's."""
        self._signal(self._find(index))

    # --- over a change of the process -----------------------------------------------------------------

    def keep(self, owner: str, given: Given) -> list[tuple[int, Place]]:
        """Describe REQ and ERR; the rest is the device's."""
        return [(index, given.give(one.fd, f"{owner}/notice")) for index, one in self._notices.items()]

    def adopt(self, states: Iterable[tuple[int, Place]], taken: Taken) -> None:
        """Have them again."""
        for index, place in states:
            self._notices[index] = eventfds.Consumer(taken.take(place))

    # --- the end --------------------------------------------------------------------------------------

    def fds(self) -> list[FileDescriptor]:
        """The eventfds of REQ and ERR."""
        return [consumer.fd for consumer in self._notices.values()]

    def close(self) -> None:
        """Close the eventfds of REQ and ERR. The device's own are its model's."""
        for consumer in self._notices.values():
            consumer.fd.close()
        self._notices.clear()


def _taken(fds: list[FileDescriptor]) -> list[FileDescriptor]:
    """They belong to whoever gets them now."""
    taken = list(fds)
    fds.clear()
    return taken
