"""The builder of channel programs: what it lays out, and what it refuses.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import pytest

from vfiod.protocol.channel import (
    BadChannelStructure,
    Ccw,
    CcwFlags,
    ChannelProgram,
    Command,
    Idaws,
    Laid,
    Orb,
    OrbFlags,
    check_ccws,
)

NOP = Ccw(Command.NOP, 0, 1, CcwFlags.CHAIN_COMMAND)


def memory(laid: Laid) -> dict[int, int]:
    """Every byte; no two pieces may overlap."""
    found: dict[int, int] = {}
    for address, data in laid.pieces:
        for at, byte in enumerate(data, address):
            assert at not in found
            found[at] = byte
    return found


def test_a_program_as_bytes() -> None:
    program = ChannelProgram(0x1000, 0x100)
    sensed = program.sense_id(12)
    program.nop()
    laid = program.build(intparm=7)
    assert laid.orb.pack().hex() == "0000000700c0ff0000001000"
    assert laid.pieces[0] == (0x1000, bytes.fromhex("e460000c000010f00320000100001000"))
    assert (sensed.address, sensed.length) == (0x10F0, 12)
    memory(laid)


@pytest.mark.parametrize("format", [0, 1])
@pytest.mark.parametrize("idaws", Idaws)
def test_data_and_lists_do_not_overlap(format: int, idaws: Idaws) -> None:
    program = ChannelProgram(0x10000, 0x40000, format=format, idaws=idaws)
    for number in range(20):
        program.write(0x41, bytes([number]) * 3000, b"x" * 100)
        program.read(0x42, 5000)
    laid = program.build()
    assert set(memory(laid)) <= set(range(0x10000, 0x50000))
    assert laid.orb.format == format
    assert (OrbFlags.C64 in laid.orb.flags) is (idaws in (Idaws.FORMAT_2_2K, Idaws.FORMAT_2_4K))
    assert (OrbFlags.I2K in laid.orb.flags) is (idaws is Idaws.FORMAT_2_2K)
    chained = [CcwFlags.CHAIN_DATA in one.flags for one in laid.ccws]
    assert chained == [True, False, False] * 20
    assert not laid.ccws[-1].flags & (CcwFlags.CHAIN_COMMAND | CcwFlags.CHAIN_DATA)


def test_data_beyond_two_gibibytes_needs_wide_idaws() -> None:
    above = 1 << 32
    program = ChannelProgram(0x1000, 0x1000, idaws=Idaws.FORMAT_2_4K, data_address=above + 100, data_size=0x10000)
    step = program.read(0x42, 8192)
    assert step.address == above + 104
    program.build()
    direct = ChannelProgram(0x1000, 0x1000, data_address=above, data_size=0x10000)
    direct.read(0x42, 8)
    with pytest.raises(BadChannelStructure, match=r"CCW 0 .* not below 0x80000000"):
        direct.build()
    with pytest.raises(BadChannelStructure, match="reach beyond 0x80000000"):
        ChannelProgram(0x1000, 0x1000, idaws=Idaws.FORMAT_1, data_address=above, data_size=64).read(0x42, 8)
    with pytest.raises(BadChannelStructure, match="do not fit below"):
        ChannelProgram(0x1000, 0x1000, data_address=0x8000, data_size=64).read(0x42, 65)


def test_tics_and_suspension() -> None:
    program = ChannelProgram(0x1000, 0x1000)
    first = program.nop()
    program.read(0x42, 8)
    program.tic(first)
    laid = program.build()
    assert laid.ccws[2] == Ccw(Command.TIC, 0x1000)
    suspended = ChannelProgram(0x1000, 0x1000)
    suspended.nop(CcwFlags.SUSPEND)
    assert OrbFlags.SPND in suspended.build().orb.flags


def test_loops_that_never_end() -> None:
    program = ChannelProgram(0x1000, 0x1000)
    program.sense()
    first = program.nop()
    program.nop()
    program.tic(first)
    with pytest.raises(BadChannelStructure, match="CCWs 1, 2, 3 are a loop in which nothing is transferred"):
        program.build()


def test_no_length_is_too_long() -> None:
    program = ChannelProgram(0x1000, 0x10000)
    for _ in range(1000):
        program.nop()
    assert len(program.build().ccws) == 1000


@pytest.mark.parametrize(
    "ccws, words",
    [
        ([Ccw(Command.TIC, 0x1000)], "does not begin with a TIC"),
        ([NOP, Ccw(Command.TIC, 0x1004)], "a multiple of 8"),
        ([NOP, Ccw(Command.TIC, 0x1008)], "which is a TIC itself"),
        ([NOP, Ccw(Command.TIC, 0x1000), Ccw(Command.TIC, 0x1000)], "a TIC does not follow a TIC"),
        ([NOP], "chained to a CCW that is not there"),
        ([Ccw(0x50, 0, 1)], "low four bits are 0"),
        ([Ccw(2, 0x7FFFFFFF, 2)], "reach beyond 0x80000000"),
        ([Ccw(2, 0x2001, 2, CcwFlags.INDIRECT)], "aligned to 4 bytes"),
        ([Ccw(2, 0, 0, CcwFlags.CHAIN_DATA)], "count of 0"),
    ],
)
def test_what_can_never_work(ccws: list[Ccw], words: str) -> None:
    with pytest.raises(BadChannelStructure, match=words):
        check_ccws(tuple(ccws), 0x1000, 1, Idaws.FORMAT_1)


def test_memory_that_cannot_hold_it() -> None:
    for address, size, format in ((4, 64, 1), (0x7FFFFFF8, 64, 1), (0xFFFFF8, 64, 0), (-8, 64, 1)):
        with pytest.raises(BadChannelStructure, match="A program of format"):
            ChannelProgram(address, size, format=format)
    with pytest.raises(BadChannelStructure, match="at least one CCW"):
        ChannelProgram(0, 64).build()
    small = ChannelProgram(0, 64)
    for _ in range(9):
        small.nop()
    with pytest.raises(BadChannelStructure, match="give the program more memory"):
        small.build()
    with pytest.raises(BadChannelStructure, match="too small"):
        ChannelProgram(0, 64).read(2, 65)
    for length in (0, 65536):
        with pytest.raises(BadChannelStructure, match="1 to 65535"):
            ChannelProgram(0, 1 << 20).read(2, length)
    with pytest.raises(BadChannelStructure, match="there are 0 to 1"):
        program = ChannelProgram(0, 64)
        program.nop()
        program.tic(5)
        program.build()
    with pytest.raises(BadChannelStructure, match="format 0 or 1"):
        ChannelProgram(0, 64, format=2)


def test_what_no_subchannel_does_is_refused_in_words() -> None:
    program = ChannelProgram(0x1000, 0x1000)
    program.read(0x02, 8, flags=CcwFlags.MODIFIED_INDIRECT)
    with pytest.raises(BadChannelStructure, match=r"CCW 0 .*MIDAW.* is not done.*use IDAWs"):
        program.build()
    with pytest.raises(BadChannelStructure, match=r"modified indirect addressing \(D\).*use IDAWs"):
        Orb(0x1000, flags=OrbFlags.FMT | OrbFlags.MIDAW).check()
    program = ChannelProgram(0x1000, 0x1000)
    program.raw(Ccw(0x02, 0x1800, 4, CcwFlags.CHAIN_DATA))
    program.raw(Ccw(0x02, 0x1804, 4, CcwFlags.SUSPEND))
    with pytest.raises(BadChannelStructure, match=r"CCW 1 .*between commands, not within data chaining"):
        program.build()
