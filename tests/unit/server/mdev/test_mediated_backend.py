"""A mediated device as a device model sees it: the kernel's vfio-pci, in every number.

Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vfiod.protocol import vfio
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.errors import Busy, DeviceNotActive, DeviceNotFound, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import (
    Area,
    DeviceFlags,
    IrqAction,
    IrqFlags,
    IrqType,
    IrqTypeCap,
    MsiMessage,
    PciIrq,
    PciRegion,
    RegionFlags,
    SetIrqs,
)
from vfiod.server.backends.base import AddressSpace, Backend, FewerVectors
from vfiod.server.backends.base import Mapping as GuestMapping
from vfiod.server.backends.mediated import MediatedDevices
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.parent import DeviceInfo, IrqInfo, MapRequest, MdevType, RegionInfo
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

PAGE = 4096
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


class Odd(PrimerDevice):
    """A primer whose answers a test replaces."""

    answers: dict[str, Callable[..., Any]]

    def _answer(self, name: str, otherwise: Callable[..., Any], *arguments: Any) -> Any:
        return self.answers.get(name, otherwise)(*arguments)

    def device_info(self) -> DeviceInfo:
        return self._answer("device_info", super().device_info)  # type: ignore[no-any-return]

    def region_info(self, index: int) -> RegionInfo:
        return self._answer("region_info", super().region_info, index)  # type: ignore[no-any-return]

    def irq_info(self, index: int) -> IrqInfo:
        return self._answer("irq_info", super().irq_info, index)  # type: ignore[no-any-return]

    def read(self, index: int, offset: int, length: int) -> bytes:
        return self._answer("read", super().read, index, offset, length)  # type: ignore[no-any-return]

    def set_irqs(self, request: SetIrqs) -> int:
        return self._answer("set_irqs", super().set_irqs, request)  # type: ignore[no-any-return]

    def region_fd(self, index: int) -> int | None:
        return self._answer("region_fd", super().region_fd, index)  # type: ignore[no-any-return]

    def validate_map_request(self, request: MapRequest) -> MapRequest:
        return self._answer("validate_map_request", super().validate_map_request, request)  # type: ignore[no-any-return]

    def memory_mapped(self, iova: int, size: int, readonly: bool) -> None:
        self._answer("memory_mapped", super().memory_mapped, iova, size, readonly)

    def open(self) -> None:
        self._answer("open", super().open)


class Oddities(Primer):
    name = "odd"
    api = DeviceApi.VFIO_PCI
    answers: dict[str, Callable[..., Any]]

    @property
    def types(self) -> Sequence[MdevType]:  # type: ignore[override]
        return (MdevType("odd", "", "", self.api, 4, {}),)

    def create(self, host: Any, uuid: str, mdev_type: MdevType, parameters: Any) -> PrimerDevice:
        device = Odd(host, memory=1 << 20, vectors=4, granted=2)
        device.answers = self.answers
        return device


class Ground:
    """A bus, its driver for vfio-pci, and a parent that can be made to lie."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(2)
        self.loop = asyncio.new_event_loop()
        self.events: list[EventData] = []
        self.spaces: list[AddressSpace] = []
        self.replayed: list[GuestMapping] = []
        self.bus = MdevBus(emit=self.events.append, executor=self.executor, built_in={}, entry_points=None)
        self.devices = MediatedDevices(self.bus, self._attach, self.spaces.remove)
        self.answers: dict[str, Callable[..., Any]] = {}
        self.memories: list[SharedMemory] = []

    def _attach(self, space: AddressSpace) -> None:
        for mapping in self.replayed:
            space.map(mapping)
        self.spaces.append(space)

    def make(self, api: DeviceApi = DeviceApi.VFIO_PCI) -> None:
        parent = Oddities()
        parent.answers, parent.api = self.answers, api
        self.bus.register(parent)
        self.loop.run_until_complete(self.bus.create("odd", "odd", UUID))

    def open(self, driver: str = "vfio-pci") -> Backend:
        return self.devices.open(UUID, "nic0", driver)

    def mapping(self, iova: int, size: int = PAGE, *, readonly: bool = False) -> GuestMapping:
        fd = FileDescriptor(os.memfd_create("guest"))
        os.ftruncate(fd.number, size)
        self.memories.append(SharedMemory(fd, name="guest"))
        return GuestMapping(iova, size, self.memories[-1], 0, readonly)

    def close(self) -> None:
        self.loop.run_until_complete(self.bus.close())
        self.loop.close()
        self.executor.shutdown()
        for memory in self.memories:
            memory.close()


@pytest.fixture
def ground() -> Iterator[Ground]:
    before = len(os.listdir("/proc/self/fd"))
    made = Ground()
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before, "the test left fds open"


@pytest.fixture
def backend(ground: Ground) -> Iterator[Backend]:
    ground.make()
    opened = ground.open()
    yield opened
    assert opened.close()


def refused(number: int, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OperationFailed) as caught:
        function(*arguments)
    assert caught.value.errno == errno.errorcode[number], caught.value


# --- as the kernel's ------------------------------------------------------------------------------------


def test_it_looks_like_the_kernels_vfio_pci(backend: Backend) -> None:
    info = backend.info()
    assert (info.flags, info.num_regions, info.num_irqs) == (DeviceFlags.PCI | DeviceFlags.RESET, 9, 5)
    both = RegionFlags.READ | RegionFlags.WRITE
    told = [backend.region_info(index) for index in range(8)]
    assert [one.index for one in told] == list(range(8))
    assert [one.flags for one in told] == [both, 0, both | RegionFlags.MMAP, 0, 0, 0, 0, both]
    assert [one.areas for one in told] == [(), (), (Area(0, 1 << 20),), (), (), (), (), ()]
    assert told[7].offset == 7 << 40
    refused(errno.EINVAL, backend.region_info, PciRegion.VGA)
    level = IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
    edge = IrqFlags.EVENTFD | IrqFlags.NORESIZE
    irqs = [backend.irq_info(index) for index in range(5)]
    assert [(one.flags, one.count) for one in irqs] == [
        (level, 1),
        (edge, 4),
        (IrqFlags.NORESIZE, 0),
        (edge, 1),
        (edge, 1),
    ]
    refused(errno.EINVAL, backend.irq_info, 5)
    assert (backend.kind, backend.name, backend.group) == ("mdev", UUID, None)
    assert not backend.probe_feature(1)
    with pytest.raises(OperationFailed, match="ENOTTY"):
        backend.feature(vfio.DeviceFeature(1, vfio.FeatureFlags.GET), 8)


def test_access_is_checked_before_the_device_sees_it(ground: Ground, backend: Backend) -> None:
    seen: list[Any] = []
    ground.answers["read"] = lambda *arguments: seen.append(arguments)
    for index, offset, length in (
        (0, PAGE, 1),
        (0, -4, 4),
        (0, PAGE - 2, 4),
        (7, PAGE, 1),
        (1, 0, 1),
        (6, 0, 4),
        (0, 0, -1),
    ):
        refused(errno.EINVAL, backend.region_read, index, offset, length)
        refused(errno.EINVAL, backend.region_write, index, max(offset, PAGE - 3), b"1234")
    refused(errno.EINVAL, backend.region_read, 9, 0, 4)
    refused(errno.EINVAL, backend.region_read, -1, 0, 4)
    assert seen == []


def test_set_irqs_is_checked_and_fewer_vectors_are_told(ground: Ground, backend: Backend) -> None:
    bell = FileDescriptor(os.eventfd(0))
    refused(errno.EINVAL, backend.set_irqs, SetIrqs.now(IrqAction.TRIGGER, PciIrq.MSI, 4))
    refused(errno.EINVAL, backend.set_irqs, SetIrqs(PciIrq.MSIX, 0, 0, IrqAction.TRIGGER))
    refused(errno.EINVAL, backend.set_irqs, SetIrqs(7, 0, 0, IrqAction.TRIGGER))
    refused(errno.ENOTTY, backend.set_irqs, SetIrqs.now(IrqAction.MASK, PciIrq.MSI))
    with pytest.raises(FewerVectors) as caught:
        backend.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.MSI, (bell.number,) * 4))
    assert (caught.value.granted, caught.value.asked) == (2, 4)
    backend.set_irqs(SetIrqs.eventfds(IrqAction.TRIGGER, PciIrq.MSI, (bell.number,) * 2))
    backend.set_irqs(SetIrqs.now(IrqAction.TRIGGER, PciIrq.MSI))
    assert os.eventfd_read(bell.number) == 1
    bell.close()


def test_the_mapped_region_and_the_slow_path_are_one(backend: Backend) -> None:
    number = backend.region_fd(PciRegion.BAR2)
    assert number is not None
    assert os.pread(number, 4, backend.region_info(PciRegion.BAR2).offset) == bytes(4)
    backend.region_write(PciRegion.BAR2, 0, b"card")
    assert os.pread(number, 4, 0) == b"card"
    assert backend.region_fd(PciRegion.BAR0) is None


def test_reset_and_close(ground: Ground, backend: Backend) -> None:
    backend.region_write(0, 4, b"\1\0\0\0")
    backend.reset()
    assert backend.region_read(0, 4, 4) == b"\xff\xff\xff\xff"
    assert backend.close()
    assert backend.close()
    assert ground.spaces == []
    refused(errno.ENODEV, backend.region_read, 0, 0, 4)
    again = ground.open()
    assert again.close()


# --- opening --------------------------------------------------------------------------------------------


def test_one_user_at_a_time_and_only_of_what_exists(ground: Ground, backend: Backend) -> None:
    with pytest.raises(Busy, match="nic0"):
        ground.open()
    with pytest.raises(DeviceNotFound):
        ground.devices.open(UUID[:-1] + "2", "nic1")
    assert [check.ok for check in ground.devices.check(UUID)] == [True, False, True]
    assert [check.ok for check in ground.devices.check(UUID[:-1] + "2")] == [False]


def test_another_device_api_is_refused(ground: Ground) -> None:
    ground.answers["device_info"] = lambda: DeviceInfo(regions=0, irqs=2)
    ground.make(DeviceApi.VFIO_AP)
    with pytest.raises(DeviceNotActive, match="vfio-ap"):
        ground.open()
    assert [check.name for check in ground.devices.check(UUID) if not check.ok] == ["driver"]
    assert ground.bus.look(UUID).user is None


@pytest.mark.parametrize("callback", ["open", "memory_mapped"])
def test_a_failing_open_unwinds_to_nothing(ground: Ground, callback: str) -> None:
    ground.make()
    ground.replayed = [ground.mapping(0), ground.mapping(PAGE)]

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "not today")

    ground.answers[callback] = fail
    refused(errno.ENOMEM, ground.open)
    assert ground.bus.look(UUID).user is None
    assert ground.bus.look(UUID).host.memory is None
    assert ground.spaces == []
    ground.answers.clear()
    ground.open().close()


# --- memory -----------------------------------------------------------------------------------------------


def test_guest_memory_is_replayed_and_reached_by_dma(ground: Ground) -> None:
    ground.make()
    mapping = ground.mapping(0x8000, 2 * PAGE)
    mapping.memory.write(0, b"from the guest")
    ground.replayed = [mapping]
    backend = ground.open()
    host = ground.bus.look(UUID).host
    assert host.read_memory(0x8000, 14) == b"from the guest"
    space = backend.address_space
    assert space is not None
    assert (space.name, space.page_size) == (f"mdev:{UUID}", os.sysconf("SC_PAGESIZE"))
    later = ground.mapping(0x0, PAGE, readonly=True)
    space.map(later)
    assert host.read_memory(0, 4) == bytes(4)
    space.unmap(0x8000, 2 * PAGE)
    with pytest.raises(Exception, match="not mapped"):
        host.read_memory(0x8000, 1)
    assert backend.close()
    with pytest.raises(Exception, match="not mapped"):
        host.read_memory(0, 1)


def test_a_device_may_refuse_guest_memory(ground: Ground, backend: Backend) -> None:
    def refuse(iova: int, size: int, readonly: bool) -> None:
        if iova + size > 1 << 32:
            raise OSError(errno.EINVAL, "32 address lines")

    ground.answers["memory_mapped"] = refuse
    space = backend.address_space
    assert space is not None
    with pytest.raises(OperationFailed, match=r"at 0x100000000 .* 32 address lines"):
        space.map(ground.mapping(1 << 32))
    space.map(ground.mapping(0))


# --- a parent that gives wrong answers is the one that failed -----------------------------------------------


WRONG: list[tuple[str, Callable[..., Any], Callable[[Backend], Any]]] = [
    ("region_info", lambda _: "large", lambda b: b.region_info(0)),
    ("region_info", lambda _: RegionInfo(-1), lambda b: b.region_info(0)),
    ("irq_info", lambda _: IrqInfo(count=-1), lambda b: b.irq_info(0)),
    ("irq_info", lambda _: None, lambda b: b.irq_info(0)),
    ("read", lambda *_: b"123", lambda b: b.region_read(0, 0, 4)),
    ("read", lambda *_: b"12345", lambda b: b.region_read(0, 0, 4)),
    ("read", lambda *_: None, lambda b: b.region_read(0, 0, 4)),
    ("read", lambda *_: 1 // 0, lambda b: b.region_read(0, 0, 4)),
    ("set_irqs", lambda _: -1, lambda b: b.set_irqs(SetIrqs.disable(PciIrq.MSI))),
    ("set_irqs", lambda _: "ok", lambda b: b.set_irqs(SetIrqs.disable(PciIrq.MSI))),
    ("region_fd", lambda _: None, lambda b: b.region_info(2)),
    ("region_fd", lambda _: 10_000, lambda b: b.region_info(2)),
    ("region_fd", lambda _: "2", lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(3, r.offset, r.size, 0), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(2, 0, 2 << 20, 0), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(2, 0, 100, 0), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(2, 0, r.size, PAGE), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(2, 0, PAGE, 1 << 40), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: MapRequest(2, 0, 0, 0), lambda b: b.region_info(2)),
    ("validate_map_request", lambda r: None, lambda b: b.region_info(2)),
]


@pytest.mark.parametrize(("callback", "answer", "use"), WRONG)
def test_wrong_answers(
    ground: Ground, backend: Backend, callback: str, answer: Callable[..., Any], use: Callable[[Backend], Any]
) -> None:
    ground.answers[callback] = answer
    with pytest.raises(OperationFailed, match=f"(?i){callback}|read|SET_IRQS") as caught:
        use(backend)
    assert caught.value.errno == "EIO"
    assert "parent 'odd'" in str(caught.value)


def test_a_file_that_can_be_cut_is_not_mapped(ground: Ground, backend: Backend) -> None:
    plain = FileDescriptor(os.memfd_create("plain", os.MFD_ALLOW_SEALING))
    os.ftruncate(plain.number, 1 << 20)
    ground.answers["region_fd"] = lambda _: plain.number
    with pytest.raises(OperationFailed, match="F_SEAL_SHRINK"):
        backend.region_info(2)
    plain.close()


def test_a_device_that_is_no_pci_device_is_not_made(ground: Ground) -> None:
    ground.answers["device_info"] = lambda: DeviceInfo(regions=6, irqs=5)
    with pytest.raises(OperationFailed, match="at least 9 regions and 5 interrupt indexes, it has 6 and 5"):
        ground.make()


def test_validate_map_request_moves_shrinks_and_refuses(ground: Ground) -> None:
    ground.make()
    areas = (Area(0, PAGE), Area(4 * PAGE, PAGE), Area(8 * PAGE, 2 * PAGE))
    ground.answers["region_info"] = lambda index: RegionInfo(1 << 19, readable=True, areas=areas)

    def validate(request: MapRequest) -> MapRequest:
        if request.offset == 0:
            raise OSError(errno.EPERM, "not the first page")
        return MapRequest(request.region, request.offset, PAGE, request.offset + 2 * PAGE)

    ground.answers["validate_map_request"] = validate
    backend = ground.open()
    told = backend.region_info(2)
    assert told.areas == (Area(4 * PAGE, PAGE), Area(8 * PAGE, PAGE))
    assert told.offset == 2 * PAGE
    backend.close()
    ground.answers["validate_map_request"] = lambda _: 1 // 0
    backend = ground.open()
    assert backend.region_info(2).areas == ()
    assert backend.region_fd(2) is None
    backend.close()


def test_a_device_taken_away_fails_and_closes(ground: Ground) -> None:
    ground.make()
    backend = ground.open()
    ground.loop.run_until_complete(ground.bus.unregister("odd", reason="pulled", patience=0))
    with pytest.raises(OperationFailed, match="pulled") as caught:
        backend.region_read(0, 0, 4)
    assert caught.value.errno == "ENODEV"
    refused(errno.ENODEV, backend.set_irqs, SetIrqs.disable(PciIrq.INTX))
    refused(errno.ENODEV, backend.reset)
    space = backend.address_space
    assert space is not None
    space.map(ground.mapping(0))
    space.unmap(0, PAGE)
    assert backend.close()
    assert ground.spaces == []


# --- vfio-platform: nothing is at a fixed index ---------------------------------------------------------

TYPED = IrqTypeCap(IrqType.MSI, 0)
LEVEL = IrqInfo(count=1, maskable=True, automasked=True, noresize=False)


def platform(ground: Ground, *irqs: object) -> None:
    ground.answers |= {"device_info": lambda: DeviceInfo(regions=2, irqs=len(irqs)), "irq_info": lambda at: irqs[at]}
    ground.make(DeviceApi.VFIO_PLATFORM)


def test_a_platform_device(ground: Ground) -> None:
    messages = (MsiMessage(1 << 32, 7),)
    now = [IrqInfo(count=4, type=TYPED)]
    ground.answers |= {"device_info": lambda: DeviceInfo(regions=2, irqs=2), "irq_info": lambda at: (LEVEL, *now)[at]}
    ground.make(DeviceApi.VFIO_PLATFORM)
    backend = ground.open("vfio-platform")
    assert backend.info().flags == DeviceFlags.PLATFORM
    assert (backend.info().num_regions, backend.info().num_irqs) == (2, 2)
    assert backend.irq_info(0).flags == IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
    assert backend.irq_info(0).type is None
    assert (backend.irq_info(1).type, backend.irq_info(1).messages) == (TYPED, ())
    now[0] = IrqInfo(count=4, type=TYPED, messages=messages)
    assert backend.irq_info(1).messages == messages, "asked each time"
    with pytest.raises(OperationFailed):
        backend.irq_info(2)
    backend.close()


def test_the_drivers_do_not_take_each_others_devices(ground: Ground) -> None:
    platform(ground, LEVEL)
    with pytest.raises(DeviceNotActive, match="vfio-platform: use that driver"):
        ground.open("vfio-pci")
    assert [check.name for check in ground.devices.check(UUID, "vfio-pci") if not check.ok] == ["driver"]
    assert "driver" not in [check.name for check in ground.devices.check(UUID, "vfio-platform")]
    ground.open("vfio-platform").close()


@pytest.mark.parametrize(
    ("irq", "complaint"),
    [
        (IrqInfo(count=2), "messages need a type"),
        (IrqInfo(count=0), "one interrupt, it has 0"),
        (IrqInfo(count=1, automasked=True), "must be maskable"),
        (IrqInfo(count=1, messages=(MsiMessage(0, 0),)), "without a type"),
        (IrqInfo(count=1, type=TYPED, messages=(MsiMessage(0, 0),) * 2), "has 1 vectors"),
        (IrqInfo(count=1, type=TYPED, messages=(MsiMessage(1 << 64, 0),)), "has 1 vectors"),
        (IrqInfo(count=1, type=TYPED, messages=(MsiMessage(0, 1 << 32),)), "has 1 vectors"),
        (IrqInfo(count=1, type=IrqTypeCap(-1, 0)), "has 1 vectors"),
        (IrqInfo(count=1, type="msi"), "has 1 vectors"),  # type: ignore[arg-type]
        (IrqInfo(count=1, type=TYPED, messages=[1]), "has 1 vectors"),  # type: ignore[arg-type]
        ("nonsense", "cannot be"),
    ],
)
def test_interrupts_that_cannot_be_are_not_made(ground: Ground, irq: object, complaint: str) -> None:
    with pytest.raises(OperationFailed, match=complaint):
        platform(ground, LEVEL, irq)
    assert ground.bus.uuids() == []
