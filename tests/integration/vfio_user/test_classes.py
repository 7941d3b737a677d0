"""Devices of other classes than PCI, served by a program of their own and by the export of another vfiod."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.integration.exports.hypervisor import Hypervisor, Refused, eventfd, silent

from vfiod.client.methods.values import VectorFds
from vfiod.client.spawn import own_server
from vfiod.client.sync import Client
from vfiod.protocol import vfio_user
from vfiod.protocol.catalogue.ccw import CcwCrw, CcwIo, CcwResult
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.channel import (
    Ccw,
    CcwFlags,
    ChannelProgram,
    Irb,
    Laid,
    Orb,
    OrbFlags,
    SenseId,
    explain_irb,
)
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwCmdRegion, CcwIoRegion, CcwIrq

from .conftest import PATIENCE, Bench, rung

MEMORY = 1 << 20
BLOCKS = 64
LEVEL, EDGE, MESSAGES = "irq0", "irq1", "irq2"
SCRATCH, RAISE, ACK = 0x04, 0x10, 0x14
DRIVERS = {
    "primer-platform": "vfio-platform",
    "fba-ccw": "vfio-ccw",
    "terminal3270-ccw": "vfio-ccw",
    "matrix-ap": "vfio-ap",
    "primer-pci": "vfio-pci",
}
PARENTS = {
    "primer-platform": "platform",
    "fba-ccw": "fba",
    "terminal3270-ccw": "terminal3270",
    "matrix-ap": "matrix",
}


class Class(Bench):
    """A bench whose programs serve the built-in devices."""

    def __init__(self, bench: Bench, tmp_path: Path, how: str, stack: ExitStack) -> None:
        self.__dict__ = bench.__dict__
        self.how = how
        self.stack = stack
        self.tmp = tmp_path
        self.guest: mmap.mmap
        self.other: Client

    def serve(self, type: str, **parameters: Any) -> None:
        """Serve it, by a program or by another vfiod."""
        self.path.unlink(missing_ok=True)
        if self.how == "program":
            command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", f"--type={type}"]
            command += [f"--socket-path={self.path}"]
            command += [f"--parameter={key}={value}" for key, value in parameters.items()]
            self.programs.append(subprocess.Popen(command))
            while not self.path.exists():
                assert self.programs[-1].poll() is None, "the program ended"
                time.sleep(0.01)
            return
        place = self.tmp / "other"
        place.mkdir()
        server = self.stack.enter_context(own_server(place, [f"--allow-path={self.tmp}"], name="vm2"))
        self.other = self.stack.enter_context(Client.connect(server.path, timeout=PATIENCE))
        uuid = self.other.mdev_create(parent=PARENTS[type], type=type, parameters=parameters).uuid
        self.other.device_add(driver=DRIVERS[type], id="it", mdev=uuid, export=str(self.path))

    def end(self) -> None:
        """The program dies."""
        program = self.programs[-1]
        program.kill()
        program.wait()

    def ram(self) -> None:
        """Guest memory at 0."""
        self.guest = mmap.mmap(self.memory(0, MEMORY).number, MEMORY)

    # --- channel programs ---
    def disk(self, number: int = 0) -> Path:
        path = self.tmp / "disk"
        path.write_bytes(b"".join(bytes([number]) * 512 for number in range(BLOCKS)))
        self.serve("fba-ccw", file=str(path), **{"device-number": number})
        return path

    def lay(self, laid: Laid) -> bytes:
        for address, data in laid.pieces:
            self.guest[address : address + len(data)] = data
        return laid.orb.pack()

    def run(self, program: ChannelProgram, **arguments: Any) -> CcwResult:
        return self.client.ccw_request(device="dev0", orb=self.lay(program.build()), **arguments)

    def check_disk(self, path: Path, block: int = 5) -> None:
        """Blocks are read, and are those of the file."""
        program, step = reading(block, 20)
        assert summary(self.run(program)) == "ended normally"
        assert self.guest[step.address : step.address + 20 * 512] == path.read_bytes()[block * 512 :][: 20 * 512]

    def suspended(self) -> bytes:
        """A program that suspends itself and asks for no interrupt: nothing comes until it is ended."""
        program = ChannelProgram(0x1000, 0x1000)
        program.nop(CcwFlags.SUSPEND)
        laid = program.build()
        self.lay(laid)
        return Orb(laid.orb.cpa, flags=laid.orb.flags | 1 << 19).pack()

    def pending(self, answers: list[CcwResult]) -> threading.Thread:
        """Somebody waits for such a program."""
        orb = self.suspended()

        def ask() -> None:
            with Client.connect(self.server.path, timeout=PATIENCE) as other:
                answers.append(other.ccw_request(device="dev0", orb=orb))

        thread = threading.Thread(target=ask)
        thread.start()
        # Handed over: the device says so itself, and not only vfiod.
        self.until(lambda: self.functions() == ["start"])
        return thread

    def functions(self) -> list[str]:
        """What the subchannel does, as it says itself; nothing while it cannot be asked."""
        status = self.client.query_subchannel(device="dev0").status
        return [] if status is UNSET else status.functions

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.005)


def summary(result: CcwResult) -> str:
    return result.decoded.summary  # type: ignore[union-attr]


def extent() -> bytes:
    return struct.pack(">BBHIII", 0, 0, 512, 0, 0, BLOCKS - 1)


def reading(block: int, count: int) -> tuple[ChannelProgram, Any]:
    program = ChannelProgram(0x1000, 0x20000)
    program.write(0x63, extent())
    program.write(0x43, struct.pack(">BBHI", 6, 0, count, block))
    return program, program.read(0x42, count * 512)


@pytest.fixture(params=["program", "export"])
def served(bench: Bench, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Class]:
    with ExitStack() as stack:
        yield Class(bench, tmp_path, request.param, stack)
        if bench.client.query_devices():
            bench.client.device_del(id="dev0", force=True)
            bench.wait("DEVICE_DELETED")


@pytest.fixture
def program(bench: Bench, tmp_path: Path) -> Iterator[Class]:
    with ExitStack() as stack:
        yield Class(bench, tmp_path, "program", stack)


# --- platform -------------------------------------------------------------------------------------


def test_a_platform_device(served: Class) -> None:
    served.serve("primer-platform")
    served.add(driver="vfio-platform")
    [told] = served.client.query_devices()
    assert (told.driver, told.backend, told.regions, told.irq_indexes) == ("vfio-platform", "vfio-user", 2, 3)
    assert [(one.name, one.count) for one in served.client.query_irqs(device="dev0")] == [
        (LEVEL, 1), (EDGE, 1), (MESSAGES, 0),
    ]  # fmt: skip
    served.set(SCRATCH, 0x1234_5678, "region0")
    assert served.get(SCRATCH, "region0") == 0x1234_5678 ^ 0xFFFF_FFFF
    with (
        served.client.region_map(device="dev0", region="region1") as reply,
        mmap.mmap(reply.map_fd.number, 0x1000, offset=reply.offset + reply.areas[0].offset) as window,
    ):
        window[0:4] = b"\x2a\0\0\0"
    assert served.get(0, "region1") == 42
    served.client.region_unmap(device="dev0", region="region1")
    served.client.device_reset(id="dev0")
    assert served.get(SCRATCH, "region0") == 0xFFFF_FFFF


def test_its_interrupts_direct(served: Class) -> None:
    """The level's line stays up until the device is told; completing it by the eventfd makes it fire again."""
    served.serve("primer-platform")
    served.add(driver="vfio-platform")
    level, resample, edge = served.eventfd(), served.eventfd(), served.eventfd()
    started = served.client.irq_start(
        device="dev0",
        eventfds=[
            VectorFds(vector=0, index=LEVEL, trigger=level, resample=resample),
            VectorFds(vector=0, index=EDGE, trigger=edge),
        ],
    )
    assert [one.mode for one in started.irqs] == ["direct", "direct"]
    served.set(RAISE, 0, "region0")
    assert rung(level) == 1
    os.eventfd_write(resample.number, 1)
    assert rung(level) == 1, "its line is still up"
    served.set(ACK, 0, "region0")
    os.eventfd_write(resample.number, 1)
    served.set(RAISE, 1, "region0")
    assert rung(edge) == 1
    served.client.irq_stop(device="dev0", index=LEVEL)
    served.set(RAISE, 0, "region0")  # nobody hears it now, and it fires when somebody does
    again = served.eventfd()
    served.client.irq_start(
        device="dev0", index=LEVEL, eventfds=[VectorFds(vector=0, trigger=again, resample=resample)]
    )
    assert rung(again) == 1
    served.client.device_reset(id="dev0")
    served.set(RAISE, 0, "region0")
    assert rung(again) == 1


def test_its_interrupts_relayed_masked_and_completed(served: Class) -> None:
    served.serve("primer-platform")
    served.add(driver="vfio-platform")
    level = served.eventfd()
    served.client.irq_start(device="dev0", index=LEVEL, mode="relayed", eventfds=[VectorFds(vector=0, trigger=level)])
    served.client.irq_mask(device="dev0", index=LEVEL)
    served.set(RAISE, 0, "region0")
    served.client.irq_unmask(device="dev0", index=LEVEL)
    assert rung(level) == 1
    served.client.irq_eoi(device="dev0", index=LEVEL)
    assert rung(level) == 1, "its line is still up"
    served.set(ACK, 0, "region0")  # which completes it, being an access
    served.set(RAISE, 0, "region0")
    assert rung(level) == 1
    with pytest.raises(RemoteError, match="cannot be masked"):
        served.client.irq_mask(device="dev0", index=EDGE)
    with pytest.raises(RemoteError, match="has no interrupt"):
        served.client.irq_start(device="dev0", index=MESSAGES, eventfds=[VectorFds(vector=0, trigger=served.eventfd())])


def test_a_platform_device_comes_back(program: Class) -> None:
    program.serve("primer-platform")
    program.add(driver="vfio-platform", reconnect_ms=20)
    level, resample, edge = program.eventfd(), program.eventfd(), program.eventfd()
    program.client.irq_start(
        device="dev0",
        eventfds=[
            VectorFds(vector=0, index=LEVEL, trigger=level, resample=resample),
            VectorFds(vector=0, index=EDGE, trigger=edge),
        ],
    )
    program.end()
    assert program.wait("DEVICE_ERROR").device == "dev0"
    with pytest.raises(RemoteError, match="the server is gone"):
        program.get(SCRATCH, "region0")
    program.serve("primer-platform")
    assert program.wait("DEVICE_RECONNECTED").remapped == ["region1"]
    program.set(RAISE, 0, "region0")
    assert rung(level) == 1
    program.set(ACK, 0, "region0")
    os.eventfd_write(resample.number, 1)
    program.set(RAISE, 1, "region0")
    assert rung(edge) == 1
    program.end()
    program.wait("DEVICE_ERROR")
    program.serve("primer-platform", level=2)
    assert "Another device answers" in program.wait("DEVICE_ERROR").reason


# --- the disk -------------------------------------------------------------------------------------


def test_a_disk(served: Class) -> None:
    path = served.disk(0x3F)
    served.ram()
    served.add(driver="vfio-ccw")
    [told] = served.client.query_devices()
    assert (told.driver, told.backend, told.reset) == ("vfio-ccw", "vfio-user", True)
    assert [(one.name, one.size) for one in served.client.query_regions(device="dev0")] == [
        ("io", 124), ("command", 8), ("schib", 52), ("crw", 8),
    ]  # fmt: skip
    known = served.client.query_subchannel(device="dev0")
    assert (known.device_number, known.enabled, known.can_halt) == (0x3F, True, True)
    program = ChannelProgram(0x1000, 0x1000)
    sensed = program.sense_id(32)
    result = served.run(program)
    assert (summary(result), result.decoded.residual_count) == ("ended normally", 32 - 7)  # type: ignore[union-attr]
    assert SenseId.unpack(served.guest[sensed.address : sensed.address + 7]) == SenseId(0x6310, 0x80, 0x9336, 0x10)
    served.check_disk(path)
    writing = ChannelProgram(0x1000, 0x8000)
    writing.write(0x63, extent())
    writing.write(0x43, struct.pack(">BBHI", 5, 0, 2, 3))
    writing.write(0x41, b"a" * 500, b"b" * 524)
    assert summary(served.run(writing)) == "ended normally"
    assert path.read_bytes()[3 * 512 : 5 * 512] == b"a" * 500 + b"b" * 524
    beyond, _ = reading(BLOCKS - 1, 2)
    refused = served.run(beyond)
    assert refused.decoded.sense[:2] == b"\0\x04"  # type: ignore[union-attr, index]
    served.client.dma_unmap(iova=0, size=MEMORY)
    assert "program-check" in served.run(program).decoded.subchannel_status  # type: ignore[union-attr]


@pytest.mark.parametrize("command", ["halt", "clear"])
def test_a_program_is_halted_and_cleared(served: Class, command: str) -> None:
    path = served.disk()
    served.ram()
    served.add(driver="vfio-ccw")
    answers: list[CcwResult] = []
    asking = served.pending(answers)
    control = served.client.ccw_halt if command == "halt" else served.client.ccw_clear
    assert control(device="dev0").condition_code == 0
    asking.join(PATIENCE)
    assert command in answers[0].decoded.functions  # type: ignore[union-attr]
    served.check_disk(path)


def test_busy_and_reset(served: Class) -> None:
    path = served.disk()
    served.ram()
    served.add(driver="vfio-ccw")
    program = ChannelProgram(0x1000, 0x1000)
    program.nop(CcwFlags.SUSPEND)
    assert summary(served.run(program)) == "suspended"
    busy = served.run(reading(0, 1)[0])
    assert (busy.condition_code, busy.return_code) == (2, "EBUSY")
    served.client.device_reset(id="dev0")
    served.check_disk(path)


def test_a_disk_dies_and_comes_back(program: Class) -> None:
    path = program.disk(7)
    program.ram()
    program.add(driver="vfio-ccw", reconnect_ms=20)
    answers: list[CcwResult] = []
    asking = program.pending(answers)
    program.end()
    asking.join(PATIENCE)
    assert answers[0].decoded.deferred_condition_code == 3  # type: ignore[union-attr]
    assert program.wait("DEVICE_ERROR").device == "dev0"
    gone = program.run(reading(0, 1)[0])
    assert (gone.condition_code, gone.return_code) == (3, "ENOTCONN")
    program.disk(7)
    assert program.wait("DEVICE_RECONNECTED").remapped == []
    program.check_disk(path)
    program.end()
    program.wait("DEVICE_ERROR")
    program.disk(8)
    assert "its device number is 0008, it was 0007" in program.wait("DEVICE_ERROR").reason
    program.client.device_del(id="dev0")
    program.wait("DEVICE_DELETED")


def test_a_disk_that_stops_answering(program: Class) -> None:
    path = program.disk()
    program.ram()
    program.add(driver="vfio-ccw", x_msg_timeout=500)
    program.check_disk(path)
    os.kill(program.programs[-1].pid, 19)  # SIGSTOP
    with pytest.raises(RemoteError) as caught:
        program.run(reading(0, 1)[0])
    assert caught.value.errno == "ETIMEDOUT"
    os.kill(program.programs[-1].pid, 18)  # SIGCONT


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


def converse(bench: Class, path: Path) -> None:
    """Somebody switches the terminal on, reads what is written to it, answers, and switches it off."""
    write = ChannelProgram(0x1000, 0x2000)
    write.write(0x05, b"\xc3HELLO\xff")
    assert bench.run(write).decoded.sense[0] == 0x40  # type: ignore[union-attr, index]  # it is switched off
    with bench.client.events("CCW_IO", "CCW_CRW") as events:
        line = Line(path)
        report = events.get(timeout=PATIENCE).data
        assert isinstance(report, CcwCrw)
        assert bench.client.query_crw(device="dev0")[-1] == report.crw
        assert summary(bench.run(write)) == "ended normally"
        assert line.receive() == b"\x05\xc3HELLO\xff"
        line.send(b"\x7d\x40\x40answer")
        io = events.get(timeout=PATIENCE).data
        assert isinstance(io, CcwIo)
        assert (io.solicited, io.late, io.decoded.device_status) == (False, False, ["attention"])
        read = ChannelProgram(0x1000, 0x2000)
        into = read.read(0x06, 100, flags=CcwFlags.SUPPRESS_LENGTH)
        assert bench.run(read).decoded.residual_count == 100 - 9  # type: ignore[union-attr]
        assert bench.guest[into.address : into.address + 9] == b"\x7d\x40\x40answer"
        line.socket.close()
        assert isinstance(events.get(timeout=PATIENCE).data, CcwCrw)


def test_a_terminal(served: Class) -> None:
    path = served.tmp / "line"
    served.serve("terminal3270-ccw", line=f"socket:{path}")
    served.ram()
    served.add(driver="vfio-ccw")
    converse(served, path)


def test_a_terminal_comes_back(program: Class) -> None:
    path = program.tmp / "line"
    program.serve("terminal3270-ccw", line=f"socket:{path}")
    program.ram()
    program.add(driver="vfio-ccw", reconnect_ms=20)
    program.end()
    program.wait("DEVICE_ERROR")
    path.unlink()
    program.serve("terminal3270-ccw", line=f"socket:{path}")
    program.wait("DEVICE_RECONNECTED")
    converse(program, path)


# --- the matrix -----------------------------------------------------------------------------------


def command(path: Path, words: str) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(PATIENCE)
        control.connect(str(path))
        control.sendall(words.encode() + b"\n")
        assert control.recv(1000) == b"ok\n"


def test_a_matrix(served: Class) -> None:
    path = served.tmp / "control"
    served.serve("matrix-ap", control=f"socket:{path}")
    served.add(driver="vfio-ap")
    [told] = served.client.query_devices()
    assert (told.driver, told.backend, told.regions, told.irq_indexes) == ("vfio-ap", "vfio-user", 0, 2)
    served.client.device_reset(id="dev0")
    command(path, "assign_adapter 0x05")
    assert served.wait("AP_CONFIG_CHANGED").count == 1
    command(path, "assign_domain 0xab")
    assert served.wait("AP_CONFIG_CHANGED").count == 2
    if served.how == "export":
        served.other.device_del(id="it")
        assert served.wait("DEVICE_REQUESTED").device == "dev0"


def test_a_matrix_comes_back(program: Class) -> None:
    path = program.tmp / "control"
    program.serve("matrix-ap", control=f"socket:{path}")
    program.add(driver="vfio-ap", reconnect_ms=20)
    program.end()
    program.wait("DEVICE_ERROR")
    path.unlink()
    program.serve("matrix-ap", control=f"socket:{path}")
    program.wait("DEVICE_RECONNECTED")
    command(path, "assign_adapter 0x05")
    assert program.wait("AP_CONFIG_CHANGED").count == 1


# --- what is refused ------------------------------------------------------------------------------

WORDS = {
    "primer-platform": "a platform device",
    "fba-ccw": "a subchannel",
    "terminal3270-ccw": "a subchannel",
    "matrix-ap": "an AP matrix",
    "primer-pci": "a PCI device",
}


@pytest.mark.parametrize("type", list(WORDS))
def test_another_driver_is_told_which_is_right(program: Class, type: str) -> None:
    parameters = {"line": f"socket:{program.tmp}/line"} if type == "terminal3270-ccw" else {}
    if type == "matrix-ap":
        parameters = {"control": f"socket:{program.tmp}/control"}
    if type == "fba-ccw":
        program.disk()
    else:
        program.serve(type, **parameters)
    for driver in set(DRIVERS.values()) - {DRIVERS[type]}:
        right = f"serves {WORDS[type]}: give driver={DRIVERS[type]} instead of '{driver}'"
        with pytest.raises(RemoteError, match=right) as caught:
            program.add(driver=driver)
        assert caught.value.errno == "EINVAL"
    assert program.client.query_devices() == []
    program.add(driver=DRIVERS[type])
    program.client.device_del(id="dev0")
    program.wait("DEVICE_DELETED")


def test_while_a_client_has_the_disk(bench: Bench, tmp_path: Path) -> None:
    """Its monitor starts nothing then, and takes no status; a program of the client's ends with it."""
    with ExitStack() as stack:
        served = Class(bench, tmp_path, "export", stack)
        path = served.disk()
        served.ram()
        served.add(driver="vfio-ccw")
        for refused in (served.other.ccw_clear, served.other.ccw_halt):
            with pytest.raises(RemoteError, match="attached to by the client of export 'it'") as caught:
                refused(device="it")
            assert caught.value.errno == "EBUSY"
        with pytest.raises(RemoteError, match="attached to by the client"):
            served.other.ccw_request(device="it", orb=bytes(12))
        program = ChannelProgram(0x1000, 0x1000)
        program.nop(CcwFlags.SUSPEND)
        assert summary(served.run(program)) == "suspended"
        with served.other.events("DEVICE_EXPORT_DETACHED") as events:
            served.client.device_del(id="dev0")
            served.wait("DEVICE_DELETED")
            events.get(timeout=PATIENCE)
        ended = served.other.query_subchannel(device="it").status
        assert ended is not UNSET
        assert ended.functions == []
        served.add(driver="vfio-ccw")
        served.check_disk(path)
        served.client.device_del(id="dev0")
        served.wait("DEVICE_DELETED")


def test_a_client_that_answers_for_its_memory(program: Class) -> None:
    """Without fds of it: the disk fetches the program and the data by messages. And what a client sees of it all."""
    path = program.disk()
    laid, step = (lambda built: (built[0].build(), built[1]))(reading(5, 3))
    with Hypervisor(program.path) as client, eventfd() as io:
        assert [client.region(index)[0].writable for index in range(4)] == [True, True, False, False]
        ram = client.memory[0] = bytearray(MEMORY)
        client.map(0, MEMORY)
        for address, data in laid.pieces:
            ram[address : address + len(data)] = data
        client.trigger(int(CcwIrq.IO), io.number)
        request = CcwIoRegion(laid.orb.pack(), bytes(12)).pack()

        def start() -> Irb:
            client.do(vfio_user.RegionWrite(0, 0, request))
            end = time.monotonic() + PATIENCE
            while silent(io):
                client.bytes(2, 0, 52)  # answers what it is asked meanwhile
                assert time.monotonic() < end, "it was never signalled"
            assert rung(io)
            return Irb.unpack(CcwIoRegion.unpack(client.bytes(0, 0, 124)).irb)

        assert explain_irb(start())[0] == "ended normally"
        assert ram[step.address : step.address + 3 * 512] == path.read_bytes()[5 * 512 : 8 * 512]
        with pytest.raises(Refused, match="EINVAL"):
            client.do(vfio_user.RegionWrite(0, 0, request[:100]))
        with pytest.raises(Refused, match="EACCES"):
            client.do(vfio_user.RegionWrite(2, 0, bytes(52)))
        with pytest.raises(Refused, match="EINVAL"):
            client.bytes(0, 100, 100)
        ram[laid.orb.cpa : laid.orb.cpa + 8] = Ccw(3, 0, 1, CcwFlags.SUSPEND | CcwFlags.SUPPRESS_LENGTH).pack(1)
        request = CcwIoRegion(Orb(laid.orb.cpa, flags=laid.orb.flags | OrbFlags.SPND).pack(), bytes(12)).pack()
        assert explain_irb(start())[0] == "suspended"
        with pytest.raises(Refused, match="EBUSY"):
            client.do(vfio_user.RegionWrite(0, 0, request))
        client.do(vfio_user.RegionWrite(1, 0, CcwCmdRegion(AsyncCommand.CSCH).pack()))
        assert rung(io)
        assert client.irq(int(CcwIrq.REQ)).count == 1
