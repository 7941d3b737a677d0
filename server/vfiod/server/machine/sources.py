"""Where the machine's devices come from: the kernel's groups and cdevs, and the mediated bus.

Each is made, and its code imported, with the first need of it: a server that has no devices yet pays for none, in time
or memory. Looking never makes one: what is not there has nothing to show.
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from vfiod.protocol.catalogue.devices import ContainerInfo
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.server.dma.guest_memory import GuestMemory
from vfiod.server.events import EventHub
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.onloop import OnLoop

if TYPE_CHECKING:
    from vfiod.protocol.fd import FileDescriptor
    from vfiod.server.backends.base import AddressSpace, Backend, Mapping
    from vfiod.server.backends.cdev import IoasInfo, KernelCdevs
    from vfiod.server.backends.group import HeldFd, KernelGroups
    from vfiod.server.backends.mediated import MediatedDevices
    from vfiod.server.backends.vfio_user.source import VfioUserDevices
    from vfiod.server.mdev.bus import MdevBus
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import BackendState, KeepEach, KernelState, MdevState

__all__ = ["Sources"]


class Sources:
    """The machine's groups, cdevs and mediated bus. Any thread may ask for them.

    Args:
        calls: the system calls.
        memory: guest memory, replayed into each new address space.
        hub: the machine's events.
        executor: the machine's threads.
        loop: the machine's event loop.
        allow_open: whether devices may be opened here.

    """

    def __init__(
        self,
        calls: Syscalls,
        memory: GuestMemory,
        hub: EventHub,
        executor: Executor,
        *,
        loop: AbstractEventLoop,
        allow_open: bool,
    ) -> None:
        self._calls = calls
        self._memory = memory
        self._hub = hub
        self._executor = executor
        self._allow_open = allow_open
        # The first need may be the loop's or the topology lane's, at the same time.
        self._making = threading.Lock()
        self._kernel: tuple[KernelGroups, KernelCdevs] | None = None
        self._served: VfioUserDevices | None = None
        self._on_loop = OnLoop(loop)
        self._mediation: tuple[MdevBus, MediatedDevices] | None = None

    # --- made when first needed -----------------------------------------------------------------------

    @property
    def groups(self) -> KernelGroups:
        """VFIO groups and containers."""
        return self._need_kernel()[0]

    @property
    def cdevs(self) -> KernelCdevs:
        """VFIO cdevs, and the IOASes of the iommufds they are bound to."""
        return self._need_kernel()[1]

    @property
    def bus(self) -> MdevBus:
        """The mediated bus."""
        return self._need_mediation()[0]

    @property
    def served(self) -> VfioUserDevices:
        """Where devices of other programs (vfio-user) are opened."""
        with self._making:
            if self._served is None:
                from vfiod.server.backends.vfio_user.source import VfioUserDevices

                self._served = VfioUserDevices(
                    self._memory.attach,
                    self._memory.detach,
                    on_loop=self._on_loop,
                    executor=self._executor,
                    emit=self._hub.emit,
                )
            return self._served

    @property
    def mediated(self) -> MediatedDevices:
        """Where devices on the mediated bus are opened."""
        return self._need_mediation()[1]

    def _need_kernel(self) -> tuple[KernelGroups, KernelCdevs]:
        """Both at once: no group may be used by its cdevs and as a group."""
        with self._making:
            if self._kernel is None:
                from vfiod.server.backends.cdev import KernelCdevs
                from vfiod.server.backends.group import KernelGroups

                def mapped_bytes() -> int:
                    return self._memory.mapped_bytes

                groups = KernelGroups(
                    self._calls,
                    self._memory.attach,
                    self._memory.detach,
                    allow_open=self._allow_open,
                    mapped_bytes=mapped_bytes,
                    open_by_cdev=lambda number: cdevs.in_group(number),  # noqa: PLW0108 - made below
                )
                cdevs = KernelCdevs(
                    self._calls,
                    self._memory.attach,
                    self._memory.detach,
                    group_in_use=groups.in_use,
                    allow_open=self._allow_open,
                    mapped_bytes=mapped_bytes,
                )
                self._kernel = groups, cdevs
            return self._kernel

    def _need_mediation(self) -> tuple[MdevBus, MediatedDevices]:
        """Both at once: the bus matches what is made on it with the drivers that are there already."""
        with self._making:
            if self._mediation is None:
                from vfiod.server.backends.mediated import MediatedDevices
                from vfiod.server.mdev.bus import MdevBus

                bus = MdevBus(emit=self._hub.emit, executor=self._executor)
                self._mediation = bus, MediatedDevices(bus, self._memory.attach, self._memory.detach)
            return self._mediation

    # --- looking: makes nothing, never waits ------------------------------------------------------------

    def containers(self) -> tuple[ContainerInfo, ...]:
        """The containers with their groups."""
        return self._kernel[0].containers() if self._kernel else ()

    def lingering(self) -> tuple[int, ...]:
        """The groups that the kernel keeps because an fd which was given out is still open."""
        return tuple(self._kernel[0].lingering) if self._kernel else ()

    def ioases(self) -> tuple[IoasInfo, ...]:
        """The IOASes with their devices."""
        return tuple(self._kernel[1].ioases()) if self._kernel else ()

    def container_users(self, object_id: str) -> tuple[str, ...]:
        """Who uses the container that a ``vfio-container`` object holds."""
        return tuple(self._kernel[0].users_of(object_id)) if self._kernel else ()

    def iommufd_users(self, object_id: str) -> tuple[str, ...]:
        """The host addresses of the devices bound to an ``iommufd`` object."""
        return tuple(self._kernel[1].users_of(object_id)) if self._kernel else ()

    def mdevs(self) -> list[str]:
        """The UUIDs of the mediated devices."""
        return self._mediation[0].uuids() if self._mediation else []

    def fds(self) -> Iterator[HeldFd]:
        """The fds of groups, containers and the kernel's devices."""
        if self._kernel:
            groups, cdevs = self._kernel
            yield from groups.fds()
            yield from cdevs.fds()

    def mdev_fds(self) -> Iterator[FdInfo]:
        """The fds that mediated devices have open themselves."""
        if self._mediation:
            yield from self._mediation[0].fd_infos()

    # --- over a change of the process -------------------------------------------------------------------

    @property
    def under_way(self) -> str | None:
        """What is being made or taken apart on the mediated bus, or asked of another program; None: nothing."""
        mediated = self._mediation[0].under_way if self._mediation else None
        return mediated if mediated is not None or self._served is None else self._served.under_way

    def keep(self, given: Given) -> KernelState | None:
        """Describe what is open of the kernel's; None: nothing ever was."""
        if self._kernel is None:
            return None
        from vfiod.server.state.machine import KernelState

        groups, cdevs = self._kernel
        containers, following, kept = groups.keep(given)
        return KernelState(containers=containers, next_container=following, groups=kept, iommufds=cdevs.keep())

    def keep_mediated(self, given: Given, each: KeepEach | None = None) -> list[MdevState]:
        """Describe the mediated devices (:meth:`MdevBus.keep`). CommandError."""
        return self._mediation[0].keep(given, each) if self._mediation else []

    def keep_backend(self, backend: Backend, given: Given) -> BackendState:
        """Describe where an open device comes from. CannotKeep."""
        from vfiod.server.backends.cdev import KernelCdev
        from vfiod.server.backends.device import KernelDevice
        from vfiod.server.state.format import CannotKeep
        from vfiod.server.state.machine import BackendState

        if isinstance(backend, KernelCdev):
            return self.cdevs.keep_device(backend, given)
        if isinstance(backend, KernelDevice):
            return self.groups.keep_device(backend, given)
        if backend.kind == "mdev":
            return BackendState(kind=backend.kind, name=backend.name)
        if backend.kind == "vfio-user":
            from vfiod.server.backends.vfio_user.device import VfioUserBackend
            from vfiod.server.backends.vfio_user.keeping import keep_backend

            assert isinstance(backend, VfioUserBackend)  # noqa: S101 - no other has this kind
            return keep_backend(backend, given)
        raise CannotKeep(f"{backend.name} is a device of another program ({backend.kind}): remove it first")

    def adopt_served(self, state: BackendState, user: str, taken: Taken) -> Backend:
        """Have a device of another program again; :meth:`adopted` must follow. CommandError, OSError, LookupError."""

        def adopt_space(space: AddressSpace) -> list[Mapping]:
            self._memory.adopt_space(space)
            return self._memory.mappings_of(space)

        return self.served.adopt_device(state, user, taken, adopt_space)

    def adopted(self, backend: Backend, *, made: bool) -> None:
        """The device around it is made again: from now on it may be asked. Or it could not be made."""
        if self._served is not None:
            self._served.adopted(backend, made=made)

    def adopt(self, state: KernelState, iommufd_of: Callable[[str], FileDescriptor], taken: Taken) -> None:
        """Have what was open of the kernel's again. OperationFailed."""
        groups, cdevs = self._need_kernel()
        groups.adopt(state.containers, state.next_container, state.groups, taken, self._memory.adopt_space)
        cdevs.adopt(state.iommufds, iommufd_of, self._memory.adopt_space)

    def closes_with(self, backend: Backend) -> list[FileDescriptor]:
        """The kernel's fds that are closed with a device: its own; its group's and container's when it is the last."""
        from vfiod.server.backends.device import KernelDevice

        if not isinstance(backend, KernelDevice):
            return []
        return [backend.fd] + ([] if backend.group is None else self.groups.closes_with(backend))

    def settle(self) -> list[str]:
        """What the kernel has mapped is what the list says, and nothing else. Blocks. Returns what cannot be done."""
        problems = []
        for space in self._memory.spaces:
            if self._kernel is not None and (settle := getattr(space, "settle", None)) is not None:
                problems += settle(self._memory.mappings_of(space))
        return problems

    def rehome(self) -> list[str]:
        """What another process mapped is this one's now. Returns what the kernel cannot do of that, in sentences."""
        if self._kernel is None:
            return []
        from vfiod.server.backends.container import Type1Space

        cdevs = self._kernel[1]
        problems = []
        for space in self._memory.spaces:
            if isinstance(space, Type1Space):
                problem = space.rehome(self._memory.mappings_of(space))
                problems += [problem] if problem is not None else []
        return problems + cdevs.rehome()

    # --- the end ----------------------------------------------------------------------------------------

    def kernel_closers(self) -> list[tuple[str, Callable[[], None]]]:
        """What to close, in order, by blocking functions, each with its name. After the devices."""
        if self._kernel is None:
            return []
        groups, cdevs = self._kernel
        return [("Closing groups and containers", groups.close), ("Closing cdevs", cdevs.close)]

    async def close_mediation(self) -> None:
        """Close the mediated bus; after the devices."""
        if self._mediation is not None:
            await self._mediation[0].close()
