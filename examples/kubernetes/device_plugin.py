"""A Kubernetes device plugin that gives devices to the vfiod of a pod. Runs on each node, as root (``daemonset.yaml``).

    device_plugin.py --resource vfiod.example/nic --host 0000:03:00.0 --host 0000:03:00.1
    device_plugin.py --resource vfiod.example/primer --mdev primer-pci=4          no hardware

A pod that wants such a device runs a vfiod of its own as a sidecar, without privileges (``vm-pod.yaml``). When the
kubelet allocates a device, this program makes a directory for that pod alone, which the kubelet mounts into the sidecar
at ``/run/vfiod``. The sidecar's vfiod makes its monitor socket there; this program connects to it, opens the device's
group, passes it, and has vfiod export the device at ``/run/devices/0.sock``, where the pod's QEMU attaches.

Needs ``grpcio`` beside vfiod. The wire format of the few messages is below, since it is short.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from vfiod.client import Client, FileDescriptor
from vfiod.client.errors import ClientError
from vfiod.client.host.sysfs import HostError, Sysfs
from vfiod.protocol.errors import VfiodError

IN_POD = "/run/vfiod"  # where the kubelet mounts a pod's directory in its sidecar
MONITOR = "qmp.sock"
POLL = 0.2  # seconds between two looks for a socket
PATIENCE = 60.0  # seconds for any one answer
ENDING = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger("vfiod-device-plugin")

# --- the device plugin API, v1beta1 -----------------------------------------------------------------------------------

# Message: member: (number, what): "text", "flag", "number", a message; a list of one of them; "map" of texts.
Shape = dict[str, tuple[int, Any]]
SHAPES: dict[str, Shape] = {
    "Empty": {},
    "Options": {"pre_start_required": (1, "flag"), "get_preferred_allocation_available": (2, "flag")},
    "Register": {
        "version": (1, "text"),
        "endpoint": (2, "text"),
        "resource_name": (3, "text"),
        "options": (4, "Options"),
    },
    "Devices": {"devices": (1, ["Device"])},
    "Device": {"ID": (1, "text"), "health": (2, "text")},
    "AllocateRequest": {"container_requests": (1, ["ContainerRequest"])},
    "ContainerRequest": {"devices_ids": (1, ["text"])},
    "AllocateResponse": {"container_responses": (1, ["ContainerResponse"])},
    "ContainerResponse": {"envs": (1, "map"), "mounts": (2, ["Mount"])},
    "Mount": {"container_path": (1, "text"), "host_path": (2, "text"), "read_only": (3, "flag")},
    "Entry": {"key": (1, "text"), "value": (2, "text")},
}
Message = dict[str, Any]


def varint(number: int) -> bytes:
    """Seven bits in each byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def encode(shape: str, value: Message) -> bytes:
    """A message in protobuf's wire format."""
    out = bytearray()
    for name, item in value.items():
        number, what = SHAPES[shape][name]
        if what == "map":
            what, item = ["Entry"], [{"key": key, "value": text} for key, text in item.items()]
        kind = what[0] if isinstance(what, list) else what
        for one in item if isinstance(what, list) else [item]:
            if kind == "flag":
                out += varint(number << 3) + varint(one)
                continue
            data = one.encode() if kind == "text" else encode(kind, one)
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return bytes(out)


def decode(shape: str, data: bytes) -> Message:
    """A message of bytes. Members that are not known are passed over, as protobuf wants it. Raises ValueError."""
    members = {number: (name, what) for name, (number, what) in SHAPES[shape].items()}
    value: Message = {name: [] for name, what in members.values() if isinstance(what, list)}
    value |= {name: {} for name, what in members.values() if what == "map"}
    at = 0

    def number_at() -> int:
        nonlocal at
        result = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError(f"{shape}: a number has no end")
            byte = data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    while at < len(data):
        number, wire = divmod(number_at(), 8)
        content: int | bytes
        if wire == 0:
            content = number_at()
        elif wire in (1, 2, 5):
            length = number_at() if wire == 2 else 8 if wire == 1 else 4
            content = data[at : at + length]
            at += length
            if at > len(data):
                raise ValueError(f"{shape}: member {number} is cut off")
        else:
            raise ValueError(f"{shape}: member {number} has wire type {wire}")
        if number not in members:
            continue
        name, what = members[number]
        kind = "Entry" if what == "map" else what[0] if isinstance(what, list) else what
        if isinstance(content, bytes) == (kind == "flag"):
            raise ValueError(f"{shape}: {name} has wire type {wire}")
        one: Any = (
            bool(content) if isinstance(content, int) else content.decode() if kind == "text" else decode(kind, content)
        )
        if what == "map":
            value[name][one.get("key", "")] = one.get("value", "")
        elif isinstance(what, list):
            value[name].append(one)
        else:
            value[name] = one
    return value


def codec(shape: str) -> tuple[Callable[[Message], bytes], Callable[[bytes], Message]]:
    """What gRPC wants of a message: how to write, and how to read it."""
    return lambda value: encode(shape, value), lambda data: decode(shape, data)


# --- devices, and how a pod gets them ---------------------------------------------------------------------------------


class HostDevice:
    """A PCI device of this node, bound to vfio-pci."""

    def __init__(self, address: str) -> None:
        self.name = self.address = address

    def healthy(self) -> bool:
        """Whether its group can be opened."""
        try:
            return Path(f"/dev/vfio/{Sysfs().device(self.address).group}").exists()
        except HostError:
            return False

    def give(self, client: Client, id: str, export: str) -> None:
        """Open, pass, add, export it."""
        group = Sysfs().device(self.address).group
        with (
            FileDescriptor(os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)) as opened,
            FileDescriptor(os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)) as container,
        ):
            client.device_add(
                driver="vfio-pci", id=id, host=self.address, group_fd=opened, container_fd=container, export=export
            )


class Mediated:
    """A device that the pod's vfiod makes itself: to try all this without hardware."""

    def __init__(self, type: str, number: int) -> None:
        self.name = f"{type}-{number}"
        self.type = type

    def healthy(self) -> bool:
        """It is only a program."""
        return True

    def give(self, client: Client, id: str, export: str) -> None:
        """Make, add, export it."""
        parent = next(one.parent for one in client.query_mdev_types() if one.type == self.type)
        uuid = client.mdev_create(parent=parent, type=self.type).uuid
        client.device_add(driver="vfio-pci", id=id, mdev=uuid, export=export)


def connect(path: Path) -> socket.socket:
    """To the socket itself, and never by a link that a pod may have put there. Raises OSError."""
    socket_fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(socket_fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, "no socket there", str(path))
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{socket_fd}")
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(socket_fd)
    return connection


class Pod:
    """One allocation: a directory, and a thread that waits for the pod's vfiod and gives it its devices."""

    def __init__(self, base: Path, devices: list[HostDevice | Mediated], exports: str, memory: int) -> None:
        self.directory = base / secrets.token_hex(8)
        self.directory.mkdir()
        self.directory.chmod(0o777)  # the pod's user is anybody; nobody but the pod comes through `base`
        self.devices = devices
        self.exports = [f"{exports}/{number}.sock" for number in range(len(devices))]
        self.memory = memory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """The pod is gone: wait no longer, and remove its directory."""
        self._over.set()
        self._thread.join()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self) -> None:
        while not self._over.wait(POLL):
            try:
                connection = connect(self.directory / MONITOR)
            except OSError:
                continue  # not there yet
            try:
                self._give(connection)
            except (VfiodError, ClientError, HostError, OSError) as error:
                log.error("%s: %s", self.directory.name, error)  # noqa: TRY400 - the text says it all
            return

    def _give(self, connection: socket.socket) -> None:
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if self.memory:  # what it will pin of the guest's memory; a container cannot raise its own limit
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (self.memory, self.memory))
        with Client.connect(connection, timeout=PATIENCE) as client:
            for number, (device, export) in enumerate(zip(self.devices, self.exports, strict=True)):
                device.give(client, f"device{number}", export)
                log.warning("%s has %s", self.directory.name, device.name)


# --- the plugin -------------------------------------------------------------------------------------------------------


class Plugin:
    """One resource. ``base`` has the pods' directories, ``kubelet`` the sockets of plugins."""

    def __init__(
        self, name: str, devices: list[HostDevice | Mediated], base: Path, kubelet: Path, exports: str, memory: int
    ) -> None:
        self.name = name
        self.devices = {device.name: device for device in devices}
        self.base = base
        self.kubelet = kubelet
        self.exports = exports
        self.memory = memory
        self.path = kubelet / f"{name.replace('/', '-')}.sock"
        self._pods: dict[str, Pod] = {}  # by device
        self._lock = threading.Lock()
        self._end = threading.Event()

    def run(self) -> None:
        """Serve, until :meth:`stop`: anew when the kubelet was restarted, which removes the plugins' sockets."""
        self.base.mkdir(parents=True, exist_ok=True)
        self.base.chmod(0o700)
        while not self._end.is_set():
            self.path.unlink(missing_ok=True)
            server = grpc.server(ThreadPoolExecutor(max_workers=8))
            server.add_generic_rpc_handlers((self._handlers(),))
            server.add_insecure_port(f"unix:{self.path}")
            server.start()
            try:
                self._register()
                while self.path.exists() and not self._end.wait(1.0):
                    pass
            except grpc.RpcError as error:
                log.error("The kubelet does not take %s: %s", self.name, error.details())  # noqa: TRY400
                self._end.wait(1.0)
            finally:
                server.stop(grace=0.5).wait()
        for pod in set(self._pods.values()):
            pod.close()

    def stop(self) -> None:
        """End :meth:`run`."""
        self._end.set()

    def _register(self) -> None:
        write, _ = codec("Register")
        _, read = codec("Empty")
        with grpc.insecure_channel(f"unix:{self.kubelet / 'kubelet.sock'}") as channel:
            call = channel.unary_unary("/v1beta1.Registration/Register", write, read)
            request = {"version": "v1beta1", "endpoint": self.path.name, "resource_name": self.name}
            call(request, timeout=PATIENCE, wait_for_ready=True)
        log.warning("%s: %d devices", self.name, len(self.devices))

    def _handlers(self) -> Any:
        def unary(method: Callable[[Message, Any], Message], asked: str, answer: str) -> Any:
            return grpc.unary_unary_rpc_method_handler(method, codec(asked)[1], codec(answer)[0])

        methods = {
            "GetDevicePluginOptions": unary(lambda _request, _context: {}, "Empty", "Options"),
            "Allocate": unary(self._allocate, "AllocateRequest", "AllocateResponse"),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._list, codec("Empty")[1], codec("Devices")[0]),
        }
        return grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", methods)

    def _list(self, _request: Message, context: Any) -> Iterator[Message]:
        """All devices, and again whenever the health of one changes."""
        told: Message = {}
        while context.is_active() and not self._end.is_set():
            now = {
                "devices": [
                    {"ID": name, "health": "Healthy" if device.healthy() else "Unhealthy"}
                    for name, device in self.devices.items()
                ]
            }
            if now != told:
                yield now
                told = now
            self._end.wait(1.0)

    def _allocate(self, request: Message, context: Any) -> Message:
        answers = []
        for container in request["container_requests"]:
            names = container["devices_ids"]
            if unknown := [name for name in names if name not in self.devices]:
                context.abort(grpc.StatusCode.NOT_FOUND, f"There is no device {unknown[0]} of {self.name}")
            with self._lock:
                for former in {self._pods.pop(name) for name in names if name in self._pods}:
                    former.close()  # the kubelet gives away only what no pod has any more
                pod = Pod(self.base, [self.devices[name] for name in names], self.exports, self.memory)
                self._pods |= dict.fromkeys(names, pod)
            answers.append(
                {
                    "envs": {"VFIOD_DEVICES": ":".join(pod.exports)},
                    "mounts": [{"container_path": IN_POD, "host_path": str(pod.directory), "read_only": False}],
                }
            )
        return {"container_responses": answers}


def main() -> int:
    """Run it until SIGTERM."""
    parser = argparse.ArgumentParser(description="Gives devices to the vfiods of pods.")
    parser.add_argument("--resource", required=True, metavar="DOMAIN/NAME", help="what pods ask for")
    parser.add_argument(
        "--host", action="append", default=[], metavar="ADDRESS", help="a PCI device, bound to vfio-pci"
    )
    parser.add_argument("--mdev", action="append", default=[], metavar="TYPE=COUNT", help="built-in devices, to try it")
    parser.add_argument("--memory", type=int, default=0, metavar="BYTES", help="memory that a pod's vfiod may pin")
    parser.add_argument(
        "--pods", type=Path, default=Path("/run/vfiod/pods"), help="the pods' directories (%(default)s)"
    )
    parser.add_argument("--exports", default="/run/devices", help="where a pod has its devices' sockets (%(default)s)")
    parser.add_argument(
        "--kubelet", type=Path, default=Path("/var/lib/kubelet/device-plugins"), help="sockets of plugins (%(default)s)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    devices: list[HostDevice | Mediated] = [HostDevice(address) for address in arguments.host]
    for asked in arguments.mdev:
        type, _, count = asked.partition("=")
        devices += [Mediated(type, number) for number in range(int(count or 1))]
    plugin = Plugin(arguments.resource, devices, arguments.pods, arguments.kubelet, arguments.exports, arguments.memory)
    running = threading.Thread(target=plugin.run)
    # Before any other thread: all of them then leave the signals to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    running.start()
    signal.sigwait(ENDING)
    plugin.stop()
    running.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
