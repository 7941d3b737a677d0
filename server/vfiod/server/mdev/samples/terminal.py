"""``terminal3270``: a 3270-like display behind a subchannel: what is written to it flows to a pty or socket.

Commands (IBM 3274, local non-SNA; GA23-0059)::

    01  WRITE         05  ERASE/WRITE      0D  ERASE/WRITE ALTERNATE    11  WRITE STRUCTURED FIELD
    0F  ERASE ALL UNPROTECTED              02  READ BUFFER              06  READ MODIFIED
    03  NOP           04  SENSE            E4  SENSE ID (3270/00, 3278/02)

On the line go records, as TN3270 has them after its negotiation (RFC 1576): bytes, FF doubled, then FF EF. To the line:
the command code and its data stream. From the line: what the operator entered, beginning with the AID; it raises an
attention interrupt, and the next READ MODIFIED takes it. Without any, that gives the AID and the cursor's address.
READ BUFFER gives the whole screen (:mod:`~vfiod.server.mdev.samples.screen`), and takes nothing.
A socket to which nobody is connected is a terminal that is switched off: intervention required.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.channel import Crw, CrwErc, CrwRsc, Dstat, SenseByte0, SenseId
from vfiod.server.mdev.channel import Transfer, Unit, UnitCheck
from vfiod.server.mdev.channel_device import ChannelDevice
from vfiod.server.mdev.parent import Host, MdevType, MediatedDevice, Parent, Saved
from vfiod.server.mdev.samples.fba import device_number
from vfiod.server.mdev.samples.kept import joined, part_of
from vfiod.server.mdev.samples.line import Line, open_line, take_line
from vfiod.server.mdev.samples.screen import BadStream, Screen

__all__ = ["Terminal", "TerminalDevice"]

IAC: Final = 0xFF
EOR: Final = 0xEF
_END: Final = bytes([IAC, EOR])

WRITES: Final = frozenset({0x01, 0x05, 0x0D, 0x11})
ERASE_UNPROTECTED: Final = 0x0F
READ_BUFFER, READ_MODIFIED, WRITE_STRUCTURED = 0x02, 0x06, 0x11

MAX_RECORD: Final = 16_384
"""Bytes of one record: several times a large screen (62 x 160) with attributes and orders. A longer one is dropped."""

MAX_INPUT: Final = 16
"""Records that wait to be read: an operator's keyboard locks after the first; a program at the line may not."""

MAX_OUTPUT: Final = 4 * MAX_RECORD
"""Bytes that wait for the line: beyond it the terminal is busy with what it has, and the program gets a unit check."""

CHPID: Final = 0x70

COMMAND_REJECT: Final = bytes([SenseByte0.COMMAND_REJECT])
INTERVENTION_REQUIRED: Final = bytes([SenseByte0.INTERVENTION_REQUIRED])
OVERRUN: Final = bytes([SenseByte0.OVERRUN])
OPERATION_CHECK: Final = bytes([SenseByte0.DEVICE_DEPENDENT_7])
"""A data stream that makes no sense; what this bit means is the 3270's own."""


class Records:
    """Bytes from the line, cut into records. Sans-I/O."""

    def __init__(self) -> None:
        self._record = bytearray()
        self._escaped = False
        self._too_long = False

    def feed(self, data: bytes) -> list[bytes]:
        """The records that are complete now; empty ones and those that were too long are left out."""
        found: list[bytes] = []
        for value in data:
            if not self._escaped and value == IAC:
                self._escaped = True
                continue
            if self._escaped and value != IAC:
                self._escaped = False
                if value == EOR:
                    if self._record and not self._too_long:
                        found.append(bytes(self._record))
                    self._record.clear()
                    self._too_long = False
                continue  # another telnet command: not ours
            self._escaped = False
            if len(self._record) < MAX_RECORD:
                self._record.append(value)
            else:
                self._too_long = True
        return found

    def save(self) -> dict[str, Any]:
        """The record that has begun."""
        return {"record": self._record.hex(), "escaped": self._escaped, "too_long": self._too_long}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Be as saved."""
        self._record = bytearray.fromhex(saved["record"])
        self._escaped, self._too_long = saved["escaped"], saved["too_long"]


def record(data: bytes) -> bytes:
    """One record as it goes over the line."""
    return data.replace(b"\xff", b"\xff\xff") + _END


class _Screen(Unit):
    """The terminal, as its channel sees it. Shared with the loop's thread, where the line is."""

    sense_id = SenseId(0x3270, 0x00, 0x3278, 0x02)

    def __init__(self, device: TerminalDevice) -> None:
        self._device = device
        self.lock = threading.RLock()  # held at every access to the line, which may find that it was lost
        self.input: deque[bytes] = deque(maxlen=MAX_INPUT)
        self.output = bytearray()
        self.screen = Screen()

    def execute(self, command: int, transfer: Transfer) -> Dstat:
        """See the module."""
        if not self._device.switched_on:
            raise UnitCheck(INTERVENTION_REQUIRED)
        if command in WRITES:
            self._write(command, transfer.take(MAX_RECORD))
            transfer.short = False  # it takes what there is
        elif command == ERASE_UNPROTECTED:
            self._write(command, b"")
        elif command == READ_BUFFER:
            with self.lock:
                data = self.screen.contents()
            transfer.give(data)
        elif command == READ_MODIFIED:
            with self.lock:
                data = self.input.popleft() if self.input else self.screen.contents()[:3]
            transfer.give(data)
        else:
            raise UnitCheck(COMMAND_REJECT)
        return Dstat(0)

    def _write(self, command: int, data: bytes) -> None:
        self._send(bytes([command]) + data)
        if command == WRITE_STRUCTURED:
            return  # nothing of it is on this screen
        with self.lock:
            try:
                self.screen.write(command, data)
            except BadStream:
                raise UnitCheck(OPERATION_CHECK) from None

    def _send(self, data: bytes) -> None:
        with self.lock:
            if len(self.output) + len(data) > MAX_OUTPUT:
                raise UnitCheck(OVERRUN)
            self.output += record(data)
        self._device.pump()


class TerminalDevice(ChannelDevice):
    """The terminal behind its subchannel.

    Args:
        host: the world.
        where: where its line leads (:mod:`~vfiod.server.mdev.samples.line`).
        number: device number.
        saved: what another process's terminal was like: this one goes on as it, and opens nothing. Its fds are taken
            over.

    """

    def __init__(self, host: Host, where: object, number: int, saved: Saved | None = None) -> None:
        self._screen = _Screen(self)
        self._records = Records()
        super().__init__(host, self._screen, number=number, chpid=CHPID)
        self.line: Line
        if saved is None:
            self.line = open_line("line", where, host, self._ready, self._carrier)
        else:
            self.restore(saved)
            self.line = take_line(part_of(saved, "line"), host, self._ready, self._carrier)
        self.line.want(readable=True, writable=bool(self._screen.output))

    def save(self) -> Saved:
        """The subchannel, the screen, and what waits in both directions; the line goes along as the files it is."""
        screen = self._screen
        with screen.lock:
            subchannel = super().save()
            line = joined({"line": self.line.save()})
            values = {
                "records": self._records.save(),
                "input": [one.hex() for one in screen.input],
                "output": screen.output.hex(),
                "screen": screen.screen.save(),
            }
        return Saved({**subchannel.values, **line.values, **values}, {**subchannel.fds, **line.fds})

    def restore(self, saved: Saved) -> None:
        """Be as saved, but for the line."""
        screen, values = self._screen, saved.values
        with screen.lock:
            super().restore(saved)
            self._records.restore(values["records"])
            screen.input.extend(bytes.fromhex(one) for one in values["input"])
            screen.output += bytes.fromhex(values["output"])
            screen.screen.restore(values["screen"])

    @property
    def switched_on(self) -> bool:
        """Whether somebody is at the line."""
        return self.line.connected

    def pump(self) -> None:
        """Send what waits, as far as the line takes it. From any thread; never waits."""
        screen = self._screen
        with screen.lock:
            while screen.output and (taken := self.line.write(bytes(screen.output))):
                del screen.output[:taken]
            self.line.want(readable=True, writable=bool(screen.output))

    def _ready(self) -> None:
        """On the loop: the line can be read or written."""
        with self._screen.lock:
            records = self._records.feed(self.line.read(MAX_RECORD))
            self._screen.input.extend(records)
            for one in records:
                self._screen.screen.entered(one)
        if records:
            self.attention()
        self.pump()

    def _carrier(self, there: bool) -> None:
        """Somebody came or went; on the loop, or where a write found it. To the guest its channel path did."""
        if there:
            self.line.want(readable=True, writable=False)
        else:
            self._records = Records()
            with self._screen.lock:
                self._screen.output.clear()
        event = CrwErc.INITIALIZED if there else CrwErc.PERMANENT_ERROR_NOT_INITIALIZED
        self.report(Crw(CrwRsc.CHANNEL_PATH, event, CHPID))

    def unplug(self) -> None:
        """It is destroyed: the line goes."""
        with self._screen.lock:
            self.line.close()

    def attributes(self) -> Mapping[str, str]:
        """Where the line leads."""
        return {"line": self.line.path, "connected": str(self.switched_on).lower()}


class Terminal(Parent):
    """Makes one terminal."""

    TYPE: Final = MdevType(
        id="terminal3270-ccw",
        name="3270 terminal",
        description="A 3270-like display behind a subchannel, whose data streams flow through a pty or a Unix socket",
        device_api=DeviceApi.VFIO_CCW,
        max_instances=1,
        parameters={
            "line": 'where it leads: "pty" (the default), "pty:LINK" or "socket:PATH"',
            "device-number": "of the subchannel's device, 0 to 65535; default 0",
        },
    )

    name = "terminal3270"
    types: Sequence[MdevType] = (TYPE,)

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> TerminalDevice:
        """Make it; its line is there from now on."""
        return TerminalDevice(host, parameters.get("line", "pty"), device_number(parameters))

    def restore(
        self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any], saved: Saved
    ) -> TerminalDevice:
        """Make it around the line that is there."""
        return TerminalDevice(host, parameters.get("line", "pty"), device_number(parameters), saved)

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Always agrees."""
        if isinstance(device, TerminalDevice):
            device.unplug()
