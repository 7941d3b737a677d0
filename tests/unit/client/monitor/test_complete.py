"""What may come next in a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.monitor.complete import complete
from vfiod.client.monitor.help import did_you_mean, help_text
from vfiod.protocol.catalogue import COMMANDS


def texts(line: str) -> list[str]:
    return [candidate.text for candidate in complete(line).candidates]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dma-", ["dma-map", "dma-unmap"]),
        ("he", ["help"]),
        ("help dma-u", ["dma-unmap"]),
        ("dma-unmap ", ["iova=", "size="]),
        ("dma-unmap iova=1 ", ["size="]),
        ("dma-map mem", ["memory-backend="]),
        ("dma-map readonly=o", ["on", "off"]),
        ("irq-start mode=", ["direct", "relayed"]),
        ("device_add on-request=d", ["delete"]),
        ("device_add driver=", ["vfio-pci"]),
        ("region-read region=bar1", ["bar1"]),
        ("region-read size=", ["1", "2", "4", "8"]),
        ("irq-mask index=ms", ["msi", "msix"]),
        ("query-stats target=", ["vm", "device", "session"]),
        ("qmp_capabilities enable=o", ["oob"]),
        ("nonsense ", []),
        ("nonsense x=", []),
        ('{"exec', []),
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


def test_all_at_the_start() -> None:
    assert set(COMMANDS) < set(texts(""))
    assert all(candidate.about for candidate in complete("").candidates)


@given(st.text())
def test_any_text(text: str) -> None:
    found = complete(text)
    assert text.endswith(found.prefix)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    assert COMMANDS[name].summary in help_text()
    shown = help_text(name)
    assert shown.startswith(name)
    for argument in COMMANDS[name].arguments.__struct_encode_fields__:
        assert f"  {argument}" in shown


def test_help_for_what_is_not_there() -> None:
    assert "did you mean device_del" in help_text("device-del")
    assert did_you_mean("zzzzzz") == ""
    assert "the server stays" in help_text("exit")
