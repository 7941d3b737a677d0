"""``primer``: a small PCI device in Python, to try vfiod with, to read, and to copy.

It is a PCI Express endpoint, 1234:f10d (0x1234 is the vendor id that QEMU's own teaching devices use; nobody owns it),
class 0xff0000, with an INTx pin, MSI, MSI-X, function level reset, a block of registers and some memory of its own
that a DMA engine copies to and from guest memory.

Regions (the kernel's indexes)::

    0  BAR0    4 KiB   32-bit, trapped: the registers below
    2  BAR2    1 MiB   64-bit prefetchable, a memfd: can be mapped. The size is the parameter "memory"
    7  config  4 KiB   configuration space
       BAR1, BAR3 to BAR5, ROM: size 0. VGA: EINVAL, as for any device that is no display

Registers of BAR0, little-endian. A read of any width gives the bytes that are there. Only aligned writes of 4 or 8
bytes are taken (8: the lower register first), others are ignored. What is not named here reads as 0::

    0x00  ID            RO  0xf10d0001: device id, then the version of this map
    0x04  SCRATCH       RW  reads back with every bit inverted
    0x08  ROOT          RW  write n, read the integer square root of n
    0x0c  ACCESSES      RO  reads and writes of registers since reset, this one not counted
    0x10  IRQ_STATUS    RO  one bit per interrupt source that is pending; bit 31 is the DMA engine
    0x14  IRQ_RAISE     WO  sets these bits of IRQ_STATUS
    0x18  IRQ_ACK       WO  clears these bits of IRQ_STATUS
    0x1c  ERROR_RAISE   WO  reports an uncorrectable error (the ERR interrupt), whatever is written
    0x20  DMA_ADDRESS   RW  64 bits: guest address (IOVA)
    0x28  DMA_LOCAL     RW  offset in BAR2's memory
    0x2c  DMA_COUNT     RW  bytes
    0x30  DMA_COMMAND   WO  bit 0: start; bit 1: 0 guest to device, 1 device to guest; bit 2: interrupt when it ends
    0x34  DMA_STATUS    RO  bit 0: done; bit 1: fault; bits 8 to 15: why (the faults below)
    0x38  DMA_MOVED     RO  bytes moved by the last transfer, also when it faulted
    0x40  DMA_FAULT     RO  64 bits: the guest address that faulted
    0x800 MSI-X table   --  16 bytes for each vector. As with vfio-pci it reads as ones and takes nothing
    0xc00 MSI-X PBA     RO  one bit for each vector with a message that could not be sent

    faults: 1 bus mastering is off    2 the address is not mapped    3 it is read-only    4 DMA_LOCAL and DMA_COUNT
            leave BAR2's memory, or DMA_COUNT is 0    5 DMA_ADDRESS and DMA_COUNT leave the 64 bits

Interrupts. While IRQ_STATUS is not zero the INTx line is up. With MSI enabled, writing IRQ_RAISE sends one message
for each bit written: source n uses vector n modulo the number of enabled vectors; with MSI-X, vector n modulo the
number of vectors it has, and one that nobody listens to is pending until somebody does. A message, like DMA, is a
write to memory: without bus mastering (bit 2 of the command register, off after reset) it goes nowhere.

A transfer ends before the write to DMA_COMMAND does. It moves 4 KiB pages in order; one that faults stops it there.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, Area, PciIrq, PciRegion, SetIrqs
from vfiod.server.mdev.parent import (
    DeviceInfo,
    DmaFault,
    Doorbell,
    Host,
    IrqInfo,
    MdevType,
    MediatedDevice,
    Parent,
    RegionInfo,
    Saved,
)
from vfiod.server.mdev.pci_irqs import PciIrqs
from vfiod.server.mdev.samples.config_space import ConfigSpace
from vfiod.server.mdev.samples.memory import sealed_memory

__all__ = ["Primer", "PrimerDevice"]

VENDOR_ID: Final = 0x1234
DEVICE_ID: Final = 0xF10D
MAP_VERSION: Final = 0x0001

ID: Final = 0x00
SCRATCH: Final = 0x04
ROOT: Final = 0x08
ACCESSES: Final = 0x0C
IRQ_STATUS: Final = 0x10
IRQ_RAISE: Final = 0x14
IRQ_ACK: Final = 0x18
ERROR_RAISE: Final = 0x1C
DMA_ADDRESS: Final = 0x20
DMA_LOCAL: Final = 0x28
DMA_COUNT: Final = 0x2C
DMA_COMMAND: Final = 0x30
DMA_STATUS: Final = 0x34
DMA_MOVED: Final = 0x38
DMA_FAULT: Final = 0x40

START: Final = 1 << 0
TO_GUEST: Final = 1 << 1
INTERRUPT: Final = 1 << 2
DONE: Final = 1 << 0
FAULT: Final = 1 << 1
DMA_SOURCE: Final = 31

FAULT_BUS_MASTER: Final = 1
FAULT_UNMAPPED: Final = 2
FAULT_READONLY: Final = 3
FAULT_LOCAL: Final = 4
FAULT_ADDRESS: Final = 5

BAR0_SIZE: Final = 4096
MSIX_TABLE: Final = 0x800
MSIX_PBA: Final = 0xC00
MSIX_MOST: Final = (MSIX_PBA - MSIX_TABLE) // 16
PAGE: Final = 4096
MEMORY_MIN: Final = max(PAGE, mmap.PAGESIZE)
MEMORY_MAX: Final = 256 << 20
"""Bytes of BAR2: it must be a whole page to be mapped, and is vfiod's own memory."""

_WORD: Final = struct.Struct("<I")

# On the way of every interrupt, where Python 3.11 takes longer to find an Enum's member than the rest of a step.
_MSI: Final = PciIrq.MSI
_MSIX: Final = PciIrq.MSIX


class PrimerDevice(MediatedDevice):
    """One device.

    Args:
        host: the world.
        memory: bytes of BAR2; a power of two.
        vectors: MSI vectors of the capability.
        granted: vectors that can really be had; None: all.
        msix: MSI-X vectors of the capability; 0: it has none.
        resizable: whether MSI-X vectors can be added while others are in use.
        doorbell: whether writing 1 to IRQ_RAISE is a doorbell.

    """

    quick = True

    def __init__(
        self,
        host: Host,
        *,
        memory: int,
        vectors: int,
        granted: int | None = None,
        msix: int = 0,
        resizable: bool = False,
        doorbell: bool = False,
    ) -> None:
        self._host = host
        self._size = memory
        self._memory: FileDescriptor | None = None
        self._msix = msix
        self._doorbell = doorbell
        self._irqs = PciIrqs(host, intx=True, msi=vectors, err=True, granted=granted, msix=msix, resizable=resizable)
        self._config = ConfigSpace(
            vendor=VENDOR_ID,
            device=DEVICE_ID,
            bars={0: (BAR0_SIZE, False), 2: (memory, True)},
            msi_vectors=vectors,
            msix=(msix, MSIX_TABLE, MSIX_PBA) if msix else None,
        )
        self._power_on()

    def _power_on(self) -> None:
        self._registers: dict[int, int] = {}
        self._accesses = 0
        self._status = 0
        self._config.reset()

    # --- its life -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Fresh memory for a new user: what the last one gave away must not reach this one."""
        self._power_on()
        self._memory = sealed_memory("vfiod-primer", self._size)

    def close(self) -> None:
        """Let everything of the user go."""
        self._irqs.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def reset(self) -> None:
        """Function level reset. BAR2's memory and the eventfds stay, as on real cards."""
        self._power_on()
        self._irqs.forget_pending()
        self._irqs.set_intx_disable(False)
        self._irqs.set_line(False)

    def request(self, count: int) -> None:
        """Ask the user by the REQ interrupt."""
        self._irqs.request()

    def save(self) -> Saved:
        """Registers, configuration space, interrupts; BAR2's memory goes along as the file it is."""
        irqs = self._irqs.save()
        values = {
            "registers": {str(at): value for at, value in self._registers.items()},
            "accesses": self._accesses,
            "status": self._status,
            "config": self._config.save(),
            "irqs": irqs.values,
        }
        return Saved(values, irqs.fds if self._memory is None else {"bar2": self._memory, **irqs.fds})

    def restore(self, saved: Saved) -> None:
        """Be as saved."""
        values, fds = saved.values, dict(saved.fds)
        self._memory = fds.pop("bar2", None)
        self._registers = {int(at): value for at, value in values["registers"].items()}
        self._accesses, self._status = values["accesses"], values["status"]
        self._config.restore(values["config"])
        self._irqs.restore(Saved(values["irqs"], fds))

    # --- what it has ---------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        """As vfio-pci."""
        return DeviceInfo(regions=VFIO_PCI_NUM_REGIONS, irqs=VFIO_PCI_NUM_IRQS, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        """As vfio-pci."""
        match index:
            case PciRegion.BAR0:
                return RegionInfo(BAR0_SIZE, readable=True, writable=True)
            case PciRegion.BAR2:
                return RegionInfo(self._size, readable=True, writable=True, areas=(Area(0, self._size),))
            case PciRegion.CONFIG:
                return RegionInfo(self._config.size, readable=True, writable=True)
            case PciRegion.BAR1 | PciRegion.BAR3 | PciRegion.BAR4 | PciRegion.BAR5 | PciRegion.ROM:
                return RegionInfo()
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def region_fd(self, index: int) -> int | None:
        """The memory of BAR2."""
        return self._memory.number if index == PciRegion.BAR2 and self._memory is not None else None

    def irq_info(self, index: int) -> IrqInfo:
        """As vfio-pci."""
        return self._irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        """As vfio-pci; turning MSI on or off shows in config space."""
        granted = self._irqs.set_irqs(request)
        kind = self._irqs.kind
        self._config.msi_on = kind is _MSI
        self._config.msix_on = kind is _MSIX
        return granted

    def attributes(self) -> Mapping[str, str]:
        """For ``query-mdev-types``."""
        return {"memory": str(self._size), "interrupts-pending": f"0x{self._status:08x}"}

    def fds(self) -> Mapping[str, int]:
        """For ``query-fds``: BAR2's memory, and duplicates of its user's eventfds."""
        own = {} if self._memory is None else {"bar2": self._memory.number}
        return {**own, **self._irqs.fds()}

    # --- access ---------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, length: int) -> bytes:
        """From a region."""
        match index:
            case PciRegion.BAR0:
                first = offset & ~3
                words = [self._register(at) for at in range(first, offset + length, 4)]
                return struct.pack(f"<{len(words)}I", *words)[offset - first :][:length]
            case PciRegion.BAR2:
                return os.pread(self._card(), length, offset)
            case PciRegion.CONFIG:
                return self._config.read(offset, length, intx=self._status != 0)
        raise OSError(errno.EINVAL, f"region {index} cannot be read")

    def write(self, index: int, offset: int, data: bytes) -> None:
        """To a region."""
        match index:
            case PciRegion.BAR0:
                if offset % 4 == 0 and len(data) in (4, 8):
                    for at in range(0, len(data), 4):
                        self._set_register(offset + at, _WORD.unpack_from(data, at)[0])
            case PciRegion.BAR2:
                os.pwrite(self._card(), data, offset)
            case PciRegion.CONFIG:
                if self._config.write(offset, data):
                    self.reset()
                self._irqs.set_intx_disable(self._config.intx_disable)
            case _:
                raise OSError(errno.EINVAL, f"region {index} cannot be written")

    def _card(self) -> int:
        if self._memory is None:
            raise OSError(errno.ENODEV, "the device is not open")
        return self._memory.number

    def doorbells(self) -> Sequence[Doorbell]:
        """What interrupts by source 0, when it was made so."""
        return [Doorbell(PciRegion.BAR0, IRQ_RAISE, _WORD.pack(1))] if self._doorbell else []

    def may_dma(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """Only the engine does DMA, at once when it is started."""
        return write and index == PciRegion.BAR0 and offset <= DMA_COMMAND < offset + length

    # --- registers --------------------------------------------------------------------------------------

    def _register(self, at: int) -> int:
        if self._msix and MSIX_TABLE <= at < MSIX_TABLE + 16 * self._msix:
            return 0xFFFF_FFFF  # vfio_pci_bar_rw: the table is the host's
        if self._msix and MSIX_PBA <= at < MSIX_PBA + 8 * -(-self._msix // 64):
            pending = sum(1 << vector for vector in self._irqs.pending)
            return pending >> 8 * (at - MSIX_PBA) & 0xFFFF_FFFF
        if at == ACCESSES:
            return self._accesses & 0xFFFF_FFFF
        self._accesses += 1
        match at:
            case 0x00:
                return DEVICE_ID << 16 | MAP_VERSION
            case 0x04:
                return self._registers.get(SCRATCH, 0) ^ 0xFFFF_FFFF
            case 0x08:
                return math.isqrt(self._registers.get(ROOT, 0))
            case 0x10:
                return self._status
        return self._registers.get(at, 0)

    def _set_register(self, at: int, value: int) -> None:
        if at >= MSIX_TABLE:
            return
        if at != ACCESSES:
            self._accesses += 1
        match at:
            case 0x04 | 0x08 | 0x20 | 0x24 | 0x28 | 0x2C:
                self._registers[at] = value
            case 0x14:
                self._raise(value)
            case 0x18:
                self._status &= ~value
                self._irqs.set_line(self._status != 0)
            case 0x1C:
                self._irqs.error()
            case 0x30:
                if value & START:
                    self._transfer(to_guest=bool(value & TO_GUEST))
                    if value & INTERRUPT:
                        self._raise(1 << DMA_SOURCE)

    def _raise(self, sources: int) -> None:
        self._status |= sources
        self._irqs.set_line(self._status != 0)
        vectors = self._msix if self._irqs.kind is PciIrq.MSIX else self._irqs.vectors
        if vectors and self._config.bus_master:
            for source in range(32):
                if sources >> source & 1:
                    self._irqs.message(source % vectors)

    # --- the DMA engine ----------------------------------------------------------------------------------

    def _transfer(self, *, to_guest: bool) -> None:
        """One transfer. Every value it works with was written by a stranger."""
        local, count = self._registers.get(DMA_LOCAL, 0), self._registers.get(DMA_COUNT, 0)
        address = self._registers.get(DMA_ADDRESS, 0) | self._registers.get(DMA_ADDRESS + 4, 0) << 32
        moved, fault, where = 0, 0, 0
        if not self._config.bus_master:
            fault = FAULT_BUS_MASTER
        elif count == 0 or local + count > self._size:
            fault = FAULT_LOCAL
        elif address + count > 1 << 64:
            fault = FAULT_ADDRESS
        while not fault and moved < count:
            size = min(count - moved, PAGE - (address + moved) % PAGE)
            try:
                if to_guest:
                    self._host.write_memory(address + moved, os.pread(self._card(), size, local + moved))
                else:
                    os.pwrite(self._card(), self._host.read_memory(address + moved, size), local + moved)
            except DmaFault as error:
                fault, where = FAULT_READONLY if error.readonly else FAULT_UNMAPPED, error.iova
                size = error.done if to_guest else 0
            moved += size
        self._registers[DMA_STATUS] = FAULT | fault << 8 if fault else DONE
        self._registers[DMA_MOVED] = moved
        self._registers[DMA_FAULT], self._registers[DMA_FAULT + 4] = where & 0xFFFF_FFFF, where >> 32


class Primer(Parent):
    """Makes primer devices. It needs nothing of the host."""

    TYPE: Final = MdevType(
        id="primer-pci",
        name="Primer",
        description="A small PCI device for learning and testing: registers, mappable memory, interrupts, DMA",
        device_api=DeviceApi.VFIO_PCI,
        max_instances=1024,
        parameters={
            "memory": f"bytes of BAR2's memory, a power of two, {MEMORY_MIN} to {MEMORY_MAX}; default 1048576",
            "vectors": "MSI vectors: 1, 2, 4, 8, 16 or 32; default 4",
            "msix-vectors": f"MSI-X vectors: 0 to {MSIX_MOST}, 0: no such capability; default 8",
            "msix-resizable": "whether MSI-X vectors can be added while others are in use; default false",
            "granted-vectors": "MSI and MSI-X vectors that can really be had, to try a short host; default: all",
            "doorbell": "whether IRQ_RAISE, written with 1, is a doorbell (an ioeventfd of hypervisors); default false",
            "hot-unplug": "false: refuses to be destroyed between mdev-start and mdev-shutdown; default true",
        },
    )

    name = "primer"
    types: Sequence[MdevType] = (TYPE,)

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._stays: set[str] = set()

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PrimerDevice:
        """Make one; EINVAL names the parameter that cannot be."""
        memory = _power_of_two("memory", parameters.get("memory", 1 << 20), MEMORY_MIN, MEMORY_MAX)
        vectors = _power_of_two("vectors", parameters.get("vectors", 4), 1, 32)
        msix = _number("msix-vectors", parameters.get("msix-vectors", 8), 0, MSIX_MOST)
        most = max(vectors, msix)
        granted = _number("granted-vectors", parameters.get("granted-vectors", most), 1, most)
        doorbell = _flag("doorbell", parameters.get("doorbell", False))
        resizable = _flag("msix-resizable", parameters.get("msix-resizable", False))
        hot_unplug = _flag("hot-unplug", parameters.get("hot-unplug", True))
        if not hot_unplug:
            self._stays.add(uuid)
        return PrimerDevice(
            host, memory=memory, vectors=vectors, granted=granted, msix=msix, resizable=resizable, doorbell=doorbell
        )

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Refused while the VM runs, for a device made so."""
        if uuid in self._stays & self._running and not forced:
            raise OSError(errno.EBUSY, "it was made with hot-unplug=false and its VM runs; mdev-shutdown first")
        self._stays.discard(uuid)
        self._running.discard(uuid)

    def start(self, vm: str, uuids: Sequence[str]) -> None:
        """Remember who runs."""
        self._running.update(uuids)

    def shutdown(self, vm: str, uuids: Sequence[str]) -> None:
        """Forget who ran."""
        self._running.difference_update(uuids)


def _number(name: str, value: object, least: int, most: int) -> int:
    # bool is an int to Python, and not to whoever wrote "msix-vectors": true.
    if type(value) is not int or not least <= value <= most:
        raise OSError(errno.EINVAL, f"'{name}' is a number from {least} to {most}, got {value!r}")
    return value


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise OSError(errno.EINVAL, f"'{name}' is true or false, got {value!r}")
    return value


def _power_of_two(name: str, value: object, least: int, most: int) -> int:
    # bool is an int to Python, and not to whoever wrote "vectors": true.
    if type(value) is not int or not least <= value <= most or value & (value - 1):
        raise OSError(errno.EINVAL, f"'{name}' is a power of two from {least} to {most}, got {value!r}")
    return value
