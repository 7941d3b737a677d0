"""The lab's own machinery, on the host: what it promises when all goes well, and when it does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.lab import launch, vng
from tests.lab.guest.pci import wait_until
from tests.lab.places import REPO, GuestDiedError
from tests.lab.qmp import Qmp, QmpError
from tests.lab.topologies import EDU, EDU_IDS, TOPOLOGIES, Topology, find_topology

GUEST_MODULE = Path(__file__).parent / "guest" / "test_kernel.py"

needs_lab = pytest.mark.skipif(
    launch.unavailable_reason() is not None and not os.environ.get("VFIOD_LAB_REQUIRED"),
    reason=launch.unavailable_reason() or "",
)


# -- topologies -----------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=list(TOPOLOGIES))
def test_a_topologys_names_and_places_are_its_own(topology: Topology) -> None:
    properties = [
        dict(part.split("=", 1) for part in device.split(",")[1:])
        for device in topology.devices
        if ",bus=" in device and ",addr=" in device
    ]
    for names in ([entry["id"] for entry in properties], [(entry["bus"], entry["addr"]) for entry in properties]):
        assert len(set(names)) == len(names)
    # Lower slots belong to the devices virtme-ng adds.
    for entry in properties:
        if entry["bus"] == "pcie.0":
            assert int(entry["addr"].partition(".")[0], 16) >= 0x10


def test_every_named_edu_device_exists() -> None:
    line = " ".join(EDU.devices)
    assert all(f"id={name}," in line for name in EDU_IDS.values())


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'nosuch'; there are: .*edu"):
        find_topology("nosuch")


# -- QMP ------------------------------------------------------------------------------------


def qmp_server(connection: socket.socket, replies: list[list[dict[str, object]]]) -> None:
    with connection, connection.makefile("rwb") as stream:
        for batch in replies:
            request = json.loads(stream.readline())
            for reply in batch:
                if reply.get("id") == "?":
                    reply["id"] = request["id"]
                stream.write(json.dumps(reply).encode() + b"\r\n")
            stream.flush()


def test_qmp_keeps_events_and_raises_errors() -> None:
    ours, theirs = socket.socketpair()
    script: list[list[dict[str, object]]] = [
        [{"QMP": {}}, {"return": {}, "id": "?"}],
        [{"event": "DEVICE_DELETED", "data": {}}, {"return": 7, "id": "?"}],
        [{"error": {"class": "GenericError", "desc": "no"}, "id": "?"}],
    ]
    thread = threading.Thread(target=qmp_server, args=(theirs, script))
    thread.start()
    with ours, ours.makefile("rb") as reader, ours.makefile("wb") as writer:
        session = Qmp(reader, writer)
        assert session.execute("query-x") == 7
        assert session.wait_event("DEVICE_DELETED")["data"] == {}
        assert session.events == []
        with pytest.raises(QmpError, match="GenericError: no"):
            session.execute("device_del", id="x")
    thread.join()


# -- what the guest must open ---------------------------------------------------------------


def test_closed_paths_names_what_keeps_others_out_and_no_more(tmp_path: Path) -> None:
    home = tmp_path / "home"
    tree = home / "tree"
    (tree / "closed").mkdir(parents=True)
    for name, mode in (("open", 0o644), ("shut", 0o600)):
        (tree / name).write_text("")
        (tree / name).chmod(mode)
    for directory, mode in ((tree / "closed", 0o700), (tree, 0o755), (home, 0o700)):
        directory.chmod(mode)
    closed = vng.closed_paths([tree])
    assert home in closed.passages  # and pytest's own directories above, which are 0700 too
    assert tree not in closed.passages
    assert closed.trees == (tree,)
    assert sorted(closed.entries) == [tree / "closed", tree / "shut"]


# -- pytest on both sides -------------------------------------------------------------------


def host_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", str(GUEST_MODULE), *arguments],
        env={**os.environ, "VFIOD_LAB_REQUIRED": "", **environment},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_qemu_guest_tests_are_skipped_with_the_reason() -> None:
    done = host_pytest("-k", "bar0", VFIOD_LAB_QEMU="/nonexistent")
    assert done.returncode == 0, done.stdout
    assert "no lab here: qemu-system-x86_64 is not installed (run tests/lab/setup)" in done.stdout
    assert "1 skipped" in done.stdout


def test_where_the_lab_is_required_it_fails_without_qemu() -> None:
    done = host_pytest("-k", "bar0", VFIOD_LAB_QEMU="/nonexistent", VFIOD_LAB_REQUIRED="1")
    assert done.returncode == 1, done.stdout
    assert "the lab is required here and cannot run: qemu-system-x86_64 is not installed" in done.stdout
    assert "1 error" in done.stdout


def test_guest_tests_carry_the_lab_marker() -> None:
    done = host_pytest("-m", "not lab", "--collect-only", "-q")
    assert done.returncode == 5, done.stdout  # nothing left to run
    assert "no tests collected" in done.stdout


def test_a_guest_test_refuses_to_run_on_the_host() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VFIOD_LAB_MACHINE"}
    done = subprocess.run(
        # What the lab does in the guest, and with it the conftest.py that would send it there left out.
        [
            *(sys.executable, "-m", "pytest", "-c", str(GUEST_MODULE.parent / "guest.ini"), "-k", "every_device"),
            *(f"--rootdir={REPO}", f"--confcutdir={GUEST_MODULE.parent}", str(GUEST_MODULE)),
        ],
        env=environment,
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "runs in a lab machine only" in done.stdout


# -- real machines --------------------------------------------------------------------------


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line has ``text``: QEMU's has the guest's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in line:
                found.append(int(entry.name))
    return found


@pytest.mark.lab
@needs_lab
def test_host_reaches_the_monitor_and_close_ends_everything() -> None:
    with launch.Guest(EDU, "sleep 1000") as guest:
        wait_until(lambda: guest.check() and guest.booted, "boot", launch.BOOT_SECONDS)
        with guest.qmp() as monitor:
            assert monitor.execute("query-status")["running"] is True
        assert processes_with(str(guest.directory))
    assert processes_with(str(guest.directory)) == []
    assert not guest.directory.exists()


@pytest.mark.lab
@needs_lab
@pytest.mark.parametrize("how", ["boot", "end"])
def test_time_limits_name_what_did_not_come(how: str) -> None:
    boot, total = (1.0, 900.0) if how == "boot" else (900.0, 1.0)
    with launch.Guest(EDU, "sleep 1000", boot_seconds=boot, total_seconds=total) as guest:
        with pytest.raises(GuestDiedError, match=f"did not {how} within 1 s"):
            guest.wait()
        directory = str(guest.directory)
    assert processes_with(directory) == []


@pytest.mark.lab
@needs_lab
def test_qemu_does_not_outlive_a_killed_runner() -> None:
    code = (
        "import sys\nfrom tests.lab import launch\nfrom tests.lab.topologies import EDU\n"
        "guest = launch.Guest(EDU, 'sleep 1000')\nguest.start()\nprint(guest.directory, flush=True)\nguest.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        directory = runner.stdout.readline().strip()
        wait_until(lambda: (Path(directory) / "qmp").exists(), "QEMU", 120)
        runner.send_signal(signal.SIGKILL)
    try:
        wait_until(lambda: not processes_with(directory), "the end of QEMU", 120)
    finally:
        for process in processes_with(directory):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
        subprocess.run(["rm", "-rf", directory], check=True)


@pytest.mark.lab
@needs_lab
def test_a_command_that_fails_says_so() -> None:
    with launch.Guest(EDU, "echo here; exit 7") as guest:
        assert guest.wait() == 7
        assert guest.output().strip() == "here"
