"""The service manager's side of sd_notify(3) is a real socket; the loop is a real one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.protocol.limits import MAX_STATUS
from vfiod.server.notify import Notifier, Watchdog, control_group, watchdog_seconds

PATIENCE = 120
SECONDS = 0.05


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.settimeout(PATIENCE)
        made.bind(path)
        yield made


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    made = Notifier()
    yield made
    made.close()


def _drain(manager: socket.socket) -> int:
    count = 0
    manager.setblocking(False)
    try:
        while True:
            manager.recv(4096)
            count += 1
    except BlockingIOError:
        return count
    finally:
        manager.settimeout(PATIENCE)


def test_what_is_told(manager: socket.socket, notifier: Notifier) -> None:
    notifier.ready("Serving vm1: 0 devices")
    assert manager.recv(4096) == b"READY=1\nSTATUS=Serving vm1: 0 devices"
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second, third = manager.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert third.startswith("STATUS=")
    notifier.stopping()
    assert manager.recv(4096).split(b"\n")[0] == b"STOPPING=1"


def test_a_status_is_one_line_and_not_long(manager: socket.socket, notifier: Notifier) -> None:
    notifier.status("Serving a\nREADY=0 b")
    assert manager.recv(4096) == b"STATUS=Serving a READY=0 b"
    notifier.status("x" * 100_000)
    assert manager.recv(65536) == b"STATUS=" + b"x" * MAX_STATUS


def test_a_manager_that_does_not_read_is_not_waited_for(
    manager: socket.socket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    while "Cannot notify" not in caplog.text:  # its queue fills up, and then all returns at once all the same
        notifier.tell("WATCHDOG=1")
    assert _drain(manager) > 0
    notifier.tell("WATCHDOG=1")
    assert manager.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "seconds", "warned"),
    [
        ({}, None, False),
        ({"WATCHDOG_USEC": "30000000"}, 30.0, False),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0, False),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None, False),
        ({"WATCHDOG_USEC": ""}, None, False),
        ({"WATCHDOG_USEC": "0"}, None, True),
        ({"WATCHDOG_USEC": "9999"}, None, True),
        ({"WATCHDOG_USEC": "10000"}, 0.01, False),
        ({"WATCHDOG_USEC": "-1"}, None, True),
        ({"WATCHDOG_USEC": "30s"}, None, True),
        ({"WATCHDOG_USEC": "9" * 30}, None, True),
    ],
)
def test_whether_the_manager_looks(
    environment: dict[str, str], seconds: float | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert watchdog_seconds(environment) == seconds
    assert ("WATCHDOG_USEC" in caplog.text) is warned


def test_a_turning_loop_answers_and_a_stuck_one_does_not(manager: socket.socket, notifier: Notifier) -> None:
    """Nothing but the loop's thread sends: while that is in a callback, however long, nothing comes."""
    seen_while_stuck = []

    def stuck() -> None:
        _drain(manager)
        time.sleep(SECONDS * 4)  # four times as long as the manager would wait
        seen_while_stuck.append(_drain(manager))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        watchdog = Watchdog(loop, notifier, SECONDS)
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 4096) == b"WATCHDOG=1"
        loop.call_soon(stuck)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen_while_stuck == [0]
        assert await asyncio.to_thread(manager.recv, 4096) == b"WATCHDOG=1"
        watchdog.stop()
        _drain(manager)
        await asyncio.sleep(SECONDS * 2)
        assert _drain(manager) == 0

    asyncio.run(run())


def test_a_thread_that_is_stuck_does_not_matter(manager: socket.socket, notifier: Notifier) -> None:
    """Devices may keep a worker for long; it is the loop that must turn."""
    release = threading.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        worker = loop.run_in_executor(None, release.wait, PATIENCE)
        watchdog = Watchdog(loop, notifier, SECONDS)
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 4096) == b"WATCHDOG=1"
        watchdog.stop()
        release.set()
        assert await worker

    asyncio.run(run())


def test_the_control_group_is_systemds_or_the_only_one() -> None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    known = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}
    assert control_group() == known.get("name=systemd", known.get(""))
