"""The process: what it checks before it begins, when it is ready, and the order in which it ends.

Exit status: 0 when it was asked to end (a signal, ``quit``) and closed every device; 1 when it could not begin, or
something could not be closed; 2 for wrong options.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from vfiod.protocol.catalogue.monitor import ShutdownCause
from vfiod.protocol.errors import VfiodError
from vfiod.server import logs, trace
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.kernel import signalling
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.loop import new_loop
from vfiod.server.machine import Machine
from vfiod.server.monitor.server import MonitorServer, belongs_to
from vfiod.server.notify import Notifier, control_group
from vfiod.server.options import BusOption, OptionError, Options, SocketOption, parse
from vfiod.server.sandbox.entry import Wanted, confine, restrict
from vfiod.server.sockets import listener
from vfiod.server.sockets.access import Access, overflow_uid
from vfiod.server.supervised import Supervised

if TYPE_CHECKING:
    from vfiod.server.daemon import Daemon
    from vfiod.server.journal import Journal
    from vfiod.server.monitor.audit import Audit
    from vfiod.server.monitor.metrics_door import MetricsDoor
    from vfiod.server.state.doors import StoreState
    from vfiod.server.state.fds import Taken
    from vfiod.server.store.current import Current
    from vfiod.server.store.fdstore import FdStore
    from vfiod.server.takeover.taker import TakingOver

__all__ = ["main", "serve"]

_log: Final = logging.getLogger("vfiod")

LAST_REPLIES_SECONDS: Final = 1.0
"""How long the last replies and events may take to leave."""


class StartError(VfiodError):
    """The server cannot begin."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except OptionError as error:
        logs.complain(str(error))
        return 2
    with contextlib.ExitStack() as stack:
        daemon = _daemon(stack) if options.daemonize else None
        try:
            journal = _begin_log(options)
            refuse_overflow_uid()
            raise_open_files()
            signalling.interruptible()
            for pattern in options.trace:
                if not trace.switch(pattern, True):
                    raise StartError(f"--trace '{pattern}' matches no trace point")
            with asyncio.Runner(loop_factory=new_loop) as runner:
                clean = runner.run(serve(options, journal, daemon))
        except VfiodError as error:
            logs.complain(str(error))  # and only then does who waits for a daemon hear of its end
            return 1
    return 0 if clean else 1


def _daemon(stack: contextlib.ExitStack) -> Daemon:
    """Go on in a child, before there are threads, fds or a loop of ours."""
    from vfiod.server.daemon import Daemon

    return stack.enter_context(Daemon())


def _begin_log(options: Options) -> Journal | None:
    try:
        return logs.begin(options.log_level, options.log_format, vm=options.name)
    except OSError as error:
        raise StartError(f"--log-format journal: the journal does not answer: {error.strerror}") from error


def refuse_overflow_uid(own: int | None = None) -> None:
    """Refuse to run as the user that stands for every unmapped one: any of them could come in as "ourselves"."""
    own = os.geteuid() if own is None else own
    if own == overflow_uid():
        raise StartError(f"vfiod does not run as uid {own}, the kernel's overflow uid: give it a user of its own")


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one: devices and their vectors take many, and ``select`` none.

    The usual soft limit (1,024) is there for programs that call ``select(2)``; see ``setrlimit(2)`` and systemd's
    "File Descriptor Limits".
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        _log.warning("The limit of open files stays %d: it cannot be raised to %d: %s", soft, hard, error)


ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""What asks the server to close its devices and end."""


async def serve(options: Options, journal: Journal | None = None, daemon: Daemon | None = None) -> bool:
    """Run until asked to end. Returns whether everything could be closed. Raises VfiodError when it cannot begin."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        taking = _taking(options, stack)
        # The pidfile of the server whose place is taken is free when that has ended.
        pidfile = None if options.pidfile is None or taking else stack.enter_context(Pidfile(options.pidfile))
        hub = EventHub(loop.call_later)
        machine = _machine(options, hub)
        audit = _audit(options, stack, journal)
        access = Access(options.allow_uid)
        server = MonitorServer(loop, machine, hub, access, kind_of, TABLE, roles=options.roles, audit=audit)
        supervised = Supervised(loop, hub, options, lambda: len(machine.devices.all()), journal)
        stack.callback(supervised.close)
        metrics: MetricsDoor | None = None
        store: Current | None = None
        try:
            # Before the doors: who finds one may ask for the end at once, and that is an orderly one.
            for number in ENDING_SIGNALS:
                loop.add_signal_handler(number, server.shut_down, ShutdownCause.HOST_SIGNAL)
            # The bus and the metrics have threads, and come after what is a thread's own (confine). They come first of
            # the doors, too: who finds the monitor finds all of it. Without them, sockets are made with all rights.
            kept = None if taking else _kept(options, supervised.notifier)
            threads = bool(
                taking or kept or options.bus or options.events or options.metrics_path or options.metrics_port
            )
            wanted = _sandbox(options, to_be_made=threads, taken=() if taking is None else taking.welcome.paths)
            if threads:
                confine(wanted)
            if kept is not None:
                store = await _begin(machine, kept)
                server.on_change = store.ended
            if taking is not None:
                store = await _take(taking, server, options, supervised)
                if options.pidfile is not None:
                    with _besides(taking):
                        pidfile = stack.enter_context(Pidfile(options.pidfile))
            with _besides(taking):
                _listen_bus(server, options)
            with _besides(taking):
                metrics = await _listen_metrics(server, machine, access, options)
            for option in reversed(options.sockets):  # the first last: who finds that one finds all of them
                with _besides(taking):
                    _listen(server, option, options.socket_gid)
            with _besides(taking):
                if options.hand_over is not None and not server.listens_at(options.hand_over):
                    listening = listener.open_path(options.hand_over)
                    _hand_over_at(server, listening, options.hand_over, store, supervised)
            if not threads:
                confine(wanted)
            if pidfile is not None:
                with _besides(taking):
                    pidfile.write()
            restrict(wanted)
            # What is here now stays: later collections need not look at it, and children of a fork share it.
            gc.freeze()
            gc.enable()
            supervised.ready()
            doors = [*options.sockets, *(one for one in (options.bus, options.events) if one is not None)]
            _log.info("Serving %s on %s", machine.name, ", ".join(map(str, doors)))
            if daemon is not None:
                daemon.ready()  # after the last word that whoever waits for it may look for
            cause = await server.closing
            _log.info("Ending: %s", cause)
        except Exception as error:
            if store is not None and machine.devices.all():
                _leave_to_the_next(error)
            raise
        finally:
            supervised.stopping()
            if store is not None:
                await store.end()
            # Sessions are served until all is closed: who asks then is told that we are ending.
            problems = await machine.close()
            hub.flush()
            server.stop_listening()
            if metrics is not None:
                await metrics.close()
            await server.drain(LAST_REPLIES_SECONDS)
            server.close()
            for number in ENDING_SIGNALS:
                # All is closed. The loop's own end would set these back to "die", and one more of them, late, would
                # turn a clean end into a death by signal.
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
    if machine.stuck:
        # A thread hangs in the kernel: the interpreter would wait for it for ever. All of ours is put away.
        logging.shutdown()
        os._exit(1)
    return not problems


def _leave_to_the_next(error: Exception) -> NoReturn:
    """End as one that was killed: orderly, we would let go devices whose guests run, for want of a socket, say.

    Whoever keeps the fds starts the next server with all of them (docs/restarts.md).
    """
    known = isinstance(error, (VfiodError, OSError))
    what = "This server ends, and the next one goes on with what is in the store: %s"
    _log.critical(what, error, exc_info=None if known else error)
    logging.shutdown()
    os._exit(1)


def _kept(options: Options, notifier: Notifier) -> FdStore | None:
    """Whoever keeps fds for us; None: nobody does, or shall."""
    from_us = os.environ.pop("VFIOD_KEEPER", None) is not None
    told = os.environ.pop("FDSTORE", "")
    if options.fd_store == "on" and notifier.datagrams is None:
        raise StartError("--fd-store on: nobody keeps fds for this process ($NOTIFY_SOCKET is not set)")
    kept = options.fd_store == "on" or (options.fd_store == "auto" and told.isdecimal() and int(told) > 0)
    if not kept:
        return None
    if notifier.datagrams is None:
        # Whoever starts us has them still, and gives them to the next one; this one would begin without any.
        raise StartError("--fd-store auto: whoever keeps fds for this process cannot be reached ($NOTIFY_SOCKET)")
    from vfiod.server.store.fdstore import FdStore

    return FdStore(notifier.datagrams, None if from_us else control_group())


async def _begin(machine: Machine, kept: FdStore) -> Current:
    """Take over what a dead server has left there, before anybody may come in."""
    from vfiod.server.commands.monitor import VERSION
    from vfiod.server.store.restore import begin

    triple = VERSION.qemu
    return await begin(machine, kept, f"{triple.major}.{triple.minor}.{triple.micro}")


def _taking(options: Options, stack: contextlib.ExitStack) -> TakingOver | None:
    """Connect to the server whose place is taken, if one is: before the sandbox closes, and before anything is made."""
    if options.take_over is None:
        return None
    from vfiod.server.takeover.taker import TakingOver

    taking = TakingOver(options.take_over, orphan=options.daemonize)
    stack.callback(taking.close)
    return taking


@contextlib.contextmanager
def _besides(taking: TakingOver | None) -> Iterator[None]:
    """What is opened besides what was taken over: whoever owns a VM's devices by now does without it and goes on."""
    try:
        yield
    except (VfiodError, OSError) as error:
        if taking is None:
            raise
        _log.error("What was taken over is served; what could not be opened besides: %s", error)


async def _take(taking: TakingOver, server: MonitorServer, options: Options, supervised: Supervised) -> Current | None:
    """Take everything over, its store of fds too, if it has one. StartError, Refused: the other server keeps it."""
    from vfiod.server.machine.keeping import rehome
    from vfiod.server.state.fds import Taken
    from vfiod.server.state.format import decode
    from vfiod.server.takeover.server import STORE, adopt_everything, missing, prepare

    if any(need.startswith("mdev:") for need in taking.welcome.needs):
        await server.machine.mdevs.discover()
    reason = missing(server, taking.welcome, options.name or None)
    if reason is None and STORE in taking.welcome.needs and options.fd_store == "off":
        reason = "Its fds are kept in a store, which this server shall not have (--fd-store off)"
    if reason is not None:
        taking.refuse(reason)
        raise StartError(reason)
    prepare(server, taking.welcome)
    data, fds = taking.receive()
    taken = Taken(fds)
    store: Current | None = None
    try:
        state = decode(data)
        if state.store is not None:
            store = _go_on(server, state.store, taken, supervised)
        adopt_everything(server, state, taken)
        for one in () if state.monitor is None else state.monitor.listeners:
            if one.dialect == HAND_OVER:
                handing = socket.socket(fileno=taken.take(one.fd).give_away())
                _hand_over_at(server, handing, one.path, store, supervised)
        taking.own()
    except BaseException as error:  # noqa: BLE001 - whatever it is: nothing here may be closed, it is another's
        taking.refuse(str(error))
        logs.complain(f"Taking over failed, the running server goes on: {error}")
        logging.shutdown()
        os._exit(1)
    if store is not None:
        store.take_up()
    taken.close()
    taking.wait_for_end()
    taking.close()
    for problem in rehome(server.machine):
        _log.warning("%s", problem)
    _log.info("Took over the VM '%s' from vfiod %s", server.machine.name, taking.welcome.program)
    return store


def _go_on(server: MonitorServer, state: StoreState, taken: Taken, supervised: Supervised) -> Current:
    """The store of the server whose place is taken; nothing is written or said yet."""
    from vfiod.server.store.restore import go_on
    from vfiod.server.takeover.whole import program_version

    notify = socket.socket(fileno=taken.take(state.notify).give_away())
    supervised.follow(notify, state.watchdog)
    store = go_on(server.machine, state, taken, notify, program_version())
    server.on_change = store.ended
    return store


HAND_OVER: Final = "take-over"
"""What a hand-over's listening socket is called among those of the monitor."""


def _hand_over_at(
    server: MonitorServer, listening: socket.socket, path: str | None, store: Current | None, supervised: Supervised
) -> None:
    """Let a new process take everything over by this socket."""
    from vfiod.server.takeover.giver import HandOver

    def leave(status: int) -> NoReturn:
        # Everything is the other process's: whatever is closed or told here would be closed or told for it.
        logging.shutdown()
        os._exit(status)

    made = server.listen_for(listening, HAND_OVER, HandOver(server, leave, store, supervised.watched).admit)
    belongs_to(made, path)


def _sandbox(options: Options, *, to_be_made: bool, taken: Iterable[str] = ()) -> Wanted:
    """What the program keeps of its rights.

    Args:
        options: of the program.
        to_be_made: the sockets are not there yet, so their directories stay writable even when others use them, too.
        taken: socket files that come from another server.

    """
    buses = [one for one in (options.bus, options.events) if one is not None]
    doors = [*(one.path for one in options.sockets), *(one.path for one in buses), options.metrics_path, *taken]
    doors.append(options.hand_over)
    ports = [one.port for one in buses if one.path is None]
    if options.metrics_port is not None:
        ports.append(options.metrics_port[1])
    return Wanted(
        mode=options.sandbox,
        sockets=tuple(path for path in (*doors, options.pidfile) if path is not None),
        sockets_to_come=to_be_made,
        paths=options.allow_paths
        + tuple(f"ro:{path}" for path in (options.bus_key, options.bus_clients) if path is not None),
        configuration=options.config,
        ports=tuple(ports),
        host_devices=options.allow_open,
        connect=options.allow_connect,
        gid=options.socket_gid,
        bus=bool(buses),
    )


def _machine(options: Options, hub: EventHub) -> Machine:
    if options.uuid is None:
        return Machine(options.name, hub=hub, allow_open=options.allow_open, allow_uid=options.allow_uid)
    return Machine(options.name, options.uuid, hub=hub, allow_open=options.allow_open, allow_uid=options.allow_uid)


def _listen(server: MonitorServer, option: SocketOption, gid: int | None) -> None:
    if option.path is not None and server.listens_at(option.path):
        return  # it came from the server whose place was taken
    server.role(option.role)  # a wrong name is said before the socket is there
    if option.path is None:
        server.listen(listener.inherit(option.fd or 0), option.dialect, option.role)
        return
    made = server.listen(listener.open_path(option.path, gid), option.dialect, option.role)
    made.remove_at_close(option.path)


def _audit(options: Options, stack: contextlib.ExitStack, journal: Journal | None) -> Audit | None:
    if options.audit is None:
        return None
    from vfiod.server.monitor.audit import Audit

    audit = Audit(options.audit, journal)
    stack.callback(audit.close)
    return audit


def _listen_bus(server: MonitorServer, options: Options) -> None:
    """Open the bus, when one is asked for: ZeroMQ and msgpack are imported for nobody else."""
    if options.bus is None and options.events is None:
        return
    from vfiod.server.monitor.bus import Bus, EventBus
    from vfiod.server.monitor.bus_socket import Address

    def address(option: BusOption) -> Address:
        return Address(
            path=option.path,
            host=option.host,
            port=option.port,
            secret_key=options.bus_key or "",
            client_keys=options.bus_clients or "",
            uids=options.allow_uid,
        )

    if options.bus is not None:
        server.join_bus(Bus(server, address(options.bus)))
    if options.events is not None:
        server.join_bus(EventBus(server, address(options.events)))


async def _listen_metrics(
    server: MonitorServer, machine: Machine, access: Access, options: Options
) -> MetricsDoor | None:
    if options.metrics_path is None and options.metrics_port is None:
        return None
    from vfiod.server.commands.monitor import VERSION
    from vfiod.server.monitor.metrics import render
    from vfiod.server.monitor.metrics_door import MetricsDoor

    triple = VERSION.qemu
    version = f"{triple.major}.{triple.minor}.{triple.micro}"

    def text() -> str:
        names = [device.name for device in machine.devices.all()]
        devices = list(zip(names, machine.device_stats(), strict=True))
        return render(machine.name, machine.uuid, version, machine.stats(), devices, server.session_stats())

    door = MetricsDoor(access, text)
    if options.metrics_path is not None:
        await door.listen_path(options.metrics_path, options.socket_gid)
    elif options.metrics_port is not None:
        await door.listen_tcp(*options.metrics_port)
    return door


class Pidfile:
    """A file that is locked while the process lives, and names it once it is ready. Removed at the end.

    The lock is a record lock (``fcntl(2)``), as QEMU's. Raises StartError when another process holds it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> Pidfile:
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StartError(f"Cannot open the pidfile '{self._path}': {error.strerror}") from error
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise StartError(f"The pidfile '{self._path}' is locked: another server uses it") from error
        return self

    def write(self) -> None:
        """Name this process: it is ready."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._fd)
