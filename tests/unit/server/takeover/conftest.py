"""Two machines of one process, of which the second is made of what the first says of itself."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from tests.unit.server.machine.conftest import World

from vfiod.protocol.catalogue.monitor import RunState, StatusInfo
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.takeover.whole import busy, describe, rebuild

Two = Callable[[Callable[[World, World], Awaitable[None]]], None]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def two() -> Two:
    """Two worlds of one process, of which the second has nothing. They share the kernel, and the fds afterwards."""

    def run(scenario: Callable[[World, World], Awaitable[None]]) -> None:
        async def main() -> None:
            first = World()
            second = World()
            second.kernel = first.kernel
            second.machine._calls = second.machine.sources._calls = first.kernel
            try:
                await asyncio.wait_for(scenario(first, second), 120)
            finally:
                await second.end()
                await first.end()

        before = open_fds()
        asyncio.run(main())
        assert open_fds() == before

    return run


async def move(first: World, second: World) -> Any:
    """What a hand-over does, without a socket."""
    assert busy(first.machine) is None
    told = describe(first.machine)
    # A description is a value: it says the same again, and has changed nothing.
    assert describe(first.machine) == told
    fds = [FileDescriptor.duplicate_of(number) for _, number in told.fds]
    return await rebuild(second.machine, told.data, fds)


def picture(world: World) -> Any:
    """Everything that can be asked of a machine."""
    snapshot = world.machine.snapshot(StatusInfo(running=True, status=RunState.RUNNING), [])
    shown = msgspec.to_builtins(snapshot)
    for held in shown["fdsets"]:
        for one in held["fds"]:
            del one["fd"]
    return shown, [msgspec.to_builtins(one.region_infos()) for one in world.machine.devices.all()]


def bell() -> FileDescriptor:
    return FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK))


def rung(fd: FileDescriptor) -> int:
    try:
        return os.eventfd_read(fd.number)
    except BlockingIOError:
        return 0
