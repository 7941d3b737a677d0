"""A machine over a change of the process: described whole while nothing is under way, and made again from that.

Everything is on the loop's thread, which does nothing else meanwhile: between the description and what is made of it
nothing is heard and nothing is told to the kernel. What fires meanwhile stays in its eventfd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.protocol.errors import InvalidArgument
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine.lifecycle import NewDevice
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.format import CannotKeep
from vfiod.server.state.machine import BackendState, CompletionState, DeviceState, MachineState

if TYPE_CHECKING:
    from vfiod.server.backends.base import Backend
    from vfiod.server.machine.root import Machine
    from vfiod.server.state.machine import KeepEach

__all__ = ["adopt_device", "adopt_machine", "keep_machine", "needs_of", "rehome", "under_way"]


def under_way(machine: Machine) -> str | None:
    """What is being done to the machine or a device of it, for a person; None: it could be described now."""
    if machine.closing:
        return "the server is ending"
    if machine.topology.busy:
        return machine.topology.current
    mediated = machine.sources.under_way
    if mediated is not None:
        return mediated
    return next((what for device in machine.devices.all() if (what := device.under_way) is not None), None)


def needs_of(state: MachineState) -> list[str]:
    """What whoever takes this machine must know."""
    found = {f"backend:{one.backend.kind}" for one in state.devices}
    found |= {f"device:{one.driver}" for one in state.devices}
    found |= {f"mdev:{one.parent}/{one.type}" for one in state.mdevs}
    return sorted(found)


def keep_machine(
    machine: Machine,
    given: Given,
    keep_devices: Callable[[], list[DeviceState]] | None = None,
    keep_mediated: KeepEach | None = None,
) -> MachineState:
    """Describe it. CannotKeep, or what a parent said: something of it cannot be described, by name.

    Args:
        machine: the machine.
        given: takes the fds.
        keep_devices: describes the devices; None: all of them, as they are.
        keep_mediated: describes each mediated device (:meth:`MdevBus.keep`); None: as it is.

    """
    devices = machine.devices
    completion = devices.completion
    return MachineState(
        name=machine.name,
        uuid=machine.uuid,
        started=machine.started,
        seq=machine.hub.seq,
        anonymous=devices.anonymous,
        fdsets=machine.fdsets.keep(given),
        objects=machine.objects.keep(given),
        mappings=machine.memory.keep(given),
        kernel=machine.sources.keep(given),
        mdevs=machine.sources.keep_mediated(given, keep_mediated),
        devices=devices.keep(given, machine.sources.keep_backend) if keep_devices is None else keep_devices(),
        completion=None
        if completion is None
        else CompletionState(
            first=completion.first,
            following=completion.following,
            mode=None if completion.mode is None else completion.mode.value,
            taken=completion.taken,
        ),
    )


def adopt_machine(machine: Machine, state: MachineState, taken: Taken, *, devices: bool = True) -> None:
    """Make a machine again, in one that has nothing yet. CommandError, OSError; then it is of no use.

    Parents of mediated devices must have been discovered. Events are not sent: for readers nothing has happened.
    ``devices=False``: all but the devices, which follow one by one (:func:`adopt_device`).
    """
    machine.name, machine.uuid, machine.started = state.name, state.uuid, state.started
    machine.hub.seq = state.seq
    machine.fdsets.adopt(state.fdsets, taken, kind_of)
    machine.objects.adopt(state.objects, taken)
    machine.memory.adopt(state.mappings, machine.objects.memory, taken)
    if state.kernel is not None:
        machine.sources.adopt(state.kernel, machine.objects.iommufd, taken)
    if state.mdevs:
        machine.mdevs.adopt(state.mdevs, taken)
    machine.devices.anonymous = state.anonymous
    for one in state.devices if devices else ():
        adopt_device(machine, one, taken)
    if state.completion is not None:
        from vfiod.server.machine.completion import Completion

        kept = state.completion
        completion = Completion(kept.first, None if kept.mode is None else IrqMode(kept.mode), taken=kept.taken)
        completion.following = kept.following
        machine.devices.completion = completion


def adopt_device(machine: Machine, state: DeviceState, taken: Taken) -> None:
    """Make one device again. CommandError, OSError, LookupError: what it needs is not there."""
    backend = _backend(machine, state, taken)
    try:
        machine.devices.adopt(_new(state), backend, state, taken)
    except BaseException:
        machine.sources.adopted(backend, made=False)
        raise
    machine.sources.adopted(backend, made=True)


def rehome(machine: Machine) -> list[str]:
    """What is mapped for devices of the kernel belongs to this process now. Returns what the kernel cannot do of it.

    Only once the machine is this process's alone. Devices are not disturbed, whatever comes of it.
    """
    return machine.sources.rehome()


def _new(state: DeviceState) -> NewDevice:
    from vfiod.server.devices.keeping import options_from

    driver = Driver(state.driver)

    def open_again(_: str) -> Backend:
        raise InvalidArgument(f"Device {state.id or state.path} was opened by another process")

    return NewDevice(
        id=state.id,
        driver=driver,
        backend_kind=state.backend_kind,
        host=state.host,
        options=options_from(state.options, driver),
        open=open_again,
        discard=lambda: None,
        on_request_timeout_ms=state.on_request_timeout_ms,
        in_workers=state.in_workers,
    )


def _backend(machine: Machine, state: DeviceState, taken: Taken) -> Backend:
    kept: BackendState = state.backend
    sources = machine.sources
    match kept.kind:
        case "kernel-group":
            return sources.groups.adopt_device(kept, taken)
        case "kernel-cdev":
            return sources.cdevs.adopt_device(kept, taken)
        case "mdev":
            return sources.mediated.adopt(kept.name, state.id or state.path, state.driver)
        case "vfio-user":
            return sources.adopt_served(kept, state.id or state.path, taken)
    raise CannotKeep(f"Device '{state.id or state.path}': a backend of kind '{kept.kind}' is not known here")
