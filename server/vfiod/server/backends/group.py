"""Devices of the kernel's groups and containers: who is in what, and in which order things open and close."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfiod.protocol.catalogue.devices import Check, ContainerInfo
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.backends.base import AddressSpace, Backend
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["ContainerSource", "GroupOrigin", "HeldFd", "KernelGroups"]


@dataclass(frozen=True, slots=True)
class ContainerSource:
    """A container that the manager passed.

    Attributes:
        fd: a duplicate; whoever is given the source owns it.
        name: what it was called: the fd's name, or the id of the ``vfio-container`` object.
        object_id: the id, when it is an object.

    """

    fd: FileDescriptor
    name: str
    object_id: str | None = None


@dataclass(frozen=True, slots=True)
class GroupOrigin:
    """Where a device of the kernel comes from: what ``device_add`` was told.

    Attributes:
        driver: ``vfio-pci``.
        host: ``[[DDDD:]BB:]DD.F``, or a platform device's name; exactly one of ``host`` and ``sysfsdev``.
        sysfsdev: the device's directory in sysfs.
        group_fd: a duplicate of the group's fd, for the first device of a group.
        container: the manager's own container.
        noiommu: ``x-noiommu``: a group without an IOMMU is accepted.

    """

    driver: str
    host: str | None = None
    sysfsdev: str | None = None
    group_fd: FileDescriptor | None = None
    container: ContainerSource | None = None
    noiommu: bool = False


@dataclass(frozen=True, slots=True)
class HeldFd:
    """One fd that is held here, for ``query-fds``."""

    owner: str  # group:N, container:N, device:HOST
    kind: FdKind
    number: int


class KernelGroups:
    """All containers, groups and kernel devices of a machine.

    ``open``, ``check``, ``sweep``, ``close`` and the ``close`` of a backend block, and are called in the topology
    lane, never two at once. The queries may be called at any time from the loop.

    Args:
        calls: the system calls.
        attach_space: replays all guest memory into a new address space; raises and leaves nothing, or succeeds.
        detach_space: forgets an address space. It need not unmap: what is left is unmapped here, after it.
        allow_open: open ``/dev/vfio/N`` here when no group fd is passed (``--allow-open``).
        mapped_bytes: how much guest memory is mapped at this moment (for the memory-lock check).

    """

    def __init__(
        self,
        calls: Syscalls,
        attach_space: Callable[[AddressSpace], None],
        detach_space: Callable[[AddressSpace], None],
        *,
        allow_open: bool = False,
        mapped_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        raise NotImplementedError

    def open(self, origin: GroupOrigin) -> Backend:
        """Open a device. Takes over the origin's fds, whatever comes of it; unwinds everything on failure."""
        raise NotImplementedError

    def check(self, origin: GroupOrigin) -> tuple[Check, ...]:
        """What ``device_add`` with ``x-dry-run`` says. Takes over (and closes) the origin's fds; changes nothing."""
        raise NotImplementedError

    def sweep(self) -> tuple[int, ...]:
        """Try again to let go of lingering groups; returns the ids of those that are gone now."""
        raise NotImplementedError

    @property
    def lingering(self) -> tuple[int, ...]:
        """Groups without a device of ours that the kernel keeps, because an fd that was given out is still open.

        Their fd stays here and they stay in their container, which no longer has any mapping unless other groups use
        it. A later :meth:`open` takes such a group up again. Call :meth:`sweep` now and then while there are any.
        """
        raise NotImplementedError

    def containers(self) -> tuple[ContainerInfo, ...]:
        """Every container, lowest id first; lingering groups are listed in theirs."""
        raise NotImplementedError

    def fds(self) -> tuple[HeldFd, ...]:
        """Every fd held here."""
        raise NotImplementedError

    def users_of(self, object_id: str) -> tuple[str, ...]:
        """``group:N`` for each group in the container that this ``vfio-container`` object passed."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything that is left, when the machine ends: devices first, then groups, then containers."""
        raise NotImplementedError
