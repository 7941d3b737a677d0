"""Values as people read them."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.fds import descriptors
from vfiod.client.render import coloured, describe_fd, plain, table
from vfiod.protocol.catalogue.monitor import VersionTriple
from vfiod.protocol.fd import FileDescriptor

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_colours_do_not_change_it(value: Any) -> None:
    text = "".join(piece for _, piece in coloured(value))
    assert json.loads(text) == value
    assert text.isascii()
    assert "\x1b" not in text, "nothing a server says drives the terminal"


def test_fds_become_indexes() -> None:
    with FileDescriptor(os.memfd_create("ram")) as ram, FileDescriptor(os.eventfd(0)) as event:
        os.ftruncate(ram.number, 4096)
        found: list[tuple[str, FileDescriptor]] = []
        value = {"irqs": [{"trigger-fd": event}], "map-fd": ram, "version": VersionTriple(major=1, minor=2, micro=3)}
        assert plain(value, found) == {
            "irqs": [{"trigger-fd": 0}], "map-fd": 1, "version": {"major": 1, "minor": 2, "micro": 3},
        }  # fmt: skip
        assert found == [("irqs[0].trigger-fd", event), ("map-fd", ram)]
        assert plain({"fd": event}) == {"fd": "anon_inode:[eventfd]"}
        assert describe_fd(ram) == "/memfd:ram (deleted) (4096 bytes)"
        assert list(descriptors(value)) == [event, ram]


@pytest.mark.parametrize("value", [[], {}, [[]], "", 0, None, [1, 2], {"a": []}])
def test_short_ones_stay_on_one_line(value: Any) -> None:
    assert "".join(piece for _, piece in coloured(value)) == json.dumps(value)


def drawn(value: Any, width: int) -> list[str]:
    rows = table(value, width)
    assert rows is not None
    return "".join(piece for _, piece in rows).split("\n")


def test_a_table() -> None:
    value = [{"id": "nic0", "size": 64, "on": True, "held-by": [{"kind": "irq"}]}, {"id": "x\x1b", "size": 4096}]
    assert drawn(value, 80) == [
        "id         size  on   held-by",
        "nic0         64  yes  kind=irq",
        '"x\\u001b"  4096  -    -',
    ]
    assert drawn(value, 24)[-1] == "Not shown: held-by. 'json COMMAND' shows all."
    assert table(value, 14) is None, "JSON says more than a table that holds next to nothing"


@pytest.mark.parametrize("value", [[], {}, [1], "x", [{}], [{"a": 1}, 2], None])
def test_no_table(value: Any) -> None:
    assert table(value, 80) is None


@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=4), max_size=3), st.integers(1, 200))
def test_no_table_is_too_wide_or_drives_the_terminal(value: Any, width: int) -> None:
    rows = table(value, width)
    text = "" if rows is None else "".join(piece for _, piece in rows)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert all(len(line) <= width or line.startswith("Not shown: ") for line in text.split("\n"))
