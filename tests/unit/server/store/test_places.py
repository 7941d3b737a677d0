"""Each open file once in the store, at a place of its own; whose number it has at the moment does not matter."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.store.places import Found, Places, name_of, place_of


@pytest.fixture
def fds() -> Iterator[list[FileDescriptor]]:
    made: list[FileDescriptor] = []
    yield made
    close_all(made)


def bell(fds: list[FileDescriptor]) -> FileDescriptor:
    fds.append(FileDescriptor(os.eventfd(0)))
    return fds[-1]


def test_one_file_has_one_place_by_whatever_number(fds: list[FileDescriptor]) -> None:
    places = Places()
    first, second = bell(fds), bell(fds)
    again = first.duplicate()
    fds.append(again)
    places.begin()
    assert [places.give(one, "x") for one in (first, second, again, first)] == [0, 1, 0, 0]
    assert [place for place, _ in places.to_store()] == [0, 1]
    places.begin()
    first.close()
    assert [places.give(one, "x") for one in (again, second)] == [0, 1]
    assert (places.to_store(), places.unused()) == ([], [])


def test_a_number_that_is_used_again_is_another_file(fds: list[FileDescriptor]) -> None:
    """All eventfds have one inode: what is closed is known by its owner, never by its number."""
    places = Places()
    old = bell(fds)
    number = old.number
    places.begin()
    assert places.give(old, "x") == 0
    places.to_store()
    old.close()
    new = bell(fds)
    assert new.number == number
    places.begin()
    assert places.give(new, "x") == 1
    assert [place for place, _ in places.to_store()] == [1]
    assert places.unused() == [0]
    places.begin()
    assert (places.give(new, "x"), places.unused()) == (1, [])


def test_an_eventfd_lent_by_number_is_known_by_its_owner(fds: list[FileDescriptor]) -> None:
    places = Places()
    old = bell(fds)
    number = old.number
    places.begin()
    assert [places.give(old, "x"), places.give(number, "x")] == [0, 0]
    places.to_store()
    old.close()
    new = bell(fds)
    assert new.number == number
    places.begin()
    assert [places.give(new, "x"), places.give(number, "x")] == [1, 1]
    assert [place for place, _ in places.to_store()] == [1]
    assert places.unused() == [0]


def test_memory_and_sockets_may_be_lent_by_number(fds: list[FileDescriptor]) -> None:
    places = Places()
    number = os.memfd_create("a")
    places.begin()
    assert places.give(number, "x") == 0
    os.close(number)
    with socket.socket(socket.AF_UNIX) as other:
        assert other.fileno() == number
        places.begin()
        assert places.give(other.fileno(), "x") == 1
        assert places.unused() == [0]


def test_what_a_dead_server_left_keeps_its_place(fds: list[FileDescriptor]) -> None:
    kept, spare = bell(fds), bell(fds)
    found = Found({4: kept.duplicate(), 9: spare.duplicate()})
    taken = found.take(4)
    fds.append(taken)
    with pytest.raises(LookupError, match="fd 5 is named, and has not come back"):
        found.take(5)
    places = Places()
    assert places.adopt(found) == [9], "nobody's: to be removed from the store"
    found.close()
    places.begin()
    assert places.give(taken, "x") == 4
    assert places.to_store() == [], "it is there already"
    assert places.give(bell(fds), "x") == 10, "a name never means two things"
    assert places.place_here(taken) == 4


def test_names() -> None:
    assert [place_of(name) for name in (name_of(7), "vfiod-state", "qmp", "vfiod-", "7")] == [7, None, None, None, None]
