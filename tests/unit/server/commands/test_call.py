"""What a command may ask for: fds by name or set, duplicates, consumed only by success."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FdKind, FileDescriptor, close_all
from vfiod.protocol.limits import MAX_FDS_PER_MESSAGE
from vfiod.server.commands.call import Call
from vfiod.server.fds import FdNames, FdSets, HeldFd
from vfiod.server.kernel.kinds import kind_of


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def names() -> Iterator[FdNames]:
    names = FdNames(kind_of)
    names.receive([FileDescriptor(os.eventfd(0)), FileDescriptor(os.memfd_create("m"))])
    names.name("event")
    names.name("memory")
    yield names
    names.close()


@pytest.fixture
def sets() -> Iterator[FdSets]:
    sets = FdSets()
    yield sets
    sets.close()


@pytest.fixture
def call(names: FdNames, sets: FdSets) -> Call:
    # A Call touches nothing of the machine but its sets, and nothing of the session but its names.
    machine, server = cast("Any", SimpleNamespace(fdsets=sets)), cast("Any", None)
    return Call(machine, server, cast("Any", SimpleNamespace(id=1, names=names)))


def test_success_consumes_the_names_it_used(call: Call, names: FdNames) -> None:
    with call.fd("fd", "event", FdKind.EVENTFD) as duplicate, call.fd("resample", "event") as again:
        held = names.look("event")
        assert held is not None
        assert len({held.fd.number, duplicate.number, again.number}) == 3
        assert call.succeed() is None
        assert names.look("event") is None
        assert held.fd.closed
        assert names.look("memory") is not None
        os.eventfd_write(duplicate.number, 1)  # the duplicate is the handler's, and lives


def test_failure_leaves_them(call: Call, names: FdNames) -> None:
    call.fd("fd", "event").close()
    call.fail()
    assert names.look("event") is not None
    call.succeed()
    assert names.look("event") is not None


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("memory", (FdKind.EVENTFD,), "Parameter 'trigger': fd 'memory' is a memfd, expected eventfd"),
        (
            "event",
            (FdKind.VFIO_GROUP, FdKind.MEMFD),
            "Parameter 'trigger': fd 'event' is an eventfd, expected vfio-group or memfd",
        ),
        (
            "other",
            (),
            "Parameter 'trigger': File descriptor named 'other' not found; send the fd and name it with getfd",
        ),
        ("7", (), "Parameter 'trigger' expects the name of an fd, not a number: name the fd with getfd first"),
        ("/dev/fdset/x", (), "Parameter 'trigger' expects /dev/fdset/N with a number N, got '/dev/fdset/x'"),
        ("/dev/fdset/", (), "Parameter 'trigger' expects /dev/fdset/N with a number N, got '/dev/fdset/'"),
        ("/dev/fdset/٣", (), "Parameter 'trigger' expects /dev/fdset/N with a number N, got '/dev/fdset/٣'"),
        ("/dev/fdset/9", (), "Parameter 'trigger': File descriptor set 9 not found; add-fd makes it"),
    ],
)
def test_refusals_name_the_argument_what_was_found_and_what_is_expected(
    call: Call, name: str, expected: tuple[FdKind, ...], words: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        call.fd("trigger", name, *expected)
    assert str(refused.value) == words


def test_a_set_keeps_its_fds_and_gives_the_one_that_fits(call: Call, sets: FdSets, tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    reading = HeldFd(FileDescriptor(os.open(path, os.O_RDONLY)), FdKind.FILE)
    writing = HeldFd(FileDescriptor(os.open(path, os.O_RDWR)), FdKind.FILE)
    event = HeldFd(FileDescriptor(os.eventfd(0)), FdKind.EVENTFD)
    sets.add(event, 4)
    sets.add(reading, 4)
    with pytest.raises(InvalidArgument, match="no fd of '/dev/fdset/4' is open for writing") as refused:
        call.fd("fd", "/dev/fdset/4", FdKind.FILE, write=True)
    assert refused.value.errno == "EACCES"
    with call.fd("fd", "/dev/fdset/4", FdKind.FILE) as only:
        assert os.pread(only.number, 1, 0) == b"x"
    sets.add(writing, 4)
    with call.fd("fd", "/dev/fdset/4", FdKind.FILE, write=True) as writable:
        assert os.pwrite(writable.number, b"y", 0) == 1
    with pytest.raises(InvalidArgument, match="holds eventfd, file, expected vfio-group"):
        call.fd("group-fd", "/dev/fdset/4", FdKind.VFIO_GROUP)
    call.succeed()
    assert sets.fds(4) == (event, reading, writing)


def test_fds_for_the_reply_have_their_index_and_failure_closes_them(call: Call) -> None:
    assert [call.attach(FileDescriptor(os.eventfd(0))) for _ in range(2)] == [0, 1]
    attached = call.succeed()
    assert attached is not None
    assert len(attached) == 2
    close_all(attached)
    lost = FileDescriptor(os.eventfd(0))
    call.attach(lost)
    call.fail()
    assert lost.closed


def test_a_reply_carries_no_more_than_the_kernel_takes(call: Call) -> None:
    shared = FileDescriptor(os.eventfd(0))
    for _ in range(MAX_FDS_PER_MESSAGE):
        call.attach(shared.duplicate())
    with pytest.raises(InvalidArgument, match="at most 253 fds"):
        call.attach(shared)
    assert shared.closed
    call.fail()


def test_a_batch_carries_none(names: FdNames, sets: FdSets) -> None:
    session = cast("Any", SimpleNamespace(id=1, names=names))
    call = Call(cast("Any", None), cast("Any", None), session, carries_fds=False)
    fd = FileDescriptor(os.eventfd(0))
    with pytest.raises(InvalidArgument, match="cannot carry an fd"):
        call.attach(fd)
    assert fd.closed


def test_a_door_without_fds_takes_sets_alone(sets: FdSets) -> None:
    call = Call(cast("Any", SimpleNamespace(fdsets=sets)), cast("Any", None))
    with pytest.raises(InvalidArgument, match="expects /dev/fdset/N here"):
        call.fd("fd", "event")
    sets.add(HeldFd(FileDescriptor(os.eventfd(0)), FdKind.EVENTFD), 0)
    call.fd("fd", "/dev/fdset/0").close()
