"""The graph that is drawn: who stands under whom, in the order given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from vfiod.protocol.catalogue.devices import TopologyEdge, TopologyNode

__all__ = ["RESET_DOMAIN", "Graph"]

RESET_DOMAIN: Final = "reset-domain"


class Graph:
    """Nodes and edges, ready for drawing. An edge to or from a node that is not there is left out, and so is a loop.

    Args:
        nodes: in the order they are drawn; of two with one id the first counts.
        edges: parent to child, in the order they are drawn.

    Attributes:
        nodes: by id.

    """

    def __init__(self, nodes: Iterable[TopologyNode], edges: Iterable[TopologyEdge]) -> None:
        self.nodes: dict[str, TopologyNode] = {}
        for node in nodes:
            self.nodes.setdefault(node.id, node)
        self._children: dict[str, list[str]] = {name: [] for name in self.nodes}
        self._parents: dict[str, list[str]] = {name: [] for name in self.nodes}
        for edge in edges:
            known = edge.parent in self.nodes and edge.child in self.nodes
            if known and edge.child not in self._children[edge.parent] and not self._leads(edge.child, edge.parent):
                self._children[edge.parent].append(edge.child)
                self._parents[edge.child].append(edge.parent)

    def _leads(self, start: str, end: str) -> bool:
        """Whether ``end`` stands under ``start``, or is it: an edge back would be a loop."""
        waiting, seen = [start], set()
        while waiting:
            name = waiting.pop()
            if name == end:
                return True
            if name not in seen:
                seen.add(name)
                waiting.extend(self._children[name])
        return False

    def is_domain(self, name: str) -> bool:
        """Whether this is a reset domain."""
        return self.nodes[name].kind == RESET_DOMAIN

    def children(self, name: str) -> tuple[str, ...]:
        """Who stands directly under it."""
        return tuple(self._children[name])

    def edges(self) -> Iterator[tuple[str, str]]:
        """Every edge that is drawn: parent, child."""
        for parent, children in self._children.items():
            for child in children:
                yield parent, child

    def roots(self) -> tuple[str, ...]:
        """Who stands under nobody: first those of the forest, then the reset domains."""
        tops = [name for name in self.nodes if not self._parents[name]]
        return tuple(sorted(tops, key=self.is_domain))

    def strays(self) -> tuple[str, ...]:
        """Who is known only because a reset would reach it."""
        return tuple(
            name
            for name, parents in self._parents.items()
            if parents and not self.is_domain(name) and all(self.is_domain(parent) for parent in parents)
        )
