"""Regions: what is refused before any access, the two ways an access goes, and what is given away.

Rules are those of behaviour.md, section 3.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Holder
from vfiod.protocol.catalogue.regions import RegionMmapChanged
from vfiod.protocol.errors import DeviceNotFound, InvalidArgument, OperationFailed, PermissionRefused
from vfiod.server.devices.regions import INLINE_BYTES, Regions, describe, describe_pci, widest
from vfiod.server.kernel.syscalls import PAGE_SIZE
from vfiod.server.mdev.parent import Area, RegionInfo

BAR2 = 1 << 16


# --- what may be mapped ---------------------------------------------------------------------------


def region(size: int, *areas: tuple[int, int], mmap: bool = True, offset: int = 0) -> vfio.RegionInfo:
    flags = vfio.RegionFlags.READ | vfio.RegionFlags.WRITE | (vfio.RegionFlags.MMAP if mmap else 0)
    caps = (vfio.SparseMmap(tuple(vfio.Area(*area) for area in areas)),) if areas else ()
    return vfio.RegionInfo(0, flags, size, offset, caps)


def test_a_whole_region_is_one_area() -> None:
    assert describe(0, region(2 * PAGE_SIZE)).areas == ((0, 2 * PAGE_SIZE),)


def test_sparse_areas_are_followed_and_cut_to_whole_pages() -> None:
    sparse = region(16 * PAGE_SIZE, (0, PAGE_SIZE), (3 * PAGE_SIZE + 1, 3 * PAGE_SIZE), (9 * PAGE_SIZE, 10))
    assert describe(0, sparse).areas == ((0, PAGE_SIZE), (4 * PAGE_SIZE, 2 * PAGE_SIZE))


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (region(PAGE_SIZE // 2), "smaller than a page"),
        (region(4 * PAGE_SIZE, (16, 32)), "no whole page"),
        (region(PAGE_SIZE, offset=8), "does not begin on a page"),
    ],
)
def test_what_cannot_be_mapped_says_why(info: vfio.RegionInfo, words: str) -> None:
    found = describe(0, info)
    assert found.areas == ()
    assert words in (found.note or "")


def test_a_region_without_mmap_has_nothing_to_explain() -> None:
    assert describe(0, region(PAGE_SIZE, mmap=False)).note is None


def test_names() -> None:
    assert [describe_pci(i, region(0)).name for i in (0, 5, 6, 7, 8, 9)] == [
        "bar0",
        "bar5",
        "rom",
        "config",
        "vga",
        "region9",
    ]


@given(st.integers(0, 64), st.integers(1, 64))
def test_the_widest_accesses_are_aligned_and_cover_the_range_once(offset: int, length: int) -> None:
    pieces = widest(offset, length)
    at = offset
    for start, width in pieces:
        assert start == at
        assert start % width == 0
        at += width
        # Twice as wide would not have been possible.
        assert width == 8 or start % (2 * width) or start + 2 * width > offset + length
    assert at == offset + length


# --- access -----------------------------------------------------------------------------------------


def test_registers_are_little_endian_and_of_every_width(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add()
        for path in ("mapped", "trapped"):
            for size in (1, 2, 4, 8):
                value = int.from_bytes(bytes(range(0x10, 0x10 + size)), "little")
                offset = {"mapped": 0x100, "trapped": 0x200}[path]
                await world.command("region-write", device="n0", region="bar2", offset=offset, size=size, value=value)
                reply = await world.command("region-read", device="n0", region=2, offset=offset, size=size)
                assert reply.value == value
                reply = await world.command("region-read", device="n0", region="bar2", offset=offset, length=size)
                assert reply.data == bytes(range(0x10, 0x10 + size))
            world.machine.device("n0").regions.trapped = True  # the same again by the slow path

    play(scenario)


def test_the_fast_path_reaches_the_memory_and_the_slow_path_the_device(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        seen: list[tuple[int, int, int]] = []
        rig.fail_read = lambda *access: seen.append(access)
        await world.command("region-read", device="n0", region="bar2", offset=8, size=4)
        assert seen == []
        await world.command("region-read", device="n0", region="bar0", offset=4, size=4)
        assert seen == [(0, 4, 4)]

    play(scenario)


def test_x_no_mmap_goes_slowly_and_says_so(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(x_no_mmap=True)
        seen: list[tuple[int, int, int]] = []
        rig.fail_read = lambda *access: seen.append(access)
        await world.command("region-read", device="n0", region="bar2", offset=8, size=4)
        assert seen == [(2, 8, 4)]
        info = await world.region("bar2")
        assert (info.mappable, info.mapped) == (True, False)
        assert "x-no-mmap" in info.note
        assert not world.machine.device("n0").info().fast_path

    play(scenario)


def test_outside_a_sparse_area_it_goes_slowly(play: Any) -> None:
    async def scenario(world: Any) -> None:
        info = RegionInfo(BAR2, readable=True, writable=True, areas=(Area(PAGE_SIZE, PAGE_SIZE),))
        rig = await world.add(prepare=lambda rig: rig.region.update({2: info}))
        seen: list[int] = []
        rig.fail_read = lambda region, offset, length: seen.append(offset)
        for offset in (0, PAGE_SIZE - 8, PAGE_SIZE, 2 * PAGE_SIZE - 8, 2 * PAGE_SIZE):
            await world.command("region-read", device="n0", region="bar2", offset=offset, size=8)
        assert seen == [0, PAGE_SIZE - 8, 2 * PAGE_SIZE]
        # Bytes that cross the area's border go slowly as a whole.
        await world.command("region-read", device="n0", region="bar2", offset=PAGE_SIZE - 4, length=8)
        assert seen[3:] == [PAGE_SIZE - 4]
        listed = await world.region("bar2")
        assert [(area.offset, area.size) for area in listed.areas] == [(PAGE_SIZE, PAGE_SIZE)]

    play(scenario)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (
            "region-read",
            {"region": "bar9", "offset": 0, "size": 4},
            "has no region 'bar9'; it has indexes 0 to 8: bar0",
        ),
        ("region-read", {"region": 77, "offset": 0, "size": 4}, "has no region 77"),
        ("region-read", {"region": -1, "offset": 0, "size": 4}, "has no region -1"),
        ("region-read", {"region": "bar1", "offset": 0, "size": 4}, "Device 'n0' has no bar1: its size is 0"),
        ("region-read", {"region": "vga", "offset": 0, "size": 4}, "Device 'n0' has no vga"),
        ("region-read", {"region": "bar0", "offset": 4094, "size": 4}, r"4 bytes at offset 4094 \(0xffe\) are out of"),
        ("region-read", {"region": "bar0", "offset": 2**64, "size": 4}, "are out of range"),
        ("region-read", {"region": "bar0", "offset": 2, "size": 4}, "is not a multiple of 4: no single access"),
        ("region-read", {"region": "bar0", "offset": 0}, "Parameter 'size' is missing"),
        ("region-read", {"region": "bar0", "offset": 0, "size": 4, "length": 4}, "'size' and 'length' exclude"),
        ("region-read", {"region": "bar0", "offset": 1, "length": 4096}, "are out of range"),
        (
            "region-write",
            {"region": "bar0", "offset": 0, "size": 1, "value": 256},
            "256 does not fit 1 bytes.*0 to 255",
        ),
        ("region-write", {"region": "bar0", "offset": 0, "size": 4}, "Parameter 'value' is missing"),
        ("region-write", {"region": "bar0", "offset": 0, "value": 4}, "Parameter 'size' is missing"),
        ("region-write", {"region": "bar0", "offset": 0, "size": 4, "data": "AAAA"}, "'data' excludes 'size'"),
        ("region-write", {"region": "bar0", "offset": 4095, "data": "AAAA"}, "3 bytes at offset 4095"),
        ("region-write", {"region": "bar3", "offset": 0, "data": "AAAA"}, "has no bar3"),
        ("region-write", {"region": "bar2", "offset": BAR2, "size": 1, "value": 0}, "are out of range"),
    ],
)
def test_what_is_refused_before_any_access(play: Any, command: str, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        seen: list[tuple[int, ...]] = []
        rig.fail_read = lambda *access: seen.append(access)
        with pytest.raises(InvalidArgument, match=words):
            await world.command(command, device="n0", **arguments)
        assert seen == []

    play(scenario)


@pytest.mark.parametrize("offset", [4096, 2**40 - 16])
def test_large_transfers_are_refused_at_once_when_they_leave_the_region(play: Any, offset: int) -> None:
    async def scenario(world: Any) -> None:
        await world.add()
        with pytest.raises(InvalidArgument, match="are out of range"):
            await world.command("region-read", device="n0", region="bar2", offset=offset, length=BAR2)

    play(scenario)


def test_read_only_and_write_only(play: Any) -> None:
    async def scenario(world: Any) -> None:
        def prepare(rig: Any) -> None:
            rig.region[3] = RegionInfo(256, readable=True)
            rig.region[4] = RegionInfo(256, writable=True)

        await world.add(prepare=prepare)
        with pytest.raises(InvalidArgument, match="bar3 of device 'n0' cannot be written: it is read-only") as caught:
            await world.command("region-write", device="n0", region="bar3", offset=0, size=4, value=1)
        assert caught.value.errno == "EACCES"
        with pytest.raises(InvalidArgument, match="bar4 of device 'n0' cannot be read: it is write-only"):
            await world.command("region-read", device="n0", region="bar4", offset=0, length=4)

    play(scenario)


def test_a_failing_access_names_region_offset_and_size(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()

        def refuse(*access: int) -> None:
            raise OSError(5, "no")

        rig.fail_read = refuse
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("region-read", device="n0", region="bar0", offset=8, size=4)

    play(scenario)


def test_many_bytes_go_in_a_thread_and_in_the_devices_order(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        data = os.urandom(INLINE_BYTES * 3 + 5)
        import base64

        encoded = base64.b64encode(data).decode()
        await world.command("region-write", device="n0", region="bar2", offset=7, data=encoded)
        reply = await world.command("region-read", device="n0", region="bar2", offset=7, length=len(data))
        assert reply.data == data
        gate = world.gate()
        order: list[str] = []

        def wait(region: int, offset: int, length: int) -> None:
            if length > INLINE_BYTES:
                gate.wait()
            order.append("large" if length > INLINE_BYTES else "small")

        import asyncio

        rig.fail_read = wait
        large = asyncio.ensure_future(
            world.command("region-read", device="n0", region="bar2", offset=0, length=INLINE_BYTES + 1)
        )
        await world.until(lambda: world.machine.device("n0").lane.busy)
        assert world.machine.device("n0").holders() == [Holder(kind="operation", detail="region-read")]
        small = asyncio.ensure_future(world.command("region-read", device="n0", region="bar0", offset=4, size=4))
        # Queries do not wait.
        assert await world.region("bar0")
        gate.set()
        await asyncio.gather(large, small)
        assert order == ["large", "small"]

    play(scenario)


# --- memory decoding: a mapped access would be SIGBUS -------------------------------------------------


def test_without_memory_decoding_nothing_is_accessed_by_its_mapping(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("region-write", device="n0", region="config", offset=4, size=2, value=0)
        info = await world.region("bar2")
        assert not info.mapped
        assert "decodes no memory" in info.note
        seen: list[int] = []
        rig.fail_read = lambda region, offset, length: seen.append(region)
        await world.command("region-read", device="n0", region="bar2", offset=0, size=4)
        assert seen == [2]
        await world.command("region-write", device="n0", region="config", offset=4, data="Ag==")
        assert (await world.region("bar2")).mapped
        assert world.told(RegionMmapChanged) == [
            RegionMmapChanged(device="n0", enabled=False),
            RegionMmapChanged(device="n0", enabled=True),
        ]

    play(scenario)


def test_a_sleeping_device_is_not_accessed_by_its_mapping(play: Any) -> None:
    power = {0x34: 0x80, 0x80: 0x01, 0x81: 0, 0x84: 3}  # the power management capability, in D3hot

    async def scenario(world: Any) -> None:
        rig = await world.add(prepare=lambda rig: rig.overlay.update(power))
        assert not (await world.region("bar2")).mapped
        rig.overlay[0x84] = 0
        await world.command("region-write", device="n0", region="config", offset=0x84, size=2, value=0)
        assert (await world.region("bar2")).mapped

    play(scenario)


@pytest.mark.parametrize("chain", [{0x34: 0x80, 0x80: 9, 0x81: 0x80}, {0x34: 0x04}, {0x34: 0xFC, 0xFC: 9, 0xFD: 0x10}])
def test_a_capability_chain_that_loops_or_leaves_the_space_is_cut(play: Any, chain: dict[int, int]) -> None:
    async def scenario(world: Any) -> None:
        await world.add(prepare=lambda rig: rig.overlay.update(chain))
        assert (await world.region("bar2")).mapped

    play(scenario)


# --- region-map -----------------------------------------------------------------------------------------


def test_region_map_hands_out_what_maps_the_region(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add()
        await world.command("region-write", device="n0", region="bar2", offset=PAGE_SIZE, size=4, value=0xCAFE)
        reply = await world.command("region-map", device="n0", region="bar2")
        [fd] = world.attached
        assert (reply.map_fd, reply.size, [(a.offset, a.size) for a in reply.areas]) == (0, BAR2, [(0, BAR2)])
        with mmap.mmap(fd.number, BAR2, offset=reply.offset) as mapped:
            assert mapped[PAGE_SIZE : PAGE_SIZE + 2] == b"\xfe\xca"
            mapped[0:4] = b"\x01\x02\x03\x04"
        reply = await world.command("region-read", device="n0", region="bar2", offset=0, size=4)
        assert reply.value == 0x04030201
        device = world.machine.device("n0")
        assert device.holders() == [Holder(kind="mapping", detail="session 1: bar2")]
        # From now on somebody else could switch decoding off: no mapped access of ours.
        info = await world.region("bar2")
        assert not info.mapped
        assert "given out" in info.note
        world.machine.session_ended(2)
        assert device.holders() != []
        world.machine.session_ended(1)
        assert device.holders() == []

    play(scenario)


def test_region_unmap_ends_this_sessions_holding_and_no_others(play: Any) -> None:
    """Section 3, "region-map hands the fd ... to the caller": the caller says when it no longer has it."""

    async def scenario(world: Any) -> None:
        await world.add()
        device = world.machine.device("n0")
        with pytest.raises(InvalidArgument, match=r"does not hold region bar2 of device 'n0' .* holds no region of it"):
            await world.command("region-unmap", device="n0", region="bar2")
        await world.command("region-map", device="n0", region="bar2")
        await world.command("region-map", device="n0", region="bar2")
        with pytest.raises(InvalidArgument, match=r"does not hold region bar0 .*: it holds bar2"):
            await world.command("region-unmap", device="n0", region="bar0")
        device.map_region(device.regions.find("bar2"), 2).close()
        await world.command("region-unmap", device="n0", region="bar2")
        assert device.holders() == [Holder(kind="mapping", detail="session 2: bar2")]
        assert not (await world.region("bar2")).mapped, "somebody may have the fd: no mapped access of ours"
        with pytest.raises(InvalidArgument, match="holds no region"):
            await world.command("region-unmap", device="n0", region="bar2")

    play(scenario)


def test_leaving_pages_out_of_what_may_be_mapped() -> None:
    """Section 4, MSI-X: "the pages of the table are left out of what may be mapped (sparse areas before and after)"."""

    def left(areas: tuple[tuple[int, int], ...], offset: int, size: int) -> tuple[tuple[int, int], ...]:
        region = describe(2, vfio.RegionInfo(2, vfio.RegionFlags.READ, 8 * PAGE_SIZE, 0))
        region.areas = areas
        region.leave_out(offset, size, "the table is there")
        assert (region.note is not None) == (bool(areas) and not region.areas)
        return region.areas

    p = PAGE_SIZE
    whole = ((0, 8 * p),)
    assert left(whole, 3 * p, 16) == ((0, 3 * p), (4 * p, 4 * p))  # before and after
    assert left(whole, 3 * p + 100, p) == ((0, 3 * p), (5 * p, 3 * p))  # it crosses a page: both go
    assert left(whole, 0, 16) == ((p, 7 * p),)
    assert left(whole, 8 * p - 16, 16) == ((0, 7 * p),)
    assert left(whole, 0, 8 * p) == ()
    assert left(((0, p), (2 * p, 2 * p)), p, p) == ((0, p), (2 * p, 2 * p))  # between two areas: nothing to leave out
    assert left(((0, p), (2 * p, 2 * p)), 2 * p, 16) == ((0, p), (3 * p, p))
    assert left(((0, p), (2 * p, 2 * p)), 0, 4 * p) == ()
    assert left((), 0, p) == ()


def test_share_fd_off_forbids_it(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add(share_fd=False)
        with pytest.raises(PermissionRefused, match="Device 'n0' was added with share-fd=false"):
            await world.command("region-map", device="n0", region="bar2")
        assert world.attached == []

    play(scenario)


@pytest.mark.parametrize(
    ("name", "words"),
    [("bar0", "the device does not allow it"), ("bar1", "its size is 0"), ("config", "does not allow it")],
)
def test_what_cannot_be_mapped_is_refused(play: Any, name: str, words: str) -> None:
    async def scenario(world: Any) -> None:
        await world.add()
        with pytest.raises(InvalidArgument, match=f"Region {name} of device 'n0' cannot be mapped: .*{words}"):
            await world.command("region-map", device="n0", region=name)
        assert world.machine.device("n0").holders() == []

    play(scenario)


def test_a_reply_that_carries_no_fds_is_no_place_for_one(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add()
        world.session = None
        with pytest.raises(InvalidArgument, match="this reply can carry none"):
            await world.command("region-map", device="n0", region="bar2")
        with pytest.raises(InvalidArgument, match="Parameter 'eventfds' is missing: this reply can carry no fds"):
            await world.command("irq-start", device="n0")

    play(scenario)


# --- listing ---------------------------------------------------------------------------------------------


def test_the_capabilities_of_a_region_are_listed() -> None:
    info = vfio.RegionInfo(
        9, vfio.RegionFlags.READ, PAGE_SIZE, 0, (vfio.RegionTypeCap(0x8000_8086, 2), vfio.MsixMappable())
    )
    [listed] = Regions("n0", None, (describe(9, info),)).infos()  # type: ignore[arg-type]  # listing asks no backend
    assert (listed.type, listed.subtype, listed.msix_mappable) == (0x8000_8086, 2, True)
    assert (listed.readable, listed.writable, listed.mappable) == (True, False, False)


def test_listing(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        await world.add("n1")
        infos = await world.command("query-regions")
        assert len(infos) == 18
        bar0, absent = infos[0], infos[1]
        assert (bar0.device, bar0.region, bar0.name, bar0.size, bar0.mappable) == ("n0", 0, "bar0", 4096, False)
        assert (absent.name, absent.size, absent.readable, absent.writable) == ("bar1", 0, False, False)
        assert {info.device for info in infos} == {"n0", "n1"}
        with pytest.raises(DeviceNotFound):
            await world.command("query-regions", device="zz")

    play(scenario)
