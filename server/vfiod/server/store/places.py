"""Which fds are in the store: each open file once, at a place that stays its own as long as it is used.

A description names fds by place. Here a place is for good, so that an older description of one device can stand beside
newer ones of the others, and so that a name in the store (``vfiod-PLACE``) never means another file.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.state.fds import Given, Place, Taken
from vfiod.server.store.fdstore import PREFIX

__all__ = ["Found", "Places", "name_of", "place_of"]


def name_of(place: Place) -> str:
    """What the store calls it."""
    return f"{PREFIX}{place}"


def place_of(name: str) -> Place | None:
    """The place a name of the store means; None: it is none of these."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() and name.startswith(PREFIX) else None


class _Kept:
    """One open file of ours."""

    __slots__ = ("identity", "number", "owners", "place", "used")

    def __init__(self, place: Place, identity: tuple[int, int, int]) -> None:
        self.place: Final = place
        self.identity: Final = identity
        self.owners: dict[int, FileDescriptor] = {}  # by id: held, so that an id means one object
        self.number = -1  # the last one that somebody lent without an owner
        self.used = False

    def here(self) -> int | None:
        """A number that is this file now; None: ours are all closed."""
        for key, owner in tuple(self.owners.items()):
            if not owner.closed:
                return owner.number
            del self.owners[key]
        # Memory and sockets, which alone are lent so, have an inode of their own: another file there is seen.
        if self.number >= 0 and _identity(self.number) == self.identity:
            return self.number
        return None


class Places(Given):
    """The fds of a description after the other; see the module's text.

    Attributes:
        fds: names for people, and numbers, of the description that is being made; in the order they were given.
        order: their places, in the same order.

    """

    connections = False

    def __init__(self, calls: Syscalls | None = None) -> None:
        super().__init__()
        self._calls = calls or Syscalls()
        self._kept: dict[Place, _Kept] = {}
        self._by_file: dict[tuple[int, int, int], list[_Kept]] = {}
        self._by_owner: dict[int, _Kept] = {}
        self._next = 0
        self.order: Final[list[Place]] = []
        self._new: list[_Kept] = []

    def begin(self) -> None:
        """A new description begins: nothing is used yet."""
        self.fds.clear()
        self.order.clear()
        for kept in self._kept.values():
            kept.used = False

    def give(self, fd: FileDescriptor | int, name: str) -> Place:
        """See :class:`Given`. The same open file has the same place, whoever has it by whatever number."""
        owner = fd if isinstance(fd, FileDescriptor) else None
        number = fd if isinstance(fd, int) else fd.number
        kept = None if owner is None else self._by_owner.get(id(owner))
        if kept is None or kept.owners.get(id(owner)) is not owner:
            kept = self._find(number) or self._add(number)
            if owner is None:
                if not kept.owners:  # an owner tells when the file is closed, a number alone does not
                    kept.number = number
            else:
                kept.owners[id(owner)] = owner
                self._by_owner[id(owner)] = kept
        kept.used = True
        self.fds.append((name, number))
        self.order.append(kept.place)
        return kept.place

    def use(self, places: frozenset[Place]) -> None:
        """An older description of something is used again, and these are its fds."""
        for place in places:
            self._kept[place].used = True

    def _find(self, number: int) -> _Kept | None:
        for kept in self._by_file.get(_identity(number), ()):
            there = kept.here()
            if there is not None and self._calls.same_file(there, number):
                return kept
        return None

    def _add(self, number: int) -> _Kept:
        kept = _Kept(self._next, _identity(number))
        self._next += 1
        self._kept[kept.place] = kept
        self._by_file.setdefault(kept.identity, []).append(kept)
        self._new.append(kept)
        return kept

    def adopt(self, found: Found) -> list[Place]:
        """Know what a dead server had in the store, and was taken over. Returns what the store has for nobody."""
        for place, fd in found.given():
            kept = self._kept.get(place)
            if kept is None:
                kept = self._kept[place] = _Kept(place, _identity(fd.number))
                self._by_file.setdefault(kept.identity, []).append(kept)
            kept.owners[id(fd)] = fd
            self._by_owner[id(fd)] = kept
            mode = os.fstat(fd.number).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISREG(mode):
                kept.number = fd.number
        # Places are never given twice: a name that is being removed must not mean something else.
        self._next = max(found.places, default=-1) + 1
        return sorted(found.places - self._kept.keys())

    def used(self) -> frozenset[Place]:
        """The places of the description so far."""
        return frozenset(place for place, kept in self._kept.items() if kept.used)

    def to_store(self) -> list[tuple[Place, int]]:
        """What is new since the last time: place and number."""
        new, self._new = self._new, []
        return [(kept.place, there) for kept in new if kept.used and (there := kept.here()) is not None]

    def unused(self) -> list[Place]:
        """What the description does not use, and the store needs no longer; forgotten here."""
        gone = [kept for kept in self._kept.values() if not kept.used]
        self.forget(kept.place for kept in gone)
        return [kept.place for kept in gone]

    def forget(self, places: object) -> None:
        """These are no more in the store."""
        for place in list(places):  # type: ignore[call-overload]
            kept = self._kept.pop(place, None)
            if kept is not None:
                self._by_file[kept.identity].remove(kept)
                if not self._by_file[kept.identity]:
                    del self._by_file[kept.identity]
                for key in [key for key, value in self._by_owner.items() if value is kept]:
                    del self._by_owner[key]

    def place_here(self, fd: FileDescriptor) -> Place | None:
        """The place of an fd that is in the store; None: it is not."""
        kept = self._by_owner.get(id(fd))
        return kept.place if kept is not None and kept.owners.get(id(fd)) is fd else None


class Found(Taken):
    """The fds that a dead server has left, by place (:class:`Taken`).

    Attributes:
        places: all that came.

    """

    def __init__(self, fds: dict[Place, FileDescriptor]) -> None:
        super().__init__([])
        self.places: Final = frozenset(fds)
        self._there = fds
        self._given: list[tuple[Place, FileDescriptor]] = []

    def __len__(self) -> int:
        return len(self._there)

    def take(self, place: Place) -> FileDescriptor:
        """See :class:`Taken`: always a duplicate. LookupError: nothing came for it; OSError: EMFILE."""
        if place not in self._there:
            raise LookupError(f"fd {place} is named, and has not come back")
        fd = self._there[place].duplicate()
        self._given.append((place, fd))
        return fd

    def given(self) -> list[tuple[Place, FileDescriptor]]:
        """What was taken and is still open under this owner."""
        return [(place, fd) for place, fd in self._given if not fd.closed]

    def close(self) -> None:
        """Close them; what was taken stays."""
        close_all(self._there.values())
        self._there = {}


def _identity(number: int) -> tuple[int, int, int]:
    """Device, inode, kind of device: the same for the same file. All eventfds have one inode."""
    try:
        found = os.fstat(number)
    except OSError:
        return -1, -1, -1
    return found.st_dev, found.st_ino, found.st_rdev
