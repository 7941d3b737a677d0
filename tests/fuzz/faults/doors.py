"""Operations at the hypervisor's door, and on devices that another program serves; both on real sockets.

The programs are in this process: a small hypervisor in a thread, and a second machine that serves a device. So they
are not starved of fds: it would be theirs that are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tests.fuzz.faults.bench import Bench
from tests.fuzz.faults.sweep import Operation
from tests.integration.exports.hypervisor import Gone, Hypervisor, Refused, eventfd, memfd

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.exports import DeviceExportAttached, DeviceExportDetached, ExportState
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import close_all

__all__ = ["doors"]

Step = Callable[[Bench], Any]
MiB = 1 << 20
MDEV = "22222222-2222-3333-4444-555555555555"


def _path(bench: Bench) -> Path:
    return Path(bench.folder.name) / "d0.sock"


async def export(bench: Bench) -> None:
    await bench.command("device-export-add", id="e0", type="vfio-user", device="d0", path=str(_path(bench)))


def exported(ready: Step) -> Step:
    async def prepare(bench: Bench) -> None:
        await ready(bench)
        await export(bench)

    return prepare


async def attach(bench: Bench) -> None:
    """A hypervisor connects and looks at the device, as QEMU does."""

    def work() -> Hypervisor:
        made = Hypervisor(_path(bench))
        try:
            made.device()
            for index in range(9):
                _, fd = made.region(index) if index != vfio.PciRegion.VGA else (None, None)
                if fd is not None:
                    close_all(made.fds)
            made.irq(0)
        except BaseException:
            made.close()
            raise
        return made

    made = await _said(work)
    await bench.until(lambda: bool(bench.heard(DeviceExportAttached)))
    bench.notes["hypervisor"] = made
    bench.closers.append(lambda: _hang_up(bench))


async def _hang_up(bench: Bench) -> None:
    made = bench.notes.pop("hypervisor", None)
    if made is not None:
        made.close()
        await bench.until(lambda: bool(bench.heard(DeviceExportDetached)))


async def detach(bench: Bench) -> None:
    await _hang_up(bench)


async def _said(work: Callable[[], Any]) -> Any:
    """Do it in a thread; what the server refuses is a CommandError here."""
    try:
        return await asyncio.to_thread(work)
    except Refused as error:
        raise CommandError(f"d0: refused with {error}", errno=str(error)) from error
    except (Gone, ConnectionError) as error:
        raise CommandError("d0: hung up") from error


def attached(ready: Step) -> Step:
    async def prepare(bench: Bench) -> None:
        await exported(ready)(bench)
        await attach(bench)
        made: Hypervisor = bench.notes["hypervisor"]
        bench.notes["memory"] = memfd(MiB)
        bench.notes["bells"] = [eventfd() for _ in range(4)]
        bench.kept += [bench.notes["memory"], *bench.notes["bells"]]
        await asyncio.to_thread(made.write, 7, 4, 6, 2)

    return prepare


def asks(what: Callable[[Bench, Hypervisor], Any]) -> Step:
    async def run(bench: Bench) -> None:
        made: Hypervisor = bench.notes["hypervisor"]
        await _said(lambda: what(bench, made))

    return run


def after(ready: Step, *steps: Step) -> Step:
    async def prepare(bench: Bench) -> None:
        await ready(bench)
        for step in steps:
            await step(bench)

    return prepare


MAP = asks(lambda bench, made: made.map(64 * MiB, MiB, bench.notes["memory"].number))
UNMAP = asks(lambda bench, made: made.unmap(64 * MiB, MiB))
INTX = asks(lambda bench, made: made.trigger(0, bench.notes["bells"][0].number))
MSI = asks(lambda bench, made: made.trigger(1, *(one.number for one in bench.notes["bells"])))
NO_MSI = asks(lambda bench, made: made.irqs(vfio.SetIrqs.disable(1)))
READ = asks(lambda bench, made: made.read(0, 4))
WRITE = asks(lambda bench, made: made.write(0, 4, 1))
RESET = asks(lambda bench, made: made.reset())


# --- devices that another program serves -----------------------------------------------------------------


async def served(bench: Bench) -> None:
    """Another vfiod, with a built-in device behind a socket."""
    other = Bench()
    bench.notes["other"] = other
    bench.closers.append(other.end)
    await other.command("mdev-create", parent="primer", type="primer-pci", uuid=MDEV)
    await other.command("device_add", driver="vfio-pci", id="d0", mdev=MDEV)
    await export(other)

    def seen() -> Any:
        snapshot = other.machine.snapshot(other.server.status, [])
        found = msgspec.to_builtins(snapshot)
        assert other.machine.doors is not None
        doors = msgspec.to_builtins(other.machine.doors.infos())
        return {key: found[key] for key in ("devices", "irqs", "mappings")} | {"doors": [one["state"] for one in doors]}

    def settled() -> bool:
        assert other.machine.doors is not None
        [one] = other.machine.doors.infos()
        there = bench.machine.devices.exists("d0")
        return one.state is (ExportState.ATTACHED if there else ExportState.LISTENING)  # not on the way to one

    bench.notes["parents"] = [seen]
    bench.notes["settled"] = settled
    bench.name_memory("ram")
    await bench.command("dma-map", iova=0, size=MiB, fd="ram")
    bench.name_memory("new")


async def served_add(bench: Bench) -> None:
    other: Bench = bench.notes["other"]
    await bench.command("device_add", driver="vfio-pci", id="d0", socket=str(_path(other)))


async def served_start(bench: Bench) -> None:
    await bench.command("irq-start", device="d0", index="intx")


async def served_map(bench: Bench) -> None:
    await bench.command("dma-map", iova=64 * MiB, size=MiB, fd="new")


async def served_reset(bench: Bench) -> None:
    await bench.command("device-reset", id="d0")


def doors(group: Step, primer: Step) -> tuple[Operation, ...]:
    """The operations, on devices of the kernel and built-in ones."""
    found: list[Operation] = []
    for kind, ready in (("group", group), ("built-in mdev", primer)):
        at = attached(ready)
        table: tuple[tuple[str, Step, Step], ...] = (
            ("device-export-add", ready, export),
            ("client attaches", exported(ready), attach),
            ("client maps", at, MAP),
            ("client unmaps", after(at, MAP), UNMAP),
            ("client sets INTx", at, INTX),
            ("client sets MSI", at, MSI),
            ("client ends MSI", after(at, MSI), NO_MSI),
            ("client reads", at, READ),
            ("client writes", at, WRITE),
            ("client resets", after(at, MSI), RESET),
            ("client goes", after(at, MAP, MSI), detach),
        )
        found += [Operation(f"{name}, {kind}", first, then, ("e0", "d0"), starves=False) for name, first, then in table]
    names = ("d0", "d0.sock", "0x4000000")
    running = after(served, served_add)
    found += [
        Operation("device_add vfio-user", served, served_add, names, starves=False),
        Operation("device_del vfio-user", running, lambda bench: bench.delete("d0"), names, starves=False),
        Operation("irq-start vfio-user", running, served_start, names, starves=False),
        Operation("dma-map vfio-user", running, served_map, names, starves=False),
        Operation("device-reset vfio-user", after(running, served_start), served_reset, names, starves=False),
    ]
    return tuple(found)
