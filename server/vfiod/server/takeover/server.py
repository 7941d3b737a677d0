"""All of one server as the hand-over sees it: its machine, its monitor and its exports, held, described, made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiod.protocol.errors import CommandError
from vfiod.server.machine.keeping import adopt_machine, keep_machine, needs_of, under_way
from vfiod.server.state.doors import DoorsState
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.format import CannotKeep, State, encode
from vfiod.server.takeover.conversation import Welcome
from vfiod.server.takeover.whole import program_version

if TYPE_CHECKING:
    from vfiod.server.exports import Exports
    from vfiod.server.monitor.server import MonitorServer

__all__ = ["Everything", "adopt_everything", "missing", "prepare"]


class Everything:
    """A server that may be handed over. On the loop."""

    def __init__(self, server: MonitorServer) -> None:
        self._server = server
        self._machine = server.machine
        self._held = False

    @property
    def _exports(self) -> Exports | None:
        if self._machine.doors is None:
            return None
        from vfiod.server.exports import exports_of

        return exports_of(self._machine)

    def hold(self) -> None:
        """Take nothing more from sessions, clients and those who connect: it waits in the kernel."""
        self._held = True
        self._server.hold()
        if self._exports is not None:
            self._exports.hold()

    def release(self) -> None:
        """Go on with all of them. Later calls do nothing."""
        if not self._held:
            return
        self._held = False
        if self._exports is not None:
            self._exports.release()
        self._server.release()

    def under_way(self) -> str | None:
        """What has begun and has not ended, for a person; None: all could be described now."""
        machine = under_way(self._machine)
        if machine is not None:
            return machine
        exports = None if self._exports is None else self._exports.under_way
        return exports if exports is not None else self._server.under_way

    def welcome(self) -> Welcome:
        """What there is. CannotKeep: something of it cannot be handed over."""
        state, _ = self._state()
        monitor = state.monitor
        listeners = [] if monitor is None else monitor.listeners
        sessions = [] if monitor is None else monitor.sessions
        sockets = [one.path for one in listeners] + [one.path for one in state.doors.exports]
        paths = [path for path in sockets if path is not None]
        roles = {one.role for one in listeners} | {one.role for one in sessions}
        return Welcome(
            state.machine.name, state.machine.uuid, state.program, state.needs, sorted(roles - {""}), sorted(paths)
        )

    def describe(self) -> tuple[bytes, list[int]]:
        """Everything, and the numbers of its fds, lent. CannotKeep."""
        self._machine.hub.flush()
        state, given = self._state()
        return encode(state), [number for _, number in given.fds]

    def _state(self) -> tuple[State, Given]:
        given = Given()
        try:
            machine = keep_machine(self._machine, given)
            doors = DoorsState() if self._exports is None else self._exports.keep(given)
            monitor = self._server.describe(given)
        except CannotKeep:
            raise
        except CommandError as error:
            raise CannotKeep(f"It cannot be handed over: {error}") from error
        needs = needs_of(machine) + (["exports"] if doors.exports else [])
        names = [name for name, _ in given.fds]
        return State(
            machine=machine, doors=doors, monitor=monitor, program=program_version(), needs=needs, names=names
        ), given


def missing(server: MonitorServer, welcome: Welcome, name: str | None) -> str | None:
    """Why this process cannot take what is offered, in a sentence; None: it can. Nothing has moved yet.

    Args:
        server: ours.
        welcome: what is offered.
        name: the VM's, as our options have it; None: any.

    """
    if name is not None and name != welcome.name:
        return f"It serves the VM '{welcome.name}', and this server was started for '{name}'"
    unknown = [role for role in welcome.roles if not server.has_role(role)]
    if unknown:
        return f"Its sockets have roles that this server was not given: {', '.join(unknown)} (--role)"
    strange = [need for need in welcome.needs if not _known(server, need)]
    return f"It has what this server does not know: {', '.join(strange)}" if strange else None


def prepare(server: MonitorServer, welcome: Welcome) -> None:
    """Import what is needed now, and make what holds devices: later everybody waits for that."""
    from vfiod.protocol.catalogue.devices import Driver
    from vfiod.server.state import doors, machine

    del doors, machine
    for need in welcome.needs:
        kind, _, what = need.partition(":")
        if kind == "device":
            from vfiod.server.devices import keeping
            from vfiod.server.devices.models import device_class

            del keeping
            device_class(Driver(what))
        elif need == "backend:mdev":
            assert server.machine.sources.mediated  # noqa: S101 - made when it is first looked at
        elif need == "backend:vfio-user":
            from vfiod.server.backends.vfio_user import keeping as served

            del served
            assert server.machine.sources.served  # noqa: S101 - made when it is first looked at
        elif kind == "backend":
            assert server.machine.sources.groups  # noqa: S101 - made when it is first looked at
        elif need == "exports":
            from vfiod.server.exports import exports_of

            exports_of(server.machine)


def _known(server: MonitorServer, need: str) -> bool:
    kind, _, what = need.partition(":")
    match kind:
        case "backend":
            return what in ("kernel-group", "kernel-cdev", "mdev", "vfio-user")
        case "device":
            from vfiod.server.devices.models import MODELS

            return what in [driver.value for driver in MODELS]
        case "mdev":
            parent, _, made_of = what.partition("/")
            return server.machine.mdevs.knows(parent, made_of)
    return need == "exports"


def adopt_everything(server: MonitorServer, state: State, taken: Taken) -> None:
    """Make all of it again in a server that has nothing. CommandError, OSError; then this process must just end."""
    adopt_machine(server.machine, state.machine, taken)
    if state.doors.exports:
        from vfiod.server.exports import exports_of

        exports_of(server.machine).adopt(state.doors, taken)
    if state.monitor is not None:
        server.adopt(state.monitor, taken)
