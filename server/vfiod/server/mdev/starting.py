"""Start and shutdown of a VM: they span all parents that have devices, and are decided as one.

While it lasts, every one of those parents' lanes is taken: nothing is made, destroyed or unregistered meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.mediated import MdevStarted, MdevStopped
from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive
from vfiod.server import trace
from vfiod.server.lanes import Turn
from vfiod.server.mdev.calls import quietly
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.registered import Registered

__all__ = ["Starting"]


class Starting:
    """Starts and shuts down the devices of VMs. On the loop's thread.

    Args:
        parents: those of the bus, by name.
        emit: sends an event.

    """

    def __init__(self, parents: Mapping[str, Registered], emit: Callable[[EventData], None]) -> None:
        self._parents = parents
        self._emit = emit
        self._deciding = asyncio.Lock()

    @asynccontextmanager
    async def _all_lanes(self, what: str) -> AsyncIterator[list[tuple[Registered, Turn]]]:
        """The turn of every parent that has devices."""
        async with self._deciding, AsyncExitStack() as stack:
            turns = []
            for name in sorted(self._parents):
                record = self._parents.get(name)
                if record is not None and (record.devices or record.lane.busy):
                    turns.append((record, await stack.enter_async_context(record.lane.turn(what))))
            yield [(record, turn) for record, turn in turns if not record.hidden]

    async def start(self, vm: str) -> None:
        """Start every device that is not started for this VM yet, or none. Raises what a parent refused with, Busy."""
        async with self._all_lanes("mdev-start") as turns:
            for record, _ in turns:
                for instance in record.devices.values():
                    if instance.vm not in (None, vm):
                        raise Busy(f"{instance.what} is started for VM {instance.vm}; mdev-shutdown that one first")
            started: list[tuple[Registered, Turn, list[Instance]]] = []
            for record, turn in turns:
                todo = [instance for instance in record.devices.values() if instance.vm is None]
                if not todo:
                    continue
                try:
                    await turn.run(partial(record.start, vm, todo))
                except CommandError:
                    for other, its_turn, instances in reversed(started):
                        await its_turn.run(partial(quietly, "shutdown", other.what, other.shutdown, vm, instances))
                    raise
                started.append((record, turn, todo))
            for _, _, instances in started:
                for instance in instances:
                    instance.vm = vm
                    self._emit(MdevStarted(uuid=instance.uuid, vm=vm))
                    if trace.mdev_started.on:
                        trace.mdev_started(device=instance.uuid, vm=vm)

    async def shutdown(self, vm: str) -> None:
        """Shut down this VM's devices. Every parent is told; then the first failure is raised. DeviceNotActive."""
        failure: CommandError | None = None
        any_started = False
        async with self._all_lanes("mdev-shutdown") as turns:
            for record, turn in turns:
                todo = [instance for instance in record.devices.values() if instance.vm == vm]
                if not todo:
                    continue
                any_started = True
                try:
                    await turn.run(partial(record.shutdown, vm, todo))
                except CommandError as error:
                    failure = failure or error
                    continue
                for instance in todo:
                    instance.vm = None
                    self._emit(MdevStopped(uuid=instance.uuid, vm=vm))
                    if trace.mdev_shut_down.on:
                        trace.mdev_shut_down(device=instance.uuid, vm=vm)
        if failure is not None:
            raise failure
        if not any_started:
            raise DeviceNotActive(f"No mediated device is started for VM {vm}")
