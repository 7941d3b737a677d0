"""``python -m vfiod.server`` as its users start it: ready, asked to end, in the way of others, unwelcome."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.server.sockets.access import overflow_uid

PATIENCE = 30

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server in ``tmp_path``; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
            environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), **options.pop("env", {})}
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "vfiod.server", *arguments],
                cwd=tmp_path,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                **options,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def _connect(path: Path, process: subprocess.Popen[str]) -> socket.socket:
    """A session, as soon as the server accepts."""
    while True:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(PATIENCE)
        try:
            peer.connect(str(path))
        except OSError:
            peer.close()
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
        else:
            return peer


def _lines(peer: socket.socket) -> Iterator[Any]:
    with peer.makefile("rb") as file:
        for line in file:
            yield json.loads(line)


def _ready(process: subprocess.Popen[str], path: Path) -> None:
    with _connect(path, process) as peer:
        assert peer.recv(65536).startswith(b'{"QMP"')


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_status_0(start: Start, tmp_path: Path, number: int) -> None:
    process = start("--name", "vm0", "--qmp", "unix:q", "--jsonrpc", f"unix:{tmp_path}/j", "--pidfile", "pid")
    with _connect(tmp_path / "q", process) as peer:
        lines = _lines(peer)
        assert "QMP" in next(lines)
        peer.sendall(b"{'execute': 'qmp_capabilities'}{'execute': 'query-name'}")
        assert [next(lines), next(lines)] == [{"return": {}}, {"return": {"name": "vm0"}}]
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
        process.send_signal(number)
        event = next(lines)
        assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "host-signal")
        assert list(lines) == []
    assert _end(process) == (0, "")
    assert list(tmp_path.iterdir()) == []  # sockets and pidfile are gone


def test_a_signal_as_soon_as_the_first_door_is_there(start: Start, tmp_path: Path) -> None:
    """A manager that gives up the moment it finds the socket leaves none behind."""
    process = start("--name", "vm0", "--qmp", "unix:q", "--jsonrpc", "unix:j")
    while not (tmp_path / "j").exists():  # doors are opened in reverse
        assert process.poll() is None, _end(process)
    process.terminate()
    assert _end(process) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_quit_ends_it_with_status_0(start: Start, tmp_path: Path) -> None:
    process = start("--name", "vm0", "--jsonrpc", "unix:j", "--uuid", "4dbf9fe8-0000-4000-8000-000000000001")
    with _connect(tmp_path / "j", process) as peer:
        peer.sendall(b'{"jsonrpc": "2.0", "method": "query-uuid", "id": 1}')
        lines = _lines(peer)
        assert next(lines)["result"] == {"UUID": "4dbf9fe8-0000-4000-8000-000000000001"}
        peer.sendall(b'{"jsonrpc": "2.0", "method": "quit", "id": 2}')
        assert [line.get("method", line.get("id")) for line in lines] == ["SHUTDOWN", 2]
    assert _end(process) == (0, "")


def test_an_inherited_socket(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "q"))
        listening.listen()
        process = start("--name", "vm0", "--qmp", f"fd={listening.fileno()}", pass_fds=[listening.fileno()])
    _ready(process, tmp_path / "q")
    process.terminate()
    assert _end(process) == (0, "")
    assert (tmp_path / "q").exists()  # it was not ours to remove


def test_a_configuration_file(start: Start, tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text('name = "vm0"\nqmp = "unix:q"\n')
    process = start("--config", "vm.toml")
    _ready(process, tmp_path / "q")


def test_a_dead_servers_socket_is_replaced_a_live_ones_is_not(start: Start, tmp_path: Path) -> None:
    first = start("--name", "a", "--qmp", "unix:q", "--pidfile", "pid")
    _ready(first, tmp_path / "q")
    second = start("--name", "b", "--qmp", "unix:q")
    status, errors = _end(second)
    assert status == 1
    assert errors == "vfiod: Cannot listen on 'q': another program listens there\n"
    third = start("--name", "b", "--qmp", "unix:other", "--pidfile", "pid")
    status, errors = _end(third)
    assert status == 1
    assert errors == "vfiod: The pidfile 'pid' is locked: another server uses it\n"
    _ready(first, tmp_path / "q")
    first.kill()
    first.wait(PATIENCE)
    assert (tmp_path / "q").is_socket()
    fourth = start("--name", "b", "--qmp", "unix:q", "--pidfile", "pid")
    _ready(fourth, tmp_path / "q")
    fourth.terminate()
    assert _end(fourth) == (0, "")


def test_the_pidfile_is_locked_while_it_lives(start: Start, tmp_path: Path) -> None:
    process = start("--name", "a", "--qmp", "unix:q", "--pidfile", "pid")
    _ready(process, tmp_path / "q")
    with (tmp_path / "pid").open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--name", "a"], 2, "vfiod: No socket to serve"),
        (["--name", "a", "--qmp", "unix:absent/q"], 1, "vfiod: Cannot listen on 'absent/q': No such file"),
        (["--name", "a", "--qmp", "fd=0"], 1, "vfiod: fd 0 is no"),
        (["--name", "a", "--qmp", "unix:q", "--trace", "nope"], 1, "vfiod: --trace 'nope' matches no trace point"),
        (["--name", "a", "--qmp", "unix:q", "--pidfile", "absent/p"], 1, "vfiod: Cannot open the pidfile 'absent/p'"),
        (["--name", "a", "--qmp", "unix:ok", "--jsonrpc", "unix:absent/j"], 1, "vfiod: Cannot listen on 'absent/j'"),
    ],
)
def test_what_cannot_begin_says_why_in_one_line_and_leaves_nothing(
    start: Start, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    process = start(*arguments, stdin=subprocess.DEVNULL)
    found, errors = _end(process)
    assert found == status
    assert errors.startswith(words)
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_service_manager_is_told(start: Start, tmp_path: Path) -> None:
    for name in ("notify", "@vfiod-test-" + tmp_path.name):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(PATIENCE)
            manager.bind("\0" + name[1:] if name[0] == "@" else str(tmp_path / name))
            address = name if name[0] == "@" else str(tmp_path / name)
            process = start("--name", "vm0", "--qmp", "unix:q", env={"NOTIFY_SOCKET": address})
            assert "READY=1" in manager.recv(4096).decode().splitlines()
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(tmp_path / "q"))  # ready is ready: the first try
            process.terminate()
            assert "STOPPING=1" in manager.recv(4096).decode().splitlines()
            assert _end(process) == (0, "")


def test_a_service_manager_that_is_gone_is_a_warning(start: Start, tmp_path: Path) -> None:
    process = start("--name", "vm0", "--qmp", "unix:q", env={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    _ready(process, tmp_path / "q")
    process.terminate()
    status, errors = _end(process)
    assert status == 0
    assert "Cannot notify the service manager" in errors


def test_trace_points_go_to_the_log(start: Start, tmp_path: Path) -> None:
    process = start("--name", "vm0", "--qmp", "unix:q", "--trace", "session_*", "--log-level", "error")
    _ready(process, tmp_path / "q")
    process.terminate()
    _, errors = _end(process)
    assert "session_opened session=1 dialect=qmp" in errors


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")


def _as_user(uid: int, path: Path) -> bytes:
    """What the server says to a process of this user."""
    # It becomes that user when all is loaded: other users may not read this Python.
    script = (
        "import os, socket, sys; peer = socket.socket(socket.AF_UNIX); os.setuid(int(sys.argv[2]));"
        "peer.connect(sys.argv[1]); peer.settimeout(20); os.write(1, peer.recv(65536))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(uid)], capture_output=True, timeout=PATIENCE, check=False
    )
    return done.stdout or done.stderr


@needs_root
def test_strangers_are_told_and_hung_up_on_the_allowed_come_in(start: Start, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    directory = Path("/tmp") / f"vfiod-test-{os.getpid()}"  # pytest's own directories are closed to other users
    directory.mkdir(mode=0o755)
    try:
        with listening:
            path = directory / "q"
            listening.bind(str(path))
            path.chmod(0o777)
            listening.listen()
            process = start(
                "--name", "vm0", "--qmp", f"fd={listening.fileno()}", "--allow-uid", "12345",
                pass_fds=[listening.fileno()],
            )  # fmt: skip
        _ready(process, path)
        refused = json.loads(_as_user(12346, path))
        assert refused["error"]["class"] == "GenericError"
        assert "--allow-uid 12346" in refused["error"]["desc"]
        assert _as_user(12345, path).startswith(b'{"QMP"')
        process.terminate()
        assert _end(process)[0] == 0
    finally:
        (directory / "q").unlink(missing_ok=True)
        directory.rmdir()


@needs_root
def test_it_does_not_run_as_the_overflow_uid(start: Start, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SET_UID.format(uid=overflow_uid())],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert "does not run as uid" in done.stderr


# What argparse loads late is loaded first: other users may not read this Python.
_SET_UID = """
import os, shutil, sys
from vfiod.server.program import main
os.setuid({uid})
sys.exit(main(["--name", "vm0", "--qmp", "unix:q"]))
"""


def test_the_limit_of_open_files_is_raised_to_the_hard_one(start: Start, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))

    process = start("--name", "v", "--qmp", "unix:q", preexec_fn=lower)
    _ready(process, tmp_path / "q")
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
