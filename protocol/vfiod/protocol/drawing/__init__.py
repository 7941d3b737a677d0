"""Drawing a topology: nodes and edges to a tree, a DOT graph or an SVG picture. Pure text; server and client use it.

What is drawn is what ``query-topology`` returns (:class:`~vfiod.protocol.catalogue.devices.TopologyNode` and
``TopologyEdge``): mostly a forest. Nodes of the kind ``reset-domain`` stand beside it, and reach into it.
"""

from vfiod.protocol.drawing.graph import Graph
from vfiod.protocol.drawing.svg import draw_svg
from vfiod.protocol.drawing.text import draw_dot, draw_tree

__all__ = ["Graph", "draw_dot", "draw_svg", "draw_tree"]
