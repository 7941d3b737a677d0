"""One owner, one close: seen from the kernel's side."""

from __future__ import annotations

import array
import errno
import gc
import os
import socket

import pytest

from vfiod.protocol import fd as fd_module
from vfiod.protocol.fd import FileDescriptor, close_all, rights_of


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True


def new() -> FileDescriptor:
    return FileDescriptor(os.memfd_create("test"))


def test_close_closes_once() -> None:
    fd = new()
    number = fd.number
    fd.close()
    assert fd.closed and not is_open(number)
    again = os.memfd_create("taken")  # takes the lowest number, most likely the same
    fd.close()
    assert is_open(again)
    os.close(again)


def test_the_context_closes() -> None:
    with new() as fd:
        number = fd.fileno()
        assert is_open(number)
    assert not is_open(number)


def test_a_closed_one_lends_no_number() -> None:
    fd = new()
    fd.close()
    with pytest.raises(ValueError, match="closed or was given away"):
        _ = fd.number
    assert repr(fd) == "<FileDescriptor closed>"


def test_giving_away_ends_the_duty() -> None:
    fd = new()
    number = fd.give_away()
    assert fd.closed
    fd.close()
    assert is_open(number)
    os.close(number)


def test_a_duplicate_lives_on_and_is_not_inherited() -> None:
    fd = new()
    with fd.duplicate() as duplicate:
        fd.close()
        assert is_open(duplicate.number)
        assert not os.get_inheritable(duplicate.number)


def test_duplicating_a_bad_number_fails() -> None:
    fd = new()
    number = fd.number
    fd.close()
    with pytest.raises(OSError):
        FileDescriptor.duplicate_of(number)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        FileDescriptor(-1)


def test_a_forgotten_one_warns_and_is_closed() -> None:
    fd = new()
    number = fd.number
    with pytest.warns(ResourceWarning, match="unclosed"):
        del fd
        gc.collect()
    assert not is_open(number)


def test_close_all_passes_over_closed_ones() -> None:
    fds = [new(), new(), new()]
    numbers = [fd.number for fd in fds]
    fds[1].close()
    close_all(fds)
    assert not any(map(is_open, numbers))


# --- SCM_RIGHTS -----------------------------------------------------------------------------------------------
def test_constants_are_the_kernels() -> None:
    assert fd_module.SOL_SOCKET == socket.SOL_SOCKET
    assert fd_module.SCM_RIGHTS == socket.SCM_RIGHTS
    assert int(socket.MSG_CTRUNC) == fd_module.MSG_CTRUNC
    assert int(socket.MSG_CMSG_CLOEXEC) == fd_module.MSG_CMSG_CLOEXEC
    assert array.array("i").itemsize == fd_module.FD_BYTES


def test_rights_take_what_a_real_socket_gives() -> None:
    left, right = socket.socketpair()
    with left, right, new() as first, new() as second:
        socket.send_fds(left, [b" "], [first.number, second.number])
        data, ancillary, flags, _ = right.recvmsg(1, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        received = rights_of(ancillary)
        assert (data, flags & socket.MSG_CTRUNC, len(received)) == (b" ", 0, 2)
        assert [os.fstat(fd.number).st_ino for fd in received] == [os.fstat(fd.number).st_ino for fd in (first, second)]
        assert not any(os.get_inheritable(fd.number) for fd in received)
        close_all(received)


def test_what_came_before_a_truncation_is_owned() -> None:
    left, right = socket.socketpair()
    fds = [new() for _ in range(4)]
    with left, right:
        socket.send_fds(left, [b" "], [fd.number for fd in fds])
        _, ancillary, flags, _ = right.recvmsg(1, socket.CMSG_LEN(8), socket.MSG_CMSG_CLOEXEC)
        received = rights_of(ancillary)
        assert flags & socket.MSG_CTRUNC
        assert len(received) == 2
        close_all(received)
    close_all(fds)


def test_other_ancillary_data_are_left_alone() -> None:
    assert rights_of([(socket.SOL_SOCKET, 2, b"\0" * 12), (99, socket.SCM_RIGHTS, b"\0" * 4)]) == []


def test_half_a_number_is_no_fd() -> None:
    with new() as fd:
        data = array.array("i", [os.dup(fd.number)]).tobytes() + b"\1\2"
        (received,) = rights_of([(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)])
        received.close()
