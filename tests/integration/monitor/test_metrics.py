"""Metrics of a real server, asked for as a scraper would, and as nobody should."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.serve import server_command
from vfiod.client.spawn import OwnServer, own_server
from vfiod.client.sync import Client
from vfiod.server.monitor.metrics import METRICS, Kind


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    tmp_path.chmod(0o700)
    arguments = ["--metrics", f"unix:{tmp_path}/metrics", "--bus", f"ipc:{tmp_path}/bus"]
    with own_server(tmp_path, arguments, name='a "vm"') as running:
        yield running
    assert "Traceback" not in running.messages(), running.messages()
    assert not (tmp_path / "metrics").exists()


def ask(server: OwnServer, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[int, str, str]:
    """Status, content type and body."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(server.path.parent / "metrics"))
        connection.sendall(request)
        response = http.client.HTTPResponse(connection, method=request.split()[0].decode("latin-1"))
        response.begin()
        return response.status, response.getheader("Content-Type", ""), response.read().decode()


LINE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\} ([0-9.e+-]+)')


def samples(text: str) -> dict[tuple[str, str], float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match is not None, line
            found[match[1], match[2]] = float(match[3])
    return found


def test_what_a_scraper_reads(server: OwnServer) -> None:
    """OpenMetrics: a family for each metric, typed, each once; counters end in _total; the end is marked."""
    with Client.connect(server.path) as client:
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="n0", mdev=uuid)
        status, kind, text = ask(server)
        stats = {one.name for target in ("vm", "device", "session") for result in client.query_stats(target=target)
                 for one in result.stats}  # fmt: skip
    assert (status, kind) == (200, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert text.endswith("# EOF\n")
    found = samples(text)
    vm = 'vm="a \\"vm\\""'
    assert found["vfiod_devices", vm] == 1
    assert found["vfiod_device_irqs_fired_total", f'{vm},device="n0"'] == 0
    assert max(value for (name, _), value in found.items() if name == "vfiod_session_commands_total") > 2
    assert any(name == "vfiod_bus_calls_total" for name, _ in found)
    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len(types) == len(dict(types))
    assert stats <= {metric.stat for metric in METRICS}, "a counter without a metric"
    for metric in METRICS:
        if (metric.name, str(metric.kind)) in types:
            sample = metric.name + ("_total" if metric.kind is Kind.COUNTER else "")
            assert any(name == sample for name, _ in found)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\xff\xfe\r\n\r\n", 400),
    ],
)
def test_other_requests(server: OwnServer, request_bytes: bytes, status: int) -> None:
    """Each has its status, and the next scrape works."""
    assert ask(server, request_bytes)[0] == status
    assert ask(server)[0] == 200


def test_who_asks_for_too_much_is_hung_up_on(server: OwnServer) -> None:
    """A head without end, and one that never comes, cost nobody anything."""
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as endless:
        for one in (silent, endless):
            one.settimeout(30)
            one.connect(str(server.path.parent / "metrics"))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                endless.sendall(b"x" * 4096)
        assert ask(server)[0] == 200
        assert silent.recv(1) == b""  # after its time
    assert ask(server)[0] == 200


def test_loopback_only(tmp_path: Path) -> None:
    """A port of this host works; any other address is refused at start; the Unix socket is private."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with own_server(tmp_path, ["--metrics", f"127.0.0.1:{port}"]):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        assert b"vfiod_devices" in connection.getresponse().read()
        connection.close()
    for address, words in (("0.0.0.0:9", "this host only"), ("9", "expects unix:PATH or HOST:PORT")):
        line = server_command(["--name", "x", "--qmp", f"unix:{tmp_path}/q", "--metrics", address])
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_strangers_are_refused() -> None:
    """The kernel says who asks."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own directories are closed to others
    try:
        directory.chmod(0o711)
        with own_server(directory, ["--metrics", f"unix:{directory}/metrics"]) as server:
            (directory / "metrics").chmod(0o666)
            child = os.fork()
            if child == 0:
                try:
                    os.setuid(4321)
                    os._exit(0 if ask(server)[0] == 403 else 1)
                except BaseException:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(directory)
