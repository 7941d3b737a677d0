"""Roles of sockets and the audit log, on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.client.serve import server_command
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.limits import MAX_OTHER_SESSIONS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    arguments = [
        *("--qmp", f"unix:{tmp_path}/look,role=observer"),
        *("--jsonrpc", f"unix:{tmp_path}/rpc,role=observer"),
        *("--qmp", f"unix:{tmp_path}/irq,role=irq-hand"),
        *("--role", "irq-hand=irq-*,query-irqs"),
        *("--audit", str(tmp_path / "audit")),
    ]
    with own_server(tmp_path, arguments, name="vm1") as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()


def lines(server: OwnServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.path.parent / "audit").read_text().splitlines()]


@pytest.mark.parametrize(("name", "dialect"), [("look", "qmp"), ("rpc", "jsonrpc")])
def test_an_observer_looks_and_changes_nothing(server: OwnServer, name: str, dialect: str) -> None:
    """Every command that changes something is refused by the role's name; every other is not, by any dialect."""
    with Client.connect(server.path.parent / name, dialect=dialect) as client:
        listed = {one.name for one in client.query_commands()}
        for command, spec in COMMANDS.items():
            if command in ("qmp_capabilities", "human-monitor-command"):
                continue
            assert (command in listed) is not spec.mutates
            if spec.mutates:
                with pytest.raises(RemoteError, match=f"the role 'observer', which may not run {command}; it may run"):
                    client.execute(command, {"nonsense": 1})
        assert client.query_name().name == "vm1"
        # The human monitor is a way to run other commands, and no way around the role.
        assert "may not run device_del" in client.human_monitor_command(command_line="device_del x")
        assert "vm1" in client.human_monitor_command(command_line="info name")
        [mine] = [one for one in client.query_machine().sessions if one.dialect == dialect]
        assert mine.role == "observer"


def test_observers_leave_room_for_operators(server: OwnServer) -> None:
    """However many come."""
    observers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        while True:
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(120)
            one.connect(str(server.path.parent / ("look", "irq")[len(observers) % 2]))
            said = json.loads(one.recv(65536))
            if "QMP" not in said:
                break
            observers.append(one)
            assert len(observers) <= MAX_OTHER_SESSIONS
        assert f"There are {MAX_OTHER_SESSIONS} monitor sessions of roles like" in said["error"]["desc"]
        assert len(observers) == MAX_OTHER_SESSIONS
        with Client.connect(server.path) as client:
            assert client.query_name().name == "vm1"


def test_a_role_of_ones_own(server: OwnServer) -> None:
    """Patterns choose; what exists and is not allowed is told from what does not exist."""
    with Client.connect(server.path.parent / "irq") as client:
        assert client.query_irqs() == []
        with pytest.raises(RemoteError, match="Device 'x' not found"):
            client.irq_mask(device="x", index="intx")
        with pytest.raises(RemoteError, match="may not run query-name; it may run irq-eoi, "):
            client.query_name()
        with pytest.raises(RemoteError, match="The command nope has not been found"):
            client.execute("nope")


def test_the_audit_log(server: OwnServer) -> None:
    """What changes something is in it: who, what, with which end; refused ones too; looking is not; secrets are not."""
    with Client.connect(server.path) as client, Client.connect(server.path.parent / "look") as observer:
        client.query_name()
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="n0", mdev=uuid)
        client.region_write(device="n0", region="bar2", offset=0, data=b"x" * 3000)
        with pytest.raises(RemoteError):
            client.execute("device_add", {"driver": "vfio-pci", "host": "00:01.0", "vf-token": uuid})
        with pytest.raises(RemoteError):
            client.execute("device_del", {"id": 5})
        with pytest.raises(RemoteError):
            observer.execute("quit")
    found = lines(server)
    assert [(one["command"], one["ok"]) for one in found if one["command"] != "qmp_capabilities"] == [
        ("mdev-create", True),
        ("device_add", True),
        ("region-write", True),
        ("device_add", False),
        ("device_del", False),
        ("quit", False),
    ]
    assert all((one["uid"], one["pid"], one["dialect"]) == (os.getuid(), os.getpid(), "qmp") for one in found)
    by_name = {(one["command"], one["ok"]): one for one in found}
    assert by_name["device_add", True]["arguments"]["id"] == "n0"
    assert by_name["device_add", False]["arguments"]["vf-token"] == "(not shown)"
    assert uuid not in json.dumps(by_name["device_add", False])
    assert by_name["region-write", True]["arguments"]["data"].endswith("... (4000 characters)")
    assert (by_name["quit", False]["role"], by_name["device_add", True]["role"]) == ("observer", "operator")
    assert stat.S_IMODE((server.path.parent / "audit").stat().st_mode) == 0o600


def test_the_audit_log_of_lines_for_a_person(server: OwnServer) -> None:
    """By human-monitor-command nobody hides: the command that a line means is noted, with its end, and no secret."""
    token = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3"
    with Client.connect(server.path) as client, Client.connect(server.path.parent / "look") as observer:

        def say(line: str, by: Client = client) -> str:
            return by.human_monitor_command(command_line=line)

        uuid = say("mdev-create primer primer-pci").split()[-1]
        assert say(f"device_add vfio-pci,id=n0,mdev={uuid}") == ""
        assert "n0" in say("info devices")  # looks, and is not noted
        assert say("nope").startswith("Error: unknown command")  # nothing that could change anything
        assert say(f"device_add vfio-pci,host=00:01.0,vf-token={token}").startswith("Error: ")
        assert say(f"device_add vfio-pci,host=00:01.0,vf-token={token}x").startswith("Error: ")
        assert say("device_del nope") == "Error: Device 'nope' not found\n"
        assert say("irq-start n0 vectors=[1,").startswith("Error: ")
        assert "may not run quit" in say("quit", observer)
        assert say("device_del n0") == ""
        with pytest.raises(RemoteError) as refused:
            client.device_add(driver="vfio-pci", host="00:01.0", vf_token=f"{token}x")
        assert token not in str(refused.value)
    found = [one for one in lines(server) if one["command"] != "qmp_capabilities"]
    assert [(one["command"], one["ok"], one["role"]) for one in found] == [
        ("mdev-create", True, "operator"),
        ("device_add", True, "operator"),
        ("device_add", False, "operator"),
        ("device_add", False, "operator"),
        ("device_del", False, "operator"),
        ("irq-start", False, "operator"),
        ("quit", False, "observer"),
        ("device_del", True, "operator"),
        ("device_add", False, "operator"),
    ]
    assert found[1]["arguments"]["mdev"] == uuid
    assert found[2]["arguments"]["vf-token"] == "(not shown)"
    assert (found[4]["arguments"]["id"], found[4]["error"]) == ("nope", "Device 'nope' not found")
    assert "vf-token" in found[3]["error"] and "vf-token" in found[8]["error"]
    written = (server.path.parent / "audit").read_text()
    assert token not in written and "command-line" not in written
    assert token not in server.messages()


def test_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    """What cannot be written is said once; commands go on."""
    with own_server(tmp_path, ["--audit", "/dev/full"], name="vm1") as server, Client.connect(server.path) as client:
        for _ in range(3):
            client.mdev_create(parent="primer", type="primer-pci")
        assert server.messages().count("cannot be written: No space left on device") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--qmp", "unix:{0}/q,role=boss"], 1, "There is no role 'boss': there are operator, observer"),
        (["--qmp", "unix:{0}/q", "--role", "x=nope*"], 1, "'nope*' matches no command"),
        (["--qmp", "unix:{0}/q", "--role", "observer=quit"], 1, "'observer' is built in"),
        (["--qmp", "unix:{0}/q", "--role", "X=quit"], 2, "--role expects NAME=PATTERN"),
        (["--qmp", "unix:{0}/q", "--role", "x="], 2, "--role expects NAME=PATTERN"),
        (["--qmp", "unix:{0}/q", "--role", "x=quit", "--role", "x=quit"], 2, "'x' is given twice"),
        (["--qmp", "unix:{0}/q", "--audit", "{0}/no/where"], 1, "Cannot open the audit log"),
    ],
)
def test_what_cannot_begin(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    """Refused at start, by name, and no socket is left."""
    line = server_command(["--name", "x", *(one.format(tmp_path) for one in arguments)])
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert list(tmp_path.iterdir()) == []
