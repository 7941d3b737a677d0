"""Kinds of real fds, and of the fake kernel's: by looking, whatever the caller says."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.server.kernel.kinds import group_of_fd, kind_of
from vfiod.server.kernel.syscalls import Syscalls


def test_ordinary_fds(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with (
        FileDescriptor(reader),
        FileDescriptor(writer),
        FileDescriptor(os.eventfd(0)) as event,
        FileDescriptor(os.memfd_create("m")) as memory,
        FileDescriptor(os.open(tmp_path, os.O_RDONLY)) as directory,
        FileDescriptor(os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)) as file,
        FileDescriptor(os.open("/dev/null", os.O_RDWR)) as null,
        socket.socket(socket.AF_UNIX) as plain,
        socket.socket(socket.AF_UNIX) as listening,
        FileDescriptor(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as namespace,
    ):
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        assert kind_of(reader) is FdKind.PIPE
        assert kind_of(event.number) is FdKind.EVENTFD
        assert kind_of(memory.number) is FdKind.MEMFD
        assert kind_of(directory.number) is FdKind.DIRECTORY
        assert kind_of(file.number) is FdKind.FILE
        assert kind_of(null.number) is FdKind.CHARACTER_DEVICE
        assert kind_of(plain.fileno()) is FdKind.SOCKET
        assert kind_of(listening.fileno()) is FdKind.LISTENING_SOCKET
        assert kind_of(namespace.number) is FdKind.FILE
        assert listening.fileno() >= 0, "looking closes nothing"


def test_other_anonymous_inodes_are_not_eventfds() -> None:
    import select

    with select.epoll() as epoll:
        assert kind_of(epoll.fileno()) is FdKind.UNKNOWN


def test_a_file_that_calls_itself_memfd_is_a_file(tmp_path: Path) -> None:
    with FileDescriptor(os.open(tmp_path / "memfd:x (deleted)", os.O_CREAT | os.O_RDWR)) as file:
        assert kind_of(file.number) is FdKind.FILE


def test_a_closed_fd_is_an_oserror() -> None:
    with FileDescriptor(os.eventfd(0)) as event:
        number = event.number
    with pytest.raises(OSError, match="Bad file descriptor"):
        kind_of(number)


def test_vfio_fds_with_and_without_sysfs() -> None:
    kernel = FakeKernel()
    kernel.add_device("0000:01:00.0", 7)
    kernel.add_device("0000:02:00.0", 8, noiommu=True)
    with (
        FileDescriptor(kernel.open("/dev/vfio/vfio")) as container,
        FileDescriptor(kernel.open("/dev/vfio/7")) as group,
        FileDescriptor(kernel.open("/dev/vfio/noiommu-8")) as noiommu,
    ):
        for kernel.sysfs in (True, False):
            assert kind_of(container.number, kernel) is FdKind.VFIO_CONTAINER
            assert kind_of(group.number, kernel) is FdKind.VFIO_GROUP
            assert group_of_fd(group.number, kernel) == (7, False)
            assert group_of_fd(noiommu.number, kernel) == (8, True)
            assert group_of_fd(container.number, kernel) is None
    with FileDescriptor(os.eventfd(0)) as event:
        assert group_of_fd(event.number, kernel) is None


class Elsewhere(FakeKernel):
    """A manager in another mount namespace: what the group was opened as is not what it is."""

    def link_of(self, fd: int) -> str:
        return "/tmp/vfio/99" if self.kind(fd) is FdKind.VFIO_GROUP else super().link_of(fd)


def test_the_device_number_decides_and_not_the_name() -> None:
    kernel = Elsewhere()
    kernel.add_device("0000:01:00.0", 7)
    with FileDescriptor(kernel.open("/dev/vfio/7")) as group:
        assert kind_of(group.number, kernel) is FdKind.VFIO_GROUP
        assert group_of_fd(group.number, kernel) == (7, False)


def test_same_file_really() -> None:
    calls = Syscalls()
    with FileDescriptor(os.eventfd(0)) as one, FileDescriptor(os.eventfd(0)) as other, one.duplicate() as again:
        if calls.same_file(one.number, other.number) is None:
            pytest.skip("this kernel has neither F_DUPFD_QUERY nor kcmp")
        assert calls.same_file(one.number, one.number) is True
        assert calls.same_file(one.number, again.number) is True
        assert calls.same_file(one.number, other.number) is False
