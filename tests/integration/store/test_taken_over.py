"""A server whose fds are kept is replaced while it runs: the new one goes on with the store, and may be killed, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import UNSET
from tests.integration.exports.hypervisor import eventfd, memfd

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.monitor import MachineRestored

from .test_crash import ACKNOWLEDGE, PATIENCE, RAISE, SCRATCH, Kept, MiB, add, get, put, rung, until


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = keep(tmp_path)
    yield made
    made.close()


def keep(place: Path) -> Kept:
    return Kept(place, "--hand-over", f"unix:{place}/hand-over", "--allow-path", str(place))


SERVER = ("-m", "vfiod.server")


class Taker:
    """A server that takes the place of the running one."""

    def __init__(self, kept: Kept, name: str = "taker", *more: str, run: tuple[str, ...] = SERVER) -> None:
        self.log_path = kept.place / name
        options = ("--take-over", f"unix:{kept.place}/hand-over", "--allow-path", str(kept.place))
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *run, *options, "--log-level", "info", *more], stdin=subprocess.DEVNULL, stderr=log
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


def put_for_good(client: Client, id: str, register: int, value: int) -> None:
    """Write a register, and have that in the store: a small step follows soon after, and with any greater one."""
    put(client, id, register, value)
    with memfd(MiB) as memory:
        client.dma_map(iova=0, size=MiB, fd=memory)
        client.dma_unmap(iova=0, size=MiB)


def kill(kept: Kept, taker: Taker) -> None:
    """kill -9 of the taker; the keeper starts another."""
    kept.dead.add(taker.process.pid)
    os.kill(taker.process.pid, signal.SIGKILL)
    taker.ended()
    kept.pid = kept.wait_new()


def test_the_new_one_is_kept_as_the_old_one_was(kept: Kept) -> None:
    first_turn = 0
    with eventfd() as trigger, memfd(MiB) as memory:
        with kept.client() as client:
            add(client, "a")
            add(client, "gone")
            client.dma_map(iova=0, size=MiB, fd=memory)
            client.irq_start(device="a", index="msi", eventfds=[VectorFds(vector=0, trigger=trigger)])
        for turn in range(3):
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
                assert len(machine.objects) == (2 if turn else 1)
                put(client, "a", RAISE, 1)
                assert rung(trigger) >= 1
                put(client, "a", ACKNOWLEDGE, 1)
                client.object_del(id=f"ram{turn}") if turn else None
            if not turn:
                first_turn = held(kept)
            # What it is told to let go may be in its queue yet; fds that nobody needs would stay.
            until(lambda: held(kept) <= first_turn)  # noqa: B023 - of the first turn, in each


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
        taker = Taker(kept, "taker", "--fd-store", "off")
        assert taker.ended() == 1
        assert "Its fds are kept in a store, which this server shall not have (--fd-store off)" in taker.log()
        put(client, "a", SCRATCH, 3)
        assert get(client, "a", SCRATCH) == 3 ^ 0xFFFF_FFFF


def test_in_the_background_who_started_it_is_told_how_it_began(kept: Kept) -> None:
    with kept.client() as client:
        add(client, "a")
        put(client, "a", SCRATCH, 7)
        refused = Taker(kept, "refused", "--daemonize", "--fd-store", "off")
        assert refused.ended() == 1
        assert "--fd-store off" in refused.log()
        before = kept.pid
        for turn in range(2):
            taker = Taker(kept, f"taker{turn}", "--daemonize")
            assert taker.ended() == 0, taker.log()
            assert "Serving" in taker.log()
            assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
        until(lambda: not Path(f"/proc/{before}").exists())
        client.quit()
    assert kept.keeper.wait(PATIENCE) == 0, kept.log()


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


# The real one, after whose step the giver (0: itself) dies; then it goes on, or stands still.
WITNESS = """
import contextlib, os, signal, sys
from vfiod.server.program import main
from vfiod.server.takeover import wire

giver, last, then = int(sys.argv[1]), sys.argv[2], sys.argv[3]
send, receive, receive_whole = wire.Wire.send, wire.Wire.receive, wire.Wire.receive_whole

def after(step):
    if step == last:
        with contextlib.suppress(ProcessLookupError):
            os.kill(giver or os.getpid(), signal.SIGKILL)
        if then == "stands still":
            os.kill(os.getpid(), signal.SIGSTOP)

def sent(self, message):
    name = type(message).__name__
    after(f"before {name}")
    send(self, message)
    after(name)

def received(self):
    message = receive(self)
    after(type(message).__name__)
    return message

def received_whole(self, whole):
    all_of_it = receive_whole(self, whole)
    after("everything")
    return all_of_it

wire.Wire.send, wire.Wire.receive, wire.Wire.receive_whole = sent, received, received_whole
sys.exit(main(sys.argv[4:]))
"""

UNCONFINED = ("--sandbox", "off")
"""The sandbox lets a server signal nobody."""

NOT_KNOWN = ["before Hello", "Hello", "Welcome", "Begin"]
"""Until then nothing may have been given to the taker, and the keeper may not know it."""

GIVEN = ["Whole", "everything", "before Ready"]
"""It may have everything, and owns nothing."""

SAID = ["Ready", "Commit"]
"""It may be the owner."""


def standing(process: int) -> bool:
    """Whether it was stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("step", [*NOT_KNOWN, *GIVEN, *SAID])
def test_a_giver_that_dies_leaves_one_owner(kept: Kept, step: str) -> None:
    """Until ``Commit`` has arrived, the keeper alone decides who is next; the taker is gone before that begins."""
    with kept.client() as client:
        add(client, "a")
        put_for_good(client, "a", SCRATCH, 7)
    giver = kept.pid
    kept.dead.add(giver)
    taker = Taker(kept, "taker", *UNCONFINED, run=("-c", WITNESS, str(giver), step, "goes on"))
    until(lambda: taker.process.poll() is not None or "Serving" in taker.log())
    taken = taker.process.poll() is None
    if taken:
        assert step in SAID, taker.log()
    else:
        # Ended by itself, as there is nobody who gives, or by the keeper.
        assert taker.ended() in (1, -signal.SIGKILL), taker.log()
        kept.pid = kept.wait_new()
    with kept.client() as client:
        assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
        assert client.query_machine().restored == (UNSET if taken else MachineRestored(devices=["a"], lost=[]))
        if taken:
            client.quit()
    if taken:
        assert taker.ended() == 0, taker.log()
        assert kept.keeper.wait(PATIENCE) == 0, kept.log()


@pytest.mark.parametrize("step", [*GIVEN, *SAID])
def test_a_giver_that_dies_is_followed_though_the_taker_stands_still(kept: Kept, step: str) -> None:
    with kept.client() as client:
        add(client, "a")
        put_for_good(client, "a", SCRATCH, 7)
    giver = kept.pid
    kept.dead.add(giver)
    taker = Taker(kept, "taker", *UNCONFINED, run=("-c", WITNESS, str(giver), step, "stands still"))
    try:
        if step in SAID:
            # It may be the server by now, and one that stands still is not told from one that has a long pause.
            until(lambda: taker.process.poll() is not None or standing(taker.process.pid))
            taker.process.kill()
        assert taker.ended() == -signal.SIGKILL, taker.log()
        kept.pid = kept.wait_new()
        with kept.client() as client:
            assert get(client, "a", SCRATCH) == 7 ^ 0xFFFF_FFFF
            assert client.query_machine().restored == MachineRestored(devices=["a"], lost=[])
    finally:
        taker.process.kill()
        taker.ended()


def test_without_its_keeper_nothing_is_given(tmp_path: Path) -> None:
    kept = keep(tmp_path)
    with kept.client() as client:
        add(client, "a")
        kept.keeper.kill()
        kept.keeper.wait(PATIENCE)
        taker = Taker(kept)
        assert taker.ended() == 1
        assert "The running server refuses" in taker.log() or "keeps everything" in taker.log()
        put(client, "a", SCRATCH, 3)
        assert get(client, "a", SCRATCH) == 3 ^ 0xFFFF_FFFF
        client.quit()
    until(lambda: not kept.path.exists())
    kept.forget()
