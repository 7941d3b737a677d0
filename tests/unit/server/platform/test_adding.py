"""``device_add driver=vfio-platform``: discovered, not assumed; what does not fit is refused, and leaves nothing.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from tests.unit.server.platform.conftest import Play

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed, PermissionRefused


def test_regions_and_interrupts_are_as_many_as_the_device_says(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", "lelee", regions=(0x200, 0x4000, 0x1000))
        await world.plug("p0")
        [info] = await world.command("query-devices")
        assert (info.driver, info.host, info.backend) == ("vfio-platform", "p0.dev", "kernel-group")
        assert (info.regions, info.irq_indexes, info.irq_kind, info.reset) == (3, 5, "none", True)
        regions = await world.command("query-regions", device="p0")
        assert [(one.name, one.size, one.mappable) for one in regions] == [
            ("region0", 0x200, False),
            ("region1", 0x4000, True),
            ("region2", 0x1000, True),
        ]
        irqs = await world.irqs()
        assert [(one.name, one.count, one.flags.automasked, one.active) for one in irqs] == [
            ("irq0", 1, True, False),
            ("irq1", 1, False, False),
            ("irq2", 1, True, False),
            ("irq3", 1, False, False),
            ("irq4", 1, False, False),
        ]
        assert await world.access() == 0x74726976
        eventfds = [one.name for one in world.machine.fd_infos() if one.owner == "device:p0"]
        assert len(eventfds) >= 7, "one for each, and one more for each level: set up when it is added"
        gone = await world.delete()
        assert gone.released

    play(scenario)


def test_compatible_is_read_from_the_host_and_reported(play: Play) -> None:
    """Section 1: read from the device tree, at its node; null where the host has no such node. Never set."""

    async def scenario(world: Any) -> None:
        world.host("p0", compatible="calxeda,hb-xgmac\0snps,dwmac\0")
        world.host("p1", group=8)
        await world.plug("p0")
        await world.plug("p1", group=8)
        assert [one.compatible for one in await world.command("query-devices")] == [
            ["calxeda,hb-xgmac", "snps,dwmac"],
            None,
        ]

    play(scenario)


@pytest.mark.parametrize(("irqs", "regions"), [("", (0x1000,)), ("l", ()), ("", ())])
def test_a_device_may_have_none(play: Play, irqs: str, regions: tuple[int, ...]) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", irqs, regions=regions)
        await world.plug("p0")
        assert len(await world.irqs()) == len(irqs)
        assert len(await world.start(device="p0")) == len(irqs)
        with pytest.raises(InvalidArgument, match="no interrupt index 7"):
            await world.start(device="p0", index=7)

    play(scenario)


def test_by_its_directory_in_sysfs(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0")
        world.name_opened("g", "/dev/vfio/7")
        where = "/sys/devices/platform/p0.dev"
        await world.command("device_add", driver="vfio-platform", id="p0", sysfsdev=where, group_fd="g")
        assert await world.access() == 0x74726976

    play(scenario)


def test_by_its_cdev(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = world.host("p0")
        world.name_opened("i", "/dev/iommu")
        await world.command("object-add", qom_type="iommufd", id="iommufd0", fd="i")
        world.name_opened("d", f"/dev/vfio/devices/vfio{device.cdev}")
        await world.command("device_add", driver="vfio-platform", id="p0", fd="d", iommufd="iommufd0")
        [irq, _] = await world.start(device="p0")
        device.interrupt(0)
        assert irq.rung() == 1
        await world.delete()

    play(scenario)


def test_a_noiommu_group_is_taken_only_when_asked_for(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.add_platform_device("p0.dev", 9, noiommu=True)
        with pytest.raises(PermissionRefused, match="x-noiommu"):
            await world.plug("p0", group=9)
        await world.plug("p0", group=9, x_noiommu=True)
        [info] = await world.command("query-devices")
        assert info.group.noiommu

    play(scenario)


def test_the_wrong_class_an_unknown_name_and_one_that_is_attached(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.kernel.add_device("0000:01:00.0", 8)
        with pytest.raises(InvalidArgument, match="is a pci device: driver 'vfio-platform' takes platform devices"):
            await world.plug("n0", group=8, host="0000:01:00.0")
        world.host("p0")
        with pytest.raises(InvalidArgument, match="is a platform device: driver 'vfio-pci' takes PCI devices"):
            await world.plug("p0", driver="vfio-pci")
        with pytest.raises(InvalidArgument, match=r"neither a PCI address .* nor a platform device of this host"):
            await world.plug("p0", host="ffff0000.nothing")
        await world.plug("p0")
        with pytest.raises(Busy, match=r"p0\.dev is already attached"):
            await world.command("device_add", driver="vfio-platform", id="p1", host="p0.dev")
        assert [one.id for one in await world.command("query-devices")] == ["p0"]

    play(scenario)


def test_what_calls_itself_no_platform_device_is_refused_when_it_is_open(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", flags=vfio.DeviceFlags.AMBA)
        with pytest.raises(InvalidArgument, match="flags AMBA: driver 'vfio-platform'"):
            await world.plug("p0")
        assert world.kernel.nothing_is_open()

    play(scenario)


@pytest.mark.parametrize(
    ("driver", "name", "value"),
    [
        ("vfio-platform", "romfile", "x"),
        ("vfio-platform", "rombar", True),
        ("vfio-platform", "multifunction", False),
        ("vfio-platform", "vf-token", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003"),
        ("vfio-platform", "x-intx-mmap-timeout-ms", 0),
        ("vfio-pci", "x-irqfd", True),
    ],
)
def test_a_property_of_another_driver_is_not_found_in_qemus_words(
    play: Play, driver: str, name: str, value: object
) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0")
        with pytest.raises(InvalidArgument) as refused:
            await world.plug("p0", driver=driver, **{name.replace("-", "_"): value})
        assert str(refused.value) == f"Property '{driver}.{name}' not found"

    play(scenario)


def test_each_driver_lists_its_own_properties(play: Play) -> None:
    async def scenario(world: Any) -> None:
        platform, pci = [
            {one.name for one in await world.command("device-list-properties", typename=driver)}
            for driver in ("vfio-platform", "vfio-pci")
        ]
        assert {"host", "group-fd", "mmap-timeout-ms", "x-no-mmap", "x-irqfd", "x-noiommu"} <= platform
        assert platform - pci == {"x-irqfd"}
        assert {"romfile", "rombar", "multifunction", "vf-token", "x-intx-mmap-timeout-ms"} <= pci - platform

    play(scenario)


def test_x_no_mmap_is_heard(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await world.add(x_no_mmap=True)
        assert not await world.fast()
        assert await world.access() == 0x74726976

    play(scenario)


STEPS = (
    "VFIO_GROUP_GET_STATUS",
    "VFIO_GET_API_VERSION",
    "VFIO_GROUP_SET_CONTAINER",
    "VFIO_SET_IOMMU",
    "VFIO_GROUP_GET_DEVICE_FD",
    "VFIO_DEVICE_GET_INFO",
    "VFIO_DEVICE_GET_REGION_INFO",
    "VFIO_DEVICE_GET_IRQ_INFO",
)


@pytest.mark.parametrize("step", STEPS)
def test_whichever_system_call_fails_nothing_is_left(play: Play, step: str) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", "lel")
        before = len(os.listdir("/proc/self/fd"))
        # The first, and where there are several of one kind the second and third too.
        for passed in range(3 if step.endswith(("REGION_INFO", "IRQ_INFO")) else 1):
            world.kernel.fail(step, *[0] * passed, errno.EIO)
            failed = False
            try:
                await world.plug("p0")
            except (OperationFailed, CommandError):
                failed = True
            if not failed:  # it has fewer of this kind
                assert step.endswith("REGION_INFO")
                assert passed == 2
                await world.delete()
                world.kernel._failures.clear()
            assert world.kernel.nothing_is_open()
            assert len(os.listdir("/proc/self/fd")) == before
        failed_then = [event.device for event in world.told(DeviceAdded)]
        await world.plug("p0")
        assert len(world.told(DeviceAdded)) == len(failed_then) + 1
        await world.start(device="p0")

    play(scenario)


def test_when_no_eventfd_is_left_nothing_is(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", "lll")
        before = len(os.listdir("/proc/self/fd"))
        made = 0

        def limited(self: Any) -> int:
            nonlocal made
            made += 1
            if made == 5:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        with monkeypatch.context() as patch:
            patch.setattr("vfiod.server.kernel.syscalls.Syscalls.eventfd", limited)
            with pytest.raises(OperationFailed, match=r"EMFILE.*RLIMIT_NOFILE"):
                await world.plug("p0")
        assert world.kernel.nothing_is_open()
        assert len(os.listdir("/proc/self/fd")) == before
        await world.plug("p0")

    play(scenario)


def test_hot_reset_is_refused_by_name_and_a_reset_is_asked_for(play: Play) -> None:
    async def scenario(world: Any) -> None:
        device = await world.add()
        report = await world.command("query-hot-reset", id="p0")
        assert not report.possible
        assert "cannot be hot reset: that is for PCI devices" in report.reason
        with pytest.raises(CommandError, match="cannot be hot reset"):
            await world.command("hot-reset", id="p0")
        await world.command("device-reset", id="p0")
        await world.command("system_reset")
        assert device.resets == 2

    play(scenario)


def test_system_reset_passes_over_one_that_cannot_be_reset(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.host("p0", flags=vfio.DeviceFlags.PLATFORM)
        await world.plug("p0")
        await world.command("system_reset")
        with pytest.raises(CommandError, match="cannot be reset"):
            await world.command("device-reset", id="p0")

    play(scenario)
