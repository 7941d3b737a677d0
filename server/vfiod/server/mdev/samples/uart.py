"""A 16550A UART: eight registers, two FIFOs of 16 bytes, one interrupt. It opens nothing and knows no clock.

Sources: National Semiconductor PC16550D data sheet, chapter 8 (registers, FIFO and interrupt operation), whose names
are used; ``<linux/serial_reg.h>`` has the same ones.

::

    offset  DLAB=0 read   DLAB=0 write  DLAB=1
    0       RBR           THR           DLL
    1       IER           IER           DLM
    2       IIR           FCR           IIR, FCR
    3       LCR           LCR           4  MCR    5  LSR    6  MSR    7  SCR

There is no clock, so no line speed: what the other end sends is in the receiver at once, and what the guest sends is
gone as soon as :meth:`Uart.sent` says so. Four character times pass between any two accesses: data below the trigger
level is reported as a character time-out.

The world outside (a pty, a socket) asks :attr:`Uart.room` before it gives data, and takes :attr:`Uart.outgoing`; a peer
that does not read leaves the transmitter full, and the guest waits for THRE. That is all the flow control there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["FIFO_SIZE", "Uart"]

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

IER_RDA, IER_THRE, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RDA, IIR_LINE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS: Final = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER, FCR_CLEAR_TRANSMITTER = 0x01, 0x02, 0x04
LCR_DLAB: Final = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
LSR_ERRORS: Final = 0x1E
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_DELTAS: Final = 0x0F
TRIGGERS: Final = (1, 4, 8, 14)

FIFO_SIZE: Final = 16
"""Bytes of each FIFO; one, the holding register, while FIFOs are off."""


class Uart:
    """One port, as after power-on.

    Attributes:
        lost: bytes the guest wrote into a full transmitter.

    """

    def __init__(self) -> None:
        self._connected = False
        self.reset()

    def reset(self) -> None:
        """Master reset (data sheet, table III). Who is connected stays so; what waited to be sent is dropped."""
        self._ier = self._lcr = self._mcr = self._scratch = 0
        self._fifos = False
        self._trigger = 1
        self._errors = 0
        self._deltas = 0
        self._divisor = 12  # 9,600 baud of 1.8432 MHz: the sheet leaves it undefined
        self._thre_pending = False
        self._received = bytearray()
        self._outgoing = bytearray()
        self._modem = self._modem_inputs()
        self.lost = 0

    def save(self) -> dict[str, Any]:
        """Registers, both FIFOs, what is pending, and who is at the other end."""
        return {
            "connected": self._connected,
            "ier": self._ier,
            "lcr": self._lcr,
            "mcr": self._mcr,
            "scratch": self._scratch,
            "fifos": self._fifos,
            "trigger": self._trigger,
            "errors": self._errors,
            "deltas": self._deltas,
            "modem": self._modem,
            "divisor": self._divisor,
            "thre_pending": self._thre_pending,
            "received": self._received.hex(),
            "outgoing": self._outgoing.hex(),
            "lost": self.lost,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Be as saved."""
        self._connected = saved["connected"]
        self._ier, self._lcr, self._mcr = saved["ier"], saved["lcr"], saved["mcr"]
        self._scratch, self._fifos, self._trigger = saved["scratch"], saved["fifos"], saved["trigger"]
        self._errors, self._deltas, self._modem = saved["errors"], saved["deltas"], saved["modem"]
        self._divisor, self._thre_pending = saved["divisor"], saved["thre_pending"]
        self._received = bytearray.fromhex(saved["received"])
        self._outgoing = bytearray.fromhex(saved["outgoing"])
        self.lost = saved["lost"]

    # --- the outside ------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Bytes each direction holds now: 16, or 1 while FIFOs are off."""
        return FIFO_SIZE if self._fifos else 1

    @property
    def room(self) -> int:
        """Bytes the receiver can take now. In loopback mode the line is disconnected: none."""
        return 0 if self._mcr & MCR_LOOP else self.capacity - len(self._received)

    def receive(self, data: bytes) -> None:
        """Bytes arrive from the line. More than :attr:`room` is an overrun, as a line without flow control has it."""
        if not self._mcr & MCR_LOOP:
            for value in data:
                self._shift_in(value)

    @property
    def outgoing(self) -> bytes:
        """What the guest has sent, and the line has not taken yet."""
        return bytes(self._outgoing)

    def sent(self, count: int) -> None:
        """The line took so many bytes of :attr:`outgoing`."""
        if count > 0 and self._outgoing:
            del self._outgoing[:count]
            if not self._outgoing:
                self._thre_pending = True

    def connect(self, connected: bool) -> None:
        """Somebody is at the other end, or nobody any more: CTS, DSR and DCD."""
        self._connected = connected
        self._update_modem()

    @property
    def interrupt(self) -> bool:
        """The level of the interrupt line."""
        return self._source() != IIR_NONE

    @property
    def divisor(self) -> int:
        """DLM and DLL: 115,200 through it is the speed that the guest believes in."""
        return self._divisor

    # --- registers --------------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """Read a register, 0 to 7. What it says may change by being read."""
        dlab = self._lcr & LCR_DLAB
        match offset:
            case 0:
                return self._divisor & 0xFF if dlab else self._take()
            case 1:
                return self._divisor >> 8 if dlab else self._ier
            case 2:
                return self._identify()
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 5:
                return self._line_status()
            case 6:
                value, self._deltas = self._modem | self._deltas, 0
                return value
        return self._scratch

    def write(self, offset: int, value: int) -> None:
        """Write a register, 0 to 7, with 8 bits. LSR and MSR take nothing."""
        dlab = self._lcr & LCR_DLAB
        match offset:
            case 0 if dlab:
                self._divisor = self._divisor & 0xFF00 | value
            case 0:
                self._send(value)
            case 1 if dlab:
                self._divisor = self._divisor & 0x00FF | value << 8
            case 1:
                # Enabled while the transmitter is empty, it fires at once (8.6.5): drivers begin to send that way.
                if value & ~self._ier & IER_THRE and not self._outgoing:
                    self._thre_pending = True
                self._ier = value & 0x0F
            case 2:
                self._control_fifos(value)
            case 3:
                self._lcr = value
            case 4:
                self._mcr = value & 0x1F
                self._update_modem()
            case 7:
                self._scratch = value

    # --- receiver and transmitter -----------------------------------------------------------------------

    def _take(self) -> int:
        return self._received.pop(0) if self._received else 0

    def _shift_in(self, value: int) -> None:
        if len(self._received) < self.capacity:
            self._received.append(value)
            return
        # 8.6.3: with FIFOs the one that came is lost, without it overwrites the one that was there.
        self._errors |= LSR_OE
        if not self._fifos:
            self._received[0] = value

    def _send(self, value: int) -> None:
        self._thre_pending = False
        if self._mcr & MCR_LOOP:
            self._shift_in(value)
            self._thre_pending = True
        elif len(self._outgoing) < self.capacity:
            self._outgoing.append(value)
        else:
            self.lost += 1

    def _control_fifos(self, value: int) -> None:
        enable = bool(value & FCR_ENABLE)
        if value & FCR_CLEAR_RECEIVER or enable != self._fifos:
            self._received.clear()
        if (value & FCR_CLEAR_TRANSMITTER or enable != self._fifos) and self._outgoing:
            self._outgoing.clear()
            self._thre_pending = True
        self._fifos = enable
        self._trigger = TRIGGERS[value >> 6] if enable else 1

    def _line_status(self) -> int:
        empty = LSR_THRE | LSR_TEMT if not self._outgoing else 0
        value = self._errors | empty | (LSR_DR if self._received else 0)
        self._errors = 0
        return value

    # --- modem lines ------------------------------------------------------------------------------------

    def _modem_inputs(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD if self._connected else 0
        # 8.7: the outputs come back as inputs.
        pairs = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(shown for output, shown in pairs if self._mcr & output)

    def _update_modem(self) -> None:
        before, now = self._modem, self._modem_inputs()
        changed = before ^ now
        # The indicator of RI tells only of its end (trailing edge).
        self._deltas |= (changed & ~MSR_RI | changed & before & MSR_RI) >> 4
        self._modem = now

    # --- interrupts -------------------------------------------------------------------------------------

    def _source(self) -> int:
        """What IIR names, the most urgent first (table V)."""
        waiting = len(self._received)
        if self._ier & IER_LINE and self._errors & LSR_ERRORS:
            return IIR_LINE
        if self._ier & IER_RDA and waiting >= self._trigger:
            return IIR_RDA
        if self._ier & IER_RDA and waiting:
            return IIR_TIMEOUT
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MODEM and self._deltas & MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _identify(self) -> int:
        source = self._source()
        if source == IIR_THRE:
            self._thre_pending = False  # reading IIR acknowledges it, when it is the one that is told
        return source | (IIR_FIFOS if self._fifos else 0)
