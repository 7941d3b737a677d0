"""An edu-like PCI device for :mod:`tests.unit.server.fake_kernel`: QEMU's ``hw/misc/edu.c`` behind vfio-pci.

Its regions lie in one memfd, where vfio-pci puts them (index << 40), so that mapping them works really; its
interrupts are real eventfds; its DMA moves the mapped memory of this process really. What a mapped store cannot do
here is reach the device's logic, so BAR0 (registers) is not mappable unless asked for, and BAR2 (plain memory) is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from vfiod.protocol import vfio

REGION_SHIFT = 40  # drivers/vfio/pci/vfio_pci_core.h, VFIO_PCI_OFFSET_SHIFT
BAR0_SIZE = 1 << 20
BAR2_SIZE = 1 << 16
CONFIG_SIZE = 256
DMA_BUFFER = 0x40000
EDU_ID = 0x010000ED

Dma = Callable[[int, int, bool], int]
"""(iova, size, write) -> address in this process; raises OSError(EFAULT)."""


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def signal(fd: int) -> None:
    os.eventfd_write(fd, 1)


@dataclass
class Trigger:
    """An eventfd the kernel holds: a reference of its own, as ``eventfd_ctx_fdget`` takes."""

    fd: int

    @classmethod
    def take(cls, fd: int) -> Trigger:
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            raise refuse(errno.EBADF) from None
        if link != "anon_inode:[eventfd]":
            raise refuse(errno.EINVAL)
        return cls(os.dup(fd))

    def drop(self) -> None:
        os.close(self.fd)


@dataclass
class FakeDevice:
    """One device of the host.

    Attributes that a test may set before it is opened: ``flags``, ``pcie``, ``msi_count``, ``msi_grant`` (the host
    grants fewer than asked for), ``bar0_mmap``, ``features``, ``missing_regions``.
    """

    name: str
    group: int
    cdev: int = -1  # N of /dev/vfio/devices/vfioN
    vf_of: str | None = None  # the name of its physical function
    sriov: bool = False  # it is a physical function
    vf_token: bytes | None = None
    vf_users: int = 0
    hot_resettable: bool = True
    hot_resets: int = 0
    bus: str = "pci"
    driver: str | None = "vfio-pci"
    reset_method: str | None = "flr bus"
    device_api: str | None = None  # of a mediated device (bus "mdev")
    flags: vfio.DeviceFlags = vfio.DeviceFlags.PCI | vfio.DeviceFlags.RESET
    num_regions: int = vfio.VFIO_PCI_NUM_REGIONS
    num_irqs: int = vfio.VFIO_PCI_NUM_IRQS
    pcie: bool = False
    msi_count: int = 1
    msi_grant: int | None = None
    bar0_mmap: bool = False
    features: frozenset[int] = frozenset()
    feature_values: dict[int, bytes] = field(default_factory=dict)
    capabilities: tuple[vfio.Capability, ...] = ()
    irq_capabilities: dict[int, tuple[vfio.Capability, ...]] = field(default_factory=dict)
    resets: int = 0
    dies: bool = False  # a bus reset leaves it as all ones
    at_hot_reset: list[tuple[int | None, bool]] = field(default_factory=list)  # interrupts, bus mastering, then
    opened: bool = False
    mode: int | None = None
    triggers: list[Trigger | None] = field(default_factory=list)
    single: dict[int, Trigger] = field(default_factory=dict)
    unmask: Trigger | None = None
    masked: bool = False
    fd: int = -1
    dma: Dma | None = None
    registers: dict[int, int] = field(default_factory=dict)

    # --- opening and closing ---
    def open(self, fd: int, dma: Dma) -> None:
        """Take a memfd as the device's file."""
        os.ftruncate(fd, vfio.VFIO_PCI_NUM_REGIONS << REGION_SHIFT)
        self.fd = os.dup(fd)  # the device outlives any one fd of it
        self.dma = dma
        self.opened = True
        header = struct.pack("<HHHHBBBB", 0x1234, 0x11E8, 0x0102, 0x0010, 0x10, 0, 0, 0xFF)
        config = bytearray(CONFIG_SIZE)
        config[: len(header)] = header
        config[0x34] = 0x40  # capability list: MSI with 64-bit address
        config[0x3D] = 1  # INTA
        config[0x40:0x44] = struct.pack("<BBH", 0x05, 0, 0x80 | (self.msi_count.bit_length() - 1) << 1)
        os.pwrite(self.fd, config, vfio.PciRegion.CONFIG << REGION_SHIFT)
        self._clear()

    def _clear(self) -> None:
        self.registers = {0x00: EDU_ID, 0x04: 0, 0x08: 0, 0x20: 0, 0x24: 0, 0x80: 0, 0x88: 0, 0x90: 0, 0x98: 0}
        for register, value in self.registers.items():
            self._mirror(register, value)

    def _mirror(self, register: int, value: int) -> None:
        os.pwrite(self.fd, struct.pack("<I", value & 0xFFFFFFFF), register)

    def close(self) -> None:
        """The last fd of it is gone."""
        self.disable()
        for trigger in self.single.values():
            trigger.drop()
        self.single.clear()
        os.close(self.fd)
        self.fd = -1
        self.opened = False

    # --- info ---
    def device_info(self) -> bytes:
        return vfio.DeviceInfo(self.flags, self.num_regions, self.num_irqs, self.capabilities).pack()

    def _sizes(self) -> dict[int, tuple[int, vfio.RegionFlags]]:
        both = vfio.RegionFlags.READ | vfio.RegionFlags.WRITE
        mmap = vfio.RegionFlags.MMAP if self.bar0_mmap else vfio.RegionFlags(0)
        return {
            vfio.PciRegion.BAR0: (BAR0_SIZE, both | mmap),
            vfio.PciRegion.BAR2: (BAR2_SIZE, both | vfio.RegionFlags.MMAP),
            vfio.PciRegion.CONFIG: (CONFIG_SIZE, both),
        }

    def region_info(self, index: int) -> bytes:
        if index >= self.num_regions or index == vfio.PciRegion.VGA:
            raise refuse(errno.EINVAL)
        size, flags = self._sizes().get(index, (0, vfio.RegionFlags(0)))
        return vfio.RegionInfo(index, flags, size, index << REGION_SHIFT).pack()

    def irq_info(self, index: int) -> bytes:
        if index >= self.num_irqs or (index == vfio.PciIrq.ERR and not self.pcie):
            raise refuse(errno.EINVAL)
        flags = vfio.IrqFlags.EVENTFD
        if index == vfio.PciIrq.INTX:
            flags |= vfio.IrqFlags.MASKABLE | vfio.IrqFlags.AUTOMASKED
        else:
            flags |= vfio.IrqFlags.NORESIZE
        return vfio.IrqInfo(index, flags, self._count(index), self.irq_capabilities.get(index, ())).pack()

    def _count(self, index: int) -> int:
        return {vfio.PciIrq.MSI: self.msi_count, vfio.PciIrq.MSIX: 0}.get(vfio.PciIrq(index), 1)

    # --- regions ---
    def read(self, length: int, position: int) -> bytes:
        region, offset, size = self._place(position)
        length = min(length, size - offset)
        if region == vfio.PciRegion.BAR0 and offset < 0xA0 and length == 4:
            return struct.pack("<I", self.registers.get(offset, 0) & 0xFFFFFFFF)
        return os.pread(self.fd, length, position)

    def write(self, data: bytes, position: int) -> int:
        region, offset, size = self._place(position)
        data = data[: size - offset]
        if region == vfio.PciRegion.BAR0 and offset < 0xA0:
            if len(data) in (4, 8):
                self._register(offset, int.from_bytes(data, "little"))
            return len(data)
        return os.pwrite(self.fd, data, position)

    def _place(self, position: int) -> tuple[int, int, int]:
        region, offset = position >> REGION_SHIFT, position & ((1 << REGION_SHIFT) - 1)
        size, _ = self._sizes().get(region, (0, None))
        if offset >= size:
            raise refuse(errno.EINVAL)
        command = struct.unpack("<H", os.pread(self.fd, 2, (vfio.PciRegion.CONFIG << REGION_SHIFT) + 4))[0]
        if region < vfio.PciRegion.ROM and not command & 2:
            raise refuse(errno.EIO)
        return region, offset, size

    def _register(self, offset: int, value: int) -> None:
        if offset == 0x04:
            self.registers[0x04] = ~value & 0xFFFFFFFF
            self._mirror(0x04, self.registers[0x04])
        elif offset == 0x60:
            self.raise_interrupt(value)
        elif offset == 0x64:
            self.registers[0x24] &= ~value
        elif offset == 0x98:
            self.registers[0x98] = value
            if value & 1:
                self._transfer(value)
        elif offset in (0x20, 0x80, 0x88, 0x90):
            self.registers[offset] = value

    def _transfer(self, command: int) -> None:
        source, target, count = self.registers[0x80], self.registers[0x88], self.registers[0x90]
        to_ram = bool(command & 2)
        assert self.dma is not None
        address = self.dma(target if to_ram else source, count, to_ram)
        if to_ram:
            ctypes.memmove(address, os.pread(self.fd, count, source), count)
        else:
            os.pwrite(self.fd, ctypes.string_at(address, count), target)
        self.registers[0x98] = command & ~1
        if command & 4:
            self.raise_interrupt(0x100)

    # --- interrupts (drivers/vfio/pci/vfio_pci_intrs.c) ---
    def raise_interrupt(self, value: int = 1) -> None:
        """What a write to +0x60 does: the device interrupts."""
        self.registers[0x24] |= value
        self._fire()

    def _fire(self) -> None:
        if self.mode == vfio.PciIrq.INTX and not self.masked:
            self.masked = True  # the host masks the line until the user says otherwise
            self._send(0)
        elif self.mode == vfio.PciIrq.MSI:
            self._send(0)

    def _send(self, vector: int) -> None:
        trigger = self.triggers[vector] if vector < len(self.triggers) else None
        if trigger is not None:
            signal(trigger.fd)

    def poll(self) -> None:
        """What the kernel does by itself: an eventfd given for unmasking was signalled."""
        if self.unmask is not None and select.select([self.unmask.fd], [], [], 0)[0]:
            os.eventfd_read(self.unmask.fd)
            self._unmask()

    def _unmask(self) -> None:
        if self.masked:
            self.masked = bool(self.registers[0x24])
            if self.masked:
                self._send(0)  # still asserted: it fires again at once

    def signal_single(self, index: int) -> bool:
        """REQ or ERR; returns whether anybody listens."""
        trigger = self.single.get(index)
        if trigger is not None:
            signal(trigger.fd)
        return trigger is not None

    def disable(self) -> None:
        for trigger in self.triggers:
            if trigger is not None:
                trigger.drop()
        self.triggers = []
        if self.unmask is not None:
            self.unmask.drop()
            self.unmask = None
        self.mode = None

    def set_irqs(self, request: vfio.SetIrqs) -> int:
        if request.index >= self.num_irqs:
            raise refuse(errno.EINVAL)
        if request.start >= self._count(request.index) or request.start + request.count > self._count(request.index):
            raise refuse(errno.EINVAL)
        match request.index, request.action:
            case (vfio.PciIrq.INTX, vfio.IrqAction.TRIGGER):
                return self._intx_trigger(request)
            case (vfio.PciIrq.INTX, _):
                return self._intx_mask(request)
            case (vfio.PciIrq.MSI | vfio.PciIrq.MSIX, vfio.IrqAction.TRIGGER):
                return self._msi_trigger(request)
            case (vfio.PciIrq.ERR, vfio.IrqAction.TRIGGER) if self.pcie:
                return self._single(request)
            case (vfio.PciIrq.REQ, vfio.IrqAction.TRIGGER):
                return self._single(request)
        raise refuse(errno.ENOTTY)

    def _intx_trigger(self, request: vfio.SetIrqs) -> int:
        if self.mode == vfio.PciIrq.INTX and request.is_disable:
            self.disable()
            return 0
        if self.mode not in (None, vfio.PciIrq.INTX) or request.count != 1:
            raise refuse(errno.EINVAL)
        if request.data is vfio.IrqData.EVENTFD:
            trigger = Trigger.take(request.fds[0]) if request.fds[0] >= 0 else None
            if self.triggers and self.triggers[0] is not None:
                self.triggers[0].drop()
            if self.mode is None:
                self.masked = False
            self.mode = vfio.PciIrq.INTX
            self.triggers = [trigger]
            if self.registers[0x24]:
                self._fire()
            return 0
        if self.mode is None:
            raise refuse(errno.EINVAL)
        if request.data is vfio.IrqData.NONE or request.values[0]:
            self._send(0)
        return 0

    def _intx_mask(self, request: vfio.SetIrqs) -> int:
        if self.mode != vfio.PciIrq.INTX or request.count != 1:
            raise refuse(errno.EINVAL)
        if request.data is vfio.IrqData.EVENTFD:
            if request.action is vfio.IrqAction.MASK:
                raise refuse(errno.ENOTTY)
            if self.unmask is not None:
                self.unmask.drop()
                self.unmask = None
            if request.fds[0] >= 0:
                self.unmask = Trigger.take(request.fds[0])
        elif request.data is vfio.IrqData.NONE or request.values[0]:
            if request.action is vfio.IrqAction.MASK:
                self.masked = True
            else:
                self._unmask()
        return 0

    def _msi_trigger(self, request: vfio.SetIrqs) -> int:
        if self.mode == request.index and request.is_disable:
            self.disable()
            return 0
        if self.mode not in (None, request.index):
            raise refuse(errno.EINVAL)
        if request.data is vfio.IrqData.EVENTFD:
            if self.mode is None:
                wanted = request.start + request.count
                if self.msi_grant is not None and wanted > self.msi_grant:
                    return self.msi_grant
                taken = [Trigger.take(fd) if fd >= 0 else None for fd in request.fds]
                self.mode = request.index
                self.triggers = [*(None for _ in range(request.start)), *taken]
                return 0
            if request.start + request.count > len(self.triggers):
                raise refuse(errno.EINVAL)  # NORESIZE
            for vector, fd in enumerate(request.fds, request.start):
                new = Trigger.take(fd) if fd >= 0 else None
                old, self.triggers[vector] = self.triggers[vector], new
                if old is not None:
                    old.drop()
            return 0
        if self.mode is None or request.start + request.count > len(self.triggers):
            raise refuse(errno.EINVAL)
        for position in range(request.count):
            if request.data is vfio.IrqData.NONE or request.values[position]:
                self._send(request.start + position)
        return 0

    def _single(self, request: vfio.SetIrqs) -> int:
        old = self.single.get(request.index)
        if request.data is vfio.IrqData.EVENTFD and request.count:
            new = Trigger.take(request.fds[0]) if request.fds[0] >= 0 else None
            self.single.pop(request.index, None)
            if old is not None:
                old.drop()
            if new is not None:
                self.single[request.index] = new
        elif request.data is vfio.IrqData.NONE and old is not None:
            if request.count:
                signal(old.fd)
            else:
                self.single.pop(request.index).drop()
        elif request.data is vfio.IrqData.BOOL and request.count:
            if request.values[0] and old is not None:
                signal(old.fd)
        else:
            raise refuse(errno.EINVAL)
        return 0

    def forget(self) -> None:
        """What a reset of its bus does to it: registers and config space as new."""
        config = vfio.PciRegion.CONFIG << REGION_SHIFT
        command = struct.unpack("<H", os.pread(self.fd, 2, config + 4))[0]
        self.at_hot_reset.append((self.mode, bool(command & 4)))
        self._clear()
        os.pwrite(self.fd, b"\0\0", config + 4)
        os.pwrite(self.fd, bytes(24), config + 0x10)
        if self.dies:
            os.pwrite(self.fd, b"\xff" * CONFIG_SIZE, config)

    def reset(self) -> None:
        if not self.flags & vfio.DeviceFlags.RESET:
            raise refuse(errno.EINVAL)
        self.resets += 1
        self._clear()
