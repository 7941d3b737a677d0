"""Devices of a real server while sessions come, hang and die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
import pytest

from vfiod.client.sync import Client, EventStream
from vfiod.protocol.errors import RemoteError

from .conftest import PATIENCE, Server

MiB = 1 << 20


def make(client: Client) -> str:
    return client.mdev_create(parent="sticky", type="primer-pci").uuid


def add(client: Client, id: str) -> str:
    uuid = make(client)
    client.device_add(driver="vfio-pci", id=id, mdev=uuid)
    return uuid


def wait_event(news: EventStream, name: str) -> dict[str, Any]:
    """The data, and ``seq``, of the next event of this name."""
    while True:
        event = news.get(PATIENCE)
        if event.name == name:
            data = msgspec.to_builtins(event.data)
            assert isinstance(data, dict)
            return data | {"seq": event.seq}


class Later:
    """A call in a thread of the test's, whose outcome is asked for later."""

    def __init__(self, function: Any, **arguments: Any) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments))
        self._thread.start()

    def _run(self, function: Any, arguments: dict[str, Any]) -> None:
        try:
            self.result = function(**arguments)
        except Exception as error:
            self.error = error

    def outcome(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def test_others_go_on_while_a_device_hangs_in_a_reset(server: Server) -> None:
    first, second = server.client(), server.client()
    news = second.events()
    add(first, "n0")
    server.hold("reset")
    reset = Later(first.device_reset, id="n0")
    server.is_held("reset")
    add(second, "n1")
    [held] = [one for one in second.query_devices() if one.id == "n0"]
    assert [one.detail for one in held.held_by] == ["device-reset"]
    second.device_del(id="n0", timeout_ms=3_600_000)
    with pytest.raises(RemoteError, match="Device n0 is already in the process of unplug"):
        second.device_del(id="n0")
    assert [(one.id, one.state) for one in second.query_devices(id="n0")] == [("n0", "unplugging")]
    server.release("reset")
    reset.outcome()
    gone = wait_event(news, "DEVICE_DELETED")
    assert (gone["device"], gone["released"]) == ("n0", True)
    assert [one.id for one in second.query_devices()] == ["n1"]
    picture = second.query_machine()
    assert picture.seq == gone["seq"]


def test_a_manager_killed_in_the_middle_leaves_whole_things_and_no_fd(server: Server) -> None:
    watcher = server.client()
    news = watcher.events()
    uuid = make(watcher)
    before = server.fds()
    server.hold("open")
    script = f"""
from vfiod.client.sync import Client
client = Client.connect({str(server.path)!r})
client.device_add(driver="vfio-pci", id="n0", mdev={uuid!r})
"""
    manager = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    server.is_held("open")
    manager.send_signal(signal.SIGKILL)
    manager.wait(PATIENCE)
    [device] = watcher.query_devices()
    assert device.state == "realizing"
    with pytest.raises(RemoteError, match="Device 'n0' is still being added"):
        watcher.device_del(id="n0")
    server.release("open")
    assert wait_event(news, "DEVICE_ADDED")["device"] == "n0"
    watcher.device_del(id="n0")
    assert wait_event(news, "DEVICE_DELETED")["released"] is True
    while server.fds() != before:  # the server may not yet have seen the end of the dead session
        time.sleep(0.002)


def test_fds_of_a_killed_session_are_closed_and_its_mappings_stay(server: Server) -> None:
    watcher = server.client()
    watcher.query_machine()
    before = server.fds()
    memory = os.memfd_create("m")
    os.ftruncate(memory, MiB)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE)
        raw.connect(str(server.path))
        lines = raw.makefile("r")
        lines.readline()
        raw.sendall(b'{"execute": "qmp_capabilities"}')
        lines.readline()
        socket.send_fds(raw, [b" "], [memory, memory])
        for request in (
            {"execute": "getfd", "arguments": {"fdname": "a"}},
            {"execute": "getfd", "arguments": {"fdname": "b"}},
            {"execute": "dma-map", "arguments": {"iova": 0, "size": MiB, "fd": "a"}},
        ):
            raw.sendall(json.dumps(request).encode())
            assert "return" in json.loads(lines.readline())
        lines.close()
    os.close(memory)
    [mapping] = watcher.query_dma()
    assert (mapping.iova, mapping.size) == (0, MiB)
    while server.fds() != before + 1:  # the mapping's own
        time.sleep(0.002)
    assert watcher.dma_unmap(iova=0, size=MiB).size == MiB
    assert server.fds() == before


def test_two_hundred_hot_plugs_leave_nothing(server: Server) -> None:
    client = server.client()
    news = client.events()
    uuid = make(client)
    client.device_add(driver="vfio-pci", id="n0", mdev=uuid)
    client.device_del(id="n0")
    wait_event(news, "DEVICE_DELETED")
    before = server.fds()
    for _ in range(200):
        client.device_add(driver="vfio-pci", id="n0", mdev=uuid)
        client.device_del(id="n0")
        assert wait_event(news, "DEVICE_DELETED")["released"] is True
    assert server.fds() == before
    assert client.query_devices() == []


def test_the_server_ends_although_a_thread_hangs(hasty_server: Server) -> None:
    server = hasty_server
    client = server.client()
    add(client, "n0")
    server.hold("reset")
    reset = Later(client.device_reset, id="n0")
    server.is_held("reset")
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 1
    with pytest.raises(Exception):  # noqa: B017 - the connection ended, one way or another
        reset.outcome()
    assert "Device n0: device-reset is still running" in server.log()
    assert not server.path.exists()
    assert not (server.root / "pid").exists()


def test_the_server_ends_cleanly_in_order(server: Server) -> None:
    client = server.client()
    news = client.events()
    for n in range(3):
        add(client, f"n{n}")
    client.quit()
    names = [wait_event(news, "SHUTDOWN")["reason"]]
    names += [wait_event(news, "DEVICE_DELETED")["device"] for _ in range(3)]
    assert names == ["host-qmp-quit", "n2", "n1", "n0"]
    assert server.process.wait(PATIENCE) == 0
