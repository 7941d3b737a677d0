"""The keeper, and programs in vfiod's place that say to it what sd_notify(3) says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PATIENCE = 120.0

STAND_IN = """
import json, os, signal, socket, sys
from pathlib import Path
{imports}

place = Path(sys.argv[1])
turn = len(list(place.glob("turn-*")))
(place / f"turn-{{turn}}").touch()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
count = int(os.environ.get("LISTEN_FDS", "0"))
names = os.environ.get("LISTEN_FDNAMES", "").split(":")[:count]
mine = os.environ.get("LISTEN_PID") == str(os.getpid()) or not count

def say(text, *fds):
    socket.send_fds(notify, [text.encode()], fds)

def done():
    reading, writing = os.pipe()
    say("BARRIER=1", writing)
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)

def read(name):
    return os.pread(3 + names.index(name), 100, 0).decode()

def memory(text):
    fd = os.memfd_create("m")
    os.pwrite(fd, text.encode(), 0)
    return fd

{body}
"""

KEEPER = """
import sys
from vfiod.client import keeper
keeper.server_command = lambda arguments: [sys.executable, sys.argv[1], *arguments]
sys.exit(keeper.main(sys.argv[2:]))
"""


def keep(place: Path, body: str, *options: str, **more: object) -> subprocess.Popen[str]:
    program = place / "stand_in.py"
    program.write_text(STAND_IN.format(imports="", body=textwrap.dedent(body)))
    command = [sys.executable, "-c", KEEPER, str(program), *options, "--", str(place)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload, no-any-return]


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_what_was_stored_comes_back_after_a_kill_and_what_was_removed_does_not(tmp_path: Path) -> None:
    status, out, err = end(
        keep(
            tmp_path,
            """
            if turn == 0:
                assert not count and int(os.environ["FDSTORE"]) > 1000
                say("READY=1\\nSTATUS=Serving")
                say("FDSTORE=1\\nFDPOLL=0\\nFDNAME=vfiod-a", memory("one"))
                say("FDSTORE=1\\nFDNAME=vfiod-b", memory("two"), memory("three"))
                say("FDSTORE=1\\nFDNAME=bad:name", memory("no"))
                say("FDSTORE=1\\nFDNAME=vfiod-c", memory("four"))
                say("FDSTOREREMOVE=1\\nFDNAME=vfiod-a")
                os.kill(os.getpid(), signal.SIGKILL)  # the last words are in the queue
            assert mine, "LISTEN_PID is ours"
            assert names == ["vfiod-b", "vfiod-b", "vfiod-c"], names
            assert [os.pread(3 + n, 9, 0) for n in range(3)] == [b"two", b"three", b"four"]
            if turn == 1:
                done()
                say("READY=1\\nFDSTOREREMOVE=1\\nFDNAME=vfiod-b")
                say("FDSTORE=1\\nFDNAME=vfiod-b", memory("two"), memory("three"))
                say("FDSTOREREMOVE=1\\nFDNAME=vfiod-c")
                say("FDSTORE=1\\nFDNAME=vfiod-c", memory("four"))
                sys.exit(9)
            print("here again")
            """,
        )
    )
    assert (status, out) == (0, "here again\n"), err
    assert err.splitlines() == [
        "vfiod keeper: an fd called 'bad:name' is not kept: a name has 1 to 255 printable characters, and no colon",
        "vfiod keeper: vfiod was killed by signal 9: starting it again with 3 fds",
        "vfiod keeper: vfiod ended with status 9: starting it again with 3 fds",
    ]


def test_one_that_cannot_begin_is_not_started_again(tmp_path: Path) -> None:
    assert end(keep(tmp_path, "sys.exit('vfiod: no')")) == (1, "", "vfiod: no\n")
    assert len(list(tmp_path.glob("turn-*"))) == 1


def test_one_that_dies_too_often_is_given_up(tmp_path: Path) -> None:
    status, _, err = end(keep(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", "--restarts", "2"))
    assert status == 128 + 11
    assert err.splitlines()[-1].endswith("the last of 3 times within 60 s: its devices are let go")
    assert len(list(tmp_path.glob("turn-*"))) == 3


def test_being_told_to_end_it_ends_vfiod_and_waits(tmp_path: Path) -> None:
    process = keep(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: (print("ending", flush=True), sys.exit(3)))
        say("READY=1")
        print("ready", flush=True)
        signal.pause()
        """,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    assert end(process) == (3, "ending\n", "")


def test_others_are_not_heard_and_readiness_is_passed_on(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer:
        outer.bind(str(tmp_path / "outer"))
        status, out, err = end(
            keep(
                tmp_path,
                """
                if turn == 0:
                    if not os.fork():
                        say("FDSTORE=1\\nFDNAME=theirs", memory("no"))
                        os._exit(0)
                    os.wait()
                    say("READY=1\\nSTATUS=Serving\\nFDSTORE=1\\nFDNAME=ours", memory("yes"))
                    os.kill(os.getpid(), signal.SIGKILL)
                print(names)
                """,
                env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "outer")},
            )
        )
        assert (status, out) == (0, "['ours']\n"), err
        assert outer.recv(4096) == b"READY=1\nSTATUS=Serving"


def test_who_wanted_to_take_over_is_gone_before_another_begins(tmp_path: Path) -> None:
    status, out, err = end(
        keep(
            tmp_path,
            """
            if turn == 0:
                reading, writing = os.pipe()
                taker = os.fork()
                if not taker:
                    signal.pause()
                say(f"READY=1\\nX_VFIOD_TAKER={taker}")
                say("X_VFIOD_TAKER=none\\nFDSTORE=1\\nFDNAME=writing", writing)
                done()
                (place / "taker").write_text(str(taker))
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                # A child of ours that was left behind: it may be waited for by others yet, and runs no more.
                state = Path("/proc", (place / "taker").read_text(), "stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                state = "X"
            assert state in "ZX", state
            """,
        )
    )
    assert (status, out) == (0, ""), err
    assert "process none cannot be watched" in err


def test_who_took_over_is_looked_after_and_heard(tmp_path: Path) -> None:
    status, out, err = end(
        keep(
            tmp_path,
            """
            if turn == 0:
                say("READY=1\\nFDSTORE=1\\nFDNAME=vfiod-a", memory("one"))
                reading, writing = os.pipe()
                taker = os.fork()
                if not taker:
                    os.close(writing)
                    os.read(reading, 1)  # our parent is gone, and was told nothing but who we are
                    say("FDSTORE=1\\nFDNAME=vfiod-b", memory("two"))
                    os.kill(os.getpid(), signal.SIGKILL)
                say(f"MAINPID={taker}")
                done()
                say("FDSTORE=1\\nFDNAME=vfiod-c", memory("it is another's"))
                sys.exit(0)
            assert names == ["vfiod-a", "vfiod-b"], names
            assert [read(name) for name in names] == ["one", "two"]
            """,
        )
    )
    assert (status, out) == (0, ""), err
    assert "vfiod that had taken the place of ours is dead: starting it again with 2 fds" in err


def test_told_to_end_while_one_takes_over_it_ends_that_one(tmp_path: Path) -> None:
    process = keep(
        tmp_path,
        """
        reading, writing = os.pipe()
        taker = os.fork()
        if not taker:
            signal.signal(signal.SIGTERM, lambda *_: (print("the new one ends", flush=True), os._exit(0)))
            os.write(writing, b"+")
            while True:
                signal.pause()
        os.read(reading, 1)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        say("READY=1")
        print("ready", flush=True)
        signal.sigwait([signal.SIGTERM])
        say(f"MAINPID={taker}")
        done()
        """,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    assert end(process) == (0, "the new one ends\n", "")


def test_inherited_sockets_stay_where_they_are(tmp_path: Path) -> None:
    program = tmp_path / "stand_in.py"
    body = """
        assert os.pread(3, 9, 0) == b"socket", "as --qmp fd=3 says"
        if turn == 0:
            say("READY=1")
            say("FDSTORE=1\\nFDNAME=vfiod-a", memory("one"))
            os.kill(os.getpid(), signal.SIGKILL)
        print(names, read("vfiod-a"))
    """
    program.write_text(STAND_IN.format(imports="", body=textwrap.dedent(body)))
    start = f"""
        import os, sys
        fd = os.memfd_create("socket")
        os.pwrite(fd, b"socket", 0)
        os.dup2(fd, 3) if fd != 3 else os.set_inheritable(3, True)
        os.execv(sys.executable, [sys.executable, "-c", {KEEPER!r}, {str(program)!r}, "--", {str(tmp_path)!r},
                                  "--qmp", "fd=3"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, "['inherited', 'vfiod-a'] one\n"), done.stderr


@pytest.mark.parametrize("arguments", [[], ["--"], ["--restarts", "3"]])
def test_what_it_wants_is_said(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vfiod.client.program", "keeper", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "put '--' and the options of 'vfiod serve' at the end" in done.stderr
