"""ROMs: behaviour.md, section 5, "The ROM is read until zero bytes or full; ...", and what stands in for them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed, PermissionRefused
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.devices import rom as rom_module
from vfiod.server.devices.rom import Rom, read_rom
from vfiod.server.mdev.parent import RegionInfo

IMAGE = b"\x55\xaa" + b"rom" * 1000


def chip(give: Callable[[int, int], bytes]) -> Any:
    return SimpleNamespace(name="chip", region_read_some=lambda index, offset, length: give(offset, length))


def test_it_is_read_until_nothing_more_comes_and_padded_with_ones() -> None:
    """ "until zero bytes or full"; "a shorter ROM is padded with 0xff"."""
    rom = Rom(8192, lambda: read_rom(chip(lambda at, n: IMAGE[at : at + min(n, 700)]), 6, 8192))
    assert not rom.loaded
    assert rom.read(0, 8192) == IMAGE.ljust(8192, b"\xff")
    assert rom.loaded
    assert read_rom(chip(lambda at, n: b"x" * n), 6, 200_000) == b"x" * 200_000


def test_eintr_and_eagain_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "EINTR and EAGAIN are retried"."""
    monkeypatch.setattr(rom_module, "_PAUSE_S", 0)
    answers = iter([errno.EAGAIN, errno.EINTR, None, errno.EAGAIN, None, None])

    def give(at: int, length: int) -> bytes:
        number = next(answers)
        if number is not None:
            raise OperationFailed("pread", "rom", errno=number)
        return IMAGE[at : at + 2000]

    assert read_rom(chip(give), 6, 4096) == IMAGE


def test_a_device_that_says_eagain_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rom_module, "_PAUSE_S", 0)

    def never(at: int, length: int) -> bytes:
        raise OperationFailed("pread", "rom", errno=errno.EAGAIN)

    with pytest.raises(OperationFailed, match="EAGAIN"):
        read_rom(chip(never), 6, 4096)


def test_what_breaks_off_is_kept_as_far_as_it_came() -> None:
    def give(at: int, length: int) -> bytes:
        if at:
            raise OperationFailed("pread", "rom", errno=errno.EIO)
        return IMAGE

    assert read_rom(chip(give), 6, 8192) == IMAGE


def with_rom(rig: Any) -> None:
    rig.region[6] = RegionInfo(4096, readable=True)
    read = rig.read

    def rom(index: int, offset: int, length: int) -> bytes:
        return IMAGE.ljust(4096, b"\0")[offset : offset + length] if index == 6 else read(index, offset, length)

    rig.read = rom


async def look(world: Any) -> tuple[int, int]:
    """The ROM's size as a region, and as the guest finds it."""
    await world.command("region-write", device="n0", region="config", offset=0x30, size=4, value=0xFFFF_F800)
    mask = (await world.command("region-read", device="n0", region="config", offset=0x30, size=4)).value
    return (await world.region("rom")).size, -mask & 0xFFFF_FFFF


def test_the_devices_own_is_read_when_it_is_first_needed(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add(prepare=with_rom)
        device = world.machine.device("n0")
        region = device.regions.find("rom")
        assert not region.ready
        assert (await world.command("region-read", device="n0", region="rom", offset=0, size=2)).value == 0xAA55
        assert region.ready
        reply = await world.command("region-read", device="n0", region="rom", offset=2, length=3)
        assert reply.data == b"rom"
        assert await look(world) == (4096, 4096)

    play(scenario)


def test_a_romfile_stands_in_for_it(play: Any, tmp_path: Path) -> None:
    """ "`romfile` and `rombar=off` are honoured": its size is the next power of two, what is missing reads as ones."""

    async def scenario(world: Any) -> None:
        with FileDescriptor(os.memfd_create("rom")) as fd:
            os.pwrite(fd.number, IMAGE, 0)
            world.send("file", fd)
        await world.add(prepare=with_rom, romfile="file")
        assert await look(world) == (4096, 4096)
        reply = await world.command("region-read", device="n0", region="rom", offset=0, length=4096)
        assert reply.data == IMAGE.ljust(4096, b"\xff")
        assert "3002 bytes, in place of the device's own" in (await world.region("rom")).note
        with pytest.raises(InvalidArgument, match="read-only"):
            await world.command("region-write", device="n0", region="rom", offset=0, size=1, value=0)

    play(scenario)


@pytest.mark.parametrize("properties", [{"romfile": ""}, {"rombar": False}])
def test_none_at_all(play: Any, properties: dict[str, Any]) -> None:
    async def scenario(world: Any) -> None:
        await world.add(prepare=with_rom, **properties)
        assert await look(world) == (0, 0)

    play(scenario)


def test_the_multifunction_bit_is_cleared_unless_asked_for(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add(multifunction=True)
        reply = await world.command("region-read", device="n0", region="config", offset=0x0E, size=1)
        assert reply.value == 0x80

    play(scenario)


def test_what_is_no_rom_is_refused_and_nothing_is_left(play: Any, tmp_path: Path) -> None:
    """Without --allow-open no path is opened: a monitor could read through the ROM whatever vfiod may read."""
    (tmp_path / "rom").write_bytes(IMAGE)

    async def scenario(world: Any) -> None:
        uuid = await world.machine.mdevs.create("rigs", "primer-pci")
        with FileDescriptor(os.memfd_create("empty")) as fd:
            world.send("empty", fd)
        big = FileDescriptor(os.memfd_create("big"))
        os.ftruncate(big.number, (16 << 20) + 1)
        world.send("big", big)
        big.close()
        world.bell("bell")
        cases: list[tuple[str, type[CommandError], str]] = [
            (str(tmp_path / "rom"), PermissionRefused, "opens none .*--allow-open"),
            ("nothing", InvalidArgument, "'nothing' not found"),
            ("empty", InvalidArgument, "has 0 bytes; a ROM has 1 to"),
            ("big", InvalidArgument, "has 16777217 bytes"),
            ("bell", InvalidArgument, "romfile.*eventfd"),
        ]
        for name, kind, words in cases:
            with pytest.raises(kind, match=words):
                await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid, romfile=name)
        world.machine.allow_open = True
        for path, words in (
            (tmp_path, "is no plain file"),
            (tmp_path / "no", "ENOENT"),
            ("/dev/null", "no plain file"),
        ):
            with pytest.raises(CommandError, match=words):
                await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid, romfile=str(path))
        more = {"x_dry_run": True}
        for extra in (more, {"mdev": str(uuid)[:-1] + ("1" if str(uuid)[-1] == "0" else "0")}, {}):
            arguments = {"mdev": uuid, "romfile": str(tmp_path / "rom"), **extra}
            try:
                await world.command("device_add", driver="vfio-pci", id="n0", **arguments)
            except CommandError:
                assert "mdev" in extra
        assert (await look(world)) == (4096, 4096)

    play(scenario)
