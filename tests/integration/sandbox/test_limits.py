"""What the process was given, looked at before it begins: open files and locked memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vfiod.client.serve import server_command
from vfiod.client.sync import Client

GIVEN = """
import os, resource, sys
from vfiod.server.sandbox.calls import MACHINES, numbers_of
from vfiod.server.sandbox.raw import syscall

files, locked = map(int, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked, locked))
if locked != resource.RLIM_INFINITY and os.geteuid() == 0:
    for capability in (14, 24):  # CAP_IPC_LOCK, CAP_SYS_RESOURCE: root would not be limited
        syscall(numbers_of(MACHINES[os.uname().machine])["prctl"], 24, capability)
os.execv(sys.argv[3], sys.argv[3:])
"""
ENOUGH = 8192
MIB = 1 << 20


def said(directory: Path, files: int, locked: int, *options: str) -> list[str]:
    """The log of a server with such limits, which serves nevertheless."""
    path = directory / "qmp"
    server = server_command(["--name", "x", "--qmp", f"unix:{path}", *options])
    process = subprocess.Popen(
        [sys.executable, "-c", GIVEN, str(files), str(locked), *server], stderr=subprocess.PIPE, text=True
    )
    try:
        while not path.exists():
            assert process.poll() is None, process.communicate()
        with Client.connect(path, timeout=120) as client:
            client.query_name()
    finally:
        process.terminate()
    return process.communicate()[1].splitlines()


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < ENOUGH, reason="this process has too few itself")
def test_too_few_open_files_are_said(tmp_path: Path) -> None:
    [line] = said(tmp_path, 1024, 0, "--log-level", "warning")
    assert "At most 1024 files can be open (RLIMIT_NOFILE): devices with many vectors need 4096" in line
    assert "LimitNOFILE=" in line
    assert said(tmp_path, ENOUGH, 0) == []


@pytest.mark.parametrize("sandbox", ["on", "off"])
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < ENOUGH, reason="this process has too few itself")
def test_too_little_locked_memory_is_said_where_it_will_be_needed(tmp_path: Path, sandbox: str) -> None:
    """With --allow-open; else devices may be mediated ones alone, and it is said at level info."""
    options = ("--sandbox", sandbox)
    [line] = said(tmp_path, ENOUGH, 8 * MIB, *options, "--allow-open")
    assert "At most 8388608 bytes can be locked (RLIMIT_MEMLOCK)" in line
    assert "LimitMEMLOCK=infinity" in line
    assert said(tmp_path, ENOUGH, 8 * MIB, *options) == []


def test_at_level_info_it_is_always_said(tmp_path: Path) -> None:
    assert any("can be locked" in line for line in said(tmp_path, ENOUGH, 8 * MIB, "--log-level", "info"))
