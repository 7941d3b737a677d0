"""Guest memory and objects as commands see them, with devices coming and going at the same time.

Rules are those of behaviour.md, section 2.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.catalogue.memory import DmaMapResult, DmaUnmapResult
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed

Play = Callable[[Callable[[Any], Any]], None]

MiB = 1 << 20


def spaces(world: Any) -> list[str]:
    return [space.name for space in world.machine.memory.spaces]


# --- dma-map ------------------------------------------------------------------------------------------


def test_a_passed_file_is_mapped_consumed_and_released(play: Play) -> None:
    async def scenario(world: Any) -> None:
        before = len(os.listdir("/proc/self/fd"))
        world.name_memory("m")
        result = await world.command("dma-map", iova=0x800, size=MiB - 0x800, fd="m", offset=0x800)
        assert result == DmaMapResult(iova=0x1000, size=MiB - 0x1000)
        assert world.names.look("m") is None
        [info] = await world.command("query-dma")
        assert (info.iova, info.size, info.offset, info.readonly) == (0x1000, MiB - 0x1000, 0x1000, False)
        assert await world.command("dma-unmap", iova=0, size=MiB) == DmaUnmapResult(size=MiB - 0x1000)
        assert len(os.listdir("/proc/self/fd")) == before

    play(scenario)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Parameter 'fd' is missing: dma-map takes 'fd' or 'memory-backend'"),
        ({"fd": "m", "memory_backend": "ram0"}, "'fd' and 'memory-backend' exclude each other"),
        ({"memory_backend": "ram0"}, "'memory-backend': object 'ram0' not found; object-add of type memory-backend-fd"),
        ({"fd": "zz"}, "File descriptor named 'zz' not found"),
        ({"fd": "e"}, "fd 'e' is an eventfd, expected memfd or file"),
        ({"fd": "m", "offset": 1}, "differ within a page"),
        ({"fd": "m", "size": 2 * MiB}, "is beyond the memory's 0x100000"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_the_name_stays(play: Play, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        world.name_fd("e", os.eventfd(0))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(InvalidArgument, match=words):
            await world.command("dma-map", **{"iova": 0, "size": 0x1000} | arguments)
        assert world.names.look("m") is not None
        assert len(os.listdir("/proc/self/fd")) == before

    play(scenario)


def test_sealed_memory_can_only_be_read_by_devices(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        held = world.names.look("m")
        fcntl.fcntl(held.fd.number, 1033, 0x8)  # F_ADD_SEALS, F_SEAL_WRITE
        with pytest.raises(InvalidArgument, match="'readonly' expects true: the memfd is sealed"):
            await world.command("dma-map", iova=0, size=MiB, fd="m")
        await world.command("dma-map", iova=0, size=MiB, fd="m", readonly=True)
        assert (await world.command("query-dma"))[0].readonly is True

    play(scenario)


def test_every_device_gets_every_mapping_whichever_came_first(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("a")
        world.name_memory("b")
        await world.command("dma-map", iova=0, size=MiB, fd="a")
        first = await world.add("n0")
        await world.command("dma-map", iova=MiB, size=MiB, fd="b")
        second = await world.add("n1")
        assert spaces(world) == [f"mdev:{first}", f"mdev:{second}"]
        await world.command("device_del", id="n0")
        await world.hears(DeviceDeleted)
        assert spaces(world) == [f"mdev:{second}"]

    play(scenario)


def test_a_device_that_refuses_a_mapping_keeps_it_from_all(play: Play) -> None:
    async def scenario(world: Any) -> None:
        plain = await world.machine.mdevs.create("primer", "primer-pci")
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=plain)
        await world.add("n1")
        world.name_memory("m")
        world.temper.refuse = {"map"}
        with pytest.raises(OperationFailed, match="map was refused"):
            await world.command("dma-map", iova=0, size=MiB, fd="m")
        assert world.names.look("m") is not None
        assert await world.command("query-dma") == []
        world.temper.refuse = set()
        await world.command("dma-map", iova=0, size=MiB, fd="m")

    play(scenario)


def test_a_mapping_made_while_a_device_is_added_reaches_it(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("a")
        world.name_memory("b")
        await world.command("dma-map", iova=0, size=MiB, fd="a")
        world.temper.map.close()
        adding = asyncio.create_task(world.add("n0"))
        await world.temper.map.is_reached()  # in the middle of the replay
        mapping = asyncio.create_task(world.command("dma-map", iova=MiB, size=MiB, fd="b"))
        await asyncio.sleep(0.01)
        assert [one.iova for one in await world.command("query-dma")] == [0]  # queries never wait
        world.temper.map.open()
        uuid, _ = await asyncio.gather(adding, mapping)
        assert [one.iova for one in await world.command("query-dma")] == [0, MiB]
        assert spaces(world) == [f"mdev:{uuid}"]

    play(scenario)


def test_a_session_that_dies_in_the_middle_leaves_a_whole_mapping(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        world.name_memory("m")
        world.temper.map.close()
        mapping = asyncio.create_task(world.command("dma-map", iova=0, size=MiB, fd="m"))
        await world.temper.map.is_reached()
        mapping.cancel()
        await asyncio.gather(mapping, return_exceptions=True)
        world.names.close()
        world.temper.map.open()
        await world.until(lambda: len(world.machine.memory) == 1)
        assert await world.command("dma-unmap", iova=0, size=MiB) == DmaUnmapResult(size=MiB)

    play(scenario)


# --- objects ------------------------------------------------------------------------------------------


async def add_memory(world: Any, id: str, **more: Any) -> None:
    world.name_memory(f"fd-{id}")
    await world.command("object-add", qom_type="memory-backend-fd", id=id, fd=f"fd-{id}", **more)


def test_a_backend_is_mapped_in_pieces_and_kept_while_used(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_memory(world, "ram0")
        for n in range(3):
            await world.command("dma-map", iova=n * 0x1000, size=0x1000, memory_backend="ram0", offset=n * 0x2000)
        [info] = await world.command("query-objects")
        assert (info.id, info.size, info.readonly) == ("ram0", MiB, False)
        assert info.used_by == ["mapping:0x0", "mapping:0x1000", "mapping:0x2000"]
        assert {one.memory_backend for one in await world.command("query-dma")} == {"ram0"}
        with pytest.raises(CommandError, match="object 'ram0' is in use, can not be deleted: mapping:0x0, mapping:0x1"):
            await world.command("object-del", id="ram0")
        await world.command("dma-unmap", iova=0, size=0x3000)
        await world.command("object-del", id="ram0")
        assert await world.command("query-objects") == []
        with pytest.raises(CommandError, match=r"^object 'ram0' not found$"):
            await world.command("object-del", id="ram0")

    play(scenario)


def test_objects_that_cannot_be_are_refused_and_the_name_stays(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_memory(world, "ram0")
        world.name_memory("m")
        kind = "memory-backend-fd"
        for arguments, words in (
            ({"id": "ram0"}, "Duplicate object ID 'ram0'"),
            ({"id": "ram1", "size": 2 * MiB}, "'size' expects at most the file's 0x100000 bytes"),
            ({"id": "ram1", "qom_type": "vfio-container"}, "fd 'm' is a memfd, expected vfio-container"),
            ({"id": "ram1", "qom_type": "vfio-container", "size": 1}, "Property 'vfio-container.size' not found"),
        ):
            with pytest.raises(CommandError, match=words):
                await world.command("object-add", **{"qom_type": kind, "fd": "m"} | arguments)
            assert world.names.look("m") is not None
        assert len(await world.command("query-objects")) == 1

    play(scenario)


def test_a_part_of_a_file_and_readonly_are_kept_to(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_memory(world, "ram0", size=0x4000, readonly=True)
        with pytest.raises(InvalidArgument, match="is beyond the memory's 0x4000"):
            await world.command("dma-map", iova=0, size=0x5000, memory_backend="ram0")
        await world.command("dma-map", iova=0, size=0x4000, memory_backend="ram0")
        assert (await world.command("query-dma"))[0].readonly is True

    play(scenario)


def test_a_deletion_waits_behind_a_mapping_and_then_is_refused(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        await add_memory(world, "ram0")
        world.temper.map.close()
        mapping = asyncio.create_task(world.command("dma-map", iova=0, size=MiB, memory_backend="ram0"))
        await world.temper.map.is_reached()
        deleting = asyncio.create_task(world.command("object-del", id="ram0"))
        await asyncio.sleep(0.01)
        assert not deleting.done()
        world.temper.map.open()
        await mapping
        with pytest.raises(CommandError, match="is in use"):
            await deleting

    play(scenario)


# --- the whole ------------------------------------------------------------------------------------------


def test_the_snapshot_is_one_picture_with_its_number(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_memory(world, "ram0")
        await world.command("dma-map", iova=0, size=MiB, memory_backend="ram0")
        uuid = await world.add("n0")
        picture = await world.command("query-machine")
        assert picture.seq == world.events[-1].seq == 1
        assert [one.id for one in picture.devices] == ["n0"]
        assert [one.id for one in picture.objects] == ["ram0"]
        assert picture.address_spaces == [f"mdev:{uuid}"]
        assert {one.device for one in picture.irqs} == {"n0"}
        assert picture.mdevs == [uuid]
        assert (picture.name, picture.uuid) == ("test", "00000000-0000-0000-0000-000000000000")
        owners = {one.owner for one in world.machine.fd_infos()}
        assert owners == {"object:ram0", "device:n0", f"mdev:{uuid}"}

    play(scenario)


def test_statistics_count_what_there_is(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_memory(world, "ram0")
        await world.command("dma-map", iova=0, size=MiB, memory_backend="ram0")
        await world.add("n0")
        [vm] = world.machine.stats()
        values = {one.name: one.value for one in vm.stats}
        assert values["devices"] == values["objects"] == values["mappings"] == values["address-spaces"] == 1
        assert values["mapped-bytes"] == MiB
        [device] = world.machine.device_stats()
        assert device.qom_path == "/machine/peripheral/n0"

    play(scenario)
