"""A real server process, with both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.spawn import OwnServer, accepts, own_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    with own_server(tmp_path, ["--jsonrpc", f"unix:{tmp_path}/rpc.sock"], name="vm1") as running:
        while not accepts(tmp_path / "rpc.sock"):
            assert running.process.poll() is None, running.messages()
        yield running
        assert running.stop() == 0, running.messages()
    assert "Traceback" not in running.messages(), running.messages()
