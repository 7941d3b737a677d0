"""'systemctl reload' under a real systemd, with the whole unit of examples/systemd and its replace.conf.

A systemd of its own, in namespaces of its own, with /run, /tmp and /var/tmp of its own: it needs root, and sees nothing
of the host's services. The server is another user's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import eventfd, memfd

from vfiod.client.errors import ConnectFailed, ConnectionLost
from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.monitor import MachineRestored

from .test_crash import ACKNOWLEDGE, PATIENCE, RAISE, SCRATCH, MiB, add, get, put, rung, until
from .test_systemd import MOUNTS, NAMESPACES, SYSTEMD, UNIT
from .test_taken_over import GIVEN, NOT_KNOWN, SAID, UNCONFINED, WITNESS, put_for_good

USER = "daemon"
"""In place of vfiod, which packages make: one that every system has."""

BOOT = (
    MOUNTS
    + """cp -r "$1"/units/* /etc/systemd/system/
cp "$1"/witness.py /run/witness.py
{binds}
cd /
mount -t tmpfs tmpfs /var/tmp
mount -t tmpfs tmpfs /tmp
echo set-up
container=vfiod-test exec {systemd} --system --unit=test.target --log-target=console --show-status=no
"""
)
"""What the server imports is bound where any user may read it. The host's /tmp is covered last: it may be in there."""


class Booted:
    """A systemd with the unit of examples/systemd.

    Args:
        place: for what it needs.
        replace: the drop-in that has ExecReload=.

    Attributes:
        vm: the name, in no other run: systemds share the control groups of their host, one for each name of a unit.

    """

    def __init__(self, place: Path, replace: str) -> None:
        self.vm = f"t{uuid.uuid4().hex[:8]}"
        self.service = f"vfiod@{self.vm}.service"
        paths = [path for path in sys.path if Path(path).is_dir()]
        python = f"/run/python/bin/python{sys.version_info.major}.{sys.version_info.minor} -P"
        self._units(place / "units", python, ":".join(f"/run/path/{at}" for at in range(len(paths))), replace)
        bound = {sys.base_prefix: "/run/python"} | {path: f"/run/path/{at}" for at, path in enumerate(paths)}
        binds = [f"mkdir -p {there} && mount --bind '{here}' {there}" for here, there in bound.items()]
        (place / "witness.py").write_text(WITNESS)
        (place / "boot.sh").write_text(BOOT.format(binds="\n".join(binds), systemd=SYSTEMD))
        self._log = place / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*NAMESPACES, "sh", str(place / "boot.sh"), str(place)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _units(self, place: Path, python: str, path: str, replace: str) -> None:
        more = f"Environment=PYTHONPATH={path}\nStandardError=append:/run/stderr\n"
        outside = "[Unit]\nDefaultDependencies=no\n"
        drop_ins = place / "vfiod@.service.d"
        drop_ins.mkdir(parents=True)
        (place / "test.target").write_text(f"{outside}Wants=vfiod@{self.vm}.socket {self.service}\n")
        for unit in (UNIT, UNIT.with_suffix(".socket")):
            text = unit.read_text().replace("=vfiod\n", f"={USER}\n")
            (place / unit.name).write_text(text.replace("/usr/bin/vfiod serve", f"{python} -m vfiod.server"))
        (drop_ins / "replace.conf").write_text(
            replace.replace("/usr/bin/vfiod serve", f"{python} -m vfiod.server").replace("PYTHON", python)
        )
        (drop_ins / "test.conf").write_text(f"{outside}StartLimitIntervalSec=0\n[Service]\n{more}")
        (place / "vfiod@.socket.d").mkdir()
        (place / "vfiod@.socket.d" / "test.conf").write_text(outside)

    def wait(self) -> None:
        """Until the server is there."""
        until(lambda: "set-up" in self._log.read_text() or self._process.poll() is not None)
        if self._process.poll() is not None:
            pytest.skip(f"no namespaces for a systemd here: {self._log.read_text()[-300:]}")
        until(lambda: self._set_up() and self.shown("ActiveState") in ("active", "failed"))
        # 226 (NAMESPACE) and its like: what the unit wants of a system cannot be had in these namespaces.
        until(lambda: self.shown("StatusText") != "" or self.shown("ExecMainCode") != "0")
        if (status := self.shown("ExecMainStatus")).isdecimal() and int(status) >= 200:
            pytest.skip(f"the unit does not begin in these namespaces: status {status}")

    def _set_up(self) -> bool:
        return Path(f"{self.root}/run/systemd/private").exists()

    @property
    def first(self) -> str:
        """That systemd's number here."""
        mine = self._process.pid
        return Path(f"/proc/{mine}/task/{mine}/children").read_text().split()[0]

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.first}/root")

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program there, as root, in no unit."""
        spaces = ("--mount", "--pid", "--ipc", "--uts", "--cgroup")
        return subprocess.run(
            ["nsenter", "--target", self.first, *spaces, *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, cwd="/",
        )  # fmt: skip

    def shown(self, what: str) -> str:
        return self.inside("systemctl", "show", self.service, "--value", "-p", what).stdout.strip()

    def main(self) -> int:
        """The process that systemd looks after, by its count; 0: none."""
        return int(self.shown("MainPID") or 0)

    def reload(self) -> bool:
        return self.inside("systemctl", "reload", self.service).returncode == 0

    def kill(self) -> None:
        """kill -9 of the server, and the next one is there."""
        before = self.main()
        assert self.inside("systemctl", "kill", "--kill-whom=main", "-s", "KILL", self.service).returncode == 0
        self.wait_next(before)

    def wait_next(self, before: int) -> None:
        """Until systemd looks after another process than this one."""
        end = time.monotonic() + PATIENCE
        while self.main() in (0, before):
            assert time.monotonic() < end, f"{self.inside('systemctl', 'status', self.service).stdout}\n{self.said()}"
            time.sleep(0.01)

    def processes(self) -> list[str]:
        """Those of the unit."""
        group = self.shown("ControlGroup")
        for hierarchy in ("systemd", "."):
            with contextlib.suppress(OSError):
                return (self.root / "sys/fs/cgroup" / hierarchy / group[1:] / "cgroup.procs").read_text().split()
        return []

    def said(self) -> str:
        return (self.root / "run/stderr").read_text()

    def client(self) -> Client:
        """Connect, and be answered: systemd has the listening socket, so one may wait there for a server to come."""
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ConnectFailed, ConnectionLost):
                return Client.connect(self.root / f"run/vfiod/{self.vm}.qmp", timeout=PATIENCE)
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def close(self) -> None:
        said = ""
        if self._process.poll() is None and self._set_up():
            # With them go their control groups, which are the host's.
            self.inside("systemctl", "stop", f"vfiod@{self.vm}.socket", self.service)
            said = self.said()
        self._process.kill()
        self._process.wait(PATIENCE)
        assert "Traceback" not in said, said


def boot(place: Path, replace: str) -> Iterator[Booted]:
    if (
        os.geteuid() != 0
        or not Path(SYSTEMD).exists()
        or not all(map(shutil.which, ("unshare", "nsenter", "systemctl")))
    ):
        pytest.skip("needs root, systemd, unshare and nsenter")
    made = Booted(place, replace)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Booted]:
    yield from boot(tmp_path, UNIT.with_name("replace.conf").read_text())


STEPS = """
[Service]
ExecReload=
ExecReload=/bin/sh -c 'read -r who step < /run/step; exec PYTHON /run/witness.py "$$who" "$$step" "goes on" \
--take-over unix:/run/vfiod/%i/hand-over --daemonize --fd-store on OPTIONS'
"""


@pytest.fixture
def witnessed(tmp_path: Path) -> Iterator[Booted]:
    """One in whose reload somebody dies after a step: /run/step names both."""
    yield from boot(tmp_path, STEPS.replace("OPTIONS", " ".join(UNCONFINED)))


def test_a_reload_replaces_the_program_and_the_new_one_is_kept(booted: Booted) -> None:
    with eventfd() as trigger, memfd(MiB) as memory:
        with booted.client() as client:
            add(client, "a")
            client.dma_map(iova=0, size=MiB, fd=memory)
            client.irq_start(device="a", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
            for turn in range(2):
                before = booted.main()
                assert booted.reload(), booted.said()
                # The same session, with another process, which systemd looks after.
                put(client, "a", SCRATCH, turn)
                assert get(client, "a", SCRATCH) == turn ^ 0xFFFF_FFFF
                assert booted.main() not in (0, before)
                until(lambda: len(booted.processes()) == 1)
            add(client, "b")
        for _ in range(2):
            booted.kill()
            with booted.client() as client:
                machine = client.query_machine()
                assert machine.restored == MachineRestored(devices=["a", "b"], lost=[])
                assert [(one.iova, one.size) for one in machine.mappings] == [(0, MiB)]
                put(client, "a", RAISE, 1)
                assert rung(trigger) >= 1
                put(client, "a", ACKNOWLEDGE, 1)
            assert booted.reload(), booted.said()
    assert booted.inside("systemctl", "stop", booted.service).returncode == 0
    assert booted.shown("Result") == "success"


def test_one_that_systemd_would_not_look_after_is_refused_before_anything_moves(booted: Booted) -> None:
    python = f"/run/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    path = booted.shown("Environment").removeprefix("PYTHONPATH=")
    with booted.client() as client:
        add(client, "a")
        before = booted.main()
        for more in ((), ("--daemonize",)):
            ran = booted.inside(
                *("env", f"PYTHONPATH={path}", python, "-P", "-m", "vfiod.server"),
                *("--take-over", f"unix:/run/vfiod/{booted.vm}/hand-over", *more),
            )
            assert ran.returncode == 1
            assert "Start it by ExecReload= of the unit, with --daemonize, and 'systemctl reload'" in ran.stderr
        assert get(client, "a", 0) == 0xF10D_0001
        assert booted.main() == before
        # And one that is started so is taken.
        assert booted.reload(), booted.said()
        assert get(client, "a", 0) == 0xF10D_0001


def test_a_giver_that_dies_under_systemd_leaves_one_owner(witnessed: Booted) -> None:
    with witnessed.client() as client:
        add(client, "a")
    for value, step in enumerate([*NOT_KNOWN, *GIVEN, *SAID], 1):
        with witnessed.client() as client:
            put_for_good(client, "a", SCRATCH, value)
        before = witnessed.main()
        (witnessed.root / "run/step").write_text(f"{before} {step}\n")
        taken = witnessed.reload()
        assert not taken or step in SAID, step
        witnessed.wait_next(before)
        with witnessed.client() as client:
            assert get(client, "a", SCRATCH) == value ^ 0xFFFF_FFFF, step
            assert [one.id for one in client.query_devices()] == ["a"]
        until(lambda: len(witnessed.processes()) == 1)


def test_a_taker_that_dies_under_systemd_leaves_one_owner(witnessed: Booted) -> None:
    with witnessed.client() as client:
        add(client, "a")
    for value, step in enumerate([*NOT_KNOWN, *GIVEN, *SAID], 1):
        with witnessed.client() as client:
            put_for_good(client, "a", SCRATCH, value)
            before = witnessed.main()
            (witnessed.root / "run/step").write_text(f"0 {step}\n")
            assert not witnessed.reload() or step in SAID, step
            if step not in SAID:
                assert get(client, "a", SCRATCH) == value ^ 0xFFFF_FFFF, step
                assert witnessed.main() == before
        if step in SAID:
            # The giver has left: whoever says that it is ready is the next.
            witnessed.wait_next(before)
        with witnessed.client() as client:
            assert get(client, "a", SCRATCH) == value ^ 0xFFFF_FFFF, step
            assert [one.id for one in client.query_devices()] == ["a"]
        until(lambda: len(witnessed.processes()) == 1)
