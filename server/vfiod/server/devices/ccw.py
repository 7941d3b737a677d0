"""A subchannel on any backend: what ``device_add driver=vfio-ccw`` makes (section 9 of the reference).

What it has is in its regions: the I/O region (write it: a program starts; read it: the IRB), and, by their type
capability, the async command region (halt, clear), the SCHIB and the CRWs. Which request an interrupt answers is
decided in :mod:`vfiod.server.devices.subchannel`; here is the I/O.

A program is handed over in a turn of the device's lane, in a thread: the kernel pins its pages then, and a mediated
device may run it whole. One that promised never to wait is handed it at once. Waiting for the interrupt holds nobody
up. Halt and clear wait for no lane: stopping what holds the others up is what they are for.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final, cast

from msgspec import structs

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.ccw import (
    CcwControlResult,
    CcwCrw,
    CcwIo,
    CcwResult,
    CrwInfo,
    SubchannelInfo,
)
from vfiod.protocol.catalogue.devices import Driver, Holder
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.channel import Crw, Irb, Orb, PmcwFlags, Schib, explain_schib
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, InvalidArgument, OperationFailed, TimedOut
from vfiod.protocol.limits import MAX_CCW_QUEUE, MAX_CRWS
from vfiod.protocol.vfio.ccw import (
    CRW_REGION_SIZE,
    SCHIB_REGION_SIZE,
    AsyncCommand,
    CcwCmdRegion,
    CcwIoRegion,
    CcwIrq,
    CcwRegion,
    CcwSubtype,
)
from vfiod.server import trace
from vfiod.server.backends.base import Backend
from vfiod.server.devices.ccw_words import (
    answered,
    control_refused,
    controlled,
    crw_info,
    decoded,
    refused,
    unreadable,
)
from vfiod.server.devices.device import Device, Quiesced
from vfiod.server.devices.environment import Environment, Timer
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.model import Model
from vfiod.server.devices.notices import Notices
from vfiod.server.devices.own_irqs import OwnInterrupts, OwnIrqIndex
from vfiod.server.devices.regions import Region, Regions, describe
from vfiod.server.devices.subchannel import Action, Input, Requests, State, kind_of_status
from vfiod.server.lanes import Turn

__all__ = ["CcwDevice", "CcwModel"]

_log: Final = logging.getLogger(__name__)

RETRY_S: Final = 0.001
"""Seconds between two tries after EAGAIN: the kernel says it while another access to the regions is in progress."""

CONTROL_TRIES: Final = 1000
"""Tries of a halt or clear that is told EAGAIN: about a second."""

_NAMES: Final = {CcwSubtype.ASYNC_CMD: "command", CcwSubtype.SCHIB: "schib", CcwSubtype.CRW: "crw"}
_SIZES: Final = {
    CcwSubtype.ASYNC_CMD: CcwCmdRegion.LAYOUT.size,
    CcwSubtype.SCHIB: SCHIB_REGION_SIZE,
    CcwSubtype.CRW: CRW_REGION_SIZE,
}


class CcwIrqIndex(OwnIrqIndex, frozen=True):
    """``io``, ``crw``, ``req``."""

    NAMES = ("io", "crw", "req")
    EVENTS = ("the reply to ccw-request, or the event CCW_IO", "the event CCW_CRW", "the event DEVICE_REQUESTED")


class CcwModel(Model, frozen=True, kw_only=True):
    """Everything of a subchannel that is open.

    Attributes:
        own: its interrupts, to count them.
        io: index of the I/O region.
        found: indexes of the others, as far as the kernel has them.

    """

    own: OwnInterrupts
    io: int
    found: dict[CcwSubtype, int]


class CcwDevice(Device):
    """One subchannel with its device."""

    driver: ClassVar[Driver] = Driver.VFIO_CCW

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._requests = Requests()
        self._reply: asyncio.Future[CcwResult] | None = None
        self._orb: Orb | None = None
        self._timer: Timer | None = None
        self._line: deque[asyncio.Future[None]] = deque()  # requests that wait for their turn
        self._taken = False  # a request has its turn
        self._started = 0
        self._crws: deque[Crw] = deque(maxlen=MAX_CRWS)

    # --- life -------------------------------------------------------------------------------------

    def populate(self, backend: Backend, environment: Environment) -> CcwModel:
        """Read a subchannel, and arm its interrupts. See :meth:`Device.populate`."""
        info = backend.info()
        if not info.flags & vfio.DeviceFlags.CCW:
            raise CommandError(f"{backend.name} is not a CCW device: driver vfio-ccw cannot serve it", errno="EINVAL")
        if info.num_regions < 1 or info.num_irqs < 1:
            raise CommandError(
                f"{backend.name} has {info.num_regions} regions and {info.num_irqs} interrupt indexes: a CCW device "
                "has an I/O region and an I/O interrupt at least",
                errno="EINVAL",
            )
        regions, found = _regions(self.name, backend, info.num_regions)
        indexes = [_irq(self.name, backend, index) for index in range(info.num_irqs)]
        if not indexes[CcwIrq.IO].info.count:
            raise CommandError(f"{backend.name} has no I/O interrupt: no request could end", errno="EINVAL")
        own = OwnInterrupts(self.name, indexes)
        notices = Notices(self.name, backend, tuple(one for one in indexes if one.info.count and one.index in _KNOWN))
        notices.arm()
        return CcwModel(
            backend,
            info,
            Regions(self.name, backend, tuple(regions), no_mmap=True),
            own,
            notices,
            migratable=False,
            own=own,
            io=int(CcwRegion.CONFIG),
            found=found,
        )

    def stop(self) -> None:
        """Listen to nothing any more; who waits is told. On the loop."""
        super().stop()
        if self._timer is not None:
            self._timer.cancel()
        gone = f"Device '{self.name}' was removed while its request was pending"
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(DeviceNotActive(gone))
        for waiter in self._line:
            if not waiter.done():
                waiter.set_exception(DeviceNotActive(gone))
        self._line.clear()

    def holders(self) -> list[Holder]:
        """A request that waits for its interrupt holds the device too."""
        holders = super().holders()
        if self._requests.pending and not any(one.detail == "ccw-request" for one in holders):
            holders.append(Holder(kind="operation", detail="ccw-request"))
        return holders

    def _ccw(self) -> CcwModel:
        return cast("CcwModel", self._active())  # populate made it

    # --- requests: on the loop --------------------------------------------------------------------------

    async def request(self, orb: Orb, scsw: bytes, *, timeout_ms: int, queue: bool) -> CcwResult:
        """Start a program and wait for its interrupt.

        Cancelled in the queue it leaves; once it has begun it goes on to its end.

        Args:
            orb: what to start.
            scsw: the guest's, 12 bytes.
            timeout_ms: how long to wait, from its turn on.
            queue: whether to wait for a pending request, rather than fail.

        Raises Busy, TimedOut, DeviceNotActive.

        """
        self._ccw()
        if self._taken:
            await self._wait_in_line(queue)
        self._taken = True
        task = asyncio.get_running_loop().create_task(self._run(orb, scsw, timeout_ms))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def _wait_in_line(self, queue: bool) -> None:
        if not queue:
            raise Busy(
                f"Device '{self.name}' has a request pending, and a subchannel does one at a time: wait for its reply, "
                "ask with queue=true, or end it with ccw-clear"
            )
        if len(self._line) >= MAX_CCW_QUEUE:
            raise Busy(f"{MAX_CCW_QUEUE} requests wait for device '{self.name}' already")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._line:
                self._line.remove(waiter)
            elif waiter.done() and not waiter.cancelled():
                self._next()  # its turn came in the same moment
            raise

    def _next(self) -> None:
        """The turn is over: the next one in line has it, or whoever waits for the device's end is told."""
        self._taken = False
        while self._line:
            waiter = self._line.popleft()
            if not waiter.done():
                self._taken = True
                waiter.set_result(None)
                return
        if self.lane.on_idle is not None and not self.lane.busy:
            self.lane.on_idle()

    async def _run(self, orb: Orb, scsw: bytes, timeout_ms: int) -> CcwResult:
        try:
            model = self._ccw()
            if self._requests.state is State.STUCK:
                raise Busy(
                    f"Device '{self.name}' still takes the program of a request that timed out: the kernel or its "
                    "parent has not returned from it"
                )
            if model.notices.take(CcwIrq.IO):
                self._feed(Input.SIGNAL)  # of before: told as an event, not taken for this one's
            reply: asyncio.Future[CcwResult] = asyncio.get_running_loop().create_future()
            self._reply = reply
            self._orb = orb
            self._started += 1
            if trace.ccw_request.on:
                trace.ccw_request(device=self.name, cpa=f"0x{orb.cpa:x}", flags=f"0x{orb.flags:x}", function="start")
            self._timer = self._environment.after(timeout_ms, functools.partial(self._feed, Input.TIMEOUT))
            self._feed(Input.START, CcwIoRegion(orb.pack(), scsw).pack())
            result = await reply
        except CommandError as error:
            if trace.ccw_result.on:
                trace.ccw_result(device=self.name, failed=error)
            raise
        else:
            if trace.ccw_result.on:
                trace.ccw_result(device=self.name, condition_code=result.condition_code, meaning=result.meaning)
            return result
        finally:
            self._next()

    async def _hand_over(self, model: CcwModel, data: bytes) -> None:
        """Write the I/O region, in the device's order, in a thread; EAGAIN is tried again until the time is over."""
        try:
            async with self.lane.turn("ccw-request") as turn:
                while True:
                    try:
                        await turn.run(lambda: model.backend.region_write(model.io, 0, data))
                    except OperationFailed as error:
                        if error.errno != "EAGAIN" or self._going or self._requests.state is State.STUCK:
                            raise
                        await asyncio.sleep(RETRY_S)
                    else:
                        break
        except CommandError as error:
            self._feed(Input.REFUSED, error)
        except Exception as error:  # noqa: BLE001 - whoever waits for the request must hear of it
            _log.exception("Handing a channel program to device %s failed", self.name)
            self._feed(Input.REFUSED, CommandError(f"Handing the program to device '{self.name}' failed: {error}"))
        else:
            self._feed(Input.ACCEPTED)

    def _feed(self, happened: Input, what: Any = None) -> None:
        """Let the state machine decide, and do as it says. On the loop."""
        if self._going:
            return
        for action in self._requests.feed(happened):
            self._ACTIONS[action](self, what)

    def _write(self, data: bytes) -> None:
        model = self._ccw()
        if model.backend.prompt and self.lane.free:
            try:
                model.backend.region_write(model.io, 0, data)
            except OperationFailed as error:
                if error.errno != "EAGAIN":
                    self._feed(Input.REFUSED, error)
                    return
            else:
                self._feed(Input.ACCEPTED)
                return
        task = asyncio.get_running_loop().create_task(self._hand_over(self._ccw(), data))
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _read(self, _: object) -> None:
        """Read the IRB and go on with what it says: at once, or in a worker when the backend may wait."""
        model = self._ccw()
        if model.backend.may_block:
            task = asyncio.get_running_loop().create_task(self._read_in_worker(model))
            self._tasks.add(task)
            task.add_done_callback(self._forget)
            return
        try:
            data = model.backend.region_read(model.io, 0, CcwIoRegion.LAYOUT.size)
        except OperationFailed as error:
            self._unreadable(error)
        else:
            self._have_read(CcwIoRegion.unpack(data))

    async def _read_in_worker(self, model: CcwModel) -> None:
        try:
            async with self.lane.turn("the IRB") as turn:
                data = await turn.run(lambda: model.backend.region_read(model.io, 0, CcwIoRegion.LAYOUT.size))
        except OperationFailed as error:
            self._unreadable(error)
        else:
            self._have_read(CcwIoRegion.unpack(data))

    def _unreadable(self, error: OperationFailed) -> None:
        if self._requests.state is State.WAITING:
            self._feed(Input.ANSWER, unreadable(error, self._orb))
        else:
            _log.warning("Device %s: an interrupt came, and reading its IRB failed: %s", self.name, error)

    def _have_read(self, region: CcwIoRegion) -> None:
        state = self._requests.state
        if region.ret_code and state is State.WAITING:
            failed = OperationFailed("The channel program", f"device '{self.name}'", errno=-region.ret_code)
            self._feed(Input.ANSWER, unreadable(failed, self._orb))
            return
        kind = kind_of_status(Irb.unpack(region.irb).scsw)
        if state in (State.IDLE, State.WAITING):
            self._feed(kind, region.irb)
        elif kind is not Input.EMPTY and not self._going:
            self._tell(region.irb)  # a worker read it before the program that is being handed over now

    def _answer(self, what: bytes | CcwResult) -> None:
        self._settle(answered(what) if isinstance(what, bytes) else what)

    def _fail(self, error: CommandError) -> None:
        if isinstance(error, OperationFailed) and self._orb is not None:
            self._settle(refused(error, self._orb))
        else:
            self._settle(error)

    def _tell(self, what: bytes | CcwResult) -> None:
        if isinstance(what, CcwResult):
            return  # an interrupt without an IRB, and nobody waits: it was logged
        irb = Irb.unpack(what)
        late = self._requests.settle(irb.scsw)
        solicited = irb.scsw.solicited
        self._environment.emit(
            CcwIo(device=self.name, irb=what, decoded=decoded(irb), solicited=solicited, late=late),
        )

    def _give_up(self, _: object) -> None:
        model = self._ccw()
        name = f"device '{self.name}'"
        if self._requests.state is State.STUCK:
            self._settle(
                TimedOut(f"The kernel or its parent has not returned from taking the channel program of {name} in time")
            )
            return
        try:
            model.backend.region_read(model.io, 0, CcwIoRegion.LAYOUT.size)
        except OperationFailed as error:
            self._settle(error)  # it is gone: that is why nothing came
            return
        self._settle(
            TimedOut(
                f"No interrupt ended the channel program of {name} in time; it may still run: "
                "ccw-clear ends it, and its late interrupt becomes CCW_IO"
            )
        )

    def _abort(self, _: object) -> None:
        self._settle(
            CommandError(f"Device '{self.name}' was reset while its channel program ran: it is over", errno="ECANCELED")
        )

    def _settle(self, result: CcwResult | CommandError) -> None:
        reply, self._reply = self._reply, None
        if self._timer is not None:
            self._timer.cancel()
        if reply is None or reply.done():
            return
        if isinstance(result, CcwResult):
            reply.set_result(result)
        else:
            reply.set_exception(result)

    _ACTIONS: ClassVar[dict[Action, Callable[[CcwDevice, Any], None]]] = {
        Action.WRITE: _write,
        Action.READ: _read,
        Action.REPLY: _answer,
        Action.FAIL: _fail,
        Action.TELL: _tell,
        Action.GIVE_UP: _give_up,
        Action.ABORT: _abort,
        Action.OWE: lambda device, what: None,  # the state machine counts
    }

    # --- halt and clear -----------------------------------------------------------------------------------

    def control(self, command: AsyncCommand, *, now: bool) -> CcwControlResult | Awaitable[CcwControlResult]:
        """Halt or clear. Waits for no lane.

        Args:
            command: one of the two.
            now: out of band: fail with Busy rather than try again later.

        Raises CommandError (no async command region), Busy, OperationFailed.

        """
        try:
            return self._control(command)
        except OperationFailed as error:
            if error.errno != "EAGAIN":
                return control_refused(error)
            if now:
                raise Busy(
                    f"Device '{self.name}' is taking a channel program at this moment: ask again", errno="EAGAIN"
                ) from error
        return self._control_later(command)

    def _control(self, command: AsyncCommand) -> CcwControlResult:
        model = self._ccw()
        index = model.found.get(CcwSubtype.ASYNC_CMD)
        if index is None:
            raise CommandError(
                f"Device '{self.name}' has no async command region: this kernel's vfio-ccw cannot halt or clear "
                "(Linux 5.3 can); device-reset ends whatever runs",
                errno="EOPNOTSUPP",
            )
        if trace.ccw_request.on:
            trace.ccw_request(device=self.name, function="halt" if command is AsyncCommand.HSCH else "clear")
        model.backend.region_write(index, 0, CcwCmdRegion(command).pack())
        return controlled()

    async def _control_later(self, command: AsyncCommand) -> CcwControlResult:
        for _ in range(CONTROL_TRIES):
            await asyncio.sleep(RETRY_S)
            try:
                return self._control(command)
            except OperationFailed as error:
                if error.errno != "EAGAIN":
                    return control_refused(error)
        raise Busy(f"Device '{self.name}' has been taking a channel program for too long: ask again", errno="EAGAIN")

    # --- interrupts ---------------------------------------------------------------------------------------

    def _noticed(self, one: IrqIndex, count: int) -> None:
        self._ccw().own.heard(one, count)
        if one.index == CcwIrq.IO:
            self._feed(Input.SIGNAL)
        elif one.index == CcwIrq.CRW:
            try:
                self._read_crws()
            except CommandError as error:
                _log.warning("Device %s: a channel report could not be read: %s", self.name, error)
        else:
            super()._noticed(one, count)

    def _read_crws(self) -> None:
        """Read reports until there are no more; each becomes an event."""
        model = self._ccw()
        index = model.found.get(CcwSubtype.CRW)
        if index is None:
            raise CommandError(
                f"Device '{self.name}' has no CRW region: this kernel's vfio-ccw reports no channel changes "
                "(Linux 5.8 does)",
                errno="EOPNOTSUPP",
            )
        for _ in range(MAX_CRWS):
            data = model.backend.region_read(index, 0, CRW_REGION_SIZE)
            if not any(data[:4]):
                return
            crw = Crw.unpack(data[:4])
            self._crws.append(crw)
            self._environment.emit(CcwCrw(device=self.name, crw=crw_info(crw)))

    # --- looking --------------------------------------------------------------------------------------------

    def crws(self) -> list[CrwInfo]:
        """The last reports, those not read yet among them. CommandError without a CRW region, OperationFailed."""
        if self._requests.state not in (State.STARTING, State.HEARD, State.STUCK):
            self._read_crws()
        return [crw_info(crw) for crw in self._crws]

    def subchannel(self) -> SubchannelInfo:
        """For ``query-subchannel``. OperationFailed when the SCHIB cannot be read."""
        model = self._ccw()
        info = SubchannelInfo(
            device=self.name,
            words=[],
            pending=self._requests.pending,
            waiting=len(self._line),
            can_halt=CcwSubtype.ASYNC_CMD in model.found,
            requests=self._started,
            late=self._requests.owed,
        )
        index = model.found.get(CcwSubtype.SCHIB)
        if index is None:
            words = ["it has no SCHIB region: this kernel's vfio-ccw does not show the subchannel (Linux 5.8 does)"]
            return structs.replace(info, words=words)
        if self._requests.state in (State.STARTING, State.HEARD, State.STUCK):
            # The kernel would make the reader wait until it has taken the program.
            return structs.replace(info, words=["a program is being handed over: it cannot be asked at this moment"])
        data = model.backend.region_read(index, 0, SCHIB_REGION_SIZE)
        schib = Schib.unpack(data)
        pmcw = schib.pmcw
        return structs.replace(
            info,
            schib=data,
            device_number=pmcw.dev if PmcwFlags.DNV in pmcw.flags else UNSET,
            enabled=PmcwFlags.ENA in pmcw.flags,
            channel_paths=[chpid for bit, chpid in enumerate(pmcw.chpid) if pmcw.pim & 0x80 >> bit],
            status=decoded(Irb(scsw=schib.scsw)),
            words=explain_schib(schib),
        )

    # --- reset ----------------------------------------------------------------------------------------------

    async def revive(self, turn: Turn, quiesced: Quiesced, failure: Exception | None) -> None:
        """After a reset the subchannel is as new: nothing runs, and what was signalled before is void."""
        if failure is None and not self._going:
            quiesced.model.notices.take(CcwIrq.IO)
            self._feed(Input.RESET)
        await super().revive(turn, quiesced, failure)


_KNOWN: Final = frozenset(int(one) for one in CcwIrq)


def _regions(device: str, backend: Backend, count: int) -> tuple[list[Region], dict[CcwSubtype, int]]:
    """Every region, described for reading only: they are written by commands. Which is which, by capability."""
    regions: list[Region] = []
    found: dict[CcwSubtype, int] = {}
    for index in range(count):
        info = backend.region_info(index)
        name = "io" if index == CcwRegion.CONFIG else None
        kind = next((one for one in info.capabilities if isinstance(one, vfio.RegionTypeCap)), None)
        if kind is not None and kind.type == vfio.RegionType.CCW and kind.subtype in set(CcwSubtype):
            subtype = CcwSubtype(kind.subtype)
            name = _NAMES[subtype]
            _check_size(backend, name, info.size, _SIZES[subtype])
            found.setdefault(subtype, index)
        elif index == CcwRegion.CONFIG:
            _check_size(backend, "io", info.size, CcwIoRegion.LAYOUT.size)
        shown = structs.replace(info, flags=info.flags & vfio.RegionFlags.READ)
        region = describe(index, shown, name)
        region.note = "written by the ccw commands"
        regions.append(region)
        if trace.device_populated_region.on:
            trace.device_populated_region(device=device, region=region.name, size=f"0x{info.size:x}", flags=info.flags)
    return regions, found


def _check_size(backend: Backend, name: str, size: int, wanted: int) -> None:
    if size != wanted:
        raise CommandError(
            f"The {name} region of {backend.name} has {size} bytes, it must have {wanted}", errno="EINVAL"
        )


def _irq(device: str, backend: Backend, index: int) -> CcwIrqIndex:
    one = CcwIrqIndex(device, backend.irq_info(index))
    if trace.device_populated_irq.on:
        trace.device_populated_irq(device=device, index=index, count=one.info.count, flags=one.info.flags)
    return one


def _not_ccw(device: Device) -> InvalidArgument:
    return InvalidArgument(
        f"Device '{device.name}' has driver {device.driver}: channel I/O is for devices of driver vfio-ccw"
    )


def as_ccw(device: Device) -> CcwDevice:
    """The device, when it is a subchannel. Raises InvalidArgument."""
    if not isinstance(device, CcwDevice):
        raise _not_ccw(device)
    return device
