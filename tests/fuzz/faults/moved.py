"""The machine's part of a take-over, with the model of the kernel: described, and made again in another loop.

The giver's loop stands still meanwhile, as it does. Afterwards the second machine dies as a process dies, whatever came
of it: its fds are closed, and nothing else. So the first one's picture is in all cases the one before.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
from tests.fuzz.faults.bench import Bench
from tests.fuzz.faults.sweep import Operation, difference

from vfiod.protocol.catalogue.monitor import RunState, StatusInfo
from vfiod.protocol.errors import CommandError, VfiodError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.events import EventHub
from vfiod.server.machine import Machine
from vfiod.server.machine.keeping import rehome
from vfiod.server.takeover.whole import describe, rebuild

__all__ = ["moves"]

Step = Callable[[Bench], Any]


def _snapshot(machine: Machine) -> Any:
    shown = msgspec.to_builtins(machine.snapshot(StatusInfo(running=True, status=RunState.RUNNING), []))
    for held in shown["fdsets"]:
        for one in held["fds"]:
            del one["fd"]
    return shown


def _take(bench: Bench, data: bytes, fds: list[FileDescriptor], before: set[str]) -> Any:
    """The other process: makes all of it again, and dies. Returns what it showed."""
    loop = asyncio.new_event_loop()
    machine: Machine | None = None

    async def main() -> Any:
        nonlocal machine
        machine = Machine("test", hub=EventHub(loop.call_later), syscalls=bench.kernel)
        await rebuild(machine, data, fds)
        shown = _snapshot(machine)
        rehome(machine)
        return shown

    try:
        return loop.run_until_complete(main())
    finally:
        assert machine is not None
        for task in asyncio.all_tasks(loop):
            task.cancel()
        machine.executor.shutdown()
        for thing in gc.get_objects():
            if isinstance(thing, FileDescriptor) and not thing.closed and str(thing.number) not in before:
                thing.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its loop's own fds
            loop.close()


async def move(bench: Bench) -> None:
    """Hand over to one that dies then; what it shows otherwise is in the picture."""
    bench.notes["otherwise"] = None
    await bench.settle()
    told = describe(bench.machine)
    before = {number for number in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{number}")}
    fds = [FileDescriptor.duplicate_of(number) for _, number in told.fds]
    came: list[Any] = []

    def work() -> None:
        try:
            came.append(_take(bench, told.data, fds, before))
        except (OSError, VfiodError) as error:
            came.append(CommandError(f"Taking over failed: {error}"))  # without what its traceback holds
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    [result] = came
    if isinstance(result, BaseException):
        raise result
    bench.notes["otherwise"] = dict(one.split(": ", 1) for one in difference(_snapshot(bench.machine), result))


def _watched(step: Step) -> Step:
    async def prepare(bench: Bench) -> None:
        bench.notes["parents"] = [lambda: bench.notes.get("otherwise")]
        await step(bench)

    return prepare


def moves(*ready: tuple[str, Step]) -> tuple[Operation, ...]:
    """A take-over of each of these machines."""
    names = ("Taking over failed",)
    # Not starved of fds: its loop would be, which is not the server's.
    return tuple(Operation(f"take-over {name}", _watched(step), move, names, starves=False) for name, step in ready)
