"""A real server process with the built-in device, exported; the hypervisors are the tests' own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.integration.process import ServerProcess

from vfiod.client.events import Event

from .hypervisor import PATIENCE, Hypervisor


class Server(ServerProcess):
    """One server process and a session with it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "--allow-connect", "--allow-path", str(directory), patience=PATIENCE)
        self.directory = directory
        self._events = self.client.events()
        self._hypervisors: list[Hypervisor] = []

    def cpu_ticks(self) -> int:
        """User and system time so far, in clock ticks (proc(5))."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def primer(self, id: str = "dev0", *, export: bool = True, **properties: Any) -> Path:
        """Add a primer, export it; where."""
        parameters = properties.pop("parameters", {})
        uuid = self.client.mdev_create(parent="primer", type="primer-pci", parameters=parameters).uuid
        self.client.device_add(driver="vfio-pci", id=id, mdev=uuid, **properties)
        path = self.directory / f"{id}.sock"
        if export:
            self.client.device_export_add(id=f"e-{id}", type="vfio-user", device=id, path=str(path))
        return path

    def attach(self, path: Path, **options: Any) -> Hypervisor:
        made = Hypervisor(path, **options)
        self._hypervisors.append(made)
        return made

    def event(self, name: str) -> dict[str, Any]:
        """Wait for the next event of this name; its data. Others are passed over."""
        while True:
            event = self._events.get(PATIENCE)
            if event.name == name:
                return data(event)

    def close(self) -> None:
        for one in self._hypervisors:
            one.close()
        log = self.end()
        assert "Traceback" not in log, log
        assert "ResourceWarning" not in log, log


def data(event: Event) -> dict[str, Any]:
    told = event.data if isinstance(event.data, dict) else msgspec.to_builtins(event.data)
    assert isinstance(told, dict)
    return told


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def eventually(check: Callable[[], bool]) -> None:
    """Wait until something is so. Patience is for a machine that hangs; no test measures time."""
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.005)
