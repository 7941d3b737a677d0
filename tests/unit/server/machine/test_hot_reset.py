"""Hot reset as one transaction, through the machine: behaviour.md section 6."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceAdded, DeviceError, Holder
from vfiod.protocol.catalogue.reset import DeviceResetDone
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import (
    Busy,
    CommandError,
    DeviceNotFound,
    InvalidArgument,
    OperationFailed,
    PermissionRefused,
)
from vfiod.protocol.vfio import DeviceFlags, PciIrq

Play = Callable[[Callable[[Any], Any]], None]

FIRST, SECOND, THIRD = "0000:04:00.0", "0000:04:00.1", "0000:04:00.2"
OTHER_BUS = "0000:05:00.0"
MASTER_AND_MEMORY = 6
PCI_ALONE_NOT = DeviceFlags.PCI  # no VFIO_DEVICE_FLAGS_RESET


async def add(world: Any, id: str, host: str, group: int, *, pass_group: bool = True, **settings: Any) -> None:
    """A host device of its group, added by its group, and set to work."""
    world.kernel.add_device(host, group, **settings)
    if pass_group:
        world.name_opened(f"g-{id}", f"/dev/vfio/{group}")
        await world.command("device_add", driver="vfio-pci", id=id, host=host, group_fd=f"g-{id}")
    else:
        await world.command("device_add", driver="vfio-pci", id=id, host=host)
    await set_to_work(world, id)


async def add_cdev(world: Any, id: str, host: str, group: int, iommufd: str = "i0") -> None:
    device = world.kernel.add_device(host, group)
    world.name_opened(f"c-{id}", f"/dev/vfio/devices/vfio{device.cdev}")
    await world.command("device_add", driver="vfio-pci", id=id, fd=f"c-{id}", iommufd=iommufd)
    await set_to_work(world, id)


async def add_iommufd(world: Any, id: str = "i0") -> None:
    world.name_opened(f"f-{id}", "/dev/iommu")
    await world.command("object_add", qom_type="iommufd", id=id, fd=f"f-{id}")


async def set_to_work(world: Any, id: str) -> None:
    await world.command("region-write", device=id, region="config", offset=4, size=2, value=MASTER_AND_MEMORY)
    await world.command("irq-start", device=id, index="msi", vectors=[0])


async def command_register(world: Any, id: str) -> int:
    return int((await world.command("region-read", device=id, region="config", offset=4, size=2)).value)


def touched(world: Any) -> list[str]:
    """What was done to any device since the log was cleared, apart from looking."""
    looking = ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", "VFIO_GROUP_GET_STATUS")
    return [name for name in world.kernel.log if name not in looking]


def resets(world: Any) -> list[tuple[str, str]]:
    return [(event.device, event.method) for event in world.told(DeviceResetDone)]


def test_all_quiesce_the_bus_is_reset_once_and_each_is_restored(play: Play) -> None:
    """Section 6: "Before: all affected devices quiesce and drop interrupts; after: each is restored"."""

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 8)
        await add(world, "far", OTHER_BUS, 9)
        report = await world.command("query-hot-reset", id="n0")
        assert report.possible
        assert [(one.address, one.group, one.held_as, one.reason) for one in report.affected] == [
            (FIRST, 7, "n0", UNSET),
            (SECOND, 8, "n1", UNSET),
        ]
        kernel.log.clear()
        assert await world.command("hot-reset", id="n0") == report
        assert kernel.log.count("VFIO_DEVICE_PCI_HOT_RESET") == 1
        for host in (FIRST, SECOND):
            # With no interrupt and no bus mastering at that moment, and with both again now.
            assert kernel.device(host).at_hot_reset == [(None, False)]
            assert kernel.device(host).mode == PciIrq.MSI
        for id in ("n0", "n1"):
            assert await command_register(world, id) == MASTER_AND_MEMORY
        assert sorted(resets(world)) == [("n0", "hot"), ("n1", "hot")]
        assert kernel.device(OTHER_BUS).hot_resets == 0
        [bound] = [irq for irq in world.machine.device("n1").irq_infos() if irq.active]
        assert (bound.name, len(bound.vectors)) == ("msi", 1)

    play(scenario)


def test_refused_for_a_missing_group_and_nothing_is_touched(play: Play) -> None:
    """Section 6: "Refused: nothing is touched"."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        world.kernel.add_device(SECOND, 8)
        world.kernel.log.clear()
        report = await world.command("query-hot-reset", id="n0")
        assert not report.possible
        assert "group 8 is not held here" in report.affected[1].reason
        with pytest.raises(PermissionRefused, match=rf"'n0' is not hot reset: 1 of 2 .*{SECOND}: group 8") as refused:
            await world.command("hot-reset", id="n0")
        assert refused.value.errno == "EPERM"
        assert touched(world) == []
        assert world.kernel.device(FIRST).mode == PciIrq.MSI
        assert await command_register(world, "n0") == MASTER_AND_MEMORY
        assert resets(world) == []

    play(scenario)


def test_refused_while_there_are_virtual_functions(play: Play) -> None:
    """Section 6, ``query-hot-reset``: "for what reason the reset would be refused"; whoever holds them."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 8)
        assert (await world.command("query-hot-reset", id="n1")).possible
        world.kernel.device(SECOND).vf_of = FIRST
        world.kernel.log.clear()
        report = await world.command("query-hot-reset", id="n0")
        assert [one.reason is UNSET for one in report.affected] == [True, False]
        with pytest.raises(PermissionRefused, match=rf"{SECOND}: it is a virtual function: .*sriov_numvfs"):
            await world.command("hot-reset", id="n0")
        assert touched(world) == []
        assert resets(world) == []
        world.kernel.device(SECOND).vf_of = None

    play(scenario)


def test_granted_with_a_lent_group_which_is_given_back(play: Play) -> None:
    """Section 6: a group lent for the call and attached to no container."""

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "n0", FIRST, 7)
        kernel.add_device(SECOND, 8)
        lent = kernel.open("/dev/vfio/8")
        world.name_fd("lent", os.dup(lent))
        before = len(os.listdir("/proc/self/fd"))
        report = await world.command("hot-reset", id="n0", group_fds=["lent"])
        assert report.possible
        assert world.names.look("lent") is None  # it succeeded: the name is consumed
        assert len(os.listdir("/proc/self/fd")) == before - 1
        assert (kernel.device(FIRST).hot_resets, kernel.device(SECOND).hot_resets) == (1, 1)
        assert resets(world) == [("n0", "hot")]
        assert {one.owner for one in world.machine.fd_infos()}.isdisjoint({"group:8"})
        os.close(lent)

    play(scenario)


def test_a_lent_group_that_somebody_uses_is_refused(play: Play) -> None:
    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "n0", FIRST, 7)
        kernel.add_device(SECOND, 8)
        container, group = kernel.open("/dev/vfio/vfio"), kernel.open("/dev/vfio/8")
        kernel.ioctl(group, 0x3B68, bytearray(container.to_bytes(4, "little")))  # VFIO_GROUP_SET_CONTAINER
        world.name_fd("lent", os.dup(group))
        kernel.log.clear()
        with pytest.raises(PermissionRefused, match="attached to a container: somebody uses it"):
            await world.command("hot-reset", id="n0", group_fds=["lent"])
        assert touched(world) == []
        assert world.names.look("lent") is not None
        os.close(group)
        os.close(container)

    play(scenario)


def test_lent_fds_that_do_not_belong_are_refused(play: Play) -> None:
    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "n0", FIRST, 7)
        kernel.add_device(OTHER_BUS, 9)
        world.name_opened("far", "/dev/vfio/9")
        world.name_memory("m")
        kernel.log.clear()
        with pytest.raises(InvalidArgument, match="'group-fds': the reset of 'n0' does not reach group 9"):
            await world.command("hot-reset", id="n0", group_fds=["far"])
        with pytest.raises(InvalidArgument, match=r"'group-fds\[0\]': fd 'm' is a memfd, expected vfio-group"):
            await world.command("hot-reset", id="n0", group_fds=["m"])
        with pytest.raises(InvalidArgument, match=r"'group-fds\[1\]'.*'nowhere' not found"):
            await world.command("hot-reset", id="n0", group_fds=["far", "nowhere"])
        with pytest.raises(DeviceNotFound):
            await world.command("hot-reset", id="n9", group_fds=["far"])
        assert touched(world) == []
        assert world.names.look("far") is not None

    play(scenario)


def test_two_functions_of_one_group_need_it_once(play: Play) -> None:
    """Section 1, "each device of one group needs the same group"; section 6: its fd goes to the kernel once."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 7, pass_group=False)
        world.kernel.add_device(THIRD, 7)
        report = await world.command("hot-reset", id="n1")
        assert [one.held_as for one in report.affected] == ["n0", "n1", UNSET]
        assert len(resets(world)) == 2

    play(scenario)


def test_a_cdev_owns_its_bus_or_is_refused(play: Play) -> None:
    """Section 6: "with cdevs: allowed only when DEV_ID_OWNED, zero-length fd array. The two do not mix"."""

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add_iommufd(world)
        await add_cdev(world, "c0", FIRST, 7)
        kernel.add_device(SECOND, 8)
        kernel.log.clear()
        report = await world.command("query-hot-reset", id="c0")
        assert [(one.devid, one.group) for one in report.affected] == [(report.affected[0].devid, UNSET), (-1, UNSET)]
        assert report.affected[0].devid > 0
        with pytest.raises(PermissionRefused, match=rf"{SECOND}: neither it nor its IOMMU group is owned by iommufd"):
            await world.command("hot-reset", id="c0")
        world.name_opened("g", "/dev/vfio/8")
        with pytest.raises(InvalidArgument, match="'group-fds' is for devices of a group: 'c0' was added by its cdev"):
            await world.command("hot-reset", id="c0", group_fds=["g"])
        assert touched(world) == []
        world.names.close()  # the group is closed: its device may be used by its cdev
        world.name_opened("c", f"/dev/vfio/devices/vfio{kernel.device(SECOND).cdev}")
        await world.command("device_add", driver="vfio-pci", id="c1", fd="c", iommufd="i0")
        await set_to_work(world, "c1")
        report = await world.command("hot-reset", id="c0")
        assert [one.held_as for one in report.affected] == ["c0", "c1"]
        assert sorted(resets(world)) == [("c0", "hot"), ("c1", "hot")]
        assert kernel.device(SECOND).at_hot_reset == [(None, False)]

    play(scenario)


def test_a_function_added_during_the_reset_waits(play: Play) -> None:
    """Issue 3: "a function of the reset domain added during the reset"."""

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "n0", FIRST, 7)
        kernel.add_device(SECOND, 7)
        lane = world.machine.device("n0").lane
        async with lane.turn("something long"):
            reset = asyncio.ensure_future(world.command("hot-reset", id="n0"))
            await world.until(lambda: lane.waiting == 1)
            adding = asyncio.ensure_future(world.command("device_add", driver="vfio-pci", id="n1", host=SECOND))
            await world.until(lambda: world.machine.topology.waiting == 1)
            removing = world.command("device_del", id="n0", force=True)
            await removing
            # Queries go on, also about the reset.
            assert (await world.command("query-hot-reset", id="n0")).possible
            assert not reset.done()
            assert not adding.done()
        await asyncio.gather(reset, adding)
        kinds = [event.data for event in world.events if isinstance(event.data, DeviceResetDone | DeviceAdded)]
        assert [type(one) for one in kinds] == [DeviceAdded, DeviceResetDone, DeviceAdded]
        assert kernel.device(SECOND).at_hot_reset == []

    play(scenario)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.ENODEV])
def test_what_the_kernel_refuses_is_undone(play: Play, number: int) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 8)
        world.kernel.fail("VFIO_DEVICE_PCI_HOT_RESET", number)
        with pytest.raises(OperationFailed) as failed:
            await world.command("hot-reset", id="n0")
        assert failed.value.errno == errno.errorcode[number]
        for id, host in (("n0", FIRST), ("n1", SECOND)):
            assert world.kernel.device(host).mode == PciIrq.MSI
            assert await command_register(world, id) == MASTER_AND_MEMORY
            assert not world.machine.device(id).lane.busy
        assert resets(world) == []
        await world.command("hot-reset", id="n0")
        assert len(resets(world)) == 2

    play(scenario)


def test_one_that_cannot_be_quiesced_keeps_the_bus_from_its_reset(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 8)
        world.kernel.log.clear()
        world.kernel.fail("VFIO_DEVICE_SET_IRQS", 0, errno.EIO)  # n0's are off, n1's cannot be
        with pytest.raises(OperationFailed, match="VFIO_DEVICE_SET_IRQS"):
            await world.command("hot-reset", id="n0")
        assert "VFIO_DEVICE_PCI_HOT_RESET" not in world.kernel.log
        for id, host in (("n0", FIRST), ("n1", SECOND)):
            assert world.kernel.device(host).mode == PciIrq.MSI
            assert await command_register(world, id) == MASTER_AND_MEMORY
        assert resets(world) == []

    play(scenario)


def test_a_device_that_comes_back_as_all_ones_is_reported_and_the_others_are_restored(play: Play) -> None:
    """Issue 3: "A device that comes back as all ones is reported"."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7, dies=True)
        await add(world, "n1", SECOND, 8)
        with pytest.raises(CommandError, match=r"The bus was reset, but .*device 'n0': .*all ones") as failed:
            await world.command("hot-reset", id="n1")
        assert failed.value.errno == "EIO"
        [error] = world.told(DeviceError)
        assert (error.device, "all ones" in error.reason) == ("n0", True)
        assert resets(world) == [("n1", "hot")]
        assert await command_register(world, "n1") == MASTER_AND_MEMORY

    play(scenario)


def test_a_device_whose_bus_cannot_be_reset_says_so(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7, hot_resettable=False)
        report = await world.command("query-hot-reset", id="n0")
        assert (report.possible, report.affected) == (False, [])
        assert "neither its bus nor its slot can be reset" in report.reason
        with pytest.raises(OperationFailed, match="ENODEV"):
            await world.command("hot-reset", id="n0")
        await world.add("m0")
        report = await world.command("query-hot-reset", id="m0")
        assert (report.possible, report.affected) == (False, [])
        with pytest.raises(OperationFailed):
            await world.command("hot-reset", id="m0")
        assert resets(world) == []

    play(scenario)


def test_it_goes_on_when_its_caller_is_gone(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        lane = world.machine.device("n0").lane
        async with lane.turn("something long"):
            reset = asyncio.ensure_future(world.command("hot-reset", id="n0"))
            await world.until(lambda: lane.waiting == 1)
            reset.cancel()
        await world.hears(DeviceResetDone)
        await world.machine.topology.idle()
        assert world.kernel.device(FIRST).mode == PciIrq.MSI

    play(scenario)


def test_many_functions_need_no_room_of_their_own(play: Play) -> None:
    """The kernel says ENOSPC until there is room for every function."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        for slot in range(1, 31):
            world.kernel.add_device(f"0000:04:{slot:02x}.0", 7)
        report = await world.command("query-hot-reset", id="n0")
        assert report.possible
        assert len(report.affected) == 31

    play(scenario)


# --- system_reset ------------------------------------------------------------------------------------------------


def test_system_reset_hot_resets_each_bus_once_and_then_the_others(play: Play) -> None:
    """Section 6, ``system_reset``: those that can only be reset with their bus first, each bus once."""

    async def scenario(world: Any) -> None:
        kernel = world.kernel
        await add(world, "alone", OTHER_BUS, 9)
        await add(world, "n0", FIRST, 7, flags=PCI_ALONE_NOT)
        await add(world, "n1", SECOND, 8, flags=PCI_ALONE_NOT)
        await add(world, "n2", THIRD, 10)  # could be reset alone, and is on that bus
        kernel.log.clear()
        await world.command("system_reset")
        order = [name for name in kernel.log if name in ("VFIO_DEVICE_PCI_HOT_RESET", "VFIO_DEVICE_RESET")]
        assert order == ["VFIO_DEVICE_PCI_HOT_RESET", "VFIO_DEVICE_RESET"]
        assert sorted(resets(world)) == [("alone", "device"), ("n0", "hot"), ("n1", "hot"), ("n2", "hot")]
        assert resets(world)[-1] == ("alone", "device")

    play(scenario)


def test_system_reset_passes_over_what_cannot_be_reset(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7, flags=PCI_ALONE_NOT)
        world.kernel.add_device(SECOND, 8)  # nobody's: its bus must not be reset
        await add(world, "alone", OTHER_BUS, 9)
        await world.command("system_reset")
        assert resets(world) == [("alone", "device")]
        assert world.kernel.device(SECOND).hot_resets == 0

    play(scenario)


def test_system_reset_names_what_failed_and_resets_the_rest(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7, flags=PCI_ALONE_NOT)
        await add(world, "n1", SECOND, 8, flags=PCI_ALONE_NOT)
        await add(world, "alone", OTHER_BUS, 9)
        world.kernel.fail("VFIO_DEVICE_PCI_HOT_RESET", errno.EBUSY)
        with pytest.raises(CommandError, match=r"1 of 3 devices could not be reset.*device 'n0': .*EBUSY"):
            await world.command("system_reset")
        assert resets(world) == [("alone", "device")]

    play(scenario)


# --- devices of clients -----------------------------------------------------------------------------


class Client:
    """Somebody who has a device for himself, and notes what he is told."""

    name = "export 'e0'"

    def __init__(self) -> None:
        self.told: list[str] = []

    def holder(self) -> Holder:
        return Holder(kind="export", detail="e0")

    def asked_to_go(self) -> None:
        self.told.append("asked")

    def failed(self) -> None:
        self.told.append("failed")

    def device_stops(self) -> None:
        self.told.append("stops")

    def release_memory(self) -> None:
        self.told.append("memory")


def test_a_client_is_in_the_way_of_resets_that_reach_its_device_alone(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 8)
        await add(world, "far", OTHER_BUS, 9)
        device = world.machine.device("n1")
        device.claim = Client()
        world.kernel.log.clear()
        for arguments in (
            {"name": "hot-reset", "id": "n0"},
            {"name": "hot-reset", "id": "n1"},
            {"name": "system_reset"},
        ):
            with pytest.raises(Busy, match="export 'e0'"):
                await world.command(arguments.pop("name"), **arguments)
        assert touched(world) == []
        await world.command("hot-reset", id="far")
        assert resets(world) == [("far", "hot")]
        await world.command("hot-reset", id="n0", force=True)
        assert sorted(resets(world)[1:]) == [("n0", "hot"), ("n1", "hot")]
        device.claim = None

    play(scenario)


def test_a_client_whose_device_nothing_resets_is_in_nobodys_way(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7, flags=PCI_ALONE_NOT)
        await add(world, "far", OTHER_BUS, 9)
        world.kernel.add_device(SECOND, 8)  # nobody's: the bus of both is not reset
        world.machine.device("n0").claim = Client()
        await world.command("system_reset")
        assert resets(world) == [("far", "device")]
        world.machine.device("n0").claim = None

    play(scenario)
