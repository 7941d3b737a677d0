"""The interpreter of channel programs, and subchannels in Python, on real guest memory and real eventfds.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiod.protocol.channel import (
    Actl,
    Ccw,
    CcwFlags,
    ChannelProgram,
    Cstat,
    Dstat,
    Fctl,
    Irb,
    Laid,
    Orb,
    OrbFlags,
    Scsw,
    SenseByte0,
    SenseId,
    Stctl,
)
from vfiod.protocol.limits import MAX_CHANNEL_COMMANDS
from vfiod.protocol.vfio import IrqAction, SetIrqs
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwCmdRegion, CcwIoRegion, CcwIrq
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.mdev.channel import MAX_PROMPT_COMMANDS, ChannelProgramRun, Transfer, Unit, UnitCheck
from vfiod.server.mdev.channel_device import ChannelDevice
from vfiod.server.mdev.parent import Pin, Saved
from vfiod.server.mdev.samples.terminal import MAX_RECORD, Records, record
from vfiod.server.mdev.space import Piece

from .conftest import Bell, Ground

SIZE = 1 << 20
CC, CD, SLI, SKIP = CcwFlags.CHAIN_COMMAND, CcwFlags.CHAIN_DATA, CcwFlags.SUPPRESS_LENGTH, CcwFlags.SKIP


class Echo(Unit):
    """Command 01 keeps what is written, 02 gives it back; 07 never finds (a SEARCH), 0B finds at once."""

    sense_id = SenseId(0x1234, 0x01)

    def __init__(self) -> None:
        self.kept = b""
        self.begun = 0
        self.gate: threading.Event | None = None

    def begin(self) -> None:
        self.begun += 1

    def execute(self, command: int, transfer: Transfer) -> Dstat:
        match command:
            case 0x01:
                self.kept = transfer.take(65536)
                transfer.short = False
            case 0x02:
                transfer.give(self.kept)
            case 0x07:
                transfer.take(1)
            case 0x0B:
                transfer.take(1)
                return Dstat.STATUS_MODIFIER
            case 0x0F:
                return Dstat.UNIT_EXCEPTION
            case 0x13:
                assert self.gate is not None
                self.gate.wait(30)
            case 0x17:
                raise RuntimeError("a defect")
            case _:
                raise UnitCheck(bytes([SenseByte0.COMMAND_REJECT]))
        return Dstat(0)


class Machine:
    """Guest memory, and the interpreter."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.memory: SharedMemory = ground.map(0, SIZE)
        self.unit = Echo()
        self.sense = b""
        self.middle: list[Irb] = []

    def put(self, address: int, data: bytes) -> None:
        self.ground.host.write_memory(address, data)

    def get(self, address: int, length: int) -> bytes:
        return self.ground.host.read_memory(address, length)

    def ccws(self, *ccws: Ccw, format: int = 1, flags: OrbFlags = OrbFlags(0)) -> Irb:  # noqa: B008 - a constant
        self.put(0x1000, b"".join(one.pack(format) for one in ccws))
        return self.run(Orb(0x1000, flags=flags | (OrbFlags.FMT if format else OrbFlags(0))))

    def run(self, what: Orb | ChannelProgram) -> Irb:
        orb = what if isinstance(what, Orb) else self.lay(what.build()).orb
        run = ChannelProgramRun(
            self.ground.host, orb, self.unit, sense=self.sense, stopped=lambda: False, interrupt=self.middle.append
        )
        irb = run.run()
        self.sense = run.sense
        return irb

    def lay(self, laid: Laid) -> Laid:
        for address, data in laid.pieces:
            self.put(address, data)
        return laid


@pytest.fixture
def machine(ground: Ground) -> Machine:
    return Machine(ground)


def test_writing_and_reading_in_pieces(machine: Machine) -> None:
    program = ChannelProgram(0x1000, 0x4000)
    program.write(0x01, b"one ", b"two ", b"three")
    into = program.read(0x02, 4, 4, 5)
    irb = machine.run(program)
    assert irb.scsw.dstat == Dstat.CHANNEL_END | Dstat.DEVICE_END
    assert (irb.scsw.cstat, irb.scsw.count, irb.scsw.fctl) == (0, 0, Fctl.START)
    assert irb.scsw.cpa == 0x1000 + 6 * 8
    assert b"".join(machine.get(one.address, one.length) for one in into.buffers) == b"one two three"


def test_skip_moves_nothing_into_memory(machine: Machine) -> None:
    machine.unit.kept = b"secret and public"
    machine.put(0x2000, bytes(32))
    irb = machine.ccws(Ccw(0x02, 0x2000, 11, CD | SKIP), Ccw(0x02, 0x2000, 6))
    assert irb.scsw.cstat == 0
    assert machine.get(0x2000, 17) == b"public" + bytes(11)


def test_the_length_is_checked_as_the_machine_does(machine: Machine) -> None:
    machine.unit.kept = b"12345678"
    cases = {
        (8, 0): (0, 0), (9, 0): (0x40, 1), (7, 0): (0x40, 0), (9, int(SLI)): (0, 1), (7, int(SLI)): (0, 0),
    }  # fmt: skip
    for (count, flags), (cstat, residual) in cases.items():
        irb = machine.ccws(Ccw(0x02, 0x2000, count, CcwFlags(flags)))
        assert (irb.scsw.cstat, irb.scsw.count) == (cstat, residual), (count, flags)
    # Data chaining that the device does not use up is an incorrect length whatever SLI says.
    irb = machine.ccws(Ccw(0x02, 0x2000, 8, CD | SLI), Ccw(0x02, 0x3000, 8, SLI))
    assert irb.scsw.cstat == Cstat.INCORRECT_LENGTH
    # It ends command chaining.
    irb = machine.ccws(Ccw(0x02, 0x2000, 9, CC), Ccw(0x01, 0x2000, 1))
    assert (irb.scsw.cstat, irb.scsw.cpa, machine.unit.kept) == (0x40, 0x1008, b"12345678")


def test_immediate_operations(machine: Machine) -> None:
    assert machine.ccws(Ccw(0x03, 0, 1)).scsw.cstat == Cstat.INCORRECT_LENGTH
    assert machine.ccws(Ccw(0x03, 0, 1), flags=OrbFlags.ILS).scsw.cstat == 0
    assert machine.ccws(Ccw(0x03, 0, 1), format=0).scsw.cstat == 0
    assert machine.ccws(Ccw(0x03, 0, 0)).scsw.cstat == 0
    assert machine.ccws(Ccw(0x03, 0, 0), format=0).scsw.cstat == Cstat.PROGRAM_CHECK
    assert machine.ccws(Ccw(0x03, 0x7FFF_0000, 1, SLI)).scsw.cstat == 0  # its address is not looked at


def test_a_search_leaves_its_loop_by_the_status_modifier(machine: Machine) -> None:
    machine.unit.kept = b"?"
    irb = machine.ccws(
        Ccw(0x0B, 0x2000, 1, CC), Ccw(0x08, 0x1000), Ccw(0x02, 0x3000, 1)
    )  # SEARCH, TIC *-8, READ: found at once
    assert (irb.scsw.cstat, irb.scsw.cpa) == (0, 0x1018)
    assert machine.get(0x3000, 1) == b"?"


def test_addresses_out_of_range(machine: Machine) -> None:
    machine.unit.kept = b"data"
    step = Ccw(0x03, 0, 1, CC | SLI)
    for what, ccws in {
        "data beyond memory": [Ccw(0x02, SIZE, 4)],
        "data that ends beyond it": [Ccw(0x02, SIZE - 2, 4)],
        "data to write from there": [Ccw(0x01, SIZE, 4)],
        "a list of IDAWs": [Ccw(0x02, SIZE, 4, CcwFlags.INDIRECT)],
        "a TIC": [step, Ccw(0x08, SIZE)],
        "a CCW that is cut off": [step, Ccw(0x08, SIZE - 8)],
    }.items():
        machine.put(SIZE - 8, Ccw(0x03, 0, 1, CC | SLI).pack())  # chained to what is not there
        assert machine.ccws(*ccws).scsw.cstat == Cstat.PROGRAM_CHECK, what
        assert machine.ccws(Ccw(0x03, 0, 1, SLI)).scsw.cstat == 0
    assert machine.run(Orb(SIZE)).scsw.cstat == Cstat.PROGRAM_CHECK


def test_chains_that_loop(machine: Machine) -> None:
    step = Ccw(0x03, 0, 1, CC | SLI)
    for ccws in (
        [step, Ccw(0x08, 0x1000)],
        [step, step, Ccw(0x08, 0x1008)],
        [Ccw(0x01, 0x2000, 1, CC), Ccw(0x08, 0x1000)],
        [Ccw(0x01, 0x2000, 1, CD), Ccw(0x08, 0x1000)],  # data without end: more than it takes
    ):
        begun = machine.unit.begun
        assert machine.ccws(*ccws).scsw.cstat in (Cstat.PROGRAM_CHECK, Cstat.INCORRECT_LENGTH)
        assert machine.unit.begun == begun + 1
        assert machine.ccws(Ccw(0x03, 0, 1, SLI)).scsw.cstat == 0


def test_a_search_that_never_ends_ends(machine: Machine) -> None:
    irb = machine.ccws(Ccw(0x07, 0x2000, 1, CC), Ccw(0x08, 0x1000))
    assert irb.scsw.cstat == Cstat.PROGRAM_CHECK
    assert irb.scsw.stctl == Stctl.ALERT | Stctl.PRIMARY | Stctl.SECONDARY | Stctl.STATUS_PENDING


def test_the_longest_program(machine: Machine) -> None:
    nops = [Ccw(0x03, 0, 1, CC | SLI)] * (MAX_CHANNEL_COMMANDS - 1)
    assert machine.ccws(*nops, Ccw(0x03, 0, 1, SLI)).scsw.cstat == 0
    assert machine.ccws(*nops, Ccw(0x03, 0, 1, SLI | CC), Ccw(0x03, 0, 1, SLI)).scsw.cstat == Cstat.PROGRAM_CHECK


def test_unit_check_and_sense(machine: Machine) -> None:
    irb = machine.ccws(Ccw(0x63, 0x2000, 1, CC | SLI), Ccw(0x01, 0x2000, 1))
    assert irb.scsw.dstat == Dstat.CHANNEL_END | Dstat.DEVICE_END | Dstat.UNIT_CHECK
    assert irb.sense[0] == SenseByte0.COMMAND_REJECT
    assert machine.unit.kept == b""  # the chain ended
    machine.ccws(Ccw(0x04, 0x2000, 32))
    assert machine.get(0x2000, 1)[0] == SenseByte0.COMMAND_REJECT
    machine.ccws(Ccw(0x04, 0x2000, 32))
    assert machine.get(0x2000, 1)[0] == 0  # it is told once


def test_unit_exception_ends_the_chain(machine: Machine) -> None:
    irb = machine.ccws(Ccw(0x0F, 0, 1, CC | SLI), Ccw(0x01, 0x2000, 1))
    assert Dstat.UNIT_EXCEPTION in irb.scsw.dstat and Stctl.ALERT in irb.scsw.stctl
    assert machine.unit.kept == b""


def test_an_interrupt_in_the_middle(machine: Machine) -> None:
    machine.ccws(Ccw(0x03, 0, 1, CC | SLI), Ccw(0x03, 0, 1, SLI | CcwFlags.INTERRUPT))
    [middle] = machine.middle
    assert middle.scsw.stctl == Stctl.INTERMEDIATE | Stctl.STATUS_PENDING
    assert middle.scsw.cstat == Cstat.PROGRAM_CONTROLLED_INTERRUPTION
    assert middle.scsw.cpa == 0x1010


def test_format_0_reads_any_x8_as_tic(machine: Machine) -> None:
    machine.unit.kept = b"x"
    irb = machine.ccws(Ccw(0x03, 0, 1, CC), Ccw(0xF8, 0x1018), Ccw(0, 0, 0), Ccw(0x02, 0x3000, 1), format=0)
    assert (irb.scsw.cstat, machine.get(0x3000, 1)) == (0, b"x")
    assert machine.ccws(Ccw(0x03, 0, 1, CC | SLI), Ccw(0xF8, 0x1018)).scsw.cstat == Cstat.PROGRAM_CHECK


def test_operands_with_the_high_bit_set(machine: Machine) -> None:
    """Bit 0 of every 31-bit address must be zero: of a CCW's data, of a TIC, of a list of IDAWs, of an IDAW."""
    raw = {
        "data": bytes.fromhex("0220000480002000"),
        "a list of IDAWs": bytes.fromhex("0204000480002000"),
        "an IDAW": bytes.fromhex("0204000400003000"),
        "a TIC": bytes.fromhex("0360000100000000 0800000080001000"),
    }
    machine.unit.kept = b"data"
    machine.put(0x3000, bytes.fromhex("80002000"))
    for what, ccws in raw.items():
        machine.put(0x1000, ccws)
        machine.put(0x2000, bytes(4))
        assert machine.run(Orb(0x1000)).scsw.cstat == Cstat.PROGRAM_CHECK, what
        assert machine.get(0x2000, 4) == bytes(4), what  # the bit is not dropped


def test_a_program_does_not_suspend_itself_in_the_middle_of_data(machine: Machine) -> None:
    machine.unit.kept = b"12345678"
    irb = machine.ccws(Ccw(0x02, 0x2000, 4, CD), Ccw(0, 0x2004, 4, CcwFlags.SUSPEND), flags=OrbFlags.SPND)
    assert irb.scsw.cstat == Cstat.PROGRAM_CHECK


def test_data_that_leaves_memory_in_the_middle(machine: Machine) -> None:
    machine.unit.kept = bytes(range(16))
    irb = machine.ccws(Ccw(0x02, SIZE - 8, 8, CD), Ccw(0, SIZE, 8))
    assert irb.scsw.cstat == Cstat.PROGRAM_CHECK
    assert machine.get(SIZE - 8, 8) == bytes(range(8))


# --- a whole subchannel ---------------------------------------------------------------------------


class Subchannel:
    """A device with its eventfds."""

    def __init__(self, ground: Ground) -> None:
        self.machine = Machine(ground)
        self.unit = self.machine.unit
        self.device = ChannelDevice(ground.host, self.unit, number=0x1234)
        self.bells: list[Bell] = [ground.bell() for _ in range(3)]
        self.device.open()
        for index, bell in enumerate(self.bells):
            self.device.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, index, (bell.number,)))

    def start(self, *ccws: Ccw, flags: OrbFlags = OrbFlags.FMT) -> None:
        self.machine.put(0x1000, b"".join(one.pack() for one in ccws))
        self.device.write(0, 0, CcwIoRegion(Orb(0x1000, flags=flags).pack()).pack())

    def irb(self) -> Irb:
        """Wait for the interrupt, and read."""
        os.read(self.bells[CcwIrq.IO].number, 8)
        return self.irb_now()

    def irb_now(self) -> Irb:
        return Irb.unpack(CcwIoRegion.unpack(self.device.read(0, 0, 124)).irb)

    def control(self, command: AsyncCommand) -> None:
        self.device.write(1, 0, CcwCmdRegion(command).pack())


@pytest.fixture
def sub(ground: Ground) -> Iterator[Subchannel]:
    made = Subchannel(ground)
    yield made
    if made.unit.gate is not None:
        made.unit.gate.set()
    made.device.close()


def refused(number: int, function: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        function()
    assert caught.value.errno == number


def test_a_running_program_can_be_halted(sub: Subchannel) -> None:
    sub.unit.gate = threading.Event()
    sub.start(Ccw(0x13, 0, 1, SLI))
    refused(errno.EBUSY, lambda: sub.start(Ccw(0x03, 0, 1, SLI)))
    sub.control(AsyncCommand.HSCH)
    halted = sub.irb().scsw
    assert halted.fctl == Fctl.START | Fctl.HALT and halted.dstat == Dstat.CHANNEL_END | Dstat.DEVICE_END
    sub.unit.gate.set()  # what it still did is nobody's: no second interrupt
    sub.start(Ccw(0x03, 0, 1, SLI))
    assert sub.irb().scsw.fctl == Fctl.START
    assert sub.bells[CcwIrq.IO].rung() == 0


def test_a_defect_of_the_unit_is_a_channel_control_check(sub: Subchannel) -> None:
    sub.start(Ccw(0x17, 0, 1, SLI))
    assert sub.irb().scsw.cstat == Cstat.CHANNEL_CONTROL_CHECK
    sub.start(Ccw(0x03, 0, 1, SLI))
    assert sub.irb().scsw.cstat == 0


def test_attention_comes_after_what_goes_on(sub: Subchannel) -> None:
    sub.unit.gate = threading.Event()
    sub.start(Ccw(0x13, 0, 1, SLI))
    sub.device.attention()
    sub.device.attention()
    assert sub.bells[CcwIrq.IO].rung() == 0
    sub.unit.gate.set()
    assert sub.irb().scsw.solicited
    told = sub.irb().scsw  # once
    assert (told.solicited, told.dstat) == (False, Dstat.ATTENTION)
    assert sub.bells[CcwIrq.IO].rung() == 0


def test_suspended_without_an_interrupt(sub: Subchannel) -> None:
    sub.start(Ccw(0x03, 0, 1, SLI | CcwFlags.SUSPEND), flags=OrbFlags.FMT | OrbFlags.SPND | OrbFlags.SSIC)
    while Actl.SUSPENDED not in Scsw.unpack(sub.device.read(2, 28, 12)).actl:
        pass
    assert sub.bells[CcwIrq.IO].rung() == 0
    sub.control(AsyncCommand.CSCH)
    assert sub.irb().scsw.fctl == Fctl.CLEAR
    sub.control(AsyncCommand.HSCH)
    assert sub.irb().scsw.fctl == Fctl.HALT


def test_a_suspended_program_and_its_halt(sub: Subchannel) -> None:
    flags = OrbFlags.FMT | OrbFlags.SPND
    sub.start(Ccw(0x03, 0, 1, CC | SLI), Ccw(0x03, 0, 1, SLI | CcwFlags.SUSPEND), flags=flags)
    suspended = sub.irb().scsw
    # Its CCW was fetched, as in Hercules (channel.c) and QEMU (sch_handle_halt_func): the address is 8 beyond it.
    assert (suspended.cpa, suspended.actl) == (0x1010, Actl.SUSPENDED)
    assert suspended.stctl == Stctl.INTERMEDIATE | Stctl.STATUS_PENDING
    stored = Scsw.unpack(sub.device.read(2, 28, 12))
    assert (stored.actl, stored.stctl) == (Actl.SUSPENDED, Stctl(0))  # its status was read
    sub.control(AsyncCommand.HSCH)
    halted = sub.irb().scsw
    assert (halted.stctl, halted.dstat, halted.cpa) == (Stctl.STATUS_PENDING, Dstat(0), 0x1010)


def test_a_program_at_work_is_not_saved_and_its_status_is(sub: Subchannel, ground: Ground) -> None:
    sub.unit.gate = threading.Event()
    sub.start(Ccw(0x13, 0, 1, SLI))
    refused(errno.EBUSY, sub.device.save)
    sub.device.attention()  # for later
    sub.unit.gate.set()
    os.read(sub.bells[CcwIrq.IO].number, 8)
    saved = sub.device.save()
    lent = {name: fd.duplicate() for name, fd in saved.fds.items()}
    again = ChannelDevice(ground.host, sub.unit, number=0x1234)
    again.restore(Saved(saved.values, lent))
    assert again.save().values == saved.values
    assert sub.bells[CcwIrq.IO].rung() == 0, "it has rung, and does not again"
    sub.device, former = again, sub.device
    former.close()
    assert sub.irb_now().scsw.solicited
    assert sub.bells[CcwIrq.IO].rung() == 1
    assert sub.irb_now().scsw.dstat == Dstat.ATTENTION
    sub.start(Ccw(0x03, 0, 1, SLI))
    assert sub.irb().scsw.solicited


def test_what_does_not_wait_runs_where_it_is_started(sub: Subchannel) -> None:
    nops = [Ccw(0x03, 0, 1, CC | SLI)] * (MAX_PROMPT_COMMANDS - 1)
    sub.start(*nops, Ccw(0x03, 0, 1, SLI))
    assert sub.bells[CcwIrq.IO].rung() == 1
    sub.irb_now()
    # One more than may run there, and what may wait, go on in the device's thread: where they were.
    sub.unit.gate = threading.Event()
    sub.start(Ccw(0x01, 0x1000, 4, CC), *nops, Ccw(0x03, 0, 1, SLI))
    assert sub.irb().scsw.cpa == 0x1000 + 8 * (MAX_PROMPT_COMMANDS + 1)
    sub.start(Ccw(0x03, 0, 1, CC | SLI), Ccw(0x13, 0, 1, CC | SLI), Ccw(0x03, 0, 1, SLI))
    assert sub.bells[CcwIrq.IO].rung() == 0
    # While it is at the unit nothing else is, whatever becomes of it.
    sub.control(AsyncCommand.CSCH)
    assert sub.irb().scsw.fctl == Fctl.CLEAR
    sub.start(Ccw(0x03, 0, 1, SLI))
    assert sub.bells[CcwIrq.IO].rung() == 0
    begun = sub.unit.begun
    sub.unit.gate.set()
    assert sub.irb().scsw.cpa == 0x1008
    assert sub.unit.begun == begun + 1


def test_memory_that_must_be_asked_for_is_not_touched_where_it_is_started(sub: Subchannel, ground: Ground) -> None:
    asked: list[int] = []

    class Far:
        asks = True

        def read(self, offset: int, length: int) -> bytes:
            asked.append(threading.get_ident())
            return Ccw(0x03, 0, 1, SLI).pack()

        def write(self, offset: int, data: bytes) -> None:
            raise AssertionError

        def pin(self, offset: int, length: int, *, writable: bool) -> Pin:
            raise AssertionError

    ground.space.add(Piece(SIZE, 0x1000, Far(), 0, readonly=True))
    sub.device.write(0, 0, CcwIoRegion(Orb(SIZE).pack()).pack())
    assert sub.irb().scsw.cstat == 0
    assert asked and threading.get_ident() not in asked
    ground.space.remove(SIZE, 0x1000)
    sub.start(Ccw(0x03, 0, 1, SLI))
    assert sub.bells[CcwIrq.IO].rung() == 1


def test_regions_are_written_whole(sub: Subchannel) -> None:
    for index, offset, data in ((0, 0, bytes(123)), (0, 4, bytes(120)), (1, 0, bytes(4)), (2, 0, bytes(52))):
        refused(errno.EINVAL, lambda i=index, o=offset, d=data: sub.device.write(i, o, d))  # type: ignore[misc]
    refused(errno.EINVAL, lambda: sub.device.write(1, 0, CcwCmdRegion(AsyncCommand(3)).pack()))
    refused(errno.EINVAL, lambda: sub.device.read(3, 4, 4))
    sub.device.close()
    refused(errno.ENODEV, lambda: sub.start(Ccw(0x03, 0, 1, SLI)))


# --- records of the terminal ----------------------------------------------------------------------


def test_records() -> None:
    records = Records()
    data = record(b"\xff\xef") + record(b"abc") + b"\xff\xf1" + record(b"") + record(b"x" * (MAX_RECORD + 1)) + b"par"
    found = [one for at in range(len(data)) for one in records.feed(data[at : at + 1])]
    assert found == [b"\xff\xef", b"abc"]
    assert records.feed(record(b"tial")) == [b"partial"]


def test_the_manual_shows_a_unit_that_works(machine: Machine) -> None:
    manual = (Path(__file__).parents[4] / "docs/ccw.md").read_text()
    shown = manual.partition("\nclass Echo")[2].partition("```")[0]
    names: dict[str, object] = {
        "Unit": Unit, "SenseId": SenseId, "Transfer": Transfer, "Dstat": Dstat, "UnitCheck": UnitCheck,
        "SenseByte0": SenseByte0,
    }  # fmt: skip
    exec("class Echo" + shown, names)
    machine.unit = names["Echo"]()  # type: ignore[operator]
    program = ChannelProgram(0x1000, 0x1000)
    program.write(0x01, b"said", flags=SLI)
    into = program.read(0x02, 4)
    assert machine.run(program).scsw.cstat == 0
    assert machine.get(into.address, 4) == b"said"
