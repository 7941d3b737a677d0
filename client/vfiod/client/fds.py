"""File descriptors that go out with commands and come in with replies, and who owns them.

Out: an fd given to a method is *lent*. The client sends a duplicate; the caller goes on owning, and
closes, its own. In: an fd that comes with a reply is a :class:`~vfiod.protocol.fd.FileDescriptor` that the
caller owns and closes; the objects that carry several (:class:`HoldsFds`) close them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias, overload

import msgspec
from msgspec import UNSET, UnsetType

from vfiod.client.errors import ProtocolError
from vfiod.protocol.fd import FileDescriptor, close_all

__all__ = [
    "Fd",
    "HasFileno",
    "HoldsFds",
    "LentFds",
    "OpenFd",
    "OwnedFds",
    "descriptors",
    "fd_indexes",
    "number_of",
    "with_fds",
]


class HasFileno(Protocol):
    """A file, a socket, a :class:`~vfiod.protocol.fd.FileDescriptor`: anything with an fd."""

    def fileno(self) -> int:
        """The fd's number."""


OpenFd: TypeAlias = int | HasFileno
"""An open fd of this process."""

Fd: TypeAlias = str | int | HasFileno
"""What a method takes for an fd: an open one, lent; or a name the server knows (``getfd``, ``/dev/fdset/N``)."""


def number_of(fd: OpenFd) -> int:
    """The fd's number. Raises ValueError for a closed one."""
    number = fd if isinstance(fd, int) else fd.fileno()
    if number < 0:
        raise ValueError(f"{fd!r} is not an open file descriptor")
    return number


_fresh: Final = itertools.count(1)


class LentFds:
    """The fds one call lends, each under a name the server has not seen in this session."""

    __slots__ = ("named",)

    def __init__(self) -> None:
        self.named: dict[str, OpenFd] = {}

    @overload
    def name(self, fd: Fd) -> str: ...

    @overload
    def name(self, fd: Fd | UnsetType) -> str | UnsetType: ...

    def name(self, fd: Fd | UnsetType) -> str | UnsetType:
        """The name to put into the arguments: the caller's own, or a new one for an open fd."""
        if isinstance(fd, str | UnsetType):
            return fd
        name = f"client-{next(_fresh)}"
        self.named[name] = fd
        return name


class HoldsFds:
    """A reply, or a part of one, that owns fds. Close it, or use it in ``with``; or close each fd."""

    __slots__ = ()

    def file_descriptors(self) -> Iterator[FileDescriptor]:
        """Every fd in it, at any depth."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every heir is a dataclass
            yield from descriptors(getattr(self, field.name))

    def close(self) -> None:
        """Close every fd in it. Those closed or given away already are passed over."""
        for fd in self.file_descriptors():
            fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def descriptors(value: Any) -> Iterator[FileDescriptor]:
    """Every fd in a value, at any depth."""
    if isinstance(value, FileDescriptor):
        yield value
    elif isinstance(value, HoldsFds):
        yield from value.file_descriptors()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from descriptors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from descriptors(item)


class OwnedFds:
    """The fds that came with one reply, given out by index, each once."""

    __slots__ = ("_all", "_fds")

    def __init__(self, fds: Sequence[FileDescriptor]) -> None:
        self._all = tuple(fds)
        self._fds: list[FileDescriptor | None] = list(fds)

    @overload
    def take(self, index: int) -> FileDescriptor: ...

    @overload
    def take(self, index: int | UnsetType) -> FileDescriptor | UnsetType: ...

    def take(self, index: int | UnsetType) -> FileDescriptor | UnsetType:
        """The fd of this index, which the caller owns from here on. Raises ProtocolError for one that is not there."""
        if isinstance(index, UnsetType):
            return UNSET
        fd = self._fds[index] if 0 <= index < len(self._fds) else None
        if fd is None:
            raise ProtocolError(f"The reply refers to fd {index}, which did not come with it or is referred to twice")
        self._fds[index] = None
        return fd

    def close(self) -> None:
        """Close what nobody took."""
        for fd in self._fds:
            if fd is not None:
                fd.close()
        self._fds.clear()

    def close_all(self) -> None:
        """Close every one, taken or not: the reply turned out to be wrong."""
        close_all(self._all)


def fd_indexes(value: Any) -> Iterator[int]:
    """Every fd index in a reply: integers of members named ``..._fd`` (typed) or ``...-fd`` (as it came)."""
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, dict):
        for name, item in value.items():
            if _is_fd_member(name, item):
                yield item
            else:
                yield from fd_indexes(item)
    elif isinstance(value, list):
        for item in value:
            yield from fd_indexes(item)


def with_fds(value: Any, fds: OwnedFds) -> Any:
    """The reply as it came, with each fd index replaced by the fd."""
    if isinstance(value, dict):
        return {
            name: fds.take(item) if _is_fd_member(name, item) else with_fds(item, fds) for name, item in value.items()
        }
    if isinstance(value, list):
        return [with_fds(item, fds) for item in value]
    return value


def _is_fd_member(name: Any, value: Any) -> bool:
    return isinstance(name, str) and name.endswith(("-fd", "_fd")) and type(value) is int
