"""Channel I/O through vfiod on a real kernel: behaviour.md, section 9, as a hypervisor would use it.

An unprivileged server; subchannels by group and by cdev; guest memory a memfd; programs of the protocol's builder.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from msgspec import UNSET
from tests.lab.guest import ccw
from tests.lab.guest.pci import wait_until
from tests.lab.guest.subchannel import Way, open_file
from tests.lab.guest.vm import Vm, opened, running_vm, told
from tests.lab.topologies import CCW_DISK, CCW_TERMINAL

from vfiod.client.sync import Client
from vfiod.protocol import vfio
from vfiod.protocol.catalogue.ccw import CcwCrw, CcwIo, CcwResult, IdawFormat, OrbFields
from vfiod.protocol.channel import (
    Ccw,
    CcwFlags,
    ChannelProgram,
    Command,
    CrwErc,
    CrwRsc,
    Idaws,
    Laid,
    Orb,
    OrbFlags,
    SenseId,
    Step,
)
from vfiod.protocol.errors import RemoteError

MACHINE = "ccw"

#: Guest memory: a piece that CCWs of format 0 reach, and one that only 64-bit IDAWs reach.
LOW, HIGH, SIZE = 0x10_0000, 0x2_0000_0000, 0x10_0000
VIRTIO, VIRTIO_DISK, DISPLAY = 0x3832, 2, 0x3270
ERASE_WRITE, READ_MODIFIED = 0x05, 0x06
DONE = ["channel-end", "device-end"]
#: Milliseconds for programs that end; emulation on a busy machine is slow.
PATIENCE = 60_000


class Machine:
    """A vfiod, its guest's memory, and at most one device ``d``."""

    def __init__(self, vm: Vm, ram: int) -> None:
        self.vm = vm
        self.client = vm.client
        self.ram = ram

    def add(self, device: str, way: Way) -> None:
        name = ccw.mediated(device)
        if way == "group":
            with opened(f"/dev/vfio/{ccw.group_of(name)}") as group, opened("/dev/vfio/vfio") as container:
                self.client.device_add(
                    driver="vfio-ccw", id="d", sysfsdev=str(ccw.MDEV / name), group_fd=group, container_fd=container
                )
        else:
            with opened(str(ccw.cdev_of(name))) as fd:
                self.client.device_add(driver="vfio-ccw", id="d", fd=fd, iommufd="iommufd0")

    @contextmanager
    def having(self, device: str, way: Way) -> Iterator[None]:
        self.add(device, way)
        try:
            yield
        finally:
            assert self.vm.remove("d")

    def lay(self, laid: Laid) -> Orb:
        for address, data in laid.pieces:
            os.pwrite(self.ram, data, address - HIGH + SIZE if address >= HIGH else address - LOW)
        return laid.orb

    def read(self, step: Step, length: int | None = None) -> bytes:
        address = step.address
        return os.pread(self.ram, length or step.length, address - HIGH + SIZE if address >= HIGH else address - LOW)

    def run(self, laid: Laid) -> CcwResult:
        return self.client.ccw_request(device="d", orb=self.lay(laid).pack(), timeout_ms=PATIENCE)

    def ran(self, laid: Laid) -> None:
        """Run a program that has to end well."""
        result = self.run(laid)
        assert result.condition_code == 0, result
        assert result.decoded.device_status == DONE, result  # type: ignore[union-attr]
        assert result.decoded.subchannel_status == [], result  # type: ignore[union-attr]

    def identity(self, **options: object) -> SenseId:
        built = program(**options)
        step = built.sense_id()
        self.ran(built.build())
        return SenseId.unpack(self.read(step))

    @contextmanager
    def suspended(self) -> Iterator[Future[CcwResult]]:
        """A request that is pending until somebody ends it: its program suspends itself at once."""
        built = program()
        built.nop(CcwFlags.SUSPEND)
        built.nop()
        orb = self.lay(built.build()).pack()
        # A session of its own: its answer comes when the block has ended the program.
        with ThreadPoolExecutor(1) as pool, Client.connect(self.vm.path, timeout=100) as client:
            answer = pool.submit(client.ccw_request, device="d", orb=orb, timeout_ms=PATIENCE)
            try:
                wait_until(lambda: "suspended" in self.activity(), "the program suspended itself")
                yield answer
            finally:
                if not answer.done():
                    self.client.ccw_clear(device="d")

    def activity(self) -> list[str]:
        shown = self.client.query_subchannel(device="d")
        # It cannot be asked while a program is handed over; then it is not known.
        return ["unknown"] if shown.status is UNSET else shown.status.activity


def program(**options: object) -> ChannelProgram:
    return ChannelProgram(LOW, SIZE // 2, **options)  # type: ignore[arg-type]


def nop() -> Laid:
    built = program()
    built.nop()
    return built.build()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    directory = tmp_path_factory.mktemp("vm")
    ram = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(ram, 2 * SIZE)
    with running_vm(directory) as vm, opened("/dev/iommu") as iommu:
        vm.client.object_add(qom_type="iommufd", id="iommufd0", fd=iommu)
        vm.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=ram)
        vm.client.dma_map(iova=LOW, size=SIZE, memory_backend="ram0")
        vm.client.dma_map(iova=HIGH, size=SIZE, memory_backend="ram0", offset=SIZE)
        yield Machine(vm, ram)
    os.close(ram)


@pytest.fixture(params=["group", "cdev"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


@pytest.fixture
def disk(machine: Machine, way: Way) -> Iterator[Machine]:
    with machine.having(CCW_DISK, way):
        yield machine


@pytest.fixture
def display(machine: Machine, way: Way) -> Iterator[Machine]:
    with machine.having(CCW_TERMINAL, way):
        yield machine


def test_what_is_shown_of_it(disk: Machine) -> None:
    (device,) = disk.client.query_devices()
    assert device.driver == "vfio-ccw"
    shown = disk.client.query_subchannel(device="d")
    assert shown.device_number == int(CCW_DISK.rpartition(".")[2], 16)
    assert shown.enabled is True
    assert shown.can_halt
    assert not shown.pending


@pytest.mark.parametrize("format", [0, 1])
def test_sense_id_by_bytes_and_by_fields(disk: Machine, format: int) -> None:
    told_by_bytes = disk.identity(format=format)
    assert (told_by_bytes.cu_type, told_by_bytes.cu_model) == (VIRTIO, VIRTIO_DISK)
    built = program(format=format)
    step = built.sense_id()
    disk.lay(built.build())
    fields = OrbFields(cpa=LOW, intparm=0x1234, format=format)
    assert disk.client.ccw_request(device="d", orb_fields=fields, timeout_ms=PATIENCE).condition_code == 0
    assert SenseId.unpack(disk.read(step)) == told_by_bytes


@pytest.mark.parametrize("format", [0, 1])
def test_nop_tic_sense_id(disk: Machine, format: int) -> None:
    built = program(format=format)
    built.nop()
    built.tic(3)
    built.raw(Ccw(Command.SENSE, LOW, 1))  # jumped over
    step = built.sense_id()
    disk.ran(built.build())
    assert SenseId.unpack(disk.read(step)).cu_type == VIRTIO


@pytest.mark.parametrize(
    ("idaws", "word"),
    [
        (Idaws.FORMAT_1, IdawFormat.FORMAT_1),
        (Idaws.FORMAT_2_2K, IdawFormat.FORMAT_2_2K),
        (Idaws.FORMAT_2_4K, IdawFormat.FORMAT_2_4K),
    ],
)
@pytest.mark.parametrize("format", [0, 1])
def test_every_idaw_format(disk: Machine, idaws: Idaws, word: IdawFormat, format: int) -> None:
    options: dict[str, object] = {"format": format, "idaws": idaws}
    if idaws is not Idaws.FORMAT_1:
        options |= {"data_address": HIGH + 4096 - 8, "data_size": SIZE // 2}
    built = program(**options)
    first = built.sense_id()
    step = built.read(Command.SENSE_ID, 8192, flags=CcwFlags.SUPPRESS_LENGTH)
    disk.ran(built.build())
    assert SenseId.unpack(disk.read(first)).cu_type == SenseId.unpack(disk.read(step, 7)).cu_type == VIRTIO
    fields = OrbFields(cpa=LOW, format=format, idaws=word)
    assert disk.client.ccw_request(device="d", orb_fields=fields, timeout_ms=PATIENCE).condition_code == 0


def test_how_long_a_chain_may_be(disk: Machine) -> None:
    for length in (255, 257):
        built = program()
        for _ in range(length):
            built.nop()
        laid = built.build()
        if length == 255:
            disk.ran(laid)
            continue
        result = disk.run(laid)
        assert result.return_code == "EINVAL"
        assert result.decoded.subchannel_status == ["program-check"]  # type: ignore[union-attr]
        assert "255" in result.meaning
    disk.ran(nop())


def test_transport_mode_is_refused(disk: Machine) -> None:
    orb = Orb(LOW, flags=OrbFlags.FMT | OrbFlags.PFCH | OrbFlags.TRANSPORT).pack()
    result = disk.client.ccw_request(device="d", orb=orb, timeout_ms=PATIENCE)
    assert result.return_code == "EOPNOTSUPP"
    assert "transport" in result.meaning
    disk.ran(nop())


def test_a_program_where_no_memory_is(disk: Machine, way: Way) -> None:
    result = disk.client.ccw_request(device="d", orb=Orb(0x4000_0000).pack(), timeout_ms=PATIENCE)
    assert result.return_code == ("EINVAL" if way == "group" else "ENOENT")
    assert result.decoded.subchannel_status == ["program-check"]  # type: ignore[union-attr]
    disk.ran(nop())


def test_an_unknown_command_is_a_unit_check_with_its_sense(disk: Machine) -> None:
    built = program()
    built.read(0x02, 8)
    result = disk.run(built.build())
    assert "unit-check" in result.decoded.device_status  # type: ignore[union-attr]
    assert result.decoded.sense[0] & 0x80  # type: ignore[union-attr, index]


@pytest.mark.parametrize("how", ["halt", "clear"])
def test_a_suspended_program_is_busy_until_halted_or_cleared(disk: Machine, how: str) -> None:
    with disk.suspended() as answer:
        with pytest.raises(RemoteError, match="pending") as refused:
            disk.client.ccw_request(device="d", orb=Orb(LOW).pack(), timeout_ms=PATIENCE)
        assert refused.value.errno == "EBUSY"
        end = disk.client.ccw_halt if how == "halt" else disk.client.ccw_clear
        assert end(device="d").condition_code == 0
        result = answer.result(PATIENCE / 1000)
    assert how in result.decoded.functions  # type: ignore[union-attr]
    disk.ran(nop())


def test_reset_makes_a_suspended_subchannel_as_new(disk: Machine) -> None:
    with disk.suspended() as answer:
        disk.client.device_reset(id="d")
        wait_until(lambda: disk.activity() == [], "an idle subchannel")
        with pytest.raises(RemoteError):
            answer.result(PATIENCE / 1000)
    disk.ran(nop())


def test_a_timeout_leaves_the_program_running_until_it_is_cleared(disk: Machine) -> None:
    built = program()
    built.nop(CcwFlags.SUSPEND)
    built.nop()
    orb = disk.lay(built.build()).pack()
    with disk.client.events("CCW_IO") as events:
        with pytest.raises(RemoteError) as refused:
            disk.client.ccw_request(device="d", orb=orb, timeout_ms=200)
        assert refused.value.errno == "ETIMEDOUT"
        # vfiod would take another; the kernel says that the subchannel is busy.
        again = disk.client.ccw_request(device="d", orb=orb, timeout_ms=PATIENCE)
        assert (again.condition_code, again.return_code) == (2, "EBUSY")
        assert disk.client.ccw_clear(device="d").condition_code == 0
        event = told(events.get(timeout=60), CcwIo)
    assert event.decoded.functions == ["clear"]
    assert disk.client.query_subchannel(device="d").late == 0
    disk.ran(nop())


def test_the_terminals_screen_and_keyboard(display: Machine) -> None:
    assert display.identity().cu_type == DISPLAY
    with display.client.events("CCW_IO") as events, ccw.terminal() as connection:
        on = told(events.get(timeout=60), CcwIo)
        assert (on.solicited, on.decoded.device_status) == (False, ["device-end"])
        screen = bytes([0xC3]) + "HELLO".encode("cp037")
        built = program()
        built.write(ERASE_WRITE, screen)
        display.ran(built.build())
        assert ccw.read_record(connection) == bytes([ERASE_WRITE]) + screen
        for text in ("FIRST", "SECOND"):
            key = bytes([0x7D, 0x40, 0x40]) + text.encode("cp037")
            ccw.type_record(connection, key)
            attention = told(events.get(timeout=60), CcwIo)
            assert (attention.solicited, attention.decoded.device_status) == (False, ["attention"])
            built = program()
            step = built.read(READ_MODIFIED, 64, flags=CcwFlags.SUPPRESS_LENGTH)
            result = display.run(built.build())
            assert result.decoded.residual_count == 64 - len(key)  # type: ignore[union-attr]
            assert display.read(step, len(key)) == key


def test_without_a_terminal_a_write_needs_intervention(display: Machine) -> None:
    built = program()
    built.write(ERASE_WRITE, b"\xc3nobody")
    result = display.run(built.build())
    assert "unit-check" in result.decoded.device_status  # type: ignore[union-attr]
    assert result.decoded.sense[0] == 0x40  # type: ignore[union-attr, index]


def test_injected_channel_reports_are_events(display: Machine) -> None:
    (path,) = display.client.query_subchannel(device="d").channel_paths  # type: ignore[misc]
    with display.client.events("CCW_CRW") as events:
        for erc in (CrwErc.PERMANENT_ERROR_NOT_INITIALIZED, CrwErc.INITIALIZED):  # the path goes, and comes
            ccw.inject_crw(rsc=CrwRsc.CHANNEL_PATH, erc=erc, rsid=path)
            crw = told(events.get(timeout=60), CcwCrw).crw
            assert (crw.source, crw.event, crw.id) == (CrwRsc.CHANNEL_PATH, erc, path)
    assert [crw.event for crw in display.client.query_crw(device="d")][-2:] == [
        CrwErc.PERMANENT_ERROR_NOT_INITIALIZED,
        CrwErc.INITIALIZED,
    ]


def test_one_user_at_a_time(disk: Machine, way: Way) -> None:
    name = ccw.mediated(CCW_DISK)
    with ExitStack() as stack:
        if way == "group":
            with pytest.raises(OSError) as caught:
                open_file(stack, f"/dev/vfio/{ccw.group_of(name)}")
            assert caught.value.errno == errno.EBUSY
        else:  # its own file can be opened, and not be used
            request = bytearray(vfio.BindIommufd(open_file(stack, "/dev/iommu")).pack())
            fd = open_file(stack, str(ccw.cdev_of(name)))
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(fd, vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD, request)
            assert caught.value.errno == errno.EINVAL
    assert disk.identity().cu_type == VIRTIO
