"""Running a channel program in Python: what the channel subsystem does between START SUBCHANNEL and the interrupt.

A :class:`ChannelProgramRun` fetches CCWs from guest memory and asks a :class:`Unit`, the device, to execute commands.
Everything it fetches comes from an enemy: addresses, counts, chains and lists are checked, and what is wrong is
answered as the machine answers it: program check, protection check, incorrect length. A chain ends after
:data:`~vfiod.protocol.limits.MAX_CHANNEL_COMMANDS` CCWs.

Source: Principles of Operation (SA22-7832), chapter 15, "Execution of I/O Operations".
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, cast

from vfiod.protocol.channel import (
    Actl,
    BadChannelStructure,
    Ccw,
    CcwFlags,
    Command,
    Cstat,
    Dstat,
    Erw,
    ErwFlags,
    Esw,
    Fctl,
    Irb,
    Orb,
    OrbFlags,
    Scsw,
    ScswFlags,
    SenseId,
    Stctl,
)
from vfiod.protocol.channel.ccw import CCW_SIZE, LIMIT_24, LIMIT_31, is_tic, segments
from vfiod.protocol.limits import MAX_CHANNEL_COMMANDS
from vfiod.server.mdev.parent import DmaFault, Host

__all__ = ["ChannelProgramRun", "Transfer", "Unit", "UnitCheck", "flags_of"]

NORMAL: Final = Dstat.CHANNEL_END | Dstat.DEVICE_END
_ENDED: Final = Stctl.PRIMARY | Stctl.SECONDARY
# Asked as integers: a flag's own operators, and even finding a flag, take Python 3.11 longer than all the rest.
_SUSPEND: Final = int(CcwFlags.SUSPEND)
_CHAIN_COMMAND: Final = int(CcwFlags.CHAIN_COMMAND)
_CHAIN_DATA: Final = int(CcwFlags.CHAIN_DATA)
_INTERRUPT: Final = int(CcwFlags.INTERRUPT)
_MODIFIED_INDIRECT: Final = int(CcwFlags.MODIFIED_INDIRECT)
_SUPPRESS_LENGTH: Final = int(CcwFlags.SUPPRESS_LENGTH)
_ILS: Final = int(OrbFlags.ILS)
_UNIT_CHECK: Final = int(Dstat.UNIT_CHECK)
_UNUSUAL: Final = int(Dstat.UNIT_CHECK | Dstat.UNIT_EXCEPTION)
_MODIFIER: Final = int(Dstat.STATUS_MODIFIER)
_PCI: Final = int(Cstat.PROGRAM_CONTROLLED_INTERRUPTION)
_PENDING: Final = int(Stctl.STATUS_PENDING)
_NO_CSTAT: Final = Cstat(0)
_status: Final = functools.lru_cache(32)(Stctl)

_ALWAYS_PROMPT: Final = frozenset({Command.NOP, Command.SENSE, Command.SENSE_ID})

MAX_PROMPT_COMMANDS: Final = 32
"""Commands of one program that are executed on the event loop: some 10 us each. A loop of NOPs goes on in a thread."""

LPUM: Final = 0x80
"""The only path: the first."""


class UnitCheck(Exception):
    """The device refuses a command, or failed: raised by a :class:`Unit`; ``sense`` says why, byte 0 first."""

    def __init__(self, sense: bytes) -> None:
        super().__init__(sense.hex())
        self.sense = sense


class Unit(ABC):
    """A device, as its channel sees it. Called in the thread that runs the program; it may wait for its own files."""

    @property
    @abstractmethod
    def sense_id(self) -> SenseId:
        """What it is. Constant."""

    @abstractmethod
    def execute(self, command: int, transfer: Transfer) -> Dstat:
        """Execute a command other than NOP, SENSE, SENSE ID and TIC.

        Args:
            command: its code.
            transfer: where data comes from and goes to.

        Returns what to add to channel end and device end (UNIT_EXCEPTION, STATUS_MODIFIER). Raises UnitCheck.

        """

    def is_prompt(self, command: int) -> bool:
        """Whether this command of its never waits, and moves little: then it may be executed on the event loop.

        Asked before each command but NOP, SENSE, SENSE ID and TIC, which are. Default: none is.
        """
        del command
        return False

    def begin(self) -> None:  # noqa: B027 - may be left out
        """A program begins: what held for the last one (an extent, a position) is void."""


class _Ended(Exception):
    """The program ends in the middle, with this subchannel status."""

    def __init__(self, cstat: Cstat) -> None:
        super().__init__()
        self.cstat = cstat


class Transfer:
    """The data of one command, across data-chained CCWs and IDAWs."""

    def __init__(self, run: ChannelProgramRun) -> None:
        self._run = run
        self.used = False
        self.short = False  # the device wanted to move more

    def take(self, most: int) -> bytes:
        """At most so many bytes from guest memory, for the device; fewer: the program has no more."""
        out = bytearray()
        while len(out) < most and (piece := self._run.piece(most - len(out))):
            address, length = piece
            out += self._run.load(address, length)
        self.used = True
        self.short |= len(out) < most
        return bytes(out)

    def give(self, data: bytes) -> int:
        """Bytes from the device to guest memory; returns how many the program took."""
        done = 0
        while done < len(data) and (piece := self._run.piece(len(data) - done)):
            address, length = piece
            self._run.store(address, data[done : done + length])
            done += length
        self.used = True
        self.short |= done < len(data)
        return done


class ChannelProgramRun:
    """One run of one program.

    Args:
        host: guest memory.
        orb: what was started.
        unit: the device.
        sense: what the device has to say of its last unit check; :attr:`sense` afterwards.
        stopped: whether to stop: asked before each CCW.
        interrupt: called for a CCW that asks for an interrupt in the middle (PCI), with the IRB.

    """

    def __init__(
        self,
        host: Host,
        orb: Orb,
        unit: Unit,
        *,
        sense: bytes,
        stopped: Callable[[], bool],
        interrupt: Callable[[Irb], None],
    ) -> None:
        self._host = host
        self._orb = orb
        self._unit = unit
        self.sense = sense
        self._stopped = stopped
        self._interrupt = interrupt
        self._limit = LIMIT_31 if orb.format else LIMIT_24
        self._next = orb.cpa
        self._at = orb.cpa
        self._ccw = Ccw(0)
        self._fetched = 0
        self._executed = 0
        self._begun = False
        self._ready = False  # a CCW was fetched that is still to be executed
        self._after_tic = True  # a program does not begin with one
        self._pieces: list[tuple[int, int]] = []
        self._left = 0

    def run(self) -> Irb:
        """Run it to its end. Gives the IRB of that; or, for one that suspended itself, of that."""
        return cast("Irb", self._run(prompt=False))  # only a prompt run stops before

    def run_promptly(self) -> Irb | None:
        """Run it as far as nothing waits, and not for long; None: :meth:`run` goes on with the rest, in a thread."""
        return self._run(prompt=True)

    def _run(self, *, prompt: bool) -> Irb | None:
        if not self._begun:
            self._begun = True
            self._unit.begin()
        try:
            while True:
                if not self._ready:
                    self._fetch(chained_data=False)
                self._ready = prompt and not self._is_prompt()
                if self._ready:
                    return None
                if int.__and__(self._ccw.flags, _SUSPEND):
                    return self._suspended()
                dstat = self._execute()
                self._executed += 1
                if int.__and__(dstat, _UNUSUAL) or not int.__and__(self._ccw.flags, _CHAIN_COMMAND):
                    return self._irb(dstat, _NO_CSTAT)
                if int.__and__(dstat, _MODIFIER):
                    self._next += CCW_SIZE
        except _Ended as ended:
            dstat = Dstat(0) if ended.cstat & Cstat.PROGRAM_CHECK and not self._executed else NORMAL
            return self._irb(dstat, ended.cstat)

    def _is_prompt(self) -> bool:
        """Whether the current command can be executed on the loop."""
        command = self._ccw.command
        return self._executed < MAX_PROMPT_COMMANDS and (command in _ALWAYS_PROMPT or self._unit.is_prompt(command))

    # --- one command ------------------------------------------------------------------------------------

    def _execute(self) -> Dstat:
        transfer = Transfer(self)
        command = self._ccw.command
        immediate = False
        try:
            match command:
                case Command.NOP:
                    dstat, immediate = NORMAL, True
                case Command.SENSE:
                    transfer.give(self.sense.ljust(32, b"\0"))
                    self.sense, dstat = b"", NORMAL
                case Command.SENSE_ID:
                    transfer.give(self._unit.sense_id.pack())
                    dstat = NORMAL
                case _:
                    dstat = NORMAL | self._unit.execute(command, transfer)
                    immediate = not transfer.used
        except UnitCheck as check:
            self.sense = check.sense
            return NORMAL | Dstat.UNIT_CHECK
        self._check_length(transfer, immediate=immediate)
        return dstat

    def _check_length(self, transfer: Transfer, *, immediate: bool) -> None:
        """Incorrect length ends the program, unless it is to be suppressed."""
        chained = int.__and__(self._ccw.flags, _CHAIN_DATA) != 0
        wrong = transfer.short or self._left > 0 or chained
        if immediate:
            # Format 0 does not report it for an immediate operation; format 1 only without L of the ORB.
            wrong = wrong and bool(self._orb.format) and not int.__and__(self._orb.flags, _ILS)
        # SLI says nothing while data chaining goes on.
        if wrong and (chained or not int.__and__(self._ccw.flags, _SUPPRESS_LENGTH)):
            raise _Ended(Cstat.INCORRECT_LENGTH)

    # --- fetching ---------------------------------------------------------------------------------------

    def _fetch(self, *, chained_data: bool) -> None:
        """Make the next CCW the current one, through TICs."""
        while True:
            at = self._next
            if self._stopped() or at % CCW_SIZE or at + CCW_SIZE > self._limit:
                raise _Ended(Cstat.PROGRAM_CHECK)
            self._at = at
            if self._fetched >= MAX_CHANNEL_COMMANDS:
                raise _Ended(Cstat.PROGRAM_CHECK)
            try:
                ccw = Ccw.unpack(self._host.read_memory(at, CCW_SIZE), self._orb.format)
            except DmaFault:
                raise _Ended(Cstat.PROGRAM_CHECK) from None
            if not is_tic(ccw.command, self._orb.format):
                break
            wrong = self._after_tic or (self._orb.format and (ccw.flags or ccw.count))
            if wrong:
                raise _Ended(Cstat.PROGRAM_CHECK)
            self._after_tic = True
            self._next = ccw.address
        self._after_tic = False
        self._fetched += 1
        self._check(ccw, chained_data=chained_data)
        if chained_data:
            ccw = Ccw(self._ccw.command, ccw.address, ccw.count, ccw.flags)
        self._ccw = ccw
        self._next = at + CCW_SIZE
        try:
            self._pieces = list(segments(ccw, self._orb.idaws, self._host.read_memory, self._orb.format))
        except (BadChannelStructure, DmaFault):
            # An immediate operation never looks at its data.
            if ccw.command == Command.NOP:
                self._pieces = []
            else:
                raise _Ended(Cstat.PROGRAM_CHECK) from None
        self._left = ccw.count
        if int.__and__(ccw.flags, _INTERRUPT):
            self._interrupt(self._intermediate())

    def _check(self, ccw: Ccw, *, chained_data: bool) -> None:
        """What makes a CCW invalid."""
        flags = int(ccw.flags)  # asking the flags themselves is slow
        in_data = chained_data or flags & _CHAIN_DATA
        if (
            # No command ends in 0; what ends in 8 is a TIC, and in format 1 only 08 itself is one.
            (not chained_data and ccw.command & 0xF in (0, 8))
            or (not ccw.count and (in_data or not self._orb.format))
            or flags & _MODIFIED_INDIRECT
            # A program suspends itself between commands, not in the middle of one's data.
            or (flags & _SUSPEND and (chained_data or OrbFlags.SPND not in self._orb.flags))
            or (self._orb.format and ccw.address >= LIMIT_31)
        ):
            raise _Ended(Cstat.PROGRAM_CHECK)

    # --- data: for Transfer -----------------------------------------------------------------------------

    def piece(self, most: int) -> tuple[int, int] | None:
        """The next piece of the program's data, at most so long; None: there is no more."""
        while not self._pieces:
            if self._left or CcwFlags.CHAIN_DATA not in self._ccw.flags:
                return None
            self._fetch(chained_data=True)
        address, length = self._pieces[0]
        taken = min(length, most)
        if taken < length:
            self._pieces[0] = (address + taken, length - taken)
        else:
            self._pieces.pop(0)
        self._left -= taken
        return address, taken

    def load(self, address: int, length: int) -> bytes:
        """From guest memory."""
        try:
            return self._host.read_memory(address, length)
        except DmaFault:
            raise _Ended(Cstat.PROGRAM_CHECK) from None

    def store(self, address: int, data: bytes) -> None:
        """To guest memory, unless the CCW says to skip."""
        if CcwFlags.SKIP in self._ccw.flags:
            return
        try:
            self._host.write_memory(address, data)
        except DmaFault as fault:
            raise _Ended(Cstat.PROTECTION_CHECK if fault.readonly else Cstat.PROGRAM_CHECK) from None

    # --- the IRB ----------------------------------------------------------------------------------------

    def _scsw(self, stctl: Stctl, *, dstat: Dstat, cstat: Cstat, actl: Actl = Actl(0)) -> Scsw:  # noqa: B008 - a constant
        return Scsw(
            key=self._orb.key,
            flags=flags_of(self._orb),
            fctl=Fctl.START,
            actl=actl,
            stctl=_status(int(stctl) | _PENDING),
            cpa=self._at + CCW_SIZE & 0xFFFFFFFF,
            dstat=dstat,
            cstat=cstat,
            count=self._left,
        )

    def _irb(self, dstat: Dstat, cstat: Cstat) -> Irb:
        stctl = _ENDED
        if int(cstat) & ~_PCI or int.__and__(dstat, _UNUSUAL):
            stctl |= Stctl.ALERT
        scsw = self._scsw(stctl, dstat=dstat, cstat=cstat)
        esw = Esw(word0=LPUM << 16)
        if not int.__and__(dstat, _UNIT_CHECK):
            return Irb(scsw=scsw, esw=esw)
        # Concurrent sense: the data come along, and a SENSE that follows finds them as well.
        sense = self.sense.ljust(32, b"\0")[:32]
        flagged = Scsw(
            scsw.key, scsw.flags | ScswFlags.ESWF | ScswFlags.ECTL, 0, scsw.fctl, scsw.actl, scsw.stctl, scsw.cpa, dstat
        )
        return Irb(scsw=flagged, esw=Esw(word0=LPUM << 16, erw=Erw(ErwFlags.CONS, 32)), ecw=sense)

    def _suspended(self) -> Irb:
        """Its CCW was fetched, so the address is that of the next one; resumed, it would be fetched again."""
        return Irb(scsw=self._scsw(Stctl.INTERMEDIATE, dstat=Dstat(0), cstat=Cstat(0), actl=Actl.SUSPENDED))

    def _intermediate(self) -> Irb:
        actl = Actl.SUBCHANNEL_ACTIVE | Actl.DEVICE_ACTIVE
        cstat = Cstat.PROGRAM_CONTROLLED_INTERRUPTION
        return Irb(scsw=self._scsw(Stctl.INTERMEDIATE, dstat=Dstat(0), cstat=cstat, actl=actl))


_COPIED: Final = (
    (OrbFlags.SPND, ScswFlags.SCTL),
    (OrbFlags.FMT, ScswFlags.FMT),
    (OrbFlags.PFCH, ScswFlags.PFCH),
    (OrbFlags.ISIC, ScswFlags.ISIC),
    (OrbFlags.ALCC, ScswFlags.ALCC),
    (OrbFlags.SSIC, ScswFlags.SSI),
)


def flags_of(orb: Orb) -> ScswFlags:
    """What an SCSW repeats of the ORB."""
    return _shown(int(orb.flags))


@functools.lru_cache(64)
def _shown(flags: int) -> ScswFlags:
    shown = ScswFlags(0)
    for asked, one in _COPIED:
        if flags & int(asked):
            shown |= one
    return shown
