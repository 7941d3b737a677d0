"""Give up what is not needed, for good: privileges and files first, system calls last.

:func:`confine` comes before the first thread (capabilities and Landlock are a thread's own, and its children's), and
after what has to be opened with more rights. :func:`restrict` comes when all is ready; it takes hold of every thread
there is by then. What a kernel does not have is left out, and said.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable
from typing import Final

from vfiod.server.kernel import confinement
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.sandbox import limits
from vfiod.server.sandbox.calls import MACHINES, numbers_of
from vfiod.server.sandbox.landlock import BIND_TCP, Rule, file_rights, ruleset
from vfiod.server.sandbox.policy import seccomp_filter
from vfiod.server.sandbox.raw import address_of, syscall

__all__ = ["confine", "restrict"]

# <linux/prctl.h>
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 1  # since Linux 6.3

# <linux/capability.h>
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_IPC_LOCK: Final = 14
_CAP_SYS_RAWIO: Final = 17
_LAST_CAPABILITY: Final = 63  # the kernel has fewer, and says EINVAL

# <linux/landlock.h>; their numbers are the same on every machine
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION: Final = 1
_RULE_PATH, _RULE_PORT = 1, 2

# <linux/seccomp.h>
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FLAGS: Final = 1 | 2  # TSYNC: every thread; LOG: what is refused is seen in the kernel's log

_NOIOMMU: Final = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"


def confine(rules: Iterable[Rule], *, ports: Iterable[int] = (), gid: int | None = None) -> list[str]:
    """Drop capabilities and close the file system but for these rules. Returns what could not be done.

    Args:
        rules: the paths that stay.
        ports: TCP ports that may still be bound.
        gid: a group that sockets will be given to.

    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        return [f"system calls of {os.uname().machine} are not known: known are {', '.join(MACHINES)}"]
    numbers = numbers_of(machine)
    problems = []
    if gid is not None and gid not in os.getgroups():
        # Who is in a group may give files to it. Afterwards only CAP_CHOWN could.
        with contextlib.suppress(OSError):  # not root: chown(2) will say what it needs
            os.setgroups([*os.getgroups(), gid])
    prctl = numbers["prctl"]
    syscall(prctl, _PR_SET_NO_NEW_PRIVS, 1)
    with contextlib.suppress(OSError):  # older than 6.3; the filter refuses the same on most machines
        syscall(prctl, _PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN)
    _drop_capabilities(prctl, numbers["capset"])
    try:
        _close_files(rules, ports)
    except OSError as error:
        problems.append(f"Landlock: {error.strerror}; files and ports stay as open to this process as to its user")
    confinement.enter()
    return problems


def restrict(*, connect: bool, gids: Iterable[int] = (), bus: bool = False) -> list[str]:
    """Install the filter of system calls, in every thread. Returns what could not be done."""
    name = os.uname().machine
    code = seccomp_filter(name, os.getpid(), connect=connect, gids=frozenset(gids), bus=bus)
    if code is None:
        return []  # confine() said so
    filters = bytearray(code)
    header = bytearray(struct.pack("@HP", len(filters) // 8, address_of(filters)))
    try:
        stray = syscall(
            numbers_of(MACHINES[name])["seccomp"], _SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAGS, address_of(header)
        )
    except OSError as error:
        return [f"seccomp: {error.strerror}; every system call stays possible"]
    if stray:
        return [f"seccomp: thread {stray} has a filter of its own; every system call stays possible"]
    return []


def _drop_capabilities(prctl: int, capset: int) -> None:
    kept = 0
    if Syscalls().may_lock_any_memory() and not limits.keep_memory_lock():
        kept = 1 << _CAP_IPC_LOCK  # it locks memory, and nothing else; without it no guest's memory would fit
    with contextlib.suppress(OSError):  # there is no VFIO
        # VFIO without an IOMMU asks for this one at every open (drivers/vfio/group.c); whoever switched that on has
        # given the devices the host's memory anyway.
        if Syscalls().read_text(_NOIOMMU).startswith("Y"):
            kept |= 1 << _CAP_SYS_RAWIO
    for capability in range(_LAST_CAPABILITY + 1):
        if not kept >> capability & 1:
            try:
                syscall(prctl, _PR_CAPBSET_DROP, capability)
            except OSError:
                break  # EINVAL: there are no more; EPERM: not ours to change, and no_new_privs keeps it from mattering
    with contextlib.suppress(OSError):
        syscall(prctl, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = bytearray(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    for mask in (kept, 0):
        data = bytearray(struct.pack("=6I", mask, mask, 0, 0, 0, 0))
        try:
            syscall(capset, address_of(header), address_of(data))
        except OSError:
            continue  # what was to be kept is not ours
        return


def _close_files(rules: Iterable[Rule], ports: Iterable[int]) -> None:
    abi = syscall(_LANDLOCK_CREATE, 0, 0, _LANDLOCK_VERSION)
    attributes = bytearray(ruleset(abi))
    made = syscall(_LANDLOCK_CREATE, address_of(attributes), len(attributes), 0)
    try:
        for rule in rules:
            _allow(made, rule, abi)
        for port in ports:
            if len(attributes) > 8:  # this version knows ports
                piece = bytearray(struct.pack("=QQ", BIND_TCP, port))
                syscall(_LANDLOCK_ADD, made, _RULE_PORT, address_of(piece), 0)
        syscall(_LANDLOCK_RESTRICT, made, 0)
    finally:
        os.close(made)


def _allow(made: int, rule: Rule, abi: int) -> None:
    try:
        parent = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no right
    try:
        directory = os.fstat(parent).st_mode & 0o170000 == 0o040000
        rights = file_rights(rule.rights, abi, directory=directory)
        if rights:
            piece = bytearray(struct.pack("=Qi", rights, parent))
            syscall(_LANDLOCK_ADD, made, _RULE_PATH, address_of(piece), 0)
    finally:
        os.close(parent)
