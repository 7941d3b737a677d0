"""The built-in mediated devices, each in the middle of something, made again in another machine."""

import asyncio
import base64
import os
import select
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.machine.conftest import World

from vfiod.protocol.catalogue.ccw import ApConfigChanged, CcwCrw, CcwIo
from vfiod.protocol.channel import Ccw, CcwFlags, ChannelProgram, Crw, CrwErc, CrwRsc, Orb, OrbFlags
from vfiod.protocol.errors import Busy
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.takeover.whole import busy, describe, rebuild

from .conftest import Two, bell, picture, rung

RBR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


def stand_still(world: World) -> None:
    """Its loop does nothing from here on, as a giver's: nothing that comes is its own."""
    for instance in world.machine.mdevs._visible.values():
        for watch in tuple(instance.host._watches):
            watch.want(readable=False, writable=False)


async def become(first: World, second: World) -> None:
    """The second takes the first's place, in one turn of the first's loop: what comes meanwhile is the second's."""
    stand_still(first)
    assert busy(first.machine) is None
    told = describe(first.machine)
    assert describe(first.machine) == told
    before = picture(first)
    fds = [FileDescriptor.duplicate_of(number) for _, number in told.fds]
    for device in first.machine.devices.all():
        device.stop()
    await rebuild(second.machine, told.data, fds)
    assert picture(second) == before


def attributes(world: World, uuid: str) -> dict[str, str]:
    info = world.machine.mdevs.info(uuid)
    assert info is not None
    return info.attributes


async def gather(world: World, number: int, count: int) -> bytes:
    """So many bytes of a terminal or socket, and no more of them."""
    seen = b""
    while len(seen) < count:
        await world.until(lambda: bool(select.select([number], [], [], 0)[0]))
        seen += os.read(number, 4096)
    return seen


class Port:
    """One port of a card, as a driver works it."""

    def __init__(self, world: World, region: str = "bar0") -> None:
        self.world = world
        self.region = region

    async def get(self, register: int) -> int:
        told = await self.world.command("region-read", device="tty", region=self.region, offset=register, size=1)
        value = told.value
        assert isinstance(value, int)
        return value

    async def set(self, register: int, value: int) -> None:
        where: dict[str, Any] = {"device": "tty", "region": self.region, "offset": register, "size": 1}
        await self.world.command("region-write", **where, value=value)

    async def take(self) -> bytes:
        """What is in the receiver now."""
        seen = bytearray()
        while await self.get(LSR) & 1:
            seen.append(await self.get(RBR))
        return bytes(seen)


async def serial(world: World, **parameters: str) -> str:
    uuid = await world.machine.mdevs.create("serial", "serial-2", parameters=parameters)
    await world.command("device_add", driver="vfio-pci", id="tty", mdev=uuid)
    return uuid


def test_a_serial_port_in_the_middle_of_a_conversation(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        link = tmp_path / "line"
        uuid = await serial(first, port0=f"pty:{link}")
        port = Port(first)
        for register, value in ((LCR, 0x80), (RBR, 1), (IER, 0), (LCR, 0x03), (FCR, 0x81), (MCR, 0x0B), (SCR, 0x5A)):
            await port.set(register, value)
        terminal = os.open(link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = b"what comes in: sixteen are in the receiver, the rest waits in the line"
            os.write(terminal, text)
            await first.until(lambda: first_uart(first, uuid)._received == text[:16])
            assert await port.get(RBR) == text[0]
            with bell() as mine:
                first.name_fd("e", os.dup(mine.number))
                await first.command(
                    "irq-start", device="tty", index="intx", mode="direct", eventfds=[{"vector": 0, "trigger": "e"}]
                )
                stand_still(first)
                kept = first_uart(first, uuid).save()
                await become(first, second)
                assert first_uart(second, uuid).save() == kept
                assert attributes(second, uuid) == attributes(first, uuid)
                assert attributes(second, uuid)["port0-baud"] == "115200"
                again = Port(second)
                heard = text[:1]
                while len(heard) < len(text):
                    heard += await again.take()
                    await asyncio.sleep(0)  # the loop looks at the line
                assert heard == text, "each byte once, and in its order"
                assert await again.get(LCR) == 0x03
                assert await again.get(MCR) == 0x0B
                assert await again.get(SCR) == 0x5A
                assert rung(mine) == 0, "no interrupt was asked for"
                await again.set(IER, 0x01)
                os.write(terminal, b"!" * 8)
                await second.until(lambda: rung(mine) == 1)
                assert await again.get(IIR) & 0x0F == 0x04
            assert link.is_symlink()
        finally:
            os.close(terminal)

    two(scenario)


def first_uart(world: World, uuid: str, port: int = 0) -> Any:
    return world.machine.mdevs._visible[uuid].device._ports[port].uart  # type: ignore[attr-defined]


def test_a_full_transmitter_and_its_peer(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        path = tmp_path / "line"
        uuid = await serial(first, port1=f"socket:{path}")
        port = Port(first, "bar1")
        with socket.socket(socket.AF_UNIX) as peer, socket.socket(socket.AF_UNIX) as next_one:
            peer.connect(str(path))
            uart = first_uart(first, uuid, 1)
            await first.until(lambda: bool(uart._modem & 0x80))
            await port.set(FCR, 0x01)
            sent = 0
            while len(uart.outgoing) < 16:
                await port.set(RBR, sent & 0xFF)
                sent += 1
            next_one.connect(str(path))
            stand_still(first)
            kept = uart.save()
            await become(first, second)
            assert first_uart(second, uuid, 1).save() == kept
            assert len(bytes.fromhex(kept["outgoing"])) == 16
            peer.setblocking(False)
            received = await gather(second, peer.fileno(), sent)
            assert received == bytes(at & 0xFF for at in range(sent)), "each byte once, and in its order"
            await second.until(lambda: first_uart(second, uuid, 1).outgoing == b"")
            again = Port(second, "bar1")
            assert await again.get(MSR) & 0xF0 == 0xB0, "he is still there"
            # When he goes, the next one comes in by the same door.
            peer.shutdown(socket.SHUT_RDWR)
            next_one.sendall(b"next")
            await second.until(lambda: first_uart(second, uuid, 1)._received == b"next")
            assert await again.take() == b"next"
        assert path.is_socket()

    two(scenario)


@pytest.mark.parametrize("opened", [False, True])
def test_a_card_that_nobody_uses_or_that_is_idle(two: Two, opened: bool) -> None:
    async def scenario(first: World, second: World) -> None:
        uuid = await first.machine.mdevs.create("serial", "serial-1")
        if opened:
            await first.command("device_add", driver="vfio-pci", id="tty", mdev=uuid)
        await become(first, second)
        if not opened:
            await second.command("device_add", driver="vfio-pci", id="tty", mdev=uuid)
        terminal = os.open(attributes(second, uuid)["port0"], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            await Port(second).set(RBR, 0x41)
            assert await gather(second, terminal, 1) == b"A"
        finally:
            os.close(terminal)
        [told] = [one for one in second.machine.mdevs.types() if one.type == "serial-1"]
        assert [one.uuid for one in told.devices] == [uuid]

    two(scenario)


# --- subchannels --------------------------------------------------------------------------------------------

SIZE = 1 << 20


class Guest:
    """Guest memory, and a subchannel that is given programs."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def add(self, parent: str, **parameters: Any) -> str:
        self.world.name_memory("ram", SIZE)
        await self.world.command("dma-map", iova=0, size=SIZE, fd="ram")
        uuid = await self.world.machine.mdevs.create(parent, f"{parent}-ccw", parameters=parameters)
        await self.world.command("device_add", driver="vfio-ccw", id="ccw", mdev=uuid)
        return uuid

    @property
    def memory(self) -> Any:
        return self.world.machine.memory.ranges()[0].mapping.memory

    async def run(self, program: ChannelProgram) -> Any:
        laid = program.build()
        for address, data in laid.pieces:
            self.memory.write(address, data)
        return await self.request(laid.orb)

    async def request(self, orb: Any) -> Any:
        return await self.world.command("ccw-request", device="ccw", orb=base64.b64encode(orb.pack()).decode())

    async def look(self) -> Any:
        return await self.world.command("query-subchannel", device="ccw")


def device_of(world: World, uuid: str) -> Any:
    return world.machine.mdevs._visible[uuid].device


def same_account(first: World, second: World, uuid: str) -> None:
    one, other = (device_of(world, uuid).save() for world in (first, second))
    assert one.values == other.values
    assert sorted(one.fds) == sorted(other.fds)
    for name, fd in one.fds.items():
        assert os.path.samestat(os.fstat(fd.number), os.fstat(other.fds[name].number)), name


def blocks(operation: int, count: int, block: int) -> ChannelProgram:
    program = ChannelProgram(0x1000, 0x20000)
    program.write(0x63, struct.pack(">BBHIII", 0, 0, 512, 0, 0, 63))
    program.write(0x43, struct.pack(">BBHI", operation, 0, count, block))
    return program


def test_a_disk_with_a_report_and_an_interrupt_that_nobody_has_heard(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        path = tmp_path / "disk"
        path.write_bytes(b"".join(bytes([number]) * 512 for number in range(64)))
        guest = Guest(first)
        uuid = await guest.add("fba", **{"file": str(path), "device-number": 0x3F})
        unordered = blocks(6, 2, 63)  # beyond the end: a unit check, and sense data that wait to be asked for
        unordered.read(0x42, 1024)
        assert "unit-check" in (await guest.run(unordered)).decoded.device_status
        device_of(first, uuid).attention()
        device_of(first, uuid).report(Crw(CrwRsc.SUBCHANNEL, CrwErc.INITIALIZED, 1))
        stand_still(first)
        await become(first, second)
        same_account(first, second, uuid)
        path.rename(tmp_path / "elsewhere")  # it is the file that goes along, not its name
        [io] = await second.hears(CcwIo)
        assert isinstance(io, CcwIo)
        assert (io.solicited, io.late, io.decoded.device_status) == (False, False, ["attention"])
        await second.hears(CcwCrw)
        again = Guest(second)
        assert (await again.look()).device_number == 0x3F
        sense = ChannelProgram(0x1000, 0x1000)
        where = sense.sense()
        await again.run(sense)
        assert again.memory.read(where.address, 2) == b"\0\x04"
        write = blocks(5, 1, 7)
        write.write(0x41, b"w" * 512)
        assert (await again.run(write)).decoded.summary == "ended normally"
        read = blocks(6, 2, 6)
        into = read.read(0x42, 1024)
        assert (await again.run(read)).decoded.summary == "ended normally"
        assert again.memory.read(into.address, 1024) == bytes([6]) * 512 + b"w" * 512
        assert len(second.told(CcwIo)) == len(second.told(CcwCrw)) == 1, "each once"

    two(scenario)


def test_a_program_that_suspended_itself_is_ended_by_the_next_server(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(512))
        guest = Guest(first)
        uuid = await guest.add("fba", file=str(path))
        ccws = (Ccw(0x03, 0, 1, CcwFlags.SUPPRESS_LENGTH | CcwFlags.SUSPEND),)
        guest.memory.write(0x1000, b"".join(one.pack() for one in ccws))
        orb = Orb(0x1000, flags=OrbFlags.FMT | OrbFlags.SPND)
        assert (await guest.request(orb)).decoded.summary
        await become(first, second)
        same_account(first, second, uuid)
        again = Guest(second)
        with pytest.raises(Busy):
            refused = await again.request(orb)
            if refused.condition_code:  # a subchannel says it by its condition code
                raise Busy("")
        await second.command("ccw-clear", device="ccw")
        await second.hears(CcwIo)
        nothing = ChannelProgram(0x1000, 0x1000)
        nothing.sense_id(7)
        assert (await again.run(nothing)).decoded.summary == "ended normally"

    two(scenario)


def record(data: bytes) -> bytes:
    return data.replace(b"\xff", b"\xff\xff") + b"\xff\xef"


def test_a_terminal_with_half_a_record_and_an_answer_that_waits(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        path = tmp_path / "line"
        guest = Guest(first)
        uuid = await guest.add("terminal3270", line=f"socket:{path}")
        with socket.socket(socket.AF_UNIX) as operator:
            operator.connect(str(path))
            await first.hears(CcwCrw)
            program = ChannelProgram(0x1000, 0x2000)
            program.write(0x05, b"\xc3HELLO\xff\x1d\x20LOCKED\x13")
            assert (await guest.run(program)).decoded.summary == "ended normally"
            operator.sendall(record(b"\x7d\x40\x40one") + b"\x7d\x40\x40tw\xff")
            await first.hears(CcwIo)
            await first.until(lambda: device_of(first, uuid)._records._escaped)
            stand_still(first)
            await become(first, second)
            same_account(first, second, uuid)
            assert device_of(second, uuid)._screen.screen.contents() == device_of(first, uuid)._screen.screen.contents()
            again = Guest(second)
            operator.setblocking(False)
            sent = record(b"\x05\xc3HELLO\xff\x1d\x20LOCKED\x13")
            assert await gather(second, operator.fileno(), len(sent)) == sent
            for text in (b"one", b"tw\xffo"):
                if text != b"one":
                    operator.sendall(b"\xffo\xff\xef")  # the second half of what was escaped
                    await second.hears(CcwIo)
                read = ChannelProgram(0x1000, 0x2000)
                into = read.read(0x06, 100, flags=CcwFlags.SUPPRESS_LENGTH)
                left = (await again.run(read)).decoded.residual_count
                assert again.memory.read(into.address, 100 - left) == b"\x7d\x40\x40" + text
            program = ChannelProgram(0x1000, 0x2000)
            program.write(0x01, b"\xc3bye")
            await again.run(program)
            assert await gather(second, operator.fileno(), 7) == record(b"\x01\xc3bye")
            assert second.told(CcwCrw) == [], "he has never been away"
        await second.hears(CcwCrw)

    two(scenario)


# --- the matrix ---------------------------------------------------------------------------------------------


def test_a_matrix_with_half_a_command_and_a_change_nobody_has_heard(two: Two, tmp_path: Path) -> None:
    async def scenario(first: World, second: World) -> None:
        path = tmp_path / "control"
        uuid = await first.machine.mdevs.create("matrix", "matrix-ap", parameters={"control": f"socket:{path}"})
        await first.command("device_add", driver="vfio-ap", id="ap", mdev=uuid)
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(path))
            control.sendall(b"assign_adapter 0x05\nassign_domain 0xab\nassign_dom")
            await first.until(lambda: device_of(first, uuid)._typed == b"assign_dom")
            await first.until(lambda: sum(one.count for one in first.told(ApConfigChanged)[-1:]) == 2)  # type: ignore[attr-defined]
            stand_still(first)
            device_of(first, uuid)._command(["assign_adapter", "7"])  # its interrupt is in the eventfd
            await become(first, second)
            same_account(first, second, uuid)
            [told] = await second.hears(ApConfigChanged)
            assert isinstance(told, ApConfigChanged)
            assert told.count == 3
            control.sendall(b"ain 0xac\n")
            control.setblocking(False)
            assert await gather(second, control.fileno(), 9) == b"ok\n" * 3
            assert attributes(second, uuid)["matrix"] == "05.00ab 05.00ac 07.00ab 07.00ac"
            await second.hears(ApConfigChanged, count=2)
            await second.command("device-reset", id="ap")

    two(scenario)
