"""The picture as lines of text, for a terminal of any size."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from rich.text import Text

from vfiod.client.events import Event
from vfiod.client.watch.picture import Picture
from vfiod.client.watch.view import HELP, Pane, View
from vfiod.protocol.catalogue.devices import MachineInfo

__all__ = ["everything", "screen", "sparkline"]

BARS: Final = " ▁▂▃▄▅▆▇█"
ASCII_BARS: Final = " .:-=+*%#"
SPARK: Final = 40
"""Columns of the widest sparkline."""

SMALLEST_PANE: Final = 3
"""Lines of a part that is worth showing: its title, the columns' names, one row."""

GAP: Final = 2
STATES: Final = {"running": "green", "attached": "green", "failed": "red", "shutdown": "red"}


@dataclass(frozen=True, slots=True)
class Part:
    """One part, before it is cut to its room.

    Attributes:
        title: with a count.
        head: the columns' names; None: lines without columns.
        lines: one per row.

    """

    title: str
    head: Text | None
    lines: list[Text]

    @property
    def height(self) -> int:
        """Lines it would like to have."""
        return 1 + (self.head is not None) + max(len(self.lines), 1)


def sparkline(values: Iterable[float], width: int, *, plain: bool = False) -> str:
    """The last ``width`` values as bars; the highest is a full one. ``plain``: in ASCII."""
    bars = ASCII_BARS if plain else BARS
    shown = list(values)[-width:]
    top = max(shown, default=0.0)
    return "".join(bars[0 if value <= 0 else max(1, round(value / top * (len(bars) - 1)))] for value in shown)


def screen(pictures: Sequence[Picture], view: View, width: int, height: int, *, plain: bool = False) -> list[Text]:
    """At most ``height`` lines of at most ``width`` columns.

    Args:
        pictures: of every server, at least one.
        view: what the person looks at.
        width: columns.
        height: lines.
        plain: the terminal knows ASCII only.

    """
    picture = pictures[min(view.machine, len(pictures) - 1)]
    lines = [_head(picture, view, width)]
    if picture.problem:
        lines.append(Text(picture.problem, style="red"))
    room = max(height - len(lines) - 1, 1)
    if view.help:
        lines += _over("Keys", [Text.assemble((f"{keys:<22}", "bold"), does) for keys, does in HELP], room)
    elif view.topology:
        tree = _ascii(picture.topology) if plain else picture.topology
        lines += _over("Topology", [Text(line) for line in (tree or "asking ...").splitlines()], room)
    else:
        lines += _panes(pictures, picture, view, width, room, plain=plain)
    lines = lines[: height - 1]
    lines += [Text()] * (height - 1 - len(lines))
    foot = "q quit  ? help  tab part  t topology  p pause  r reset"
    lines.append(Text(foot if width >= len(foot) else "q quit  ? help", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis" if not plain else "crop")
    return lines[:height]


def everything(picture: Picture, width: int, *, plain: bool = False) -> list[Text]:
    """All of it, one part below the other: for a pipe."""
    lines = [_head(picture, View(), width)]
    if picture.problem:
        lines.append(Text(picture.problem, style="red"))
    if picture.machine is None:
        return lines
    for pane in list(Pane)[1:]:
        part = _part(pane, [picture], picture, width, plain=plain)
        lines += [Text(), Text(part.title, style="bold")]
        lines += [part.head] if part.head is not None and part.lines else []
        lines += part.lines or [Text("none", style="dim")]
    return lines


def _head(picture: Picture, view: View, width: int) -> Text:
    machine = picture.machine
    if machine is None:
        return Text.assemble((picture.name, "bold"), "  connecting ...")
    status = machine.status.status.value
    paused = ("  PAUSED", "bold yellow") if view.paused else ""
    rates = picture.total()
    total = f"  {rates[-1]:.0f} irq/s" if rates else ""
    mapped = _size(sum(mapping.size for mapping in machine.mappings))
    more = f"  {mapped} mapped  {len(machine.sessions)} sessions  event {machine.seq}"
    head = Text.assemble((picture.name, "bold"), "  ", (status, STATES.get(status, "yellow")), paused, total)
    if head.cell_len + len(more) <= width:
        head.append(more)
    return head


def _over(title: str, lines: list[Text], room: int) -> list[Text]:
    return [Text(title, style="bold reverse"), *lines[: max(room - 1, 0)]]


def _panes(
    pictures: Sequence[Picture], picture: Picture, view: View, width: int, room: int, *, plain: bool
) -> list[Text]:
    panes = view.panes(len(pictures))
    selected = view.pane if view.pane in panes else panes[0]
    parts = {pane: _part(pane, pictures, picture, width, plain=plain) for pane in panes}
    if view.alone or SMALLEST_PANE * len(panes) > room:
        parts = {selected: parts[selected]}
    heights = _heights({pane: part.height for pane, part in parts.items()}, selected, room)
    lines: list[Text] = []
    for pane, part in parts.items():
        body = heights[pane] - 1 - (part.head is not None)
        first = view.first_line(pane, len(part.lines), body)
        if pane is Pane.EVENTS and not view.offsets.get(pane):
            first = max(len(part.lines) - body, 0)  # the newest, until somebody scrolls
        title = Text(part.title, style="bold reverse" if pane is selected else "bold")
        if hidden := len(part.lines) - len(part.lines[first : first + body]):
            title.append(f"  {first + 1}-{first + body}, {hidden} more", style="dim")
        lines.append(title)
        lines += [part.head] if part.head is not None and part.lines and body >= 0 else []
        lines += part.lines[first : first + body] or ([Text("none", style="dim")] if body > 0 else [])
    return lines


def _heights(wanted: dict[Pane, int], selected: Pane, room: int) -> dict[Pane, int]:
    """Lines for each part: the smallest for all, then the selected one what it wants, then the others in order."""
    given = {pane: min(height, SMALLEST_PANE, room) for pane, height in wanted.items()}
    left = room - sum(given.values())
    for pane in [selected, *wanted]:
        more = max(min(wanted[pane] - given[pane], left), 0)
        given[pane] += more
        left -= more
    return given


def _part(pane: Pane, pictures: Sequence[Picture], picture: Picture, width: int, *, plain: bool) -> Part:
    machine = picture.machine
    if pane is Pane.MACHINES:
        return _machines(pictures, picture, width, plain=plain)
    if machine is None:
        return Part(pane.value, None, [])
    match pane:
        case Pane.DEVICES:
            return _devices(machine, width)
        case Pane.INTERRUPTS:
            return _interrupts(machine, picture, width, plain=plain)
        case Pane.MEMORY:
            return _memory(machine, width)
        case Pane.EXPORTS:
            return _exports(picture, width)
    events = [_event(event) for event in picture.events]
    return Part(f"Events {len(events)}", None, events)


def _machines(pictures: Sequence[Picture], chosen: Picture, width: int, *, plain: bool) -> Part:
    rows: list[list[str | Text]] = []
    for picture in pictures:
        machine, rates = picture.machine, picture.total()
        status = "lost" if picture.problem else machine.status.status.value if machine else "connecting"
        rows.append(
            [
                Text(("> " if picture is chosen else "  ") + picture.name, style="bold" if picture is chosen else ""),
                Text(status, style=STATES.get(status, "yellow")),
                str(len(machine.devices)) if machine else "-",
                f"{rates[-1]:.1f}" if rates else "-",
                Text(sparkline(rates, SPARK // 2, plain=plain).rjust(SPARK // 2), style="cyan"),
                Text(picture.problem, style="red"),
            ]
        )
    return _columns(f"VMs {len(rows)}", ["VM", "State", "#Devices", "#Irq/s", "", ""], rows, width)


def _devices(machine: MachineInfo, width: int) -> Part:
    rows: list[list[str | Text]] = []
    for device in machine.devices:
        ids = (device.vendor_id, device.device_id)
        rows.append(
            [
                device.id,
                Text(device.state.value, style=STATES.get(device.state.value, "yellow")),
                device.driver.value,
                ":".join(f"{number:04x}" for number in ids if isinstance(number, int)) or "-",
                device.irq_kind.value,
                "fast" if device.fast_path else "slow",
                device.backend,
                device.host if isinstance(device.host, str) else "-",
                "; ".join(f"{holder.kind}: {holder.detail}" for holder in device.held_by) or "-",
            ]
        )
    names = ["Device", "State", "Driver", "Ids", "Irq", "Path", "Backend", "Host", "Held by"]
    return _columns(f"Devices {len(rows)}", names, rows, width)


def _interrupts(machine: MachineInfo, picture: Picture, width: int, *, plain: bool) -> Part:
    rows: list[list[str | Text]] = []
    spark = min(SPARK, max(width // 4, 4))  # as wide from the beginning: columns that move cannot be read
    for index in machine.irqs:
        for vector in index.vectors:
            key = (index.device, index.index, vector.vector)
            rate, peak = picture.rates.get(key), picture.peaks.get(key)
            rows.append(
                [
                    Text(f"{index.device} {index.name}", style="bold" if rate else ""),
                    str(vector.vector),
                    vector.mode.value,
                    "-" if rate is None else f"{rate:.1f}",
                    Text(sparkline(picture.history.get(key, ()), spark, plain=plain).rjust(spark), style="cyan"),
                    "-" if peak is None else f"{peak:.1f}",
                    "-" if vector.delivered is None else str(vector.delivered),  # direct: vfiod does not see them
                    vector.state,
                    str(vector.spurious),
                ]
            )
    names = ["Interrupt", "#Vec", "Mode", "#/s", "", "#Peak", "#Delivered", "State", "#Spurious"]
    return _columns(f"Interrupts {len(rows)}", names, rows, width)


def _memory(machine: MachineInfo, width: int) -> Part:
    rows: list[list[str | Text]] = [
        [
            hex(mapping.iova),
            _size(mapping.size),
            "ro" if mapping.readonly else "rw",
            mapping.memory_backend if isinstance(mapping.memory_backend, str) else "fd",
            hex(mapping.offset),
            mapping.address_space if isinstance(mapping.address_space, str) else "all",
            ",".join(mapping.clients) if isinstance(mapping.clients, list) else "-",
        ]
        for mapping in machine.mappings
    ]
    names = ["#IOVA", "#Size", "Access", "Memory", "#Offset", "Space", "Clients"]
    return _columns(f"DMA maps {len(rows)}", names, rows, width)


def _exports(picture: Picture, width: int) -> Part:
    rows: list[list[str | Text]] = []
    for export in picture.exports:
        client = None if isinstance(export.client, msgspec.UnsetType) else export.client
        rows.append(
            [
                export.id,
                export.device,
                Text(export.state.value, style=STATES.get(export.state.value, "yellow")),
                str(client.pid) if client else "-",
                str(client.requests) if client else "-",
                str(client.errors) if client else "-",
                _size(client.mapped_bytes) if client else "-",
                export.path if isinstance(export.path, str) else "fd",
            ]
        )
    names = ["Export", "Device", "State", "#Pid", "#Requests", "#Errors", "#Mapped", "Socket"]
    return _columns(f"Exports {len(rows)}", names, rows, width)


def _columns(title: str, names: list[str], rows: Iterable[Sequence[str | Text]], width: int) -> Part:
    """Rows as columns; what does not fit is left out from the right. A name with ``#`` is of numbers."""
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    for row in cells:
        for cell in row:
            cell.plain = _printable(cell.plain)
    right = [name.startswith("#") for name in names]
    heads = [name.lstrip("#") for name in names]
    widths = [max(len(head), *(row[n].cell_len for row in cells), 0) for n, head in enumerate(heads)]
    used = count = 0
    for wide in widths:
        if count and used + GAP + wide > width:
            break
        used += wide + GAP * bool(count)
        count += 1
    if count < len(widths) and width - used > 3 * GAP and not right[count]:  # a beginning of the next is better
        widths[count] = width - used - GAP
        count += 1
    return Part(
        title,
        _line([Text(head, style="dim") for head in heads[:count]], widths, right),
        [_line(row[:count], widths, right) for row in cells],
    )


def _line(cells: list[Text], widths: list[int], right: list[bool]) -> Text:
    line = Text()
    for number, cell in enumerate(cells):
        shown = cell.copy()
        shown.truncate(widths[number], overflow="crop")
        pad = " " * (widths[number] - shown.cell_len)
        line.append(" " * GAP if number else "")
        line.append_text(Text(pad) + shown if right[number] else shown + Text(pad))
    line.rstrip()
    return line


def _event(event: Event) -> Text:
    when = datetime.datetime.fromtimestamp(max(event.timestamp, 0)).astimezone().strftime("%H:%M:%S")
    data = json.dumps(msgspec.to_builtins(event.data))
    return Text.assemble((f"{when} ", "dim"), (event.name, "bold blue"), f" {data}")


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number} {unit}"
        number //= 1024
    return f"{number} TiB"


def _printable(text: str) -> str:
    """Without what would drive the terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def _ascii(text: str) -> str:
    return text.translate(str.maketrans("├└│─", "|`|-")).encode("ascii", "replace").decode()
