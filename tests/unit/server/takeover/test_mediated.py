"""The built-in mediated devices, each in the middle of something, made again in another machine."""

import asyncio
import os
import select
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.machine.conftest import World

from .conftest import Two, bell, move, picture, rung

RBR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


def stand_still(world: World) -> None:
    """Its loop does nothing from here on, as a giver's: nothing that comes is its own."""
    for instance in world.machine.mdevs._visible.values():
        for watch in tuple(instance.host._watches):
            watch.want(readable=False, writable=False)


async def become(first: World, second: World) -> None:
    """The second takes the first's place."""
    stand_still(first)
    await move(first, second)
    assert picture(first) == picture(second)
    for device in first.machine.devices.all():
        device.stop()


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
