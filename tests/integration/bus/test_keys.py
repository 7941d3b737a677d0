"""The bus by TCP: who has the keys comes in, with the library and with the programs; nobody else does."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgpack
import pytest
import zmq
from tests.integration.terminal.screen import PROGRAM, Screen
from zmq import auth

from vfiod.client.bus import Bus, EventReader, Keys
from vfiod.client.errors import RequestTimedOut
from vfiod.client.program import main
from vfiod.client.serve import server_command
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client

PATIENCE = 120.0


class Locked(NamedTuple):
    """A server whose bus takes keys."""

    server: OwnServer
    calls: str
    events: str
    friend: Keys
    stranger: Keys
    misled: Keys
    """A client that is let in, and takes another's key for the server's."""

    @property
    def options(self) -> list[str]:
        return ["--key", str(self.friend.own), "--server-key", str(self.friend.server)]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    tmp_path.chmod(0o700)
    for name in ("clients", "strangers"):
        (tmp_path / name).mkdir()
    public, secret = auth.create_certificates(tmp_path, "server")
    os.chmod(secret, 0o600)
    _, own = auth.create_certificates(tmp_path / "clients", "friend")
    other_public, other = auth.create_certificates(tmp_path / "strangers", "stranger")
    arguments = ["--bus", "tcp:127.0.0.1:0", "--events", "tcp:127.0.0.1:0"]
    arguments += ["--bus-key", secret, "--bus-clients", str(tmp_path / "clients")]
    with own_server(tmp_path, arguments, name="vm1") as server:
        with Client.connect(server.path) as client:
            # Port 0 is a free one; which, the statistics tell.
            calls, events = [
                str(one.qom_path).removeprefix("/bus/")
                for one in client.query_stats(target="session")
                if str(one.qom_path).startswith("/bus/")
            ]
        yield Locked(
            server, calls, events, Keys(own=own, server=public), Keys(own=other, server=public),
            Keys(own=own, server=other_public),
        )  # fmt: skip
        assert "Traceback" not in server.messages(), server.messages()


def vfiod(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)], input=stdin, capture_output=True, text=True, check=False, timeout=2 * PATIENCE
    )


def test_who_has_the_keys_comes_in(locked: Locked) -> None:
    """And after strangers have tried, still."""
    for _ in range(2):
        with Bus(locked.calls, keys=locked.friend, timeout=PATIENCE) as bus:
            assert bus.query_name().name == "vm1"
        for keys in (locked.stranger, locked.misled):
            with Bus(locked.calls, keys=keys) as bus, pytest.raises(RequestTimedOut):
                bus.query_name(timeout=0.3)
        with zmq.Context() as context, context.socket(zmq.DEALER) as bare:
            bare.linger = 0
            bare.connect(locked.calls.replace(":", "://", 1))
            bare.send(msgpack.packb({"jsonrpc": "2.0", "method": "query-name", "id": 1}))
            assert not bare.poll(300)


def test_events_are_for_them_alone(locked: Locked) -> None:
    with (
        EventReader(locked.events, keys=locked.friend) as friend,
        EventReader(locked.events, keys=locked.stranger) as stranger,
        Client.connect(locked.server.path) as client,
    ):
        client.device_add(driver="vfio-pci", id="n0", mdev=client.mdev_create(parent="primer", type="primer-pci").uuid)
        while True:  # a subscription takes effect when it arrives
            client.device_reset(id="n0")
            try:
                assert friend.get_now(timeout=0.1).data.device == "n0"  # type: ignore[union-attr]
                break
            except RequestTimedOut:
                continue
        with pytest.raises(RequestTimedOut):
            stranger.get_now(timeout=0.1)


def test_the_programs_speak_it(locked: Locked, tmp_path: Path) -> None:
    """call, monitor and watch, in a pipe and at a terminal; events beside the answers."""
    done = vfiod("call", locked.calls, "query-name", "--compact", *locked.options)
    assert (done.returncode, done.stdout) == (0, '{"name": "vm1"}\n'), done.stderr
    done = vfiod("monitor", locked.calls, *locked.options, stdin="query-name\n")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"return": {"name": "vm1"}}), done.stderr
    done = vfiod("watch", "--once", locked.calls, *locked.options)
    assert done.returncode == 0 and re.match(r"vm1 +running", done.stdout), done.stderr
    words = [locked.calls, "--bus-events", locked.events, *locked.options]
    with (
        Screen("monitor", *words, home=tmp_path / "home", columns=160) as monitor,
        Screen("watch", "--interval", "0.2", *words, home=tmp_path / "home", columns=160) as watch,
        Client.connect(locked.server.path) as client,
    ):
        monitor.see("Connected to vm1")
        watch.see("vm1", "running")
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="n0", mdev=uuid)
        for screen in (monitor, watch):
            while "DEVICE_RESET" not in screen.text:  # a subscription takes effect when it arrives
                client.device_reset(id="n0")
                screen._feed()
        monitor.type("query-name\r")
        monitor.see('"vm1"')
        monitor.type("exit\r")
        assert monitor.end() == 0
        watch.see("Devices 1")
        watch.type("q")
        assert watch.end() == 0


def test_what_is_wrong_is_said(locked: Locked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, by each program."""
    (tmp_path / "empty.key").write_text("")
    key, server_key = locked.options[1], locked.options[3]
    for words, said in (
        ([], "needs keys"),
        (["--key", key], "--key and --server-key go together"),
        (["--key", server_key, "--server-key", server_key], "has no secret key"),
        (["--key", tmp_path / "none", "--server-key", server_key], "Cannot read the key file"),
        (["--key", key, "--server-key", tmp_path / "empty.key"], "Cannot read the key file"),
    ):
        for program in (["call", locked.calls, "query-name"], ["monitor", locked.calls], ["watch", locked.calls]):
            status, (out, err) = main([*program, *map(str, words)]), capsys.readouterr()
            assert (status, out) == (1, "")
            assert err.startswith(f"vfiod {program[0]}: ") and said in err and err.count("\n") == 1, err
    stranger = ["--key", str(locked.stranger.own), "--server-key", str(locked.stranger.server)]
    assert main(["call", "--timeout", "0.3", locked.calls, "query-name", *stranger]) == 1
    assert "did not answer query-name within 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bus", "tcp:127.0.0.1:1"], "needs --bus-key and --bus-clients"),
        (["--bus", "tcp:nowhere"], "expects ipc:PATH or tcp:HOST:PORT"),
        (["--bus", "udp:x"], "expects ipc:PATH or tcp:HOST:PORT"),
        (["--bus", "ipc:b", "--events", "ipc:b"], "is given twice"),
    ],
)
def test_a_server_that_is_told_nonsense(arguments: list[str], words: str) -> None:
    done = subprocess.run(server_command(["--name", "x", *arguments]), capture_output=True, text=True, check=False)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
