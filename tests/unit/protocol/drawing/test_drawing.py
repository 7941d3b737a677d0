"""Tree, DOT and SVG of a topology: everything is shown, once, apart, and hostile names stay text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol.catalogue.devices import TopologyEdge, TopologyNode
from vfiod.protocol.drawing import Graph, draw_dot, draw_svg, draw_tree

SVG = "{http://www.w3.org/2000/svg}"


def node(id: str, kind: str = "device", **attributes: str) -> TopologyNode:
    return TopologyNode(id=id, kind=kind, label=id, attributes=attributes)


def graph(nodes: Sequence[TopologyNode], *edges: tuple[str, str]) -> Graph:
    return Graph(nodes, [TopologyEdge(parent=parent, child=child) for parent, child in edges])


@pytest.fixture
def machine() -> Graph:
    return graph(
        [
            node("m", "machine"),
            node("c", "container", iommu="type1v2"),
            node("g7", "group"),
            node("g8", "group"),
            node("n0"),
            node("n1"),
            node("x", "function"),
            node("r", "reset-domain", possible="no"),
        ],
        ("m", "c"),
        ("c", "g7"),
        ("c", "g8"),
        ("g7", "n0"),
        ("g8", "n1"),
        ("r", "n0"),
        ("r", "n1"),
        ("r", "x"),
    )


def test_a_tree(machine: Graph) -> None:
    assert draw_tree(machine) == (
        "m\n"
        "└── c  (iommu type1v2)\n"
        "    ├── g7\n"
        "    │   └── n0\n"
        "    └── g8\n"
        "        └── n1\n"
        "r  (possible no)\n"
        "├── n0\n"
        "├── n1\n"
        "└── x\n"
    )


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right, bottom of each node, by id."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        found[group.attrib["id"]] = (x, y, x + width, y + height)
    return found


def test_a_picture_has_every_node_apart_and_in_its_column(machine: Graph) -> None:
    svg = draw_svg(machine, "vfiod: machine m")
    places = boxes(svg)
    assert set(places) == set(machine.nodes)
    for (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) in itertools.combinations(places.values(), 2):
        assert right1 <= left2 or right2 <= left1 or bottom1 <= top2 or bottom2 <= top1
    columns = [places[name][0] for name in ("m", "c", "g7", "n0", "r")]
    assert columns == sorted(set(columns))
    assert places["n0"][0] == places["n1"][0] == places["x"][0]
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(
        left > 0 and right < width and top > 0 and bottom < height for left, top, right, bottom in places.values()
    )
    assert len(list(root.iter(f"{SVG}path"))) == 8
    assert "vfiod: machine m" in [text.text for text in root.iter(f"{SVG}text")]


def test_what_is_too_long_is_cut_and_whole_in_the_tooltip() -> None:
    svg = ElementTree.fromstring(draw_svg(graph([node("n", reason="because " * 20)]), ""))
    shown = [text.text or "" for text in svg.iter(f"{SVG}text")]
    assert all(len(text) <= 40 for text in shown)
    assert any(text.endswith("…") for text in shown)
    assert any("because " * 20 in (title.text or "") for title in svg.iter(f"{SVG}title"))


def test_dot(machine: Graph) -> None:
    dot = draw_dot(machine, "the title")
    assert dot.startswith("digraph topology {\n")
    assert '"c" [label="c\\niommu: type1v2", shape=box];' in dot
    assert '"m" -> "c";' in dot
    assert '"x" -> "r" [dir=back, style=dashed];' in dot
    assert dot.count("->") == 8


def test_domains_within_domains_stand_side_by_side() -> None:
    nested = graph(
        [node("outer", "reset-domain"), node("inner", "reset-domain"), node("n")], ("outer", "inner"), ("inner", "n")
    )
    places = boxes(draw_svg(nested, ""))
    assert places["n"][0] < places["inner"][0] < places["outer"][0]
    assert draw_tree(nested) == "outer\n└── inner\n    └── n\n"


def test_loops_and_edges_to_nowhere_are_left_out() -> None:
    odd = graph(
        [node("a"), node("b")], ("a", "b"), ("b", "a"), ("a", "a"), ("a", "nobody"), ("nobody", "b"), ("a", "b")
    )
    assert list(odd.edges()) == [("a", "b")]
    assert draw_tree(odd) == "a\n└── b\n"
    draw_svg(odd, "")


def test_nothing_at_all() -> None:
    assert draw_tree(graph([])) == ""
    assert ElementTree.fromstring(draw_svg(graph([]), "empty")).tag == f"{SVG}svg"
    assert draw_dot(graph([]), "").endswith("}\n")


@pytest.mark.parametrize("name", ["<b>&\"'", 'a"b\\', "]]>", "line\nfeed\x1b[31m", "-->", "\0", "\ud800", "名前"])
def test_names_stay_text(name: str) -> None:
    hostile = graph([node(name, driver=name), node("n")], (name, "n"))
    svg = ElementTree.fromstring(draw_svg(hostile, name).encode())
    assert len(list(svg.iter(f"{SVG}g"))) == 2
    assert "\x1b" not in draw_tree(hostile)
    assert draw_tree(hostile).count("\n") == 2
    dot = draw_dot(hostile, name)
    # Outside of strings there is nothing of it.
    outside = re.sub(r'"(?:\\.|[^"\\])*"', "", dot)
    assert outside.count("[") == outside.count("]") == 3
    assert name not in outside
    assert set(re.findall(r"[a-z]+", outside)) <= set(re.findall(r"[a-z]+", draw_dot(graph([node("n")]), "")))


@given(
    kinds=st.lists(st.sampled_from(["device", "group", "reset-domain", "odd"]), max_size=12),
    links=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40),
)
def test_any_graph_can_be_drawn_without_one_box_on_another(kinds: list[str], links: list[tuple[int, int]]) -> None:
    nodes = [node(f"n{number}", kind) for number, kind in enumerate(kinds)]
    any_graph = graph(nodes, *((f"n{parent}", f"n{child}") for parent, child in links))
    places = boxes(draw_svg(any_graph, "any"))
    assert set(places) == set(any_graph.nodes)
    for (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) in itertools.combinations(places.values(), 2):
        assert right1 <= left2 or right2 <= left1 or bottom1 <= top2 or bottom2 <= top1
    tree = draw_tree(any_graph)
    assert all(one.id in tree for one in nodes)
    assert draw_dot(any_graph, "any").count("->") == len(list(any_graph.edges()))
