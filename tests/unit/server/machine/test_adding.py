"""``device_add``: what is refused and how, what is undone, what a dry run says.

Rules are those of behaviour.md, sections 1 and 4.
"""

import asyncio
import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceDeleted
from vfiod.protocol.catalogue.words import DeviceState
from vfiod.protocol.errors import (
    CommandError,
    DeviceNotActive,
    DeviceNotFound,
    ErrorClass,
    InvalidArgument,
    OperationFailed,
)

Play = Callable[[Callable[[Any], Any]], None]

UUID = "11111111-2222-3333-4444-555555555555"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, "'nope' is not a valid device model name"),
        ({"driver": "nope", "foo": 1}, "'nope' is not a valid device model name"),
        ({"driver": "vfio-pci", "mdev": UUID, "foo": 1}, "Property 'vfio-pci.foo' not found"),
        ({"driver": "vfio-pci"}, "Parameter 'host' is missing: give one origin: 'host' or 'sysfsdev'"),
        ({"driver": "vfio-pci", "id": "n0"}, "Parameter 'host' is missing"),
        ({"driver": "vfio-pci", "host": "1:0.0", "mdev": UUID}, "Parameters 'host' and 'mdev' exclude each other"),
        ({"driver": "vfio-pci", "host": "1:0.0", "sysfsdev": "/x"}, "'host' and 'sysfsdev' exclude each other"),
        (
            {"driver": "vfio-pci", "host": "1:0.0", "sysfsdev": "/x", "mdev": UUID},
            "Parameters 'host' and 'sysfsdev' and 'mdev' exclude",
        ),
        ({"driver": "vfio-pci", "mdev": UUID, "group-fd": "g"}, "Parameter 'group-fd' is for devices of a kernel"),
        ({"driver": "vfio-pci", "mdev": UUID, "container": "c"}, "Parameter 'container' is for devices of a kernel"),
        ({"driver": "vfio-pci", "mdev": UUID, "x-noiommu": True}, "Parameter 'x-noiommu' is for devices of a kernel"),
        (
            {"driver": "vfio-pci", "host": "1:0.0", "container": "c", "container-fd": "f"},
            "'container-fd' and 'container' exclude each other",
        ),
        (
            {"driver": "vfio-pci", "mdev": UUID, "mmap-timeout-ms": 1, "x-intx-mmap-timeout-ms": 2},
            "are two names of one property; they differ: 1 and 2",
        ),
        ({"driver": "vfio-pci", "host": "1:0.0", "container": "c"}, "'container': object 'c' not found; object-add of"),
        ({"driver": "vfio-pci", "host": "1:0.0", "group-fd": "g"}, "File descriptor named 'g' not found"),
    ],
)
def test_bad_arguments_are_refused_by_name(play: Play, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        with pytest.raises(InvalidArgument, match=words) as caught:
            await world.command("device_add", **arguments)
        assert caught.value.error_class is ErrorClass.GENERIC
        assert len(world.machine.devices) == 0

    play(scenario)


def test_an_fd_of_the_wrong_kind_is_refused_and_stays(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        with pytest.raises(InvalidArgument, match="'group-fd': fd 'm' is a memfd, expected vfio-group"):
            await world.command("device_add", driver="vfio-pci", host="1:0.0", group_fd="m")
        assert world.names.look("m") is not None

    play(scenario)


def test_a_device_is_added_told_and_listed(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0", x_intx_mmap_timeout_ms=7, share_fd=False)
        assert world.told() == [DeviceAdded(device="n0", path="/machine/peripheral/n0")]
        [info] = await world.command("query-devices")
        assert (info.id, info.state, info.backend, info.host) == ("n0", DeviceState.RUNNING, "mdev", uuid)
        assert info.share_fd is False
        assert world.machine.device("n0").options.mmap_timeout_ms == 7
        assert await world.command("query-devices", id="/machine/peripheral/n0") == [info]
        with pytest.raises(DeviceNotFound, match="Device 'zz' not found"):
            await world.command("query-devices", id="zz")

    play(scenario)


def test_an_id_may_be_left_out_and_then_the_path_is_the_name(play: Play) -> None:
    async def scenario(world: Any) -> None:
        for n in range(2):
            await world.command("device_add", driver="vfio-pci", mdev=await world.mdev())
            path = f"/machine/peripheral-anon/device[{n}]"
            assert world.told()[-1] == DeviceAdded(path=path)
            assert world.machine.device(path).name == path
            assert (await world.command("query-devices", id=path))[0].id == path
        await world.command("device_del", id="/machine/peripheral-anon/device[0]")
        [gone] = await world.hears(DeviceDeleted)
        assert gone == DeviceDeleted(path="/machine/peripheral-anon/device[0]", released=True)

    play(scenario)


def test_a_duplicate_id_is_refused_in_qemus_words_even_while_the_first_is_being_added(play: Play) -> None:
    async def scenario(world: Any) -> None:
        first, second = await world.mdev(), await world.mdev()
        world.temper.open.close()
        adding = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n0", mdev=first))
        await world.temper.open.is_reached()
        with pytest.raises(CommandError, match="Duplicate device ID 'n0'"):
            await world.command("device_add", driver="vfio-pci", id="n0", mdev=second)
        [info] = await world.command("query-devices")
        assert info.state is DeviceState.REALIZING
        with pytest.raises(DeviceNotActive, match="Device 'n0' is still being added"):
            await world.command("device_del", id="n0")
        world.temper.open.open()
        await adding
        with pytest.raises(CommandError, match="Duplicate device ID 'n0'"):
            await world.command("device_add", driver="vfio-pci", id="n0", mdev=second)
        assert len(world.told(DeviceAdded)) == 1

    play(scenario)


def test_a_mediated_device_is_added_once(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0")
        with pytest.raises(CommandError, match="is in use as device 'n0'"):
            await world.command("device_add", driver="vfio-pci", id="n1", mdev=uuid.upper())
        with pytest.raises(DeviceNotFound, match=f"Mediated device '{UUID}' not found"):
            await world.command("device_add", driver="vfio-pci", id="n1", mdev=UUID)
        assert [device.name for device in world.machine.devices.all()] == ["n0"]

    play(scenario)


def test_more_devices_than_the_limit_are_refused(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiod.server.machine.lifecycle.MAX_DEVICES", 2)

    async def scenario(world: Any) -> None:
        await world.add("n0")
        await world.add("n1")
        with pytest.raises(CommandError, match="This machine has 2 devices, no more are allowed"):
            await world.add("n2")
        report = await world.command("device_add", driver="vfio-pci", mdev=await world.mdev(), x_dry_run=True)
        assert report.possible is False
        assert {check.name for check in report.checks if not check.ok} == {"devices"}

    play(scenario)


@pytest.mark.parametrize("step", ["open", "map", "region_info", "irq_info", "set_irqs"])
def test_failing_at_any_step_leaves_nothing(play: Play, step: str) -> None:
    async def scenario(world: Any) -> None:
        machine = world.machine
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=1 << 20, fd="m")
        uuid = await world.mdev()
        before = sorted(os.listdir("/proc/self/fd"))
        world.temper.refuse = {step}
        with pytest.raises(CommandError, match=r"was refused|EIO"):
            await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
        world.temper.refuse = set()
        assert len(machine.devices) == 0
        assert machine.memory.spaces == ()
        assert machine.topology.pending() == ()
        assert world.told() == []
        # The listing's own fd may have another number; how many there are is what counts.
        assert len(os.listdir("/proc/self/fd")) == len(before)
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
        assert [space.name for space in machine.memory.spaces] == [f"mdev:{uuid}"]

    play(scenario)


def test_a_failing_start_closes_what_was_realized(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise CommandError("No room to listen")

    async def scenario(world: Any) -> None:
        uuid = await world.mdev()
        with monkeypatch.context() as patch:
            patch.setattr("vfiod.server.devices.device.Device.start", fail)
            with pytest.raises(CommandError, match="No room to listen"):
                await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
        assert world.machine.memory.spaces == ()
        await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)

    play(scenario)


def test_a_session_that_dies_in_the_middle_leaves_a_whole_device(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.mdev()
        world.temper.open.close()
        adding = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid))
        await world.temper.open.is_reached()
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        world.temper.open.open()
        await world.hears(DeviceAdded)
        assert world.machine.device("n0").state is DeviceState.RUNNING

    play(scenario)


def test_a_dead_sessions_device_that_fails_is_undone_in_silence(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.mdev()
        world.temper.open.close()
        world.temper.refuse = {"set_irqs"}
        adding = asyncio.create_task(world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid))
        await world.temper.open.is_reached()
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        world.temper.open.open()
        await world.until(lambda: not world.machine.devices.exists("n0"))
        assert world.machine.memory.spaces == ()

    play(scenario)


def test_fds_are_consumed_by_success_alone(play: Play) -> None:
    async def scenario(world: Any) -> None:
        number = os.open("/dev/null", os.O_RDWR)
        world.name_fd("g", number)
        with pytest.raises(InvalidArgument, match="is a character-device, expected vfio-group"):
            await world.command("device_add", driver="vfio-pci", host="0000:01:00.0", group_fd="g")
        assert world.names.look("g") is not None

    play(scenario)


def test_a_dry_run_reports_every_check_and_changes_nothing(play: Play) -> None:
    async def scenario(world: Any) -> None:
        uuid = await world.add("n0")
        free = await world.mdev()
        before = len(os.listdir("/proc/self/fd"))
        ask = {"driver": "vfio-pci", "x_dry_run": True}
        good = await world.command("device_add", id="n1", mdev=free, **ask)
        assert good.possible is True
        assert all(check.ok for check in good.checks)
        bad = await world.command("device_add", id="n0", mdev=uuid, **ask)
        assert bad.possible is False
        assert {check.name for check in bad.checks if not check.ok} == {"id", "free"}
        assert {check.name for check in bad.checks} >= {"id", "devices", "mdev", "free", "reset"}
        assert [device.name for device in world.machine.devices.all()] == ["n0"]
        assert len(world.told(DeviceAdded)) == 1
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(InvalidArgument, match="Parameter 'host' is missing"):
            await world.command("device_add", **ask)

    play(scenario)


def test_properties_are_listed_for_a_driver(play: Play) -> None:
    async def scenario(world: Any) -> None:
        properties = await world.command("device-list-properties", typename="vfio-pci")
        names = {one.name for one in properties}
        assert {"host", "group-fd", "mdev", "x-no-mmap", "on-request", "share-fd"} <= names
        assert not names & {"driver", "id", "x-dry-run"}
        with pytest.raises(DeviceNotFound, match="Device 'nope' not found"):
            await world.command("device-list-properties", typename="nope")

    play(scenario)


def test_running_out_of_fds_at_any_moment_leaves_nothing(play: Play) -> None:
    """The open-file limit falls short at each fd that an addition takes, in turn."""

    async def scenario(world: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        await world.add("warm-up")  # threads and lazy things are there afterwards
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=1 << 20, fd="m")
        uuid = await world.mdev()
        refused, added = 0, False
        for room in range(64):
            before = len(os.listdir("/proc/self/fd"))
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            holes = [os.dup(0) for _ in range(highest + 3 - before)]  # the limit counts numbers, so none is left free
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1 + room, hard))
            try:
                await world.command("device_add", driver="vfio-pci", id="n0", mdev=uuid)
                added = True
            except CommandError as error:
                refused += 1
                assert "EMFILE" in str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for hole in holes:
                    os.close(hole)
            if added:
                break
            assert len(os.listdir("/proc/self/fd")) == before
            assert len(world.machine.devices) == 1
            assert len(world.machine.memory.spaces) == 1
        assert added
        assert refused >= 4

    play(scenario)


def test_a_name_that_cannot_be_duplicated_says_why(play: Play) -> None:
    async def scenario(world: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        world.name_memory("m")
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        holes = [os.dup(0) for _ in range(highest)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            with pytest.raises(OperationFailed, match=r"fd 'm' \(parameter 'fd'\) failed with EMFILE.*RLIMIT_NOFILE"):
                await world.command("dma-map", iova=0, size=1 << 20, fd="m")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for hole in holes:
                os.close(hole)
        assert world.names.look("m") is not None

    play(scenario)
