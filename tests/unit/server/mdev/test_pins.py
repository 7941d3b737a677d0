"""Guest memory that a device keeps in its own hands, and how it is taken back."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.kernel.syscalls import PAGE_SIZE
from vfiod.server.mdev.parent import DmaFault
from vfiod.server.mdev.space import Piece, Translation

if TYPE_CHECKING:
    from tests.unit.server.mdev.conftest import Ground

PAGES = 4
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    """As QEMU's memory-backend-memfd makes it: sealed."""
    fd = FileDescriptor(os.memfd_create("guest", os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.number, SIZE)
    fcntl.fcntl(fd.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with_memory = SharedMemory(fd, name="guest")
    yield with_memory
    with_memory.close()


def space_of(memory: SharedMemory, *, readonly: bool = False) -> Translation:
    """Two mappings, of which the second has the first's last page: 0x1000 to 0x2fff (pages 0, 1), 0x3000 (page 3)."""
    space = Translation()
    space.add(Piece(PAGE_SIZE, 2 * PAGE_SIZE, memory, 0, readonly))
    space.add(Piece(3 * PAGE_SIZE, PAGE_SIZE, memory, 3 * PAGE_SIZE, readonly))
    return space


def test_it_is_the_guests_memory_itself(memory: SharedMemory) -> None:
    space = space_of(memory)
    pin = space.pin(PAGE_SIZE + 100, 5000, writable=True)
    assert len(pin.view) == 5000
    memory.write(100, b"from the guest")
    assert bytes(pin.view[:14]) == b"from the guest"
    pin.view[4990:5000] = b"to theguest"[:10]
    assert memory.read(100 + 4990, 10) == b"to theguest"[:10]
    assert space.pins == 1
    pin.release()
    pin.release()
    assert (pin.released, space.pins) == (True, 0)
    with pytest.raises(ValueError, match="released"):
        pin.view[0]


def test_an_unmap_takes_it_back_whatever_was_kept(memory: SharedMemory) -> None:
    space = space_of(memory)
    memory.write(0, b"secret")
    taken, kept_too, other = (space.pin(at, 6, writable=True) for at in (PAGE_SIZE, PAGE_SIZE, 3 * PAGE_SIZE))
    piece = kept_too.view[0:3]
    words = taken.view.cast("B")
    space.remove(PAGE_SIZE, 2 * PAGE_SIZE)
    assert (taken.released, kept_too.released, other.released) == (True, True, False)
    assert (bytes(piece), bytes(words)) == (bytes(3), bytes(6)), "what was kept shows empty pages"
    piece[:] = b"bad"
    words[0] = 7
    assert memory.read(0, 6) == b"secret", "and writes to nothing"
    assert bytes(other.view) == bytes(6)
    space.clear()
    assert other.released


def test_a_read_only_view_is_revoked_too(memory: SharedMemory) -> None:
    memory.write(0, b"secret")
    space = space_of(memory, readonly=True)
    pin = space.pin(PAGE_SIZE, 6, writable=False)
    assert pin.view.readonly
    kept = pin.view[:]
    assert bytes(kept) == b"secret"
    space.clear()
    assert bytes(kept) == bytes(6)


@pytest.mark.parametrize(
    ("iova", "size", "writable", "at", "readonly"),
    [
        (0, 1, True, 0, False),
        (4 * PAGE_SIZE, 1, True, 4 * PAGE_SIZE, False),
        (3 * PAGE_SIZE, PAGE_SIZE + 1, True, 4 * PAGE_SIZE, False),
        (PAGE_SIZE, 1, True, PAGE_SIZE, True),
    ],
)
def test_what_is_not_mapped_faults(
    memory: SharedMemory, iova: int, size: int, writable: bool, at: int, readonly: bool
) -> None:
    space = space_of(memory, readonly=readonly)
    with pytest.raises(DmaFault) as caught:
        space.pin(iova, size, writable=writable)
    assert (caught.value.iova, caught.value.readonly) == (at, readonly)
    assert space.pins == 0


@pytest.mark.parametrize(("iova", "size"), [(PAGE_SIZE, 0), (PAGE_SIZE, -1), (PAGE_SIZE, 2 * PAGE_SIZE + 1)])
def test_it_lies_in_one_mapping(memory: SharedMemory, iova: int, size: int) -> None:
    with pytest.raises(OSError) as caught:
        space_of(memory).pin(iova, size, writable=True)
    assert caught.value.errno == errno.EINVAL


def test_a_file_that_could_be_cut_is_refused(ground: Ground) -> None:
    """Its owner's ftruncate would be this process's SIGBUS."""
    ground.map(PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(OSError, match="F_SEAL_SHRINK") as caught:
        ground.host.pin(PAGE_SIZE, 100)
    assert caught.value.errno == errno.EPERM
    assert ground.host.read_memory(PAGE_SIZE, 4) == bytes(4)


def test_before_it_is_open_nothing_can_be_pinned(ground: Ground) -> None:
    ground.host.memory = None
    with pytest.raises(DmaFault):
        ground.host.pin(0, 1)


def test_memory_that_is_read_only_by_itself(memory: SharedMemory) -> None:
    fd = FileDescriptor(os.open(f"/proc/self/fd/{memory.number}", os.O_RDONLY | os.O_CLOEXEC))
    readonly = SharedMemory(fd, readonly=True, name="rom")
    with pytest.raises(OperationFailed, match="EACCES"):
        readonly.pin(0, 1, writable=True)
    readonly.pin(0, 1, writable=False).release()
    readonly.close()


def test_released_from_two_threads_at_once(memory: SharedMemory) -> None:
    for _ in range(50):
        pin = memory.pin(0, 10, writable=True)
        kept = pin.view[:]
        threads = [threading.Thread(target=pin.release) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pin.released
        assert bytes(kept) == bytes(10)
