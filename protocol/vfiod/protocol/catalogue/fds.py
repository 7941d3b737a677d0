"""Family "fds": naming the file descriptors that came over the socket."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from vfiod.protocol.catalogue.declare import Arguments, Empty, Family, Result, command
from vfiod.protocol.catalogue.words import UNSET, UnsetType
from vfiod.protocol.fd import FdKind

NewFdName = Annotated[str, Meta(description="A name for the fd; it does not start with a digit.")]
# No ge= here: the error keeps QEMU's words ("expects a non-negative value"), said by the command itself.
FdsetId = Annotated[int, Meta(description="The number of an fd set: 0 or more.")]


class GetfdResult(Result):
    """What the fd was found to be."""

    kind: FdKind


@command("getfd", Family.FDS, mutates=False)
class Getfd(Arguments[GetfdResult]):
    """Name the oldest fd this session has sent and not yet named.

    A name that exists is replaced and its fd closed. Names belong to the session and end with it.
    """

    fdname: NewFdName


@command("closefd", Family.FDS, mutates=False)
class Closefd(Arguments[Empty]):
    """Close an fd that getfd named."""

    fdname: str


class AddFdResult(Result):
    """QEMU's ``AddfdInfo``, and the kind."""

    fdset_id: int
    fd: int
    kind: FdKind


@command("add-fd", Family.FDS)
class AddFd(Arguments[AddFdResult]):
    """Put the oldest unnamed fd into an fd set. Sets are the machine's, and outlive the session."""

    fdset_id: FdsetId | UnsetType = UNSET
    opaque: str | UnsetType = UNSET


@command("remove-fd", Family.FDS)
class RemoveFd(Arguments[Empty]):
    """Close one fd of a set, or all of them; an empty set ceases to be."""

    fdset_id: FdsetId
    fd: int | UnsetType = UNSET


class FdsetFdInfo(Result):
    """One fd of a set."""

    fd: int
    kind: FdKind
    opaque: str | UnsetType = UNSET


class FdsetInfo(Result):
    """One fd set."""

    fdset_id: int
    fds: list[FdsetFdInfo]


@command("query-fdsets", Family.FDS, oob=True, mutates=False)
class QueryFdsets(Arguments[list[FdsetInfo]]):
    """List the machine's fd sets."""


class FdInfo(Result, kw_only=True):
    """One fd the server holds, and for whom."""

    owner: Annotated[
        str, Meta(description="session:N, fdset:N, device:ID, object:ID, group:N, container:N, mdev:UUID, server")
    ]
    name: str | UnsetType = UNSET
    kind: FdKind
    number: int
    pending: bool = False


@command("query-fds", Family.FDS, oob=True, mutates=False)
class QueryFds(Arguments[list[FdInfo]]):
    """List every fd with its owner: of this session (named and pending), of fd sets, devices and objects."""
