"""A small hypervisor of the tests: a vfio-user client over the protocol package, blocking, one thread."""

from __future__ import annotations

import mmap
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.fd import FileDescriptor, close_all, rights_of
from vfiod.protocol.vfio_user import Capabilities, Channel, Command, Failure, Outgoing, Reply, Request, Version

PATIENCE = 120.0
QEMU = Capabilities(
    max_msg_fds=16,
    max_data_xfer_size=1 << 20,
    max_dma_maps=65535,
    pgsizes=4096,
    write_multiple=True,
)

P = TypeVar("P")


class Refused(Exception):
    """An error reply; ``str`` is the errno's name."""


class Gone(Exception):
    """The server has hung up."""


class Hypervisor:
    """One connection."""

    def __init__(self, where: Path | socket.socket, *, capabilities: Capabilities | None = QEMU, greet: bool = True):
        if isinstance(where, socket.socket):
            self.socket = where
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(where))
        self.socket.settimeout(PATIENCE)
        self.channel = Channel.client()
        self.asked: list[Request] = []
        self.memory: dict[int, bytearray] = {}  # what DMA_READ and DMA_WRITE reach, by address
        self.mute = False  # answers no question
        self.fds: list[FileDescriptor] = []
        if greet:
            self.greet(capabilities)

    def greet(self, capabilities: Capabilities | None = QEMU) -> Version:
        reply = self.do(Version(0, 0, capabilities))
        assert isinstance(reply, Version)
        return reply

    # --- messages -------------------------------------------------------------------------------------

    def send(self, out: Outgoing) -> None:
        if out.fds:
            socket.send_fds(self.socket, [out.data], list(out.fds))
        else:
            self.socket.sendall(out.data)

    def ask(
        self, payload: vfio_user.Payload, fds: Sequence[int] = (), command: Command | None = None, **options: bool
    ) -> int:
        id, out = self.channel.request(payload, fds, command=command, **options)
        self.send(out)
        return id

    def receive(self) -> list[vfio_user.Happening]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise Gone
        return self.channel.receive(data, rights_of(ancillary))

    def wait(self, id: int) -> Reply:
        """The reply to one request. Others must not be outstanding."""
        found: Reply | Failure | None = None
        while found is None:
            for one in self.receive():  # all of it: a question may stand behind the answer
                if isinstance(one, Request):
                    self.serve(one)
                else:
                    assert isinstance(one, Reply | Failure), one
                    assert one.id == id, one
                    found = one
        if isinstance(found, Failure):
            raise Refused(found.errno)
        self.fds = found.fds
        return found

    def do(
        self, payload: vfio_user.Payload, fds: Sequence[int] = (), command: Command | None = None
    ) -> vfio_user.Payload:
        return self.wait(self.ask(payload, fds, command)).payload

    def serve(self, request: Request) -> None:
        """A question of the server's."""
        self.asked.append(request)
        if self.mute:
            return
        payload = request.payload
        assert isinstance(payload, vfio_user.DmaRead | vfio_user.DmaWrite)
        count = payload.count if isinstance(payload, vfio_user.DmaRead) else len(payload.data)
        for base, memory in self.memory.items():
            at = payload.address - base
            if at >= 0 and at + count <= len(memory):
                if isinstance(payload, vfio_user.DmaRead):
                    answer: vfio_user.Payload = vfio_user.DmaData(payload.address, bytes(memory[at : at + count]))
                else:
                    memory[at : at + count] = payload.data
                    answer = vfio_user.DmaWritten(payload.address, count)
                out = self.channel.reply(request, answer)
                break
        else:
            out = self.channel.refuse(request, "EFAULT")
        assert out is not None
        self.send(out)

    # --- what a hypervisor does -----------------------------------------------------------------------

    def map(self, address: int, size: int, fd: int | None = None, *, offset: int = 0, flags: int = 3) -> None:
        self.do(vfio_user.DmaMap(address, size, offset, flags), () if fd is None else (fd,))

    def unmap(self, address: int, size: int) -> None:
        self.do(vfio_user.DmaUnmap(address, size))

    def device(self) -> vfio.DeviceInfo:
        reply = self.do(vfio_user.GetDeviceInfo())
        assert isinstance(reply, vfio_user.DeviceInfoReply)
        return reply.info

    def region(self, index: int) -> tuple[vfio.RegionInfo, FileDescriptor | None]:
        argsz = 32
        while True:
            reply = self.do(vfio_user.GetRegionInfo(index, argsz))
            assert isinstance(reply, vfio_user.RegionInfoReply)
            if reply.complete:
                return reply.info, self.fds[0] if self.fds else None
            assert not self.fds, "an fd came with a reply that is asked for again"
            argsz = reply.needed

    def irq(self, index: int) -> vfio.IrqInfo:
        reply = self.do(vfio_user.GetIrqInfo(index))
        assert isinstance(reply, vfio_user.IrqInfoReply)
        return reply.info

    def irqs(self, request: vfio.SetIrqs) -> None:
        for message, fds in vfio_user.split_irqs(request, 16):
            self.do(message, fds)

    def trigger(self, index: int, *fds: int, start: int = 0) -> None:
        self.irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, index, fds, start))

    def read(self, region: int, offset: int, count: int = 4) -> int:
        return int.from_bytes(self.bytes(region, offset, count), "little")

    def bytes(self, region: int, offset: int, count: int) -> bytes:
        reply = self.do(vfio_user.RegionRead(region, offset, count))
        assert isinstance(reply, vfio_user.RegionData)
        assert (reply.region, reply.offset) == (region, offset)
        return reply.data

    def write(self, region: int, offset: int, value: int, count: int = 4) -> None:
        self.do(vfio_user.RegionWrite(region, offset, value.to_bytes(count, "little")))

    def post(self, region: int, offset: int, value: int, count: int = 4) -> None:
        self.ask(vfio_user.RegionWrite(region, offset, value.to_bytes(count, "little")), no_reply=True)

    def reset(self) -> None:
        self.do(vfio_user.Nothing(), command=Command.DEVICE_RESET)

    def master(self, on: bool = True) -> None:
        command = self.read(7, 4, 2)
        self.write(7, 4, command | 4 if on else command & ~4, 2)

    def dma(self, address: int, local: int, count: int, command: int) -> int:
        """Let the primer's engine move bytes; its status."""
        self.write(0, 0x20, address, 8)
        self.write(0, 0x28, local)
        self.write(0, 0x2C, count)
        self.write(0, 0x30, command)
        return self.read(0, 0x34)

    def gone(self) -> bool:
        """Wait until the server hangs up; error replies that come before are passed over."""
        try:
            while True:
                for one in self.receive():
                    if isinstance(one, Request | Reply):
                        one.close()
        except Gone:
            return True
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()
        self.channel.close()
        close_all(self.fds)
        for request in self.asked:
            request.close()

    def __enter__(self) -> Hypervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eventfd() -> FileDescriptor:
    return FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK))


def memfd(size: int, fill: bytes = b"") -> FileDescriptor:
    fd = FileDescriptor(os.memfd_create("guest"))
    os.ftruncate(fd.number, size)
    if fill:
        os.pwrite(fd.number, fill, 0)
    return fd


def rung(fd: FileDescriptor) -> int:
    """Wait for an eventfd, and take its count."""
    assert select.select([fd.number], [], [], PATIENCE)[0], "it was never signalled"
    return os.eventfd_read(fd.number)


def silent(fd: FileDescriptor) -> bool:
    return not select.select([fd.number], [], [], 0)[0]


def mapped(fd: FileDescriptor, info: vfio.RegionInfo, area: vfio.Area) -> mmap.mmap:
    return mmap.mmap(fd.number, area.size, offset=info.offset + area.offset)
