"""What may come next in a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.line import members
from vfiod.client.monitor.complete import LIVE, command_in, complete, complete_human
from vfiod.client.monitor.help import help_text
from vfiod.client.near import meant
from vfiod.protocol.catalogue import COMMANDS


def texts(line: str) -> list[str]:
    return [candidate.text for candidate in complete(line).candidates]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dma-", ["dma-map", "dma-unmap"]),
        ("he", ["help"]),
        ("help dma-u", ["dma-unmap"]),
        ("dma-unmap ", ["iova=", "size=", "force="]),
        ("dma-unmap iova=1 ", ["size=", "force="]),
        ("dma-map mem", ["memory-backend="]),
        ("dma-map readonly=o", ["on", "off"]),
        ("irq-start mode=", ["direct", "relayed"]),
        ("device_add on-request=d", ["delete"]),
        ("device_add driver=", ["vfio-pci", "vfio-platform", "vfio-ccw", "vfio-ap"]),
        ("region-read region=bar1", ["bar1"]),
        ("region-read size=", ["1", "2", "4", "8"]),
        ("irq-mask index=ms", ["msi", "msix"]),
        ("query-stats target=", ["vm", "device", "session"]),
        ("qmp_capabilities enable=o", ["oob"]),
        ("nonsense ", []),
        ("nonsense x=", []),
        ("json query-na", ["query-name"]),
        ("getfd ram=/dev/sh", []),
        ("{", []),
        ('{"exec', ['execute": ', 'exec-oob": ']),
        ('{"execute": "dma-u', ['dma-unmap"']),
        ('{"execute": "dma-unmap", "arg', ['arguments": ']),
        ('{"execute": "dma-unmap", "arguments": {"iova": 1, "', ['size": ', 'force": ']),
        ('{"execute": "dma-map", "arguments": {"readonly": ', ["true", "false"]),
        ('{"execute": "irq-start",\n "arguments": {"mode": "re', ['relayed"']),
        ('{"execute": "irq-start", "arguments": {"mode": ', ['"direct"', '"relayed"']),
        ('{"execute": "region-read", "arguments": {"size": ', ["1", "2", "4", "8"]),
        ('{"execute": "irq-start", "arguments": {"indexes": [{"', []),
        ('{"execute": "nonsense", "arguments": {"', []),
    ],
)
def test_from_the_catalogue(line: str, expected: list[str]) -> None:
    assert texts(line) == expected


@pytest.mark.parametrize(
    ("line", "live", "prefix"),
    [
        ("irq-mask device=ni", "devices", "ni"),
        ("device_del id=", "devices", ""),
        ("object-del id=", "objects", ""),
        ("object-add fd=", "fds", ""),
        ("device_add group-fd=", "fds", ""),
        ("dma-map memory-backend=r", "objects", "r"),
        ("device_add mdev=", "mdevs", ""),
        ("mdev-create parent=", "parents", ""),
        ("trace-event-set-state name=irq", "traces", "irq"),
        ("device_add id=", None, ""),
        ("dma-map iova=", None, ""),
    ],
)
def test_from_the_server(line: str, live: str | None, prefix: str) -> None:
    found = complete(line)
    assert (found.live, found.prefix) == (live, prefix)


@pytest.mark.parametrize(
    ("line", "expected", "live"),
    [
        ("inf", ["info"], None),
        ("info mdev", ["mdev-types"], None),
        ("info devices ", ["id="], "devices"),
        ("help dma-u", ["dma-unmap"], None),
        ("device_add vfio-pl", ["vfio-platform"], None),
        ("device_add vfio-pci,grou", ["group-fd="], None),
        ("device_add vfio-pci,id=nic0,group-fd=", [], "fds"),
        ("region-read nic0 ba", [f"bar{number}" for number in range(6)], None),
        ("region-read ni", [], "devices"),
        ("device_del nic0 fo", ["force="], None),
        ("device_del nic0 force=o", ["on", "off"], None),
        ("info nonsense x", [], None),
        ("nonsense x", [], None),
    ],
)
def test_human(line: str, expected: list[str], live: str | None) -> None:
    found = complete_human(line)
    assert ([candidate.text for candidate in found.candidates], found.live) == (expected, live)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", ""),
        ("dma-map iova=0", "dma-map"),
        ("json query-devices", "query-devices"),
        ("info devices", "query-devices"),
        ('{"exec', ""),
        ('{"execute": "device_del", "arguments": {', "device_del"),
    ],
)
def test_what_a_line_is_about(line: str, command: str) -> None:
    assert command_in(line) == command


def test_live_json_names_are_quoted() -> None:
    open_value = complete('{"execute": "device_del", "arguments": {"id": "ni')
    assert (open_value.prefix, open_value.live, open_value.quotes) == ("ni", "devices", ("", '"'))
    assert complete('{"execute": "device_del", "arguments": {"id": ').quotes == ('"', '"')


@pytest.mark.parametrize("key", LIVE, ids=str)
def test_every_live_name_is_an_argument(key: tuple[str, str] | str) -> None:
    commands = [key[0]] if isinstance(key, tuple) else list(COMMANDS)
    name = key[1] if isinstance(key, tuple) else key
    assert any(name in members(COMMANDS[command].arguments) for command in commands)


def test_all_at_the_start() -> None:
    assert set(COMMANDS) < set(texts(""))
    assert all(candidate.about for candidate in complete("").candidates)


@given(st.text())
def test_any_text(text: str) -> None:
    assert text.endswith(complete(text).prefix)
    assert text.endswith(complete_human(text).prefix)
    assert text.endswith(complete('{"' + text).prefix)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    assert COMMANDS[name].summary.replace("``", "") in help_text()
    shown = help_text(name)
    assert shown.startswith(name)
    for argument in COMMANDS[name].arguments.__struct_encode_fields__:
        assert f"  {argument}" in shown


def test_help_for_what_is_not_there() -> None:
    assert "did you mean device_del" in help_text("device-del")
    assert meant("zzzzzz") == ""
    assert meant("exti", more=["exit"]) == "; did you mean exit?"
    assert meant("device_add", ["driver", "mdevv"]) == "; did you mean mdev?"
    assert meant("device_add", ["driver"]) == ""
    assert "the server stays" in help_text("exit")
