"""A command as a person types it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.line import InvalidLine, Line, arguments_from, is_unfinished, parse_line
from vfiod.protocol.catalogue import COMMANDS


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("query-name", {}),
        (
            "dma-map iova=0x1000 size=64K fd=ram readonly=on",
            {"iova": 4096, "size": 65536, "fd": "ram", "readonly": True},
        ),
        ("dma-map iova=010 size=1_000", {"iova": 10, "size": 1000}),
        ("dma-map memory_backend=ram", {"memory-backend": "ram"}),
        ("region-read device=1 region=2 offset=0 size=4", {"device": "1", "region": 2, "offset": 0, "size": 4}),
        ("region-read region=bar0", {"region": "bar0"}),
        ("region-write data=hex:00ff", {"data": "AP8="}),
        ("region-write data=AP8=", {"data": "AP8="}),
        ("irq-start vectors=0,1,0x2 mode=direct", {"vectors": [0, 1, 2], "mode": "direct"}),
        ("irq-start vectors=[0,1]", {"vectors": [0, 1]}),
        (
            "irq-start eventfds.0.vector=0 eventfds.0.trigger=5 eventfds.1.vector=1 eventfds.1.trigger=b",
            {"eventfds": [{"vector": 0, "trigger": "5"}, {"vector": 1, "trigger": "b"}]},
        ),
        ('irq-start eventfds=\'[{"vector":0,"trigger":"e"}]\'', {"eventfds": [{"vector": 0, "trigger": "e"}]}),
        (
            "mdev-create type=primer-pci parameters.memory=64K parameters.vectors=8 parameters.hot-unplug=false",
            {"type": "primer-pci", "parameters": {"memory": 65536, "vectors": 8, "hot-unplug": False}},
        ),
        ("mdev-create parameters='{\"memory\": 4096}'", {"parameters": {"memory": 4096}}),
        ("device_add id='with space'", {"id": "with space"}),
        ("device_add new-in-the-server=5", {"new-in-the-server": 5}),
        ("x-unheard-of a=1 b=text c=true d.e=null", {"a": 1, "b": "text", "c": True, "d": {"e": None}}),
    ],
)
def test_values(text: str, arguments: dict[str, Any]) -> None:
    assert parse_line(text).arguments == arguments


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"execute": "query-name"}', Line("query-name", {})),
        ('{"execute": "x", "arguments": {"a": 1}, "id": 4}', Line("x", {"a": 1})),
        ('  {"exec-oob": "x"} ', Line("x", {}, oob=True)),
    ],
)
def test_json(text: str, line: Line) -> None:
    assert parse_line(text) == line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("dma-map iova", "key=value, got 'iova'; dma-map takes: iova, size"),
        ("dma-map =5", "key=value"),
        ("dma-map iova=many", "'iova' of dma-map takes an integer"),
        ("dma-map iova=", "integer"),
        ("dma-map iova=1 iova=2", "given twice"),
        ("dma-map readonly=maybe", "on or off"),
        ("region-read size=3", "one of 1, 2, 4, 8"),
        ("irq-start mode=slow", "one of direct, relayed"),
        ("irq-start vectors=0,x", "integer"),
        ("irq-start vectors=[0", "a list"),
        ("irq-start eventfds.1.vector=0", "without gaps"),
        ("mdev-create parameters=[]", "JSON object"),
        ("x a=1 a.b=2", "given as a value"),
        ("region-write data=hex:0g", "base64 or hex"),
        ("query-name 'unclosed", "No closing quotation"),
        ('{"execute": 5}', "A JSON line is"),
        ('{"execute": "x", "bogus": 1}', "A JSON line is"),
        ('{"execute"', "Not JSON"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidLine) as caught:
        parse_line(text)
    assert said in str(caught.value)


@given(st.text())
def test_nothing_else_is_raised(text: str) -> None:
    with contextlib.suppress(InvalidLine):
        parse_line(text)


@pytest.mark.parametrize("name", COMMANDS)
@given(words=st.lists(st.text('abc=.0129-_[]{}",:xK', max_size=12), max_size=4))
def test_nor_by_any_command(name: str, words: list[str]) -> None:
    with contextlib.suppress(InvalidLine):
        msgspec.json.encode(arguments_from(name, words))


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [
        ("query-name", False),
        ("x={", False),
        ("{", True),
        ('{"execute": "query-name"}', False),
        ('{"execute": "dma-map",\n "arguments": {"iova": 0', True),
        ('{"execute": "a}{[\\" b", "arguments": {', True),
        ('{"execute": "query-na', False),  # a string ends on its line: this is a mistake, not a beginning
        ("{]", False),
        ("{}}", False),
    ],
)
def test_what_goes_on_over_lines(text: str, unfinished: bool) -> None:
    assert is_unfinished(text) is unfinished
