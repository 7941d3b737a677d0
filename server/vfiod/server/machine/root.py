"""The machine: what one VM has, and the one place that knows all of it.

State lives on the event loop's thread. What changes which devices, memory and objects there are takes a turn of the
``topology`` lane; queries look at any time and never wait.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec.structs import replace

from vfiod.protocol.catalogue.devices import Check, DeviceInfo, MachineInfo, SessionInfo, TopologyEdge, TopologyNode
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.memory import DmaUnmapped
from vfiod.protocol.catalogue.monitor import MachineRestored, Stat, StatsResult, StatusInfo
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import DeviceNotActive, OperationFailed
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import CLOSE_TIMEOUT_MS, WORKER_THREADS
from vfiod.server.dma.files import open_memory
from vfiod.server.dma.guest_memory import GuestMemory
from vfiod.server.events import EventHub
from vfiod.server.fds import FdSets
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.lanes import Lane
from vfiod.server.machine.ending import Ending
from vfiod.server.machine.lifecycle import Devices, NewDevice
from vfiod.server.machine.objects import ContainerObject, IommufdObject, MemoryObject, Objects
from vfiod.server.machine.sources import Sources

if TYPE_CHECKING:  # imported with the first device: what a server without one does not need, it does not pay for
    from vfiod.server.backends.base import Backend
    from vfiod.server.backends.cdev import CdevOrigin
    from vfiod.server.backends.group import GroupOrigin, KernelGroups
    from vfiod.server.backends.vfio_user.source import VfioUserOrigin
    from vfiod.server.devices.device import Device
    from vfiod.server.devices.regions import Region
    from vfiod.server.machine.doors import Doors
    from vfiod.server.machine.resets import Resets
    from vfiod.server.mdev.bus import MdevBus

__all__ = ["Machine"]

T = TypeVar("T")

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"

SWEEP_PERIOD_S: Final = 5.0
"""Seconds between two looks at groups that the kernel keeps because an fd that was given out is open. Only then."""


class Machine:
    """One VM's devices, memory and objects. Made inside a running event loop.

    Args:
        name: of the VM.
        uuid: of the VM; all zeroes when none was given, as in QEMU.
        hub: its events.
        allow_open: whether devices may be opened here, with this process's own rights.
        allow_uid: users who may come in by exports, besides root and our own.
        syscalls: the kernel; a test may give a model of it.

    Attributes:
        name: as given.
        uuid: as given.
        hub: as given.
        topology: the lane of all that changes which devices, memory and objects there are.
        executor: the threads of all lanes.
        devices: by id or path.
        memory: guest memory.
        objects: what ``object-add`` made.
        fdsets: what ``add-fd`` made.
        sources: where devices come from.
        allow_uid: as given.
        doors: exports; None until the first is made.
        restored: what was taken over of a server that died; None: this one began with nothing.
        started: when it began, in the loop's (monotonic) time.

    """

    def __init__(
        self,
        name: str,
        uuid: str = NO_UUID,
        *,
        hub: EventHub,
        allow_open: bool = False,
        allow_uid: frozenset[int] = frozenset(),
        syscalls: Syscalls | None = None,
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.hub = hub
        self.allow_open = allow_open
        self.allow_uid = allow_uid
        self.doors: Doors | None = None
        self.restored: MachineRestored | None = None
        self.loop = asyncio.get_running_loop()
        self.executor = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="vfiod-worker")
        self.topology = Lane("topology", self.executor)
        self.memory = GuestMemory(self._mapping_lost)
        self._calls = syscalls or Syscalls()
        self.sources = Sources(self._calls, self.memory, hub, self.executor, loop=self.loop, allow_open=allow_open)
        self.objects = Objects(self.memory, self.sources.container_users, self._devices_on)
        self.fdsets = FdSets()
        self.devices = Devices(self.loop, hub, self.executor, self.topology, self._device_deleted)
        self.started = self.loop.time()
        self._sweeper: asyncio.TimerHandle | None = None
        self._ended: asyncio.Task[list[str]] | None = None
        self._stuck = False
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop keeps only weak references

    @functools.cached_property
    def resets(self) -> Resets:
        """Hot resets, and the machine's own. First asked for on the loop."""
        from vfiod.server.machine.resets import Resets

        return Resets(self._calls, self.executor, self.topology, self.devices, self.sources)

    @property
    def groups(self) -> KernelGroups:
        """VFIO groups and containers."""
        return self.sources.groups

    @property
    def mdevs(self) -> MdevBus:
        """The mediated bus."""
        return self.sources.bus

    # --- devices ------------------------------------------------------------------------------------

    def device(self, name: str) -> Device:
        """The device with this id or path. Raises DeviceNotFound."""
        return self.devices.get(name)

    def device_info(self, device: Device) -> DeviceInfo:
        """For ``query-devices``: with what the mediated bus knows of it, where it came from there."""
        info = device.info()
        mdev = self.mdevs.info(str(info.host)) if info.backend == "mdev" else None
        return info if mdev is None else replace(info, mdev=mdev)

    def add_device(self, new: NewDevice) -> Awaitable[Device]:
        """See :meth:`Devices.add`."""
        return self.devices.add(new)

    def open_group(self, origin: GroupOrigin, container_object: str | None) -> Backend:
        """Open a device of a kernel group. Blocks: in the topology lane. Takes the origin's fds over on every path.

        Args:
            origin: where it is.
            container_object: the id of a ``vfio-container``, when the manager named one.

        """
        return self.groups.open(self._with_container(origin, container_object))

    def check_group(self, origin: GroupOrigin, container_object: str | None) -> Awaitable[tuple[Check, ...]]:
        """What a dry run says of a device of a kernel group. Takes the origin's fds over on every path."""
        return self._change(
            "device_add (dry run)",
            lambda: self.groups.check(self._with_container(origin, container_object)),
            *origin.fds(),
        )

    def open_cdev(self, origin: CdevOrigin) -> Backend:
        """Open a device of a cdev. Blocks: in the topology lane. Takes the origin's fd over on every path."""
        return self.sources.cdevs.open(self._with_iommufd(origin))

    def check_cdev(self, origin: CdevOrigin) -> Awaitable[tuple[Check, ...]]:
        """What a dry run says of a device of a cdev. Takes the origin's fd over on every path."""
        return self._change(
            "device_add (dry run)", lambda: self.sources.cdevs.check(self._with_iommufd(origin)), *origin.fds()
        )

    def _with_iommufd(self, origin: CdevOrigin) -> CdevOrigin:
        """The origin with the iommufd as it is now that the lane's turn has come: the object may have gone."""
        try:
            fd = self.objects.iommufd(origin.iommufd.object_id)
        except BaseException:
            close_all(origin.fds())
            raise
        from vfiod.server.backends.cdev import IommufdSource

        return replace(origin, iommufd=IommufdSource(origin.iommufd.object_id, fd))

    def check_served(self, origin: VfioUserOrigin) -> Awaitable[tuple[Check, ...]]:
        """What a dry run says of a device of a vfio-user server. Takes the origin's fd over on every path."""
        return self._change("device_add (dry run)", lambda: self.sources.served.check(origin), *origin.fds())

    def check_mediated(self, uuid: str, driver: str) -> Awaitable[tuple[Check, ...]]:
        """What a dry run says of a mediated device."""
        return self._change("device_add (dry run)", lambda: self.sources.mediated.check(uuid, driver))

    def _with_container(self, origin: GroupOrigin, container_object: str | None) -> GroupOrigin:
        """The origin with the container behind an object's id, as it is now that the lane's turn has come."""
        if container_object is None:
            return origin
        try:
            fd = self.objects.container(container_object).duplicate()
        except OSError as error:
            close_all(origin.fds())
            raise OperationFailed("dup", f"object {container_object}", errno=error.errno or 0) from error
        except BaseException:
            close_all(origin.fds())
            raise
        from vfiod.server.backends.group import ContainerSource

        return replace(origin, container=ContainerSource(fd, container_object, container_object))

    def remove_device(self, name: str, *, force: bool, timeout_ms: int) -> None:
        """See :meth:`Devices.remove`."""
        self.devices.remove(name, force=force, timeout_ms=timeout_ms)

    def session_ended(self, session: int) -> None:
        """A monitor session ended: what it mapped no longer holds a device."""
        self.devices.session_ended(session)

    def unmap_region(self, device: Device, region: Region, session: int | None) -> None:
        """See :meth:`Devices.unmap_region`."""
        self.devices.unmap_region(device, region, session)

    # --- memory and objects ---------------------------------------------------------------------------

    def map_file(
        self, iova: int, size: int, fd: FileDescriptor, *, offset: int, readonly: bool
    ) -> Awaitable[tuple[int, int]]:
        """``dma-map`` of a passed file, which is taken over on every path. Gives the address and size mapped."""

        def work() -> tuple[int, int]:
            memory = open_memory(fd, size=None, readonly=readonly, name=f"the memory at {iova:#x}")
            return self.memory.map(iova, size, memory, offset=offset, readonly=readonly)

        # On failure the memory is closed through its fd: it was never mapped, or the address space has undone it.
        return self._change("dma-map", work, fd)

    def map_object(
        self, iova: int, size: int, backend: str, *, offset: int, readonly: bool
    ) -> Awaitable[tuple[int, int]]:
        """``dma-map`` of a part of a memory backend. Gives the address and size mapped."""

        def work() -> tuple[int, int]:
            memory = self.objects.memory(backend)
            return self.memory.map(iova, size, memory, offset=offset, readonly=readonly, backend=backend)

        return self._change("dma-map", work)

    def unmap(self, iova: int, size: int) -> Awaitable[int]:
        """``dma-unmap``. Gives the bytes unmapped."""
        return self._change("dma-unmap", lambda: self.memory.unmap(iova, size))

    def add_memory(self, id: str, fd: FileDescriptor, *, size: int | None, readonly: bool) -> Awaitable[None]:
        """``object-add`` of a ``memory-backend-fd``. The fd is taken over on every path."""

        def work() -> None:
            self.objects.check_room(id)
            memory = open_memory(fd, size=size, readonly=readonly, name=f"object {id}")
            self.objects.add(MemoryObject(id, memory, kind_of(fd.number)))

        return self._change(f"object-add {id}", work, fd)

    def add_container(self, id: str, fd: FileDescriptor) -> Awaitable[None]:
        """``object-add`` of a ``vfio-container``. The fd is taken over on every path."""
        return self._change(f"object-add {id}", lambda: self.objects.add(ContainerObject(id, fd)), fd)

    def add_iommufd(self, id: str, fd: FileDescriptor) -> Awaitable[None]:
        """``object-add`` of an ``iommufd``. The fd is taken over on every path."""
        return self._change(f"object-add {id}", lambda: self.objects.add(IommufdObject(id, fd)), fd)

    def remove_object(self, id: str) -> Awaitable[None]:
        """``object-del``."""
        return self._change(f"object-del {id}", lambda: self.objects.remove(id))

    # --- looking: never waits -------------------------------------------------------------------------

    def snapshot(self, status: StatusInfo, sessions: list[SessionInfo]) -> MachineInfo:
        """Everything at one moment, and the number of the last event that is part of it."""
        devices = self.devices.all()
        return MachineInfo(
            seq=self.hub.seq,
            name=self.name,
            uuid=self.uuid,
            status=status,
            devices=[self.device_info(device) for device in devices],
            irqs=[irq for device in devices for irq in device.irq_infos()],
            objects=self.objects.infos(),
            containers=list(self.sources.containers()),
            address_spaces=[space.name for space in self.memory.spaces],
            mappings=self.memory.infos(),
            fdsets=self.fdsets.infos(),
            mdevs=self.sources.mdevs(),
            sessions=sessions,
            restored=UNSET if self.restored is None else self.restored,
        )

    async def topology_graph(self) -> tuple[list[TopologyNode], list[TopologyEdge]]:
        """Containers, address spaces, groups, devices and reset domains, for ``query-topology``. Waits for no lane."""
        from vfiod.server.kernel.sysfs import Sysfs
        from vfiod.server.machine.topology import Facts as TopologyFacts
        from vfiod.server.machine.topology import build as build_topology

        containers = self.sources.containers()
        ioases = self.sources.ioases()
        devices = [device.info() for device in self.devices.all()]
        domains = await self.resets.domains()
        groups = [number for container in containers for number in container.groups]
        sysfs = Sysfs(self._calls)
        members = await self._look(lambda: {number: sysfs.members(number) for number in groups})
        return build_topology(
            TopologyFacts(
                name=self.name,
                mappings=len(self.memory),
                mapped_bytes=self.memory.mapped_bytes,
                containers=containers,
                ioases=ioases,
                devices=devices,
                members=members,
                domains=domains,
            )
        )

    def fd_infos(self) -> Iterator[FdInfo]:
        """The fds of fd sets, objects, mappings, groups, containers and devices, for ``query-fds``."""
        yield from self.fdsets.fd_infos()
        yield from self.objects.fd_infos()
        for mapped in self.memory.ranges():
            memory = mapped.mapping.memory
            if mapped.backend is None and not memory.closed:
                yield FdInfo(owner=f"mapping:{mapped.first:#x}", kind=kind_of(memory.number), number=memory.number)
        devices = self.devices.all()
        names = {f"host:{device.info().host}": f"device:{device.name}" for device in devices}
        for held in self.sources.fds():
            yield FdInfo(owner=names.get(held.owner, held.owner), kind=held.kind, number=held.number)
        for device in devices:
            yield from device.fds()
        yield from self.sources.mdev_fds()
        for file in self.memory.client_files():
            yield FdInfo(owner="clients", name=file.name, kind=kind_of(file.number), number=file.number)
        if self.doors is not None:
            yield from self.doors.fd_infos()

    def stats(self) -> list[StatsResult]:
        """Counters and gauges of the machine, for ``query-stats`` of target ``vm``."""
        now: dict[str, int | float] = {
            "uptime-seconds": round(self.loop.time() - self.started, 3),
            "devices": len(self.devices),
            "objects": len(self.objects),
            "mappings": len(self.memory),
            "mapped-bytes": self.memory.mapped_bytes,
            "address-spaces": len(self.memory.spaces),
            "containers": len(self.sources.containers()),
            "ioases": len(self.sources.ioases()),
            "groups-lingering": len(self.sources.lingering()),
            "mdevs": len(self.sources.mdevs()),
            "events": self.hub.seq,
            "events-suppressed": self.hub.suppressed,
            "topology-waiting": self.topology.waiting,
        }
        return [StatsResult(provider="vfiod", stats=[Stat(name=name, value=value) for name, value in now.items()])]

    def device_stats(self) -> list[StatsResult]:
        """Counters of each device, for ``query-stats`` of target ``device``. Interrupts in direct mode are not seen."""
        results = []
        for device in self.devices.all():
            irqs = device.irq_infos()
            info = device.info()
            counters = {
                "irqs-fired": sum(irq.fired or 0 for irq in irqs),
                "irqs-delivered": sum(irq.delivered or 0 for irq in irqs),
                "irqs-spurious": sum(irq.spurious for irq in irqs),
                "requested": info.requested,
                "holders": len(info.held_by),
            }
            stats = [Stat(name=name, value=value) for name, value in counters.items()]
            results.append(StatsResult(provider="vfiod", qom_path=device.path, stats=stats))
        return results

    # --- the end --------------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether the end has begun."""
        return self._ended is not None

    @property
    def stuck(self) -> bool:
        """Whether, at the end, a thread still hung in the kernel.

        It cannot be ended, and the interpreter waits for its threads: the program then has to leave by ``os._exit``.
        """
        return self._stuck

    def close(self) -> Awaitable[list[str]]:
        """Close everything in order: devices, groups, containers, mediated devices, mappings, objects, fd sets.

        Work that is under way gets :data:`~vfiod.protocol.limits.CLOSE_TIMEOUT_MS` to end; what waits is refused.
        Called again, it gives the same. It never raises: what went wrong comes back, in sentences.
        """
        if self._ended is None:
            self._ended = self.loop.create_task(self._close())
        return asyncio.shield(self._ended)

    async def _close(self) -> list[str]:
        ending = Ending(self.loop, CLOSE_TIMEOUT_MS / 1000)
        refusal = DeviceNotActive("The server is shutting down: nothing can be changed any more")
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self.doors is not None:
            self.doors.begin_end()
        self.topology.close(refusal)
        if not await ending.wait(self.topology.idle()):
            ending.note(f"{self.topology.current} is still running; the devices are closed all the same")
        await self.devices.close(refusal, ending)
        if self.doors is not None and not await ending.wait(self.doors.ended()):
            ending.note("A client of an export could not be let go")
        for what, close in self.sources.kernel_closers():
            await ending.step(what, self._in_thread(close))
        await ending.step("Closing mediated devices", self.sources.close_mediation())
        await ending.step("Closing guest memory", self._in_thread(self.memory.close))
        for problem in self.objects.close():
            ending.note(problem)
        self.fdsets.close()
        self._stuck = ending.stuck
        self.executor.shutdown(wait=not ending.stuck, cancel_futures=True)
        return ending.problems

    # --- inside ---------------------------------------------------------------------------------------

    def _change(self, what: str, work: Callable[[], T], *fds: FileDescriptor) -> asyncio.Future[T]:
        """Do something in the topology lane, to its end, even when the session that asked is gone.

        The fds are closed when it fails; when it succeeds, ``work`` has taken them over.
        """
        task = self.loop.create_task(self._in_topology(what, work, fds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_heard)
        return asyncio.shield(task)

    async def _in_topology(self, what: str, work: Callable[[], T], fds: tuple[FileDescriptor, ...]) -> T:
        try:
            return await self.topology.run(what, work)
        except BaseException:
            close_all(fds)
            raise

    def _devices_on(self, iommufd: str) -> tuple[str, ...]:
        """``device:ID`` of each device bound to an iommufd; ``host:ADDRESS`` of one that is just coming or going."""
        names = {device.info().host: f"device:{device.name}" for device in self.devices.all()}
        return tuple(names.get(host, f"host:{host}") for host in self.sources.iommufd_users(iommufd))

    def _in_thread(self, work: Callable[[], None]) -> Awaitable[None]:
        return self._look(work)

    def _look(self, work: Callable[[], T]) -> Awaitable[T]:
        return self.loop.run_in_executor(self.executor, work)

    def _mapping_lost(self, iova: int, size: int, reason: str) -> None:
        """In whatever thread that was noticed."""
        self.loop.call_soon_threadsafe(self.hub.emit, DmaUnmapped(iova=iova, size=size, reason=reason))

    def _device_deleted(self) -> None:
        """A group whose device fd was given out stays in the kernel's hands; look again until it is gone."""
        if self.sources.lingering() and self._sweeper is None and not self.closing:
            self._sweeper = self.loop.call_later(SWEEP_PERIOD_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        if not self.closing:
            self._change("letting go of groups", self.groups.sweep).add_done_callback(lambda _: self._device_deleted())


def _heard(work: asyncio.Future[Any]) -> None:
    """Whoever asked has heard it, or is gone."""
    if not work.cancelled():
        work.exception()
