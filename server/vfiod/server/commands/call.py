"""One command being executed: what its handler may ask for, besides its arguments.

A handler is a plain function ``handler(call, arguments) -> result``; one that has to wait returns an awaitable of
its result. It raises :class:`~vfiod.protocol.errors.CommandError` to refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from vfiod.protocol.catalogue import Arguments, command_of
from vfiod.protocol.catalogue.devices import SessionInfo
from vfiod.protocol.catalogue.fds import FdInfo
from vfiod.protocol.catalogue.monitor import QmpCapability, ShutdownCause, StatsResult, StatusInfo
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE
from vfiod.server.fds import FdNames, HeldFd

if TYPE_CHECKING:
    from vfiod.server.devices.device import Device
    from vfiod.server.machine import Machine

__all__ = ["Call", "Handler", "Handlers", "ServerLike", "SessionLike"]

FDSET_PREFIX: Final = "/dev/fdset/"

Handler = Callable[["Call", Any], Any]
"""Executes a command: returns its result, or an awaitable of it."""

Handlers = Mapping[type[Arguments[Any]], Handler]
"""What each module of commands exports as ``HANDLERS``."""


class SessionLike(Protocol):
    """What a command may know of the session it came from."""

    @property
    def id(self) -> int:
        """Number of the session, from 1."""

    @property
    def names(self) -> FdNames:
        """The fds this session sent."""

    def allows(self, command: str) -> bool:
        """Whether the socket's role may run a command."""

    def refusal(self, command: str) -> CommandError:
        """What to say to a command that the role may not run."""

    def negotiate(self, enable: list[QmpCapability]) -> None:
        """``qmp_capabilities``: enable these, and leave negotiation. Raises CommandNotFound when that is over."""


class ServerLike(Protocol):
    """What a command may know of, and ask of, the process around the machine."""

    @property
    def status(self) -> StatusInfo:
        """Running, or shutting down."""

    def session_infos(self) -> list[SessionInfo]:
        """The monitor's sessions, for ``query-machine``."""

    def session_stats(self) -> list[StatsResult]:
        """Counters of each session, for ``query-stats``."""

    def fd_infos(self) -> Iterator[FdInfo]:
        """The fds of sessions and of the server itself, for ``query-fds``."""

    def audited(self, call: Call, command: str, error: CommandError | None) -> None:
        """A command that may change something has ended: tell the audit log, if there is one."""

    def shut_down(self, cause: ShutdownCause) -> None:
        """Begin to close every device in order, and then to end. Returns at once; asked again, it does nothing."""


class Call:
    """One command being executed.

    Attributes:
        machine: what the command works on.
        server: the process around it.
        session: where it came from; None for a door that carries no fds.
        oob: executed out of band: it must answer at once.
        carries_fds: whether fds can go with the reply; not with that to a batch or a notification.
        used_fds: whether it took or gave any fd: else success has nothing to do.
        arguments: the command's; handlers are given them besides. None before they are known.

    """

    __slots__ = ("_attached", "_used", "arguments", "carries_fds", "machine", "oob", "server", "session", "used_fds")

    def __init__(
        self,
        machine: Machine,
        server: ServerLike,
        session: SessionLike | None = None,
        oob: bool = False,
        carries_fds: bool = True,
    ) -> None:
        self.machine = machine
        self.server = server
        self.session = session
        self.oob = oob
        self.carries_fds = carries_fds and session is not None
        self.arguments: Any = None
        self.used_fds = False
        self._used: list[tuple[str, HeldFd]] | None = None
        self._attached: list[FileDescriptor] | None = None

    # --- for handlers -------------------------------------------------------------------------

    def fd(self, argument: str, name: str, *expected: FdKind, write: bool = False) -> FileDescriptor:
        """A duplicate of the fd behind a name, which the handler owns.

        Args:
            argument: the argument's name on the wire, for the error's text.
            name: a ``getfd`` name of this session, or ``/dev/fdset/N``.
            expected: the kinds that will do; none given: any.
            write: of an fd set, take only what is open for writing (else whatever fits, the widest access first).

        A ``getfd`` name is consumed (its fd closed) when the command succeeds; when it fails, the name stays. An fd
        set keeps its fds. Raises InvalidArgument, naming the argument, what was found and what is expected.

        """
        if name.startswith(FDSET_PREFIX):
            return self._from_set(argument, name, expected, write)
        if self.session is None:
            raise InvalidArgument(f"Parameter '{argument}' expects /dev/fdset/N here: this connection carries no fds")
        held = self.session.names.look(name)
        if held is None:
            if name[:1].isdigit():
                raise InvalidArgument(
                    f"Parameter '{argument}' expects the name of an fd, not a number: name the fd with getfd first"
                )
            raise InvalidArgument(
                f"Parameter '{argument}': File descriptor named '{name}' not found; send the fd and name it with getfd"
            )
        _check_kind(argument, name, held.kind, expected)
        if self._used is None:
            self._used = []
        self.used_fds = True
        self._used.append((name, held))
        return _duplicate(held, argument, name)

    def device_to_change(self, name: str) -> Device:
        """The device with this id or path, for a command that changes it.

        Raises DeviceNotFound; Busy while it belongs to the client of an export, unless the command has ``force``.
        """
        device = self.machine.device(name)
        if device.claim is not None:
            device.check_unclaimed(command_of(self.arguments).name, force=self.arguments.force)
        return device

    def check_claims(self, devices: Iterable[Device] | None = None) -> None:
        """Refuse a command that changes all of these while one belongs to a client. Busy, unless it has ``force``.

        Args:
            devices: those it changes; None: all of the machine.

        """
        for device in self.machine.devices.all() if devices is None else devices:
            if device.claim is not None:
                device.check_unclaimed(command_of(self.arguments).name, force=self.arguments.force)

    def keep_names(self) -> None:
        """Succeeding will consume no name: a dry run changes nothing."""
        self._used = None

    def attach(self, fd: FileDescriptor) -> int:
        """Send an fd with the reply; returns its index there. The call owns it from here on, also when this raises.

        Raises InvalidArgument when the reply carries none, or not so many.
        """
        if not self.carries_fds:
            fd.close()
            raise InvalidArgument(
                "This reply cannot carry an fd: it answers a batch, a notification, or comes by a connection without"
                " fds; ask by a single request over a Unix socket"
            )
        if self._attached is None:
            self._attached = []
            self.used_fds = True
        if len(self._attached) >= MAX_FDS_PER_MESSAGE:
            fd.close()
            raise InvalidArgument(f"A reply carries at most {MAX_FDS_PER_MESSAGE} fds: ask for fewer at once")
        self._attached.append(fd)
        return len(self._attached) - 1

    # --- for the dispatcher --------------------------------------------------------------------

    def succeed(self) -> list[FileDescriptor] | None:
        """The command succeeded: consume the names it used; returns the fds that go with the reply."""
        if self._used is not None and self.session is not None:
            for name, held in self._used:
                self.session.names.consume(name, held)
            self._used = None
        attached, self._attached = self._attached, None
        return attached

    def fail(self) -> None:
        """The command failed: names stay, fds meant for the reply are closed."""
        self._used = None
        attached, self._attached = self._attached, None
        for fd in attached or ():
            fd.close()

    # --- inside --------------------------------------------------------------------------------

    def _from_set(self, argument: str, path: str, expected: tuple[FdKind, ...], write: bool) -> FileDescriptor:
        digits = path[len(FDSET_PREFIX) :]
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
            raise InvalidArgument(f"Parameter '{argument}' expects /dev/fdset/N with a number N, got '{path}'")
        held: tuple[HeldFd, ...] | None = self.machine.fdsets.fds(int(digits))
        if held is None:
            raise InvalidArgument(f"Parameter '{argument}': File descriptor set {digits} not found; add-fd makes it")
        fitting = [one for one in held if not expected or one.kind in expected]
        if not fitting:
            found = ", ".join(sorted({str(one.kind) for one in held}))
            raise InvalidArgument(
                f"Parameter '{argument}': '{path}' holds {found}, expected {' or '.join(expected) or 'any fd'}"
            )
        writable = [one for one in fitting if one.access != os.O_RDONLY]
        if write and not writable:
            raise InvalidArgument(
                f"Parameter '{argument}': no fd of '{path}' is open for writing; add one that is", errno="EACCES"
            )
        return _duplicate((writable or fitting)[0], argument, path)


def _duplicate(held: HeldFd, argument: str, name: str) -> FileDescriptor:
    try:
        return held.fd.duplicate()
    except OSError as error:
        raise OperationFailed(
            "dup",
            f"fd '{name}' (parameter '{argument}')",
            errno=error.errno or 0,
            advice="the open-file limit (RLIMIT_NOFILE) may be too low",
        ) from error


def _check_kind(argument: str, name: str, found: FdKind, expected: tuple[FdKind, ...]) -> None:
    if expected and found not in expected:
        article = "an" if found[0] in "aeiou" else "a"
        raise InvalidArgument(
            f"Parameter '{argument}': fd '{name}' is {article} {found}, expected {' or '.join(expected)}"
        )
