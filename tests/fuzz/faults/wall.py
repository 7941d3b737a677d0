"""Fails the n-th system call of a real process: the kernel asks this one what becomes of it (``seccomp_unotify(2)``).

Nothing of the program is replaced, and it knows nothing: before it begins, a filter is put on its process that has the
kernel ask about the calls of :data:`WATCHED`. A thread here lets each go on, or makes it fail without having been made.
Calls are counted from when an :class:`~tests.fuzz.faults.injector.Injector` is armed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Final

from tests.fuzz.faults.injector import Injector

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.sandbox.calls import MACHINES, Machine, numbers_of

__all__ = ["WATCHED", "Wall", "possible"]

WATCHED: Final[tuple[str, ...]] = (
    *("socket", "connect", "accept4", "getsockopt", "sendto", "recvfrom", "sendmsg", "recvmsg", "poll", "ppoll"),
    *("epoll_ctl", "pidfd_open", "fcntl", "eventfd2", "memfd_create", "pipe2", "ftruncate", "pread64", "pwrite64"),
    "mmap",
)
"""What a take-over and the store of fds are made of. Of ``fcntl`` duplicates only, of ``mmap`` shared files only, of
``epoll_ctl`` additions only: the others do not fail."""

_CALLED: Final = {"fcntl": "dup", "ppoll": "poll", "pread64": "pread", "pwrite64": "pwrite"}
"""What a call is named in the tables, where that is not the kernel's name."""

_PIDFD_OPEN: Final = {"pidfd_open": 434}
"""The sandbox need not know it; new calls have one number everywhere."""

_F_DUPFD_CLOEXEC: Final = 1030
_MAP_SHARED: Final = 1
_EPOLL_CTL_ADD: Final = 1

_SELF_PIPE: Final = {"sendto": 1, "recvfrom": 4096}
"""Bytes: so asyncio wakes its loop from another thread, and believes that it cannot fail. Nobody else uses these."""

# <linux/seccomp.h>, <linux/bpf_common.h>
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_GO_ON: Final = 1
_NOTICE: Final = struct.Struct("=QIIiIQ6Q")
_ANSWER: Final = struct.Struct("=QqiI")

_DOOR: Final = 999
"""The fd by which the process hands its filter's ear over: what it does with that is not asked about."""

_BEGIN: Final = """
import ctypes, os, socket, struct, sys
text, number, door, wanted = bytes.fromhex(sys.argv[1]), *map(int, sys.argv[2:5])
libc = ctypes.CDLL(None, use_errno=True)
code = ctypes.create_string_buffer(text, len(text))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(text) // 8, ctypes.addressof(code)))
os.dup2(door, wanted, inheritable=False)
os.close(door)
door = socket.socket(fileno=wanted)
libc.prctl(1, 9, 0, 0, 0)
libc.prctl(38, 1, 0, 0, 0)
ear = libc.syscall(number, 1, 8, program)
if ear < 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
socket.send_fds(door, [b"E"], [ear])
door.close()
os.execv(sys.argv[5], sys.argv[5:])
"""
"""Dies with us (PR_SET_PDEATHSIG), puts the filter on itself, hands the ear over, and becomes the program."""


def possible() -> bool:
    """Whether this machine's numbers are known, and its kernel asks."""
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as known:
            return os.uname().machine in MACHINES and "user_notif" in known.read()
    except OSError:
        return False


def _filter(machine: Machine, watched: dict[int, str]) -> bytes:
    """``struct sock_filter[]``: ask about what is watched, let all else pass."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number, name in watched.items():
        if name == "fcntl":
            block = [(_LOAD, 0, 0, _argument(machine, 1)), (_EQUAL, 1, 0, _F_DUPFD_CLOEXEC)]
        elif name == "epoll_ctl":
            block = [(_LOAD, 0, 0, _argument(machine, 1)), (_EQUAL, 1, 0, _EPOLL_CTL_ADD)]
        elif name == "mmap":
            block = [(_LOAD, 0, 0, _argument(machine, 3)), (_SET, 1, 0, _MAP_SHARED)]
        elif name in _SELF_PIPE:
            block = [(_LOAD, 0, 0, _argument(machine, 2)), (_EQUAL, 0, 1, _SELF_PIPE[name])]
        else:
            block = [(_LOAD, 0, 0, _argument(machine, 0)), (_EQUAL, 0, 1, _DOOR)]
        block += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOTIFY)]
        code += [(_EQUAL, 0, len(block), number), *block]
    code.append((_RETURN, 0, 0, _ALLOW))
    pack = struct.Struct("=HBBI").pack
    return b"".join(pack(*one) for one in code)


def _argument(machine: Machine, number: int) -> int:
    return _ARGUMENTS + 8 * number + 4 * machine.big_endian


class Wall:
    """A process, and who answers the kernel about it.

    Args:
        command: the program, and its arguments.
        stderr: its log.
        environment: of the process; None: ours.
        children: not its own calls count, but those of the processes that it starts.
        injector: armed from the beginning; see :meth:`arm`.
        since: see :meth:`arm`.

    Attributes:
        process: the process.

    """

    def __init__(
        self,
        command: Sequence[str],
        stderr: IO[str],
        environment: dict[str, str] | None = None,
        *,
        children: bool = False,
        injector: Injector | None = None,
        since: str | None = None,
    ) -> None:
        machine = MACHINES[os.uname().machine]
        numbers = numbers_of(machine) | _PIDFD_OPEN
        self._names = {numbers[name]: name for name in WATCHED if name in numbers}
        text = _filter(machine, self._names)
        self._children = children
        self._injector = injector
        self._since = since
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(120)
            known = (text.hex(), str(numbers["seccomp"]), str(theirs.fileno()), str(_DOOR))
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, *known, *command],
                stderr=stderr,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            _, [ear], _, _ = socket.recv_fds(ours, 1, 1)
        self._ear = FileDescriptor(ear)
        self._stop = FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC))
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def arm(self, injector: Injector, since: str | None = None) -> None:
        """From now on the process's calls are this one's.

        Args:
            injector: counts them, and fails one.
            since: a call before which none counts.

        """
        self._since = since
        self._injector = injector

    def disarm(self) -> None:
        """From now on nothing fails."""
        self._injector = None

    def close(self) -> None:
        """The process is dead: answer no more. Later calls do nothing."""
        if self._ear.closed:
            return
        self.process.wait(120)
        os.eventfd_write(self._stop.number, 1)
        self._thread.join(120)
        self._stop.close()
        self._ear.close()

    def _answer(self) -> None:
        looked = select.poll()
        looked.register(self._ear.number, select.POLLIN)
        looked.register(self._stop.number, select.POLLIN)
        notice, answer = bytearray(_NOTICE.size), bytearray(_ANSWER.size)
        while True:
            told = dict(looked.poll())
            if self._stop.number in told or not told.get(self._ear.number, 0) & select.POLLIN:
                return  # nobody is left who could ask
            notice[:] = bytes(_NOTICE.size)
            try:
                fcntl.ioctl(self._ear.number, _RECEIVE, notice)
                id, thread, _, number, *_ = _NOTICE.unpack(notice)
                code = self._judge(self._names[number], thread)
                answer[:] = _ANSWER.pack(id, 0, -code, 0 if code else _GO_ON)
                fcntl.ioctl(self._ear.number, _SEND, answer)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.ENOTCONN):  # it was killed meanwhile
                    raise

    def _judge(self, name: str, thread: int) -> int:
        """0, or what the call says."""
        injector = self._injector
        if injector is None or (self._children and os.path.exists(f"/proc/{self.process.pid}/task/{thread}")):
            return 0
        if self._since is not None:
            if name != self._since:
                return 0
            self._since = None
        return injector.meet(_CALLED.get(name, name))
