"""Channel programs: built step by step, checked, laid out in guest memory.

::

    program = ChannelProgram(address=0x1000, size=0x1000)
    sensed = program.sense_id(12)                # where the answer will be
    program.nop()
    laid = program.build()
    for at, data in laid.pieces:                 # write these into guest memory,
        memory[at : at + len(data)] = data
    laid.orb                                     # and give this to ccw-request
    SenseId.unpack(memory[sensed.address : sensed.address + sensed.length])

Steps are command-chained. What is refused is what can never work: an address beyond the format, a wrong alignment, a
loop in which nothing is transferred, a TIC that goes nowhere. How *long* a program may be is the kernel's decision.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, structs

from vfiod.protocol.channel.ccw import (
    CCW_SIZE,
    LIMIT_24,
    LIMIT_31,
    MAX_COUNT,
    BadChannelStructure,
    Ccw,
    CcwFlags,
    Command,
    Idaws,
    is_tic,
    write_idaws,
)
from vfiod.protocol.channel.orb import Orb, OrbFlags

__all__ = ["Buffer", "ChannelProgram", "Laid", "Step", "check_ccws"]

_CHAINED: Final = CcwFlags.CHAIN_COMMAND | CcwFlags.CHAIN_DATA


class Buffer(Struct, frozen=True):
    """A piece of guest memory: address and length, in bytes."""

    address: int
    length: int


class Step(Struct, frozen=True):
    """One step of a program, by its number: where a TIC may go, and where a read's data arrive.

    Attributes:
        number: of its first CCW within the program, from 0.
        buffers: its data, one for each data-chained part.

    """

    number: int
    buffers: tuple[Buffer, ...] = ()

    @property
    def address(self) -> int:
        """Of its first buffer."""
        return self.buffers[0].address

    @property
    def length(self) -> int:
        """Of its first buffer."""
        return self.buffers[0].length


class Laid(Struct, frozen=True):
    """A program in guest memory.

    Attributes:
        orb: what starts it.
        pieces: (address, bytes) to be written before: CCWs, IDAWs, data to write; zeros where reads arrive.
        ccws: the CCWs, in order.

    """

    orb: Orb
    pieces: tuple[tuple[int, bytes], ...]
    ccws: tuple[Ccw, ...]


class ChannelProgram:
    """A channel program being built.

    Args:
        address: guest memory that it may use: the first byte. The program begins there: a multiple of 8.
        size: of that memory, in bytes.
        format: of its CCWs: 1 (31-bit addresses), or 0 (24-bit).
        idaws: how data is addressed.
        data_address: where the data goes, when not behind the program; with 64-bit IDAWs it may lie above 2 GiB.
        data_size: of that memory.

    Raises BadChannelStructure for memory that cannot hold a program of this format.

    """

    def __init__(
        self,
        address: int,
        size: int,
        *,
        format: int = 1,
        idaws: Idaws = Idaws.NONE,
        data_address: int | None = None,
        data_size: int = 0,
    ) -> None:
        if format not in (0, 1):
            raise BadChannelStructure(f"CCWs have format 0 or 1, not {format}")
        self.format = format
        self.idaws = idaws
        self._start = address
        self._end = address + size
        limit = LIMIT_31 if format else LIMIT_24
        if address < 0 or address % CCW_SIZE or self._end > limit:
            raise BadChannelStructure(
                f"A program of format-{format} CCWs lies at a multiple of {CCW_SIZE} below 0x{limit:x}, "
                f"not in the {size} bytes at 0x{address:x}"
            )
        self._data_end = self._end if data_address is None else data_address + data_size
        # Behind the program, data is laid out from the end downwards: how long the program gets is known last.
        self._data = self._end if data_address is None else data_address
        self._apart = data_address is not None
        self._ccws: list[Ccw] = []
        self._targets: dict[int, int] = {}
        self._pieces: list[tuple[int, bytes]] = []

    # --- steps ------------------------------------------------------------------------------------

    def nop(self, flags: CcwFlags = CcwFlags(0)) -> Step:  # noqa: B008 - a constant
        """NO OPERATION."""
        return self.raw(Ccw(Command.NOP, self._start, 1, flags | CcwFlags.SUPPRESS_LENGTH))

    def sense(self, length: int = 32, flags: CcwFlags = CcwFlags.SUPPRESS_LENGTH) -> Step:
        """BASIC SENSE: the sense data of the last unit check."""
        return self.read(Command.SENSE, length, flags=flags)

    def sense_id(self, length: int = 7, flags: CcwFlags = CcwFlags.SUPPRESS_LENGTH) -> Step:
        """SENSE ID: what the device is (:class:`~vfiod.protocol.channel.sense.SenseId`)."""
        return self.read(Command.SENSE_ID, length, flags=flags)

    def read(self, command: int, *lengths: int, flags: CcwFlags = CcwFlags(0)) -> Step:  # noqa: B008 - a constant
        """Read from the device into guest memory; several lengths are data-chained."""
        return self._transfer(command, tuple((length, None) for length in lengths), flags)

    def write(self, command: int, *parts: bytes, flags: CcwFlags = CcwFlags(0)) -> Step:  # noqa: B008 - a constant
        """Write, or give a control command its data; several parts are data-chained."""
        return self._transfer(command, tuple((len(part), part) for part in parts), flags)

    def tic(self, to: Step | int) -> Step:
        """TRANSFER IN CHANNEL: go on at a step (or the number of a CCW) rather than at the next one."""
        number = len(self._ccws)
        self._targets[number] = to.number if isinstance(to, Step) else to
        return self.raw(Ccw(Command.TIC))

    def raw(self, ccw: Ccw) -> Step:
        """A CCW as it is; chaining is added when something follows."""
        self._ccws.append(ccw)
        return Step(len(self._ccws) - 1)

    def _transfer(self, command: int, parts: tuple[tuple[int, bytes | None], ...], flags: CcwFlags) -> Step:
        if not parts:
            raise BadChannelStructure("A transfer has at least one part")
        first = len(self._ccws)
        buffers: list[Buffer] = []
        for position, (length, data) in enumerate(parts):
            if not 1 <= length <= MAX_COUNT:
                raise BadChannelStructure(f"A CCW moves 1 to {MAX_COUNT} bytes, not {length}")
            buffer = self._place(length, 8)
            buffers.append(buffer)
            self._pieces.append((buffer.address, bytes(length) if data is None else bytes(data)))
            more = CcwFlags.CHAIN_DATA if position < len(parts) - 1 else CcwFlags(0)
            if self.idaws is Idaws.NONE:
                self._ccws.append(Ccw(command, buffer.address, length, flags | more))
                continue
            words = write_idaws(self.idaws, buffer.address, length)
            where = self._place(len(words), self.idaws.width, within_ccw=True)
            self._pieces.append((where.address, words))
            self._ccws.append(Ccw(command, where.address, length, flags | more | CcwFlags.INDIRECT))
        return Step(first, tuple(buffers))

    def _place(self, length: int, alignment: int, *, within_ccw: bool = False) -> Buffer:
        """Memory for data; for lists of IDAWs always what a CCW can address."""
        if self._apart and not within_ccw:
            at = -(-self._data // alignment) * alignment
            self._data = at + length
            if self._data > self._data_end:
                raise BadChannelStructure(f"The data do not fit below 0x{self._data_end:x}: {length} bytes more")
            return Buffer(at, length)
        self._end = (self._end - length) // alignment * alignment
        if self._end < self._start:
            raise BadChannelStructure(f"The program's memory is too small: {length} bytes more do not fit")
        return Buffer(self._end, length)

    # --- the whole --------------------------------------------------------------------------------

    def build(self, *, intparm: int = 0, key: int = 0, lpm: int = 0xFF, prefetch: bool = True) -> Laid:
        """Lay it out. Raises BadChannelStructure, naming the CCW, for what can never work."""
        ccws = self._linked()
        code_end = self._start + CCW_SIZE * len(ccws)
        if code_end > self._end:
            raise BadChannelStructure(
                f"{len(ccws)} CCWs at 0x{self._start:x} and their data do not fit: they end at 0x{code_end:x}, "
                f"the data begin at 0x{self._end:x}; give the program more memory"
            )
        check_ccws(ccws, self._start, self.format, self.idaws)
        flags = OrbFlags.FMT if self.format else OrbFlags(0)
        flags |= OrbFlags.PFCH if prefetch else OrbFlags(0)
        if self.idaws in (Idaws.FORMAT_2_2K, Idaws.FORMAT_2_4K):
            flags |= OrbFlags.C64
        if self.idaws is Idaws.FORMAT_2_2K:
            flags |= OrbFlags.I2K
        if any(CcwFlags.SUSPEND in one.flags for one in ccws):
            flags |= OrbFlags.SPND
        orb = Orb(self._start, intparm, key, lpm, flags)
        orb.check()
        code = b"".join(one.pack(self.format) for one in ccws)
        return Laid(orb, ((self._start, code), *self._pieces), ccws)

    def _linked(self) -> tuple[Ccw, ...]:
        """With chaining, and the addresses of TICs."""
        if not self._ccws:
            raise BadChannelStructure("A channel program has at least one CCW")
        linked: list[Ccw] = []
        last = len(self._ccws) - 1
        for number, ccw in enumerate(self._ccws):
            target = self._targets.get(number)
            if target is not None:
                if not 0 <= target <= last:
                    raise BadChannelStructure(f"CCW {number} is a TIC to CCW {target}; there are 0 to {last}")
                linked.append(Ccw(Command.TIC, self._start + CCW_SIZE * target))
            elif number == last or ccw.flags & _CHAINED or is_tic(ccw.command, self.format):
                linked.append(ccw)
            else:
                linked.append(structs.replace(ccw, flags=ccw.flags | CcwFlags.CHAIN_COMMAND))
        return tuple(linked)


def check_ccws(ccws: tuple[Ccw, ...], address: int, format: int, idaws: Idaws = Idaws.NONE) -> None:
    """Raise BadChannelStructure, naming the CCW, for a program at ``address`` that can never work."""
    limit = LIMIT_31 if format else LIMIT_24
    for number, ccw in enumerate(ccws):
        what = f"CCW {number} ({ccw.describe()})"
        tic = is_tic(ccw.command, format)
        if not 0 <= ccw.address < limit:
            raise BadChannelStructure(f"{what}: its address is not below 0x{limit:x}, the end of format {format}")
        if tic and (number == 0 or is_tic(ccws[number - 1].command, format)):
            raise BadChannelStructure(f"{what}: a program does not begin with a TIC, and a TIC does not follow a TIC")
        if tic and ccw.address % CCW_SIZE:
            raise BadChannelStructure(f"{what}: a TIC goes to a multiple of {CCW_SIZE}")
        if tic:
            continue
        chained = number > 0 and CcwFlags.CHAIN_DATA in ccws[number - 1].flags
        if ccw.command & 0xF in (0, 8) and not chained:
            raise BadChannelStructure(f"{what}: a command whose low four bits are 0, or 8 and no TIC, does not exist")
        if not ccw.count and (not format or CcwFlags.CHAIN_DATA in ccw.flags):
            raise BadChannelStructure(f"{what}: a count of 0 is for format 1 without data chaining only")
        if CcwFlags.MODIFIED_INDIRECT in ccw.flags:
            raise BadChannelStructure(
                f"{what}: modified indirect addressing (MIDAW) is not done: vfio-ccw would take the list for the data "
                "itself; use IDAWs"
            )
        if CcwFlags.SUSPEND in ccw.flags and chained:
            raise BadChannelStructure(f"{what}: a program suspends itself between commands, not within data chaining")
        if CcwFlags.INDIRECT in ccw.flags and ccw.address % idaws.width:
            raise BadChannelStructure(f"{what}: a list of {idaws.value} IDAWs is aligned to {idaws.width} bytes")
        if CcwFlags.INDIRECT not in ccw.flags and ccw.address + ccw.count > limit:
            raise BadChannelStructure(f"{what}: its data reach beyond 0x{limit:x}, the end of format {format}")
    _check_loops(ccws, address, format)


def _check_loops(ccws: tuple[Ccw, ...], address: int, format: int) -> None:
    """Follow the chain; a loop of nothing but NOPs and TICs never ends. Others a device can leave (status modifier)."""
    seen: dict[int, int] = {}
    path: list[int] = []
    number = 0
    while number not in seen:
        seen[number] = len(path)
        path.append(number)
        ccw = ccws[number]
        if is_tic(ccw.command, format):
            target = ccw.address - address
            if not 0 <= target < CCW_SIZE * len(ccws):
                return  # into another program: not ours to follow
            if is_tic(ccws[target // CCW_SIZE].command, format):
                raise BadChannelStructure(f"CCW {number} is a TIC to CCW {target // CCW_SIZE}, which is a TIC itself")
            number = target // CCW_SIZE
        elif ccw.flags & _CHAINED:
            number += 1
            if number == len(ccws):
                raise BadChannelStructure(f"CCW {number - 1} is chained to a CCW that is not there")
        else:
            return
    loop = path[seen[number] :]
    if all(ccws[one].command == Command.NOP or is_tic(ccws[one].command, format) for one in loop):
        raise BadChannelStructure(
            f"CCWs {', '.join(map(str, loop))} are a loop in which nothing is transferred: it never ends"
        )
