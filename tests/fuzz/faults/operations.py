"""What managers and hypervisors do, for every backend and class of device: each once well, then with faults."""

from __future__ import annotations

import base64
import struct
from typing import Any

from tests.fuzz.faults.bench import Bench
from tests.fuzz.faults.doors import doors
from tests.fuzz.faults.moved import moves
from tests.fuzz.faults.sweep import Operation

from vfiod.protocol.vfio import DeviceFlags
from vfiod.protocol.vfio.ccw import CcwIrq

__all__ = ["OPERATIONS"]

HOST, SECOND, OTHER = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1313"
MDEV = "11111111-2222-3333-4444-555555555555"
MiB = 1 << 20


def do(name: str, **arguments: Any) -> Any:
    async def run(bench: Bench) -> None:
        await bench.command(name, **arguments)

    return run


def in_turn(*steps: Any) -> Any:
    async def run(bench: Bench) -> None:
        for step in steps:
            await step(bench)

    return run


# --- machines -------------------------------------------------------------------------------------------


def hosts(bench: Bench) -> None:
    """The host's devices; those of groups 7 and 8 share a bus, and so a hot reset."""
    kernel = bench.kernel
    kernel.add_device(HOST, 7, msi_count=4)
    kernel.add_device(SECOND, 8, msi_count=4)
    kernel.add_device(OTHER, 9, msi_count=4)


async def memory(bench: Bench) -> None:
    """Guest memory of two kinds."""
    bench.name_memory("ram")
    await bench.command("object-add", qom_type="memory-backend-fd", id="m0", fd="ram")
    await bench.command("dma-map", iova=0, size=MiB // 2, memory_backend="m0")
    bench.name_memory("more")
    await bench.command("dma-map", iova=16 * MiB, size=MiB, fd="more")


async def at_work(bench: Bench) -> None:
    await bench.command("region-write", device="d0", region="config", offset=4, size=2, value=6)


async def group_ready(bench: Bench) -> None:
    hosts(bench)
    await memory(bench)
    bench.name_opened("g", "/dev/vfio/7")


group_add = do("device_add", driver="vfio-pci", id="d0", host=HOST, group_fd="g")


group = in_turn(group_ready, group_add, at_work)
"""A device of a kernel group, at work."""


async def two_ready(bench: Bench) -> None:
    await group(bench)
    bench.name_opened("h", "/dev/vfio/8")


two_add = do("device_add", driver="vfio-pci", id="d1", host=SECOND, group_fd="h")


async def two(bench: Bench) -> None:
    await two_ready(bench)
    await two_add(bench)
    await bench.command("region-write", device="d1", region="config", offset=4, size=2, value=6)
    await bench.command("irq-start", device="d0", index="msi", vectors=[0])
    await bench.command("irq-start", device="d1", index="intx")


async def apart_ready(bench: Bench) -> None:
    """A second device that does not fit into the first's container."""
    await two_ready(bench)
    bench.kernel.compatible = False


async def passed_container_ready(bench: Bench) -> None:
    await group_ready(bench)
    bench.name_opened("c", "/dev/vfio/vfio")
    await bench.command("object-add", qom_type="vfio-container", id="c0", fd="c")


passed_container_add = do("device_add", driver="vfio-pci", id="d0", host=HOST, group_fd="g", container="c0")


async def opened_here_ready(bench: Bench) -> None:
    hosts(bench)
    await memory(bench)
    bench.machine.sources.groups._allow_open = True


opened_here_add = do("device_add", driver="vfio-pci", id="d0", host=HOST)


async def noiommu_ready(bench: Bench) -> None:
    bench.kernel.add_device(HOST, 7, noiommu=True, msi_count=4)
    bench.name_opened("g", "/dev/vfio/noiommu-7")


noiommu_add = do("device_add", driver="vfio-pci", id="d0", host=HOST, group_fd="g", x_noiommu=True)


noiommu = in_turn(noiommu_ready, noiommu_add)


async def cdev_ready(bench: Bench) -> None:
    hosts(bench)
    await memory(bench)
    bench.name_opened("i", "/dev/iommu")
    await bench.command("object-add", qom_type="iommufd", id="i0", fd="i")
    bench.name_opened("c", f"/dev/vfio/devices/vfio{bench.kernel.devices[HOST].cdev}")


cdev_add = do("device_add", driver="vfio-pci", id="d0", fd="c", iommufd="i0")


cdev = in_turn(cdev_ready, cdev_add, at_work)


async def cdev_two_ready(bench: Bench) -> None:
    await cdev(bench)
    bench.name_opened("e", f"/dev/vfio/devices/vfio{bench.kernel.devices[SECOND].cdev}")


cdev_two_add = do("device_add", driver="vfio-pci", id="d1", fd="e", iommufd="i0")


async def cdev_two(bench: Bench) -> None:
    await cdev_two_ready(bench)
    await cdev_two_add(bench)
    await bench.command("irq-start", device="d0", index="msi", vectors=[0])


async def platform_ready(bench: Bench) -> None:
    bench.kernel.add_platform_device("p0.dev", 7, irqs="lel")
    await memory(bench)
    bench.name_opened("g", "/dev/vfio/7")


platform_add = do("device_add", driver="vfio-platform", id="d0", host="p0.dev", group_fd="g")


platform = in_turn(platform_ready, platform_add)


async def ccw_ready(bench: Bench) -> None:
    bench.kernel.add_platform_device(
        UUID, 7, bus="mdev", driver="vfio_ccw_mdev", device_api="vfio-ccw", irqs="eee", regions=(124,),
        flags=DeviceFlags.CCW | DeviceFlags.RESET,
    )  # fmt: skip
    await memory(bench)
    bench.name_opened("g", "/dev/vfio/7")


ccw_add = do("device_add", driver="vfio-ccw", id="d0", sysfsdev=f"/sys/bus/mdev/devices/{UUID}", group_fd="g")


ccw = in_turn(ccw_ready, ccw_add)


async def ap_ready(bench: Bench) -> None:
    bench.kernel.add_platform_device(
        UUID, 7, bus="mdev", driver="vfio_ap_mdev", device_api="vfio-ap", irqs="ee", regions=(),
        flags=DeviceFlags.AP | DeviceFlags.RESET,
    )  # fmt: skip
    bench.name_opened("g", "/dev/vfio/7")


ap_add = do("device_add", driver="vfio-ap", id="d0", sysfsdev=f"/sys/bus/mdev/devices/{UUID}", group_fd="g")


ap = in_turn(ap_ready, ap_add)


async def kernel_mdev_ready(bench: Bench) -> None:
    bench.kernel.add_device(UUID, 7, bus="mdev", driver="vfio_mdev", device_api="vfio-pci", msi_count=4)
    await memory(bench)
    bench.name_opened("g", "/dev/vfio/7")


kernel_mdev_add = do("device_add", driver="vfio-pci", id="d0", sysfsdev=f"/sys/bus/mdev/devices/{UUID}", group_fd="g")


async def primer_ready(bench: Bench) -> None:
    await memory(bench)
    await bench.command("mdev-create", parent="primer", type="primer-pci", uuid=MDEV)


primer_add = do("device_add", driver="vfio-pci", id="d0", mdev=MDEV)


primer = in_turn(primer_ready, primer_add, at_work)


async def delete(bench: Bench) -> None:
    await bench.delete("d0")


# --- memory -----------------------------------------------------------------------------------------------


async def map_ready(bench: Bench) -> None:
    await group(bench)
    bench.name_memory("new")


async def map_two_ready(bench: Bench) -> None:
    """Two address spaces, so that one of them can fail after the other."""
    await group(bench)
    bench.name_opened("i", "/dev/iommu")
    await bench.command("object-add", qom_type="iommufd", id="i0", fd="i")
    bench.name_opened("c", f"/dev/vfio/devices/vfio{bench.kernel.devices[OTHER].cdev}")
    await bench.command("device_add", driver="vfio-pci", id="d1", fd="c", iommufd="i0")
    bench.name_memory("new")


map_file = do("dma-map", iova=64 * MiB, size=MiB, fd="new")


map_object = do("dma-map", iova=64 * MiB, size=MiB // 2, offset=MiB // 2, memory_backend="m0")


unmap = do("dma-unmap", iova=0, size=32 * MiB)


async def object_ready(bench: Bench) -> None:
    bench.name_memory("ram")
    bench.name_opened("c", "/dev/vfio/vfio")
    bench.name_opened("i", "/dev/iommu")


object_memory = do("object-add", qom_type="memory-backend-fd", id="m0", fd="ram")


object_container = do("object-add", qom_type="vfio-container", id="c0", fd="c")


object_iommufd = do("object-add", qom_type="iommufd", id="i0", fd="i")


objects = in_turn(object_ready, object_memory, object_container, object_iommufd)


async def object_del(bench: Bench) -> None:
    for id in ("m0", "c0", "i0"):
        if any(one.id == id for one in await bench.command("query-objects")):
            await bench.command("object-del", id=id)


# --- interrupts -------------------------------------------------------------------------------------------


async def bells(bench: Bench, *names: str) -> None:
    for name in names:
        bench.name_bell(name)


def started(ready: Any, index: str, *vectors: int, **more: Any) -> Any:
    async def prepare(bench: Bench) -> None:
        await ready(bench)
        await bench.command("irq-start", device="d0", index=index, vectors=list(vectors or (0,)), **more)

    return prepare


def with_bells(ready: Any, *names: str) -> Any:
    async def prepare(bench: Bench) -> None:
        await ready(bench)
        await bells(bench, *names)

    return prepare


def start(index: str, *vectors: int, **more: Any) -> Any:
    async def run(bench: Bench) -> None:
        await bench.command("irq-start", device="d0", index=index, vectors=list(vectors or (0,)), **more)

    return run


async def start_passed_msi(bench: Bench) -> None:
    fds = [{"vector": 0, "trigger": "b0"}, {"vector": 2, "trigger": "b1"}]
    await bench.command("irq-start", device="d0", index="msi", eventfds=fds)


async def start_passed_intx(bench: Bench) -> None:
    await bench.command("irq-start", device="d0", index="intx", eventfds=[{"trigger": "b0", "resample": "b1"}])


async def guest_msi_ready(bench: Bench) -> None:
    """The guest has programmed its MSI and will now enable it."""
    await group(bench)
    await started_line(bench)
    await bench.command("region-write", device="d0", region="config", offset=0x44, size=4, value=0xFEE00000)
    await bench.command("region-write", device="d0", region="config", offset=0x4C, size=2, value=0x4021)


started_line = do("irq-start", device="d0", index="intx")


async def routed(bench: Bench) -> None:
    """The route of a direct INTx was disabled; it will be back."""
    await started(group, "intx", mode="direct", first_number=5)(bench)
    await bench.command("irq-route", device="d0", index="intx")


GUEST_ENABLE = do("region-write", device="d0", region="config", offset=0x42, size=2, value=0x0081 | 2 << 4)
GUEST_DISABLE = do("region-write", device="d0", region="config", offset=0x42, size=2, value=0x0080)


async def guest_msi(bench: Bench) -> None:
    await guest_msi_ready(bench)
    await GUEST_ENABLE(bench)


async def platform_started(bench: Bench) -> None:
    await platform(bench)
    await bells(bench, "b0", "b1")
    await bench.command("irq-start", device="d0")


async def platform_passed(bench: Bench) -> None:
    fds = [{"index": 0, "trigger": "b0", "resample": "b1"}]
    await bench.command("irq-start", device="d0", eventfds=fds, indexes=[0])


# --- resets, regions, channels ------------------------------------------------------------------------------


async def mapped(bench: Bench) -> None:
    await group(bench)
    await bench.command("region-map", device="d0", region="bar2")
    bench.kept += bench.replies
    bench.replies = []


async def map_region(bench: Bench) -> None:
    await bench.command("region-map", device="d0", region="bar2")
    bench.kept += bench.replies
    bench.replies = []


ORB = base64.b64encode(struct.pack(">III", 0, 0x00C0FF00, 0x1000)).decode()
ENDED = bytes.fromhex("00c04007000010080c000000") + bytes(84)


async def request(bench: Bench) -> None:
    """A channel program; the model ends it as soon as it was started."""
    device: Any = bench.kernel.devices[UUID]
    kernel_write = type(device).write

    def write(data: bytes, position: int) -> int:
        done: int = kernel_write(device, data, position)
        kernel_write(device, ENDED, 24)
        device.interrupt(CcwIrq.IO)
        return done

    device.write = write
    try:
        await bench.command("ccw-request", device="d0", orb=ORB, timeout_ms=86_400_000)
    finally:
        del device.write


# --- the table ----------------------------------------------------------------------------------------------

_GROUP = ("group 7", HOST, "p0.dev", UUID, "d0", "container", "/dev/vfio", "'g'", "object m0", "memory at 0x")
_CDEV = ("Parameter 'fd'", "object m0", "memory at 0x", HOST, "d0", "iommufd i0", "ioas:i0", "'c'", "'i0'", "vfio0")
_D0 = ("d0", HOST, "'b0'", "'b1'")
_P0 = ("d0", "p0.dev", "'b0'", "'b1'")
_SPACE = ("container:", "ioas:", "memory", "'new'", "0x4000000", "'m0'", "0x0")

OPERATIONS: tuple[Operation, ...] = (
    Operation("device_add group", group_ready, group_add, _GROUP),
    Operation("device_add second of a container", two_ready, two_add, ("group 8", SECOND, "d1", "'h'", *_GROUP)),
    Operation("device_add second, own container", apart_ready, two_add, ("group 8", SECOND, "d1", "'h'", *_GROUP)),
    Operation("device_add passed container", passed_container_ready, passed_container_add, (*_GROUP, "c0")),
    Operation("device_add opened here", opened_here_ready, opened_here_add, _GROUP),
    Operation("device_add noiommu", noiommu_ready, noiommu_add, _GROUP),
    Operation("device_add cdev", cdev_ready, cdev_add, _CDEV),
    Operation(
        "device_add second cdev", cdev_two_ready, cdev_two_add, (SECOND, "d1", "i0", "'e'", "vfio1", "Parameter 'fd'")
    ),
    Operation("device_add platform", platform_ready, platform_add, _GROUP),
    Operation("device_add ccw", ccw_ready, ccw_add, _GROUP),
    Operation("device_add ap", ap_ready, ap_add, _GROUP),
    Operation("device_add kernel mdev", kernel_mdev_ready, kernel_mdev_add, _GROUP),
    Operation("device_add built-in mdev", primer_ready, primer_add, (MDEV, "d0")),
    Operation("device_del group", group, delete, _GROUP),
    Operation("device_del first of two", two, delete, _GROUP),
    Operation("device_del noiommu", noiommu, delete, _GROUP),
    Operation("device_del cdev", cdev, delete, _CDEV),
    Operation("device_del first of two cdevs", cdev_two, delete, _CDEV),
    Operation("device_del platform", platform_started, delete, ("d0",)),
    Operation("device_del ccw", ccw, delete, ("d0",)),
    Operation("device_del ap", ap, delete, ("d0",)),
    Operation("device_del built-in mdev", primer, delete, ("d0",)),
    Operation("dma-map fd, two spaces", map_two_ready, map_file, _SPACE),
    Operation("dma-map object, two spaces", map_two_ready, map_object, _SPACE),
    Operation("dma-unmap, two spaces", map_two_ready, unmap, _SPACE),
    Operation("object-add memory", object_ready, object_memory, ("m0", "'ram'")),
    Operation("object-add container", object_ready, object_container, ("c0", "'c'")),
    Operation("object-add iommufd", object_ready, object_iommufd, ("i0", "'i'")),
    Operation("object-del", objects, object_del, ("m0", "c0", "i0")),
    Operation("irq-start intx", group, start("intx"), _D0),
    Operation("irq-start intx direct", group, start("intx", mode="direct"), _D0),
    Operation("irq-start intx passed", with_bells(group, "b0", "b1"), start_passed_intx, _D0),
    Operation("irq-start msi", group, start("msi", 0, 1, 3), _D0),
    Operation("irq-start msi passed", with_bells(group, "b0", "b1"), start_passed_msi, _D0),
    Operation("irq-start msi after intx", started(group, "intx"), start("msi", 0, 1), _D0),
    Operation("irq-start msi relayed after direct", started(group, "msi", 0), start("msi", 0, mode="relayed"), _D0),
    Operation("irq-start intx after msi", started(group, "msi", 0, 1), start("intx"), _D0),
    Operation("irq-start more msi", started(group, "msi", 0), start("msi", 0, 1, 2, 3), _D0),
    Operation("irq-start built-in mdev", primer, start("intx"), ("d0", MDEV)),
    Operation("irq-stop intx", started(group, "intx"), do("irq-stop", device="d0"), _D0),
    Operation("irq-stop msi", started(group, "msi", 0, 1), do("irq-stop", device="d0", index="msi"), _D0),
    Operation(
        "irq-stop one msi", started(group, "msi", 0, 1), do("irq-stop", device="d0", index="msi", vectors=[1]), _D0
    ),
    Operation("irq-mask", started(group, "intx"), do("irq-mask", device="d0", index="intx"), _D0),
    Operation(
        "irq-route",
        started(group, "intx", mode="direct", first_number=5),
        do("irq-route", device="d0", index="intx", number=9),
        _D0,
    ),
    Operation(
        "irq-route disabled",
        started(group, "intx", mode="direct", first_number=5),
        do("irq-route", device="d0", index="intx"),
        _D0,
    ),
    Operation("irq-route again", routed, do("irq-route", device="d0", index="intx", number=9), _D0),
    Operation("irq-trigger", started(group, "msi", 0), do("irq-trigger", device="d0", index="msi"), _D0),
    Operation("irq-start platform", with_bells(platform, "b0", "b1"), do("irq-start", device="d0"), _P0),
    Operation("irq-start machine complete", platform, do("irq-start", first_number=32), _P0),
    Operation("irq-start platform passed", platform_started, platform_passed, _P0),
    Operation("irq-stop platform", platform_started, do("irq-stop", device="d0"), _P0),
    Operation("config write enables MSI", guest_msi_ready, GUEST_ENABLE, _D0),
    Operation("config write disables MSI", guest_msi, GUEST_DISABLE, _D0),
    Operation("device-reset", started(group, "msi", 0, 1), do("device-reset", id="d0"), _D0),
    Operation("device-reset cdev", started(cdev, "intx"), do("device-reset", id="d0"), _D0),
    Operation("device-reset platform", platform_started, do("device-reset", id="d0"), _P0),
    Operation("device-reset ccw", ccw, do("device-reset", id="d0"), ("d0", UUID)),
    Operation("hot-reset", two, do("hot-reset", id="d0"), (HOST, SECOND, "d0", "d1", "group")),
    Operation("hot-reset cdev", cdev_two, do("hot-reset", id="d0"), (HOST, SECOND, "d0", "d1")),
    Operation("system_reset", two, do("system_reset"), (HOST, SECOND, "d0", "d1")),
    Operation("region-read", group, do("region-read", device="d0", region="bar0", offset=4, size=4), _D0),
    Operation("region-read bytes", group, do("region-read", device="d0", region="bar0", offset=0, length=4096), _D0),
    Operation("region-write", group, do("region-write", device="d0", region="bar0", offset=4, size=4, value=1), _D0),
    Operation(
        "region-write bytes",
        group,
        do("region-write", device="d0", region="bar2", offset=0, data=base64.b64encode(bytes(8192)).decode()),
        _D0,
    ),
    Operation("region-read config", group, do("region-read", device="d0", region="config", offset=0, length=64), _D0),
    Operation("region-map", group, map_region, _D0),
    Operation("region-unmap", mapped, do("region-unmap", device="d0", region="bar2"), _D0),
    Operation("ccw-request", ccw, request, ("d0", UUID)),
    Operation(
        "mdev-create", memory, do("mdev-create", parent="primer", type="primer-pci", uuid=MDEV), (MDEV, "primer")
    ),
    Operation("mdev-destroy", primer_ready, do("mdev-destroy", uuid=MDEV), (MDEV,)),
    *doors(group, primer),
    *moves(
        ("group", two),
        ("cdev", cdev_two),
        ("platform", platform_started),
        ("ccw", ccw),
        ("objects", objects),
        ("built-in mdev", started(primer, "msix")),
    ),
)
