"""The filter judges every call as the policy says, on every machine. It is run here by an interpreter of its own."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiod.server.sandbox.bpf import ALLOW, KILL, MAX_INSTRUCTIONS, refuse
from vfiod.server.sandbox.calls import ALLOWED, DEADLY, MACHINES, numbers_of
from vfiod.server.sandbox.policy import seccomp_filter

PID = 4711
EPERM = refuse(errno.EPERM)
THREAD = 0x3D0F00  # what glibc's pthread_create asks for
MAPS, PROTECTS = ("x86_64", "aarch64"), tuple(MACHINES)


def verdict(
    name: str, call: str | int, *arguments: int, arch: int | None = None, connect: bool = False, bus: bool = False
) -> int:
    """What the filter of a machine says to a call."""
    machine = MACHINES[name]
    order = ">" if machine.big_endian else "<"
    number = numbers_of(machine)[call] if isinstance(call, str) else call
    data = struct.pack(
        f"{order}IIQ6Q", number, machine.audit if arch is None else arch, 0, *arguments, *(0,) * (6 - len(arguments))
    )
    code = seccomp_filter(name, PID, connect=connect, gids=frozenset({7}), bus=bus)
    assert code is not None
    program = list(struct.iter_unpack(f"{order}HBBI", code))
    assert len(program) <= MAX_INSTRUCTIONS
    at = accumulator = 0
    while True:
        operation, when, otherwise, operand = program[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from(f"{order}I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x15:
                at += when if accumulator == operand else otherwise
            case 0x45:
                at += when if accumulator & operand else otherwise
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(hex(operation))


@pytest.mark.parametrize("name", MACHINES)
def test_the_verdict(name: str) -> None:
    numbers = numbers_of(MACHINES[name])
    for call in ALLOWED.split():
        if call in numbers:
            assert verdict(name, call) == ALLOW, call
    for call in DEADLY.split():
        if call in numbers:
            assert verdict(name, call) == KILL, call
    assert verdict(name, "clone3") == refuse(errno.ENOSYS)
    assert verdict(name, 999) == EPERM


@pytest.mark.parametrize("name", MACHINES)
def test_arguments(name: str) -> None:
    assert verdict(name, "ioctl", 3, 0x3B64) == ALLOW
    assert verdict(name, "ioctl", 3, 0x5412) == EPERM  # TIOCSTI
    assert verdict(name, "ioctl", 3, 0xAE01) == EPERM  # KVM
    assert verdict(name, "socket", 1, 1 | 0o2000000) == ALLOW
    assert verdict(name, "socket", 1, 2) == EPERM
    assert verdict(name, "socket", 2, 1) == EPERM
    assert verdict(name, "tgkill", PID, 5, 6) == ALLOW
    assert verdict(name, "tgkill", PID + 1, 5, 6) == EPERM
    assert verdict(name, "mprotect", 0, 4096, 3) == ALLOW
    assert verdict(name, "mprotect", 0, 4096, 5) == EPERM
    assert verdict(name, "prlimit64", 0, 7, 0, 1) == ALLOW
    assert verdict(name, "prlimit64", 0, 7, 1 << 32, 1) == EPERM  # the high half counts in a pointer
    assert verdict(name, "fchownat", 3, 1, 0xFFFFFFFF, 7) == ALLOW
    assert verdict(name, "fchownat", 3, 1, 0xFFFFFFFF, 8) == EPERM
    assert verdict(name, "fchownat", 3, 1, 0, 7) == EPERM
    assert verdict(name, "connect", 3) == EPERM
    assert verdict(name, "connect", 3, connect=True) == ALLOW
    flags = {0: (THREAD,), 1: (0, THREAD)}[MACHINES[name].clone_flags]
    assert verdict(name, "clone", *flags) == ALLOW
    assert verdict(name, "clone", 17) == EPERM
    assert verdict(name, "clone", *(flag | 0x10000000 for flag in flags)) == EPERM


@pytest.mark.parametrize("name", MAPS)
def test_code_is_mapped_from_files_alone(name: str) -> None:
    assert verdict(name, "mmap", 0, 4096, 3, 0x22) == ALLOW
    assert verdict(name, "mmap", 0, 4096, 5, 0x802) == ALLOW  # as ld.so does it
    assert verdict(name, "mmap", 0, 4096, 5, 0x22) == EPERM  # anonymous
    assert verdict(name, "mmap", 0, 4096, 7, 0x02) == EPERM  # writable
    assert verdict(name, "mmap", 0, 4096, 5, 0x01) == EPERM  # shared


def test_on_s390x_the_arguments_of_mmap_are_out_of_sight() -> None:
    assert verdict("s390x", "mmap", 0x3FF00000000) == ALLOW


@pytest.mark.parametrize("name", MACHINES)
def test_another_machines_calls_end_the_process(name: str) -> None:
    assert verdict(name, "read", arch=0x40000003) == KILL  # i386


def test_x32_ends_the_process() -> None:
    assert verdict("x86_64", 0x40000000) == KILL


def test_an_unknown_machine_has_no_filter() -> None:
    assert seccomp_filter("vax", PID, connect=False, gids=frozenset()) is None


@pytest.mark.parametrize("name", MACHINES)
def test_threads_of_the_bus_may_be_ordinary_ones(name: str) -> None:
    """ZeroMQ aborts when a thread of its own may not; in real time they never are."""
    for call in ("sched_getparam", "sched_getscheduler", "sched_setscheduler"):
        assert verdict(name, call) == EPERM
        assert verdict(name, call, bus=True) == ALLOW
    assert verdict(name, "sched_setscheduler", 0, 1, bus=True) == EPERM  # SCHED_FIFO
