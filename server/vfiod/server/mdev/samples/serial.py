"""``serial``: a PCI serial card with one or two 16550A ports, whose data flows through ptys or Unix sockets.

It has the identity of the kernel's sample driver mtty (``samples/vfio-mdev/mtty.c``): 4348:3253, class 0x070002, a
card with ports of 8 bytes of I/O space each, which a guest's own ``8250_pci`` knows (WCH CH352). Unlike mtty's, its
INTx is a level, as PCI has it, and its data goes somewhere.

Regions::

    0  BAR0    8 bytes of I/O: the first port (:mod:`~vfiod.server.mdev.samples.uart`)
    1  BAR1    8 bytes of I/O: the second one; size 0 on a card with one
    7  config  256 bytes, conventional PCI, no capabilities
       BAR2 to BAR5, ROM: size 0. VGA: EINVAL

Interrupts: INTx, while any port has one, and REQ. Parameters: ``port0``, ``port1``: where each port leads
(:mod:`~vfiod.server.mdev.samples.line`); the attributes of the same names say where that is.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.vfio import VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, PciRegion, SetIrqs
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, MediatedDevice, Parent, RegionInfo, Saved
from vfiod.server.mdev.pci_irqs import PciIrqs
from vfiod.server.mdev.samples.kept import joined, part_of
from vfiod.server.mdev.samples.line import Line, open_line, take_line
from vfiod.server.mdev.samples.uart import Uart

__all__ = ["Serial", "SerialDevice"]

VENDOR_ID: Final = 0x4348
DEVICE_ID: Final = 0x3253
BAR_SIZE: Final = 8
CONFIG_SIZE: Final = 256
CLOCK: Final = 115_200
"""Baud of divisor 1."""
MAX_PORTS: Final = 24
"""Of all cards together, as mtty has it: each port is a pseudo-terminal of the host."""

COMMAND: Final = 0x04
STATUS: Final = 0x06
BAR0: Final = 0x10
COMMAND_WRITABLE: Final = 0x0541  # I/O space, parity, SERR#, INTx disable
COMMAND_INTX_DISABLE: Final = 0x0400
STATUS_INTERRUPT: Final = 0x08


class _Config:
    """Configuration space: PCI Local Bus Specification 3.0, section 6.1. Offsets and lengths within it."""

    def __init__(self, ports: int) -> None:
        self._power_on = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        struct.pack_into("<HHHHBBBB", self._power_on, 0, VENDOR_ID, DEVICE_ID, 1, 0x0200, 0x10, 0x02, 0x00, 0x07)
        struct.pack_into("<HH", self._power_on, 0x2C, VENDOR_ID, DEVICE_ID)
        struct.pack_into("<BB", self._power_on, 0x3C, 0xFF, 1)  # INTA#
        struct.pack_into("<H", self._writable, COMMAND, COMMAND_WRITABLE)
        self._writable[0x3C] = 0xFF
        for port in range(ports):
            self._power_on[BAR0 + 4 * port] = 1  # I/O space
            struct.pack_into("<I", self._writable, BAR0 + 4 * port, -BAR_SIZE & 0xFFFF_FFFF)
        self.reset()

    def reset(self) -> None:
        self._bytes = bytearray(self._power_on)

    def save(self) -> str:
        return self._bytes.hex()

    def restore(self, saved: str) -> None:
        self._bytes = bytearray.fromhex(saved)

    @property
    def intx_disable(self) -> bool:
        return bool(self._bytes[COMMAND + 1] & COMMAND_INTX_DISABLE >> 8)

    def read(self, offset: int, length: int, *, interrupt: bool) -> bytes:
        self._bytes[STATUS] = STATUS_INTERRUPT * interrupt
        return bytes(self._bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | value & mask


class _Port:
    """A UART and its line. What one has for the other goes over at once, as far as there is room.

    What comes is read when the loop says that there is some, never at a register access: a guest that polls LSR would
    cost a system call each time.
    """

    def __init__(self, card: SerialDevice, host: Host, name: str, where: object, saved: Saved | None) -> None:
        self.uart = Uart()
        self._card = card
        self.line: Line
        if saved is None:
            self.line = open_line(name, where, host, self._arrived, self._carrier)
            self.uart.connect(self.line.connected)
        else:
            self.uart.restore(saved.values["uart"])
            self.line = take_line(Saved(saved.values["line"], saved.fds), host, self._arrived, self._carrier)
            self.listen()

    def save(self) -> Saved:
        line = self.line.save()
        return Saved({"uart": self.uart.save(), "line": line.values}, line.fds)

    def _carrier(self, there: bool) -> None:
        with self._card.lock:
            self.uart.connect(there)
            self._card.pump()

    def _arrived(self) -> None:
        with self._card.lock:
            if self.uart.room and self._card.running:
                self.uart.receive(self.line.read(self.uart.room))
            self._card.pump()

    def pump(self) -> None:
        uart, line, running = self.uart, self.line, self._card.running
        while running and uart.outgoing and (taken := line.write(uart.outgoing)):
            uart.sent(taken)
        self.listen()

    def listen(self) -> None:
        uart, running = self.uart, self._card.running
        self.line.want(readable=running and uart.room > 0, writable=running and bool(uart.outgoing))


class SerialDevice(MediatedDevice):
    """One card.

    Args:
        host: the world.
        where: where each port leads: one or two.
        saved: what another process's card was like: this one goes on as it, and opens nothing. Its fds are taken over.

    Attributes:
        lock: held at every access: registers belong to the user's thread, lines to the loop's.
        running: a user has it open. Else nothing is read from the lines: it waits there for him.

    """

    quick = True

    def __init__(self, host: Host, where: Sequence[object], saved: Saved | None = None) -> None:
        self.lock = threading.RLock()
        self.running = False if saved is None else saved.values["running"]
        self._irqs = PciIrqs(host, intx=True)
        self._config = _Config(len(where))
        self._ports: list[_Port] = []
        # Whatever calls back on another thread meanwhile waits until it is whole.
        try:
            with self.lock:
                for number, one in enumerate(where):
                    kept = None if saved is None else part_of(saved, f"port{number}")
                    self._ports.append(_Port(self, host, f"port{number}", one, kept))
                if saved is not None:
                    self._config.restore(saved.values["config"])
                    self._irqs.restore(part_of(saved, "irqs"))
        except BaseException:
            self.unplug()
            raise

    # --- its life -----------------------------------------------------------------------------------

    def open(self) -> None:
        """As after power-on. What came over the lines until now is still there."""
        with self.lock:
            self.running = True
            self.reset()

    def close(self) -> None:
        """The user is gone; the lines stay."""
        with self.lock:
            self.running = False
            self._irqs.close()
            self.pump()

    def reset(self) -> None:
        """Both ports and configuration space. The eventfds and the lines stay."""
        with self.lock:
            self._config.reset()
            for port in self._ports:
                port.uart.reset()
            self._irqs.set_intx_disable(False)
            self.pump()

    def unplug(self) -> None:
        """It is destroyed: the lines go."""
        with self.lock:
            self.running = False
            for port in self._ports:
                port.line.close()

    def request(self, count: int) -> None:
        """Ask the user by the REQ interrupt."""
        self._irqs.request()

    def save(self) -> Saved:
        """Registers, what is in the FIFOs, interrupts; the lines go along as the files they are."""
        with self.lock:
            parts = {"irqs": self._irqs.save()}
            parts |= {f"port{number}": port.save() for number, port in enumerate(self._ports)}
            whole = joined(parts)
            return Saved({"running": self.running, "config": self._config.save(), **whole.values}, whole.fds)

    def pump(self) -> None:
        """Send what can be sent, and let the interrupt line follow. On any thread; never waits."""
        with self.lock:
            for port in self._ports:
                port.pump()
            self._irqs.set_line(self._interrupt)

    @property
    def _interrupt(self) -> bool:
        return any(port.uart.interrupt for port in self._ports)

    # --- what it has ---------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        """As vfio-pci."""
        return DeviceInfo(regions=VFIO_PCI_NUM_REGIONS, irqs=VFIO_PCI_NUM_IRQS, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        """As vfio-pci: I/O space cannot be mapped."""
        if index == PciRegion.CONFIG:
            return RegionInfo(CONFIG_SIZE, readable=True, writable=True)
        if 0 <= index < len(self._ports):
            return RegionInfo(BAR_SIZE, readable=True, writable=True)
        if 0 <= index <= PciRegion.ROM:
            return RegionInfo()
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def irq_info(self, index: int) -> IrqInfo:
        """As vfio-pci."""
        return self._irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        """As vfio-pci."""
        return self._irqs.set_irqs(request)

    def attributes(self) -> Mapping[str, str]:
        """Where each port leads, and how fast the guest thinks it is."""
        told = {}
        for number, port in enumerate(self._ports):
            told[f"port{number}"] = port.line.path
            told[f"port{number}-baud"] = str(CLOCK // port.uart.divisor) if port.uart.divisor else "0"
        return told

    def fds(self) -> Mapping[str, int]:
        """The eventfds; the lines' own are watched."""
        return self._irqs.fds()

    def may_dma(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """A serial card does none."""
        return False

    # --- access ---------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, length: int) -> bytes:
        """From a region. A wide access to a port is several narrow ones, lowest first, as on an 8-bit card."""
        with self.lock:
            if index == PciRegion.CONFIG:
                return self._config.read(offset, length, interrupt=self._interrupt)
            uart = self._ports[index].uart
            data = bytes(uart.read(at) for at in range(offset, offset + length))
            self.pump()
        return data

    def write(self, index: int, offset: int, data: bytes) -> None:
        """To a region."""
        with self.lock:
            if index == PciRegion.CONFIG:
                self._config.write(offset, data)
                self._irqs.set_intx_disable(self._config.intx_disable)
                return
            for at, value in enumerate(data, offset):
                self._ports[index].uart.write(at, value)
            self.pump()


class Serial(Parent):
    """Makes serial cards."""

    name = "serial"
    types: Sequence[MdevType] = tuple(
        MdevType(
            id=f"serial-{ports}",
            name=f"{words} port serial",
            description=f"A PCI card with {ports} 16550A port{'s' * (ports > 1)}, each on a pty or a Unix socket",
            device_api=DeviceApi.VFIO_PCI,
            max_instances=MAX_PORTS // ports,
            parameters={
                f"port{number}": 'where it leads: "pty" (the default), "pty:LINK" or "socket:PATH"'
                for number in range(ports)
            },
        )
        for ports, words in ((1, "Single"), (2, "Dual"))
    )

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> SerialDevice:
        """Make one; its lines are there from now on."""
        device = SerialDevice(host, [parameters.get(name, "pty") for name in mdev_type.parameters])
        self._used[uuid] = len(mdev_type.parameters)
        return device

    def restore(
        self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any], saved: Saved
    ) -> SerialDevice:
        """Make one around the lines that are there."""
        device = SerialDevice(host, [parameters.get(name, "pty") for name in mdev_type.parameters], saved)
        self._used[uuid] = len(mdev_type.parameters)
        return device

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Always agrees."""
        self._used.pop(uuid, None)
        if isinstance(device, SerialDevice):
            device.unplug()

    def available_instances(self, mdev_type: MdevType) -> int:
        """The types share the ports."""
        return (MAX_PORTS - sum(self._used.values())) // len(mdev_type.parameters)

    def attributes(self) -> Mapping[str, str]:
        """How many ports are left."""
        return {"ports": str(MAX_PORTS), "ports-available": str(MAX_PORTS - sum(self._used.values()))}
