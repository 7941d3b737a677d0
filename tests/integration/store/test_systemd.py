"""kill -9 under a real systemd, with the settings of examples/systemd: its store of fds, its restart.

A systemd of its own, in namespaces of its own: it needs root, and sees nothing of the host's services.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import eventfd, memfd

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.monitor import MachineRestored

from .test_crash import ACKNOWLEDGE, MiB, add, put, rung, until

PATIENCE = 120.0
ROOT = Path(__file__).parents[3]
UNIT = ROOT / "examples" / "systemd" / "vfiod@.service"
SYSTEMD = "/lib/systemd/systemd"
SETTINGS = ("Type", "NotifyAccess", "Restart", "RestartSec", "FileDescriptorStoreMax", "LimitNOFILE")
"""What of the example matters here; the rest is a sandbox around it, which the namespaces of this test may not have."""

NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--ipc", "--uts", "--mount-proc"]

MOUNTS = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
if mkdir /sys/fs/cgroup/systemd && mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd 2>/dev/null
then mkdir /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
else umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mount -t tmpfs tmpfs /etc/systemd/system
"""
"""What a systemd of its own begins with, of its own: ``/run``, control groups, units."""

BOOT = (
    MOUNTS
    + """cp "$1"/units/* /etc/systemd/system/
echo set-up
container=vfiod-test exec {systemd} --system --unit=test.target --log-target=console --show-status=no
"""
)


def settings() -> list[str]:
    """The lines of the example that matter."""
    found = [line for line in UNIT.read_text().splitlines() if line.partition("=")[0] in SETTINGS]
    assert {line.partition("=")[0] for line in found} == set(SETTINGS), found
    return found


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Path]:
    """A systemd with one vfiod; the socket of that."""
    if os.geteuid() != 0 or not Path(SYSTEMD).exists() or shutil.which("unshare") is None:
        pytest.skip("needs root, systemd and unshare")
    path = tmp_path / "qmp"
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "test.target").write_text("[Unit]\nDefaultDependencies=no\nWants=vfiod.service\n")
    command = f"{sys.executable} -P -m vfiod.server --name vm1 --qmp unix:{path} --fd-store on"
    (tmp_path / "units" / "vfiod.service").write_text(
        "\n".join(
            [
                *("[Unit]", "DefaultDependencies=no", "StartLimitIntervalSec=0"),
                *("[Service]", *settings(), f"ExecStart={command}"),
                f"Environment=PYTHONPATH={':'.join(filter(None, sys.path))}",
                f"StandardError=append:{tmp_path}/stderr",
                "",
            ]
        )
    )
    (tmp_path / "boot.sh").write_text(textwrap.dedent(BOOT).format(systemd=SYSTEMD))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*NAMESPACES, "sh", str(tmp_path / "boot.sh"), str(tmp_path)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(lambda: path.exists() or process.poll() is not None)
        if "set-up" not in (tmp_path / "log").read_text():
            pytest.skip(f"no namespaces for a systemd here: {(tmp_path / 'log').read_text()[-300:]}")
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield path
    finally:
        process.kill()
        process.wait(PATIENCE)
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said, said


def server_of(path: Path) -> int:
    """Who listens there, by our count of processes; 0: nobody."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return int(pid)
    except OSError:
        return 0


def test_killed_under_systemd_everything_is_there_again(booted: Path) -> None:
    with eventfd() as trigger, memfd(MiB) as memory:
        with Client.connect(booted, timeout=PATIENCE) as client:
            add(client, "a")
            add(client, "gone")
            client.dma_map(iova=0, size=MiB, fd=memory)
            client.irq_start(device="a", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
            with client.events("DEVICE_DELETED") as events:
                client.device_del(id="gone")
                events.get(PATIENCE)
            # The same file twice: systemd keeps each open file once.
            client.send_fds([memory.number])
            client.add_fd(fdset_id=1)
            client.send_fds([memory.number])
            client.add_fd(fdset_id=2)
        for _ in range(2):
            pid = server_of(booted)
            assert pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: server_of(booted) not in (0, pid))  # type: ignore[misc]
            with Client.connect(booted, timeout=PATIENCE) as client:
                machine = client.query_machine()
                assert machine.restored == MachineRestored(devices=["a"], lost=[])
                assert [(one.iova, one.size) for one in machine.mappings] == [(0, MiB)]
                assert [one.fdset_id for one in machine.fdsets] == [1, 2]
                put(client, "a", 0x14, 1)
                assert rung(trigger) >= 1
                put(client, "a", ACKNOWLEDGE, 1)
        with Client.connect(booted, timeout=PATIENCE) as client:
            client.remove_fd(fdset_id=1)
        pid = server_of(booted)
        os.kill(pid, signal.SIGKILL)
        until(lambda: server_of(booted) not in (0, pid))
        with Client.connect(booted, timeout=PATIENCE) as client:
            assert [one.fdset_id for one in client.query_fdsets()] == [2]
