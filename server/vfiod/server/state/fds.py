"""The fds that belong to a description: each has a place in one list, and the description names the place."""

from __future__ import annotations

from typing import ClassVar, Final

from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.state.machine import Place

__all__ = ["Given", "Place", "Taken"]


class Given:
    """Collects fds while something is described. They stay whose they are: what is here is lent.

    Attributes:
        fds: what each is called, for a person, and its number; in the order of their places.
        connections: whether connections to programs that serve devices go along, which they may only at rest. Where
            a process may die at any moment they must not: the program would never hear of it.

    """

    connections: ClassVar[bool] = True

    def __init__(self) -> None:
        self.fds: Final[list[tuple[str, int]]] = []
        self._places: dict[int, Place] = {}

    def give(self, fd: FileDescriptor | int, name: str) -> Place:
        """The place of an fd; the same for the same number.

        Args:
            fd: lent.
            name: for a person: ``device:n0/notice req``.

        """
        number = fd if isinstance(fd, int) else fd.number
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = len(self.fds)
            self.fds.append((name, number))
        return place

    def perhaps(self, fd: FileDescriptor | None, name: str) -> Place | None:
        """The same for what may not be there."""
        return None if fd is None or fd.closed else self.give(fd, name)


class Taken:
    """The fds that came with a description. Whoever is made from it takes its own; :meth:`close` closes the rest.

    Args:
        fds: in the order of their places; the object owns them from here on.

    """

    def __init__(self, fds: list[FileDescriptor]) -> None:
        self._fds = fds
        self._gone: dict[Place, FileDescriptor] = {}

    def __len__(self) -> int:
        return len(self._fds)

    def take(self, place: Place) -> FileDescriptor:
        """The fd of a place; the caller owns it. Who comes second for the same place gets a duplicate.

        Raises IndexError: the description names a place that nothing came for; OSError: EMFILE.
        """
        if not 0 <= place < len(self._fds):
            raise IndexError(f"fd {place} is named, and {len(self._fds)} came")
        first = self._gone.get(place)
        if first is not None:
            return first.duplicate()
        self._gone[place] = fd = self._fds[place]
        return fd

    def copy(self, place: Place) -> FileDescriptor:
        """A duplicate, for what several places of a description share and each looks at for itself."""
        if not 0 <= place < len(self._fds):
            raise IndexError(f"fd {place} is named, and {len(self._fds)} came")
        return self._fds[place].duplicate()

    def perhaps(self, place: Place | None) -> FileDescriptor | None:
        """The same for what may not be there."""
        return None if place is None else self.take(place)

    def close(self) -> None:
        """Close what nobody took. Later calls do nothing."""
        close_all(fd for place, fd in enumerate(self._fds) if place not in self._gone)
        self._fds = []
