"""A real server with all of its doors open, one session that behaves, and raw sockets for those that do not."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiod.client.bus import Bus
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client

PATIENCE = 120.0
"""Seconds before a test gives up on the server; no test measures time."""

DOORS = ("qmp", "jsonrpc", "bus", "events", "metrics", "export")


class Fortress:
    """The server, and who behaves.

    Attributes:
        server: the process.
        client: a session of the monitor.
        bus: a client of the bus.

    """

    def __init__(self, server: OwnServer, client: Client, bus: Bus) -> None:
        self.server = server
        self.client = client
        self.bus = bus
        self.place = server.path.parent
        self._stack = contextlib.ExitStack()

    def path(self, door: str) -> Path:
        return self.server.path if door == "qmp" else self.place / door

    def connect(self, door: str) -> socket.socket:
        """Knock until the kernel's queue has room."""
        deadline = time.monotonic() + PATIENCE
        while True:
            made = socket.socket(socket.AF_UNIX)
            made.setblocking(False)
            try:
                made.connect(str(self.path(door)))
            except BlockingIOError:
                made.close()
                assert time.monotonic() < deadline, f"{door} lets nobody in"
                time.sleep(0.001)
            else:
                made.settimeout(PATIENCE)
                return self._stack.enter_context(made)

    def serves(self, requests: int = 1) -> None:
        """So many requests of those who behave are served, on the monitor and on the bus."""
        for _ in range(requests):
            assert self.client.query_name().name == "fortress"
            assert self.bus.query_name(timeout=PATIENCE).name == "fortress"

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def eventually(self, check: Callable[[], bool]) -> None:
        """Wait until something is so, and serve meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not check():
            assert time.monotonic() < deadline, "it never was so"
            self.serves()

    @contextlib.contextmanager
    def open_files(self, few: int) -> Iterator[None]:
        """For a while, the server may have so few."""
        limits = resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            yield
        finally:
            resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE, limits)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """One for all: each test leaves it as it was."""
    place = tmp_path_factory.mktemp("fortress")
    place.chmod(0o700)
    arguments = [
        *("--jsonrpc", f"unix:{place}/jsonrpc", "--metrics", f"unix:{place}/metrics"),
        *("--bus", f"ipc:{place}/bus", "--events", f"ipc:{place}/events", "--allow-path", str(place)),
    ]
    with own_server(place, arguments, name="fortress") as made:
        with Client.connect(made.path, timeout=PATIENCE) as client:
            uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
            client.device_add(driver="vfio-pci", id="d0", mdev=uuid)
            client.device_export_add(id="e0", type="vfio-user", device="d0", path=str(place / "export"))
        yield made
    messages = made.messages()
    assert "Traceback" not in messages, messages
    assert "ResourceWarning" not in messages, messages


@pytest.fixture
def fortress(server: OwnServer) -> Iterator[Fortress]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the other ends are ours
    try:
        bus = Bus(f"ipc:{server.path.parent}/bus")
        with Client.connect(server.path, timeout=PATIENCE) as client, bus:
            made = Fortress(server, client, bus)
            made.serves()
            before = made.fds()
            try:
                yield made
            finally:
                made.close()
            made.eventually(lambda: made.fds() <= before)
            made.serves()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
