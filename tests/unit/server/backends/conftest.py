"""A fake kernel, the machine's guest memory in small, and groups on top."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import AddressSpace, Mapping
from vfiod.server.backends.group import ContainerSource, GroupOrigin, KernelGroups
from vfiod.server.kernel.memory import SharedMemory

PAGE = 4096


@dataclass
class Guest:
    """What GuestMemory does, without its checks: replays into spaces, and says what happened."""

    mappings: list[Mapping] = field(default_factory=list)
    spaces: list[AddressSpace] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def attach(self, space: AddressSpace) -> None:
        for mapping in self.mappings:
            space.map(mapping)
        self.spaces.append(space)
        self.seen.append(f"attach {space.name}")

    def detach(self, space: AddressSpace) -> None:
        self.spaces.remove(space)
        self.seen.append(f"detach {space.name}")


@dataclass
class Host:
    """Everything a test of groups needs."""

    kernel: FakeKernel
    guest: Guest
    groups: KernelGroups

    def group_fd(self, number: int) -> FileDescriptor:
        """What a manager passes."""
        return FileDescriptor(self.kernel.open(f"/dev/vfio/{number}"))

    def container(self, name: str = "c0", object_id: str | None = None) -> ContainerSource:
        return ContainerSource(FileDescriptor(self.kernel.open("/dev/vfio/vfio")), name, object_id)

    def origin(self, host: str = "0000:01:00.0", **settings: object) -> GroupOrigin:
        return GroupOrigin("vfio-pci", host, **settings)  # type: ignore[arg-type]


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd = FileDescriptor(os.memfd_create("ram", os.MFD_CLOEXEC))
    os.ftruncate(fd.number, 16 * PAGE)
    shared = SharedMemory(fd, name="ram")
    yield shared
    shared.close()


@pytest.fixture
def host() -> Iterator[Host]:
    """A host with devices 0000:01:00.0 and .1 in group 7, 0000:02:00.0 in group 8."""
    kernel = FakeKernel()
    kernel.add_device("0000:01:00.0", 7)
    kernel.add_device("0000:01:00.1", 7)
    kernel.add_device("0000:02:00.0", 8)
    guest = Guest()
    before = sorted(os.listdir("/proc/self/fd"))
    host = Host(kernel, guest, KernelGroups(kernel, guest.attach, guest.detach))
    yield host
    host.groups.close()
    assert kernel.nothing_is_open()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not guest.spaces
