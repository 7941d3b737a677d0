"""Channel programs from an enemy: the structures, the builder, the interpreter, a subchannel with a guest that lies.

A program's input: a byte of ORB flags, the program's address (two bytes), then guest memory from address 0. What the
guest has written is all there is: addresses, counts, chains, TICs and lists of IDAWs say what they like.
"""

from __future__ import annotations

import atexit
import errno
import os
from typing import Any, NamedTuple

from tests.fuzz.target import Target, lines

from vfiod.protocol.channel import (
    BadChannelStructure,
    Ccw,
    CcwFlags,
    ChannelProgram,
    Crw,
    Dstat,
    Idaws,
    Irb,
    Orb,
    OrbFlags,
    Schib,
    SenseId,
    check_ccws,
    explain_crw,
    explain_irb,
    explain_orb,
    explain_schib,
    sense_words,
)
from vfiod.protocol.channel.ccw import MAX_COUNT, segments
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwCmdRegion, CcwIoRegion
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.mdev.channel import ChannelProgramRun, Transfer, Unit, UnitCheck
from vfiod.server.mdev.channel_device import COMMAND, CRW, IO, SCHIB, ChannelDevice
from vfiod.server.mdev.instance import MdevHost
from vfiod.server.mdev.space import Piece, Translation

__all__ = ["TARGETS"]

MEMORY = 1 << 16
FEW = 64
"""CCWs after which a program is stopped: what loops, loops as well in so many."""

GUARDED = 1 << 12
"""The last page can be read, and not written."""

_HEAD = 3


class _Echo(Unit):
    """Keeps what is written, gives it back, sees no end in a search; counts."""

    sense_id = SenseId(0x1234, 0x01)

    def __init__(self) -> None:
        self.kept = b""
        self.executed = 0

    def is_prompt(self, command: int) -> bool:
        return bool(command & 0x40)

    def execute(self, command: int, transfer: Transfer) -> Dstat:
        self.executed += 1
        match command & 3:
            case 1:
                self.kept = transfer.take(MAX_COUNT)
            case 2:
                transfer.give(self.kept or bytes(512))
            case 3:
                return Dstat.STATUS_MODIFIER if command & 0x10 else Dstat(0)
            case _:
                raise UnitCheck(b"\x80")
        return Dstat(0)


class _Ground(NamedTuple):
    """A machine whose memory is real, and used again for each input."""

    host: MdevHost
    memory: SharedMemory

    def load(self, data: bytes) -> None:
        self.memory.write(0, data[:MEMORY].ljust(MEMORY, b"\0"))


_made: list[_Ground] = []


def _ground() -> _Ground:
    if not _made:
        fd = FileDescriptor(os.memfd_create("guest"))
        os.ftruncate(fd.number, MEMORY)
        memory = SharedMemory(fd, name="guest")
        atexit.register(memory.close)
        space = Translation()
        space.add(Piece(0, MEMORY - GUARDED, memory, 0, False))
        space.add(Piece(MEMORY - GUARDED, GUARDED, memory, MEMORY - GUARDED, True))
        host = MdevHost("a fuzzed device", None)  # type: ignore[arg-type] # no loop: it watches nothing
        host.memory = space
        _made.append(_Ground(host, memory))
    return _made[0]


def _structures(data: bytes) -> None:
    kinds: tuple[tuple[Any, Any], ...] = (
        (Irb, explain_irb),
        (Schib, explain_schib),
        (Orb, explain_orb),
        (Crw, explain_crw),
    )
    for kind, explain in kinds:
        try:
            found = kind.unpack(data)
        except BadChannelStructure as error:
            assert str(error)
            continue
        said = found.pack()
        assert kind.unpack(said).pack() == said
        assert explain(found)
        if isinstance(found, Irb):
            assert len(found.sense) <= 32
            sense_words(found.sense)
    for format in (0, 1):
        ccws = tuple(Ccw.unpack(data[place : place + 8], format) for place in range(0, len(data) - 7, 8))
        for ccw in ccws:
            assert Ccw.unpack(ccw.pack(format), format) == ccw if ccw.address < 1 << 31 else ccw.describe()
        for idaws in Idaws:
            try:
                check_ccws(ccws, 0, format, idaws)
            except BadChannelStructure as error:
                assert str(error).startswith("CCW")
            except (IndexError, ValueError) as error:
                assert not ccws, error


def _builder(data: bytes) -> None:
    """Steps as the bytes say: what is laid out stays within its memory, and is what the interpreter takes."""
    if len(data) < 4:
        return
    size = int.from_bytes(data[1:3], "little")
    idaws, format = tuple(Idaws)[data[0] & 3], data[0] >> 2 & 1
    try:
        program = ChannelProgram(data[3] << 8, size, format=format, idaws=idaws)
        for place in range(4, len(data) - 3, 4):
            kind, code, length = data[place] % 6, data[place + 1], int.from_bytes(data[place + 2 : place + 4], "little")
            match kind:
                case 0:
                    program.write(code, bytes(length))
                case 1:
                    program.read(code, length, length & 0xFF)
                case 2:
                    program.tic(length % 64)
                case 3:
                    program.sense_id()
                case 4:
                    program.raw(Ccw(code, length << 3, length, CcwFlags(data[place] >> 1 & 0x7F)))
                case _:
                    program.nop()
        laid = program.build()
    except BadChannelStructure as error:
        assert str(error)
        return
    for address, piece in laid.pieces:
        assert data[3] << 8 <= address and address + len(piece) <= (data[3] << 8) + size, "laid out beyond its memory"
    assert Orb.unpack(laid.orb.pack()) == laid.orb


def _program(data: bytes) -> None:
    if len(data) < _HEAD:
        return
    ground = _ground()
    ground.load(data[_HEAD:])
    guarded = ground.memory.read(MEMORY - GUARDED, GUARDED)
    flags = OrbFlags(0)
    for bit, one in enumerate((OrbFlags.FMT, OrbFlags.C64, OrbFlags.I2K, OrbFlags.SPND, OrbFlags.ILS, OrbFlags.PFCH)):
        if data[0] >> bit & 1:
            flags |= one
    orb = Orb(int.from_bytes(data[1:3], "little"), flags=flags)
    unit = _Echo()
    middle: list[Irb] = []
    left = iter(range(FEW))
    run = ChannelProgramRun(
        ground.host, orb, unit, sense=b"", stopped=lambda: next(left, None) is None, interrupt=middle.append
    )
    irb = run.run_promptly() or run.run()
    assert unit.executed + len(middle) <= 2 * FEW, "it went on when it was stopped"
    assert Irb.unpack(irb.pack()).pack() == irb.pack()
    assert ground.memory.read(MEMORY - GUARDED, GUARDED) == guarded, "memory that may only be read was written"
    _lists(data[_HEAD:], orb)


def _lists(data: bytes, orb: Orb) -> None:
    """The same memory, as lists of IDAWs: pieces have the CCW's bytes, and no more."""

    def fetch(address: int, length: int) -> bytes:
        if address + length > len(data):
            raise BadChannelStructure("beyond memory")
        return data[address : address + length]

    for place in range(0, min(len(data) - 7, 256), 8):
        ccw = Ccw.unpack(data[place : place + 8], orb.format)
        try:
            found = segments(ccw, orb.idaws, fetch, orb.format)
        except BadChannelStructure as error:
            assert str(error)
            continue
        assert sum(length for _, length in found) == ccw.count


def _subchannel(data: bytes) -> None:
    """A subchannel's four regions, accessed as the bytes say, with the rest as guest memory."""
    ground = _ground()
    records = data[: min(len(data), 64)]
    ground.load(data[64:])
    device = ChannelDevice(ground.host, _Echo())
    device.open()
    try:
        for place in range(0, len(records) - 3, 4):
            _access(device, records[place : place + 4], data)
            for index, size in ((IO, 0), (SCHIB, 0)):
                info = device.region_info(index)
                assert len(device.read(index, size, info.size)) == info.size
    finally:
        device.close()


def _access(device: ChannelDevice, record: bytes, data: bytes) -> None:
    index, what, low, high = record[0] % 4, record[1], record[2], record[3]
    orb = Orb(low << 3 | high << 11, flags=OrbFlags.FMT if what & 1 else OrbFlags(0))
    try:
        match what % 6:
            case 0 | 1:
                device.write(IO, 0, CcwIoRegion(orb.pack()).pack())
            case 2:
                device.write(COMMAND, 0, CcwCmdRegion(AsyncCommand(low & 3)).pack())
            case 3:
                device.write(index, low, data[:high])
            case 4:
                device.read(index, low, high)
            case _:
                device.read(CRW, 0, 8)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP), error


TARGETS = (
    Target(
        "channel-structures",
        _structures,
        lambda: lines("channel-structures"),
        ("vfiod.protocol.channel",),
        "BadChannelStructure, or a structure that says the same again and can be explained",
        150,
    ),
    Target(
        "channel-builder",
        _builder,
        lambda: lines("channel-builder"),
        ("vfiod.protocol.channel",),
        "BadChannelStructure, or a program that lies within its memory",
        500,
    ),
    Target(
        "channel-program",
        _program,
        lambda: lines("channel-program"),
        ("vfiod.server.mdev.channel", "vfiod.protocol.channel"),
        "every program ends with an IRB, when it is stopped at the latest; memory it may only read is not written",
        400,
    ),
    Target(
        "channel-device",
        _subchannel,
        lambda: lines("channel-device"),
        ("vfiod.server.mdev.channel_device",),
        "every access is done or refused by a documented errno; the subchannel can be read and closed after it",
        50,
    ),
)
