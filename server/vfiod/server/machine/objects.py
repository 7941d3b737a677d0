"""What ``object-add`` makes: things that devices and mappings refer to by id.

Changed in the ``topology`` lane only; looked at from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.objects import ObjectInfo, ObjectType
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.limits import MAX_OBJECTS
from vfiod.server.dma.guest_memory import GuestMemory
from vfiod.server.kernel.memory import SharedMemory

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ObjectState

__all__ = ["ContainerObject", "IommufdObject", "MachineObject", "MemoryObject", "Objects"]


class MemoryObject(Struct, frozen=True):
    """A ``memory-backend-fd``: guest memory that ``dma-map`` takes pieces of."""

    id: str
    memory: SharedMemory
    kind: FdKind


class ContainerObject(Struct, frozen=True):
    """A ``vfio-container``: a passed container, for ``device_add container=ID``."""

    id: str
    fd: FileDescriptor


class IommufdObject(Struct, frozen=True):
    """An ``iommufd``: a passed ``/dev/iommu``, for ``device_add iommufd=ID``."""

    id: str
    fd: FileDescriptor


MachineObject = MemoryObject | ContainerObject | IommufdObject

_TYPES: Final[dict[type[MachineObject], tuple[ObjectType, FdKind]]] = {
    ContainerObject: (ObjectType.VFIO_CONTAINER, FdKind.VFIO_CONTAINER),
    IommufdObject: (ObjectType.IOMMUFD, FdKind.IOMMUFD),
}
"""Objects that are an fd and no more."""


class Objects:
    """The machine's objects, by id.

    Args:
        guest_memory: whose mappings refer to memory backends.
        groups_in: ``group:N`` of each group in the container that an object of this id passed.
        devices_on: ``device:ID`` of each device bound to the iommufd that an object of this id passed.

    """

    def __init__(
        self,
        guest_memory: GuestMemory,
        groups_in: Callable[[str], tuple[str, ...]],
        devices_on: Callable[[str], tuple[str, ...]] = lambda _: (),
    ) -> None:
        self._guest_memory = guest_memory
        self._groups_in = groups_in
        self._devices_on = devices_on
        self._objects: dict[str, MachineObject] = {}

    def __len__(self) -> int:
        return len(self._objects)

    # --- changing: in the topology lane -------------------------------------------------------------

    def check_room(self, id: str) -> None:
        """Whether an object of this id may be added. Raises CommandError."""
        if id in self._objects:
            raise CommandError(f"Duplicate object ID '{id}'")
        if len(self._objects) >= MAX_OBJECTS:
            raise CommandError(f"This machine has {MAX_OBJECTS} objects, no more are allowed: object-del some first")

    def add(self, one: MachineObject) -> None:
        """Take an object over. Raises CommandError for a duplicate id or too many; then its owner stays."""
        self.check_room(one.id)
        self._objects[one.id] = one

    def remove(self, id: str) -> None:
        """Close an object. Raises CommandError, in QEMU's words, when it is unknown or something refers to it."""
        one = self._objects.get(id)
        if one is None:
            raise CommandError(f"object '{id}' not found")
        users = self._users(one)
        if users:
            raise CommandError(f"object '{id}' is in use, can not be deleted: {_some(users)} refers to it")
        del self._objects[id]
        _close(one)

    def close(self) -> list[str]:
        """Close all. Returns what went wrong, in sentences."""
        objects, self._objects = self._objects, {}
        problems = []
        for one in objects.values():
            try:
                _close(one)
            except (OSError, BufferError) as error:
                problems.append(f"Closing object {one.id} failed: {error}")
        return problems

    # --- over a change of the process -----------------------------------------------------------------

    def keep(self, given: Given) -> list[ObjectState]:
        """Describe all."""
        from vfiod.server.dma.files import keep_memory
        from vfiod.server.state.machine import ObjectState

        states = []
        for one in self._objects.values():
            if isinstance(one, MemoryObject):
                memory = keep_memory(one.memory, given)
                states.append(ObjectState(id=one.id, type=ObjectType.MEMORY_BACKEND_FD, memory=memory))
            else:
                place = given.give(one.fd, f"object:{one.id}")
                states.append(ObjectState(id=one.id, type=_TYPES[type(one)][0], fd=place))
        return states

    def adopt(self, states: list[ObjectState], taken: Taken) -> None:
        """Make all again."""
        from vfiod.server.dma.files import take_memory
        from vfiod.server.kernel.kinds import kind_of

        kinds = {kind[0]: made for made, kind in _TYPES.items()}
        for state in states:
            if state.memory is not None:
                memory = take_memory(state.memory, taken)
                self._objects[state.id] = MemoryObject(state.id, memory, kind_of(memory.number))
            elif state.fd is not None:
                made = kinds[ObjectType(state.type)]
                self._objects[state.id] = made(state.id, taken.take(state.fd))  # type: ignore[arg-type, call-arg]

    # --- looking --------------------------------------------------------------------------------------

    def memory(self, id: str) -> SharedMemory:
        """The memory of a ``memory-backend-fd``, lent. Raises InvalidArgument."""
        one = self._objects.get(id)
        if not isinstance(one, MemoryObject):
            raise _unfit("memory-backend", id, one, ObjectType.MEMORY_BACKEND_FD)
        return one.memory

    def container(self, id: str) -> FileDescriptor:
        """The fd of a ``vfio-container``, lent. Raises InvalidArgument."""
        one = self._objects.get(id)
        if not isinstance(one, ContainerObject):
            raise _unfit("container", id, one, ObjectType.VFIO_CONTAINER)
        return one.fd

    def iommufd(self, id: str) -> FileDescriptor:
        """The fd of an ``iommufd``, lent. Raises InvalidArgument."""
        one = self._objects.get(id)
        if not isinstance(one, IommufdObject):
            raise _unfit("iommufd", id, one, ObjectType.IOMMUFD)
        return one.fd

    def infos(self) -> list[ObjectInfo]:
        """What ``query-objects`` says."""
        mappings: dict[str, list[str]] = {}
        for mapped in self._guest_memory.ranges():
            if mapped.backend is not None:
                mappings.setdefault(mapped.backend, []).append(f"mapping:{mapped.first:#x}")
        infos = []
        for one in tuple(self._objects.values()):
            if isinstance(one, MemoryObject):
                infos.append(
                    ObjectInfo(
                        id=one.id,
                        qom_type=ObjectType.MEMORY_BACKEND_FD,
                        size=one.memory.size,
                        readonly=one.memory.readonly,
                        used_by=mappings.get(one.id, []),
                    )
                )
            else:
                infos.append(ObjectInfo(id=one.id, qom_type=_TYPES[type(one)][0], used_by=self._users(one)))
        return infos

    def fd_infos(self) -> Iterator[FdInfo]:
        """What ``query-fds`` says of them."""
        for one in tuple(self._objects.values()):
            if isinstance(one, MemoryObject):
                yield FdInfo(owner=f"object:{one.id}", kind=one.kind, number=one.memory.number)
            else:
                yield FdInfo(owner=f"object:{one.id}", kind=_TYPES[type(one)][1], number=one.fd.number)

    def _users(self, one: MachineObject) -> list[str]:
        if isinstance(one, ContainerObject):
            return list(self._groups_in(one.id))
        if isinstance(one, IommufdObject):
            return list(self._devices_on(one.id))
        if not self._guest_memory.uses(one.id):
            return []
        return [f"mapping:{mapped.first:#x}" for mapped in self._guest_memory.ranges() if mapped.backend == one.id]


NAMED_USERS: Final = 8
"""How many users an error text names; ``query-objects`` lists all."""


def _some(users: list[str]) -> str:
    more = len(users) - NAMED_USERS
    return ", ".join(users[:NAMED_USERS]) + (f" and {more} more" if more > 0 else "")


def _close(one: MachineObject) -> None:
    if isinstance(one, MemoryObject):
        one.memory.close()
    else:
        one.fd.close()


def _unfit(argument: str, id: str, found: MachineObject | None, wanted: ObjectType) -> InvalidArgument:
    if found is None:
        return InvalidArgument(f"Parameter '{argument}': object '{id}' not found; object-add of type {wanted} makes it")
    return InvalidArgument(f"Parameter '{argument}' expects the id of a {wanted}; object '{id}' is none")
