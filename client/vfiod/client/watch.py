"""``vfiod watch``: devices, interrupts with their rates, and events of a server, live."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError, ConnectionLost, RequestTimedOut
from vfiod.client.events import Event
from vfiod.client.sync import Client, EventStream
from vfiod.protocol.catalogue.devices import DeviceInfo, MachineInfo
from vfiod.protocol.catalogue.interrupts import IrqInfo
from vfiod.protocol.errors import VfiodError

__all__ = ["Picture", "main", "render"]

Vector: TypeAlias = tuple[str, int, int]
"""Device, index, vector."""

RECONNECT_SECONDS: Final = 1.0
KEPT_EVENTS: Final = 200


@dataclass(slots=True)
class Picture:
    """What was seen last, and what changed since the time before.

    Attributes:
        machine: the last snapshot.
        rates: deliveries a second of each relayed vector, since the snapshot before; empty at first.
        events: the latest, oldest first.
        problem: why the picture is old, when it is.

    """

    machine: MachineInfo | None = None
    rates: dict[Vector, float] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    problem: str = ""
    _counts: dict[Vector, int] = field(default_factory=dict)
    _when: float = 0.0

    def update(self, machine: MachineInfo, when: float) -> None:
        """A new snapshot, taken at a monotonic time in seconds."""
        counts = {
            (index.device, index.index, vector.vector): vector.delivered
            for index in machine.irqs
            for vector in index.vectors
            if vector.delivered is not None
        }
        passed = when - self._when
        # A count that fell belongs to interrupts that were started anew.
        self.rates = {
            key: (count - self._counts[key]) / passed
            for key, count in counts.items()
            if key in self._counts and count >= self._counts[key] and passed > 0
        }
        self.machine, self._counts, self._when = machine, counts, when
        self.problem = ""


def render(picture: Picture, *, height: int = 40) -> RenderableType:
    """The picture for a terminal of so many lines."""
    machine = picture.machine
    if machine is None:
        return Text(picture.problem or "connecting ...", style="yellow")
    head = Text.assemble(
        (machine.name, "bold"), f"  {machine.status.status.value}  {machine.uuid}  event {machine.seq}  ",
        f"{len(machine.mappings)} mappings, {_size(sum(m.size for m in machine.mappings))}  "
        f"{len(machine.objects)} objects  {len(machine.sessions)} sessions",
    )  # fmt: skip
    parts: list[RenderableType] = [head]
    if picture.problem:
        parts.append(Text(picture.problem, style="red"))
    parts += [Text(), _devices(machine.devices), Text(), _irqs(machine.irqs, picture.rates)]
    used = 8 + len(machine.devices) + sum(len(index.vectors) for index in machine.irqs)
    shown = list(picture.events)[-max(3, height - used) :]
    parts += [Text(), *(_event(event) for event in shown)]
    return Group(*parts)


def _devices(devices: list[DeviceInfo]) -> RenderableType:
    if not devices:
        return Text("no devices", style="dim")
    table = Table("Device", "State", "Host", "Backend", "Ids", "Irq", "Path", "Held by", box=None, header_style="bold")
    colours = {"running": "green", "failed": "red"}
    for device in devices:
        ids = (device.vendor_id, device.device_id)
        table.add_row(
            Text(device.id),
            Text(device.state.value, style=colours.get(device.state.value, "yellow")),
            Text(device.host if isinstance(device.host, str) else "-"),
            Text(device.backend),
            Text(":".join(f"{number:04x}" for number in ids if isinstance(number, int)) or "-"),
            Text(device.irq_kind.value),
            Text("fast" if device.fast_path else "slow"),
            Text("; ".join(f"{holder.kind}: {holder.detail}" for holder in device.held_by) or "-"),
        )
    return table


def _irqs(irqs: list[IrqInfo], rates: dict[Vector, float]) -> RenderableType:
    table = Table(box=None, header_style="bold")
    for name in ("Interrupt", "Vector", "Mode", "State"):
        table.add_column(name)
    for name in ("Fired", "Delivered", "Spurious", "Per second"):
        table.add_column(name, justify="right")
    for index in irqs:
        for vector in index.vectors:
            rate = rates.get((index.device, index.index, vector.vector))
            table.add_row(
                Text(f"{index.device} {index.name}"),
                str(vector.vector),
                vector.mode.value,
                Text(vector.state),
                "-" if vector.fired is None else str(vector.fired),  # direct: vfiod does not see them
                "-" if vector.delivered is None else str(vector.delivered),
                str(vector.spurious),
                "-" if rate is None else f"{rate:.1f}",
                style="bold" if rate else "",
            )
    return table if table.row_count else Text("no interrupts started", style="dim")


def _event(event: Event) -> Text:
    when = datetime.datetime.fromtimestamp(max(event.timestamp, 0)).astimezone().strftime("%H:%M:%S")
    data = json.dumps(msgspec.to_builtins(event.data))
    return Text.assemble((f"{when} ", "dim"), (event.name, "bold blue"), f" {data}", no_wrap=True, overflow="ellipsis")


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number} {unit}"
        number //= 1024
    return f"{number} TiB"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("vfiod watch", description="Devices, interrupts and events of a server, live.")
    made.add_argument("path", metavar="PATH", help="the monitor's socket")
    made.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between pictures; default 1")
    made.add_argument("--once", action="store_true", help="one picture, and exit")
    made.add_argument("--jsonrpc", action="store_true", help="the socket speaks JSON-RPC 2.0")
    return made


def main(argv: list[str]) -> int:
    """Run it until interrupted. 0; 1 when there is no server to begin with."""
    options = parser().parse_args(argv)
    dialect = Dialect.JSONRPC if options.jsonrpc else Dialect.QMP
    interval = max(options.interval, 0.05)
    picture = Picture()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        client = Client.connect(options.path, dialect=dialect)
        with client:
            if options.once:
                picture.update(client.query_machine(), time.monotonic())
                console.print(render(picture))
                return 0
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                _watch(client, picture, live, interval)
                while True:
                    _reconnect(options.path, dialect, picture, live, interval)
    except KeyboardInterrupt:
        return 0
    except VfiodError as error:
        print(f"vfiod watch: {error}", file=sys.stderr)
        return 1


def _watch(client: Client, picture: Picture, live: Live, interval: float) -> None:
    """Until the connection is lost."""
    out_of_band = client.version is not None  # so that slow work does not stop the picture
    try:
        with client.events() as events:
            while True:
                picture.update(client.query_machine(oob=out_of_band), time.monotonic())
                live.update(render(picture, height=live.console.height), refresh=True)
                _collect(events, picture, interval)
    except ConnectionLost as error:
        picture.problem = str(error)
        live.update(render(picture, height=live.console.height), refresh=True)


def _collect(events: EventStream, picture: Picture, seconds: float) -> None:
    """Events of the next so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            picture.events.append(events.get(left))
        except RequestTimedOut:
            return


def _reconnect(path: str, dialect: Dialect, picture: Picture, live: Live, interval: float) -> None:
    time.sleep(RECONNECT_SECONDS)
    try:
        client = Client.connect(path, dialect=dialect)
    except ClientError as error:
        picture.problem = f"{error}; trying again"
        live.update(render(picture, height=live.console.height), refresh=True)
        return
    with client:
        _watch(client, picture, live, interval)
