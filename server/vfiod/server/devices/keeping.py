"""Devices over a change of the process: options, vectors and lines as values, and made again from them.

What the kernel has been told stays told: it signals the same eventfds, and nothing here talks to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vfiod.protocol.catalogue.devices import Driver, OnRequest
from vfiod.protocol.catalogue.words import IrqMode
from vfiod.server.devices.bound import Bound
from vfiod.server.devices.irq_index import INTX, IrqIndex
from vfiod.server.devices.model import Options
from vfiod.server.devices.vectors import Counts, Vector
from vfiod.server.interrupts.intx import FastState, IntxLine, LineState
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.machine import (
    BackendState,
    BoundState,
    CountsState,
    DeviceState,
    OptionsState,
    RomFileState,
    VectorState,
)
from vfiod.server.state.machine import LineState as KeptLine

if TYPE_CHECKING:
    from vfiod.server.backends.base import Backend
    from vfiod.server.devices.device import Device

__all__ = [
    "adopt_device",
    "keep_device",
    "counts_from",
    "keep_bound",
    "keep_counts",
    "keep_options",
    "keep_vector",
    "options_from",
    "take_bound",
    "take_vector",
]


# --- a device -------------------------------------------------------------------------------------------------


def keep_device(
    device: Device, given: Given, *, new: Mapping[str, Any], keep_backend: Callable[[], BackendState]
) -> DeviceState:
    """See :meth:`Device.keep`, whose part this is: it knows what no other module does."""
    model = device._active()
    notices = model.notices.keep(given)
    kept_model = device.keep_model(model, given)
    # Last: it may name eventfds by number, of which what stands above is the owner.
    backend = keep_backend()
    return DeviceState(
        id=device.id,
        path=device.path,
        driver=device.driver.value,
        backend_kind=device._backend_kind,
        host=device._host,
        options=keep_options(device.options),
        backend=backend,
        notices=notices,
        requested=device._requested,
        fast_path_told=device._fast_path_told,
        shared=model.regions.shared,
        mapped_by=device._mapped_by.keep(),
        model=kept_model,
        **new,
    )


def adopt_device(device: Device, backend: Backend, state: DeviceState, taken: Taken) -> None:
    """See :meth:`Device.adopt`, whose part this is."""
    device._waits = backend.may_block
    backend.watch_return(device._came_back)
    model = device.populate(backend, device._environment)
    device._model = model
    model.notices.adopt(state.notices, taken)
    model.regions.shared = state.shared
    device._requested = state.requested
    device._fast_path_told = state.fast_path_told
    device._mapped_by.adopt(state.mapped_by)
    device.adopt_model(model, state.model, taken)


# --- options --------------------------------------------------------------------------------------------------


def keep_options(options: Options) -> OptionsState:
    """Describe the properties of a device."""
    from vfiod.server.devices.pci import PciOptions
    from vfiod.server.devices.platform import PlatformOptions

    common = {
        "mmap_timeout_ms": options.mmap_timeout_ms,
        "share_fd": options.share_fd,
        "no_mmap": options.no_mmap,
        "on_request": options.on_request.value,
    }
    if isinstance(options, PciOptions):
        shown = options.shown
        romfile = shown.romfile
        return OptionsState(
            **common,  # type: ignore[arg-type]
            multifunction=shown.multifunction,
            rombar=shown.rombar,
            romfile=None if romfile is None else RomFileState(name=romfile.name, image=romfile.image),
        )
    if isinstance(options, PlatformOptions):
        return OptionsState(**common, irqfd=options.irqfd)  # type: ignore[arg-type]
    return OptionsState(**common)  # type: ignore[arg-type]


def options_from(state: OptionsState, driver: Driver) -> Options:
    """Make them again."""
    common = (state.mmap_timeout_ms, state.share_fd, state.no_mmap, OnRequest(state.on_request))
    if driver is Driver.VFIO_PCI:
        from vfiod.server.devices.guest_view import Shown
        from vfiod.server.devices.pci import PciOptions
        from vfiod.server.devices.romfile import RomFile

        romfile = None if state.romfile is None else RomFile.of(state.romfile.name, state.romfile.image)
        shown = Shown(multifunction=state.multifunction is True, rombar=state.rombar is not False, romfile=romfile)
        return PciOptions(*common, shown=shown)
    if driver is Driver.VFIO_PLATFORM:
        from vfiod.server.devices.platform import PlatformOptions

        return PlatformOptions(*common, irqfd=state.irqfd is not False)
    return Options(*common)


# --- eventfds and vectors -------------------------------------------------------------------------------------


def keep_counts(counts: Mapping[tuple[int, int], Counts]) -> list[CountsState]:
    """Counts by index and vector."""
    return [
        CountsState(index=index, vector=vector, fired=one.fired, delivered=one.delivered, spurious=one.spurious)
        for (index, vector), one in counts.items()
    ]


def counts_from(states: Iterable[CountsState]) -> dict[tuple[int, int], Counts]:
    """Make them again; a storm begins to be counted anew."""
    return {(one.index, one.vector): Counts(one.fired, one.delivered, one.spurious) for one in states}


def keep_vector(vector: Vector, index: int, owner: str, given: Given) -> VectorState:
    """Describe a bound vector."""
    name = f"{owner}/irq{index}.{vector.number}"
    return VectorState(
        index=index,
        number=vector.number,
        mode=vector.mode.value,
        trigger=given.give(vector.trigger, f"{name} trigger"),
        resample=given.perhaps(vector.resample, f"{name} resample"),
        own=given.perhaps(vector.own, f"{name} relay"),
    )


def take_vector(state: VectorState, counts: Counts, taken: Taken) -> Vector:
    """Make it again around its eventfds."""
    return Vector(
        state.number,
        IrqMode(state.mode),
        taken.take(state.trigger),
        taken.perhaps(state.resample),
        taken.perhaps(state.own),
        counts,
    )


# --- what is bound of a PCI device ----------------------------------------------------------------------------


def keep_bound(bound: Bound, owner: str, given: Given) -> BoundState | None:
    """Describe the active kind; None: there is none."""
    if bound.index < 0:
        return None
    line = bound.line
    return BoundState(
        index=bound.index,
        vectors=[keep_vector(one, bound.index, owner, given) for one in bound.vectors.values()],
        block=bound.block,
        masked=sorted(bound.masked),
        line=None
        if line is None
        else KeptLine(state=line.state.name, fast_path=line.fast_path.name, by_access=line.by_access),
    )


def take_bound(
    state: BoundState | None, one: IrqIndex | None, counts: Mapping[int, Counts], taken: Taken, *, timed: bool
) -> Bound:
    """Make it again. Nothing listens yet.

    Args:
        state: what :func:`keep_bound` gave.
        one: its index.
        counts: by vector.
        taken: the fds.
        timed: whether a timer brings the fast path back.

    """
    if state is None or one is None:
        return Bound()
    vectors = {kept.number: take_vector(kept, counts.get(kept.number) or Counts(), taken) for kept in state.vectors}
    line = None
    if state.line is not None and one.index == INTX:
        line = IntxLine(vectors[0].mode, by_access=state.line.by_access, timed=timed, automasked=one.info.automasked)
        line.state = LineState[state.line.state]
        line.fast_path = FastState[state.line.fast_path]
    return Bound(
        one.kind,
        one.index,
        MappingProxyType(vectors),
        state.block,
        frozenset(state.masked),
        line,
        one.info.maskable,
        one.info.resizable,
    )
