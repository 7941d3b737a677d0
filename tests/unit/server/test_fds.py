"""fds that wait, are named, or lie in sets: one owner each, closed exactly once. Real fds, the kernel's view."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vfiod.protocol.errors import CommandError, InvalidArgument, LimitExceeded
from vfiod.protocol.fd import FdKind, FileDescriptor
from vfiod.protocol.limits import MAX_FD_NAME, MAX_FDS_PER_SET, MAX_FDSETS, MAX_NAMED_FDS, MAX_PENDING_FDS
from vfiod.server.fds import FdNames, FdSets, HeldFd
from vfiod.server.kernel.kinds import kind_of


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def _fd() -> FileDescriptor:
    return FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC))


@pytest.fixture
def names() -> Iterator[FdNames]:
    names = FdNames(kind_of)
    yield names
    names.close()


def test_fds_are_named_in_the_order_of_arrival(names: FdNames) -> None:
    first, second, third = _fd(), FileDescriptor(os.memfd_create("m")), _fd()
    names.receive([first, second])
    names.receive([third])
    assert names.pending == 3
    assert [names.name("a"), names.name("b"), names.name("c")] == [FdKind.EVENTFD, FdKind.MEMFD, FdKind.EVENTFD]
    for name, fd in (("a", first), ("b", second), ("c", third)):
        held = names.look(name)
        assert held is not None
        assert held.fd is fd


def test_without_an_fd_qemus_words(names: FdNames) -> None:
    with pytest.raises(CommandError, match=r"^No file descriptor supplied via SCM_RIGHTS$"):
        names.name("a")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1f", "Parameter 'fdname' expects a name not starting with a digit"),
        ("", "Parameter 'fdname' expects a name, not empty and not a path, got ''"),
        ("/dev/fdset/1", "Parameter 'fdname' expects a name, not empty and not a path, got '/dev/fdset/1'"),
        ("x" * (MAX_FD_NAME + 1), f"Parameter 'fdname' expects at most {MAX_FD_NAME} characters, got 256"),
    ],
)
def test_a_refused_name_closes_its_fd_as_qemu_does(names: FdNames, name: str, words: str) -> None:
    fd = _fd()
    names.receive([fd])
    with pytest.raises(InvalidArgument) as refused:
        names.name(name)
    assert str(refused.value) == words
    assert fd.closed
    assert names.pending == 0


def test_a_name_that_exists_is_replaced_and_its_fd_closed(names: FdNames) -> None:
    first, second = _fd(), _fd()
    names.receive([first, second])
    names.name("a")
    names.name("a")
    assert first.closed
    assert not second.closed


def test_too_many_waiting_are_closed_and_the_earlier_stay(names: FdNames) -> None:
    names.receive([_fd() for _ in range(MAX_PENDING_FDS - 1)])
    late = [_fd(), _fd()]
    with pytest.raises(LimitExceeded, match=r"2 file descriptors were closed"):
        names.receive(late)
    assert all(fd.closed for fd in late)
    assert names.pending == MAX_PENDING_FDS - 1
    names.receive([_fd()])
    assert names.pending == MAX_PENDING_FDS


def test_too_many_names_are_refused() -> None:
    names = FdNames(kind_of)
    shared = _fd()
    for index in range(MAX_NAMED_FDS):
        names.receive([shared.duplicate()])
        names.name(f"n{index}")
    names.receive([_fd()])
    with pytest.raises(CommandError, match=f"has {MAX_NAMED_FDS} named fds"):
        names.name("one-more")
    names.receive([_fd()])
    names.name("n0")  # replacing is no more than there were
    names.close()
    shared.close()


def test_closefd(names: FdNames) -> None:
    fd = _fd()
    names.receive([fd])
    names.name("a")
    names.remove("a")
    assert fd.closed
    with pytest.raises(CommandError, match=r"^File descriptor named 'a' not found$"):
        names.remove("a")


def test_consume_leaves_a_name_that_means_another_fd_by_now(names: FdNames) -> None:
    names.receive([_fd(), _fd()])
    names.name("a")
    used = names.look("a")
    assert used is not None
    names.name("a")
    names.consume("a", used)
    assert names.look("a") is not None


def test_infos_show_named_and_waiting(names: FdNames) -> None:
    named, waiting = _fd(), FileDescriptor(os.memfd_create("m"))
    names.receive([named, waiting])
    names.name("a")
    infos = list(names.infos("session:1"))
    assert [(info.owner, info.name, info.kind, info.number, info.pending) for info in infos[:1]] == [
        ("session:1", "a", FdKind.EVENTFD, named.number, False)
    ]
    assert (infos[1].kind, infos[1].number, infos[1].pending) == (FdKind.MEMFD, waiting.number, True)


# --- sets ------------------------------------------------------------------------------------------


@pytest.fixture
def sets() -> Iterator[FdSets]:
    sets = FdSets()
    yield sets
    sets.close()


def _held(opaque: str | None = None) -> HeldFd:
    return HeldFd(_fd(), FdKind.EVENTFD, opaque)


def test_without_a_number_the_lowest_free_one(sets: FdSets) -> None:
    assert [sets.add(_held(), None) for _ in range(3)] == [0, 1, 2]
    sets.remove(1, None)
    assert sets.add(_held(), None) == 1
    assert sets.add(_held(), 7) == 7
    assert sets.add(_held(), 7) == 7
    assert sets.add(_held(), None) == 3


def test_infos_echo_opaque_and_are_sorted(sets: FdSets) -> None:
    sets.add(_held("disk"), 5)
    sets.add(_held(), 2)
    infos = sets.infos()
    assert [info.fdset_id for info in infos] == [2, 5]
    assert infos[1].fds[0].opaque == "disk"
    assert [info.owner for info in sets.fd_infos()] == ["fdset:2", "fdset:5"]


def test_a_negative_number_is_refused_in_qemus_words_and_the_fd_closed(sets: FdSets) -> None:
    held = _held()
    with pytest.raises(InvalidArgument, match=r"^Parameter 'fdset-id' expects a non-negative value$"):
        sets.add(held, -1)
    assert held.fd.closed
    held = _held()
    with pytest.raises(InvalidArgument, match="expects at most"):
        sets.add(held, 2**63)
    assert held.fd.closed


def test_removing(sets: FdSets) -> None:
    first, second = _held(), _held()
    sets.add(first, 3)
    sets.add(second, 3)
    number = first.fd.number
    sets.remove(3, number)
    assert first.fd.closed
    with pytest.raises(CommandError, match=rf"^File descriptor named 'fdset-id:3, fd:{number}' not found$"):
        sets.remove(3, number)
    sets.remove(3, None)
    assert second.fd.closed
    with pytest.raises(CommandError, match=r"^File descriptor named 'fdset-id:3' not found$"):
        sets.remove(3, None)
    assert sets.fds(3) is None


def test_a_set_without_fds_ceases_to_be(sets: FdSets) -> None:
    held = _held()
    sets.add(held, 3)
    sets.remove(3, held.fd.number)
    assert sets.infos() == []


def test_sets_are_bounded() -> None:
    sets = FdSets()
    shared = _fd()
    for _ in range(MAX_FDSETS):
        sets.add(HeldFd(shared.duplicate(), FdKind.EVENTFD), None)
    for number in (None, 1000):
        held = _held()
        with pytest.raises(CommandError, match=f"There are {MAX_FDSETS} fd sets"):
            sets.add(held, number)
        assert held.fd.closed
    for _ in range(MAX_FDS_PER_SET - 1):
        sets.add(HeldFd(shared.duplicate(), FdKind.EVENTFD), 0)
    held = _held()
    with pytest.raises(CommandError, match=f"holds {MAX_FDS_PER_SET} fds"):
        sets.add(held, 0)
    assert held.fd.closed
    sets.close()
    shared.close()


def test_an_fd_that_cannot_be_looked_at_keeps_its_owner() -> None:
    def unseen(number: int) -> FdKind:
        raise OSError(9, "Bad file descriptor")

    names = FdNames(unseen)
    fd = FileDescriptor(os.eventfd(0))
    names.receive([fd])
    with pytest.raises(OSError):
        names.name("a")
    assert names.pending == 1
    names.close()
    assert fd.closed
