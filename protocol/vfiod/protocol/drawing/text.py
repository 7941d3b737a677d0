"""A topology as a tree of lines, and as a DOT graph (Graphviz, ``doc/info/lang.html``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vfiod.protocol.catalogue.devices import TopologyNode
from vfiod.protocol.drawing.graph import Graph

__all__ = ["draw_dot", "draw_tree"]

_SHAPES: Final = {"function": "box", "device": "box", "reset-domain": "octagon"}


def draw_tree(graph: Graph) -> str:
    """Lines for a terminal; each ends with a line feed. A node with two parents is drawn under both."""
    lines: list[str] = []
    for root in graph.roots():
        lines.append(_line(graph.nodes[root]))
        lines.extend(_below(graph, root, ""))
    return "".join(line + "\n" for line in lines)


def _below(graph: Graph, name: str, margin: str) -> Iterator[str]:
    children = graph.children(name)
    for child in children:
        last = child == children[-1]
        yield margin + ("└── " if last else "├── ") + _line(graph.nodes[child])
        yield from _below(graph, child, margin + ("    " if last else "│   "))


def _line(node: TopologyNode) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in node.attributes.items())
    return printable(node.label + (f"  ({facts})" if facts else ""))


def printable(text: str) -> str:
    """One line of it: what would move a terminal's cursor is shown as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def draw_dot(graph: Graph, title: str) -> str:
    """A directed graph, left to right. Reset domains are dashed, and do not move what they reach."""
    lines = [
        "digraph topology {",
        f"  label={_quoted(title)}; labelloc=t; rankdir=LR;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="sans-serif", fontsize=10];',
    ]
    for name, node in graph.nodes.items():
        facts = [f"{key}: {value}" for key, value in node.attributes.items()]
        look = f"shape={_SHAPES.get(node.kind, 'box')}"
        look += ', style="dashed"' if graph.is_domain(name) else ""
        lines.append(f"  {_quoted(name)} [label={_quoted(node.label, *facts)}, {look}];")
    for parent, child in graph.edges():
        if graph.is_domain(parent):
            lines.append(f"  {_quoted(child)} -> {_quoted(parent)} [dir=back, style=dashed];")
        else:
            lines.append(f"  {_quoted(parent)} -> {_quoted(child)};")
    return "\n".join([*lines, "}", ""])


def _quoted(*lines: str) -> str:
    r"""A DOT string of these lines. Inside, ``\`` and ``"`` are escaped; ``\n`` parts the lines."""
    return '"' + "\\n".join(printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines) + '"'
