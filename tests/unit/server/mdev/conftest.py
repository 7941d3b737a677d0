"""A real loop, real eventfds, real memory: the mediated bus needs nothing faked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel.memory import SharedMemory
from vfiod.server.mdev.instance import MdevHost
from vfiod.server.mdev.space import Piece, Translation


class Bell:
    """An eventfd of the test: blocking, as an unfriendly user makes it."""

    def __init__(self) -> None:
        self.fd = FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC))

    @property
    def number(self) -> int:
        return self.fd.number

    def rung(self) -> int:
        """How often since the last look."""
        try:
            buffer = bytearray(8)
            os.preadv(self.number, [buffer], -1, os.RWF_NOWAIT)
            return int.from_bytes(buffer, "little")
        except BlockingIOError:
            return 0

    def ring(self) -> None:
        os.eventfd_write(self.number, 1)


class Ground:
    """A loop, eventfds, a host with memory."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.host = MdevHost("mdev under test", self.loop)
        self.space = Translation()
        self.host.memory = self.space
        self._bells: list[Bell] = []
        self._memories: list[SharedMemory] = []

    def bell(self) -> Bell:
        self._bells.append(Bell())
        return self._bells[-1]

    def settle(self) -> None:
        """Let the loop see what is readable."""
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def memory(self, size: int) -> SharedMemory:
        fd = FileDescriptor(os.memfd_create("guest"))
        os.ftruncate(fd.number, size)
        self._memories.append(SharedMemory(fd, name="guest"))
        return self._memories[-1]

    def map(self, iova: int, size: int, *, offset: int = 0, readonly: bool = False) -> SharedMemory:
        memory = self.memory(offset + size)
        self.space.add(Piece(iova, size, memory, offset, readonly))
        return memory

    def close(self) -> None:
        self.space.clear()
        for memory in self._memories:
            memory.close()
        for bell in self._bells:
            bell.fd.close()
        self.settle()
        self.loop.close()


@pytest.fixture
def ground() -> Iterator[Ground]:
    before = len(os.listdir("/proc/self/fd"))
    made = Ground()
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before, "the test left fds open"
