"""A vfiod server, and a QEMU without a machine, each with a QMP socket."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.spawn import OwnServer, own_server

QEMU = "qemu-system-x86_64"
START_SECONDS = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    with own_server(tmp_path, name="vm1") as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """The QMP socket of a real QEMU."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed: the lab installs it (make lab), or 'apt install qemu-system-x86'")
    path = tmp_path / "qemu.sock"
    process = subprocess.Popen(
        [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-name", "vm1",
         "-qmp", f"unix:{path},server=on,wait=off"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not path.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "QEMU does not make its socket"
            time.sleep(0.01)
        yield path
    finally:
        process.kill()
        process.communicate()
