"""Values as people read them."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.client.fds import descriptors
from vfiod.client.render import coloured, describe_fd, plain
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
