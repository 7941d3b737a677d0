"""What a server tells the service manager and the journal while it runs, and what SIGHUP does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vfiod.client import Client
from vfiod.server.journal import message_id

from .conftest import PATIENCE, Manager, Start, wait_for


def _end(process: subprocess.Popen[str]) -> int:
    process.terminate()
    return process.wait(PATIENCE)


def _add_primer(client: Client, id: str) -> None:
    made = client.execute("mdev-create", {"parent": "primer", "type": "primer-pci"})
    client.execute("device_add", {"driver": "vfio-pci", "id": id, "mdev": made["uuid"]})


def test_the_manager_hears_of_the_loop_and_of_devices(start: Start, manager: Manager, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    process = start("--name", "vm1", "--qmp", "unix:q", "--sandbox", "on", env=environment)
    assert manager.next() == {"READY": "1", "STATUS": "Serving vm1: 0 devices"}
    for _ in range(3):
        assert manager.until("WATCHDOG") == {"WATCHDOG": "1"}
    with Client.connect(str(tmp_path / "q")) as client:
        _add_primer(client, "nic0")
        assert manager.until("STATUS") == {"STATUS": "Serving vm1: 1 device"}
        client.execute("device_del", {"id": "nic0"})
        assert manager.until("STATUS") == {"STATUS": "Serving vm1: 0 devices"}
    assert _end(process) == 0
    assert manager.until("STOPPING")["STATUS"] == "Closing devices"


def test_a_stopped_process_says_nothing_and_goes_on_afterwards(start: Start, manager: Manager, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "50000"}
    process = start("--name", "vm1", "--qmp", "unix:q", env=environment)
    manager.until("WATCHDOG")
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process to stop")
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            manager.next()
    manager.socket.settimeout(PATIENCE)
    process.send_signal(signal.SIGCONT)
    manager.until("WATCHDOG")
    assert _end(process) == 0


def test_a_watchdog_for_another_process_is_not_answered(start: Start, manager: Manager, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "10000", "WATCHDOG_PID": "1"}
    process = start("--name", "vm1", "--qmp", "unix:q", env=environment)
    assert "READY" in manager.next()
    assert _end(process) == 0
    assert "STOPPING" in manager.next()


def test_sighup_reads_the_configuration_again(start: Start, manager: Manager, tmp_path: Path) -> None:
    config = tmp_path / "vm1.toml"
    config.write_text("qmp = 'unix:q'\n")
    process = start(
        "--name", "vm1", "--config", "vm1.toml", "--sandbox", "required", env={"NOTIFY_SOCKET": str(manager.path)}
    )
    assert "READY" in manager.next()
    errors = tmp_path / "errors"

    def hup() -> dict[str, str]:
        process.send_signal(signal.SIGHUP)
        assert int(manager.until("RELOADING")["MONOTONIC_USEC"]) > 0
        return manager.until("READY")

    config.write_text("qmp = 'unix:q'\nlog-level = 'info'\ntrace = 'session_*'\npidfile = 'p'\n")
    assert hup()["STATUS"] == "Serving vm1: 0 devices"
    assert "pidfile of 'vm1.toml' will be taken by the next start" in errors.read_text()
    assert "Read 'vm1.toml' again" in errors.read_text()
    with Client.connect(str(tmp_path / "q")) as client:
        assert [one["state"] for one in client.execute("trace-event-get-state", {"name": "session_opened"})] == [
            "enabled"
        ]
    config.write_text("trace = 'irq_*'\nqmp = 'unix:q'\npidflie = 'p'\n")
    assert hup()["STATUS"] == "Serving vm1: 0 devices; the configuration was refused, see the log"
    assert "Nothing has changed: vm1.toml:3: unknown key 'pidflie': did you mean 'pidfile'?" in errors.read_text()
    config.write_text("qmp = 'unix:q'\n")
    hup()
    with Client.connect(str(tmp_path / "q")) as client:
        assert [one["state"] for one in client.execute("trace-event-get-state", {"name": "session_opened"})] == [
            "disabled"
        ]
    assert _end(process) == 0


def test_sighup_without_a_configuration_changes_nothing(start: Start, manager: Manager, tmp_path: Path) -> None:
    process = start("--name", "vm1", "--qmp", "unix:q", env={"NOTIFY_SOCKET": str(manager.path)})
    assert "READY" in manager.next()
    process.send_signal(signal.SIGHUP)
    manager.until("RELOADING")
    assert manager.until("READY")["STATUS"] == "Serving vm1: 0 devices; no configuration to read again"
    assert _end(process) == 0


def test_lines_of_json_on_stderr(start: Start, manager: Manager, tmp_path: Path) -> None:
    process = start(
        "--name", "vm1", "--qmp", "unix:q", "--log-format", "json", "--log-level", "info", "--audit", "-",
        env={"NOTIFY_SOCKET": str(manager.path)},
    )  # fmt: skip
    manager.until("READY")
    with Client.connect(str(tmp_path / "q")) as client:
        _add_primer(client, "nic0")
    assert _end(process) == 0
    lines = [json.loads(line) for line in (tmp_path / "errors").read_text().splitlines()]
    assert any(one.get("event") == "DEVICE_ADDED" and one["device"] == "nic0" for one in lines)
    assert any(one.get("command") == "device_add" and one["ok"] for one in lines)
    assert any(one.get("message", "").startswith("Serving vm1 on") and one["vm"] == "vm1" for one in lines)


def _in_the_journal(place: Path) -> tuple[str, ...]:
    """What runs a program where this directory is ``/run/systemd/journal``."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1), to have a /run of its own")
    script = (
        'mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal'
        ' && exec "$@"'
    )
    before = ("unshare", "--mount", "sh", "-c", script, str(place))
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    return before


def _entries(journald: socket.socket) -> list[dict[str, str]]:
    """All that came; the values of these have no newlines."""
    found: list[dict[str, str]] = []
    journald.setblocking(False)
    while True:
        try:
            data = journald.recv(1 << 20)
        except BlockingIOError:
            return found
        found.append(dict(line.partition("=")[::2] for line in data.decode().splitlines()))


def test_the_journal_gets_entries_with_fields_from_inside_the_sandbox(
    start: Start, manager: Manager, tmp_path: Path
) -> None:
    place = tmp_path / "journal"
    place.mkdir()
    before = _in_the_journal(place)
    reading, writing = os.pipe()
    found = os.fstat(writing)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald, os.fdopen(reading) as stderr:
        journald.bind(str(place / "socket"))
        process = start(
            "--name", "vm1", "--qmp", "unix:q", "--log-level", "info", "--audit", "-", "--sandbox", "required",
            "--trace", "session_*", before=before, stderr=writing,
            env={"NOTIFY_SOCKET": str(manager.path), "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"},
        )  # fmt: skip
        os.close(writing)
        manager.until("READY")
        with Client.connect(str(tmp_path / "q")) as client:
            _add_primer(client, "nic0")
        assert _end(process) == 0
        entries: list[dict[str, Any]] = _entries(journald)
        assert stderr.read() == ""  # all of it is in the journal
    assert {one["VFIOD_VM"] for one in entries} == {"vm1"}
    assert {one["SYSLOG_IDENTIFIER"] for one in entries} == {"vfiod"}
    added = next(one for one in entries if one.get("VFIOD_EVENT") == "DEVICE_ADDED")
    assert (added["VFIOD_DEVICE"], added["PRIORITY"]) == ("nic0", "6")
    assert added["MESSAGE_ID"] == message_id("DEVICE_ADDED")
    asked = next(one for one in entries if one.get("VFIOD_COMMAND") == "device_add")
    assert (asked["VFIOD_UID"], asked["PRIORITY"], asked["VFIOD_OK"]) == ("0", "5", "true")
    assert asked["MESSAGE_ID"] == message_id("AUDIT")
    assert json.loads(asked["VFIOD_ARGUMENTS"])["id"] == "nic0"
    assert any(one.get("VFIOD_TRACE") == "session_opened" for one in entries)


def test_a_wrong_option_is_an_error_of_the_journal(start: Start, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    found = os.fstat(writing)
    environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    (tmp_path / "vm1.toml").write_text("nmae = 'x'\nqpm = 'unix:q'\n")
    with os.fdopen(reading) as stderr:
        process = start("--config", "vm1.toml", stderr=writing, env=environment)
        os.close(writing)
        assert stderr.read().splitlines() == [
            "<3>vfiod: vm1.toml:1: unknown key 'nmae': did you mean 'name'?",
            "<3>vfiod: vm1.toml:2: unknown key 'qpm': did you mean 'qmp'?",
        ]
    assert process.wait(PATIENCE) == 2


def test_without_a_terminal_and_without_stdin_it_serves(start: Start, manager: Manager, tmp_path: Path) -> None:
    """As cron, ssh and systemd start programs: no terminal at all (setsid), nothing to read."""
    process = start(
        "--name", "vm1", "--qmp", "unix:q", start_new_session=True, env={"NOTIFY_SOCKET": str(manager.path)}
    )
    manager.until("READY")
    with Client.connect(str(tmp_path / "q")) as client:
        assert client.execute("query-status")["status"]
    assert _end(process) == 0
    assert (tmp_path / "errors").read_text() == ""
