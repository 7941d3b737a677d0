"""Memory of clients of exports: whose it is, where it is, and when it goes.

Rules are those of behaviour.md, section 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_CLIENT_FILES
from vfiod.server.backends.base import GuestFile, Mapping
from vfiod.server.dma.clients import Client
from vfiod.server.dma.files import open_memory
from vfiod.server.dma.guest_memory import GuestMemory

PAGE = 4096


class Space:
    """An address space that remembers, refuses what overlaps, and fails when told to."""

    def __init__(self, name: str, page_size: int = PAGE) -> None:
        self.name = name
        self.page_size = page_size
        self.mapped: dict[int, Mapping] = {}
        self.fail: str | None = None
        self.calls = 0

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, (1 << 40) - 1),)

    def map(self, mapping: Mapping) -> None:
        self._call()
        for one in self.mapped.values():
            assert mapping.iova > one.last or one.iova > mapping.last, "the kernel would say EEXIST"
        _ = mapping.memory.number
        self.mapped[mapping.iova] = mapping

    def unmap(self, iova: int, size: int) -> None:
        self._call()
        assert self.mapped.pop(iova).size == size

    def _call(self) -> None:
        self.calls += 1
        if self.fail is not None:
            raise OperationFailed("VFIO_IOMMU_MAP_DMA", self.name, errno=self.fail)


class Messages:
    """Memory reached by messages."""

    name = "memory by messages"
    readonly = False
    closed = False
    size = 1 << 64
    number = 0

    def address(self) -> int:
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        raise NotImplementedError

    def pin(self, offset: int, length: int, *, writable: bool) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def memfd(size: int = 1 << 20) -> FileDescriptor:
    fd = FileDescriptor(os.memfd_create("guest"))
    os.ftruncate(fd.number, size)
    return fd


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    before = open_fds()
    made = GuestMemory(lambda *_: None)
    yield made
    made.close()
    assert open_fds() == before


def joined(memory: GuestMemory, space: Space, name: str = "a", remote: GuestFile | None = None) -> Client:
    return memory.clients.join(name, space, remote)


def put(client: Client, iova: int, pages: int, fd: FileDescriptor, *, offset: int = 0, readonly: bool = False) -> None:
    client.map(iova, pages * PAGE, fd.duplicate(), offset=offset, readonly=readonly)


def refused(errno: str, client: Client, iova: int, size: int, fd: FileDescriptor | None, *, offset: int = 0) -> None:
    before = open_fds()
    with pytest.raises(CommandError) as caught:
        client.map(iova, size, None if fd is None else fd.duplicate(), offset=offset, readonly=False)
    assert caught.value.errno == errno
    assert open_fds() == before


def test_a_client_reaches_the_space_of_its_device_alone(memory: GuestMemory) -> None:
    one, other = Space("one"), Space("other")
    memory.attach(one)
    memory.attach(other)
    client = joined(memory, one)
    with memfd() as fd:
        put(client, 0, 16, fd)
    assert (list(one.mapped), list(other.mapped)) == ([0], [])
    assert (client.mappings, client.mapped_bytes) == (1, 16 * PAGE)
    client.unmap(0, 16 * PAGE)
    assert not one.mapped


def test_the_same_mapping_of_two_clients_is_made_once_and_goes_with_the_last(memory: GuestMemory) -> None:
    space = Space("shared")
    first, second = joined(memory, space, "first"), joined(memory, space, "second")
    with memfd() as fd:
        put(first, 0, 16, fd)
        put(second, 0, 16, fd)
        assert space.calls == 1
        put(second, 16 * PAGE, 16, fd, offset=16 * PAGE)
        [shared, own] = memory.infos()
        assert shared.clients == ["first", "second"]
        assert own.clients == ["second"]
        first.unmap(0, 16 * PAGE)
        assert sorted(space.mapped) == [0, 16 * PAGE]
        with pytest.raises(InvalidArgument, match="not mapped by first") as caught:
            first.unmap(0, 16 * PAGE)
        assert caught.value.errno == "ENOENT"
        put(first, 0, 16, fd)
        second.leave()
        assert sorted(space.mapped) == [0]
        first.leave()
        assert not space.mapped
        first.leave()
        refused("ENOTCONN", first, 0, PAGE, fd)


@pytest.mark.parametrize(
    ("iova", "pages", "offset", "readonly"),
    [
        (0, 16, PAGE, False),
        (0, 16, 0, True),
        (0, 8, 0, False),
        (8 * PAGE, 8, 8 * PAGE, False),
        (15 * PAGE, 2, 0, False),
    ],
)
def test_one_that_differs_and_overlaps_is_refused(
    memory: GuestMemory, iova: int, pages: int, offset: int, readonly: bool
) -> None:
    space = Space("shared")
    first, second = joined(memory, space, "first"), joined(memory, space, "second")
    with memfd() as fd, memfd() as another:
        put(first, 0, 16, fd)
        for client in (first, second):
            with pytest.raises(InvalidArgument, match="mapped by first") as caught:
                put(client, iova, pages, fd, offset=offset, readonly=readonly)
            assert caught.value.errno == "EEXIST"
        refused("EEXIST", second, 0, 16 * PAGE, another)
        refused("EEXIST", second, 0, 16 * PAGE, None)
        refused("EEXIST", first, 0, 16 * PAGE, fd)
        put(second, 16 * PAGE, 1, fd)
    assert sorted(space.mapped) == [0, 16 * PAGE]


def test_what_cannot_be_is_refused_and_nothing_stays_open(memory: GuestMemory) -> None:
    client = joined(memory, Space("huge pages", 1 << 16))
    with memfd() as fd:
        for iova, size, offset in (
            (PAGE, 1 << 16, 0),
            (0, PAGE, 0),
            (0, 1 << 16, PAGE),
            (0, 0, 0),
            ((1 << 64) - PAGE, 1 << 16, 0),
            (0, 1 << 21, 0),
            (0, 1 << 16, 1 << 20),
            (1 << 40, 1 << 16, 0),
        ):
            with pytest.raises(CommandError):
                client.map(iova, size, fd.duplicate(), offset=offset, readonly=False)
        with FileDescriptor(os.open(f"/proc/self/fd/{fd.number}", os.O_RDONLY)) as readonly:
            refused("EINVAL", client, 0, 1 << 16, readonly)
            put(client, 0, 16, readonly, readonly=True)
            # The file is known now, and the fd is looked at nevertheless.
            refused("EINVAL", client, 1 << 20, 1 << 16, readonly)
    with FileDescriptor(os.eventfd(0)) as wrong:
        refused("EINVAL", client, 1 << 20, 1 << 16, wrong)


def test_a_space_that_refuses_leaves_everything_as_it_was(memory: GuestMemory) -> None:
    space = Space("full")
    client = joined(memory, space)
    with memfd() as fd:
        space.fail = "ENOMEM"
        refused("ENOMEM", client, 0, PAGE, fd)
        assert client.mappings == 0
        space.fail = None
        put(client, 0, 1, fd)
        space.fail = "EIO"
        with pytest.raises(OperationFailed):
            client.unmap(0, PAGE)
        assert (client.mappings, list(space.mapped)) == (1, [0])
        space.fail = None
        client.unmap(0, PAGE)


def test_a_client_whose_memory_cannot_be_taken_back_is_forgotten_all_the_same(memory: GuestMemory) -> None:
    space = Space("stuck")
    client = joined(memory, space)
    with memfd() as fd:
        put(client, 0, 1, fd)
        put(client, PAGE, 1, fd, offset=PAGE)
    space.fail = "EIO"
    client.leave()
    assert memory.infos() == []
    assert memory.clients.clients() == ()


def test_one_file_is_open_once(memory: GuestMemory) -> None:
    clients = [joined(memory, Space(str(number)), str(number)) for number in range(20)]
    before = open_fds()
    with memfd() as fd:
        for client in clients:
            for number in range(8):
                put(client, number * PAGE, 1, fd, offset=number * PAGE)
    assert open_fds() == before + 1
    for client in clients[1:]:
        client.leave()
    assert open_fds() == before + 1
    clients[0].unmap_all()
    assert open_fds() == before


def test_a_file_that_has_grown_is_opened_anew(memory: GuestMemory) -> None:
    space = Space("one")
    client = joined(memory, space)
    with memfd(PAGE) as fd:
        put(client, 0, 1, fd)
        os.ftruncate(fd.number, 2 * PAGE)
        put(client, PAGE, 1, fd, offset=PAGE)
        put(client, 2 * PAGE, 2, fd)
    assert space.mapped[PAGE].memory is space.mapped[2 * PAGE].memory
    assert space.mapped[0].memory is not space.mapped[PAGE].memory
    client.unmap(0, PAGE)
    client.unmap(2 * PAGE, 2 * PAGE)
    client.unmap(PAGE, PAGE)


def test_files_are_bounded(memory: GuestMemory) -> None:
    client = joined(memory, Space("many"))
    for number in range(MAX_CLIENT_FILES):
        with memfd(PAGE) as fd:
            put(client, number * PAGE, 1, fd)
    with memfd(PAGE) as fd:
        refused("ENOSPC", client, MAX_CLIENT_FILES * PAGE, PAGE, fd)


def test_what_the_machine_maps_too_is_counted_and_stays_while_it_is(memory: GuestMemory) -> None:
    space = Space("one")
    memory.attach(space)
    client = joined(memory, space)
    with memfd() as fd, memfd() as another:
        memory.map(0, 16 * PAGE, open_memory(fd.duplicate(), size=None, readonly=False, name="ram"))
        refused("EEXIST", client, 0, 16 * PAGE, another)
        refused("EEXIST", client, 0, 8 * PAGE, fd)
        put(client, 0, 16, fd)
        assert space.calls == 1
        with pytest.raises(Busy, match="counted on by a"):
            memory.unmap(0, 16 * PAGE)
        client.unmap(0, 16 * PAGE)
        assert list(space.mapped) == [0]
        memory.unmap(0, 16 * PAGE)
        put(client, 0, 16, fd)
        ram = open_memory(fd.duplicate(), size=None, readonly=False, name="ram")
        with pytest.raises(InvalidArgument, match="mapped by a"):
            memory.map(8 * PAGE, 16 * PAGE, ram, offset=8 * PAGE)
        ram.close()


def test_an_address_space_that_ends_takes_its_mappings_along(memory: GuestMemory) -> None:
    space = Space("one")
    memory.attach(space)
    client = joined(memory, space)
    with memfd() as fd:
        put(client, 0, 1, fd)
    memory.detach(space)
    assert (memory.infos(), client.mappings) == ([], 0)
    client.leave()


def test_memory_without_a_file_is_noted_or_reached_by_messages(memory: GuestMemory) -> None:
    kernel, python = Space("kernel"), Space("python")
    one = joined(memory, kernel)
    one.map(0, PAGE, None, offset=0, readonly=True)
    assert (kernel.mapped, one.unreachable_bytes, one.by_messages) == ({}, PAGE, False)
    with memfd() as fd:
        refused("EEXIST", one, 0, PAGE, fd)
    one.unmap(0, PAGE)
    other = joined(memory, python, remote=Messages())  # type: ignore[arg-type]  # what it cannot do is not asked
    other.map(0x1000, PAGE, None, offset=0, readonly=False)
    assert python.mapped[0x1000].offset == 0x1000, "it is asked for by its address"
    assert other.by_messages
    with memfd() as fd:
        put(other, 0x10000, 2, fd)
    assert other.by_messages, "some of it did not, however much came with a file"
    other.unmap(0x1000, PAGE)
    assert not other.by_messages
    other.leave()
    assert not python.mapped
