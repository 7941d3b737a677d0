"""examples/kubernetes (docs/kubernetes.md): the device plugin against a kubelet's half of its protocol, by real gRPC.

The pod is made of what the kubelet makes of the plugin's answer: a vfiod in the directory to be mounted, and in place
of QEMU another vfiod, which attaches by vfio-user.
"""

from __future__ import annotations

import importlib.util
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vfiod.client import Client
from vfiod.client.serve import server_command
from vfiod.client.spawn import accepts, own_server

grpc: Any = pytest.importorskip("grpc", reason="grpcio is not installed: the dependency group 'examples'")

EXAMPLES = Path(__file__).parents[2] / "examples/kubernetes"
PLUGIN = EXAMPLES / "device_plugin.py"
RESOURCE = "vfiod.example/primer"
PATIENCE = 120.0


@pytest.fixture(scope="module")
def plugin() -> Any:
    spec = importlib.util.spec_from_file_location("device_plugin", PLUGIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vfiod-"))  # short: a Unix socket's path may have 107 bytes
    yield path
    shutil.rmtree(path)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Kubelet:
    """Its Registration service, and its calls of a plugin that registered."""

    def __init__(self, directory: Path, plugin: Any) -> None:
        self.directory = directory
        self.plugin = plugin
        self.registered: queue.Queue[dict[str, Any]] = queue.Queue()
        self.server = grpc.server(ThreadPoolExecutor(max_workers=2))
        method = grpc.unary_unary_rpc_method_handler(
            self._register, plugin.codec("Register")[1], plugin.codec("Empty")[0]
        )
        handler = grpc.method_handlers_generic_handler("v1beta1.Registration", {"Register": method})
        self.server.add_generic_rpc_handlers((handler,))
        self.server.add_insecure_port(f"unix:{directory / 'kubelet.sock'}")
        self.server.start()

    def _register(self, request: dict[str, Any], _context: Any) -> dict[str, Any]:
        self.registered.put(request)
        return {}

    def call(self, channel: Any, method: str, asked: str, answer: str, request: dict[str, Any]) -> Any:
        done = channel.unary_unary(
            f"/v1beta1.DevicePlugin/{method}", self.plugin.codec(asked)[0], self.plugin.codec(answer)[1]
        )
        return done(request, timeout=PATIENCE)

    def devices(self, channel: Any) -> list[dict[str, str]]:
        """The first list of ListAndWatch."""
        watch = channel.unary_stream(
            "/v1beta1.DevicePlugin/ListAndWatch", self.plugin.codec("Empty")[0], self.plugin.codec("Devices")[1]
        )({}, timeout=PATIENCE)
        first: dict[str, Any] = next(watch)
        watch.cancel()
        return list(first["devices"])


def test_a_pod_gets_its_devices(plugin: Any, directory: Path) -> None:
    kubelet = Kubelet(directory, plugin)
    devices = directory / "devices"
    devices.mkdir()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(PLUGIN), "--resource", RESOURCE, "--mdev", "primer-pci=3",
             "--kubelet", str(directory), "--pods", str(directory / "pods"), "--exports", str(devices)],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        request = kubelet.registered.get(timeout=PATIENCE)
        assert (request["version"], request["resource_name"]) == ("v1beta1", RESOURCE)
        with grpc.insecure_channel(f"unix:{directory / request['endpoint']}") as channel:
            kubelet.call(channel, "GetDevicePluginOptions", "Empty", "Options", {})
            listed = kubelet.devices(channel)
            assert listed == [{"ID": f"primer-pci-{n}", "health": "Healthy"} for n in range(3)]
            with pytest.raises(grpc.RpcError, match="There is no device nobody"):
                allocate(kubelet, channel, "nobody")
            first = allocate(kubelet, channel, "primer-pci-0", "primer-pci-2")
            assert first["envs"] == {"VFIOD_DEVICES": f"{devices / '0.sock'}:{devices / '1.sock'}"}
            (mount,) = first["mounts"]
            assert mount["container_path"] == "/run/vfiod"
            mounted = Path(mount["host_path"])
            run_pod(mounted, directory, devices)
            again = allocate(kubelet, channel, "primer-pci-0")
            assert again["mounts"][0]["host_path"] != str(mounted)
            assert not mounted.exists(), "the pod is gone, and its directory with it"

        (directory / request["endpoint"]).unlink()  # as a kubelet does that starts
        assert kubelet.registered.get(timeout=PATIENCE) == request
    finally:
        process.terminate()
        status = process.wait(PATIENCE)
        kubelet.server.stop(grace=None).wait()
    said = (directory / "log").read_text()
    assert status == 0, said
    assert "Traceback" not in said
    assert list((directory / "pods").iterdir()) == []


def allocate(kubelet: Kubelet, channel: Any, *names: str) -> dict[str, Any]:
    request = {"container_requests": [{"devices_ids": list(names)}]}
    answer = kubelet.call(channel, "Allocate", "AllocateRequest", "AllocateResponse", request)
    (one,) = answer["container_responses"]
    return dict(one)


def run_pod(mounted: Path, directory: Path, devices: Path) -> None:
    """The sidecar as vm-pod.yaml has it; then somebody attaches to its second device."""
    monitor = mounted / "qmp.sock"
    sidecar = subprocess.Popen(
        server_command(["--name", "vm1", "--qmp", f"unix:{monitor}", "--allow-path", str(devices)])
    )
    try:
        until(lambda: accepts(monitor), "the sidecar serves")
        until((devices / "1.sock").exists, "the plugin has given both devices")
        attached = directory / "attached"
        attached.mkdir()
        with own_server(attached, ["--allow-connect"], name="qemu") as qemu, Client.connect(qemu.path) as client:
            client.device_add(driver="vfio-pci", id="d0", socket=str(devices / "1.sock"))
            assert client.region_read(device="d0", region="bar0", offset=0, size=4).value == 0xF10D0001
    finally:
        sidecar.terminate()
        assert sidecar.wait(PATIENCE) == 0


def test_a_link_is_not_followed(plugin: Any, directory: Path) -> None:
    """The plugin is root, and a pod may put anything into its directory: another pod's socket, too."""
    there = directory / "there"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(there))
        listening.listen()
        (directory / "link").symlink_to(there)
        (directory / "file").touch()
        for name in ("link", "file", "nothing"):
            with pytest.raises(OSError, match=r"no socket there|No such file"):
                plugin.connect(directory / name)
        plugin.connect(there).close()


@pytest.mark.parametrize(
    "data",
    [b"\x0a", b"\x0a\x05ab", b"\x0b", b"\xff" * 20, b"\x08\x01"],
    ids=["cut", "short", "group", "endless", "wire"],
)
def test_messages_that_are_none(plugin: Any, data: bytes) -> None:
    with pytest.raises(ValueError, match="Mount"):
        plugin.decode("Mount", data)


def test_messages_come_back(plugin: Any) -> None:
    value = {
        "container_responses": [
            {
                "envs": {"A": "b" * 300, "": ""},
                "mounts": [{"container_path": "/c", "host_path": "/h", "read_only": True}],
            }
        ]
    }
    assert plugin.decode("AllocateResponse", plugin.encode("AllocateResponse", value)) == value
    unknown = plugin.varint(99 << 3 | 2) + b"\x03abc" + plugin.varint(98 << 3) + b"\x01"
    assert plugin.decode("AllocateResponse", unknown) == {"container_responses": []}


@pytest.mark.parametrize("name", ["daemonset.yaml", "vm-pod.yaml"])
def test_the_manifests_fit_the_schema_of_kubernetes(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="the dependency group 'examples' is not installed")
    yaml = pytest.importorskip("yaml")
    for document in yaml.safe_load_all((EXAMPLES / name).read_text()):
        validate.validate(document, "1.31", strict=True)
