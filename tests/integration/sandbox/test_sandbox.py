"""A process in the sandbox can open nothing, execute nothing, connect nowhere: the server as it is started by default.

What only an intruder asks for ends the process, so each of those takes one: a small one that has closed its sandbox as
the server does, and for some of them a real server too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.errors import ConnectionLost
from vfiod.client.serve import server_command
from vfiod.client.spawn import OwnServer, accepts, own_server
from vfiod.client.sync import Client
from vfiod.protocol.errors import RemoteError

from .attacks import ATTACKS, DEADLY

PROGRAM = Path(__file__).with_name("attacks.py")
REFUSED = ("EACCES", "EPERM", "EXDEV", "ENOSYS")
"""By Landlock; by seccomp; a link by Landlock; clone3."""

NEEDS_AN_OLD_FD = {"connect_an_old_socket", "listen_on_a_port", "signal_by_a_file"}
"""Of a TCP socket, which a server without a bus does not have."""

IN_THE_SERVER = ("execute", "execute_memory", "ptrace", "mount", "unshare", "bpf", "io_uring_setup", "userfaultfd")


def _try(name: str, here: Path) -> tuple[str, int]:
    (here / "there").touch()
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(here), name], stdout=subprocess.PIPE, text=True, check=False
    )
    return ran.stdout.strip(), ran.returncode


def test_what_the_server_needs_works(tmp_path: Path) -> None:
    assert _try("works", tmp_path) == ("done", 0)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in DEADLY])
def test_an_attack_is_refused(name: str, tmp_path: Path) -> None:
    said, status = _try(name, tmp_path)
    assert status == 0
    assert said in REFUSED


@pytest.mark.parametrize("name", DEADLY)
def test_an_attack_ends_the_process(name: str, tmp_path: Path) -> None:
    assert _try(name, tmp_path) == ("", -signal.SIGSYS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for sockets; servers that are started find the intruder among their parents."""
    made = tmp_path / "path" / "intruder-1.0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: intruder\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[vfiod.mdev_parents]\nintruder = intruder:Intruder\n")
    path = [str(made.parent), str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    here = tmp_path / "here"
    here.mkdir()
    (here / "there").touch()
    return here


@pytest.fixture
def server(here: Path) -> Iterator[OwnServer]:
    """With no option about its sandbox."""
    with own_server(here) as running:
        yield running


def _attack(client: Client, server: OwnServer, name: str) -> str:
    parameters = {"attack": name, "here": str(server.path.parent)}
    with pytest.raises(RemoteError, match="outcome: ") as caught:
        client.mdev_create(parent="intruder", type="intruder", parameters=parameters)
    return caught.value.desc.rpartition("outcome: ")[2].split()[0].rstrip(";,.)")


def test_a_parent_taken_over_gets_nowhere(server: OwnServer) -> None:
    """Every attack that is survived, one after another in one server; it serves on."""
    names = [name for name in ATTACKS if name not in DEADLY and name not in NEEDS_AN_OLD_FD]
    with Client.connect(server.path, timeout=120) as client:
        outcomes = {name: _attack(client, server, name) for name in names}
        assert {name: outcome for name, outcome in outcomes.items() if outcome not in REFUSED} == {}
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="d0", mdev=uuid)
        assert client.region_read(device="d0", region="bar0", offset=0, size=4).value == 0xF10D0001


@pytest.mark.parametrize("name", IN_THE_SERVER)
def test_a_parent_taken_over_ends_the_server(server: OwnServer, name: str) -> None:
    parameters = {"attack": name, "here": str(server.path.parent)}
    with Client.connect(server.path, timeout=120) as client, pytest.raises(ConnectionLost):
        client.mdev_create(parent="intruder", type="intruder", parameters=parameters)
    assert server.process.wait(120) == -signal.SIGSYS


@pytest.mark.parametrize(
    ("attack", "outcome"), [("read_a_secret", "EACCES"), ("kill_the_parent", "EPERM"), ("reach_the_network", "EPERM")]
)
def test_a_program_of_one_device_has_the_same_sandbox(here: Path, attack: str, outcome: str) -> None:
    done = _mdev_serve(here, attack)
    assert done.returncode == 1
    assert f"outcome: {outcome}" in done.stderr


def test_a_program_of_one_device_is_ended_too(here: Path) -> None:
    assert _mdev_serve(here, "execute").returncode == -signal.SIGSYS


def _mdev_serve(here: Path, attack: str) -> subprocess.CompletedProcess[str]:
    parameters = ["--parameter", f"attack={attack}", "--parameter", f"here={here}"]
    command = ["mdev-serve", "--type", "intruder", "--socket-path", f"{here}/s", *parameters]
    return subprocess.run(server_command(command), capture_output=True, text=True, check=False)


LACKING = """
import errno, os, struct, sys
from vfiod.server.sandbox.bpf import ALLOW, program, refuse
from vfiod.server.sandbox.calls import MACHINES, numbers_of
from vfiod.server.sandbox.raw import address_of, syscall

machine = MACHINES[os.uname().machine]
numbers = numbers_of(machine)
lacking = {444: refuse(errno.ENOSYS), numbers["seccomp"]: refuse(errno.EINVAL)}
filters = bytearray(program(machine, [], {}, [], lacking, ALLOW))
header = bytearray(struct.pack("@HP", len(filters) // 8, address_of(filters)))
syscall(numbers["prctl"], 38, 1)
syscall(numbers["seccomp"], 1, 0, address_of(header))
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes a program on a kernel without Landlock and seccomp, as an old one's or a container's would be."""


def _lacking(*arguments: str) -> list[str]:
    return [sys.executable, "-c", LACKING, *server_command(["--name", "x", *arguments])]


def test_what_the_kernel_lacks_is_said_and_it_serves(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(_lacking("--qmp", f"unix:{tmp_path}/qmp"), stderr=log)
        try:
            while not accepts(tmp_path / "qmp"):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            with Client.connect(tmp_path / "qmp", timeout=120) as client:
                assert client.query_name().name == "x"
        finally:
            process.terminate()
            assert process.wait() == 0
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "sandbox" in line]
    assert [line.partition("The sandbox is incomplete: ")[2].split(":")[0] for line in said] == ["Landlock", "seccomp"]
    assert "Function not implemented; files and ports stay as open" in said[0]


def test_when_it_is_required_what_the_kernel_lacks_is_an_error(tmp_path: Path) -> None:
    command = _lacking("--qmp", f"unix:{tmp_path}/qmp", "--sandbox", "required")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("vfiod: --sandbox required: Landlock: Function not implemented")
    assert not (tmp_path / "qmp").exists()
