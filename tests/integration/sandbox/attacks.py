"""What an intruder would try, from inside a process that has closed its sandbox as the server does.

``python attacks.py DIRECTORY NAME``: the sandbox of a server whose sockets are in DIRECTORY, then one attack. Prints
what became of it: ``done``, or the name of the error. An attack that ends the process prints nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from vfiod.server.sandbox import files, process
from vfiod.server.sandbox.calls import MACHINES, numbers_of

NUMBERS = numbers_of(MACHINES[platform.machine()])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

ATTACKS: dict[str, Callable[[], object]] = {}
DEADLY: list[str] = []
"""Those that end the process."""

HERE: str
KEPT: dict[str, int] = {}


def attack(function: Callable[[], object]) -> Callable[[], object]:
    """One that must fail."""
    ATTACKS[function.__name__] = function
    return function


def _call(name: str, *arguments: object) -> int:
    return _call_number(NUMBERS[name], *arguments)


def _call_number(number: int, *arguments: object) -> int:
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), str(number))
    return result


def _checked(result: int | None) -> None:
    if result in (-1, None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "")


# --- open nothing ---


@attack
def read_a_secret() -> object:
    return os.open("/etc/passwd", os.O_RDONLY)


@attack
def read_another_process() -> object:
    return os.open("/proc/1/environ", os.O_RDONLY)


@attack
def list_a_directory() -> object:
    return os.listdir("/root")


@attack
def write_a_file() -> object:
    return os.open("/tmp/vfiod-attack", os.O_WRONLY | os.O_CREAT)


@attack
def write_beside_the_socket() -> object:
    return os.open(f"{HERE}/file", os.O_WRONLY | os.O_CREAT)


@attack
def change_the_program() -> object:
    return os.open(files.__file__, os.O_WRONLY)


@attack
def make_a_directory() -> None:
    os.mkdir(f"{HERE}/directory")


@attack
def rename_the_program() -> None:
    os.rename(files.__file__, f"{files.__file__}.old")


@attack
def remove_the_program() -> None:
    os.unlink(files.__file__)


@attack
def change_a_mode() -> None:
    os.chmod(f"{HERE}/there", 0o777)


@attack
def change_an_owner() -> None:
    os.chown(f"{HERE}/there", 1, 1)


@attack
def open_a_device() -> object:
    return os.open("/dev/zero", os.O_RDWR)


@attack
def read_by_the_root_of_proc() -> object:
    return os.open("/proc/self/root/etc/passwd", os.O_RDONLY)


@attack
def read_by_a_link_of_ones_own() -> object:
    os.symlink("/etc/passwd", f"{HERE}/link")
    try:
        return os.open(f"{HERE}/link", os.O_RDONLY)
    finally:
        os.unlink(f"{HERE}/link")


@attack
def write_ones_own_code_by_proc() -> object:
    return os.open("/proc/self/mem", os.O_RDWR)


@attack
def open_a_read_only_file_again_to_write_it() -> object:
    return os.open(f"/proc/self/fd/{os.open(files.__file__, os.O_RDONLY)}", os.O_RDWR)


@attack
def link_a_file_to_where_it_can_be_removed() -> None:
    os.link(files.__file__, f"{HERE}/taken")


@attack
def make_a_device_node() -> None:
    os.mknod(f"{HERE}/zero", 0o020666, os.makedev(1, 5))


@attack
def use_memory_of_others() -> object:
    return _call_number({"x86_64": 29, "aarch64": 194, "s390x": 395}[platform.machine()], 0, 4096, 0o1000)  # shmget


# --- execute nothing ---


@attack
def execute() -> object:
    return os.execv("/bin/true", ["true"])


@attack
def execute_an_fd() -> object:
    return _call("execveat", KEPT["program"], b"", None, None, 0x1000)


@attack
def run_a_command() -> object:
    return subprocess.run(["/bin/true"], check=True)


@attack
def fork() -> object:
    if os.fork() == 0:
        os._exit(0)
    return None


@attack
def new_code_in_anonymous_memory() -> None:
    _checked(libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0))


@attack
def new_code_by_protection() -> None:
    where = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    _checked(libc.mprotect(where, 4096, mmap.PROT_READ | mmap.PROT_EXEC))


@attack
def new_code_in_a_shared_file() -> None:
    fd = os.memfd_create("code")
    os.ftruncate(fd, 4096)
    _checked(libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED, fd, 0))


@attack
def fork_by_clone3() -> None:
    pid = _call_number(435, b"\0" * 32 + bytes([signal.SIGCHLD]) + b"\0" * 55, 88)
    if pid == 0:
        os._exit(0)


@attack
def a_filter_of_ones_own() -> object:
    return _call("seccomp", 1, 0, None)


# --- connect nowhere ---


@attack
def reach_the_network() -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


@attack
def ask_a_name_server() -> object:
    return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


@attack
def speak_netlink() -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@attack
def use_vsock() -> object:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


@attack
def send_a_datagram() -> object:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


@attack
def send_a_datagram_by_a_pair() -> object:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


@attack
def connect_to_a_socket() -> None:
    socket.socket(socket.AF_UNIX).connect(f"{HERE}/there")


@attack
def connect_an_old_socket() -> None:
    socket.socket(fileno=KEPT["tcp"]).connect(("127.0.0.1", 1))


@attack
def listen_on_a_port() -> None:
    socket.socket(fileno=KEPT["tcp"]).bind(("127.0.0.1", 0))


@attack
def listen_elsewhere() -> None:
    socket.socket(socket.AF_UNIX).bind("/tmp/vfiod-attack.sock")


# --- touch no one ---


@attack
def kill_the_parent() -> None:
    os.kill(os.getppid(), 0)


@attack
def kill_everybody() -> None:
    os.kill(-1, 0)


@attack
def hold_another_process() -> object:
    return os.pidfd_open(os.getppid())


@attack
def signal_a_thread_of_another() -> object:
    return _call("tgkill", os.getppid(), os.getppid(), 0)


@attack
def signal_by_a_file() -> object:
    return fcntl.fcntl(KEPT["tcp"], fcntl.F_SETOWN, os.getppid())


@attack
def type_for_another() -> object:
    return fcntl.ioctl(KEPT["terminal"], 0x5412, b"x")  # TIOCSTI


@attack
def change_a_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    except ValueError as error:  # what Python makes of EPERM
        raise OSError(errno.EPERM, "setrlimit") from error


@attack
def new_user_namespace_by_clone() -> None:
    _checked(libc.syscall(ctypes.c_long(NUMBERS["clone"]), 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0))


@attack
def execute_memory() -> object:
    fd = os.memfd_create("program", 0)
    os.write(fd, b"#!/bin/true\n")
    return os.execve(fd, ["program"], {})


@attack
def a_call_of_the_x32_kind() -> object:
    return _call_number(0x40000000 + NUMBERS["getpid"])


@attack
def a_call_of_the_32_bit_kind() -> object:
    """Machine code in a file that is mapped, which no filter sees: getpid() as the i386 does it."""
    fd = os.memfd_create("code")
    os.write(fd, bytes.fromhex("b814000000cd80c3"))
    where = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
    _checked(where)
    return ctypes.CFUNCTYPE(ctypes.c_long)(where)()


ON_X86 = ["a_call_of_the_x32_kind", "a_call_of_the_32_bit_kind"]
DEADLY += ["execute", "execute_an_fd", "execute_memory", *ON_X86]
if platform.machine() != "x86_64":
    for one in ON_X86:
        del ATTACKS[one]
        DEADLY.remove(one)

# --- and what ends the process at once ---


def _deadly(name: str, *arguments: object) -> None:
    DEADLY.append(name)
    ATTACKS[name] = lambda: _call(name, *arguments)


_deadly("ptrace", 16, os.getppid(), 0, 0)
_deadly("process_vm_readv", os.getppid(), None, 0, None, 0, 0)
_deadly("process_vm_writev", os.getppid(), None, 0, None, 0, 0)
_deadly("mount", b"none", b"/mnt", b"tmpfs", 0, None)
_deadly("umount2", b"/proc", 0)
_deadly("pivot_root", b"/", b"/")
_deadly("chroot", b"/")
_deadly("unshare", 0x10000000)
_deadly("setns", 0, 0)
_deadly("bpf", 0, None, 0)
_deadly("perf_event_open", None, 0, -1, -1, 0)
_deadly("userfaultfd", 0)
_deadly("io_uring_setup", 8, None)
_deadly("io_uring_enter", -1, 0, 0, 0, None, 0)
_deadly("process_madvise", 0, None, 0, 0, 0)
_deadly("open_tree", -100, b"/", 1)
_deadly("fsopen", b"tmpfs", 0)
_deadly("move_mount", -100, b"", -100, b"", 0)
_deadly("init_module", None, 0, b"")
_deadly("settimeofday", None, None)
_deadly("setgroups", 0, None)
_deadly("keyctl", 0, 0)
_deadly("add_key", b"user", b"a", b"b", 1, -1)
_deadly("open_by_handle_at", 0, None, 0)
_deadly("finit_module", 0, b"", 0)
_deadly("kexec_load", 0, 0, None, 0)
_deadly("reboot", 0, 0, 0)
_deadly("personality", 0)
_deadly("setuid", 0)
_deadly("capset", None, None)
_deadly("pidfd_getfd", 0, 0, 0)


def works() -> None:
    """What the server still does."""
    found = []
    thread = threading.Thread(target=lambda: found.append(os.eventfd(0)))
    thread.start()
    thread.join()
    assert found
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{HERE}/made")
        listening.listen()
    os.unlink(f"{HERE}/made")
    _, terminal = os.openpty()
    assert os.ttyname(terminal).startswith("/dev/pts/")
    import decimal  # an extension: code of a file
    import sqlite3

    assert decimal.Decimal(1) == 1
    assert sqlite3.sqlite_version
    assert os.listdir("/proc/self/fd")
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        # CAP_IPC_LOCK stays where the limit that it lifts cannot be lifted otherwise.
        assert int(status[name], 16) & ~(1 << 14) == 0, name


def main() -> None:
    """Close the sandbox, and try one thing."""
    global HERE
    HERE, name = sys.argv[1:3]
    KEPT["program"] = os.open("/bin/true", os.O_PATH)
    KEPT["tcp"] = socket.socket(socket.AF_INET).detach()
    KEPT["terminal"] = os.openpty()[1]
    rules = [*files.for_python(), *files.for_devices(allow_open=False), *files.for_sockets([f"{HERE}/qmp"])]
    problems = process.confine(rules) + process.restrict(connect=False)
    assert not problems, problems
    try:
        (works if name == "works" else ATTACKS[name])()
    except OSError as error:
        print(errno.errorcode[error.errno or 0], flush=True)
    else:
        print("done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
