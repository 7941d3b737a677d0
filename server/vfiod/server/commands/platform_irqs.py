"""``irq-start`` of platform devices: of one, or of all when the machine is complete."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from itertools import count

from msgspec.structs import replace

from vfiod.protocol.catalogue.interrupts import NUMBERS, IrqStart, IrqStartResult, Route, VectorFds
from vfiod.protocol.catalogue.words import UNSET, IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE
from vfiod.server.commands.call import Call
from vfiod.server.commands.interrupts import refuse_twice, replies, take
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.devices.platform import PlatformDevice
from vfiod.server.devices.platform_irqs import Request
from vfiod.server.machine.completion import Completion, check_numbers, startable

__all__ = ["machine_complete", "of_messages", "start_platform"]


# --- one device -----------------------------------------------------------------------------------


def of_messages(a: IrqStart, device: PlatformDevice) -> bool:
    """Whether this starts messages: vectors of one index, as on a PCI device."""
    messages = device.platform.messages
    return a.index is not UNSET and messages is not None and device.platform.find(a.index) is messages.index


def start_platform(call: Call, a: IrqStart, device: PlatformDevice) -> IrqStartResult | Awaitable[IrqStartResult]:
    """Start indexes of one device: those that are named, else all it has."""
    platform = device.platform  # DeviceNotActive: they are not bound yet
    entries = [] if a.eventfds is UNSET else a.eventfds
    chosen = _chosen(a, device, entries)
    if a.vectors is not UNSET and a.vectors != [0]:
        raise InvalidArgument(
            f"Parameter 'vectors': an interrupt of device '{device.name}' has vector 0 only; its interrupts are "
            "indexes: name them by 'index' or 'indexes'"
        )
    mode = None if a.mode is UNSET else a.mode
    numbers = _numbers(a, device, chosen)
    brought = [platform.find(_index_of(a, entry)).index for entry in entries]
    _check_room([one for one in chosen if one.index not in brought], mode)

    def start() -> IrqStartResult:
        if len(brought) < len(chosen) and not call.carries_fds:
            raise InvalidArgument(
                "Parameter 'eventfds' is missing: this reply can carry no fds, so none can be handed back; "
                "ask singly, on a Unix socket, or bring eventfds"
            )
        check_numbers(((device.name, index, number) for index, number in numbers.items()), call.machine.devices.all())
        wanted = dict(zip(brought, take(call, entries), strict=True))
        requests = [Request(one, wanted.get(one.index, Wanted(0)), numbers.get(one.index)) for one in chosen]
        return IrqStartResult(irqs=replies(call, device, device.platform.start_all(requests, mode)))

    return device.in_order("irq-start", start)


def _chosen(a: IrqStart, device: PlatformDevice, entries: Sequence[VectorFds]) -> list[IrqIndex]:
    """The indexes that are meant, each once. InvalidArgument."""
    if a.index is not UNSET and a.indexes is not UNSET:
        raise InvalidArgument("Parameters 'index' and 'indexes' exclude each other: give one of them")
    platform = device.platform
    named = [platform.find(_index_of(a, entry)) for entry in entries]
    refuse_twice("eventfds", "index", [one.index for one in named])
    names = [name for entry in entries for name in (entry.trigger, entry.resample) if name is not UNSET]
    refuse_twice("eventfds", "fd", names)
    if a.indexes is not UNSET:
        chosen = [platform.find(name) for name in a.indexes]
        refuse_twice("indexes", "index", [one.index for one in chosen])
    elif a.index is not UNSET:
        chosen = [platform.find(a.index)]
    else:
        chosen = named or startable(device)
    messages = platform.messages
    if messages is not None and messages.index in chosen:
        raise InvalidArgument(f"{messages.index} holds messages: start it alone, by 'index' and 'vectors'")
    for one in named:
        if one not in chosen:
            raise InvalidArgument(f"Parameter 'eventfds' names {one.name}, which is not being started")
    return chosen


def _index_of(a: IrqStart, entry: VectorFds) -> int | str:
    if entry.vector:
        raise InvalidArgument(f"Parameter 'eventfds' names vector {entry.vector}: a platform interrupt has vector 0")
    index = a.index if entry.index is UNSET else entry.index
    if index is UNSET:
        raise InvalidArgument("Parameter 'eventfds': 'index' is missing, which says whose eventfds these are")
    return index


def _numbers(a: IrqStart, device: PlatformDevice, chosen: Sequence[IrqIndex]) -> dict[int, int]:
    """The interrupt numbers that were given, by index. InvalidArgument."""
    _check_either(a)
    if a.first_number is not UNSET:
        _check_last(a.first_number, len(chosen))
        return {one.index: number for one, number in zip(chosen, count(a.first_number), strict=False)}
    numbers: dict[int, int] = {}
    for route in () if a.routes is UNSET else a.routes:
        if route.device not in (UNSET, device.name):
            raise InvalidArgument(f"Parameter 'routes' names device '{route.device}', but 'device' is '{device.name}'")
        _add_route(numbers, device, chosen, route)
    return numbers


def _add_route(numbers: dict[int, int], device: PlatformDevice, chosen: Sequence[IrqIndex], route: Route) -> None:
    one = device.platform.find(route.index)
    one.check_vector(route.vector)
    if one not in chosen:
        raise InvalidArgument(f"Parameter 'routes' names {one.name} of '{device.name}', which is not being started")
    if one.index in numbers:
        raise InvalidArgument(f"Parameter 'routes' names {one.name} of '{device.name}' twice: name each once")
    numbers[one.index] = route.number


def _check_either(a: IrqStart) -> None:
    if a.first_number is not UNSET and a.routes is not UNSET:
        raise InvalidArgument("Parameters 'first-number' and 'routes' exclude each other: give one of them")


def _check_last(first: int, many: int) -> None:
    if first + many > NUMBERS:
        raise InvalidArgument(
            f"Parameter 'first-number' expects at most {NUMBERS - many} for {many} interrupts, not {first}: "
            "a number has 32 bits"
        )


def _check_room(ones: Sequence[IrqIndex], mode: IrqMode | None) -> None:
    if _fds_of(ones, mode) > MAX_FDS_PER_MESSAGE:
        raise InvalidArgument(
            f"The eventfds of {len(ones)} interrupts do not fit one reply, which carries at most "
            f"{MAX_FDS_PER_MESSAGE} fds: start them by ranges, with 'device' and 'indexes'"
        )


def _fds_of(ones: Sequence[IrqIndex], mode: IrqMode | None) -> int:
    """How many fds the reply may carry for them."""
    return sum(2 if one.info.automasked and mode is not IrqMode.RELAYED else 1 for one in ones)


# --- all devices ----------------------------------------------------------------------------------


async def machine_complete(call: Call, a: IrqStart) -> IrqStartResult:
    """Start every platform device, in the order they were added; those that are being added too, once they are there.

    All or nothing. Eventfds go with the reply as far as it can carry them: those of all, or else of the interrupts
    that this call starts.
    """
    _check_either(a)
    machine = call.machine
    mode = None if a.mode is UNSET else a.mode
    async with machine.topology.turn("irq-start"):
        devices = [one for one in machine.devices.all() if isinstance(one, PlatformDevice) and one.realized]
        call.check_claims(devices)  # in the turn: a client may have come while it was waited for
        _check_routes(a, devices)
        completion = _completion(a, machine.devices.completion, devices, mode, taken=call.carries_fds)
        plan = [(device, _requests(device, completion, a)) for device in devices]
        check_numbers(
            (
                (device.name, request.one.index, request.number)
                for device, requests in plan
                for request in requests
                if request.number is not None
            ),
            machine.devices.all(),
        )
        plan = _give(call, plan, mode)
        started = await _start(plan, mode, taken=call.carries_fds)
        machine.devices.completion = completion
        return IrqStartResult(irqs=[irq for device, irqs in started for irq in replies(call, device, irqs)])


def _completion(
    a: IrqStart,
    former: Completion | None,
    devices: Sequence[PlatformDevice],
    mode: IrqMode | None,
    *,
    taken: bool,
) -> Completion:
    first = None if a.first_number is UNSET else a.first_number
    if former is None or former.first is None:
        return Completion(first, mode, taken=taken)
    if first not in (None, former.first) and any(device.platform.numbers for device in devices):
        raise InvalidArgument(
            f"Parameter 'first-number' is {first}, but interrupts are numbered from {former.first} already: leave it "
            "out, irq-route single ones, or irq-stop first"
        )
    again = Completion(former.first if first is None else first, mode, taken=taken)
    if again.first == former.first:
        again.following = former.following
    return again


def _requests(device: PlatformDevice, completion: Completion, a: IrqStart) -> list[Request]:
    chosen = startable(device)
    routes: dict[int, int] = {}
    for route in () if a.routes is UNSET else a.routes:
        if route.device == device.name:
            _add_route(routes, device, chosen, route)
    return [
        Request(one, number=routes[one.index] if one.index in routes else completion.number(device, one))
        for one in chosen
    ]


def _check_routes(a: IrqStart, devices: Sequence[PlatformDevice]) -> None:
    """Each route names a platform device that is there. InvalidArgument."""
    names = {device.name for device in devices}
    for route in () if a.routes is UNSET else a.routes:
        if route.device is UNSET:
            raise InvalidArgument("Parameter 'routes': 'device' is missing, which says whose index this is")
        if route.device not in names:
            raise InvalidArgument(f"Parameter 'routes' names '{route.device}', which is no platform device here")


def _give(
    call: Call, plan: list[tuple[PlatformDevice, list[Request]]], mode: IrqMode | None
) -> list[tuple[PlatformDevice, list[Request]]]:
    """Which requests get their eventfds with the reply. InvalidArgument: too many at once."""
    every = [request.one for _, requests in plan for request in requests]
    if not call.carries_fds:
        return [(device, [replace(request, give=False) for request in requests]) for device, requests in plan]
    if _fds_of(every, mode) <= MAX_FDS_PER_MESSAGE:
        return plan
    new = [
        (device, [replace(request, give=not device.platform.started(request.one)) for request in requests])
        for device, requests in plan
    ]
    _check_room([request.one for _, requests in new for request in requests if request.give], mode)
    return new


async def _start(
    plan: list[tuple[PlatformDevice, list[Request]]], mode: IrqMode | None, *, taken: bool
) -> list[tuple[PlatformDevice, list[Started]]]:
    """Each device in its own order. When one fails, what was started before it is stopped again."""
    done: list[tuple[PlatformDevice, list[Started]]] = []
    new: list[tuple[PlatformDevice, list[IrqIndex]]] = []
    try:
        for device, requests in plan:
            async with device.lane.turn("irq-start"):
                fresh = [request.one for request in requests if not device.platform.started(request.one)]
                done.append((device, device.platform.start_all(requests, mode, taken=taken)))
                new.append((device, fresh))
    except BaseException:
        given: list[FileDescriptor] = []
        for _, irqs in done:
            given += [fd for irq in irqs for fd in (irq.trigger, irq.resample) if fd is not None]
        close_all(given)
        for device, fresh in reversed(new):
            for one in fresh:
                if device.realized:
                    device.platform.stop(one, reason="irq-start failed for another device")
        raise
    return done
