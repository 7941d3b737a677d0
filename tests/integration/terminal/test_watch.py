"""`vfiod watch` at a terminal, seen on its screen; and in a pipe."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiod.client import Client
from vfiod.client.spawn import OwnServer, own_server

from .screen import PROGRAM, Screen

Terminal = Callable[..., Screen]
Picture = Callable[..., None]


@pytest.fixture
def busy(server: OwnServer, device: str) -> Iterator[str]:
    """A device whose first two MSI vectors fire until the test is over; memory; an export."""
    done = threading.Event()
    with Client.connect(server.path, timeout=60) as client:
        memory = os.memfd_create("ram")
        os.ftruncate(memory, 1 << 20)
        client.object_add(qom_type="memory-backend-fd", id="ram", fd=memory, size=1 << 20)
        client.dma_map(iova=0x10000, size=1 << 20, memory_backend="ram")
        os.close(memory)
        client.device_export_add(id="e0", type="vfio-user", device=device, path=f"{server.path.parent}/e0.sock")
        client.irq_start(device=device, index="msi", vectors=[0, 1], mode="relayed").close()

    def ring() -> None:
        with Client.connect(server.path, timeout=60) as client:
            while not done.wait(0.03):
                client.irq_trigger(device=device, index="msi", vector=0)

    ringer = threading.Thread(target=ring)
    ringer.start()
    yield device
    done.set()
    ringer.join()


def test_everything_moves(server: OwnServer, busy: str, terminal: Terminal, picture: Picture) -> None:
    watch = terminal("watch", "--interval", "0.2", server.path, columns=110, lines=32)
    watch.see("vm1", "Devices 1", "Interrupts 2", "nic0 msi", "DMA maps 1", "0x10000", "Exports 1", "listening")
    bars = re.compile(r"nic0 msi +0 +relayed +[1-9][0-9.]* +[▁▂▃▄▅▆▇█ ]*[▁▂▃▄▅▆▇█]{4}")
    watch.until(lambda text: bars.search(text) is not None, "a sparkline")
    with Client.connect(server.path, timeout=60) as client:
        client.device_reset(id=busy, force=True)
    watch.see("Events", "DEVICE_RESET")
    picture(watch, "watch", "vfiod watch vm1.sock", ("Devices", "Interrupts", "nic0", "listening", "DEVICE_RESET"))
    watch.type("t")
    watch.see("Topology")
    watch.until(lambda text: "asking" not in text and "nic0" in text, "the tree")
    picture(watch, "watch-topology", "vfiod watch: t", ("Topology", "nic0"))
    watch.type("?")
    watch.see("reset the peaks")
    watch.type("?p")
    watch.see("PAUSED")
    watch.type("pr\t\t\t\t\t")
    watch.until(lambda text: "PAUSED" not in text, "that it goes on")
    watch.type("z")
    watch.until(lambda text: "Exports" not in text, "one part alone")
    watch.type("q")
    assert watch.end() == 0
    assert b"\x1b[?1049h" in watch.raw and b"\x1b[?1049l" in watch.raw, "what was on the screen before comes back"
    assert b"\x1b[2J" not in watch.raw.partition(b"\x1b[?1049h")[2].partition(b"\x1b[H")[2], "it is never wiped"


def test_twenty_columns(server: OwnServer, device: str, terminal: Terminal) -> None:
    watch = terminal("watch", "--interval", "0.2", server.path, columns=20, lines=8)
    watch.see("vm1", "Interrupts")
    watch.type("\x1b[D")
    watch.see("Devices 1", "nic0")
    watch.child.setwinsize(24, 80)
    watch.screen.resize(24, 80)
    watch.see("Devices 1", "Exports 0", "tab part")
    watch.child.sendintr()
    assert watch.end() == 0


def test_it_comes_back(tmp_path: Path, home: Path) -> None:
    with own_server(tmp_path, name="one"):
        watch = Screen("watch", "--interval", "0.2", tmp_path / "qmp.sock", home=home)
        watch.see("one", "running")
    with watch:
        watch.see("trying again")
        with own_server(tmp_path, name="two"):
            watch.see("two", "running")
            watch.until(lambda text: "trying again" not in text, "that all is well")
            watch.type("q")
            assert watch.end() == 0


def test_all_of_a_directory(tmp_path: Path, home: Path, picture: Picture) -> None:
    """They come and go; what is no server's is shown as that; what is not called so is left in peace."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with socket.socket(socket.AF_UNIX) as export, own_server(tmp_path / "a", name="vm1"):
        export.bind(str(tmp_path / "a" / "e0.sock"))
        export.listen()
        export.setblocking(False)
        with Screen("watch", "--interval", "0.2", "--all", tmp_path, home=home, columns=90, lines=30) as watch:
            watch.see("vm1", "running")
            with own_server(tmp_path / "b", name="vm2"):
                watch.see("VMs 2", "> vm1", "vm2")
                watch.type("n")
                watch.see("> vm2")
                picture(watch, "watch-all", "vfiod watch --all /run/vfiod", ("VMs", "vm1", "vm2", "Devices"))
            watch.see("lost")
            watch.type("q")
            assert watch.end() == 0
        with pytest.raises(BlockingIOError):
            export.accept()


def test_a_pipe(server: OwnServer, busy: str) -> None:
    words = ["watch", "--sample", "0.5", "--topology", str(server.path)]
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"nic0 +running +vfio-pci", done.stdout)
    assert re.search(r"nic0 msi +0 +relayed +[1-9]", done.stdout)
    assert "0x10000" in done.stdout and "e0" in done.stdout and "Topology" in done.stdout
    assert "\x1b" not in done.stdout
    coloured = subprocess.run(
        [*PROGRAM, "watch", "--color", "always", str(server.path)], capture_output=True, check=True, timeout=120
    )
    assert b"\x1b[32m" in coloured.stdout


def test_what_is_no_server(tmp_path: Path, home: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        done = subprocess.run(
            [*PROGRAM, "watch", *map(str, words)], capture_output=True, text=True, check=False, timeout=120
        )
        return done.returncode, done.stderr

    assert run()[0] == 2
    status, said = run("--all", tmp_path / "nothing")
    assert status == 1 and "takes a directory" in said
    status, said = run("--all", tmp_path)
    assert status == 1 and "no socket" in said
    with Screen("watch", tmp_path / "no.sock", home=home, columns=200) as watch:
        watch.see("ENOENT")
        assert watch.end() == 1


def test_sigterm_leaves_the_terminal_as_it_was(server: OwnServer, terminal: Terminal) -> None:
    watch = terminal("watch", server.path)
    watch.see("vm1", "running")
    watch.child.kill(signal.SIGTERM)
    assert watch.end() == 0
    assert b"\x1b[?1049l" in watch.raw
