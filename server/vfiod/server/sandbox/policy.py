"""Which system calls the server may make, and with which arguments. Values only.

What is refused fails with EPERM, so that a library which tries something gets an answer it can live with; what only an
intruder asks for ends the process. ``clone3`` fails with ENOSYS: its arguments are in memory, where no filter sees
them, and the C library then takes ``clone``.
"""

from __future__ import annotations

import errno
from typing import Final

from vfiod.server.sandbox.bpf import Test, program, refuse
from vfiod.server.sandbox.calls import ALLOWED, BUS, DEADLY, MACHINES, Machine, numbers_of

__all__ = ["seccomp_filter"]

VFIO_TYPE: Final = 0x3B00
"""``';' << 8``: the ioctls of VFIO and iommufd (``<linux/vfio.h>``, ``<linux/iommufd.h>``)."""

_IOCTL_TYPE: Final = 0xFF00

IOCTLS: Final = {
    "TCGETS": 0x5401,  # isatty(3), ttyname(3), tcgetattr(3)
    "TCSETS": 0x5402,  # tcsetattr(3) of a pty: raw
    "TCSETSW": 0x5403,
    "TCSETSF": 0x5404,
    "TIOCGPTN": 0x80045430,  # openpty(3)
    "TIOCSPTLCK": 0x40045431,
    "TIOCGPTPEER": 0x5441,
    "TCGETS2": 0x802C542A,
    "TCSETS2": 0x402C542B,
    "TCSETSF2": 0x402C542D,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,  # socket.setblocking
    "FIONCLEX": 0x5450,  # os.set_inheritable
    "FIOCLEX": 0x5451,
}
"""Besides VFIO's (``<asm-generic/ioctls.h>``, the same on all three machines). TIOCSTI, which types for others, is not
among them."""

FCNTLS: Final = {
    "F_DUPFD": 0,
    "F_GETFD": 1,
    "F_SETFD": 2,
    "F_GETFL": 3,
    "F_SETFL": 4,
    "F_GETLK": 5,
    "F_SETLK": 6,
    "F_SETLKW": 7,
    "F_DUPFD_QUERY": 1027,
    "F_DUPFD_CLOEXEC": 1030,
    "F_GETPIPE_SZ": 1032,
    "F_ADD_SEALS": 1033,
    "F_GET_SEALS": 1034,
}
"""``<linux/fcntl.h>``. Not F_SETOWN and F_SETSIG: they send signals to others."""

PRCTLS: Final = {"PR_SET_NAME": 15, "PR_GET_NAME": 16, "PR_SET_VMA": 0x53564D41}
"""``<linux/prctl.h>``: names of threads and of memory."""

_PROT_WRITE, _PROT_EXEC = 2, 4
_MAP_PRIVATE, _MAP_KIND, _MAP_ANONYMOUS = 0x02, 0x0F, 0x20
_AF_UNIX, _SOCK_STREAM, _SOCK_KIND = 1, 1, 0x0F
_SCHED_OTHER: Final = 0

_THREAD: Final = 0x00000100 | 0x00000800 | 0x00010000
"""CLONE_VM, CLONE_SIGHAND, CLONE_THREAD (``<linux/sched.h>``)."""

_NEW_NAMESPACES: Final = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""


def seccomp_filter(name: str, pid: int, *, connect: bool, gids: frozenset[int], bus: bool = False) -> bytes | None:
    """Make the filter for a machine (``uname -m``); None when its numbers are not known.

    Args:
        name: of the machine.
        pid: this process.
        connect: sockets may be connected, too: Unix ones, as no others can be made.
        gids: files may be given to these groups.
        bus: ZeroMQ is in use.

    """
    machine = MACHINES.get(name)
    if machine is None:
        return None
    numbers = numbers_of(machine)
    judged = {numbers[call]: tests for call, tests in _judged(machine, pid, gids, bus=bus).items() if call in numbers}
    allowed = [
        *ALLOWED.split(),
        *(["connect"] if connect else []),
        *(BUS.split() if bus else []),
        *(["mmap"] if machine.mmap_in_memory else []),
    ]
    return program(
        machine,
        [numbers[call] for call in allowed if call in numbers],
        judged,
        [numbers[call] for call in DEADLY.split() if call in numbers],
        {numbers["clone3"]: refuse(errno.ENOSYS)},
        refuse(errno.EPERM),
    )


def _judged(machine: Machine, pid: int, gids: frozenset[int], *, bus: bool) -> dict[str, list[list[Test]]]:
    unix_stream = [[Test(0, _AF_UNIX), Test(1, _SOCK_STREAM, _SOCK_KIND)]]
    judged = {
        # An extension that is imported later is mapped as ld.so does it: a file's, private, not writable. Which file,
        # a filter cannot see; nothing anonymous, and nothing that was ever writable, becomes code.
        "mmap": [
            [Test(2, 0, _PROT_EXEC)],
            [Test(2, _PROT_EXEC, _PROT_EXEC | _PROT_WRITE), Test(3, _MAP_PRIVATE, _MAP_KIND | _MAP_ANONYMOUS)],
        ],
        "mprotect": [[Test(2, 0, _PROT_EXEC)]],
        "ioctl": [[Test(1, VFIO_TYPE, _IOCTL_TYPE)], *([Test(1, one)] for one in IOCTLS.values())],
        "fcntl": [[Test(1, one)] for one in FCNTLS.values()],
        # Streams only: a datagram needs no connect(2) to reach whoever it likes.
        "socket": unix_stream,
        "socketpair": unix_stream,
        "clone": [[Test(machine.clone_flags, _THREAD, _THREAD | _NEW_NAMESPACES)]],
        "prctl": [[Test(0, one)] for one in PRCTLS.values()],
        "tgkill": [[Test(0, pid)]],  # abort(3), raise(3)
        "prlimit64": [[Test(0, own), Test(2, 0, (1 << 64) - 1)] for own in (0, pid)],  # reading only
        "kcmp": [[Test(0, pid), Test(1, pid)]],
        "fchownat": [[Test(2, 0xFFFFFFFF), Test(3, gid)] for gid in sorted(gids)],
    }
    if bus:
        judged["sched_setscheduler"] = [[Test(1, _SCHED_OTHER)]]  # a thread of ZeroMQ, of itself, when it begins
    if machine.mmap_in_memory:
        del judged["mmap"]
    return judged
