"""Ctrl-C at a real terminal, in each program, at a moment that counts; narrow terminals; and pipes that end early."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiod.client import Client
from vfiod.client.spawn import OwnServer

from .screen import PATIENCE, PROGRAM, Screen

Terminal = Callable[..., Screen]

HYPERVISOR = """
import os, signal, sys
from vfiod.client.spawn import own_directory

reading, writing = os.pipe()
count = 0
# What a hypervisor does with Ctrl-C, step by step: it says so, and the last one ends it.
signal.signal(signal.SIGINT, lambda *_: os.write(writing, b"i"))
with own_directory("hypervisor-"):
    print("at work", os.path.exists(sys.argv[1]), flush=True)
    for number in range(int(sys.argv[2])):
        os.read(reading, 1)
        print("interrupt", number + 1, flush=True)
os.set_blocking(reading, False)
try:
    print("more than one for each" if os.read(reading, 1) else "", flush=True)
except BlockingIOError:
    pass
sys.exit(9)
"""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `vfiod run` and its hypervisor make their directories; empty at the end."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vc-") as name:
        yield Path(name)
        assert [one.name for one in Path(name).iterdir()] == [], "it leaves nothing"


def running(terminal: Terminal, place: Path, *words: object, **more: int) -> Screen:
    return terminal(
        "run", "--mdev", "primer-pci", "--", sys.executable, "-c", HYPERVISOR, "{export}", *words,
        environment={"TMPDIR": str(place)}, **more,
    )  # fmt: skip


@pytest.fixture
def opened(home: Path) -> Iterator[Terminal]:
    """Opens terminals where there is no server to begin with, and closes them."""
    screens: list[Screen] = []

    def make(*words: object, **more: object) -> Screen:
        screens.append(Screen(*words, home=home, **more))  # type: ignore[arg-type]
        return screens[-1]

    yield make
    for screen in screens:
        screen.child.close(force=True)


def test_run_the_hypervisor_has_it_and_everything_is_given_back(opened: Terminal, place: Path) -> None:
    """Each Ctrl-C reaches it once, as if there were no vfiod between; its status is ours, after all is given back."""
    screen = running(opened, place, 2)
    screen.see("at work True")
    screen.child.sendintr()
    screen.see("interrupt 1")
    screen.child.sendintr()
    assert screen.end() == 9
    assert "interrupt 2" in screen.text and "more than one" not in screen.text
    assert "removing it" in screen.text and "Traceback" not in screen.text


def test_run_before_the_hypervisor_is_there(opened: Terminal, place: Path) -> None:
    """While vfiod starts and devices are made: it ends, whatever it was at. The fixture sees that nothing is left."""
    screen = running(opened, place, 1)
    screen.see("starting vfiod")
    screen.child.sendintr()
    # Where the hypervisor was there already, it has had it and ends with its own status.
    assert screen.end() in (130, 9)
    assert "Traceback" not in screen.text


def test_run_on_twenty_columns(opened: Terminal, place: Path) -> None:
    screen = running(opened, place, 1, columns=20, lines=10)
    screen.see("at work True")
    screen.child.sendintr()
    assert screen.end() == 9
    assert "Traceback" not in screen.text


def test_monitor(terminal: Terminal, server: OwnServer, device: str) -> None:
    """It cancels the line; on an empty line it asks once more; the server is as it was."""
    screen = terminal("monitor", server.path)
    screen.see("(vm1)")
    screen.type("device-reset id=" + device)
    screen.see("device-reset")
    screen.child.sendintr()
    screen.child.sendintr()
    screen.child.sendintr()
    assert screen.end() == 0
    assert "Traceback" not in screen.text and server.process.poll() is None


def test_monitor_on_twenty_columns(terminal: Terminal, server: OwnServer, device: str) -> None:
    screen = terminal("monitor", server.path, columns=20, lines=12)
    screen.see("vm1")
    screen.type("query-name\r")
    screen.see('"vm1"')
    screen.type("query-devices\r")
    screen.see("held-by")  # no table fits: the reply as it is, of which we see the end
    screen.type("\x04")
    assert screen.end() == 0
    assert "Traceback" not in screen.text


@pytest.mark.parametrize("words", [["call", "{path}", "query-name"], ["watch", "{path}"], ["monitor", "{path}"]])
def test_a_server_that_says_nothing(opened: Terminal, tmp_path: Path, words: list[str]) -> None:
    """They wait for its greeting, and Ctrl-C ends that."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent")
        silent.listen()
        silent.settimeout(PATIENCE)
        screen = opened(*(word.replace("{path}", f"{tmp_path}/silent") for word in words))
        connected, _ = silent.accept()
        with connected:
            screen.child.sendintr()
            assert screen.end() in (0, 130)
    assert "Traceback" not in screen.text


def test_demo(opened: Terminal, place: Path) -> None:
    screen = opened("demo", environment={"TMPDIR": str(place)})
    screen.see("1. ")
    screen.child.sendintr()
    assert screen.end() == 130
    assert "Traceback" not in screen.text


def test_call_that_waits(terminal: Terminal, server: OwnServer, device: str) -> None:
    """A command goes on in the server; who waits for it may leave."""
    with Client.connect(server.path, timeout=120) as client:
        client.device_export_add(id="e0", type="vfio-user", device=device, path=f"{server.path.parent}/e0.sock")
    screen = terminal("call", server.path, "query-name", "--run", "sleep 1000")
    while not re.search(rb"sleep", b"".join(_commands_of(screen.child.pid))):
        screen._feed()
    screen.child.sendintr()
    assert screen.end() == 130
    assert "Traceback" not in screen.text


def _commands_of(pid: int) -> list[bytes]:
    """The command lines of a process's children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    except OSError:
        return []


@pytest.mark.parametrize("words", [["host", "list", "--all"], ["monitor", "{path}"], ["watch", "--once", "{path}"]])
def test_a_reader_that_has_gone(server: OwnServer, device: str, words: list[str]) -> None:
    """`vfiod ... | true`: the end of the pipe is the end of the program, with no complaint. (1 is how rich ends it.)"""
    reading, writing = os.pipe()
    os.close(reading)
    command = [word.replace("{path}", str(server.path)) for word in words]
    done = subprocess.run(
        [*PROGRAM, *command], input="query-devices\n" * 3, text=True, stdout=writing, stderr=subprocess.PIPE,
        check=False, timeout=240,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode in (1, 128 + signal.SIGPIPE), done.stderr) == (True, "")
