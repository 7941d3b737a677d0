"""Either end dies at each step of a hand-over: afterwards exactly one owns everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vfiod.protocol.fd import close_all
from vfiod.server.state.format import VERSION
from vfiod.server.takeover.conversation import PROTOCOL, Begin, Commit, Hello, Ready, Refuse, Welcome, Whole
from vfiod.server.takeover.wire import Wire

from .conftest import PATIENCE, House, until
from .test_replaced import get, primer, put

STEPS = ("connected", "welcomed", "begun", "told how much", "everything", "committed")
"""After what a taker dies."""


NEEDS = ["backend:mdev", "device:vfio-pci", "mdev:primer/primer-pci"]


def take(path: Path, until_step: str, needs: list[str] = NEEDS) -> None:
    """Take over up to a step, and hang up there, as a process that was killed does."""
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        wire = Wire(connection)
        whole = Whole(0, 0)
        for step in STEPS:
            match step:
                case "welcomed":
                    wire.send(Hello(PROTOCOL, VERSION, "a test"))
                    welcome = wire.receive()
                    assert isinstance(welcome, Welcome)
                    assert welcome.needs == needs
                case "begun":
                    wire.send(Begin())
                case "told how much":
                    told = wire.receive()
                    assert isinstance(told, Whole)
                    whole = told
                case "everything":
                    data, fds = wire.receive_whole(whole)
                    assert len(data) == whole.size
                    close_all(fds)
                case "committed":
                    wire.send(Ready())
                    assert isinstance(wire.receive(), Commit)
            if step == until_step:
                return


@pytest.mark.parametrize("step", STEPS)
def test_a_taker_that_dies_leaves_everything_where_it_was(house: House, step: str) -> None:
    server = house.first()
    with house.connect() as client:
        primer(client)
        put(client, 0x04, 7)
        take(house.hand, step)
        # The loop goes on where it stood; what was said meanwhile is answered.
        assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF
        assert server.process.poll() is None
        # And the next one may take over.
        house.next()
        assert server.ended() == 0
        assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF


def test_one_that_refuses_at_the_end_leaves_everything_where_it_was(house: House) -> None:
    import socket

    server = house.first()
    with house.connect() as client, socket.socket(socket.AF_UNIX) as connection:
        primer(client)
        connection.settimeout(PATIENCE)
        connection.connect(str(house.hand))
        wire = Wire(connection)
        wire.send(Hello(PROTOCOL, VERSION, "a test"))
        wire.receive()
        wire.send(Begin())
        whole = wire.receive()
        assert isinstance(whole, Whole)
        close_all(wire.receive_whole(whole)[1])
        wire.send(Refuse("it is a test"))
        assert get(client, 0x00) == 0xF10D_0001
        assert server.process.poll() is None
        until(lambda: "The new process refuses: it is a test" in server.log())


@pytest.mark.parametrize(("protocol", "state"), [(PROTOCOL + 1, VERSION), (PROTOCOL, VERSION + 1)])
def test_another_version_is_refused_before_anything_moves(house: House, protocol: int, state: int) -> None:
    import socket

    server = house.first()
    with house.connect() as client, socket.socket(socket.AF_UNIX) as connection:
        primer(client)
        connection.settimeout(PATIENCE)
        connection.connect(str(house.hand))
        wire = Wire(connection)
        wire.send(Hello(protocol, state, "9.9.9"))
        answer = wire.receive()
        assert isinstance(answer, Refuse)
        assert f"vfiod 9.9.9 takes over by protocol {protocol} and reads state {state}" in answer.reason
        assert get(client, 0x00) == 0xF10D_0001
        assert server.process.poll() is None


# Stands between the two: passes everything on, and dies with the giver after so many steps.
BETWEEN = """
import os, signal, socket, sys
from vfiod.server.takeover.conversation import Commit, Ready, Whole
from vfiod.server.takeover.wire import Wire
giver_path, taker_path, giver_pid, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
listening = socket.socket(socket.AF_UNIX)
listening.bind(taker_path)
listening.listen(1)
print("listening", flush=True)
taker_socket = listening.accept()[0]
giver_socket = socket.socket(socket.AF_UNIX)
giver_socket.connect(giver_path)
taker, giver = Wire(taker_socket), Wire(giver_socket)

def after(step):
    if step == last:
        os.kill(giver_pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

giver.send(taker.receive())
after("hello")
taker.send(giver.receive())
after("welcome")
giver.send(taker.receive())
after("begin")
whole = giver.receive()
taker.send(whole)
data, fds = giver.receive_whole(whole)
after("half")
taker.send_whole(data, [fd.number for fd in fds])
after("whole")
ready = taker.receive()
after("made")
giver.send(ready)
commit = giver.receive()
assert isinstance(commit, Commit)
after("ready")
taker.send(commit)
after("commit")
"""


@pytest.mark.parametrize("step", ["hello", "welcome", "begin", "half", "whole", "made", "ready", "commit"])
def test_a_giver_that_dies_before_all_was_given_takes_it_along_and_after_that_it_is_the_takers(
    house: House, step: str
) -> None:
    server = house.first()
    path = house.directory / "between"
    with house.connect() as client:
        primer(client)
        put(client, 0x04, 7)
        command = [sys.executable, "-c", BETWEEN, str(house.hand), str(path), str(server.process.pid), step]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as between:
            assert between.stdout is not None
            assert between.stdout.readline() == b"listening\n"
            second = house.start("--take-over", f"unix:{path}", "--allow-path", str(house.directory))
            assert server.ended() == -9
        if step in ("whole", "made", "ready", "commit"):
            assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF
            assert second.process.poll() is None
        else:
            assert second.ended() == 1
            assert "The running server" in second.log() or "broke off" in second.log()
