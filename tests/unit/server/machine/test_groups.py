"""Devices of kernel groups, through the machine: every failure undone, fds, containers, memory, who holds what.

Rules are those of behaviour.md, sections 1 and 2.
"""

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceRequested
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed, PermissionRefused

Play = Callable[[Callable[[Any], Any]], None]

HOST = "0000:01:00.0"
MiB = 1 << 20


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def add_group_device(world: Any, id: str = "n0", host: str = HOST, group: int = 7, **more: Any) -> None:
    """Make the host device, open its group as a manager does, and add it."""
    world.kernel.add_device(host, group)
    world.name_opened("g", f"/dev/vfio/{group}")
    await world.command("device_add", driver="vfio-pci", id=id, host=host, group_fd="g", **more)


async def delete(world: Any, id: str, **more: Any) -> Any:
    before = len(world.told(DeviceDeleted))
    await world.command("device_del", id=id, **more)
    return (await world.hears(DeviceDeleted, count=before + 1))[-1]


def test_a_passed_group_is_consumed_used_and_let_go(play: Play) -> None:
    async def scenario(world: Any) -> None:
        before = fds()
        await add_group_device(world)
        assert world.names.look("g") is None
        [info] = await world.command("query-devices")
        assert (info.backend, info.host, info.group.id, info.group.noiommu) == ("kernel-group", HOST, 7, False)
        [container] = (await world.command("query-machine")).containers
        assert (container.groups, container.passed, container.iommu) == ([7], False, "type1v2")
        owners = Counter(one.owner for one in world.machine.fd_infos())
        assert owners["group:7"] == owners[f"container:{container.id}"] == 1
        assert owners["device:n0"] >= 2  # its own fd, and REQ's eventfd
        gone = await delete(world, "n0")
        assert gone.released is True
        assert world.kernel.nothing_is_open()
        assert fds() == before

    play(scenario)


def test_each_system_call_of_a_removal_may_fail_and_it_ends_all_the_same(play: Play) -> None:
    async def scenario(world: Any) -> None:
        kernel = world.kernel
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        await add_group_device(world)
        kernel.log.clear()
        await delete(world, "n0")
        calls = list(kernel.log)
        assert {"VFIO_IOMMU_UNMAP_DMA", "VFIO_GROUP_UNSET_CONTAINER", "VFIO_DEVICE_SET_IRQS"} <= set(calls)
        before = fds()
        for at, name in enumerate(calls):
            await add_group_device(world)
            kernel.fail(name, *[0] * calls[:at].count(name), errno.EIO)
            gone = await delete(world, "n0")
            kernel._failures.clear()
            assert gone.device == "n0"
            assert world.machine.groups.containers() == (), name
            assert world.machine.memory.spaces == (), name
            assert kernel.nothing_is_open(), name
            assert fds() == before, name
        assert len(world.told(DeviceDeleted)) == len(calls) + 1

    play(scenario)


def test_each_system_call_may_fail_and_nothing_is_left(play: Play) -> None:
    """Learn what calls an addition makes; then fail each of them in turn, and look what is left."""

    async def learn(world: Any) -> list[str]:
        world.kernel.add_device(HOST, 7)
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        world.name_opened("g", "/dev/vfio/7")
        world.kernel.log.clear()
        await world.command("device_add", driver="vfio-pci", id="n0", host=HOST, group_fd="g")
        return list(world.kernel.log)

    calls: list[str] = []

    async def first(world: Any) -> None:
        calls.extend(await learn(world))

    play(first)
    assert {"VFIO_SET_IOMMU", "VFIO_IOMMU_MAP_DMA", "VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_SET_IRQS"} <= set(calls)

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        kernel.add_device(HOST, 7)
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        await add_group_device(world)  # maps the memory into this process, which then stays so
        await delete(world, "n0")
        refused = 0
        for at, name in enumerate(calls):
            world.name_opened("g", "/dev/vfio/7")
            before, events = fds(), len(world.events)
            kernel.fail(name, *[0] * calls[:at].count(name), errno.EIO)
            try:
                await world.command("device_add", driver="vfio-pci", id="n0", host=HOST, group_fd="g")
            except CommandError:
                refused += 1
                assert world.names.look("g") is not None, name
                assert len(world.events) == events, name
                world.names.remove("g")
            else:
                # Some calls only ask for what a device may lack; then it is there, whole, and goes again.
                assert (await delete(world, "n0")).released
            kernel._failures.clear()
            assert world.machine.memory.spaces == (), name
            assert world.machine.groups.containers() == (), name
            assert kernel.nothing_is_open(), name
            assert fds() == before - 1, name  # the manager's group is gone, nothing else came or went
            assert len(world.machine.devices) == 0
        assert refused >= 10

    play(scenario)


@pytest.mark.parametrize(
    ("operation", "number", "words"),
    [
        ("VFIO_SET_IOMMU", errno.EPERM, "allow_unsafe_interrupts|interrupt remapping"),
        ("VFIO_IOMMU_MAP_DMA", errno.EFAULT, "VFIO_IOMMU_MAP_DMA on container:0 .IOVA 0x0.*EFAULT"),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.EBUSY, "VFIO_GROUP_GET_DEVICE_FD on .*EBUSY"),
    ],
)
def test_failures_say_what_to_do(play: Play, operation: str, number: int, words: str) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        world.kernel.fail(operation, number)
        with pytest.raises(OperationFailed, match=words):
            await add_group_device(world)

    play(scenario)


def test_a_memory_lock_limit_too_low_is_named_with_the_need(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.memory_lock = 0x80000
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        with pytest.raises(OperationFailed, match=r"IOVA 0x0.*ENOMEM.*RLIMIT_MEMLOCK") as caught:
            await add_group_device(world)
        assert "524288" in str(caught.value) or "512" in str(caught.value)
        assert world.names.look("g") is not None
        assert world.machine.groups.containers() == ()

    play(scenario)


def test_a_group_serves_all_its_devices_and_ends_with_the_last(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.add_device("0000:01:00.1", 7)
        await add_group_device(world)
        await world.command("device_add", driver="vfio-pci", id="n1", host="01:00.1")
        with pytest.raises(Busy, match=f"{HOST} is already attached"):
            await world.command("device_add", driver="vfio-pci", id="n2", host=HOST)
        assert (await delete(world, "n0")).released
        assert [one.groups for one in world.machine.groups.containers()] == [[7]]
        assert (await delete(world, "n1")).released
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_memory_reaches_every_container_or_none(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.compatible = False  # each group needs a container of its own
        await add_group_device(world)
        await add_group_device(world, "n1", "0000:02:00.0", 8)
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        assert [sorted(one.mappings) for one in world.kernel.containers()] == [[0], [0]]
        await add_group_device(world, "n2", "0000:03:00.0", 9)
        assert [sorted(one.mappings) for one in world.kernel.containers()] == [[0]] * 3
        world.name_memory("m")
        world.kernel.fail("VFIO_IOMMU_MAP_DMA", 0, 0, errno.ENOMEM)
        with pytest.raises(OperationFailed, match="ENOMEM"):
            await world.command("dma-map", iova=MiB, size=MiB, fd="m")
        assert [sorted(one.mappings) for one in world.kernel.containers()] == [[0]] * 3
        assert world.names.look("m") is not None
        world.kernel.fail("VFIO_IOMMU_UNMAP_DMA", 0, errno.EINVAL)
        with pytest.raises(OperationFailed, match="EINVAL"):
            await world.command("dma-unmap", iova=0, size=MiB)
        assert [sorted(one.mappings) for one in world.kernel.containers()] == [[0]] * 3
        await world.command("dma-unmap", iova=0, size=MiB)
        assert [sorted(one.mappings) for one in world.kernel.containers()] == [[]] * 3

    play(scenario)


def test_an_address_the_iommu_cannot_do_is_refused_before_any_call(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_group_device(world)
        world.name_memory("m")
        world.kernel.log.clear()
        with pytest.raises(
            InvalidArgument, match=r"container:\d+ cannot translate 0xfee00000 to 0xfeefffff; it can do"
        ):
            await world.command("dma-map", iova=0xFEE00000, size=MiB, fd="m")
        assert "VFIO_IOMMU_MAP_DMA" not in world.kernel.log

    play(scenario)


def test_a_container_object_is_used_and_cannot_be_deleted_meanwhile(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_opened("c", "/dev/vfio/vfio")
        await world.command("object-add", qom_type="vfio-container", id="c0", fd="c")
        await add_group_device(world, container="c0")
        [one] = await world.command("query-objects")
        assert (one.id, one.used_by) == ("c0", ["group:7"])
        [container] = (await world.command("query-machine")).containers
        assert container.passed is True
        with pytest.raises(CommandError, match="object 'c0' is in use, can not be deleted: group:7 refers to it"):
            await world.command("object-del", id="c0")
        await delete(world, "n0")
        await world.command("object-del", id="c0")
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_an_object_of_another_type_is_no_container(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        await world.command("object-add", qom_type="memory-backend-fd", id="ram0", fd="m")
        with pytest.raises(InvalidArgument, match="expects the id of a vfio-container; object 'ram0' is none"):
            await add_group_device(world, container="ram0")
        assert world.names.look("g") is not None

    play(scenario)


def test_without_permission_nothing_is_opened_here(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.add_device(HOST, 7)
        with pytest.raises(
            PermissionRefused, match="pass group-fd with an fd of /dev/vfio/7, or start the server with"
        ):
            await world.command("device_add", driver="vfio-pci", id="n0", host=HOST)

    play(scenario)


def test_a_dry_run_consumes_no_name_and_changes_nothing(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.add_device(HOST, 7)
        world.name_opened("g", "/dev/vfio/7")
        world.name_opened("c", "/dev/vfio/vfio")
        await world.command("object-add", qom_type="vfio-container", id="c0", fd="c")
        before = fds()
        world.kernel.log.clear()
        for more in ({}, {"container": "c0"}):
            report = await world.command(
                "device_add", driver="vfio-pci", id="n0", host=HOST, group_fd="g", x_dry_run=True, **more
            )
            assert report.possible is True
            assert {check.name for check in report.checks} >= {"id", "viable", "container", "memory-lock", "open-files"}
        assert not [name for name in world.kernel.log if "SET" in name and "GET_" not in name]
        assert world.names.look("g") is not None
        assert fds() == before
        with pytest.raises(InvalidArgument, match="object 'c1' not found"):
            await world.command(
                "device_add", driver="vfio-pci", host=HOST, group_fd="g", container="c1", x_dry_run=True
            )
        assert fds() == before
        await world.command("device_add", driver="vfio-pci", id="n0", host=HOST, group_fd="g", container="c0")

    play(scenario)


def test_an_fd_given_out_keeps_the_group_until_it_is_closed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiod.server.machine.root.SWEEP_PERIOD_S", 0.01)

    async def scenario(world: Any) -> None:
        await add_group_device(world)
        device = world.machine.device("n0")
        region = next(one for one in device.regions.all if one.areas)
        given = device.map_region(region, 3)
        gone = await delete(world, "n0", force=True)
        assert gone.released is False
        assert world.machine.groups.lingering == (7,)
        await asyncio.sleep(0.05)
        assert world.machine.groups.lingering == (7,)
        given.close()
        await world.until(lambda: world.machine.groups.lingering == ())
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_the_host_asks_and_gets_it(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_group_device(world, on_request="delete")
        assert world.kernel.request(HOST) is True
        await world.hears(DeviceDeleted)
        assert [event.action for event in world.told(DeviceRequested)] == ["delete"]
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_the_machines_end_lets_everything_go(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add_group_device(world)
        await add_group_device(world, "n1", "0000:02:00.0", 8)
        await world.add("n2")
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=MiB, fd="m")
        assert await world.machine.close() == []
        assert [event.device for event in world.told(DeviceDeleted)] == ["n2", "n1", "n0"]
        assert all(event.released for event in world.told(DeviceDeleted))
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_adding_costs_the_same_however_many_are_there(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.file_limit = 100_000
        costs = []
        for n in range(40):
            host = f"0000:{n + 1:02x}:00.0"
            world.kernel.log.clear()
            await add_group_device(world, f"n{n}", host, 100 + n)
            costs.append(len(world.kernel.log))
        assert len(set(costs[1:])) == 1, costs
        assert costs[1] <= costs[0]

    play(scenario)


def test_a_vfio_ap_device_needs_its_vm_first(play: Play) -> None:
    """Section 9. ``vfio_ap_mdev_open_device``: EINVAL without a VM; what that means is said."""

    async def scenario(world: Any) -> None:
        world.kernel.add_device("matrix0", 7, bus="")
        world.kernel.fail("VFIO_GROUP_GET_DEVICE_FD", errno.EINVAL)
        world.name_opened("g", "/dev/vfio/7")
        with pytest.raises(OperationFailed, match="once the hypervisor has associated its VM with it") as caught:
            await world.command(
                "device_add", driver="vfio-ap", id="ap0", sysfsdev="/sys/devices//matrix0", group_fd="g"
            )
        assert caught.value.errno == "EINVAL"
        assert world.names.look("g") is not None
        assert await world.command("query-devices") == []

    play(scenario)
