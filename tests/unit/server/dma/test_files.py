"""What may serve as guest memory, and what is said of what may not.

Rules are those of behaviour.md, section 2.
"""

import fcntl
import os
from pathlib import Path

import pytest

from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.dma.files import open_memory

F_ADD_SEALS = 1033
F_SEAL_WRITE = 0x8
F_SEAL_FUTURE_WRITE = 0x10


def memfd(size: int = 0x4000, seals: int = 0) -> FileDescriptor:
    fd = FileDescriptor(os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.number, size)
    if seals:
        fcntl.fcntl(fd.number, F_ADD_SEALS, seals)
    return fd


def test_a_memfd_is_taken_whole_or_in_part() -> None:
    for size in (None, 0x1000, 0x4000):
        memory = open_memory(memfd(), size=size, readonly=False, name="ram0")
        assert memory.size == (size or 0x4000)
        memory.close()


def test_a_regular_file_will_do(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"\1" * 0x3000)
    memory = open_memory(FileDescriptor(os.open(path, os.O_RDWR)), size=None, readonly=False, name="ram0")
    assert memory.size == 0x3000
    assert memory.read(0x2FFF, 1) == b"\1"
    memory.close()


@pytest.mark.parametrize("seal", [F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
def test_memory_sealed_against_writing_needs_readonly(seal: int) -> None:
    with memfd(seals=seal) as fd:
        with pytest.raises(InvalidArgument, match=r"'readonly' expects true: the memfd is sealed against writing"):
            open_memory(fd, size=None, readonly=False, name="ram0")
        memory = open_memory(fd, size=None, readonly=True, name="ram0")
        assert memory.read(0, 4) == bytes(4)
        assert memory.address() > 0
        memory.close()


def test_a_file_open_for_reading_needs_readonly_and_one_for_writing_will_not_do(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(0x1000))
    with FileDescriptor(os.open(path, os.O_RDONLY)) as fd:
        with pytest.raises(InvalidArgument, match="'readonly' expects true: the file is open for reading only"):
            open_memory(fd, size=None, readonly=False, name="ram0")
        open_memory(fd, size=None, readonly=True, name="ram0").close()
    with (
        FileDescriptor(os.open(path, os.O_WRONLY)) as fd,
        pytest.raises(InvalidArgument, match="open for writing only; open it for reading and writing"),
    ):
        open_memory(fd, size=None, readonly=True, name="ram0")


def test_sizes_are_checked_against_the_file() -> None:
    with (
        memfd() as fd,
        pytest.raises(InvalidArgument, match="'size' expects at most the file's 0x4000 bytes, got 0x4001"),
    ):
        open_memory(fd, size=0x4001, readonly=False, name="ram0")
    with memfd(0) as fd, pytest.raises(InvalidArgument, match="the file is empty; give it its size"):
        open_memory(fd, size=None, readonly=False, name="ram0")


def test_other_kinds_are_refused_and_stay_the_callers() -> None:
    reading, writing = os.pipe()
    with FileDescriptor(reading) as one, FileDescriptor(writing) as other:
        for fd in (one, other):
            with pytest.raises(InvalidArgument, match="expects a memfd, a hugetlbfs file or a regular file"):
                open_memory(fd, size=None, readonly=False, name="ram0")
            assert not fd.closed
