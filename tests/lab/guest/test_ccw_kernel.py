"""Channel I/O on a real kernel with plain system calls, and no vfiod: what section 9 of behaviour.md says of vfio-ccw.

Structures are the protocol package's: on this big-endian machine the kernel checks every one of them.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

import pytest
from tests.lab.guest import ccw
from tests.lab.guest.subchannel import ASYNC, CRW, HIGH, HIGH_SIZE, LOW, LOW_SIZE, SCHIB, Subchannel, Way, opened
from tests.lab.topologies import CCW_DISK, CCW_TERMINAL

from vfiod.protocol import vfio
from vfiod.protocol.channel import (
    Actl,
    Ccw,
    CcwFlags,
    ChannelProgram,
    Command,
    Crw,
    CrwErc,
    CrwRsc,
    Cstat,
    Dstat,
    Fctl,
    Idaws,
    Irb,
    Laid,
    Orb,
    OrbFlags,
    PmcwFlags,
    Schib,
    SenseId,
)
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwIrq, CcwSubtype

MACHINE = "ccw"

END = Dstat.CHANNEL_END | Dstat.DEVICE_END
#: Control unit and device of virtio: type 0x3832, the model is virtio's device id.
VIRTIO, VIRTIO_DISK = 0x3832, 2
#: The 3270's commands (QEMU's hw/s390x/3270-ccw.h, Linux' raw3270.h).
ERASE_WRITE, READ_MODIFIED = 0x05, 0x06


@pytest.fixture(params=["group", "cdev"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


@pytest.fixture
def disk(way: Way) -> Iterator[Subchannel]:
    with opened(CCW_DISK, way) as subchannel:
        yield subchannel


@pytest.fixture
def display(way: Way) -> Iterator[Subchannel]:
    with opened(CCW_TERMINAL, way) as subchannel:
        yield subchannel


def program(**options: object) -> ChannelProgram:
    return ChannelProgram(LOW, LOW_SIZE, **options)  # type: ignore[arg-type]


def suspended() -> Laid:
    built = program()
    built.nop(CcwFlags.SUSPEND)
    built.nop()
    return built.build()


def test_this_machine_is_big_endian() -> None:
    assert sys.byteorder == "big"


def test_regions_and_interrupts(disk: Subchannel) -> None:
    assert disk.info.flags == vfio.DeviceFlags.RESET | vfio.DeviceFlags.CCW
    assert (disk.info.num_regions, disk.info.num_irqs) == (4, 3)
    assert [region.size for region in disk.regions] == [124, 8, 52, 8]
    for index, subtype in ((ASYNC, CcwSubtype.ASYNC_CMD), (SCHIB, CcwSubtype.SCHIB), (CRW, CcwSubtype.CRW)):
        kind = disk.regions[index].type
        assert kind is not None
        assert (kind.type, kind.subtype) == (vfio.RegionType.CCW, subtype)


@pytest.mark.parametrize("format", [0, 1])
def test_sense_id(disk: Subchannel, format: int) -> None:
    built = program(format=format)
    step = built.sense_id()
    irb = disk.run(built.build())
    assert (irb.scsw.dstat, irb.scsw.cstat) == (END, Cstat(0))
    told = SenseId.unpack(disk.read(step.address, step.length))
    assert (told.cu_type, told.cu_model) == (VIRTIO, VIRTIO_DISK)


@pytest.mark.parametrize("format", [0, 1])
def test_nop_tic_and_a_gap_between(disk: Subchannel, format: int) -> None:
    built = program(format=format)
    built.nop()
    jump = built.tic(3)
    built.raw(Ccw(Command.SENSE, LOW, 1))  # jumped over: it would end the program
    step = built.sense_id()
    assert jump.number == 1
    laid = built.build()
    irb = disk.run(laid)
    assert (irb.scsw.dstat, irb.scsw.cstat) == (END, Cstat(0))
    assert SenseId.unpack(disk.read(step.address, step.length)).cu_type == VIRTIO


@pytest.mark.parametrize("idaws", [Idaws.FORMAT_1, Idaws.FORMAT_2_2K, Idaws.FORMAT_2_4K])
@pytest.mark.parametrize("format", [0, 1])
def test_every_idaw_format_across_a_boundary(disk: Subchannel, idaws: Idaws, format: int) -> None:
    high = idaws is not Idaws.FORMAT_1
    start = (HIGH if high else LOW + 0x8_0000) + 4096 - 8  # 8 bytes before a page ends ...
    built = ChannelProgram(LOW, 0x1_0000, format=format, idaws=idaws, data_address=start, data_size=HIGH_SIZE // 2)
    built.read(Command.SENSE_ID, 4, flags=CcwFlags.SUPPRESS_LENGTH)
    step = built.sense_id()  # ... and this has to begin at the page's end
    assert step.address == start + 8
    last = built.read(Command.SENSE_ID, 2048, flags=CcwFlags.SUPPRESS_LENGTH)  # a list of two IDAWs or more
    irb = disk.run(built.build())
    assert (irb.scsw.dstat, irb.scsw.cstat) == (END, Cstat(0))
    for one in (step, last):
        assert SenseId.unpack(disk.read(one.address, 7)).cu_type == VIRTIO


@pytest.mark.parametrize("idaws", [Idaws.FORMAT_1, Idaws.FORMAT_2_2K, Idaws.FORMAT_2_4K])
def test_data_is_spread_over_idaws(disk: Subchannel, idaws: Idaws) -> None:
    """Three bytes at one block's end, the rest at the start of another that does not follow it."""
    place, elsewhere, listed = LOW + 0x8000 - 3, LOW + 0x2_0000, LOW + 0x100
    disk.write(listed, b"".join(address.to_bytes(idaws.width, "big") for address in (place, elsewhere)))
    flags = OrbFlags.FMT | OrbFlags.PFCH
    flags |= OrbFlags(0) if idaws is Idaws.FORMAT_1 else OrbFlags.C64
    flags |= OrbFlags.I2K if idaws is Idaws.FORMAT_2_2K else OrbFlags(0)
    sense = Ccw(Command.SENSE_ID, listed, 7, CcwFlags.INDIRECT | CcwFlags.SUPPRESS_LENGTH)
    irb = disk.run(Laid(Orb(LOW, flags=flags), ((LOW, sense.pack()),), (sense,)))
    assert (irb.scsw.dstat, irb.scsw.cstat) == (END, Cstat(0))
    whole = bytes([0xFF]) + VIRTIO.to_bytes(2, "big") + bytes([VIRTIO_DISK]) + bytes(3)
    assert disk.read(place, 3) == whole[:3]
    # QEMU 10.0 begins with its own data again at every IDAW (hw/s390x/css.c, ccw_dstream_rw_ida), and what is to be
    # seen here is the place: that the kernel translated the second IDAW, too.
    assert disk.read(elsewhere, 4) in (whole[3:], whole[:4])


@pytest.mark.parametrize(("length", "result"), [(255, 0), (256, 0), (257, errno.EINVAL)])
def test_how_long_a_chain_may_be(disk: Subchannel, length: int, result: int) -> None:
    built = program()
    for _ in range(length):
        built.nop()
    orb = disk.lay(built.build())
    assert disk.start(orb) == result
    assert disk.io().ret_code == -result
    if not result:
        disk.wait(CcwIrq.IO)
        assert Irb.unpack(disk.io().irb).scsw.dstat == END


def test_without_prefetch_it_runs_all_the_same(disk: Subchannel) -> None:
    built = program()
    built.nop()
    assert disk.run(built.build(prefetch=False)).scsw.dstat == END


def test_transport_mode_is_refused(disk: Subchannel) -> None:
    assert disk.start(Orb(LOW, flags=OrbFlags.FMT | OrbFlags.PFCH | OrbFlags.TRANSPORT)) == errno.EOPNOTSUPP
    assert disk.io().ret_code == -errno.EOPNOTSUPP


@pytest.mark.parametrize("function", [Fctl.HALT, Fctl.CLEAR])
def test_the_io_region_starts_and_nothing_else(disk: Subchannel, function: Fctl) -> None:
    assert disk.start(Orb(LOW), function) == errno.EOPNOTSUPP


def test_a_program_in_memory_that_is_not_there(disk: Subchannel, way: Way) -> None:
    assert disk.start(Orb(0x4000_0000)) == (errno.EINVAL if way == "group" else errno.ENOENT)


@pytest.mark.parametrize("command", AsyncCommand)
def test_a_suspended_program_is_busy_until_halted_or_cleared(disk: Subchannel, command: AsyncCommand) -> None:
    orb = disk.lay(suspended())
    disk.fired(CcwIrq.IO)
    assert disk.start(orb) == 0
    assert disk.start(orb) == errno.EBUSY
    assert Actl.SUSPENDED in Schib.unpack(disk.look(SCHIB)).scsw.actl
    disk.fired(CcwIrq.IO)
    assert disk.control(command) == 0
    disk.wait(CcwIrq.IO)
    scsw = Irb.unpack(disk.io().irb).scsw
    assert (Fctl.HALT if command is AsyncCommand.HSCH else Fctl.CLEAR) in scsw.fctl
    built = program()
    built.nop()
    assert disk.run(built.build()).scsw.dstat == END


def test_reset_ends_a_suspended_program(disk: Subchannel) -> None:
    orb = disk.lay(suspended())
    assert disk.start(orb) == 0
    assert disk.reset() == 0
    schib = Schib.unpack(disk.look(SCHIB))
    assert schib.scsw.actl == Actl(0)
    disk.fired(CcwIrq.IO)
    built = program()
    built.nop()
    assert disk.run(built.build()).scsw.dstat == END


def test_schib(disk: Subchannel) -> None:
    schib = Schib.unpack(disk.look(SCHIB))
    assert schib.pmcw.flags >= PmcwFlags.DNV | PmcwFlags.ENA
    assert schib.pmcw.dev == int(CCW_DISK.rpartition(".")[2], 16)
    assert schib.pmcw.pim == 0x80


def test_a_command_the_device_does_not_know_ends_with_a_unit_check(disk: Subchannel) -> None:
    built = program()
    built.read(0x02, 8)
    irb = disk.run(built.build())
    assert Dstat.UNIT_CHECK in irb.scsw.dstat
    assert irb.sense[0] & 0x80  # command reject, in the IRB itself


# --- the terminal ---------------------------------------------------------------------------


def test_the_terminal_says_what_it_is(display: Subchannel) -> None:
    built = program()
    step = built.sense_id()
    display.run(built.build())
    assert SenseId.unpack(display.read(step.address, step.length)).cu_type == 0x3270


def test_screen_and_keyboard(display: Subchannel) -> None:
    display.fired(CcwIrq.IO)
    with ccw.terminal() as connection:
        display.wait(CcwIrq.IO)
        assert Irb.unpack(display.io().irb).scsw.dstat == Dstat.DEVICE_END  # it was switched on
        screen = bytes([0xC3]) + "HELLO".encode("cp037")
        built = program()
        built.write(ERASE_WRITE, screen)
        irb = display.run(built.build())
        assert (irb.scsw.dstat, irb.scsw.cstat) == (END, Cstat(0))
        assert ccw.read_record(connection) == bytes([ERASE_WRITE]) + screen
        key = bytes([0x7D, 0x40, 0x40]) + "VFIOD\xff".encode("cp037")  # ENTER, the cursor at 0, what was typed
        ccw.type_record(connection, key)
        display.wait(CcwIrq.IO)
        scsw = Irb.unpack(display.io().irb).scsw
        assert scsw.dstat == Dstat.ATTENTION
        assert not scsw.solicited
        built = program()
        step = built.read(READ_MODIFIED, 64, flags=CcwFlags.SUPPRESS_LENGTH)
        irb = display.run(built.build())
        assert irb.scsw.dstat == END
        assert irb.scsw.count == 64 - len(key)
        assert display.read(step.address, len(key)) == key
    display.wait(CcwIrq.IO)
    assert Irb.unpack(display.io().irb).scsw.dstat == Dstat.DEVICE_END  # it was switched off


def test_injected_channel_reports(display: Subchannel) -> None:
    path = Schib.unpack(display.look(SCHIB)).pmcw.chpid[0]
    for erc in (CrwErc.PERMANENT_ERROR_NOT_INITIALIZED, CrwErc.INITIALIZED):  # the path goes, and comes
        ccw.inject_crw(rsc=CrwRsc.CHANNEL_PATH, erc=erc, rsid=path)
        display.wait(CcwIrq.CRW)
        told = Crw.unpack(display.look(CRW)[:4])
        assert (told.rsc, told.erc, told.rsid) == (CrwRsc.CHANNEL_PATH, erc, path)
    assert display.look(CRW) == bytes(8)
