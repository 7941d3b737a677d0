"""A subchannel without its requests: how it is opened, halted and cleared, looked at, and what it reports.

None of this waits for the device's lane: stopping what holds the lane up is what halt and clear are for, and a query
never waits for a command. A backend that may wait for another program is called in threads of their own
(:mod:`vfiod.server.aside`), at most :data:`MAX_ASIDE` at once; every other one answers on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

from msgspec import structs

from vfiod.protocol.catalogue.ccw import CcwControlResult, CcwCrw, CrwInfo, SubchannelInfo
from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.channel import Crw, Irb, PmcwFlags, Schib, explain_schib
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive, OperationFailed
from vfiod.protocol.limits import MAX_CRWS
from vfiod.protocol.vfio.ccw import CRW_REGION_SIZE, SCHIB_REGION_SIZE, AsyncCommand, CcwCmdRegion, CcwSubtype
from vfiod.server import trace
from vfiod.server.aside import aside
from vfiod.server.backends.base import Backend
from vfiod.server.devices.ccw_layout import CcwModel, open_subchannel
from vfiod.server.devices.ccw_words import control_refused, controlled, crw_info, decoded
from vfiod.server.devices.device import Device
from vfiod.server.devices.environment import Environment
from vfiod.server.devices.model import Model
from vfiod.server.devices.subchannel import Requests, State
from vfiod.server.logs import about

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import CcwState, ModelState

__all__ = ["RETRY_S", "Subchannel"]

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S: Final = 0.001
"""Seconds between two tries after EAGAIN: the kernel says it while another access to the regions is in progress."""

CONTROL_TRIES: Final = 1000
"""Tries of a halt or clear that is told EAGAIN: about a second."""

MAX_ASIDE: Final = 8
"""Threads at once for a device that may wait: a halt, a clear, and a few who look; more come from a defect."""

_TAKING: Final = frozenset({State.STARTING, State.HEARD, State.STUCK})
"""A program is being handed over: the kernel would make whoever reads wait until it has taken it."""


class Subchannel(Device):
    """One subchannel, as far as it is no request."""

    driver: ClassVar[Driver] = Driver.VFIO_CCW
    whole_regions: ClassVar[bool] = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._requests = Requests()
        self._started = 0
        self._aside = 0  # threads that are at the backend, outside the lane
        self._crws: deque[Crw] = deque(maxlen=MAX_CRWS)

    def populate(self, backend: Backend, environment: Environment) -> CcwModel:
        """Read a subchannel. See :meth:`Device.populate`."""
        return open_subchannel(self.name, backend)

    @property
    def under_way(self) -> str | None:
        """See :attr:`Device.under_way`: a request that waits for its interrupt is, too."""
        if self._requests.pending or self.waiting or self._aside:
            return f"a channel program or function of device '{self.name}'"
        return super().under_way

    def keep_model(self, model: Model, given: Given) -> CcwState:
        """See :meth:`Device.keep_model`."""
        from vfiod.server.state.machine import CcwState

        own = cast("CcwModel", model).own
        return CcwState(heard=own.keep(), owed=self._requests.owed, started=self._started)

    def adopt_model(self, model: Model, state: ModelState, taken: Taken) -> None:
        """See :meth:`Device.adopt_model`."""
        kept = cast("CcwState", state)
        cast("CcwModel", model).own.adopt(kept.heard)
        self._requests.owed, self._started = kept.owed, kept.started

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return 0

    def check_free(self) -> None:
        """See :meth:`Device.check_free`: an interrupt that is still to come would be taken for the client's."""
        if self._requests.pending or self.waiting or self._aside:
            raise Busy(f"Device '{self.name}' has a channel program or function of the monitor's under way")

    def client_gone(self) -> None:
        """See :meth:`Device.client_gone`: its program reads and writes its memory, and is ended by a reset."""
        model = self._active()
        if model.info.can_reset:
            model.backend.reset()

    def _ccw(self) -> CcwModel:
        return cast("CcwModel", self._active())  # populate made it

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _now_or_aside(self, what: str, work: Callable[[CcwModel], T], then: Callable[[T], None]) -> Awaitable[T] | T:
        """Ask the backend outside the lane: at once, or in a thread of its own when it may wait.

        Args:
            what: the command, for the thread's name and for errors.
            work: what is asked; makes calls of the backend and touches nothing else.
            then: on the loop, with what was told.

        Raises CommandError: what ``work`` raised; Busy: too many threads are at it; DeviceNotActive: it was removed.

        """
        model = self._ccw()
        if model.backend.may_block:
            return self._in_thread_aside(what, model, work, then)
        told = work(model)
        then(told)
        return told

    async def _in_thread_aside(
        self, what: str, model: CcwModel, work: Callable[[CcwModel], T], then: Callable[[T], None]
    ) -> T:
        if self._aside >= MAX_ASIDE:
            raise Busy(f"{MAX_ASIDE} commands wait for an answer of device '{self.name}' already: {what} can wait too")
        self._aside += 1
        try:
            told = await aside(what, lambda: work(model))
        except Exception as error:
            if self._going:
                raise DeviceNotActive(f"Device '{self.name}' was removed meanwhile") from error
            raise
        finally:
            self._aside -= 1
        if self._going:
            raise DeviceNotActive(f"Device '{self.name}' was removed meanwhile")
        then(told)
        return told

    # --- halt and clear -----------------------------------------------------------------------------------

    def control(self, command: AsyncCommand, *, now: bool) -> CcwControlResult | Awaitable[CcwControlResult]:
        """Halt or clear. Waits for no lane.

        Args:
            command: one of the two.
            now: out of band: fail with Busy rather than try again later.

        Raises CommandError (no async command region), Busy, OperationFailed.

        """
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
        data = CcwCmdRegion(command).pack()
        if model.backend.may_block:
            return self._control_aside(index, data)
        try:
            model.backend.region_write(index, 0, data)
        except OperationFailed as error:
            if error.errno != "EAGAIN":
                return control_refused(error)
            if now:
                raise Busy(
                    f"Device '{self.name}' is taking a channel program at this moment: ask again", errno="EAGAIN"
                ) from error
            return self._control_later(index, data)
        return controlled()

    async def _control_aside(self, index: int, data: bytes) -> CcwControlResult:
        for attempt in range(CONTROL_TRIES):
            if attempt:
                await asyncio.sleep(RETRY_S)
            model = self._ccw()
            try:
                await self._in_thread_aside(
                    "ccw-control", model, lambda model: model.backend.region_write(index, 0, data), lambda _: None
                )
            except OperationFailed as error:
                if error.errno != "EAGAIN":
                    return control_refused(error)
            else:
                return controlled()
        raise self._never_free()

    async def _control_later(self, index: int, data: bytes) -> CcwControlResult:
        for _ in range(CONTROL_TRIES):
            await asyncio.sleep(RETRY_S)
            try:
                self._ccw().backend.region_write(index, 0, data)
            except OperationFailed as error:
                if error.errno != "EAGAIN":
                    return control_refused(error)
            else:
                return controlled()
        raise self._never_free()

    def _never_free(self) -> Busy:
        return Busy(f"Device '{self.name}' has been taking a channel program for too long: ask again", errno="EAGAIN")

    # --- channel reports ------------------------------------------------------------------------------------

    def crws(self) -> list[CrwInfo] | Awaitable[list[CrwInfo]]:
        """The last reports, those not read yet among them. CommandError without a CRW region, OperationFailed."""
        if self._requests.state in _TAKING or self.claim is not None:  # reading takes them from the client
            return self._reports()
        read = self._read_crws()
        return self._reports_after(read) if isinstance(read, Awaitable) else self._reports()

    async def _reports_after(self, read: Awaitable[object]) -> list[CrwInfo]:
        await read
        return self._reports()

    def _reports(self) -> list[CrwInfo]:
        return [crw_info(crw) for crw in self._crws]

    def _read_crws(self) -> Awaitable[list[Crw]] | list[Crw]:
        """Read reports until there are no more; each becomes an event."""
        index = self._ccw().found.get(CcwSubtype.CRW)
        if index is None:
            raise CommandError(
                f"Device '{self.name}' has no CRW region: this kernel's vfio-ccw reports no channel changes "
                "(Linux 5.8 does)",
                errno="EOPNOTSUPP",
            )

        def read(model: CcwModel) -> list[Crw]:
            found: list[Crw] = []
            while len(found) < MAX_CRWS:
                data = model.backend.region_read(index, 0, CRW_REGION_SIZE)
                if not any(data[:4]):
                    break
                found.append(Crw.unpack(data[:4]))
            return found

        return self._now_or_aside("query-crw", read, self._tell_crws)

    def _tell_crws(self, found: list[Crw]) -> None:
        for crw in found:
            self._crws.append(crw)
            self._environment.emit(CcwCrw(device=self.name, crw=crw_info(crw)))

    def _reported(self) -> None:
        """The CRW interrupt: read what there is, whatever comes of it."""
        try:
            read = self._read_crws()
        except CommandError as error:
            self._unreported(error)
        else:
            if isinstance(read, Awaitable):
                self._keep(asyncio.get_running_loop().create_task(self._reported_aside(read)))

    async def _reported_aside(self, read: Awaitable[object]) -> None:
        try:
            await read
        except CommandError as error:
            self._unreported(error)

    def _unreported(self, error: CommandError) -> None:
        if not self._going:
            _log.warning(
                "Device %s: a channel report could not be read: %s", self.name, error, extra=about(device=self.name)
            )

    # --- looking --------------------------------------------------------------------------------------------

    def subchannel(self) -> SubchannelInfo | Awaitable[SubchannelInfo]:
        """For ``query-subchannel``. OperationFailed when the SCHIB cannot be read."""
        model = self._ccw()
        index = model.found.get(CcwSubtype.SCHIB)
        if index is None:
            words = "it has no SCHIB region: this kernel's vfio-ccw does not show the subchannel (Linux 5.8 does)"
            return self._known(words)
        if self._requests.state in _TAKING:
            return self._known("a program is being handed over: it cannot be asked at this moment")
        stored = self._store(index)
        return self._shown_after(stored) if isinstance(stored, Awaitable) else self._shown(stored)

    def _store(self, index: int) -> Awaitable[bytes] | bytes:
        """STORE SUBCHANNEL: the kernel does it when the SCHIB region is read; ENODEV when there is none any more."""
        return self._now_or_aside(
            "query-subchannel",
            lambda model: model.backend.region_read(index, 0, SCHIB_REGION_SIZE),
            lambda _: None,
        )

    async def _shown_after(self, stored: Awaitable[bytes]) -> SubchannelInfo:
        return self._shown(await stored)

    def _known(self, *words: str) -> SubchannelInfo:
        """What vfiod knows by itself."""
        return SubchannelInfo(
            device=self.name,
            words=list(words),
            pending=self._requests.pending,
            waiting=self.waiting,
            can_halt=CcwSubtype.ASYNC_CMD in self._ccw().found,
            requests=self._started,
            late=self._requests.owed,
        )

    def _shown(self, data: bytes) -> SubchannelInfo:
        schib = Schib.unpack(data)
        pmcw = schib.pmcw
        return structs.replace(
            self._known(*explain_schib(schib)),
            schib=data,
            device_number=pmcw.dev if PmcwFlags.DNV in pmcw.flags else UNSET,
            enabled=PmcwFlags.ENA in pmcw.flags,
            channel_paths=[chpid for bit, chpid in enumerate(pmcw.chpid) if pmcw.pim & 0x80 >> bit],
            status=decoded(Irb(scsw=schib.scsw)),
        )
