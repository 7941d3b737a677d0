"""Shared memory and windows onto regions, on real files.

Rules are those of behaviour.md, section 3.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vfiod.protocol.errors import InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.memory import ACCESS_SIZES, RegionWindow, SharedMemory
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

CALLS = Syscalls()


def memfd(size: int = 4 * PAGE_SIZE) -> FileDescriptor:
    fd = FileDescriptor(os.memfd_create("ram", os.MFD_CLOEXEC))
    os.ftruncate(fd.number, size)
    return fd


def maps(name: str) -> bool:
    """Whether this process maps a file of this name."""
    return name in Path("/proc/self/maps").read_text()


# --- shared memory ---
@pytest.mark.parametrize("readonly", [False, True])
def test_the_address_is_where_the_memory_is(readonly: bool) -> None:
    fd = memfd()
    os.pwrite(fd.number, b"here", PAGE_SIZE)
    memory = SharedMemory(fd, readonly=readonly)
    assert not maps("/memfd:ram"), "mapped when first needed, not before"
    assert ctypes.string_at(memory.address() + PAGE_SIZE, 4) == b"here"
    with memory.view() as view:
        assert bytes(view[PAGE_SIZE : PAGE_SIZE + 4]) == b"here"
        assert view.readonly is readonly
        assert len(view) == 4 * PAGE_SIZE
    memory.close()
    memory.close()
    assert memory.closed


def test_a_part_of_a_file() -> None:
    memory = SharedMemory(memfd(), size=PAGE_SIZE + 1)
    with memory.view() as view:
        assert len(view) == PAGE_SIZE + 1
    with pytest.raises(OperationFailed, match="it has 4097 bytes"):
        memory.read(PAGE_SIZE, 2)
    memory.close()


def test_read_and_write_move_bytes() -> None:
    memory = SharedMemory(memfd())
    memory.write(10, b"abc")
    assert memory.read(9, 5) == b"\0abc\0"
    assert memory.read(0, 0) == b""
    for call in (lambda: memory.read(-1, 2), lambda: memory.read(4 * PAGE_SIZE, 1), lambda: memory.write(-1, b"a")):
        with pytest.raises(OperationFailed) as caught:
            call()
        assert caught.value.errno == "EFAULT"
    memory.close()


def test_readonly_memory_is_not_written() -> None:
    memory = SharedMemory(memfd(), readonly=True, name="rom")
    with pytest.raises(OperationFailed, match=r"rom \(offset 0x0, 1 bytes\) failed with EACCES: it is read-only"):
        memory.write(0, b"a")
    memory.close()


def test_a_file_that_its_owner_cuts_is_an_error_and_no_signal() -> None:
    fd = memfd()
    owner = fd.duplicate()
    memory = SharedMemory(fd)
    memory.address()
    os.ftruncate(owner.number, PAGE_SIZE)
    with pytest.raises(OperationFailed, match="the file was cut"):
        memory.read(PAGE_SIZE - 1, 2)
    owner.close()
    memory.close()


def _reading_only() -> FileDescriptor:
    with memfd() as fd:
        return FileDescriptor(os.open(f"/proc/self/fd/{fd.number}", os.O_RDONLY | os.O_CLOEXEC))


def _writing_only() -> FileDescriptor:
    with memfd() as fd:
        return FileDescriptor(os.open(f"/proc/self/fd/{fd.number}", os.O_WRONLY | os.O_CLOEXEC))


@pytest.mark.parametrize(
    ("make", "size", "words"),
    [
        (lambda: FileDescriptor(os.eventfd(0)), None, "is not memory"),
        (lambda: memfd(0), None, "has 0 bytes, of which 0 cannot be used"),
        (memfd, 5 * PAGE_SIZE, "of which 20480 cannot be used"),
        (_reading_only, None, "open for reading only"),
        (_writing_only, None, "open for writing only"),
    ],
)
def test_what_is_no_memory_stays_the_callers(make: Callable[[], FileDescriptor], size: int | None, words: str) -> None:
    with make() as fd:
        with pytest.raises(InvalidArgument, match=words):
            SharedMemory(fd, size=size)
        assert not fd.closed


def test_a_readonly_fd_is_fine_for_readonly_memory() -> None:
    memory = SharedMemory(_reading_only(), readonly=True)
    assert memory.address()
    memory.close()


# --- windows ---
def test_a_window_loads_and_stores_every_width_little_endian() -> None:
    with memfd() as fd:
        window = RegionWindow(CALLS, fd.number, PAGE_SIZE, PAGE_SIZE)
        for size in ACCESS_SIZES:
            value = int.from_bytes(bytes(range(1, size + 1)), "little")
            window.store(8, size, value)
            assert os.pread(fd.number, size, PAGE_SIZE + 8) == bytes(range(1, size + 1))
            assert window.load(8, size) == value
        os.pwrite(fd.number, b"\xff" * 8, PAGE_SIZE)
        window.store(0, 2, 0)
        assert os.pread(fd.number, 4, PAGE_SIZE) == b"\0\0\xff\xff", "a store touches its own bytes only"
        window.close()
        window.close()


def test_a_window_refuses_what_is_no_single_access() -> None:
    with memfd() as fd:
        window = RegionWindow(CALLS, fd.number, 0, PAGE_SIZE)
        for offset, size, error in (
            (2, 4, ValueError),
            (-4, 4, ValueError),
            (0, 3, KeyError),
            (PAGE_SIZE, 4, IndexError),
        ):
            with pytest.raises(error):
                window.load(offset, size)
            with pytest.raises(error):
                window.store(offset, size, 0)
        with pytest.raises(ValueError):
            window.store(0, 1, 256)
        window.close()
        with pytest.raises(ValueError, match="released"):
            window.load(0, 4)
        for offset, size in ((1, PAGE_SIZE), (0, 100), (0, 0)):
            with pytest.raises(ValueError, match="whole pages"):
                RegionWindow(CALLS, fd.number, offset, size)


def test_a_window_that_may_only_be_read() -> None:
    with memfd() as fd:
        window = RegionWindow(CALLS, fd.number, 0, PAGE_SIZE, writable=False)
        assert window.load(0, 8) == 0
        with pytest.raises(TypeError, match="read-only"):
            window.store(0, 1, 1)
        window.close()


def test_windows_and_memory_leave_no_fd_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with memfd() as fd:
        RegionWindow(CALLS, fd.number, 0, PAGE_SIZE).close()
    memory = SharedMemory(memfd())
    memory.address()
    memory.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- system calls ---
def test_large_ioctl_buffers_reach_the_kernel_and_come_back() -> None:
    """FIONREAD through the large path: the result is written into the buffer, errors have their errno."""
    fionread = 0x541B
    reader, writer = os.pipe()
    with FileDescriptor(reader), FileDescriptor(writer):
        os.write(writer, b"seven b")
        for length in (4, 4096):
            buffer = bytearray(length)
            assert CALLS.ioctl(reader, fionread, buffer) == 0
            assert int.from_bytes(buffer[:4], sys.byteorder) == 7
    with FileDescriptor(os.eventfd(0)) as event, pytest.raises(OSError) as caught:
        CALLS.ioctl(event.number, fionread, bytearray(4096))
    assert caught.value.errno == 25  # ENOTTY


def test_limits_of_a_process() -> None:
    """In a process of its own: limits are the process's."""
    code = (
        "import resource; from vfiod.server.kernel.syscalls import Syscalls\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))\n"
        "calls = Syscalls(); print(calls.memory_lock_limit(), calls.open_file_limit(), calls.memory_locked(),"
        " calls.open_files(), calls.may_lock_any_memory())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert out.split()[:4] == ["65536", "99", "0", "3"]
    assert out.split()[4] in ("True", "False")
