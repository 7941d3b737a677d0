"""``object-add iommufd`` and ``device_add`` with ``fd`` and ``iommufd``: behaviour.md section 1, as commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.errors import CommandError, InvalidArgument, PermissionRefused
from vfiod.protocol.fd import FdKind

FIRST, OTHER = "0000:01:00.0", "0000:02:00.0"
Play = Callable[[Callable[[Any], Any]], None]


async def prepared(world: Any) -> None:
    """Two devices of the host, and an iommufd object i0."""
    world.kernel.add_device(FIRST, 7)
    world.kernel.add_device(OTHER, 8)
    world.name_opened("iommu", "/dev/iommu")
    await world.command("object-add", qom_type="iommufd", id="i0", fd="iommu")


def cdev(world: Any, name: str = "c", device: str = FIRST) -> str:
    world.name_opened(name, f"/dev/vfio/devices/vfio{world.kernel.devices[device].cdev}")
    return name


def test_a_cdev_is_added_serves_and_goes(play: Play) -> None:
    """Section 1: "Modern path"; section 2: mappings made before are in its IOAS, and one made later too."""

    async def scenario(world: Any) -> None:
        await prepared(world)
        world.name_memory("ram")
        await world.command("dma-map", iova=0, size=1 << 20, fd="ram")
        await world.command("device_add", driver="vfio-pci", id="n0", fd=cdev(world), iommufd="i0")
        (info,) = await world.command("query-devices")
        assert (info.backend, info.host) == ("kernel-cdev", FIRST)
        (ioas,) = world.kernel.ioases()
        assert list(ioas.mappings) == [0]
        assert world.machine.snapshot(world.server.status, []).address_spaces == ["ioas:i0/2"]
        (thing,) = await world.command("query-objects")
        assert (thing.qom_type, thing.used_by) == ("iommufd", ["device:n0"])
        owners = {(fd.owner, fd.kind) for fd in world.machine.fd_infos()}
        assert {("object:i0", FdKind.IOMMUFD), ("device:n0", FdKind.VFIO_DEVICE)} <= owners
        with pytest.raises(CommandError, match="object 'i0' is in use, can not be deleted: device:n0 refers to it"):
            await world.command("object-del", id="i0")
        await world.command("device_del", id="n0")
        await world.until(lambda: not world.machine.devices.exists("n0"))
        await world.command("object-del", id="i0")
        assert world.kernel.nothing_is_open()

    play(scenario)


def test_both_interfaces_in_one_machine(play: Play) -> None:
    """Section 1: "Both paths may serve devices of one machine at once"."""

    async def scenario(world: Any) -> None:
        await prepared(world)
        await world.command("device_add", driver="vfio-pci", id="n0", fd=cdev(world), iommufd="i0")
        world.name_opened("g", "/dev/vfio/8")
        await world.command("device_add", driver="vfio-pci", id="n1", host=OTHER, group_fd="g")
        spaces = world.machine.snapshot(world.server.status, []).address_spaces
        assert spaces == ["ioas:i0/2", "container:0"]
        with pytest.raises(CommandError, match="held here through its group file"):
            await world.command("device_add", driver="vfio-pci", fd=cdev(world, "d", OTHER), iommufd="i0")

    play(scenario)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fd": "c"}, "Parameter 'iommufd' is missing"),
        ({"fd": "c", "iommufd": "i0", "host": FIRST}, "'host' and 'fd' exclude each other"),
        ({"fd": "c", "iommufd": "none"}, "object 'none' not found; object-add of type iommufd makes it"),
        ({"fd": "nope", "iommufd": "i0"}, "'nope'"),
        ({"fd": "iommu2", "iommufd": "i0"}, "Parameter 'fd'.*vfio-device"),
        ({"fd": "c", "iommufd": "i0", "group_fd": "c"}, "'group-fd' is for devices of a kernel group"),
        ({"fd": "c", "iommufd": "i0", "x_noiommu": True}, "'x-noiommu' is for devices of a kernel group"),
        ({"fd": "c", "iommufd": "i0", "vf_token": "no"}, "vf-token"),
        ({"iommufd": "i0"}, "Parameter 'host' is missing"),
        (
            {"mdev": "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", "iommufd": "i0"},
            "'iommufd' is for devices of the kernel; 'mdev' takes none",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(play: Play, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        await prepared(world)
        cdev(world)
        world.name_opened("iommu2", "/dev/iommu")
        with pytest.raises(InvalidArgument, match=words):
            await world.command("device_add", driver="vfio-pci", **arguments)
        assert "VFIO_DEVICE_BIND_IOMMUFD" not in world.kernel.log
        await world.command("device_add", driver="vfio-pci", id="n0", fd="c", iommufd="i0")

    play(scenario)


def test_an_iommufd_that_is_a_file(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("file")
        with pytest.raises(InvalidArgument, match=r"'fd'.*iommufd"):
            await world.command("object-add", qom_type="iommufd", id="i0", fd="file")
        world.name_opened("iommu", "/dev/iommu")
        with pytest.raises(InvalidArgument, match=r"Property 'iommufd.size' not found"):
            await world.command("object-add", qom_type="iommufd", id="i0", fd="iommu", size=1)
        assert await world.command("query-objects") == []

    play(scenario)


def test_opened_here_by_host_and_iommufd(play: Play) -> None:
    """QEMU's ``host`` with ``iommufd``: the cdev is opened here, when that is allowed."""

    async def scenario(world: Any) -> None:
        await prepared(world)
        with pytest.raises(PermissionRefused, match="--allow-open"):
            await world.command("device_add", driver="vfio-pci", id="n0", host=FIRST, iommufd="i0")
        report = await world.command("device_add", driver="vfio-pci", host=FIRST, iommufd="i0", x_dry_run=True)
        assert report.possible is False

    play(scenario)


def test_a_dry_run_keeps_the_names(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await prepared(world)
        cdev(world)
        report = await world.command("device_add", driver="vfio-pci", fd="c", iommufd="i0", x_dry_run=True)
        assert report.possible is True
        await world.command("device_add", driver="vfio-pci", id="n0", fd="c", iommufd="i0")

    play(scenario)


def test_a_failed_add_can_be_repeated_with_the_same_name(play: Play) -> None:
    """ "Failing leaves the names": the kernel has no unbinding, so the bound file is taken up again."""

    async def scenario(world: Any) -> None:
        await prepared(world)
        cdev(world)
        world.kernel.fail("pread", 5)  # the first config read
        with pytest.raises(CommandError):
            await world.command("device_add", driver="vfio-pci", id="n0", fd="c", iommufd="i0")
        assert world.kernel.ioases() == []
        await world.command("device_add", driver="vfio-pci", id="n0", fd="c", iommufd="i0")

    play(scenario)


def test_the_token_reaches_the_kernel(play: Play) -> None:
    """SR-IOV: ``vf-token`` goes with the cdev's bind, and with the group's GET_DEVICE_FD."""
    token = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3"

    async def scenario(world: Any) -> None:
        await prepared(world)
        world.kernel.add_device("0000:03:00.0", 20, sriov=True)
        world.kernel.add_device("0000:03:10.0", 21, vf_of="0000:03:00.0")
        name = cdev(world, "p", "0000:03:00.0")
        await world.command("device_add", driver="vfio-pci", id="pf", fd=name, iommufd="i0", vf_token=token)
        world.name_opened("g", "/dev/vfio/21")
        with pytest.raises(CommandError, match="pass vf-token"):
            await world.command("device_add", driver="vfio-pci", id="vf", host="0000:03:10.0", group_fd="g")
        await world.command("device_add", driver="vfio-pci", id="vf", host="0000:03:10.0", group_fd="g", vf_token=token)

    play(scenario)
