"""A vfiod server, and a QEMU without a machine, each with a QMP socket."""

from __future__ import annotations

import shutil
import socket
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


@pytest.fixture(scope="module")
def steady_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """One server for many sessions."""
    with own_server(tmp_path_factory.mktemp("vfiod"), name="vm1") as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The QMP socket of a real QEMU, for many sessions."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed: the lab installs it (make lab), or 'apt install qemu-system-x86'")
    path = tmp_path_factory.mktemp("qemu") / "qmp.sock"
    process = subprocess.Popen(
        [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-name", "vm1",
         "-qmp", f"unix:{path},server=on,wait=off"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not accepts(path):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "QEMU does not accept"
            time.sleep(0.01)
        yield path
        assert process.poll() is None, process.communicate()[1]
    finally:
        process.kill()
        process.communicate()


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
