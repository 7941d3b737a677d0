"""What every assigned device has, whatever its class: a life, regions, interrupts, holders, notices, a reset.

A model (:mod:`vfiod.server.devices.pci`, :mod:`vfiod.server.devices.platform`) derives from :class:`Device`, says how
its parts are read (:meth:`Device.populate`), and what a reset must save. Its life, and who calls what (behaviour:
sections 1, 3 and 6 of the reference)::

    device = device_class(driver)(...) loop     state realizing; queries already answer
    device.realize(open)               worker   topology lane; on failure everything is closed again
    device.start()                     loop     interrupts are listened to; state running
      ... commands ...
    device.stop()                      loop     listens to nothing, no timer; nothing of the loop is left
    released = device.close()          worker   topology lane; disarms, unmaps, closes; True when the kernel let it go

``stop`` and ``close`` may be called again, and after a ``realize`` that failed.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import (
    DeviceError,
    DeviceInfo,
    DeviceReconnected,
    DeviceRequested,
    Driver,
    Holder,
)
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.catalogue.regions import RegionInfo, RegionMmapChanged
from vfiod.protocol.catalogue.words import UNSET, DeviceState, IrqKind
from vfiod.protocol.errors import (
    Busy,
    CommandError,
    DeviceNotActive,
    InvalidArgument,
    OperationFailed,
    PermissionRefused,
)
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import Backend
from vfiod.server.devices import eventfds
from vfiod.server.devices.claims import Claim
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.holders import RegionHolders
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.model import Interrupts, Model, Options, Quiesced
from vfiod.server.devices.regions import Region, Regions
from vfiod.server.devices.resetting import quiesce, reset_alone, revive
from vfiod.server.lanes import Lane, Turn

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import BackendState, ModelState
    from vfiod.server.state.machine import DeviceState as DeviceState_

__all__ = ["Device", "Quiesced"]

T = TypeVar("T")

_BY_MESSAGE: Final = frozenset({IrqKind.NONE, IrqKind.MSI, IrqKind.MSIX})


class Device(ABC):
    """One device.

    Args:
        id: the user's id; ``""`` for a device without one.
        path: ``/machine/peripheral/ID`` or ``/machine/peripheral-anon/device[N]``.
        backend_kind: what :attr:`DeviceInfo.backend` says before the backend is open.
        host: host address or mediated device's UUID, when known.
        environment: the machine around it.
        options: its properties.
        on_requested: called on the loop each time the host asks for the device, after ``DEVICE_REQUESTED`` went out.

    Attributes:
        driver: which model this is.
        hot_resettable: whether devices of this class share resets with others (``hot-reset``): PCI only.
        on_platform_bus: whether ``irq-start`` without a device ("machine complete") starts its interrupts.
        whole_regions: whether its regions are requests and answers rather than registers: the client of an export reads
            and writes each as it is, and hears what is refused.
        lane: the order of its commands.
        claim: who has it for itself: the client of an export.
        state: where it is in its life; the machine sets ``UNPLUGGING`` and back.

    """

    driver: ClassVar[Driver]
    hot_resettable: ClassVar[bool] = False
    on_platform_bus: ClassVar[bool] = False
    whole_regions: ClassVar[bool] = False

    def __init__(
        self,
        *,
        id: str,
        path: str,
        backend_kind: str,
        host: str | None,
        environment: Environment,
        options: Options,
        on_requested: Callable[[Device], None] | None = None,
    ) -> None:
        self.id = id
        self.path = path
        self.state = DeviceState.REALIZING
        self.options = options
        self.claim: Claim | None = None
        self.lane: Final[Lane] = environment.lane
        self._backend_kind = backend_kind
        self._host = host
        self._environment = environment
        self._on_requested = on_requested
        self._model: Model | None = None
        self._waits = False  # its backend may wait for another program
        self._going = False  # stopped: whatever still runs must leave it alone
        self._requested = 0
        self._fast_path_told = True
        self._mapped_by = RegionHolders()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        """What replies and events call it: its id, or its path when it has none."""
        return self.id or self.path

    @property
    def realized(self) -> bool:
        """Whether it is open: it has regions and interrupts."""
        return self._model is not None

    def in_order(self, what: str, action: Callable[[], T]) -> T | Awaitable[T]:
        """Do something quick on the loop, in the device's order: at once when nothing else is at work on it.

        Else an awaitable is returned, which does it in its turn: on the loop, or in a worker when the device's backend
        may wait for another program. Raises what the lane says once the device goes.
        """
        if self._waits:
            return self._in_worker(what, action)
        return action() if self.lane.free else self._in_turn(what, action)

    def in_order_on_loop(self, what: str, action: Callable[[], T]) -> T | Awaitable[T]:
        """:meth:`in_order` for what never waits, whatever the backend: looking, giving fds out, masking."""
        return action() if self.lane.free else self._in_turn(what, action)

    def on_loop(self, function: Callable[[], T]) -> T:
        """Do something on the loop, from inside an :meth:`in_order`, which may be in a worker."""
        return self._environment.on_loop(function)

    @property
    def waits(self) -> bool:
        """Whether its backend may wait for another program (``may_block``): then its commands run in a worker."""
        return self._waits

    def access_waits(self, region: Region, offset: int, size: int, *, write: bool) -> bool:
        """Whether this access may wait for DMA (``Backend.access_waits``): make it by :meth:`read` or :meth:`write`.

        Configuration space starts no DMA.
        """
        return not region.by_bytes and self._active().backend.access_waits(region.index, offset, size, write=write)

    async def _in_worker(self, what: str, action: Callable[[], T]) -> T:
        async with self.lane.turn(what) as turn:
            return await self._in_thread(turn, action)

    async def _in_turn(self, what: str, action: Callable[[], T]) -> T:
        async with self.lane.turn(what):
            return action()

    # --- life -------------------------------------------------------------------------------------

    def realize(self, open_backend: Callable[[], Backend]) -> None:
        """Open the device and read what it has. Blocks; in a worker. On failure closes everything, and raises."""
        backend = open_backend()
        self._waits = backend.may_block
        backend.watch_return(self._came_back)
        try:
            model = self.populate(backend, self._environment)
            self.set_up(model)
        except BaseException:
            self.state = DeviceState.FAILED
            backend.close()
            raise
        self._fast_path_told = model.regions.fast_path
        self._model = model

    @abstractmethod
    def populate(self, backend: Backend, environment: Environment) -> Model:
        """Read what the device has; change nothing. Blocks; in a worker.

        On failure the backend stays open. CommandError: it is no device of this class, or has less than one must have;
        OperationFailed.
        """

    def set_up(self, model: Model) -> None:
        """Arm what a device has from the beginning: its notices. Blocks; in a worker. On failure nothing is armed."""
        model.notices.arm()

    def start(self) -> None:
        """Begin to listen; state ``running``. On the loop, once, after :meth:`realize`."""
        model = self._active()
        model.notices.start(self._environment, self._noticed)
        model.regions.look_again()
        self.state = DeviceState.RUNNING

    # --- over a change of the process: on the loop, which does nothing else meanwhile ---------------------

    @property
    def under_way(self) -> str | None:
        """What is being done to it, for a person; None: nothing, it could be described."""
        if self._model is None or self.state is DeviceState.REALIZING:
            return f"device '{self.name}' is {self.state}"
        pending = self.lane.pending()
        return f"{pending[0]} of device '{self.name}'" if pending else None

    def keep(self, given: Given, *, new: Mapping[str, Any], backend: Callable[[], BackendState]) -> DeviceState_:
        """Describe it, while nothing is under way.

        Args:
            given: takes the fds.
            new: what only the machine knows of it.
            backend: describes where it comes from.

        """
        from vfiod.server.devices.keeping import keep_device

        return keep_device(self, given, new=new, keep_backend=backend)

    def keep_model(self, model: Model, given: Given) -> ModelState:
        """Describe what only devices of this class have. CannotKeep."""
        from vfiod.server.state.format import CannotKeep

        raise CannotKeep(f"Device '{self.name}': devices of driver {self.driver} cannot be handed over")

    def adopt(self, backend: Backend, state: DeviceState_, taken: Taken) -> None:
        """Instead of :meth:`realize`: read what is constant, and have the rest as it was. Arms and changes nothing."""
        from vfiod.server.devices.keeping import adopt_device

        adopt_device(self, backend, state, taken)

    def adopt_model(self, model: Model, state: ModelState, taken: Taken) -> None:
        """Have what :meth:`keep_model` described."""
        raise NotImplementedError(f"Devices of driver {self.driver}")

    def start_again(self) -> None:
        """Instead of :meth:`start`, after :meth:`adopt`: listen. What was signalled meanwhile is still to be heard."""
        self.start()
        self.go_on(self._active())

    def go_on(self, model: Model) -> None:  # noqa: B027 - most have no more than notices
        """Listen to what only devices of this class have."""

    def stop(self) -> None:
        """Listen to nothing any more, cancel timers. On the loop."""
        self._going = True
        if self.claim is not None:
            self.claim.device_stops()
        model = self._model
        if model is not None:
            model.notices.stop()
            model.interrupts.silence()

    def close(self) -> bool:
        """Disarm every interrupt, unmap, close. Blocks; in a worker, after :meth:`stop`.

        Returns whether the kernel really let the device go: False when an fd given out keeps it open.
        """
        model, self._model = self._model, None
        if model is None:
            return True
        try:
            model.interrupts.close()
            model.notices.close()
            model.regions.close()
            if self.claim is not None:
                self.claim.release_memory()
        finally:
            released = model.backend.close()
        return released

    def _active(self) -> Model:
        model = self._model
        if model is None or self._going:
            raise DeviceNotActive(f"Device '{self.name}' is {self.state}: it has no regions or interrupts now")
        return model

    # --- looking: on the loop, at any time, never waiting -----------------------------------------------

    def info(self) -> DeviceInfo:
        """For ``query-devices``."""
        model = self._model
        group = None if model is None else model.backend.group
        return DeviceInfo(
            id=self.name,
            path=self.path,
            driver=self.driver,
            backend=self._backend_kind if model is None else model.backend.kind,
            host=(self._host if model is None else model.backend.name) or UNSET,
            state=self.state,
            reset=model is not None and model.info.can_reset,
            regions=0 if model is None else len(model.regions.all),
            irq_indexes=0 if model is None else len(model.interrupts.indexes),
            irq_kind=IrqKind.NONE if model is None else model.interrupts.kind,
            group=UNSET if group is None else group,
            migratable=model is not None and model.migratable,
            share_fd=self.options.share_fd,
            fast_path=model is not None and model.regions.fast_path,
            on_request=self.options.on_request,
            requested=self._requested,
            held_by=self.holders(),
        )

    def irq_infos(self) -> list[IrqInfo]:
        """For ``query-irqs``."""
        return [] if self._model is None else self._model.interrupts.infos()

    def region_infos(self) -> list[RegionInfo]:
        """For ``query-regions``."""
        return [] if self._model is None else self._model.regions.infos()

    def fds(self) -> Sequence[FdInfo]:
        """The fds this device holds (its interrupts' eventfds), for ``query-fds``. The device fd is the backend's."""
        model = self._model
        if model is None:
            return []
        owner = f"device:{self.name}"
        return [
            FdInfo(owner=owner, name=name, kind=FdKind.EVENTFD, number=fd.number)
            for name, fd in (*model.interrupts.fds(), *model.notices.fds())
            if not fd.closed
        ]

    def holders(self) -> list[Holder]:
        """Who keeps it from being removed: running and waiting operations, sessions that mapped a region."""
        operations = [Holder(kind="operation", detail=what) for what in self.lane.pending()]
        return operations + self._mapped_by.infos() + ([] if self.claim is None else [self.claim.holder()])

    def check_unclaimed(self, what: str, *, force: bool) -> None:
        """Refuse the monitor what changes a device that belongs to a client of an export. Busy, naming the export."""
        if self.claim is not None and not force:
            raise Busy(
                f"Device '{self.name}' is attached to by the client of {self.claim.name}: {what} would change it under "
                "its hands; give force=true to do it all the same, or device-export-del first"
            )

    def stop_dma(self) -> None:
        """The device masters its bus no more, as far as its model can see to that. Blocks; in a worker."""
        self._stop_dma(self._active())

    def check_free(self) -> None:  # noqa: B027 - most have nothing of that kind
        """Refuse a client while something of the monitor's is under way that outlasts its command. Busy."""

    def client_gone(self) -> None:
        """What had the device is gone: it touches that memory no more, as far as its model can. Blocks; in a worker."""
        self.stop_dma()

    async def stop_interrupts(self, *, reason: str, whatever: bool = False) -> None:
        """Every interrupt off, in its turn of the lane. CommandError; then they are as they were.

        Args:
            reason: for the events.
            whatever: they go for good, even where the kernel refuses: whose eventfds they have is gone.

        """
        async with self.lane.turn("stopping interrupts") as turn:
            await self._step(turn, lambda: self._stop_interrupts(reason, whatever))

    def _stop_interrupts(self, reason: str, whatever: bool) -> None:
        interrupts = self._active().interrupts
        try:
            interrupts.stop(reason=reason)
        except OperationFailed as error:
            if not whatever:
                raise
            interrupts.abandon(reason=f"{reason}; {error}")

    def session_ended(self, session: int) -> None:
        """A monitor session ended: it no longer holds what it mapped."""
        self._mapped_by.ended(session)

    def _came_back(self, changed: Sequence[int]) -> None:
        """The program that serves it was restarted, and has all that vfiod keeps for it. On the loop."""
        model = self._model
        if self._going:
            return
        remapped: list[str] = []
        if model is not None:
            model.regions.look_again()
            remapped = [model.regions.all[index].name for index in changed if index < len(model.regions.all)]
            if self.claim is not None:
                self.claim.memory_replaced(changed)
        self._environment.emit(DeviceReconnected(device=self.name, remapped=remapped))

    # --- regions: on the loop, in the device's order ------------------------------------------------------

    @property
    def regions(self) -> Regions:
        """Its regions. DeviceNotActive while it has none."""
        return self._active().regions

    def load(self, region: Region, offset: int, size: int) -> int:
        """One access; see :meth:`Regions.load`."""
        model = self._active()
        due = not self._waits or model.interrupts.awaits_access
        value = model.regions.load(region, offset, size)
        if region.completes and due:
            self._completed(model)
        return value

    def store(self, region: Region, offset: int, size: int, value: int) -> None:
        """One access; see :meth:`Regions.store`."""
        model = self._active()
        due = not self._waits or model.interrupts.awaits_access
        model.regions.store(region, offset, size, value)
        if region.by_bytes:
            self._accessed(region, written=True, due=due)
        elif region.completes and due:
            self._completed(model)

    async def read(self, region: Region, offset: int, length: int) -> bytes:
        """Bytes, in its turn of the lane, in a thread; see :meth:`Regions.read`."""
        regions = self._active().regions
        regions.check(region, offset, length, write=False)
        async with self.lane.turn("region-read") as turn:
            due = self._active().interrupts.awaits_access
            data = await self._in_thread(turn, lambda: regions.read(region, offset, length))
            await self._step(turn, lambda: self._accessed(region, due=due))
        return data

    async def write(self, region: Region, offset: int, data: bytes) -> None:
        """Bytes, in its turn of the lane, in a thread; see :meth:`Regions.write`."""
        regions = self._active().regions
        regions.check(region, offset, len(data), write=True)
        async with self.lane.turn("region-write") as turn:
            due = self._active().interrupts.awaits_access
            for at, size, virtual in regions.pieces(region, offset, len(data)):
                part = data[at - offset : at - offset + size]
                if virtual:
                    await self._step(turn, functools.partial(regions.write, region, at, part))
                else:
                    await self._in_thread(turn, functools.partial(regions.write, region, at, part))
            await self._step(turn, lambda: self._accessed(region, written=True, due=due))

    async def _step(self, turn: Turn, work: Callable[[], T]) -> T:
        """Do something quick on the loop; in a thread when the backend may wait."""
        return await self._in_thread(turn, work) if self._waits else work()

    async def _in_thread(self, turn: Turn, work: Callable[[], T]) -> T:
        """Do it in a thread. DeviceNotActive when the device was forced away meanwhile, whatever else went wrong."""
        try:
            return await turn.run(work)
        except Exception as error:
            if self._going:
                raise DeviceNotActive(f"Device '{self.name}' was removed meanwhile") from error
            raise

    def read_now(self, region: Region, offset: int, length: int) -> bytes:
        """Few bytes (at most :data:`INLINE_BYTES`), at once."""
        model = self._active()
        due = not self._waits or model.interrupts.awaits_access
        data = model.regions.read(region, offset, length)
        self._accessed(region, due=due)
        return data

    def write_now(self, region: Region, offset: int, data: bytes) -> None:
        """Few bytes (at most :data:`INLINE_BYTES`), at once."""
        model = self._active()
        due = not self._waits or model.interrupts.awaits_access
        model.regions.write(region, offset, data)
        self._accessed(region, written=True, due=due)

    def _accessed(self, region: Region, *, written: bool = False, due: bool = True) -> None:
        """A region was accessed through vfiod, successfully. On the loop, or where :meth:`in_order` is.

        Args:
            region: which.
            written: whether it was a write.
            due: whether an interrupt was up when the access began. One that the access itself raises can be here
                before a thread's work has ended, and is not completed by it.

        """
        model = self._model
        if model is not None and region.completes and due:
            self._completed(model)

    def _completed(self, model: Model) -> None:
        """The EOI, where an access is one: never of messages."""
        if model.interrupts.kind not in _BY_MESSAGE:
            self._environment.on_loop(model.interrupts.accessed)

    def map_region(self, region: Region, session: int) -> FileDescriptor:
        """Give out the fd that maps a region, a duplicate. The session holds the device from now on.

        Raises PermissionRefused (``share-fd=false``), InvalidArgument (it cannot be mapped), OperationFailed.
        """
        fd = self.share_region(region)
        self._mapped_by.add(session, region.name)
        return fd

    def share_region(self, region: Region) -> FileDescriptor:
        """The fd that maps a region, a duplicate, to be given out. Raises as :meth:`map_region`."""
        model = self._active()
        if not self.options.share_fd:
            raise PermissionRefused(
                f"Device '{self.name}' was added with share-fd=false: its fd is not given out; "
                "use region-read and region-write"
            )
        if self.state is not DeviceState.RUNNING:
            raise DeviceNotActive(f"Device '{self.name}' is {self.state}: no region of it can be mapped any more")
        number = model.backend.region_fd(region.index) if region.areas else None
        if number is None:
            why = region.note or ("its size is 0" if not region.info.present else "the device does not allow it")
            raise InvalidArgument(f"Region {region.name} of device '{self.name}' cannot be mapped: {why}")
        fd = eventfds.duplicate(number, f"region {region.name} of device '{self.name}'")
        model.backend.give_out()
        model.regions.shared = True
        model.interrupts.given_out()
        self._tell_fast_path()
        return fd

    def unmap_region(self, region: Region, session: int | None) -> None:
        """The session no longer holds a region it mapped. InvalidArgument when it holds no such."""
        self._mapped_by.drop(session, region.name, device=self.name)

    # --- interrupts -----------------------------------------------------------------------------------------

    @property
    def interrupts(self) -> Interrupts:
        """Its interrupts. DeviceNotActive while it has none."""
        return self._active().interrupts

    def _noticed(self, one: IrqIndex, count: int) -> None:
        if not one.requests:
            reason = "The device reported an uncorrectable error (ERR interrupt); reset it or remove it"
            self._environment.emit(DeviceError(device=self.name, reason=reason))
            if self.claim is not None:
                self.claim.failed()
            return
        self._requested += count
        action = self.options.on_request
        self._environment.emit(DeviceRequested(device=self.name, count=self._requested, action=action))
        if self.claim is not None:
            self.claim.asked_to_go()
        if self._on_requested is not None:
            self._on_requested(self)

    def _trap(self, on: bool) -> None:
        model = self._model
        if model is not None:
            model.regions.trapped = on
            self._tell_fast_path()

    def _tell_fast_path(self) -> None:
        """Send ``REGION_MMAP_CHANGED`` when mapped access went off or came back."""
        model = self._model
        if model is None or not model.regions.can_map:
            return
        now = model.regions.fast_path
        if now is not self._fast_path_told:
            self._fast_path_told = now
            self._environment.emit(RegionMmapChanged(device=self.name, enabled=now))

    # --- reset ----------------------------------------------------------------------------------------------

    @property
    def can_reset(self) -> bool:
        """Whether :meth:`reset` can reset it (``VFIO_DEVICE_FLAGS_RESET``)."""
        return self._model is not None and self._model.info.can_reset

    async def reset(self) -> None:
        """Reset it: interrupts off, DMA off where that can be, ``VFIO_DEVICE_RESET``, state restored, interrupts on.

        In its turn of the lane, and to the end whatever becomes of the caller. Raises CommandError for a device that
        cannot be reset alone; OperationFailed.
        """
        if not self._active().info.can_reset:
            raise CommandError(self._why_no_reset())
        task = asyncio.get_running_loop().create_task(reset_alone(self))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    def _why_no_reset(self) -> str:
        return f"Device '{self.name}' cannot be reset (no VFIO_DEVICE_FLAGS_RESET)"

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked has it, or is gone

    async def feature(self, request: vfio.DeviceFeature, room: int) -> bytes:
        """``VFIO_DEVICE_FEATURE``, in its turn of the lane; see :meth:`Backend.feature`."""
        async with self.lane.turn("feature") as turn:
            model = self._active()
            if request.feature == vfio.Feature.LOW_POWER_ENTRY and vfio.FeatureFlags.SET in request.flags:
                # Whoever asked wakes it as he likes, and until then a mapped access is SIGBUS (vfio_pci_mmap_fault):
                # from here on accesses of ours are by read and write, for which the kernel wakes it itself.
                model.regions.shared = True
                self._tell_fast_path()
            return await self._in_thread(turn, lambda: model.backend.feature(request, room))

    @property
    def backend(self) -> Backend:
        """Where it comes from. DeviceNotActive while it is not open."""
        return self._active().backend

    async def quiesce(self, turn: Turn, method: str) -> Quiesced:
        """Make it ready for a reset: interrupts off, state kept, DMA off. :meth:`revive` must follow.

        On failure it works on as before, and the failure is raised.

        Args:
            turn: of the device's own lane, which lasts until after :meth:`revive`.
            method: what ``DEVICE_RESET`` will say: ``device``, ``hot``.

        """
        return await quiesce(self, turn, method)

    async def revive(self, turn: Turn, quiesced: Quiesced, failure: Exception | None) -> None:
        """After a reset, or after one that failed: state and interrupts as they were; then ``DEVICE_RESET``.

        Raises ``failure``, when there is one, last; else what restoring failed with. OperationFailed, after a
        ``DEVICE_ERROR``, for a device that comes back as all ones; DeviceNotActive for one that was forced away.
        """
        await revive(self, turn, quiesced, failure)

    # What a model does around a reset. Each blocks; in a worker. The model is passed: it may be forced away meanwhile.

    def _stop_dma(self, model: Model) -> None:
        """DMA off for good, as far as the model can."""
        self._save(model)

    def _save(self, model: Model) -> Any:
        """DMA off, as far as the model can; returns what a reset may lose, for :meth:`_restore`."""
        return None

    def _restore(self, model: Model, saved: Any) -> bool:
        """Bring back what :meth:`_save` kept. Returns whether the device answers."""
        return True

    def _decodes(self, model: Model) -> bool:
        """Whether the device answers accesses to its mapped regions now. Never raises."""
        return True
