"""`vfiod demo`, as a newcomer runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_demo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "vfiod.client.program", "demo", *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("--quiet",)], ids=["full", "quiet"])
def test_it_works(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_demo(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "Everything worked" in done.stdout
    for said in (
        "9000 bytes went to the device and came back unharmed",
        "5 interrupts raised by the device, 5 relayed, 5 completed",
        "each vector reached its own eventfd, exactly once",
        "bytes written there are read by region-read",
        "its registers have their values of power-on",
        "dev0 is gone and released",
        "no device, object, mapping or fd is left",
        "ended with status 0",
    ):
        assert said in done.stdout
    assert ("-> device_add" in done.stdout) == (not arguments)
    assert list(tmp_path.iterdir()) == [], "nothing is left in the temporary directory"


def test_a_server_that_cannot_start(tmp_path: Path) -> None:
    """The socket's path is too long: the demo fails, says why, and cleans up."""
    deep = tmp_path / ("d" * 110)
    deep.mkdir()
    done = run_demo(deep)
    assert done.returncode == 1
    assert "FAILED" in done.stderr
    assert "Everything worked" not in done.stdout
    assert list(deep.iterdir()) == []
