"""Family "fds": naming the file descriptors that came over the socket."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from vfiod.protocol.catalogue import Empty, fds
from vfiod.protocol.errors import CommandError
from vfiod.server.commands.call import Call, Handlers
from vfiod.server.fds import FdNames

__all__ = ["HANDLERS"]


def _names(call: Call) -> FdNames:
    if call.session is None:
        raise CommandError("This connection carries no fds: use a Unix socket of the monitor")
    return call.session.names


def getfd(call: Call, arguments: fds.Getfd) -> fds.GetfdResult:
    """Name the oldest unnamed fd of the session."""
    return fds.GetfdResult(kind=_names(call).name(arguments.fdname))


def closefd(call: Call, arguments: fds.Closefd) -> Empty:
    """Close a named fd."""
    _names(call).remove(arguments.fdname)
    return Empty()


def add_fd(call: Call, arguments: fds.AddFd) -> fds.AddFdResult:
    """Put the oldest unnamed fd into a set."""
    held = _names(call).take_pending()
    if arguments.opaque is not UNSET:
        held = replace(held, opaque=arguments.opaque)
    number = None if arguments.fdset_id is UNSET else arguments.fdset_id
    fdset = call.machine.fdsets.add(held, number)
    return fds.AddFdResult(fdset_id=fdset, fd=held.fd.number, kind=held.kind)


def remove_fd(call: Call, arguments: fds.RemoveFd) -> Empty:
    """Close one fd of a set, or all."""
    call.machine.fdsets.remove(arguments.fdset_id, None if arguments.fd is UNSET else arguments.fd)
    return Empty()


def query_fdsets(call: Call, _arguments: fds.QueryFdsets) -> list[fds.FdsetInfo]:
    """List the fd sets."""
    return call.machine.fdsets.infos()


def query_fds(call: Call, _arguments: fds.QueryFds) -> list[fds.FdInfo]:
    """List every fd the server holds, with its owner."""
    return [*call.server.fd_infos(), *call.machine.fd_infos()]


HANDLERS: Final[Handlers] = {
    fds.Getfd: getfd,
    fds.Closefd: closefd,
    fds.AddFd: add_fd,
    fds.RemoveFd: remove_fd,
    fds.QueryFdsets: query_fdsets,
    fds.QueryFds: query_fds,
}
