"""``query-topology``, of the family "devices"."""

from __future__ import annotations

from typing import Any, Final

from vfiod.protocol.catalogue.declare import Arguments
from vfiod.protocol.catalogue.devices import QueryTopology, Topology, TopologyFormat
from vfiod.server.commands.call import Call, Handler

__all__ = ["HANDLERS"]


async def query_topology(call: Call, arguments: QueryTopology) -> Topology:
    """The graph, and its drawing when one was asked for. Also out of band: it waits for no lane."""
    from vfiod.protocol.drawing import Graph, draw_dot, draw_svg, draw_tree

    nodes, edges = await call.machine.topology_graph()
    graph, title = Graph(nodes, edges), f"vfiod: machine {call.machine.name}"
    match arguments.format:
        case TopologyFormat.TREE:
            text = draw_tree(graph)
        case TopologyFormat.DOT:
            text = draw_dot(graph, title)
        case TopologyFormat.SVG:
            text = draw_svg(graph, title)
        case TopologyFormat.JSON:
            return Topology(nodes=nodes, edges=edges)
    return Topology(nodes=nodes, edges=edges, text=text)


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {QueryTopology: query_topology}
