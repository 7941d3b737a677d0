"""The fds that came over a socket: waiting for a name, named, or in the machine's sets.

Each is held by exactly one place, and closed by it. What an fd is (its kind) is found by looking at it; the
function that looks is given, because it makes system calls and this module makes none but ``fcntl`` and ``close``.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol.catalogue.fds import FdInfo, FdsetFdInfo, FdsetInfo
from vfiod.protocol.errors import CommandError, InvalidArgument, LimitExceeded
from vfiod.protocol.fd import FdKind, FileDescriptor, close_all
from vfiod.protocol.limits import MAX_FD_NAME, MAX_FDS_PER_SET, MAX_FDSETS, MAX_NAMED_FDS, MAX_PENDING_FDS

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Place, Taken
    from vfiod.server.state.machine import HeldState

__all__ = ["FdNames", "FdSets", "HeldFd", "KindOf"]

KindOf = Callable[[int], FdKind]
"""Tells what an fd is (``kernel.kinds.kind_of``)."""

MAX_FDSET_ID: Final = 2**31 - 1  # QEMU keeps it in an int64_t, its path parser in an int

NO_FD: Final = "No file descriptor supplied via SCM_RIGHTS"  # QEMU's words, monitor/fds.c


class HeldFd(Struct, frozen=True, eq=False):
    """One fd, its kind, and, in a set, what the manager said of it."""

    fd: FileDescriptor
    kind: FdKind
    opaque: str | None = None

    @property
    def access(self) -> int:
        """``O_RDONLY``, ``O_WRONLY`` or ``O_RDWR``."""
        return fcntl.fcntl(self.fd.number, fcntl.F_GETFL) & os.O_ACCMODE


class FdNames:
    """The fds of one session: those that wait for a name, in order of arrival, and those that have one."""

    __slots__ = ("_kind_of", "_named", "_pending")

    def __init__(self, kind_of: KindOf) -> None:
        self._kind_of = kind_of
        self._pending: deque[FileDescriptor] = deque()
        self._named: dict[str, HeldFd] = {}

    def receive(self, fds: list[FileDescriptor]) -> None:
        """Take fds that arrived. Raises LimitExceeded when too many wait: then all of these are closed."""
        if len(self._pending) + len(fds) > MAX_PENDING_FDS:
            close_all(fds)
            raise LimitExceeded(
                f"{len(fds)} file descriptors were closed: {len(self._pending)} already wait for getfd or add-fd,"
                f" at most {MAX_PENDING_FDS} may"
            )
        self._pending.extend(fds)

    @property
    def pending(self) -> int:
        """How many wait for a name."""
        return len(self._pending)

    def take_pending(self) -> HeldFd:
        """The oldest fd without a name; the caller owns it. Raises CommandError in QEMU's words when there is none."""
        if not self._pending:
            raise CommandError(NO_FD)
        # Looked at before it is taken: whatever goes wrong, it has an owner.
        kind = self._kind_of(self._pending[0].number)
        return HeldFd(self._pending.popleft(), kind)

    def name(self, name: str) -> FdKind:
        """``getfd``: name the oldest waiting fd; a name that exists is replaced and its fd closed.

        When the name is refused, the fd it was meant for is closed, as QEMU does: else it would be taken for the next.
        """
        held = self.take_pending()
        try:
            self._check_name(name)
        except CommandError:
            held.fd.close()
            raise
        former = self._named.get(name)
        self._named[name] = held
        if former is not None:
            former.fd.close()
        return held.kind

    def _check_name(self, name: str) -> None:
        if name[:1].isdigit():
            raise InvalidArgument("Parameter 'fdname' expects a name not starting with a digit")
        if not name or name.startswith("/"):
            raise InvalidArgument(f"Parameter 'fdname' expects a name, not empty and not a path, got '{name}'")
        if len(name) > MAX_FD_NAME:
            raise InvalidArgument(f"Parameter 'fdname' expects at most {MAX_FD_NAME} characters, got {len(name)}")
        if name not in self._named and len(self._named) >= MAX_NAMED_FDS:
            raise CommandError(f"This session has {MAX_NAMED_FDS} named fds, no more are allowed: closefd some first")

    def look(self, name: str) -> HeldFd | None:
        """The fd behind a name, lent."""
        return self._named.get(name)

    def remove(self, name: str) -> None:
        """``closefd``. Raises CommandError in QEMU's words when there is no such name."""
        held = self._named.pop(name, None)
        if held is None:
            raise CommandError(f"File descriptor named '{name}' not found")
        held.fd.close()

    def consume(self, name: str, held: HeldFd) -> None:
        """A command that used this fd succeeded: close it, unless the name means another one by now."""
        if self._named.get(name) is held:
            del self._named[name]
            held.fd.close()

    def infos(self, owner: str) -> Iterator[FdInfo]:
        """What ``query-fds`` says of this session's fds."""
        for name, held in self._named.items():
            yield FdInfo(owner=owner, name=name, kind=held.kind, number=held.fd.number)
        for fd in self._pending:
            yield FdInfo(owner=owner, kind=self._kind_of(fd.number), number=fd.number, pending=True)

    def keep(self, owner: str, given: Given) -> tuple[list[tuple[str, HeldState]], list[Place]]:
        """Describe them: those with names, and those that wait for one, in their order."""
        from vfiod.server.state.machine import HeldState

        named = [
            (name, HeldState(fd=given.give(held.fd, f"{owner}/{name}"), opaque=held.opaque))
            for name, held in self._named.items()
        ]
        return named, [given.give(fd, f"{owner}/pending") for fd in self._pending]

    def adopt(self, named: list[tuple[str, HeldState]], pending: list[Place], taken: Taken) -> None:
        """Make them again."""
        for name, state in named:
            self._named[name] = _taken(state, taken, self._kind_of)
        self._pending.extend(taken.take(place) for place in pending)

    def close(self) -> None:
        """The session ended: close everything it sent and nobody took."""
        close_all(self._pending)
        self._pending.clear()
        named, self._named = self._named, {}
        close_all(held.fd for held in named.values())


class FdSets:
    """The machine's fd sets (QEMU ``add-fd``): they outlive the sessions that filled them."""

    __slots__ = ("_sets",)

    def __init__(self) -> None:
        self._sets: dict[int, list[HeldFd]] = {}

    def add(self, held: HeldFd, number: int | None) -> int:
        """Put an fd into a set; None: into a new one with the lowest free number. Returns the set's number.

        Raises CommandError when the number is negative or too much is there; then the fd is closed.
        """
        if number is None:
            number = next(free for free in range(MAX_FDSETS + 1) if free not in self._sets)
        try:
            self._check_room(number)
        except CommandError:
            held.fd.close()
            raise
        self._sets.setdefault(number, []).append(held)
        return number

    def _check_room(self, number: int) -> None:
        if number < 0:
            raise InvalidArgument("Parameter 'fdset-id' expects a non-negative value")
        if number > MAX_FDSET_ID:
            raise InvalidArgument(f"Parameter 'fdset-id' expects at most {MAX_FDSET_ID}, got {number}")
        if number not in self._sets and len(self._sets) >= MAX_FDSETS:
            raise CommandError(f"There are {MAX_FDSETS} fd sets, no more are allowed: remove-fd some first")
        if len(self._sets.get(number, ())) >= MAX_FDS_PER_SET:
            raise CommandError(f"fd set {number} holds {MAX_FDS_PER_SET} fds, no more are allowed")

    def remove(self, number: int, fd: int | None) -> None:
        """Close one fd of a set, or all; a set without fds ceases to be. Raises CommandError in QEMU's words."""
        held = self._sets.get(number)
        named = f"fdset-id:{number}" if fd is None else f"fdset-id:{number}, fd:{fd}"
        if held is None:
            raise CommandError(f"File descriptor named '{named}' not found")
        gone = [one for one in held if fd is None or one.fd.number == fd]
        if not gone:
            raise CommandError(f"File descriptor named '{named}' not found")
        left = [one for one in held if one not in gone]
        if left:
            self._sets[number] = left
        else:
            del self._sets[number]
        close_all(one.fd for one in gone)

    def fds(self, number: int) -> tuple[HeldFd, ...] | None:
        """The fds of a set, lent, oldest first; None when there is no such set."""
        held = self._sets.get(number)
        return None if held is None else tuple(held)

    def infos(self) -> list[FdsetInfo]:
        """What ``query-fdsets`` says."""
        return [
            FdsetInfo(fdset_id=number, fds=[_set_fd_info(one) for one in held])
            for number, held in sorted(self._sets.items())
        ]

    def fd_infos(self) -> Iterator[FdInfo]:
        """What ``query-fds`` says of them."""
        for number, held in sorted(self._sets.items()):
            for one in held:
                yield FdInfo(owner=f"fdset:{number}", kind=one.kind, number=one.fd.number)

    def keep(self, given: Given) -> list[tuple[int, list[HeldState]]]:
        """Describe them."""
        from vfiod.server.state.machine import HeldState

        return [
            (number, [HeldState(fd=given.give(one.fd, f"fdset:{number}"), opaque=one.opaque) for one in held])
            for number, held in self._sets.items()
        ]

    def adopt(self, states: list[tuple[int, list[HeldState]]], taken: Taken, kind_of: KindOf) -> None:
        """Make them again."""
        for number, held in states:
            self._sets[number] = [_taken(one, taken, kind_of) for one in held]

    def close(self) -> None:
        """The machine ends."""
        sets, self._sets = self._sets, {}
        for held in sets.values():
            close_all(one.fd for one in held)


def _set_fd_info(held: HeldFd) -> FdsetFdInfo:
    if held.opaque is None:
        return FdsetFdInfo(fd=held.fd.number, kind=held.kind)
    return FdsetFdInfo(fd=held.fd.number, kind=held.kind, opaque=held.opaque)


def _taken(state: HeldState, taken: Taken, kind_of: KindOf) -> HeldFd:
    fd = taken.take(state.fd)
    return HeldFd(fd, kind_of(fd.number), state.opaque)
