"""The one module that makes system calls on VFIO's files.

:class:`Syscalls` is the narrow surface; a test may hand in another object of the same surface, and nothing else
of the program is ever replaced. Methods raise ``OSError`` as the kernel gave it: the backends turn it into
:class:`~vfiod.protocol.errors.OperationFailed`, because they know the operation and the object.

No method holds the interpreter's lock while the kernel works: ``fcntl.ioctl`` releases it only for buffers of
up to 1,024 bytes, so larger ones go through ``ctypes``.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import resource
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ctypes

__all__ = ["PAGE_SIZE", "Syscalls"]

PAGE_SIZE: Final = mmap.PAGESIZE
"""Bytes of a page of this machine."""

_IOCTL_BUFFER: Final = 1024
"""Bytes up to which ``fcntl.ioctl`` releases the interpreter's lock (CPython ``fcntlmodule.c``)."""

_F_DUPFD_QUERY: Final = 1024 + 3
"""``<linux/fcntl.h>``, since Linux 6.10: are two fds the same open file?"""

_KCMP_FILE: Final = 0
_KCMP_NUMBERS: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "s390x": 343, "ppc64le": 354}
"""``kcmp(2)`` per machine (``<asm/unistd.h>``), for kernels before 6.10."""

_MAP_FIXED: Final = 0x10
"""``<linux/mman.h>``; Python has no name for it."""


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library; ctypes is imported when it is first needed, which most servers never do."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    libc.ioctl.restype = ctypes.c_int
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    return libc


class Syscalls:
    """System calls on VFIO's files, and the facts of the host around them."""

    # --- files ---
    def open(self, path: str) -> int:
        """Open for reading and writing, close-on-exec. Returns the fd."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """Close an fd, once."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """One ioctl. A ``bytearray`` is passed by address and written back; an ``int`` is passed as it is.

        Returns what the kernel returned: 0 or a positive number.
        """
        if isinstance(argument, int) or len(argument) <= _IOCTL_BUFFER:
            return fcntl.ioctl(fd, request, argument)
        import ctypes

        raw = (ctypes.c_char * len(argument)).from_buffer(argument)
        result: int = _libc().ioctl(fd, request, ctypes.addressof(raw))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes."""
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write; returns how many bytes the kernel took."""
        return os.pwrite(fd, data, offset)

    def map(self, fd: int, offset: int, size: int, *, readable: bool = True, writable: bool = True) -> mmap.mmap:
        """Map a piece of a file, shared. Offset and size in bytes, whole pages."""
        prot = (mmap.PROT_READ if readable else 0) | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot, offset=offset)

    def blank(self, address: int, size: int) -> None:
        """Put empty private pages in the place of a mapping. Bytes; from its start."""
        # mmap(2): the old mapping is taken away in the same moment, so nobody can hit a hole.
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        if _libc().mmap(address, size, protection, flags, -1, 0) != address:
            import ctypes

            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def eventfd(self) -> int:
        """Make an eventfd: counter 0, non-blocking, close-on-exec. Returns the fd."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # --- what an fd is ---
    def fstat(self, fd: int) -> os.stat_result:
        """``fstat(2)``."""
        return os.fstat(fd)

    def link_of(self, fd: int) -> str:
        """What ``/proc/self/fd/N`` points to; empty when /proc is not there."""
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            return ""

    def same_file(self, first: int, second: int) -> bool | None:
        """Whether two fds are the same open file; None when the kernel cannot say."""
        if first == second:
            return True
        try:
            return bool(fcntl.fcntl(first, _F_DUPFD_QUERY, second))
        except OSError:
            pass  # older than 6.10: EINVAL
        number = _KCMP_NUMBERS.get(os.uname().machine)
        if number is None:
            return None
        import ctypes

        me = os.getpid()
        result: int = _libc().syscall(number, me, me, _KCMP_FILE, ctypes.c_ulong(first), ctypes.c_ulong(second))
        return None if result < 0 else result == 0

    # --- limits ---
    def memory_lock_limit(self) -> int | None:
        """The soft RLIMIT_MEMLOCK in bytes; None when there is no limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft

    def memory_locked(self) -> int:
        """Bytes this process has locked so far (``VmLck`` of /proc/self/status, which counts what VFIO pins)."""
        for line in self.read_text("/proc/self/status").splitlines():
            if line.startswith("VmLck:"):
                return int(line.split()[1]) * 1024
        return 0

    def may_lock_any_memory(self) -> bool:
        """Whether CAP_IPC_LOCK lifts RLIMIT_MEMLOCK for this process."""
        cap_ipc_lock = 14  # <linux/capability.h>
        for line in self.read_text("/proc/self/status").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> cap_ipc_lock & 1)
        return False

    def open_file_limit(self) -> int:
        """The soft RLIMIT_NOFILE."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def open_files(self) -> int:
        """How many fds this process has open."""
        return len(os.listdir("/proc/self/fd")) - 1  # listdir's own

    # --- sysfs and procfs ---
    def read_text(self, path: str) -> str:
        """A small text file, of sysfs or procfs."""
        # By hand: four system calls instead of the ten of an io object.
        data = b""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while more := os.read(fd, PAGE_SIZE):  # a file of procfs may give less than it has
                data += more
        finally:
            os.close(fd)
        return data.decode(errors="replace")

    def read_link(self, path: str) -> str:
        """Where a symbolic link points."""
        return os.readlink(path)

    def real_path(self, path: str) -> str:
        """The path with every link followed; FileNotFoundError when there is nothing."""
        return os.path.realpath(path, strict=True)

    def list_directory(self, path: str) -> tuple[str, ...]:
        """Names in a directory, sorted."""
        return tuple(sorted(os.listdir(path)))

    def exists(self, path: str) -> bool:
        """Whether there is anything at this path."""
        return os.path.exists(path)
