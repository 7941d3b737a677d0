"""A manager's side of the lab: root opens and passes, an unprivileged vfiod holds and serves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from msgspec import UNSET
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_UID, unprivileged

from vfiod.client.events import Event
from vfiod.client.methods.values import IrqStartResult
from vfiod.client.sync import Client
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.fd import FileDescriptor

#: Bytes an unprivileged vfiod may pin: what a manager would set for a small VM.
MEMLOCK = 256 << 20


class Vm:
    """One vfiod, and the manager's session with it."""

    def __init__(self, process: subprocess.Popen[bytes], client: Client, path: Path) -> None:
        self.process = process
        self.client = client
        self.path = path

    def fds(self) -> list[str]:
        """What the server has open: every link of /proc/PID/fd."""
        links = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                links.append(os.readlink(entry))
            except FileNotFoundError:
                continue
        return sorted(links)

    @contextmanager
    def bound(self, *addresses: str) -> Iterator[None]:
        """Have devices bound to vfio-pci for a block; on failure vfiod ends first, as unbinding waits for it."""
        with pci.bound(*addresses):
            try:
                yield
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise

    def add(self, address: str, name: str, *, container: bool = True, group: bool = True) -> None:
        """Pass the device's group (once per group) and a container, as libvirt would, and add the device."""
        with ExitStack() as stack:
            # The kernel lets a group be open once: one that vfiod has must not be opened here.
            group_fd = stack.enter_context(opened_group(address)) if group else UNSET
            container_fd = stack.enter_context(opened("/dev/vfio/vfio")) if group and container else UNSET
            self.client.device_add(
                driver="vfio-pci", id=name, host=address, group_fd=group_fd, container_fd=container_fd
            )

    def remove(self, name: str) -> bool:
        """Unplug a device and wait for its one event; whether the kernel let it go."""
        with self.client.events("DEVICE_DELETED", "DEVICE_UNPLUG_ERROR") as events:
            self.client.device_del(id=name)
            event = events.get(timeout=60)
        return told(event, DeviceDeleted).released

    def read(self, name: str, offset: int, size: Literal[1, 2, 4, 8] = 4) -> int:
        """One register of BAR 0."""
        value = self.client.region_read(device=name, region="bar0", offset=offset, size=size).value
        assert isinstance(value, int)
        return value

    def write(self, name: str, offset: int, value: int, size: Literal[1, 2, 4, 8] = 4) -> None:
        """One register of BAR 0."""
        self.client.region_write(device=name, region="bar0", offset=offset, size=size, value=value)

    def let_it_work(self, name: str) -> None:
        """Memory decoding and bus mastering on, as the guest's driver would: without, neither DMA nor MSI leave it."""
        self.client.region_write(device=name, region="config", offset=4, size=2, value=0x6)


D = TypeVar("D", bound=EventData)


def told(event: Event, kind: type[D]) -> D:
    """What an event of this kind says; fails when it is of another kind."""
    assert isinstance(event.data, kind), event
    return event.data


def trigger_of(started: IrqStartResult) -> int:
    """The trigger eventfd that came with the answer, for the first vector."""
    trigger = started.irqs[0].trigger_fd
    assert isinstance(trigger, FileDescriptor), started
    return trigger.number


@contextmanager
def opened(path: str) -> Iterator[FileDescriptor]:
    with FileDescriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as fd:
        yield fd


@contextmanager
def opened_group(address: str) -> Iterator[FileDescriptor]:
    with opened(f"/dev/vfio/{pci.group_of(address)}") as fd:
        yield fd


@contextmanager
def running_vm(
    directory: Path, *, memlock: int = MEMLOCK, root: bool = False, sockets: Path | None = None
) -> Iterator[Vm]:
    """Start vfiod as an unprivileged user with an inherited socket; end it by SIGTERM and look at its status.

    ``root``: as root, with all capabilities, for what the kernel allows to nobody else. ``sockets``: a directory where
    its sandbox lets it make some.
    """
    path = directory / "monitor.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        command = [sys.executable, "-m", "vfiod.server", "--name", "lab", "--qmp", f"fd={listener.fileno()}"]
        if sockets is not None:
            command += ["--allow-path", str(sockets)]
        if root:
            process = subprocess.Popen(command, pass_fds=[listener.fileno()])
        else:
            process = unprivileged(command, pass_fds=[listener.fileno()], memlock=memlock)
    try:
        with Client.connect(path, timeout=100) as client:
            assert f"\nUid:\t{0 if root else UNPRIVILEGED_UID}\t" in Path(f"/proc/{process.pid}/status").read_text()
            yield Vm(process, client, path)
    finally:
        killed = process.poll()
        process.terminate()
        status = process.wait(timeout=60)
    assert killed is None, f"vfiod ended by itself, or was killed, with {killed}"
    assert status == 0, f"vfiod ended with {status}"
