"""Channel I/O through everything: a real server, its built-in disk and terminal, guest memory, events.

Rules are those of behaviour.md, sections 8 and 9.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.client.sync import Client
from vfiod.protocol.catalogue.ccw import CcwCrw, CcwIo, CcwResult, OrbFields
from vfiod.protocol.channel import Ccw, CcwFlags, ChannelProgram, Idaws, Irb, Laid, Orb, SenseId, Stctl
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

from .conftest import PATIENCE, Manager

MEMORY = 1 << 20
BLOCKS = 64


class Guest:
    """Guest memory, mapped here and there, and a subchannel."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.client = manager.client
        fd = manager.memfd(MEMORY)
        self.memory = mmap.mmap(fd.number, MEMORY)
        self.client.dma_map(iova=0, size=MEMORY, fd=fd)
        self.uuid = ""

    def add(self, parent: str, type: str, id: str = "dev0", driver: str = "vfio-ccw", **parameters: Any) -> None:
        if "number" in parameters:
            parameters["device-number"] = parameters.pop("number")
        self.uuid = self.client.mdev_create(parent=parent, type=type, parameters=parameters).uuid
        self.client.device_add(driver=driver, id=id, mdev=self.uuid)

    def lay(self, laid: Laid) -> bytes:
        for address, data in laid.pieces:
            self.memory[address : address + len(data)] = data
        return laid.orb.pack()

    def run(self, program: ChannelProgram | Laid, **arguments: Any) -> CcwResult:
        laid = program.build() if isinstance(program, ChannelProgram) else program
        return self.client.ccw_request(device="dev0", orb=self.lay(laid), **arguments)

    def ccws(self, *ccws: Ccw, address: int = 0x1000, format: int = 1) -> CcwResult:
        """CCWs as they are, whatever the builder would say of them."""
        data = b"".join(one.pack(format) for one in ccws)
        self.memory[address : address + len(data)] = data
        return self.client.ccw_request(device="dev0", orb_fields=OrbFields(cpa=address, format=format))


@pytest.fixture
def guest(manager: Manager) -> Iterator[Guest]:
    made = Guest(manager)
    yield made
    made.memory.close()


@pytest.fixture
def disk(guest: Guest, tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(bytes([number]) * 512 for number in range(BLOCKS)))
    guest.add("fba", "fba-ccw", file=str(path), number=0x3F)
    return path


def extent(last: int = BLOCKS - 1, mask: int = 0) -> bytes:
    return struct.pack(">BBHIII", mask, 0, 512, 0, 0, last)


def locate(operation: int, count: int, block: int) -> bytes:
    return struct.pack(">BBHI", operation, 0, count, block)


def read_program(block: int, count: int, **layout: Any) -> tuple[ChannelProgram, Any]:
    program = ChannelProgram(0x1000, 0x20000, **layout)
    program.write(0x63, extent())
    program.write(0x43, locate(6, count, block))
    return program, program.read(0x42, count * 512)


def test_who_is_there(guest: Guest, disk: Path) -> None:
    program = ChannelProgram(0x1000, 0x1000)
    sensed = program.sense_id(32)
    result = guest.run(program)
    assert result.condition_code == 0
    assert result.decoded.summary == "ended normally"  # type: ignore[union-attr]
    told = SenseId.unpack(guest.memory[sensed.address : sensed.address + 7])
    assert told == SenseId(0x6310, 0x80, 0x9336, 0x10)
    assert result.decoded.residual_count == 32 - 7  # type: ignore[union-attr]


def test_the_device_is_described(guest: Guest, disk: Path) -> None:
    [info] = guest.client.query_devices()
    assert (info.driver, info.backend, info.reset) == ("vfio-ccw", "mdev", True)
    assert [(one.name, one.size) for one in guest.client.query_regions(device="dev0")] == [
        ("io", 124), ("command", 8), ("schib", 52), ("crw", 8),
    ]  # fmt: skip
    assert [(one.name, one.reserved) for one in guest.client.query_irqs(device="dev0")] == [
        ("io", True), ("crw", True), ("req", True),
    ]  # fmt: skip
    told = guest.client.query_subchannel(device="dev0")
    assert (told.device_number, told.enabled, told.pending, told.can_halt) == (0x3F, True, False, True)
    with pytest.raises(RemoteError, match="belongs to vfiod: it becomes the reply to ccw-request"):
        guest.client.irq_start(device="dev0", index="io")
    with pytest.raises(RemoteError, match="written"):
        guest.client.region_write(device="dev0", region="io", offset=0, data=bytes(124))


@pytest.mark.parametrize("format", [0, 1])
def test_blocks_are_read(guest: Guest, disk: Path, format: int) -> None:
    for idaws in Idaws:
        program, step = read_program(5, 20, format=format, idaws=idaws)
        assert guest.run(program).decoded.summary == "ended normally"  # type: ignore[union-attr]
        data = guest.memory[step.address : step.address + 20 * 512]
        assert data == disk.read_bytes()[5 * 512 : 25 * 512]


def test_blocks_are_written(guest: Guest, disk: Path) -> None:
    program = ChannelProgram(0x1000, 0x8000)
    program.write(0x63, extent())
    program.write(0x43, locate(5, 2, 3))
    program.write(0x41, b"a" * 500, b"b" * 524)  # data chained across the blocks
    assert guest.run(program).decoded.summary == "ended normally"  # type: ignore[union-attr]
    assert disk.read_bytes()[3 * 512 : 5 * 512] == b"a" * 500 + b"b" * 524


def test_what_the_disk_refuses(guest: Guest, disk: Path) -> None:
    program = ChannelProgram(0x1000, 0x8000)
    program.write(0x63, extent())
    program.write(0x43, locate(6, 2, BLOCKS - 1))
    program.read(0x42, 1024)
    result = guest.run(program)
    assert result.decoded.device_status == ["channel-end", "device-end", "unit-check"]  # type: ignore[union-attr]
    assert result.decoded.sense[:2] == b"\0\x04"  # type: ignore[union-attr, index]
    sense = ChannelProgram(0x1000, 0x1000)
    where = sense.sense()
    guest.run(sense)
    assert guest.memory[where.address : where.address + 2] == b"\0\x04"
    unordered = ChannelProgram(0x1000, 0x1000)
    unordered.read(0x42, 512)
    assert guest.run(unordered).decoded.sense[0] == 0x80  # type: ignore[union-attr, index]


BAD_PROGRAMS = {
    "begins with a TIC": [Ccw(0x08, 0x1000)],
    "a TIC to a TIC": [Ccw(3, 0, 1, CcwFlags.CHAIN_COMMAND | CcwFlags.SUPPRESS_LENGTH), Ccw(8, 0x1010), Ccw(8, 0x1000)],
    "a TIC nowhere": [Ccw(3, 0, 1, CcwFlags.CHAIN_COMMAND | CcwFlags.SUPPRESS_LENGTH), Ccw(8, 0x7000_0000)],
    "a TIC off alignment": [Ccw(3, 0, 1, CcwFlags.CHAIN_COMMAND | CcwFlags.SUPPRESS_LENGTH), Ccw(8, 0x1004)],
    "an invalid command": [Ccw(0x10, 0x2000, 8)],
    "data where there is no memory": [Ccw(0xE4, 0x4000_0000, 7)],
    "data that begins in memory and ends outside": [Ccw(0xE4, MEMORY - 4, 7)],
    "a list of IDAWs where there is no memory": [Ccw(0xE4, 0x4000_0000, 7, CcwFlags.INDIRECT)],
    "IDAWs off alignment": [Ccw(0xE4, 0x2002, 7, CcwFlags.INDIRECT)],
    "an IDAW beyond 2 GiB": [Ccw(0xE4, 0x3000, 7, CcwFlags.INDIRECT)],
    "suspended though it may not": [Ccw(3, 0, 1, CcwFlags.SUSPEND)],
    "modified indirect addressing": [Ccw(0xE4, 0x2000, 7, CcwFlags.MODIFIED_INDIRECT)],
    "a count of zero in data chaining": [Ccw(0xE4, 0x2000, 0, CcwFlags.CHAIN_DATA), Ccw(0, 0x2000, 7)],
    "a loop": [Ccw(3, 0, 1, CcwFlags.CHAIN_COMMAND | CcwFlags.SUPPRESS_LENGTH), Ccw(8, 0x1000)],
}


def test_a_program_from_an_enemy_is_a_program_check(guest: Guest, disk: Path) -> None:
    guest.memory[0x3000:0x3004] = b"\xff\xff\xff\xff"
    for what, ccws in BAD_PROGRAMS.items():
        result = guest.ccws(*ccws)
        assert "program-check" in result.decoded.subchannel_status, what  # type: ignore[union-attr]
        test_who_is_there(guest, disk)


def test_memory_that_devices_may_not_write_is_a_protection_check(guest: Guest, disk: Path) -> None:
    fd = guest.manager.memfd(0x1000)
    guest.client.dma_map(iova=0x20_0000, size=0x1000, fd=fd, readonly=True)
    result = guest.ccws(Ccw(0xE4, 0x20_0000, 7))
    assert result.decoded.subchannel_status == ["protection-check"]  # type: ignore[union-attr]


def test_incorrect_length(guest: Guest, disk: Path) -> None:
    for count, flags, wrong in ((5, 0, True), (32, 0, True), (7, 0, False), (5, 0x20, False)):
        result = guest.ccws(Ccw(0xE4, 0x2000, count, CcwFlags(flags)))
        assert ("incorrect-length" in result.decoded.subchannel_status) is wrong  # type: ignore[union-attr]
        assert result.decoded.residual_count == max(0, count - 7)  # type: ignore[union-attr]


BAD_ORBS: list[tuple[dict[str, Any], str]] = [
    ({}, "Parameter 'orb' is missing: give the ORB's 12 bytes, or its fields"),
    ({"orb": bytes(11)}, "An ORB has 12 bytes, got 11"),
    ({"orb": bytes(12), "orb_fields": OrbFields(cpa=0)}, "exclude each other"),
    ({"orb_fields": OrbFields(cpa=0x1004)}, "0x1004 is not a multiple of 8"),
    ({"orb_fields": OrbFields(cpa=1 << 24, format=0)}, "not below 0x1000000"),
    ({"orb_fields": OrbFields(cpa=0), "scsw": b"short"}, "'scsw' has 12 bytes, got 5"),
]


def test_orbs_that_cannot_be(guest: Guest, disk: Path) -> None:
    for arguments, words in BAD_ORBS:
        with pytest.raises(RemoteError, match=words):
            guest.client.ccw_request(device="dev0", **arguments)
    test_who_is_there(guest, disk)


def test_transport_mode_is_refused_in_words(guest: Guest, disk: Path) -> None:
    result = guest.client.ccw_request(device="dev0", orb=struct.pack(">III", 0, 1 << 18 | 0xFF00, 0x1000))
    assert (result.condition_code, result.return_code) == (0, "EOPNOTSUPP")
    assert "transport mode" in result.meaning
    assert Irb.unpack(result.irb).scsw.stctl & Stctl.ALERT  # type: ignore[arg-type]


def suspended(guest: Guest) -> CcwResult:
    program = ChannelProgram(0x1000, 0x1000)
    program.nop()
    program.nop(CcwFlags.SUSPEND)
    return guest.run(program)


@pytest.mark.parametrize("command", ["halt", "clear", "reset"])
def test_a_suspended_program_keeps_the_subchannel_busy(guest: Guest, disk: Path, command: str) -> None:
    result = suspended(guest)
    assert (result.decoded.summary, result.decoded.activity) == ("suspended", ["suspended"])  # type: ignore[union-attr]
    busy = guest.ccws(Ccw(0xE4, 0x2000, 7))
    assert (busy.condition_code, busy.return_code) == (2, "EBUSY")
    assert "busy" in busy.meaning
    with guest.client.events("CCW_IO") as events:
        if command == "reset":
            guest.client.device_reset(id="dev0")
        else:
            control = guest.client.ccw_halt if command == "halt" else guest.client.ccw_clear
            assert control(device="dev0", oob=True).condition_code == 0
            told = events.get(timeout=PATIENCE).data
            assert isinstance(told, CcwIo)
            assert told.solicited
            assert command in told.decoded.functions
    test_who_is_there(guest, disk)


def unanswered(guest: Guest) -> bytes:
    """A program that suspends itself and asks for no interrupt: nothing comes until it is cleared."""
    program = ChannelProgram(0x1000, 0x1000)
    program.nop(CcwFlags.SUSPEND)
    laid = program.build()
    guest.lay(laid)
    return Orb(laid.orb.cpa, flags=laid.orb.flags | 1 << 19).pack()


def test_a_clear_after_a_timeout_is_not_late(guest: Guest, disk: Path) -> None:
    with guest.client.events("CCW_IO") as events:
        with pytest.raises(RemoteError, match=r"No interrupt ended .* ccw-clear ends it") as caught:
            guest.client.ccw_request(device="dev0", orb=unanswered(guest), timeout_ms=20)
        assert caught.value.errno == "ETIMEDOUT"
        assert guest.client.query_subchannel(device="dev0").late == 1
        guest.client.ccw_clear(device="dev0")
        told = events.get(timeout=PATIENCE).data
        assert isinstance(told, CcwIo)
        # It is the clear that ended, in time; and with it the program that was given up.
        assert (told.late, told.solicited, told.decoded.functions) == (False, True, ["clear"])
        assert guest.client.query_subchannel(device="dev0").late == 0
    test_who_is_there(guest, disk)


def test_a_clear_ends_the_pending_request(guest: Guest, disk: Path) -> None:
    with Client.connect(guest.manager.path, timeout=PATIENCE) as other:
        orb = unanswered(guest)
        answers: list[CcwResult] = []
        thread = threading.Thread(target=lambda: answers.append(other.ccw_request(device="dev0", orb=orb)))
        thread.start()
        while not guest.client.query_subchannel(device="dev0").pending:
            pass
        with pytest.raises(RemoteError, match="has a request pending") as caught:
            guest.client.ccw_request(device="dev0", orb=orb)
        assert caught.value.errno == "EBUSY"
        [holder] = guest.client.query_devices()[0].held_by
        assert holder.detail == "ccw-request"
        assert guest.client.ccw_clear(device="dev0", oob=True).meaning.startswith("accepted")
        thread.join(PATIENCE)
        assert answers[0].decoded.summary == "cleared"  # type: ignore[union-attr]


def test_a_second_request_waits_when_asked(guest: Guest, disk: Path) -> None:
    with Client.connect(guest.manager.path, timeout=PATIENCE) as other:
        orb = unanswered(guest)
        first = threading.Thread(target=lambda: other.ccw_request(device="dev0", orb=orb))
        first.start()
        while not guest.client.query_subchannel(device="dev0").pending:
            pass
        with Client.connect(guest.manager.path, timeout=PATIENCE) as third:
            program = ChannelProgram(0x4000, 0x1000)
            program.sense_id()
            second = guest.lay(program.build())
            answers: list[CcwResult] = []
            waiting = threading.Thread(
                target=lambda: answers.append(third.ccw_request(device="dev0", orb=second, queue=True))
            )
            waiting.start()
            while not guest.client.query_subchannel(device="dev0").waiting:
                pass
            guest.client.ccw_clear(device="dev0", oob=True)
            first.join(PATIENCE)
            waiting.join(PATIENCE)
            assert answers[0].decoded.summary == "ended normally"  # type: ignore[union-attr]


def test_a_reset_and_a_removal_end_the_pending_request(guest: Guest, disk: Path) -> None:
    for remove in (False, True):
        with Client.connect(guest.manager.path, timeout=PATIENCE) as other:
            orb = unanswered(guest)
            failures: list[str] = []

            def ask(other: Client = other, orb: bytes = orb, failures: list[str] = failures) -> None:
                with pytest.raises(RemoteError) as caught:
                    other.ccw_request(device="dev0", orb=orb)
                failures.append(str(caught.value))

            thread = threading.Thread(target=ask)
            thread.start()
            while not guest.client.query_subchannel(device="dev0").pending:
                pass
            if remove:
                with guest.client.events("DEVICE_DELETED") as events:
                    guest.client.device_del(id="dev0", force=True)
                    events.get(timeout=PATIENCE)
            else:
                guest.client.device_reset(id="dev0")
            thread.join(PATIENCE)
            assert ("was removed" if remove else "was reset") in failures[0]


def test_channel_io_is_for_subchannels(guest: Guest) -> None:
    guest.add("primer", "primer-pci", driver="vfio-pci")
    with pytest.raises(RemoteError, match="has driver vfio-pci: channel I/O is for devices of driver vfio-ccw"):
        guest.client.ccw_request(device="dev0", orb=bytes(12))
    guest.uuid = guest.client.mdev_create(parent="primer", type="primer-pci").uuid
    with pytest.raises(RemoteError, match="has the device API vfio-pci: use that driver, not vfio-ccw"):
        guest.client.device_add(driver="vfio-ccw", id="dev1", mdev=guest.uuid)


def test_a_disk_is_one(guest: Guest, disk: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="no more of type 'fba-ccw'"):
        guest.client.mdev_create(parent="fba", type="fba-ccw", parameters={"file": str(disk)})
    with pytest.raises(RemoteError, match="dev0"):
        guest.client.mdev_destroy(uuid=guest.uuid)


BAD_DISKS: list[tuple[dict[str, Any], str]] = [
    ({}, "'file' is the absolute path"),
    ({"file": "/nowhere"}, "'file': /nowhere: No such file"),
    ({"file": "/dev/null"}, "regular file of whole blocks"),
    ({"file": "/dev/null", "readonly": 1}, "'readonly' is true or false"),
    ({"file": "/dev/null", "device-number": 1 << 16}, "'device-number' is a number"),
]


def test_disks_that_cannot_be(guest: Guest) -> None:
    guest.client.query_mdev_types()
    before = guest.manager.open_fds()
    for parameters, words in BAD_DISKS:
        with pytest.raises(RemoteError, match=words):
            guest.client.mdev_create(parent="fba", type="fba-ccw", parameters=parameters)
    assert guest.manager.open_fds() == before


# --- the terminal ---------------------------------------------------------------------------------


class Line:
    """The operator's end of a terminal's line."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data.replace(b"\xff", b"\xff\xff") + b"\xff\xef")

    def receive(self) -> bytes:
        found = b""
        while not found.endswith(b"\xff\xef"):
            found += self.socket.recv(4096)
        return found[:-2].replace(b"\xff\xff", b"\xff")


def test_the_terminal(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "line"
    guest.add("terminal3270", "terminal3270-ccw", line=f"socket:{path}")
    program = ChannelProgram(0x1000, 0x2000)
    program.write(0x05, b"\xc3HELLO\xff")
    result = guest.run(program)
    assert result.decoded.sense[0] == 0x40  # type: ignore[union-attr, index]  # it is switched off
    with guest.client.events("CCW_IO", "CCW_CRW") as events:
        line = Line(path)
        told = events.get(timeout=PATIENCE).data
        assert isinstance(told, CcwCrw)
        assert told.crw.words == "channel path 0x0070: initialized"
        assert guest.client.query_crw(device="dev0") == [told.crw]
        assert guest.run(program).decoded.summary == "ended normally"  # type: ignore[union-attr]
        assert line.receive() == b"\x05\xc3HELLO\xff"
        whole = ChannelProgram(0x1000, 0x2000)
        screen = whole.read(0x02, 1923)
        assert guest.run(whole).decoded.summary == "ended normally"  # type: ignore[union-attr]
        assert guest.memory[screen.address : screen.address + 9] == b"\x60\x40\x40HELLO\xff"
        line.send(b"\x7d\x40\x40answer")
        io = events.get(timeout=PATIENCE).data
        assert isinstance(io, CcwIo)
        assert (io.solicited, io.late, io.decoded.device_status) == (False, False, ["attention"])
        read = ChannelProgram(0x1000, 0x2000)
        into = read.read(0x06, 100, flags=CcwFlags.SUPPRESS_LENGTH)
        assert guest.run(read).decoded.residual_count == 100 - 9  # type: ignore[union-attr]
        assert guest.memory[into.address : into.address + 9] == b"\x7d\x40\x40answer"
        line.socket.close()
        assert isinstance(events.get(timeout=PATIENCE).data, CcwCrw)


def test_the_terminal_on_a_pty(guest: Guest) -> None:
    guest.add("terminal3270", "terminal3270-ccw")
    [told] = [one for one in guest.client.query_mdev_types() if one.parent == "terminal3270"]
    with FileDescriptor(os.open(told.devices[0].attributes["line"], os.O_RDWR | os.O_NOCTTY)) as line:
        program = ChannelProgram(0x1000, 0x2000)
        program.write(0x01, b"\xc3hi")
        guest.run(program)
        assert os.read(line.number, 100) == b"\x01\xc3hi\xff\xef"


# --- the matrix -----------------------------------------------------------------------------------


def test_an_ap_matrix(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "control"
    guest.add("matrix", "matrix-ap", driver="vfio-ap", control=f"socket:{path}")
    [info] = guest.client.query_devices()
    assert (info.driver, info.regions, info.irq_indexes, info.reset) == ("vfio-ap", 0, 2, True)
    guest.client.device_reset(id="dev0")
    with socket.socket(socket.AF_UNIX) as control, guest.client.events("AP_CONFIG_CHANGED") as events:
        control.settimeout(PATIENCE)
        control.connect(str(path))
        control.sendall(b"assign_adapter 0x05\nassign_domain 0xab\nassign_adapter 900\n")
        assert control.recv(1000).startswith(b"ok\n")
        assert events.get(timeout=PATIENCE).data.count in (1, 2)  # type: ignore[union-attr]
    [told] = [one for one in guest.client.query_mdev_types() if one.parent == "matrix"]
    assert told.devices[0].attributes["matrix"] == "05.00ab"
