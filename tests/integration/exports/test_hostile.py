"""Clients that send what they must not. The server stays in step, refuses what is wrong, and leaks nothing.

Rules are those of behaviour.md, section 2.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.vfio_user import Command, Header, Version

from .conftest import Server, eventually
from .hypervisor import Hypervisor, Refused, eventfd, memfd


def refuses(errno: str, hypervisor: Hypervisor, payload: vfio_user.Payload, fds: tuple[int, ...] = ()) -> None:
    with pytest.raises(Refused, match=f"^{errno}$"):
        hypervisor.do(payload, fds)


def listening(server: Server) -> bool:
    return all(one.state == "listening" for one in server.client.query_device_exports())


def raw(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(20)
    made.connect(str(path))
    return made


def reads_to_the_end(sock: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            part = sock.recv(1 << 16)
        except ConnectionResetError:
            return data
        if not part:
            return data
        data += part


def message(command: int, body: bytes, *, size: int | None = None, flags: int = 0) -> bytes:
    return Header(7, command, 16 + len(body) if size is None else size, flags).pack() + body


GREETING = message(Command.VERSION, Version(0, 0, vfio_user.OURS).pack())

VALID = {
    Command.DMA_MAP: vfio_user.DmaMap(0, 4096).pack(),
    Command.DMA_UNMAP: vfio_user.DmaUnmap(0, 4096).pack(),
    Command.DEVICE_GET_INFO: vfio_user.GetDeviceInfo().pack(),
    Command.DEVICE_GET_REGION_INFO: vfio_user.GetRegionInfo(0).pack(),
    Command.DEVICE_GET_REGION_IO_FDS: vfio_user.GetRegionIoFds(0).pack(),
    Command.DEVICE_GET_IRQ_INFO: vfio_user.GetIrqInfo(0).pack(),
    Command.DEVICE_SET_IRQS: vfio_user.SetIrqs(0, 0, 1, vfio.IrqAction.MASK, vfio.IrqData.BOOL, (True,)).pack(),
    Command.REGION_READ: vfio_user.RegionRead(0, 0, 4).pack(),
    Command.REGION_WRITE: vfio_user.RegionWrite(0, 4, b"1234").pack(),
    Command.REGION_WRITE_MULTI: vfio_user.WriteMulti((vfio_user.OneWrite(0, 4, b"1234"),)).pack(),
    Command.DEVICE_FEATURE: vfio_user.DeviceFeature(1, vfio.FeatureFlags.GET).pack(),
    Command.MIG_DATA_READ: vfio_user.MigrationRead(16).pack(),
    Command.MIG_DATA_WRITE: vfio_user.MigrationWrite(b"1234").pack(),
}


def test_every_message_cut_short_is_refused_and_the_stream_goes_on(server: Server) -> None:
    path = server.primer()
    for command, body in VALID.items():
        with raw(path) as sock:
            sock.sendall(GREETING)
            sock.recv(4096)
            asked = 0
            # A DMA_MAP that fails ends the connection: one cut only.
            cuts = range(len(body)) if command is not Command.DMA_MAP else range(len(body) - 1, len(body))
            for cut in cuts:
                sock.sendall(message(command, body[:cut]))
                asked += 1
            if command is not Command.DMA_MAP:
                sock.sendall(message(Command.REGION_READ, vfio_user.RegionRead(0, 0, 4).pack()))
            sock.shutdown(socket.SHUT_WR)
            replies = reads_to_the_end(sock)
        heads = [Header.unpack(replies[at : at + 16]) for at in starts(replies)]
        assert [head.command for head in heads[:asked]] == [command] * asked
        assert all(head.is_error and head.size == 16 for head in heads[:asked]), command.name
        if command is not Command.DMA_MAP:
            assert replies[-4:] == struct.pack("=I", 0xF10D_0001), command.name


def starts(stream: bytes) -> list[int]:
    found, at = [], 0
    while at < len(stream):
        found.append(at)
        at += Header.unpack(stream[at : at + 16]).size
    assert at == len(stream)
    return found


@pytest.mark.parametrize(
    "first",
    [
        message(Command.REGION_READ, VALID[Command.REGION_READ]),
        message(Command.VERSION, b""),
        message(Command.VERSION, Version(1, 0, vfio_user.OURS).pack()),
        message(Command.VERSION, struct.pack("=HH", 0, 0) + b'{"capabilities": nonsense}\0'),
        message(Command.VERSION, struct.pack("=HH", 0, 0) + b'{"capabilities": {"pgsizes": 8192}}\0'),
        message(Command.VERSION, b"x", size=15),
        message(Command.VERSION, b"x", size=1 << 30),
        message(Command.VERSION, b"x" * 16, flags=3),
        os.urandom(64),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_handshake_that_goes_wrong_ends_the_connection_and_nothing_else(server: Server, first: bytes) -> None:
    path = server.primer()
    with raw(path) as sock:
        sock.sendall(first)
        sock.shutdown(socket.SHUT_WR)
        reads_to_the_end(sock)
    with server.attach(path) as hypervisor:
        assert hypervisor.read(0, 0) == 0xF10D_0001


def test_out_of_range_regions_and_interrupts(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    for region, offset, count in ((9, 0, 4), (0, 4096, 4), (0, 4093, 4), (0, 1 << 63, 4), (1, 0, 4), (2**32 - 1, 0, 1)):
        refuses("EINVAL", hypervisor, vfio_user.RegionRead(region, offset, count))
        refuses("EINVAL", hypervisor, vfio_user.RegionWrite(region, offset, bytes(count)))
    refuses("E2BIG", hypervisor, vfio_user.RegionRead(0, 0, 2**32 - 1))
    for index in (9, 100, 2**32 - 1):
        refuses("EINVAL", hypervisor, vfio_user.GetRegionInfo(index))
        refuses("EINVAL", hypervisor, vfio_user.GetIrqInfo(index))
        refuses("EINVAL", hypervisor, vfio_user.GetRegionIoFds(index))
    trigger, none = vfio.IrqAction.TRIGGER, vfio.IrqData.NONE
    refuses("EINVAL", hypervisor, vfio_user.SetIrqs(9, 0, 1, trigger, none))
    refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 3, 2, trigger, none))
    refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 0, 0, vfio.IrqAction.MASK, none))
    refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 0, 1, vfio.IrqAction.MASK, none))
    assert hypervisor.read(0, 0) == 0xF10D_0001


def test_wrong_fds_are_refused_and_closed(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    before = server.open_fds()
    eventfds = vfio.IrqData.EVENTFD
    trigger = vfio.IrqAction.TRIGGER
    with memfd(4096) as file, eventfd() as one:
        refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 0, 2, trigger, eventfds), (one.number,))
        refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 0, 1, trigger, eventfds), (file.number,))
        refuses("EINVAL", hypervisor, vfio_user.SetIrqs(1, 0, 1, trigger, vfio.IrqData.NONE), (one.number,))
        refuses("EINVAL", hypervisor, vfio_user.RegionRead(0, 0, 4), (one.number,))
        refuses("EINVAL", hypervisor, vfio_user.GetDeviceInfo(), (file.number, file.number))
        # 17 for one message: more than was agreed on.
        refuses("EINVAL", hypervisor, vfio_user.RegionRead(0, 0, 4), (one.number,) * 17)
        refuses("EINVAL", hypervisor, vfio_user.RegionRead(0, 0, 4), (one.number,) * 200)
    assert hypervisor.read(0, 0) == 0xF10D_0001
    assert server.open_fds() == before


def maps_nothing(server: Server, path: Path, errno: str, payload: vfio_user.DmaMap, *fds: int) -> None:
    """A mapping that fails is answered, and ends the connection."""
    with server.attach(path) as hypervisor:
        with pytest.raises(Refused, match=f"^{errno}$"):
            hypervisor.do(payload, fds)
        assert hypervisor.gone()
    eventually(lambda: listening(server))


def test_maps_that_cannot_be(server: Server) -> None:
    path = server.primer()
    before = server.open_fds()
    with memfd(1 << 16) as memory, eventfd() as wrong:
        number = memory.number
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0x800, 0x1000), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x800), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x1000, 0x800), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 1 << 17), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x1000, 1 << 16), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x1000, flags=0), number)
        maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x1000), wrong.number)
        readonly = os.open(f"/proc/self/fd/{number}", os.O_RDONLY)
        try:
            maps_nothing(server, path, "EINVAL", vfio_user.DmaMap(0, 0x1000), readonly)
        finally:
            os.close(readonly)
        with server.attach(path) as hypervisor:
            hypervisor.map(0x1000, 0x2000, number)
            with pytest.raises(Refused, match="EEXIST"):
                hypervisor.map(0x2000, 0x2000, number)
            assert hypervisor.gone()
    eventually(lambda: listening(server) and server.open_fds() <= before)
    assert server.client.query_dma() == []


def test_unmaps_match_exactly_or_fail(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with memfd(1 << 16) as memory:
        hypervisor.map(0x10000, 0x10000, memory.number)
    refuses("ENOENT", hypervisor, vfio_user.DmaUnmap(0, 0x1000))
    refuses("EINVAL", hypervisor, vfio_user.DmaUnmap(0x10000, 0x1000))
    refuses("EINVAL", hypervisor, vfio_user.DmaUnmap(0x11000, 0xF000))
    refuses("EINVAL", hypervisor, vfio_user.DmaUnmap(0x10000, 0x20000))
    hypervisor.unmap(0x10000, 0x10000)
    refuses("ENOENT", hypervisor, vfio_user.DmaUnmap(0x10000, 0x10000))
    with memfd(1 << 16) as memory:
        hypervisor.map(0, 0x1000, memory.number)
        hypervisor.map(0x5000, 0x1000, memory.number, offset=0x1000)
    hypervisor.do(vfio_user.DmaUnmap(0, 0, vfio_user.DmaUnmap.ALL))
    assert server.client.query_dma() == []


def test_a_client_that_stops_reading_stops_itself(server: Server) -> None:
    path, other = server.primer(), server.primer("dev1")
    hypervisor, quick = server.attach(path), server.attach(other)
    hypervisor.socket.setblocking(False)
    _, out = hypervisor.channel.request(vfio_user.RegionRead(2, 0, 1 << 20))
    sent = 0
    try:
        while sent < 64 << 20:
            sent += hypervisor.socket.send(out.data)
    except BlockingIOError:
        pass
    assert sent < 64 << 20, "it goes on reading"
    for _ in range(100):
        assert quick.read(0, 0) == 0xF10D_0001
    rss = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096
    assert rss < 256 << 20
    hypervisor.close()
    eventually(lambda: [one.state for one in server.client.query_device_exports()] == ["listening", "attached"])


def test_a_client_that_answers_no_question_gives_a_fault(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    hypervisor.map(0, 0x10000)
    hypervisor.master()
    hypervisor.mute = True
    assert hypervisor.dma(0, 0, 64, 1) == 0x202
    assert len(hypervisor.asked) == 1


def test_a_client_that_comes_and_says_nothing_is_sent_away(server: Server) -> None:
    path = server.primer()
    with raw(path) as silent, server.attach(path) as waiting:
        assert waiting.read(0, 0) == 0xF10D_0001, "its turn came when the silent one's patience was over"
        assert silent.recv(1) == b""


def test_replies_to_nothing_are_passed_over(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    hypervisor.socket.sendall(message(Command.DMA_READ, bytes(16), flags=1))
    hypervisor.socket.sendall(message(Command.DMA_READ, b"", flags=0x21))
    assert hypervisor.read(0, 0) == 0xF10D_0001
