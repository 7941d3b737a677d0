"""Exports: what a hypervisor's requests cost, to a C server of the same messages; and what costs nothing."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import Process, compiled, vfiod

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.vfio_user import Command, Header

__all__ = ["Client", "lines"]

EXPORTS = 20


class Client:
    """A hypervisor that costs little: prepared bytes out, bytes in."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.call(_message(Command.VERSION, vfio_user.Version(0, 0, vfio_user.OURS)))

    def call(self, request: bytes) -> bytes:
        self.socket.sendall(request)
        return self._reply()

    def with_fd(self, request: bytes, fd: int) -> bytes:
        socket.send_fds(self.socket, [request], [fd])
        return self._reply()

    def _reply(self) -> bytes:
        reply = self.socket.recv(65536)
        if reply[8] & 0x20:
            raise RuntimeError(os.strerror(struct.unpack_from("=I", reply, 12)[0]))
        return reply

    def ask(self, payload: vfio_user.Payload) -> bytes:
        return self.call(_message(vfio_user.COMMAND_OF[type(payload)], payload))


def _message(command: Command, payload: vfio_user.Payload) -> bytes:
    body = payload.pack()
    return Header(1, command, 16 + len(body)).pack() + body


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds = int(8 * scale)
    program = compiled("exports")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process = stack.enter_context(vfiod(arguments=("--allow-path", str(directory))))
        clients = _exported(process, directory)
        peer = None
        if program is not None:
            path = str(directory / "peer")
            floor = Process([program, "{fd}"], path)
            stack.callback(floor.close)
            peer = Client(path)
        yield from _registers(clients, peer, rounds)
        yield from _maps(clients[0], peer, rounds)
        yield from _nothing(process, clients[0])


def _exported(process: Process, directory: Path) -> list[Client]:
    """Clients of exports: the first may map its device's BAR, the others may not."""
    wire = process.connect()
    clients = []
    for number in range(EXPORTS):
        made = wire.command("mdev-create", parent="primer", type="primer-pci", parameters={"memory": 1 << 20})
        path = str(directory / f"d{number}")
        wire.command(
            "device_add", driver="vfio-pci", id=f"d{number}", mdev=made["uuid"], share_fd=not number, export=path
        )
        clients.append(Client(path))
        clients[-1].ask(vfio_user.RegionWrite(7, 4, b"\x06\x00"))  # memory decoding, bus mastering
    return clients


def _times(client: Client, *requests: bytes) -> Callable[[], float]:
    def once() -> None:
        for request in requests:
            client.call(request)

    return lambda: per_call(once, 400)


def _registers(clients: list[Client], peer: Client | None, rounds: int) -> Iterator[Line]:
    mapped = _message(Command.REGION_READ, vfio_user.RegionRead(2, 64, 4))
    stored = _message(Command.REGION_WRITE, vfio_user.RegionWrite(2, 64, b"1234"))
    trapped = _message(Command.REGION_READ, vfio_user.RegionRead(0, 4, 4))
    contestants = {
        "read": _times(clients[1], mapped),
        "write": _times(clients[1], stored),
        "trapped": _times(clients[1], trapped),
    }
    if peer is None:
        yield Line("register read through an export, to a C server", None, note="no C compiler")
        return
    contestants |= {"C read": _times(peer, mapped), "C write": _times(peer, stored)}
    measured = paired(contestants, rounds)
    yield Line(
        "register read through an export, to a C server of the same messages",
        measured.ratio("read", "C read"),
        budget=1.5,
    )
    yield Line("register write, the same", measured.ratio("write", "C write"), budget=1.5)
    yield Line("register read of a device written in Python, the same", measured.ratio("trapped", "C read"))
    many = paired({"last": _times(clients[-1], mapped), "first": _times(clients[1], mapped)}, rounds)
    yield Line(f"the same with {EXPORTS} exports: the last to the first", many.ratio("last", "first"), budget=1.2)


def _maps(client: Client, peer: Client | None, rounds: int) -> Iterator[Line]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 30)
    request = _message(Command.DMA_MAP, vfio_user.DmaMap(1 << 32, 1 << 21, 1 << 21))
    undo = _message(Command.DMA_UNMAP, vfio_user.DmaUnmap(1 << 32, 1 << 21))

    def pair(of: Client) -> Callable[[], float]:
        def once() -> None:
            of.with_fd(request, fd)
            of.call(undo)

        return lambda: per_call(once, 50)

    if peer is not None:
        measured = paired({"vfiod": pair(client), "C": pair(peer)}, rounds)
        yield Line("DMA_MAP and DMA_UNMAP of 2 MiB, to a C server that maps it", measured.ratio("vfiod", "C"))
        yield Line("the same: pairs per second", 1e9 / measured.median("vfiod"), unit="/s")
    os.close(fd)


def _nothing(process: Process, client: Client) -> Iterator[Line]:
    """Accesses of a mapped BAR: vfiod sleeps."""
    argsz = 32
    reply = client.ask(vfio_user.GetRegionInfo(2, argsz))
    assert vfio.RegionInfo.unpack(reply[16:]).mappable
    request = _message(Command.DEVICE_GET_REGION_INFO, vfio_user.GetRegionInfo(2, 65536))
    client.socket.sendall(request)
    data, fds, _, _ = socket.recv_fds(client.socket, 65536, 1)
    info = vfio.RegionInfo.unpack(data[16:])
    with mmap.mmap(fds[0], info.size, offset=info.offset) as view:
        time.sleep(0.1)  # it goes to sleep after its last reply
        wakeups, spent = process.wakeups(), process.cpu_ns()
        for number in range(100_000):
            view[number % 4096] = 1
        yield Line(
            "100,000 accesses of a BAR mapped by its hypervisor: wake-ups of vfiod", process.wakeups() - wakeups, "", 0
        )
        yield Line("the same: its processor time", process.cpu_ns() - spent, "ns", 0)
    for fd in fds:
        os.close(fd)
