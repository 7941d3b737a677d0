"""A platform device for :mod:`tests.unit.server.fake_kernel`: what ``drivers/vfio/platform`` makes of one.

Any number of regions, and of interrupts that are level or edge (``irqs="lee"``). Its regions lie in one memfd at
index << 40, as ``VFIO_PLATFORM_OFFSET_SHIFT`` has it. Writing N to offset 0x10 of region 0 takes interrupt N's level
away; everything else is plain memory.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass, field

from tests.unit.server.fake_device import REGION_SHIFT, Dma, FakeDevice, Trigger, refuse, signal

from vfiod.protocol import vfio

REGION_SIZE = 0x4000
ACKNOWLEDGE = 0x10
MAGIC = 0x74726976  # "virt"


@dataclass
class FakeIrq:
    """One interrupt. ``trigger`` and ``virqfd`` are the kernel's references; ``latched``: an edge while masked."""

    level: bool
    trigger: Trigger | None = None
    virqfd: Trigger | None = None
    masked: bool = False
    asserted: bool = False
    latched: bool = False

    def fire(self) -> None:
        if self.masked:
            self.latched = True
        elif self.trigger is not None:
            self.masked = self.level  # vfio_automasked_irq_handler
            signal(self.trigger.fd)

    def unmask(self) -> None:
        was, self.masked = self.masked, False
        again = self.asserted if self.level else self.latched
        self.latched = False
        if was and again:
            self.fire()


@dataclass
class FakePlatformDevice(FakeDevice):
    """One platform device. Its ``irqs``, ``regions`` (in bytes) and ``compatible`` may be set before it is opened."""

    bus: str = "platform"
    driver: str | None = "vfio-platform"
    reset_method: str | None = None
    flags: vfio.DeviceFlags = vfio.DeviceFlags.PLATFORM | vfio.DeviceFlags.RESET
    compatible: str | None = None
    irqs: str = "le"
    regions: tuple[int, ...] = (REGION_SIZE, REGION_SIZE)
    lines: list[FakeIrq] = field(default_factory=list)

    def open(self, fd: int, dma: Dma) -> None:
        os.ftruncate(fd, max(len(self.regions), 1) << REGION_SHIFT)
        self.fd = os.dup(fd)
        self.opened = True
        self.lines = [FakeIrq(kind == "l") for kind in self.irqs]
        os.pwrite(self.fd, MAGIC.to_bytes(4, "little"), 0)

    def device_info(self) -> bytes:
        return vfio.DeviceInfo(self.flags, len(self.regions), len(self.irqs), self.capabilities).pack()

    def region_info(self, index: int) -> bytes:
        if index >= len(self.regions):
            raise refuse(errno.EINVAL)
        flags = vfio.RegionFlags.READ | vfio.RegionFlags.WRITE | vfio.RegionFlags.MMAP
        return vfio.RegionInfo(index, flags, self.regions[index], index << REGION_SHIFT).pack()

    def irq_info(self, index: int) -> bytes:
        if index >= len(self.irqs):
            raise refuse(errno.EINVAL)
        flags = vfio.IrqFlags.EVENTFD
        if self.irqs[index] == "l":
            flags |= vfio.IrqFlags.MASKABLE | vfio.IrqFlags.AUTOMASKED
        return vfio.IrqInfo(index, flags, 1).pack()

    def read(self, length: int, position: int) -> bytes:
        self._inside(position)
        return os.pread(self.fd, length, position)

    def write(self, data: bytes, position: int) -> int:
        self._inside(position)
        if position == ACKNOWLEDGE:
            self.lines[int.from_bytes(data, "little")].asserted = False
        return os.pwrite(self.fd, data, position)

    def _inside(self, position: int) -> None:
        region, offset = position >> REGION_SHIFT, position & ((1 << REGION_SHIFT) - 1)
        if region >= len(self.regions) or offset >= self.regions[region]:
            raise refuse(errno.EINVAL)

    # --- interrupts (drivers/vfio/platform/vfio_platform_irq.c) ---
    def interrupt(self, index: int) -> None:
        """The device interrupts."""
        self.lines[index].asserted = True
        self.lines[index].fire()

    def poll(self) -> None:
        for line in self.lines:
            if line.virqfd is not None and select.select([line.virqfd.fd], [], [], 0)[0]:
                os.eventfd_read(line.virqfd.fd)
                line.unmask()

    def disable(self) -> None:
        for line in self.lines:
            for held in (line.trigger, line.virqfd):
                if held is not None:
                    held.drop()
            line.trigger = line.virqfd = None

    def set_irqs(self, request: vfio.SetIrqs) -> int:
        if request.index >= len(self.lines):
            raise refuse(errno.EINVAL)
        line = self.lines[request.index]
        if request.action is vfio.IrqAction.TRIGGER:
            return self._trigger(line, request)
        if not line.level:
            raise refuse(errno.ENOTTY)  # not VFIO_IRQ_INFO_MASKABLE
        if request.start or request.count != 1:
            raise refuse(errno.EINVAL)
        if request.data is vfio.IrqData.EVENTFD:
            if request.action is vfio.IrqAction.MASK:
                raise refuse(errno.ENOTTY)
            self._virqfd(line, request.fds[0])
        elif request.action is vfio.IrqAction.MASK:
            line.masked = True
        else:
            line.unmask()
        return 0

    @staticmethod
    def _virqfd(line: FakeIrq, fd: int) -> None:
        if fd >= 0 and line.virqfd is not None:
            raise refuse(errno.EBUSY)
        if line.virqfd is not None:
            line.virqfd.drop()
        line.virqfd = Trigger.take(fd) if fd >= 0 else None

    @staticmethod
    def _trigger(line: FakeIrq, request: vfio.SetIrqs) -> int:
        if request.is_disable or request.data is vfio.IrqData.EVENTFD:
            fd = -1 if request.is_disable else request.fds[0]
            new = Trigger.take(fd) if fd >= 0 else None
            if line.trigger is not None:
                line.trigger.drop()
            line.trigger = new
            if new is not None and line.asserted and line.level and not line.masked:
                line.fire()
            return 0
        if request.start or request.count != 1:
            raise refuse(errno.EINVAL)
        line.fire()
        return 0

    def forget(self) -> None:
        raise AssertionError("a platform device is on no bus that is reset")

    def reset(self) -> None:
        if not self.flags & vfio.DeviceFlags.RESET:
            raise refuse(errno.EINVAL)
        self.resets += 1
        for line in self.lines:
            line.asserted = line.latched = False
