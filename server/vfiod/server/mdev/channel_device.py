"""A subchannel in Python, with the interface of the kernel's vfio-ccw: regions, capabilities, interrupts, return codes.

A parent's device derives from :class:`ChannelDevice`, or is one, and gives it a
:class:`~vfiod.server.mdev.channel.Unit`. ``samples/fba.py`` and ``samples/terminal.py`` are complete examples.

Regions::

    0  io        124 bytes  ORB, SCSW, IRB, return code. Writing it starts the program, reading it gives the IRB
    1  command     8 bytes  writing it halts or clears (type CCW, subtype 1)
    2  schib      52 bytes  the subchannel (subtype 2)
    3  crw         8 bytes  the next channel report; zero: none (subtype 3)

Interrupts: IO, CRW, REQ. A program runs in a thread of the device's own, so that nothing here waits; but as long as it
has only commands that are known not to wait it runs where it is started, which saves two switches of threads. Starting
gives EBUSY while one runs or is suspended, EOPNOTSUPP for transport mode, ENODEV when the device is not operational.

Source: ``drivers/s390/cio/vfio_ccw_ops.c``, ``vfio_ccw_async.c``, ``vfio_ccw_fsm.c``.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any, Final

from msgspec import Struct, structs

from vfiod.protocol import vfio
from vfiod.protocol.channel import (
    Actl,
    Crw,
    Cstat,
    Dstat,
    Esw,
    Fctl,
    Irb,
    Orb,
    OrbFlags,
    Pmcw,
    PmcwFlags,
    Schib,
    Scsw,
    Stctl,
)
from vfiod.protocol.limits import MAX_CRWS
from vfiod.protocol.vfio.ccw import (
    CRW_REGION_SIZE,
    SCHIB_REGION_SIZE,
    VFIO_CCW_NUM_IRQS,
    AsyncCommand,
    CcwCmdRegion,
    CcwIoRegion,
    CcwIrq,
    CcwSubtype,
)
from vfiod.server.mdev.channel import LPUM, NORMAL, ChannelProgramRun, Unit, flags_of
from vfiod.server.mdev.event_irqs import EventIrqs
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MediatedDevice, RegionInfo, Saved

__all__ = ["ChannelDevice"]

_log: Final = logging.getLogger(__name__)

IO, COMMAND, SCHIB, CRW = range(4)
_SIZES: Final = (CcwIoRegion.LAYOUT.size, CcwCmdRegion.LAYOUT.size, SCHIB_REGION_SIZE, CRW_REGION_SIZE)
_TYPES: Final = {
    COMMAND: vfio.RegionTypeCap(vfio.RegionType.CCW, CcwSubtype.ASYNC_CMD),
    SCHIB: vfio.RegionTypeCap(vfio.RegionType.CCW, CcwSubtype.SCHIB),
    CRW: vfio.RegionTypeCap(vfio.RegionType.CCW, CcwSubtype.CRW),
}
JOIN_S: Final = 2.0
"""Seconds that a leaving user waits for a program that is told to stop: it is between two CCWs soon."""


class _Job(Struct, eq=False):
    """A program that was started: in which life of the subchannel, by what, how far it is, who has it."""

    generation: int
    orb: Orb
    run: ChannelProgramRun
    inbox: SimpleQueue[_Job | None]


class ChannelDevice(MediatedDevice):
    """One subchannel with one device.

    Args:
        host: the world.
        unit: the device behind it.
        number: its device number, 0 to 0xffff.
        chpid: the id of its only channel path.

    """

    quick = True

    def __init__(self, host: Host, unit: Unit, *, number: int = 0, chpid: int = 0) -> None:
        self._host = host
        self._unit = unit
        self._number = number
        self._chpid = chpid
        self._irqs = EventIrqs(VFIO_CCW_NUM_IRQS)
        self._lock = threading.RLock()
        self._inbox: SimpleQueue[_Job | None] | None = None
        self._at_work = 0  # programs that are at the unit, or wait for it: nobody else calls it meanwhile
        self._thread: threading.Thread | None = None
        self._generation = 0
        self._as_new()

    def _as_new(self) -> None:
        """Nothing runs, nothing is pending. With the lock held, or before anybody knows of it."""
        self._generation += 1  # a program that still runs is nobody's
        self._io = CcwIoRegion()
        self._scsw = Scsw()  # what STORE SUBCHANNEL shows
        self._running: Orb | None = None
        self._unread = False
        self._attention = False
        self._sense = b""
        self._crws: deque[Crw] = deque(maxlen=MAX_CRWS)

    # --- its life ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """As after power-on, with a thread to run programs in."""
        with self._lock:
            self._as_new()
            self._begin_work()

    def _begin_work(self) -> None:
        """With the lock held."""
        self._inbox = SimpleQueue()
        self._at_work = 0
        self._thread = threading.Thread(target=self._work, args=(self._inbox,), name="vfiod-ccw", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The user is gone: whatever runs is stopped, and no longer touches his memory."""
        with self._lock:
            self._as_new()
            inbox, self._inbox = self._inbox, None
            thread, self._thread = self._thread, None
            self._irqs.close()
        if inbox is not None:
            inbox.put(None)
        if thread is not None:
            thread.join(JOIN_S)

    def reset(self) -> None:
        """The subchannel is as new. Eventfds stay."""
        with self._lock:
            self._as_new()

    def request(self, count: int) -> None:
        """Ask the user by the REQ interrupt."""
        self._irqs.signal(CcwIrq.REQ)

    def save(self) -> Saved:
        """The subchannel, with status and reports that nobody has read; EBUSY while a program is at the device.

        One that suspended itself is not: it goes along, for a halt or clear to end it. What the unit knows is the
        subclass's to add; between two programs many know nothing.
        """
        with self._lock:
            if self._at_work:
                raise OSError(errno.EBUSY, "a channel program is at work on it: it ends by itself or by ccw-clear")
            values: dict[str, Any] = {
                "open": self._inbox is not None,
                "io": self._io.pack().hex(),
                "scsw": self._scsw.pack().hex(),
                "running": None if self._running is None else self._running.pack().hex(),
                "unread": self._unread,
                "attention": self._attention,
                "sense": self._sense.hex(),
                "crws": [crw.pack().hex() for crw in self._crws],
            }
            return Saved(values, self._irqs.save())

    def restore(self, saved: Saved) -> None:
        """Be as saved. Nothing fires by that: what was to fire has fired."""
        values = saved.values
        with self._lock:
            self._io = CcwIoRegion.unpack(bytes.fromhex(values["io"]))
            self._scsw = Scsw.unpack(bytes.fromhex(values["scsw"]))
            self._running = None if values["running"] is None else Orb.unpack(bytes.fromhex(values["running"]))
            self._unread, self._attention = values["unread"], values["attention"]
            self._sense = bytes.fromhex(values["sense"])
            self._crws.extend(Crw.unpack(bytes.fromhex(crw)) for crw in values["crws"])
            self._irqs.restore(saved.fds)
            if values["open"]:
                self._begin_work()

    # --- what it has --------------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        """As vfio-ccw."""
        return DeviceInfo(regions=len(_SIZES), irqs=VFIO_CCW_NUM_IRQS, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        """As vfio-ccw."""
        if not 0 <= index < len(_SIZES):
            raise OSError(errno.EINVAL, f"there is no region {index}")
        writable = index in (IO, COMMAND)
        return RegionInfo(_SIZES[index], readable=True, writable=writable, type=_TYPES.get(index))

    def irq_info(self, index: int) -> IrqInfo:
        """As vfio-ccw."""
        return self._irqs.info(index)

    def set_irqs(self, request: vfio.SetIrqs) -> int:
        """As vfio-ccw."""
        return self._irqs.set_irqs(request)

    def fds(self) -> Mapping[str, int]:
        """The eventfds it was given."""
        return self._irqs.fds()

    # --- access -------------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, length: int) -> bytes:
        """From a region. Reading the next channel report takes it."""
        with self._lock:
            match index:
                case 0:
                    data = self._io.pack()
                    self._was_read()
                case 1:
                    data = CcwCmdRegion(AsyncCommand(0)).pack()
                case 2:
                    data = self._schib().pack()
                case _:
                    if offset or length != CRW_REGION_SIZE:
                        raise OSError(errno.EINVAL, f"the crw region is read whole, {CRW_REGION_SIZE} bytes")
                    data = (self._crws.popleft().pack() if self._crws else bytes(4)) + bytes(4)
        return data[offset : offset + length]

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Start a program, or halt or clear."""
        if index not in (IO, COMMAND) or offset or len(data) != _SIZES[index]:
            raise OSError(errno.EINVAL, f"region {index} is written whole, {_SIZES[index]} bytes")
        if index == COMMAND:
            self._control(CcwCmdRegion.unpack(data).command)
            return
        self._start(CcwIoRegion.unpack(data))

    def may_dma(self, index: int, offset: int, length: int, *, write: bool) -> bool:
        """Never before an access returns: a program whose memory must be asked for runs in the thread."""
        return False

    def _schib(self) -> Schib:
        operational = self.operational
        flags = PmcwFlags.ENA | (PmcwFlags.DNV if operational else PmcwFlags(0))
        paths = LPUM if operational else 0
        pmcw = Pmcw(
            flags=flags,
            dev=self._number,
            lpm=LPUM,
            pim=LPUM,
            pom=0xFF,
            pam=paths,
            lpum=LPUM,
            chpid=bytes([self._chpid]) + bytes(7),
            csense=True,
        )
        return Schib(pmcw, self._scsw)

    # --- functions ----------------------------------------------------------------------------------------

    @property
    def operational(self) -> bool:
        """Whether programs can be started at all; a device may say otherwise."""
        return True

    def _start(self, region: CcwIoRegion) -> None:
        orb = Orb.unpack(region.orb)
        with self._lock:
            inbox = self._inbox
            if inbox is None or not self.operational:
                raise OSError(errno.ENODEV, "the subchannel is not operational")
            if self._running is not None:
                raise OSError(errno.EBUSY, "a program runs, or is suspended: one at a time")
            if orb.transport:
                raise OSError(errno.EOPNOTSUPP, "transport mode is not done, command mode is")
            self._io = CcwIoRegion(region.orb, region.scsw)
            self._running, self._unread = orb, False
            self._scsw = Scsw(orb.key, flags_of(orb), fctl=Fctl.START, actl=Actl.START_PENDING)
            job = self._prepared(orb, inbox)
            at_once = not self._at_work and self._host.memory_at_hand
            self._at_work += 1
        # Not with the lock: a halt must not wait.
        if not (at_once and self._go(job, prompt=True)):
            inbox.put(job)

    def _control(self, command: AsyncCommand) -> None:
        if command not in (AsyncCommand.HSCH, AsyncCommand.CSCH):
            raise OSError(errno.EINVAL, f"the async command is 1 (halt) or 2 (clear), not {int(command)}")
        with self._lock:
            if not self.operational:
                raise OSError(errno.ENODEV, "the subchannel is not operational")
            running, self._running = self._running, None
            self._generation += 1
            if command is AsyncCommand.CSCH:
                self._sense = b""
                self._present(Irb(scsw=Scsw(fctl=Fctl.CLEAR, stctl=Stctl.STATUS_PENDING)))
            elif running is None:
                self._present(Irb(scsw=Scsw(fctl=Fctl.HALT, stctl=Stctl.STATUS_PENDING)))
            else:
                # One that is suspended is not at the device: that has nothing to end, and the status is pending alone.
                suspended = Actl.SUSPENDED in self._scsw.actl
                ends = Stctl(0) if suspended else Stctl.PRIMARY | Stctl.SECONDARY
                scsw = Scsw(
                    running.key,
                    flags_of(running),
                    fctl=Fctl.START | Fctl.HALT,
                    stctl=ends | Stctl.STATUS_PENDING,
                    cpa=self._scsw.cpa,
                    dstat=Dstat(0) if suspended else NORMAL,
                )
                self._present(Irb(scsw=scsw))

    def attention(self, more: Dstat = Dstat(0)) -> None:  # noqa: B008 - a constant
        """The device asks for something on its own: an unsolicited interrupt, once nothing runs. From any thread."""
        with self._lock:
            if self._inbox is None:
                return  # nobody is there
            if self._running is not None or self._unread:
                self._attention = True  # the guest hears of it after what goes on
                return
            stctl = Stctl.ALERT | Stctl.STATUS_PENDING
            self._present(Irb(scsw=Scsw(stctl=stctl, dstat=Dstat.ATTENTION | more), esw=Esw(word0=LPUM << 16)))

    def report(self, crw: Crw) -> None:
        """Something has changed: a channel report, and its interrupt. From any thread."""
        with self._lock:
            if self._inbox is not None:
                self._crws.append(crw)
                self._irqs.signal(CcwIrq.CRW)

    # --- status -------------------------------------------------------------------------------------------

    def _present(self, irb: Irb) -> None:
        """With the lock held: this is the status now, and the interrupt says so."""
        self._io = CcwIoRegion(self._io.orb, self._io.scsw, irb.pack())
        self._scsw = irb.scsw
        self._unread = True
        self._irqs.signal(CcwIrq.IO)

    def _was_read(self) -> None:
        """With the lock held: status that was read is pending no longer, and the next may come."""
        if not self._unread:
            return
        self._unread = False
        if self._running is not None:
            self._scsw = structs.replace(self._scsw, stctl=Stctl(0))
        else:
            self._scsw = Scsw()
            if self._attention:
                self._attention = False
                self.attention()

    # --- the device's thread ------------------------------------------------------------------------------

    def _work(self, inbox: SimpleQueue[_Job | None]) -> None:
        while (job := inbox.get()) is not None:
            self._go(job, prompt=False)

    # --- programs: in that thread; their beginning, where they are started --------------------------------------

    def _prepared(self, orb: Orb, inbox: SimpleQueue[_Job | None]) -> _Job:
        generation = self._generation

        def stopped() -> bool:
            return generation != self._generation

        def interrupt(irb: Irb) -> None:
            with self._lock:
                if not stopped():
                    self._present(irb)

        run = ChannelProgramRun(self._host, orb, self._unit, sense=b"", stopped=stopped, interrupt=interrupt)
        return _Job(generation, orb, run, inbox)

    def _go(self, job: _Job, *, prompt: bool) -> bool:
        """Run a program, and present how it ended; promptly: False when it is to go on in the thread."""
        with self._lock:
            if job.generation != self._generation:
                self._left(job)
                return True
            job.run.sense = self._sense
        try:
            irb = job.run.run_promptly() if prompt else job.run.run()
        except Exception:  # noqa: BLE001 - a defect must not leave the guest waiting for ever
            _log.exception("A channel program of the device %04x failed", self._number)
            irb = Irb(scsw=Scsw(fctl=Fctl.START, stctl=Stctl(0x17), cstat=Cstat.CHANNEL_CONTROL_CHECK))
        with self._lock:
            current = job.generation == self._generation
            if current:
                self._sense = job.run.sense
            if current and irb is None:
                return False
            self._left(job)
            if not current or irb is None:
                return True
            if Actl.SUSPENDED in irb.scsw.actl and OrbFlags.SSIC in job.orb.flags:
                self._scsw = irb.scsw  # it asked for no interrupt
            elif Actl.SUSPENDED in irb.scsw.actl:
                self._present(irb)  # until a halt or clear: vfio-ccw has no RESUME SUBCHANNEL
            else:
                self._end(irb)
        return True

    def _left(self, job: _Job) -> None:
        """With the lock held: it is at the unit no longer."""
        if self._inbox is job.inbox:  # else it was closed meanwhile, and perhaps opened again
            self._at_work -= 1

    def _end(self, irb: Irb) -> None:
        self._running = None
        self._present(irb)
