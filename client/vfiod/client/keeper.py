"""``vfiod keeper``: without systemd, a small process that holds a vfiod's fds, and starts it again when it dies.

It speaks what systemd speaks (``sd_notify(3)``: FDSTORE, FDNAME, FDPOLL, FDSTOREREMOVE, BARRIER, MAINPID) on its own
socket, and gives everything back as systemd does (``sd_listen_fds(3)``), so that vfiod knows one way only; and
X_VFIOD_TAKER, which process it is about to give everything to: systemd has the unit's control group for that. It
opens nothing, reads nothing of what it holds, and lets nobody but its own vfiod speak: by SCM_CREDENTIALS.

vfiod ends with status 0: so does the keeper. It ends otherwise, or is killed: it is started again with its fds, unless
it dies too often. The keeper is told to end: so is vfiod, and is waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from vfiod.client.serve import server_command
from vfiod.protocol.fd import FileDescriptor, close_all, rights_of

__all__ = ["Keeper", "main"]

MOST_FDS: Final = 16384
"""fds it holds at most: what ``FDSTORE`` tells vfiod, and ``FileDescriptorStoreMax=`` in the unit for systemd."""

MESSAGE_BYTES: Final = 4096
"""Of one datagram; systemd's NOTIFY_BUFFER_MAX is the page size, too."""

RIGHTS: Final = 253
"""fds of one datagram (SCM_MAX_FD)."""

CREDENTIALS: Final = struct.Struct("=iII")
"""``struct ucred`` (``unix(7)``): pid, uid, gid."""

RESTARTS: Final = 5
WINDOW_SECONDS: Final = 60.0
"""So many deaths within so long are no accident: it is not started again."""

FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PASSED_ON: Final = frozenset({"READY", "STATUS", "STOPPING", "RELOADING", "ERRNO", "WATCHDOG", "EXTEND_TIMEOUT_USEC"})
"""What whoever started the keeper wants to hear, too."""

NAME: Final = re.compile(r"[\x20-\x39\x3b-\x7e]{1,255}")
"""Of an fd (``fdname_is_valid``)."""

MOST_DIGITS: Final = 10
"""Of the number of a process (``PID_MAX_LIMIT`` is 4,194,304)."""

KEEPER: Final = "VFIOD_KEEPER"
"""Tells vfiod that it is us, and no service manager with rules of its own about who may follow whom."""

FIRST: Final = 3
"""SD_LISTEN_FDS_START."""


class Keeper:
    """One vfiod, and what is held for it.

    Args:
        arguments: of ``vfiod serve``.
        restarts: deaths within :data:`WINDOW_SECONDS` after which it is given up.
        inherited: how many fds, from number 3 on, are vfiod's as they are: it gets them each time.

    """

    def __init__(self, arguments: list[str], *, restarts: int = RESTARTS, inherited: int = 0) -> None:
        self._command = server_command(arguments)
        self._restarts = restarts
        self._held: list[tuple[str, int]] = []
        self._deaths: deque[float] = deque()
        self._ending = False
        self._ready = False
        self._pid = 0
        self._pidfd: FileDescriptor | None = None  # of one that took the place of ours: no child, its end is seen so
        self._former: list[tuple[int, FileDescriptor | None]] = []  # whose place was taken, and which may live yet
        self._takers: dict[int, FileDescriptor] = {}  # that may have everything of vfiod's, and own nothing yet
        self._waiting: selectors.BaseSelector | None = None
        self._inherited = tuple(range(FIRST, FIRST + inherited))
        self._outer = _outer_notifier()

    def run(self) -> int:
        """Until vfiod has ended for good. Its exit status; 128 + N for signal N."""
        with (
            tempfile.TemporaryDirectory(prefix="vfiod-keeper-") as place,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify,
            _woken_by_signals() as woken,
            selectors.DefaultSelector() as waiting,
        ):
            path = str(Path(place) / "notify")
            notify.bind(path)
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            waiting.register(notify, selectors.EVENT_READ)
            waiting.register(woken, selectors.EVENT_READ)
            self._waiting = waiting
            os.environ["NOTIFY_SOCKET"], os.environ["FDSTORE"] = path, str(MOST_FDS)
            os.environ[KEEPER] = str(os.getpid())
            self._start()
            while True:
                waiting.select()
                status = self._look(notify, woken)
                if status is not None:
                    for pidfd in [*self._takers.values(), *(one for _, one in self._former if one is not None)]:
                        pidfd.close()  # they end by themselves: there is nobody they could have anything from
                    return status

    def _look(self, notify: socket.socket, woken: socket.socket) -> int | None:
        """See to what has happened. vfiod's last exit status, when that was it."""
        numbers: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            numbers = set(woken.recv(MESSAGE_BYTES))
        for number in sorted(numbers & set(FORWARDED)):
            self._ending |= number in (signal.SIGTERM, signal.SIGINT)
            self._signal(number)
        pid, ended = self._pid, self._has_ended()
        # The last words of a dead one are in the queue, and carry its number: they are heard before it is waited for.
        while self._hear(notify):
            pass
        for one in list(self._former):
            if _gone(*one):
                self._former.remove(one)
        for taker, pidfd in list(self._takers.items()):
            if _readable(pidfd, 0):
                self._forget(taker).close()
        return self._reap() if ended and pid == self._pid else None

    # --- its life -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._ready = False
        self._pid = os.fork()
        if not self._pid:
            self._become()

    def _become(self) -> NoReturn:
        """In the child: put everything where vfiod looks for it, and become vfiod."""
        try:
            names = ["inherited"] * len(self._inherited) + [name for name, _ in self._held]
            fds = [*self._inherited, *(number for _, number in self._held)]
            # First out of the way: a number that is wanted may be another one's now.
            above = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, FIRST + len(fds)) for number in fds]
            for place, number in enumerate(above, FIRST):
                os.dup2(number, place)
            if fds:
                os.environ["LISTEN_PID"] = str(os.getpid())
                os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"] = str(len(fds)), ":".join(names)
            os.execve(self._command[0], self._command, os.environ)  # noqa: S606 - no shell, by intention
        except OSError as error:
            print(f"vfiod keeper: cannot run {self._command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)

    def _signal(self, number: int) -> None:
        if self._pidfd is None:
            os.kill(self._pid, number)  # it is not waited for yet: nobody else can have its number
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd.number, number)

    def _has_ended(self) -> bool:
        if self._pidfd is None:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return _readable(self._pidfd, 0)

    def _announced(self, said: str) -> None:
        """A process is about to be given everything of vfiod's: should that die first, it is in the way of the next."""
        pid = _number(said)
        if pid in self._takers or pid == self._pid:
            return
        try:
            pidfd = FileDescriptor(os.pidfd_open(pid))
        except OSError as error:
            _say(f"process {said} cannot be watched: {error}")
            return
        self._takers[pid] = pidfd
        self._watch(pidfd)

    def _forget(self, taker: int) -> FileDescriptor:
        """It is watched no more; the caller has its pidfd."""
        pidfd = self._takers.pop(taker)
        self._unwatch(pidfd)
        return pidfd

    def _follow(self, said: str) -> None:
        """Another process has taken vfiod's place: it is the one to be looked after, and heard, from now on."""
        pid = _number(said)
        if pid == self._pid:
            return
        self._announced(said)
        if pid not in self._takers:
            return  # it is dead, and so it is said to whoever wanted it to follow
        if self._pidfd is not None:
            self._unwatch(self._pidfd)
        self._former.append((self._pid, self._pidfd))
        self._pid, self._pidfd = pid, self._takers.pop(pid)
        if self._ending:
            self._signal(signal.SIGTERM)  # the former was told, and has given its place away instead

    def _watch(self, pidfd: FileDescriptor) -> None:
        assert self._waiting is not None  # noqa: S101 - it was said while we wait
        self._waiting.register(pidfd.number, selectors.EVENT_READ)

    def _unwatch(self, pidfd: FileDescriptor) -> None:
        assert self._waiting is not None  # noqa: S101 - it was watched
        self._waiting.unregister(pidfd.number)

    def _clear_the_place(self) -> None:
        """Nobody but the next vfiod may have anything: neither who gave its place away, nor who wanted to take it.

        A taker has all of a vfiod that died while it gave, its listening sockets among it, and owns nothing: the word
        that would make it the owner will not come.
        """
        for one in self._former:
            _put_away(*one)
        self._former.clear()
        for taker in list(self._takers):
            _put_away(taker, self._forget(taker))

    def _reap(self) -> int | None:
        """See off a vfiod that has ended, and start it again if that is to be."""
        if self._pidfd is None:
            _, status = os.waitpid(self._pid, 0)
            code = os.waitstatus_to_exitcode(status)
            last = code if code >= 0 else 128 - code
            if code == 0 or self._ending or (code > 0 and not self._ready and not self._deaths):
                return last  # as asked; or the first could not begin, and says why
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        else:
            # No child of ours: how it ended nobody tells us. One that ends as asked takes all it has out first.
            self._unwatch(self._pidfd)
            self._pidfd.close()
            self._pidfd = None
            last = 1 if self._held else 0
            if not self._held or self._ending:
                return last
            how = "that had taken the place of ours is dead"
        self._clear_the_place()
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > self._restarts:
            often = f"the last of {len(self._deaths)} times within {WINDOW_SECONDS:g} s"
            _say(f"vfiod {how}, {often}: its devices are let go")
            return last
        _say(f"vfiod {how}: starting it again with {len(self._held)} fds")
        self._start()
        return None

    # --- what vfiod says ------------------------------------------------------------------------------------

    def _hear(self, notify: socket.socket) -> bool:
        """One datagram. Whether there was one."""
        room = socket.CMSG_SPACE(RIGHTS * 4) + socket.CMSG_SPACE(CREDENTIALS.size)
        try:
            data, ancillary, flags, _ = notify.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        fds = rights_of(ancillary)
        try:
            sender = next(
                (CREDENTIALS.unpack(body)[0] for _, kind, body in ancillary if kind == socket.SCM_CREDENTIALS), 0
            )
            if sender == self._pid and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._obey(data.decode(errors="replace"), fds)
        finally:
            close_all(fds)  # BARRIER=1 is this: its pipe is closed once everything before it was done
        return True

    def _obey(self, text: str, fds: list[FileDescriptor]) -> None:
        lines = text.splitlines()
        said = dict(line.partition("=")[::2] for line in lines)
        name = said.get("FDNAME", "stored")
        if said.get("FDSTOREREMOVE") == "1":
            for _, number in [one for one in self._held if one[0] == name]:
                os.close(number)
            self._held = [one for one in self._held if one[0] != name]
        elif said.get("FDSTORE") == "1":
            for fd in fds:
                self._keep(name, fd)
        if "X_VFIOD_TAKER" in said:
            self._announced(said["X_VFIOD_TAKER"])
        if "MAINPID" in said:
            self._follow(said["MAINPID"])
        self._ready |= said.get("READY") == "1"
        rest = [line for line in lines if line.partition("=")[0] in PASSED_ON]
        if self._outer is not None and rest:
            with contextlib.suppress(OSError):
                self._outer.send("\n".join(rest).encode())

    def _keep(self, name: str, fd: FileDescriptor) -> None:
        if not NAME.fullmatch(name):
            _say(f"an fd called {name!r} is not kept: a name has 1 to 255 printable characters, and no colon")
        elif len(self._held) >= MOST_FDS:
            _say(f"an fd called '{name}' is not kept: there are {MOST_FDS} already")
        else:
            self._held.append((name, fd.give_away()))


def _number(said: str) -> int:
    """The number of a process; 0: it is none."""
    return int(said) if said.isascii() and said.isdigit() and len(said) < MOST_DIGITS else 0


def _readable(pidfd: FileDescriptor, milliseconds: int | None) -> bool:
    """Whether a process has ended; waits for that."""
    waiting = select.poll()
    waiting.register(pidfd.number, select.POLLIN)
    return bool(waiting.poll(milliseconds))


def _gone(pid: int, pidfd: FileDescriptor | None) -> bool:
    """Whether a process has ended whose place was taken; then it is waited for, if it was a child."""
    if pidfd is None:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    ended = _readable(pidfd, 0)
    if ended:
        pidfd.close()
    return ended


def _put_away(pid: int, pidfd: FileDescriptor | None) -> None:
    """End one whose place was taken, and wait for that."""
    if pidfd is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return
    with pidfd:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd.number, signal.SIGKILL)
        _readable(pidfd, None)


def _say(text: str) -> None:
    print(f"vfiod keeper: {text}", file=sys.stderr, flush=True)


def _outer_notifier() -> socket.socket | None:
    """Whoever has started the keeper, and wants to know when vfiod is ready."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return None
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        made.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        made.close()
        _say(f"cannot notify {address}: {error.strerror}")
        return None
    return made


@contextlib.contextmanager
def _woken_by_signals() -> Iterator[socket.socket]:
    """A socket that says which signals came, a byte each."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield ours
        finally:
            # vfiod has ended, and so do we: one more wish for it would turn a clean end into a death by signal.
            for number in FORWARDED:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)


def _count_inherited(arguments: list[str]) -> int:
    """How many fds, from 3 on, vfiod was told of (``--qmp fd=3``)."""
    told = [int(number) for word in arguments for number in re.findall(r"(?:^|=)fd=(\d{1,6})(?:,|$)", word)]
    return max(told, default=FIRST - 1) - FIRST + 1


def parser() -> argparse.ArgumentParser:
    """The command line, up to ``--``."""
    made = argparse.ArgumentParser(
        "vfiod keeper",
        usage="vfiod keeper [--restarts N] -- OPTION OF VFIOD SERVE ...",
        description="Run 'vfiod serve', hold its fds beside it, and start it again with them when it dies: no device "
        "is lost to a crash. Under systemd the unit does that (FileDescriptorStoreMax=), and needs no keeper.",
        epilog="Exit status: vfiod's; 128 + N when signal N ended it.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--restarts", type=int, default=RESTARTS, metavar="N",
        help=f"give up at more than N deaths within {WINDOW_SECONDS:g} s (default: {RESTARTS})",
    )  # fmt: skip
    return made


def main(argv: list[str]) -> int:
    """Run a vfiod, and hold its fds. Its exit status."""
    at = argv.index("--") if "--" in argv else len(argv)
    serve = argv[at + 1 :]
    options = parser().parse_args(argv[:at])
    if not serve:
        parser().error("put '--' and the options of 'vfiod serve' at the end")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return Keeper(serve, restarts=options.restarts, inherited=_count_inherited(serve)).run()
