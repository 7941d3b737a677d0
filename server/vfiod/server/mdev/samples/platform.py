"""``platform``: a small platform device in Python, for people without such hardware, to read, and to copy.

It has two regions, one level and one edge interrupt (more, when asked for), and message interrupts: the extended IRQs
of an RFC that no kernel took, so that vfiod's side of them can be tried. What it has is found out, as with any platform
device: nothing stands at an index that is known beforehand.

Regions::

    0  registers  4 KiB   trapped: the registers below
    1  memory     64 KiB  a memfd: can be mapped. The size is the parameter "memory"

Interrupt indexes: first the level IRQs (AUTOMASKED, MASKABLE), then the edge IRQs, last the messages, with the type
capability "MSI". Interrupt n below is the n-th index, from 0.

Registers, little-endian. A read of any width gives the bytes that are there. Only aligned writes of 4 or 8 bytes are
taken (8: the lower register first), others are ignored. What is not named here reads as 0::

    0x00  ID            RO  0xf10d1001: device id, then the version of this map
    0x04  SCRATCH       RW  reads back with every bit inverted
    0x08  ACCESSES      RO  reads and writes of registers since reset, this one not counted
    0x0c  INTERRUPTS    RO  bits 0 to 15: level IRQs, bits 16 to 31: edge IRQs
    0x10  IRQ_RAISE     WO  write n: interrupt n happens; a level's line goes up and stays up, an edge comes once
    0x14  IRQ_ACK       WO  write n: the line of level interrupt n goes down
    0x18  MSI_RAISE     WO  write n: source n sends its message
    0x1c  MSI_SOURCES   RO  how many sources there are
    0x20  MSI_LOST      RO  messages that went nowhere: to no doorbell, or with data that nobody was given
    0x40  IRQ_LINES     RO  one bit for each level interrupt whose line is up, as many words as it takes
    0x400 MSI_SOURCE    RW  16 bytes for each source: address low, address high, data, unused

Messages. A source sends what it was programmed with, and nothing else: take as many vectors as wanted (SET_IRQS with
eventfds), read the messages back (IRQ_INFO), write them into MSI_SOURCE. The data says whose eventfd is signalled.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import Area, SetIrqs
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, MediatedDevice, Parent, RegionInfo, Saved
from vfiod.server.mdev.platform_irqs import PlatformIrqs
from vfiod.server.mdev.samples.memory import sealed_memory

__all__ = ["Platform", "PlatformDevice"]

IDENTITY: Final = 0xF10D_1001

REGISTERS: Final = 0
MEMORY: Final = 1

ID: Final = 0x00
SCRATCH: Final = 0x04
ACCESSES: Final = 0x08
INTERRUPTS: Final = 0x0C
IRQ_RAISE: Final = 0x10
IRQ_ACK: Final = 0x14
MSI_RAISE: Final = 0x18
MSI_SOURCES: Final = 0x1C
MSI_LOST: Final = 0x20
IRQ_LINES: Final = 0x40
MSI_SOURCE: Final = 0x400

REGISTERS_SIZE: Final = 4096
IRQS_MOST: Final = 256
SOURCES_MOST: Final = 128
"""Interrupts of each kind: what the register map has room for."""
MEMORY_MIN: Final = max(4096, mmap.PAGESIZE)
MEMORY_MAX: Final = 256 << 20
"""Bytes of the memory region: it must be a whole page to be mapped, and is vfiod's own memory."""

_WORD: Final = struct.Struct("<I")


class PlatformDevice(MediatedDevice):
    """One device.

    Args:
        host: the world.
        memory: bytes of the memory region; whole pages.
        level: level IRQs.
        edge: edge IRQs.
        sources: message sources; 0: it has no index for messages.
        granted: messages that can really be had; None: one for each source.

    """

    quick = True

    def __init__(
        self,
        host: Host,
        *,
        memory: int = 1 << 16,
        level: int = 1,
        edge: int = 1,
        sources: int = 8,
        granted: int | None = None,
    ) -> None:
        self._size = memory
        self._memory: FileDescriptor | None = None
        self._level, self._edge, self._sources = level, edge, sources
        self._irqs = PlatformIrqs(host, level=level, edge=edge, messages=sources, granted=granted)
        self._power_on()

    def _power_on(self) -> None:
        self._scratch = self._accesses = self._lost = 0
        self._programmed = [0] * (4 * self._sources)

    # --- its life -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Fresh memory for a new user: what the last one gave away must not reach this one."""
        self._power_on()
        self._memory = sealed_memory("vfiod-platform", self._size)

    def close(self) -> None:
        """Let everything of the user go."""
        self._irqs.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def reset(self) -> None:
        """Registers as after power-on, lines down. Memory and eventfds stay."""
        self._power_on()
        self._irqs.quiet()

    def save(self) -> Saved:
        """Registers and interrupts; the memory goes along as the file it is."""
        irqs = self._irqs.save()
        values = {
            "scratch": self._scratch,
            "accesses": self._accesses,
            "lost": self._lost,
            "programmed": self._programmed,
            "irqs": irqs.values,
        }
        return Saved(values, irqs.fds if self._memory is None else {"memory": self._memory, **irqs.fds})

    def restore(self, saved: Saved) -> None:
        """Be as saved."""
        values, fds = saved.values, dict(saved.fds)
        self._memory = fds.pop("memory", None)
        self._scratch, self._accesses, self._lost = values["scratch"], values["accesses"], values["lost"]
        self._programmed = list(values["programmed"])
        self._irqs.restore(Saved(values["irqs"], fds))

    # --- what it has ---------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        """Two regions, and an index for each interrupt."""
        return DeviceInfo(regions=2, irqs=self._irqs.count, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        """The registers are trapped, the memory can be mapped."""
        match index:
            case 0:
                return RegionInfo(REGISTERS_SIZE, readable=True, writable=True)
            case 1:
                return RegionInfo(self._size, readable=True, writable=True, areas=(Area(0, self._size),))
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def region_fd(self, index: int) -> int | None:
        """The memory."""
        return self._memory.number if index == MEMORY and self._memory is not None else None

    def irq_info(self, index: int) -> IrqInfo:
        """As vfio-platform."""
        return self._irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        """As vfio-platform."""
        return self._irqs.set_irqs(request)

    def attributes(self) -> Mapping[str, str]:
        """For ``query-mdev-types``."""
        return {"memory": str(self._size), "interrupts": f"{self._level} level, {self._edge} edge, {self._sources} msi"}

    # --- access ---------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, length: int) -> bytes:
        """From a region."""
        if index == MEMORY:
            return os.pread(self._file(), length, offset)
        first = offset & ~3
        words = [self._register(at) for at in range(first, offset + length, 4)]
        return struct.pack(f"<{len(words)}I", *words)[offset - first :][:length]

    def write(self, index: int, offset: int, data: bytes) -> None:
        """To a region."""
        if index == MEMORY:
            os.pwrite(self._file(), data, offset)
        elif offset % 4 == 0 and len(data) in (4, 8):
            for at in range(0, len(data), 4):
                self._set_register(offset + at, _WORD.unpack_from(data, at)[0])

    def _file(self) -> int:
        if self._memory is None:
            raise OSError(errno.ENODEV, "the device is not open")
        return self._memory.number

    # --- registers --------------------------------------------------------------------------------------

    def _register(self, at: int) -> int:
        if at == ACCESSES:
            return self._accesses & 0xFFFF_FFFF
        self._accesses += 1
        if MSI_SOURCE <= at < MSI_SOURCE + 16 * self._sources:
            return self._programmed[(at - MSI_SOURCE) // 4]
        if IRQ_LINES <= at < IRQ_LINES + IRQS_MOST // 8:
            first = (at - IRQ_LINES) * 8
            return sum(1 << n - first for n in range(first, min(first + 32, self._level)) if self._irqs.line(n))
        match at:
            case 0x00:
                return IDENTITY
            case 0x04:
                return self._scratch ^ 0xFFFF_FFFF
            case 0x0C:
                return self._level | self._edge << 16
            case 0x1C:
                return self._sources
            case 0x20:
                return self._lost & 0xFFFF_FFFF
        return 0

    def _set_register(self, at: int, value: int) -> None:
        if at != ACCESSES:
            self._accesses += 1
        if MSI_SOURCE <= at < MSI_SOURCE + 16 * self._sources:
            self._programmed[(at - MSI_SOURCE) // 4] = value
            return
        # Every value is a stranger's: a number of nothing does nothing.
        match at:
            case 0x04:
                self._scratch = value
            case 0x10 if value < self._level:
                self._irqs.set_line(value, True)
            case 0x10 if value < self._level + self._edge:
                self._irqs.pulse(value)
            case 0x14 if value < self._level:
                self._irqs.set_line(value, False)
            case 0x18 if value < self._sources:
                low, high, data = self._programmed[4 * value : 4 * value + 3]
                self._lost += not self._irqs.message(low | high << 32, data)


class Platform(Parent):
    """Makes platform devices. It needs nothing of the host."""

    TYPE: Final = MdevType(
        id="primer-platform",
        name="Platform primer",
        description="A small platform device: registers, mappable memory, level, edge and message interrupts",
        device_api=DeviceApi.VFIO_PLATFORM,
        max_instances=1024,
        parameters={
            "memory": f"bytes of the memory region, whole pages, {MEMORY_MIN} to {MEMORY_MAX}; default 65536",
            "level": f"level IRQs, 0 to {IRQS_MOST}; default 1",
            "edge": f"edge IRQs, 0 to {IRQS_MOST}; default 1",
            "messages": f"message sources (extended IRQs, experimental), 0 to {SOURCES_MOST}; default 8",
            "granted-messages": "messages that can really be had, to try a short host; default: all",
        },
    )

    name = "platform"
    types: Sequence[MdevType] = (TYPE,)

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PlatformDevice:
        """Make one; EINVAL names the parameter that cannot be."""
        memory = _number("memory", parameters.get("memory", 1 << 16), MEMORY_MIN, MEMORY_MAX)
        if memory % MEMORY_MIN:
            raise OSError(errno.EINVAL, f"'memory' is whole pages of {MEMORY_MIN} bytes, got {memory}")
        sources = _number("messages", parameters.get("messages", 8), 0, SOURCES_MOST)
        return PlatformDevice(
            host,
            memory=memory,
            level=_number("level", parameters.get("level", 1), 0, IRQS_MOST),
            edge=_number("edge", parameters.get("edge", 1), 0, IRQS_MOST),
            sources=sources,
            granted=_number("granted-messages", parameters.get("granted-messages", sources), 0, sources),
        )


def _number(name: str, value: object, least: int, most: int) -> int:
    # bool is an int to Python, and not to whoever wrote "level": true.
    if type(value) is not int or not least <= value <= most:
        raise OSError(errno.EINVAL, f"'{name}' is a number from {least} to {most}, got {value!r}")
    return value
