"""Family "interrupts": starting, counting, completing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.interrupts import (
    NUMBERS,
    IrqEoi,
    IrqInfo,
    IrqMask,
    IrqMessage,
    IrqRoute,
    IrqStart,
    IrqStartResult,
    IrqStop,
    IrqTrigger,
    IrqUnmask,
    QueryIrqs,
    StartedIrq,
    VectorFds,
)
from vfiod.protocol.catalogue.words import UNSET, IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE
from vfiod.server.commands.call import Call, Handler

if TYPE_CHECKING:  # later: see Machine
    from vfiod.server.devices.device import Device
    from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
    from vfiod.server.devices.model import Interrupts

__all__ = ["HANDLERS", "refuse_twice", "replies", "take"]


# --- irq-start ------------------------------------------------------------------------------------


def irq_start(call: Call, arguments: IrqStart) -> IrqStartResult | Awaitable[IrqStartResult]:
    """Start vectors of a device, or tell every platform device that the machine is complete."""
    a = arguments
    if a.device is UNSET:
        for name in ("index", "indexes", "vectors", "eventfds"):
            if getattr(a, name) is not UNSET:
                raise InvalidArgument(f"Parameter 'device' is missing: '{name}' is of one device")
        from vfiod.server.commands.platform_irqs import machine_complete

        return machine_complete(call, a)
    device = call.device_to_change(a.device)
    if device.on_platform_bus:
        from vfiod.server.commands.platform_irqs import of_messages, start_platform
        from vfiod.server.devices.platform import PlatformDevice

        platform = cast("PlatformDevice", device)
        if not of_messages(a, platform):
            return start_platform(call, a, platform)
    _refuse_platform(a)
    one = device.interrupts.find("intx" if a.index is UNSET else a.index)
    vectors = _vectors(a)
    mode = None if a.mode is UNSET else a.mode
    numbers = _numbers(device.interrupts, one, a, vectors)
    if a.eventfds is UNSET and len(vectors) * _fds_each(one, mode) > MAX_FDS_PER_MESSAGE:
        raise InvalidArgument(
            f"The eventfds of {len(vectors)} vectors do not fit one reply, which carries at most "
            f"{MAX_FDS_PER_MESSAGE} fds: start them by ranges"
        )

    from vfiod.server.devices.irq_index import Wanted

    def start() -> IrqStartResult:
        if a.eventfds is UNSET and not call.carries_fds:
            raise InvalidArgument(
                "Parameter 'eventfds' is missing: this reply can carry no fds, so none can be handed back; "
                "ask singly, on a Unix socket, or bring eventfds"
            )
        eventfds = a.eventfds
        # The session's fds are the loop's; starting may be in a worker.
        if eventfds is UNSET:
            wanted = [Wanted(vector) for vector in vectors]
        else:
            wanted = device.on_loop(lambda: take(call, eventfds))
        started = device.interrupts.start(one, wanted, mode, numbers)
        return IrqStartResult(irqs=device.on_loop(lambda: replies(call, device, started)))

    return device.in_order("irq-start", start)


def _refuse_platform(a: IrqStart) -> None:
    """Refuse what only platform devices take. InvalidArgument."""
    routes = () if a.routes is UNSET else a.routes
    entries = () if a.eventfds is UNSET else a.eventfds
    for name, given in (
        ("indexes", a.indexes is not UNSET),
        ("eventfds[].index", any(entry.index is not UNSET for entry in entries)),
        ("routes[].device", any(route.device is not UNSET for route in routes)),
    ):
        if given:
            raise InvalidArgument(
                f"Parameter '{name}' is for platform devices: '{a.device}' starts vectors of one index, by 'index'"
            )


def _vectors(a: IrqStart) -> list[int]:
    """The vectors that are meant, each once. InvalidArgument when 'vectors' and 'eventfds' disagree."""
    named = [] if a.vectors is UNSET else a.vectors
    refuse_twice("vectors", "vector", named)
    if a.eventfds is UNSET:
        return named or [0]
    brought = [entry.vector for entry in a.eventfds]
    refuse_twice("eventfds", "vector", brought)
    if named and set(named) != set(brought):
        raise InvalidArgument(
            f"Parameters 'vectors' ({_list(named)}) and 'eventfds' ({_list(brought)}) name different vectors: "
            "leave 'vectors' out, or name the same ones"
        )
    names = [name for entry in a.eventfds for name in (entry.trigger, entry.resample) if name is not UNSET]
    refuse_twice("eventfds", "fd", names)
    return brought


def refuse_twice(argument: str, what: str, values: list[Any]) -> None:
    """Refuse a value that is there twice. InvalidArgument."""
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise InvalidArgument(f"Parameter '{argument}' names {what} {twice[0]!r} twice: name each once")


def _list(vectors: list[int]) -> str:
    return ", ".join(map(str, sorted(vectors)))


def _numbers(interrupts: Interrupts, one: IrqIndex, a: IrqStart, vectors: list[int]) -> dict[int, int]:
    """The interrupt numbers of the machine, by vector."""
    if a.first_number is not UNSET:
        if a.routes is not UNSET:
            raise InvalidArgument("Parameters 'first-number' and 'routes' exclude each other: give one of them")
        if a.first_number + len(vectors) > NUMBERS:
            raise InvalidArgument(
                f"Parameter 'first-number' expects at most {NUMBERS - len(vectors)} for {len(vectors)} vectors, "
                f"not {a.first_number}: a number has 32 bits"
            )
        return {vector: a.first_number + place for place, vector in enumerate(vectors)}
    numbers: dict[int, int] = {}
    for route in [] if a.routes is UNSET else a.routes:
        if interrupts.find(route.index) is not one or route.vector not in vectors:
            raise InvalidArgument(
                f"Parameter 'routes' names vector {route.vector} of index {route.index!r}, which is not being started: "
                f"this starts {one.name}, vectors {_list(vectors)}"
            )
        if route.vector in numbers:
            raise InvalidArgument(f"Parameter 'routes' names vector {route.vector} twice: name each once")
        numbers[route.vector] = route.number
    return numbers


def _fds_each(one: IrqIndex, mode: IrqMode | None) -> int:
    """How many fds the reply may carry for each vector."""
    return 2 if one.info.automasked and mode is not IrqMode.RELAYED else 1


def take(call: Call, entries: list[VectorFds]) -> list[Wanted]:
    """Duplicates of the eventfds that were named; none when one of the names is wrong."""
    from vfiod.server.devices.irq_index import Wanted

    taken: list[FileDescriptor] = []
    wanted: list[Wanted] = []
    try:
        for place, entry in enumerate(entries):
            trigger = call.fd(f"eventfds[{place}].trigger", entry.trigger, FdKind.EVENTFD, write=True)
            taken.append(trigger)
            resample = None
            if entry.resample is not UNSET:
                resample = call.fd(f"eventfds[{place}].resample", entry.resample, FdKind.EVENTFD)
                taken.append(resample)
            wanted.append(Wanted(entry.vector, trigger, resample))
    except BaseException:
        for fd in taken:
            fd.close()
        raise
    return wanted


def replies(call: Call, device: Device, started: list[Started]) -> list[StartedIrq]:
    """What was started, for the reply, which takes the eventfds with it."""
    return [
        StartedIrq(
            device=device.name,
            index=one.index,
            vector=one.vector,
            mode=one.mode,
            number=UNSET if one.number is None else one.number,
            trigger_fd=UNSET if one.trigger is None else call.attach(one.trigger),
            resample_fd=UNSET if one.resample is None else call.attach(one.resample),
            x_message=UNSET
            if one.message is None
            else IrqMessage(vector=one.vector, address=one.message.address, data=one.message.data),
        )
        for one in started
    ]


# --- the others -----------------------------------------------------------------------------------


def irq_stop(call: Call, arguments: IrqStop) -> Empty | Awaitable[Empty]:
    """Stop interrupts of a device, or those of every device."""
    a = arguments
    if a.device is UNSET:
        for name in ("index", "vectors"):
            if getattr(a, name) is not UNSET:
                raise InvalidArgument(f"Parameter 'device' is missing: '{name}' is of one device")
        call.check_claims()
        return _stop_all(call)
    device = call.device_to_change(a.device)
    if a.vectors is not UNSET and a.index is UNSET:
        raise InvalidArgument("Parameter 'index' is missing: 'vectors' are of one index")
    one = None if a.index is UNSET else device.interrupts.find(a.index)
    vectors = None if a.vectors is UNSET else a.vectors
    return _do(device, "irq-stop", lambda: device.interrupts.stop(one, vectors, reason="irq-stop"))


async def _stop_all(call: Call) -> Empty:
    call.machine.devices.completion = None  # what is added from now on is not started
    for device in call.machine.devices.all():
        if device.realized:
            stopped = _stop_one(device)
            if not isinstance(stopped, Empty):
                await stopped
    return Empty()


def _stop_one(device: Device) -> Empty | Awaitable[Empty]:
    return _do(device, "irq-stop", lambda: device.interrupts.stop(reason="irq-stop"))


def irq_mask(call: Call, arguments: IrqMask) -> Empty | Awaitable[Empty]:
    """Mask one interrupt; out of band at once, whatever the device is at."""
    device = call.device_to_change(arguments.device)
    one = device.interrupts.find(arguments.index)
    return _now_or_ordered(call, device, "irq-mask", lambda: device.interrupts.mask(one, arguments.vector))


def irq_unmask(call: Call, arguments: IrqUnmask) -> Empty | Awaitable[Empty]:
    """Unmask one interrupt."""
    device = call.device_to_change(arguments.device)
    one = device.interrupts.find(arguments.index)
    return _do_on_loop(device, "irq-unmask", lambda: device.interrupts.unmask(one, arguments.vector))


def irq_eoi(call: Call, arguments: IrqEoi) -> Empty | Awaitable[Empty]:
    """Complete a level interrupt; out of band at once, whatever the device is at."""
    device = call.device_to_change(arguments.device)
    one = device.interrupts.find(arguments.index)
    return _now_or_ordered(call, device, "irq-eoi", lambda: device.interrupts.eoi(one, arguments.vector))


def irq_trigger(call: Call, arguments: IrqTrigger) -> Empty | Awaitable[Empty]:
    """Make the kernel signal an interrupt's eventfd."""
    device = call.device_to_change(arguments.device)
    one = device.interrupts.find(arguments.index)
    return _do(device, "irq-trigger", lambda: device.interrupts.trigger(one, arguments.vector))


def irq_route(call: Call, arguments: IrqRoute) -> Empty | Awaitable[Empty]:
    """Say which interrupt number a vector has now."""
    device = call.device_to_change(arguments.device)
    one = device.interrupts.find(arguments.index)
    number = None if arguments.number is UNSET else arguments.number
    return _do(device, "irq-route", lambda: device.interrupts.route(one, arguments.vector, number))


def query_irqs(call: Call, arguments: QueryIrqs) -> list[IrqInfo]:
    """List interrupt indexes, of a device or of all."""
    if arguments.device is not UNSET:
        return call.machine.device(arguments.device).irq_infos()
    return [info for device in call.machine.devices.all() for info in device.irq_infos()]


def _do(device: Device, what: str, action: Callable[[], None]) -> Empty | Awaitable[Empty]:
    def done() -> Empty:
        action()
        return Empty()

    return device.in_order(what, done)


def _do_on_loop(device: Device, what: str, action: Callable[[], None]) -> Empty | Awaitable[Empty]:
    """For what touches the line that relayed interrupts move: both on the loop."""

    def done() -> Empty:
        action()
        return Empty()

    return device.in_order_on_loop(what, done)


def _now_or_ordered(call: Call, device: Device, what: str, action: Callable[[], None]) -> Empty | Awaitable[Empty]:
    # A worker may be at the interrupts of a device that waits for another program.
    if call.oob and not device.lane.closed and not device.waits:
        action()
        return Empty()
    return _do_on_loop(device, what, action)


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    IrqStart: irq_start,
    IrqStop: irq_stop,
    IrqMask: irq_mask,
    IrqUnmask: irq_unmask,
    IrqEoi: irq_eoi,
    IrqTrigger: irq_trigger,
    IrqRoute: irq_route,
    QueryIrqs: query_irqs,
}
