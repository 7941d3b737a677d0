"""A subchannel on any backend: what ``device_add driver=vfio-ccw`` makes (section 9 of the reference).

What it has is in its regions: the I/O region (write it: a program starts; read it: the IRB), and, by their type
capability, the async command region, the SCHIB and the CRWs. Here are the requests; which of them an interrupt answers
is decided in :mod:`vfiod.server.devices.subchannel`, and what is no request is in
:mod:`vfiod.server.devices.subchannel_functions`.

A program is handed over in a turn of the device's lane, in a thread: the kernel pins its pages then, and a mediated
device may run it whole. One that promised never to wait is handed it at once. Waiting for the interrupt holds nobody
up. When the device goes away by itself, whoever waits for it is told at once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final

from vfiod.protocol.catalogue.ccw import CcwIo, CcwResult
from vfiod.protocol.catalogue.devices import Holder
from vfiod.protocol.channel import Irb, Orb
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, InvalidArgument, OperationFailed, TimedOut
from vfiod.protocol.vfio.ccw import CcwIoRegion, CcwIrq, CcwSubtype
from vfiod.server import trace
from vfiod.server.devices.ccw_layout import CcwModel
from vfiod.server.devices.ccw_line import Line, Place
from vfiod.server.devices.ccw_words import answered, decoded, refused, unreadable
from vfiod.server.devices.device import Device, Quiesced
from vfiod.server.devices.environment import Timer
from vfiod.server.devices.irq_index import IrqIndex
from vfiod.server.devices.subchannel import Action, Input, State, kind_of_status
from vfiod.server.devices.subchannel_functions import RETRY_S, Subchannel
from vfiod.server.lanes import Turn
from vfiod.server.logs import about

__all__ = ["CcwDevice", "as_ccw"]

_log: Final = logging.getLogger(__name__)


class CcwDevice(Subchannel):
    """One subchannel with its device."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._reply: asyncio.Future[CcwResult] | None = None
        self._orb: Orb | None = None
        self._timer: Timer | None = None
        self._line = Line(lambda: self.name, self._idle)

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen. See :meth:`Device.start`."""
        super().start()
        self._ccw().backend.watch_end(self._gone)

    def stop(self) -> None:
        """Listen to nothing any more; who waits is told. On the loop."""
        super().stop()
        if self._timer is not None:
            self._timer.cancel()
        gone = f"Device '{self.name}' was removed while its request was pending"
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(DeviceNotActive(gone))
        self._line.refuse(lambda: DeviceNotActive(gone))

    def holders(self) -> list[Holder]:
        """A request that waits for its interrupt holds the device too."""
        holders = super().holders()
        if self._requests.pending and not any(one.detail == "ccw-request" for one in holders):
            holders.append(Holder(kind="operation", detail="ccw-request"))
        return holders

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._line)

    # --- requests: on the loop --------------------------------------------------------------------------

    def request(self, orb: Orb, scsw: bytes, *, timeout_ms: int, queue: bool) -> CcwResult | Awaitable[CcwResult]:
        """Start a program; its interrupt is the reply.

        Cancelled in the queue it leaves; once it has begun it goes on to its end.

        Args:
            orb: what to start.
            scsw: the guest's, 12 bytes.
            timeout_ms: how long to wait, from its turn on.
            queue: whether to wait for a pending request, rather than fail.

        Returns how it ended: at once when it has ended already, which is for a device that never waits.

        Raises Busy, TimedOut, DeviceNotActive.

        """
        self._ccw()
        if not self._line.take():
            return self._queued(self._line.join(queue), orb, scsw, timeout_ms)
        return self._run(orb, scsw, timeout_ms)

    async def _queued(self, place: Place, orb: Orb, scsw: bytes, timeout_ms: int) -> CcwResult:
        result = await self._line.wait(place)
        if result is not None:
            return result
        outcome = self._run(orb, scsw, timeout_ms)
        return await outcome if isinstance(outcome, Awaitable) else outcome

    def _idle(self) -> None:
        """Nobody has the turn: whoever waits for the device's end is told."""
        if self.lane.on_idle is not None and not self.lane.busy:
            self.lane.on_idle()

    def _run(self, orb: Orb, scsw: bytes, timeout_ms: int) -> CcwResult | Awaitable[CcwResult]:
        """It has its turn. What is begun here ends in :meth:`_result`."""
        try:
            reply = self._begin(orb, scsw, timeout_ms)
        except BaseException:
            self._line.next()
            raise
        if reply.done():
            return self._result(reply)
        task = asyncio.get_running_loop().create_task(self._wait(reply))
        self._keep(task)
        return asyncio.shield(task)

    async def _wait(self, reply: asyncio.Future[CcwResult]) -> CcwResult:
        await asyncio.wait((reply,))
        return self._result(reply)

    def _result(self, reply: asyncio.Future[CcwResult]) -> CcwResult:
        try:
            result = reply.result()
        except CommandError as error:
            if trace.ccw_result.on:
                trace.ccw_result(device=self.name, failed=error)
            raise
        else:
            if trace.ccw_result.on:
                trace.ccw_result(device=self.name, condition_code=result.condition_code, meaning=result.meaning)
            return result
        finally:
            self._line.next()

    def _begin(self, orb: Orb, scsw: bytes, timeout_ms: int) -> asyncio.Future[CcwResult]:
        model = self._ccw()
        if self._requests.state is State.STUCK:
            raise Busy(
                f"Device '{self.name}' still takes the program of a request that is over: the kernel or its "
                "parent has not returned from it"
            )
        self._hear(model)  # of before: told as an event, not taken for this one's
        reply: asyncio.Future[CcwResult] = asyncio.get_running_loop().create_future()
        self._reply = reply
        self._orb = orb
        self._started += 1
        if trace.ccw_request.on:
            trace.ccw_request(device=self.name, cpa=f"0x{orb.cpa:x}", flags=f"0x{orb.flags:x}", function="start")
        self._feed(Input.START, CcwIoRegion(orb.pack(), scsw).pack())
        if self._requests.state is State.WAITING:
            self._hear(model)  # handed over at once, it may have ended as quickly
        if not reply.done():
            self._timer = self._environment.after(timeout_ms, functools.partial(self._feed, Input.TIMEOUT))
        return reply

    def _hear(self, model: CcwModel) -> None:
        """Hear the I/O interrupt now, if it has come, and not only when the loop looks."""
        count = model.notices.take(CcwIrq.IO)
        if count:
            model.own.heard(model.own.indexes[CcwIrq.IO], count)
            self._feed(Input.SIGNAL)

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
            _log.exception("Handing a channel program to device %s failed", self.name, extra=about(device=self.name))
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
        self._keep(asyncio.get_running_loop().create_task(self._hand_over(model, data)))

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
            _log.warning(
                "Device %s: an interrupt came, and reading its IRB failed: %s",
                self.name,
                error,
                extra=about(device=self.name),
            )

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
        # A program that serves the device and does not answer, or nonsense: nobody knows what became of it.
        known = isinstance(error, OperationFailed) and error.errno not in ("ETIMEDOUT", "EPROTO")
        if isinstance(error, OperationFailed) and known and self._orb is not None:
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
        index = model.found.get(CcwSubtype.SCHIB)
        if index is not None and not model.backend.may_block:
            try:
                self._store(index)
            except OperationFailed as error:
                if error.errno == "ENODEV":  # that is why nothing came
                    self._settle(unreadable(error, self._orb))
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

    # --- interrupts, and the end of the device ------------------------------------------------------------

    def _noticed(self, one: IrqIndex, count: int) -> None:
        self._ccw().own.heard(one, count)
        if self.claim is not None and not one.requests:
            self.claim.signalled(one.index)  # whoever has it reads the status, and the report: that takes it
            return
        if one.index == CcwIrq.IO:
            self._feed(Input.SIGNAL)
            return
        if one.index == CcwIrq.CRW:
            self._reported()
        else:
            super()._noticed(one, count)
        # The machine reports a change, or the host wants the device back: that may be because it has gone.
        self._look_whether_there()

    def _look_whether_there(self) -> None:
        """Ask for the subchannel while a request waits for it: ENODEV, and its interrupt will never come."""
        index = None if self._going else self._ccw().found.get(CcwSubtype.SCHIB)
        if index is None or self._requests.state is not State.WAITING:
            return
        try:
            stored = self._store(index)
        except CommandError as error:
            self._not_there(error)
        else:
            if isinstance(stored, Awaitable):
                self._keep(asyncio.get_running_loop().create_task(self._look_aside(stored)))

    async def _look_aside(self, stored: Awaitable[bytes]) -> None:
        try:
            await stored
        except CommandError as error:
            self._not_there(error)

    def _not_there(self, error: CommandError) -> None:
        if error.errno == "ENODEV" and not self._going:
            self._gone(str(error))

    def _gone(self, reason: str) -> None:
        """The device went away by itself: the pending request ends now, and so do those in line. On the loop."""
        if self._going:
            return
        error = OperationFailed("The channel program", f"device '{self.name}'", errno="ENODEV", advice=reason)
        started = self._requests.state is State.WAITING
        self._feed(Input.GONE, unreadable(error, self._orb) if started else error)
        self._line.answer(lambda: refused(error, None))

    # --- reset ----------------------------------------------------------------------------------------------

    async def revive(self, turn: Turn, quiesced: Quiesced, failure: Exception | None) -> None:
        """After a reset the subchannel is as new: nothing runs, and what was signalled before is void."""
        if failure is None and not self._going:
            quiesced.model.notices.take(CcwIrq.IO)
            self._feed(Input.RESET)
        await super().revive(turn, quiesced, failure)


def _not_ccw(device: Device) -> InvalidArgument:
    return InvalidArgument(
        f"Device '{device.name}' has driver {device.driver}: channel I/O is for devices of driver vfio-ccw"
    )


def as_ccw(device: Device) -> CcwDevice:
    """The device, when it is a subchannel. Raises InvalidArgument."""
    if not isinstance(device, CcwDevice):
        raise _not_ccw(device)
    return device
