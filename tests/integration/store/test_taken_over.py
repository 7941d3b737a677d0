"""A server whose fds are kept is replaced while it runs: the new one goes on with the store, and may be killed, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.exports.hypervisor import eventfd, memfd

from vfiod.client.methods.values import VectorFds
from vfiod.protocol.catalogue.monitor import MachineRestored

from .test_crash import ACKNOWLEDGE, PATIENCE, RAISE, SCRATCH, Kept, MiB, add, get, put, rung, until


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, "--hand-over", f"unix:{tmp_path}/hand-over", "--allow-path", str(tmp_path))
    yield made
    made.close()


class Taker:
    """A server that takes the place of the running one."""

    def __init__(self, kept: Kept, name: str = "taker", path: str = "hand-over", *more: str) -> None:
        self.log_path = kept.place / name
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vfiod.server", "--take-over", f"unix:{kept.place}/{path}"),
                    *("--allow-path", str(kept.place), "--log-level", "info", *more),
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def log(self) -> str:
        return self.log_path.read_text()

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


def take_over(kept: Kept, name: str) -> Taker:
    """Take the place of the running one, and serve."""
    taker = Taker(kept, name)
    until(lambda: "Serving" in taker.log() or taker.process.poll() is not None)
    assert taker.process.poll() is None, taker.log()
    kept.dead.add(kept.pid)
    kept.pid = taker.process.pid  # its socket still names the process that has made it
    return taker


def held(kept: Kept) -> int:
    """fds of the keeper."""
    return len(os.listdir(f"/proc/{kept.keeper.pid}/fd"))


def kill(kept: Kept, taker: Taker) -> None:
    """kill -9 of the taker; the keeper starts another."""
    kept.dead.add(taker.process.pid)
    os.kill(taker.process.pid, signal.SIGKILL)
    taker.ended()
    kept.pid = kept.wait_new()


def test_the_new_one_is_kept_as_the_old_one_was(kept: Kept) -> None:
    counts = []
    with eventfd() as trigger, memfd(MiB) as memory:
        with kept.client() as client:
            add(client, "a")
            add(client, "gone")
            client.dma_map(iova=0, size=MiB, fd=memory)
            client.irq_start(device="a", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
        for turn in range(2):
            with kept.client() as client:
                put(client, "a", SCRATCH, turn)
                first = take_over(kept, f"first{turn}")
                # The same session, in the new process; and one more takes its place.
                assert get(client, "a", SCRATCH) == turn ^ 0xFFFF_FFFF
                second = take_over(kept, f"second{turn}")
                assert first.ended() == 0, first.log()
                if not turn:
                    add(client, "b")
                    with client.events("DEVICE_DELETED") as events:
                        client.device_del(id="gone")
                        events.get(PATIENCE)
                client.object_add(qom_type="memory-backend-fd", id=f"ram{turn}", fd=memory, size=MiB)
                assert "Traceback" not in first.log() + second.log()
            kill(kept, second)
            with kept.client() as client:
                machine = client.query_machine()
                assert machine.restored == MachineRestored(devices=["a", "b"], lost=[])
                assert [(one.iova, one.size) for one in machine.mappings] == [(0, MiB)]
                assert len(machine.objects) == turn + 1
                put(client, "a", RAISE, 1)
                assert rung(trigger) >= 1
                put(client, "a", ACKNOWLEDGE, 1)
                client.object_del(id=f"ram{turn}") if turn else None
            counts.append(held(kept))
    assert counts[0] == counts[1], "the keeper holds fds that nobody needs"


def test_the_end_of_the_new_one_is_the_end(kept: Kept) -> None:
    with kept.client() as client:
        add(client, "a")
        taker = take_over(kept, "taker")
        client.quit()
    assert taker.ended() == 0, taker.log()
    assert kept.keeper.wait(PATIENCE) == 0, kept.log()


def test_the_keeper_that_is_told_to_end_ends_the_new_one(kept: Kept) -> None:
    with kept.client() as client:
        add(client, "a")
    taker = take_over(kept, "taker")
    kept.keeper.terminate()
    assert taker.ended() == 0, taker.log()
    assert kept.keeper.wait(PATIENCE) == 0, kept.log()


def test_one_that_shall_not_keep_is_refused(kept: Kept) -> None:
    with kept.client() as client:
        add(client, "a")
        taker = Taker(kept, "taker", "hand-over", "--fd-store", "off")
        assert taker.ended() == 1
        assert "Its fds are kept in a store, which this server shall not have (--fd-store off)" in taker.log()
        put(client, "a", SCRATCH, 3)
        assert get(client, "a", SCRATCH) == 3 ^ 0xFFFF_FFFF


TAKER = """
import os, signal, socket, sys
from vfiod.protocol.fd import close_all
from vfiod.server.state.format import VERSION
from vfiod.server.takeover.conversation import PROTOCOL, Begin, Commit, Hello, Ready, Welcome, Whole
from vfiod.server.takeover.wire import Wire
path, last = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
wire = Wire(connection)

def after(step):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

after("connected")
wire.send(Hello(PROTOCOL, VERSION, "a test"))
welcome = wire.receive()
assert isinstance(welcome, Welcome), welcome
assert "store" in welcome.needs
after("welcomed")
wire.send(Begin())
whole = wire.receive()
assert isinstance(whole, Whole), whole
after("begun")
data, fds = wire.receive_whole(whole)
after("everything")
wire.send(Ready())
after("ready")
assert isinstance(wire.receive(), Commit)
after("committed")
"""


@pytest.mark.parametrize("step", ["connected", "welcomed", "begun", "everything", "ready", "committed"])
def test_a_taker_that_dies_leaves_one_owner_and_the_store_whole(kept: Kept, step: str) -> None:
    with kept.client() as client:
        add(client, "a")
        put(client, "a", SCRATCH, 7)
        before = kept.pid
        command = [sys.executable, "-c", TAKER, str(kept.place / "hand-over"), step]
        assert subprocess.run(command, timeout=PATIENCE).returncode == -signal.SIGKILL
        if step not in ("ready", "committed"):
            assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
            assert kept.wait_new() == before
    if step in ("ready", "committed"):
        # Nobody has said so, and the giver has left, or it has not been said to anybody alive: the keeper starts one.
        kept.dead.add(before)
        kept.pid = kept.wait_new()
        until(lambda: not Path(f"/proc/{before}").exists())
    with kept.client() as client:
        assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
        assert [one.id for one in client.query_devices()] == ["a"]
    taker = take_over(kept, "next")
    kill(kept, taker)
    with kept.client() as client:
        assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF


BETWEEN = """
import os, signal, socket, sys
from vfiod.server.takeover.conversation import Commit
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
        try:
            os.kill(giver_pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
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
assert isinstance(giver.receive(), Commit)
after("ready")
"""


@pytest.mark.parametrize("step", ["hello", "welcome", "begin", "half", "whole", "made", "ready"])
def test_a_giver_that_dies_is_followed_by_one_from_the_store_and_the_taker_ends(kept: Kept, step: str) -> None:
    """Until ``Commit`` has arrived, the keeper alone decides who is next. In between is the process it is told of."""
    with kept.client() as client:
        add(client, "a")
        put(client, "a", SCRATCH, 7)
    giver, path = kept.pid, kept.place / "between"
    command = [sys.executable, "-c", BETWEEN, str(kept.place / "hand-over"), str(path), str(giver), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as between:
        assert between.stdout is not None
        assert between.stdout.readline() == b"listening\n"
        taker = Taker(kept, path="between")
        assert taker.ended() == 1, taker.log()
    kept.dead.add(giver)
    kept.pid = kept.wait_new()
    with kept.client() as client:
        assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
        assert client.query_machine().restored == MachineRestored(devices=["a"], lost=[])
