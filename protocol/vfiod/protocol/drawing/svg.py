"""A topology as a picture: SVG 1.1, laid out here, so that it needs no other program.

Columns from left to right: each node right of its parents; reset domains at the right edge, reaching back. Rows in the
order of the tree, a parent in the middle of its children.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from vfiod.protocol.catalogue.devices import TopologyNode
from vfiod.protocol.drawing.graph import Graph
from vfiod.protocol.drawing.text import printable

__all__ = ["draw_svg"]

# Pixels.
_CHARACTER: Final = 7.0  # of 12 px sans-serif, on the generous side
_LINE: Final = 15
_PAD: Final = 9
_ROW_GAP: Final = 12
_COLUMN_GAP: Final = 64
_MARGIN: Final = 20
_TITLE: Final = 34

_WIDEST: Final = 40
"""Characters of a line; what is longer is cut, and whole in the tooltip."""

#: Fill and edge by kind.
_COLOURS: Final = {
    "machine": ("#e8eaf6", "#3949ab"),
    "host": ("#e8eaf6", "#3949ab"),
    "container": ("#e0f2f1", "#00796b"),
    "ioas": ("#e0f2f1", "#00796b"),
    "space": ("#e0f2f1", "#00796b"),
    "group": ("#fff8e1", "#f9a825"),
    "device": ("#e3f2fd", "#1565c0"),
    "function": ("#f5f5f5", "#757575"),
    "reset-domain": ("#fbe9e7", "#d84315"),
}
_LEAVES: Final = frozenset({"device", "function"})
_PLAIN: Final = ("#ffffff", "#616161")


@dataclass(slots=True)
class _Box:
    """One node's place."""

    lines: tuple[str, ...]
    width: float
    height: float
    column: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def draw_svg(graph: Graph, title: str) -> str:
    """A picture, as the text of an SVG file."""
    boxes = {name: _box(node) for name, node in graph.nodes.items()}
    _columns(graph, boxes)
    bottom = _rows(graph, boxes)
    right = _place_columns(boxes.values())
    width = max(right + _MARGIN, len(title) * _CHARACTER * 1.4 + 2 * _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + _MARGIN:.0f}" '
        f'viewBox="0 0 {width:.0f} {bottom + _MARGIN:.0f}" role="img" font-family="sans-serif" font-size="12">',
        f"<title>{_text(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 4}" font-size="16" font-weight="bold" fill="#212121">{_text(title)}</text>',
    ]
    # Boxes come last: they stand on the ends of the lines.
    parts += [_draw_edge(graph, boxes, parent, child) for parent, child in graph.edges()]
    parts += [_draw_box(graph.nodes[name], box) for name, box in boxes.items()]
    return "\n".join([*parts, "</svg>", ""])


def _box(node: TopologyNode) -> _Box:
    lines = (node.label, *(f"{key}: {value}" for key, value in node.attributes.items()))
    cut = tuple(_cut(printable(line)) for line in lines)
    # The first line is bold.
    wide = max(len(cut[0]) * 1.1, *map(len, cut))
    return _Box(cut, wide * _CHARACTER + 2 * _PAD, len(cut) * _LINE + _PAD)


def _cut(line: str) -> str:
    return line if len(line) <= _WIDEST else line[: _WIDEST - 1] + "…"


# --- where everything stands -----------------------------------------------------------------------------------


def _columns(graph: Graph, boxes: dict[str, _Box]) -> None:
    """The forest: one right of the rightmost parent. Reset domains: right of all they reach."""
    pending = [edge for edge in graph.edges() if not graph.is_domain(edge[0])]
    _push(pending, boxes)
    last = max((box.column for name, box in boxes.items() if not graph.is_domain(name)), default=-1)
    for name, box in boxes.items():
        if graph.nodes[name].kind in _LEAVES and not graph.children(name):
            box.column = last  # side by side, however deep: nothing stands between them and their domains
    for name, box in boxes.items():
        if graph.is_domain(name):
            box.column = last + 1
    # A domain that holds domains stands right of them.
    nested = [(child, parent) for parent, child in graph.edges() if graph.is_domain(parent) and graph.is_domain(child)]
    _push(nested, boxes)


def _push(edges: list[tuple[str, str]], boxes: dict[str, _Box]) -> None:
    """Move each second node right of its first, until all are: the graph has no loop, so that ends."""
    moved = True
    while moved:
        moved = False
        for left, right in edges:
            if boxes[right].column <= boxes[left].column:
                boxes[right].column = boxes[left].column + 1
                moved = True


def _rows(graph: Graph, boxes: dict[str, _Box]) -> float:
    """Set every ``y``; returns where the lowest ends."""
    bottom = float(_TITLE + _MARGIN)
    done: set[str] = set()

    def place(name: str, top: float) -> float:
        """Put a node and what is under it at ``top`` or lower; returns where they end."""
        done.add(name)
        box = boxes[name]
        end, fresh = top, []
        for child in graph.children(name):
            if child not in done:
                fresh.append(child)
                end = place(child, end)
        box.y = top
        if fresh:
            first, last = boxes[fresh[0]], boxes[fresh[-1]]
            box.y = max(top, (first.middle + last.middle - box.height) / 2)
        return max(end, box.y + box.height + _ROW_GAP)

    for top in (*graph.roots(), *graph.strays()):
        if not graph.is_domain(top):
            bottom = place(top, bottom)
    free: dict[int, float] = {}
    domains = [name for name in boxes if graph.is_domain(name)]
    for column in sorted({boxes[name].column for name in domains}):
        mine = [name for name in domains if boxes[name].column == column]
        wanted = {name: _middle_of(graph, boxes, name, bottom) for name in mine}
        for name in sorted(mine, key=lambda one: wanted[one]):
            box = boxes[name]
            box.y = max(free.get(column, float(_TITLE + _MARGIN)), wanted[name] - box.height / 2)
            free[column] = box.y + box.height + _ROW_GAP
    return max([bottom, *free.values()]) - _ROW_GAP


def _middle_of(graph: Graph, boxes: dict[str, _Box], name: str, otherwise: float) -> float:
    heights = [boxes[child].middle for child in graph.children(name)]
    return sum(heights) / len(heights) if heights else otherwise


def _place_columns(boxes: Iterable[_Box]) -> float:
    """Set every ``x``; all boxes of a column get its width. Returns where the rightmost ends."""
    widths: dict[int, float] = {}
    for box in boxes:
        widths[box.column] = max(widths.get(box.column, 0.0), box.width)
    left, lefts = float(_MARGIN), {}
    for column in sorted(widths):
        lefts[column] = left
        left += widths[column] + _COLUMN_GAP
    for box in boxes:
        box.x, box.width = lefts[box.column], widths[box.column]
    return left - _COLUMN_GAP


# --- drawing ------------------------------------------------------------------------------------------------------


def _draw_edge(graph: Graph, boxes: dict[str, _Box], parent: str, child: str) -> str:
    if graph.is_domain(parent):
        left, right = boxes[child], boxes[parent]
        look = f'stroke="{_COLOURS["reset-domain"][1]}" stroke-dasharray="5 4"'
    else:
        left, right = boxes[parent], boxes[child]
        look = 'stroke="#9e9e9e"'
    x1, y1, x2, y2 = left.x + left.width, left.middle, right.x, right.middle
    bend = min(_COLUMN_GAP, x2 - x1) / 2
    path = f"M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return f'<path d="{path}" fill="none" stroke-width="1.3" {look}/>'


def _draw_box(node: TopologyNode, box: _Box) -> str:
    fill, edge = _COLOURS.get(node.kind, _PLAIN)
    facts = "\n".join([node.label, *(f"{key}: {value}" for key, value in node.attributes.items())])
    dashed = ' stroke-dasharray="5 4"' if node.kind == "reset-domain" else ""
    parts = [
        f"<g id={quoteattr(printable(node.id))}><title>{_text(facts, lines=True)}</title>",
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="5" '
        f'fill="{fill}" stroke="{edge}"{dashed}/>',
    ]
    for number, line in enumerate(box.lines):
        y = box.y + _PAD / 2 + _LINE * (number + 1) - 3.5
        look = 'font-weight="bold" fill="#212121"' if number == 0 else 'fill="#555555"'
        parts.append(f'<text x="{box.x + _PAD:.1f}" y="{y:.1f}" {look}>{_text(line)}</text>')
    return "".join([*parts, "</g>"])


def _text(text: str, *, lines: bool = False) -> str:
    if lines:
        return "\n".join(escape(printable(line)) for line in text.split("\n"))
    return escape(printable(text))
