"""A vfio-user server, as another program would be one: a PCI device in a hundred lines, on a real socket.

``python program.py --socket-path=PATH | --fd=N [--twin] [--no-fds] [--id=N] [--once] [--memory=PATH]
[--slow=SECONDS]``

It has registers in BAR 0, memory that can be mapped in BAR 2, an INTx, forty MSI-X vectors, and does DMA. Some
registers make it misbehave.

====== =====================================================================================
0x00   its version, read-only
0x04   scratch
0x08   where DMA goes: 64 bits
0x10   bytes of DMA
0x14   DMA: 1 read by message, 2 write by message, 3 write by the mapping, 4 write without a reply
0x18   the errno of the last DMA
0x1c   the first four bytes that DMA has read
0x20   signal this MSI-X vector; 0x8000_0000 the INTx
0x24   1 never answer again, 2 end at once, 3 answer with half a message and end, 4 nonsense instead of an answer
0x28   how many mappings it has
0x2c   how many eventfds it has
0x30   how many messages of SET_IRQS came
0x100  configuration space, 256 bytes, as the device has it
====== =====================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import mmap
import os
import socket
import struct
import sys
import time
from collections import deque

from vfiod.protocol import vfio
from vfiod.protocol import vfio_user as vu
from vfiod.protocol.fd import FileDescriptor, rights_of

BAR0, BAR2, CONFIG = 0, 2, 7
BAR0_SIZE, BAR2_SIZE, CONFIG_SIZE = 0x1000, 0x10000, 0x100
VERSION = 0x564D0001
INTX = 0x8000_0000


class Program:
    """One device, one client at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.registers = bytearray(BAR0_SIZE)
        self.registers[0:4] = VERSION.to_bytes(4, "little")
        self.config = bytearray(CONFIG_SIZE)
        struct.pack_into("<HHHHI", self.config, 0, 0x1B36, options.id, 0, 0, 0xFF00_0001)
        self.config[0x3D] = 1  # interrupt pin A
        struct.pack_into("<HH", self.config, 0x2C, 0x1AF4, 0x1100)
        # In a file, it outlives the program, and so does what is mapped of it.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        memory = os.open(options.memory, flags) if options.memory else os.memfd_create("bar2")
        self.memory = FileDescriptor(memory)
        os.ftruncate(self.memory.number, BAR2_SIZE)
        self.view = mmap.mmap(self.memory.number, BAR2_SIZE)
        self.client: Client | None = None

    def serve(self, listener: socket.socket | None, first: socket.socket | None) -> None:
        while True:
            if first is not None:
                sock, first = first, None
            elif listener is not None:
                sock, _ = listener.accept()
            else:
                return
            client = Client(self, sock)
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # gone before its last answer
                    client.run()
            finally:
                client.close()
            if self.options.once:
                return


class Client:
    """One connection."""

    def __init__(self, program: Program, sock: socket.socket) -> None:
        self.program = program
        self.sock = sock
        self.channel = vu.Channel.server()
        self.twin: socket.socket | None = None
        self.twin_channel: vu.Channel | None = None
        self.maps: dict[int, tuple[vu.DmaMap, FileDescriptor | None]] = {}
        self.eventfds: dict[tuple[int, int], FileDescriptor] = {}
        self.requests: deque[vu.Request] = deque()
        self.sets = 0
        self.hung = False

    def close(self) -> None:
        self.channel.close()
        if self.twin is not None:
            self.twin.close()
        self.sock.close()
        for _, fd in self.maps.values():
            if fd is not None:
                fd.close()
        for eventfd in self.eventfds.values():
            eventfd.close()

    # --- the wire ---
    def send(self, out: vu.Outgoing | None, sock: socket.socket | None = None) -> None:
        if out is None:
            return
        rights = struct.pack(f"={len(out.fds)}i", *out.fds)
        sent = (sock or self.sock).sendmsg(
            [out.data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if out.fds else []
        )
        (sock or self.sock).sendall(out.data[sent:])

    def receive(self, sock: socket.socket, channel: vu.Channel) -> list[vu.Happening] | None:
        data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(64 * 4))
        fds = rights_of(ancillary)
        return channel.receive(data, fds) if data else None

    def run(self) -> None:
        while True:
            happenings = self.receive(self.sock, self.channel)
            if happenings is None:
                return
            for happening in happenings:
                if isinstance(happening, vu.Request):
                    self.requests.append(happening)
                elif isinstance(happening, vu.Rejected | vu.Broken):
                    print(happening.desc, file=sys.stderr, flush=True)
                    self.send(happening.outgoing)
                    if isinstance(happening, vu.Broken):
                        return
            while self.requests:
                self.answer(self.requests.popleft())

    def ask(self, payload: vu.Payload, *, no_reply: bool = False) -> vu.Reply | vu.Failure | None:
        channel = self.twin_channel or self.channel
        sock = self.twin or self.sock
        wanted, out = channel.request(payload, no_reply=no_reply)
        self.send(out, sock)
        if no_reply:
            return None
        while True:
            for happening in self.receive(sock, channel) or sys.exit("the client hung up"):
                if isinstance(happening, vu.Reply | vu.Failure) and happening.id == wanted:
                    return happening
                if isinstance(happening, vu.Request):
                    self.requests.append(happening)

    def answer(self, request: vu.Request) -> None:
        while self.hung:
            time.sleep(60)
        time.sleep(self.program.options.slow)
        try:
            reply = self.obey(request)
        except OSError as error:
            self.send(self.channel.refuse(request, error.errno or errno.EIO))
        except vu.BadMessage as error:
            self.send(self.channel.refuse(request, error.errno))
        else:
            if isinstance(reply, tuple):
                self.send(self.channel.reply(request, reply[0], reply[1]))
            else:
                self.send(self.channel.reply(request, reply))
        finally:
            request.close()

    # --- the commands ---
    def obey(self, request: vu.Request) -> vu.Payload | tuple[vu.Payload, tuple[int, ...]] | None:
        asked = request.payload
        if isinstance(asked, vu.Version):
            return self.version(request, asked)
        if isinstance(asked, vu.GetDeviceInfo):
            return vu.DeviceInfoReply(vfio.DeviceInfo(vfio.DeviceFlags.PCI | vfio.DeviceFlags.RESET, 9, 5))
        if isinstance(asked, vu.GetRegionInfo):
            return self.region_info(asked)
        if isinstance(asked, vu.GetIrqInfo):
            counts = {0: 1, 2: 40, 3: 1, 4: 1}
            flags = vfio.IrqFlags.EVENTFD
            if asked.index == 0:
                flags |= vfio.IrqFlags.MASKABLE | vfio.IrqFlags.AUTOMASKED
            return vu.IrqInfoReply(vfio.IrqInfo(asked.index, flags, counts.get(asked.index, 0)))
        if isinstance(asked, vu.SetIrqs):
            self.set_irqs(request, asked)
            return None
        if isinstance(asked, vu.RegionRead):
            data = self.read(asked.region, asked.offset, asked.count)
            return vu.RegionData(asked.region, asked.offset, data)
        if isinstance(asked, vu.RegionWrite):
            self.write(asked.region, asked.offset, asked.data)
            return vu.RegionWritten(asked.region, asked.offset, len(asked.data))
        if isinstance(asked, vu.DmaMap):
            if asked.address in self.maps:
                raise OSError(errno.EEXIST, "mapped")
            self.maps[asked.address] = (asked, request.fds.pop() if request.fds else None)
            return None
        if isinstance(asked, vu.DmaUnmap):
            mapped, fd = self.maps.pop(asked.address, (None, None))
            if mapped is None or mapped.size != asked.size:
                raise OSError(errno.ENOENT, "not mapped")
            if fd is not None:
                fd.close()
            return asked
        if isinstance(asked, vu.DeviceFeature):
            raise OSError(errno.ENOTTY, "no features")
        if request.command is vu.Command.DEVICE_RESET:
            self.program.registers[4:] = bytes(BAR0_SIZE - 4)
            self.program.config[0x50:] = bytes(CONFIG_SIZE - 0x50)
            return None
        raise OSError(errno.ENOSYS, request.command.name)

    def version(self, request: vu.Request, asked: vu.Version) -> tuple[vu.Payload, tuple[int, ...]]:
        room = request.header.size - vu.HEADER_SIZE
        theirs: socket.socket | None = None
        if self.program.options.twin and asked.told.twin:
            self.twin, theirs = socket.socketpair()
        ours = vu.Capabilities(
            max_msg_fds=0 if self.program.options.no_fds else 8,
            max_data_xfer_size=4096,
            max_dma_maps=4,
            pgsizes=4096,
        )
        version, agreement = vu.answer(asked, ours, room=room, twin_fd=theirs is not None)
        self.channel.wire = agreement.wire
        if theirs is None:
            return version, ()
        self.twin_channel = vu.Channel(frozenset())
        copy = os.dup(theirs.fileno())
        theirs.close()
        request.fds.append(FileDescriptor(copy))  # closed with the request, when the reply is sent
        return version, (copy,)

    def region_info(self, asked: vu.GetRegionInfo) -> tuple[vu.Payload, tuple[int, ...]]:
        sizes = {BAR0: BAR0_SIZE, BAR2: BAR2_SIZE, CONFIG: CONFIG_SIZE}
        if asked.index >= 9:
            raise OSError(errno.EINVAL, "no such region")
        size = sizes.get(asked.index, 0)
        flags = vfio.RegionFlags.READ | vfio.RegionFlags.WRITE if size else vfio.RegionFlags(0)
        fds: tuple[int, ...] = ()
        capabilities: tuple[vfio.Capability, ...] = ()
        if asked.index == BAR2:
            flags |= vfio.RegionFlags.MMAP
            capabilities = (vfio.SparseMmap((vfio.Area(0x1000, 0x2000), vfio.Area(0x8000, 0x1000))),)
            fds = (self.program.memory.number,)
        reply = vu.RegionInfoReply.answering(asked, vfio.RegionInfo(asked.index, flags, size, 0, capabilities))
        return reply, fds if reply.complete else ()

    def set_irqs(self, request: vu.Request, asked: vu.SetIrqs) -> None:
        self.sets += 1
        whole = asked.with_fds([fd.number for fd in request.fds])
        if whole.is_disable:
            for key in [key for key in self.eventfds if key[0] == whole.index]:
                self.eventfds.pop(key).close()
        elif whole.action is vfio.IrqAction.TRIGGER:
            taken = list(request.fds)
            request.fds.clear()
            for place in range(whole.count):
                former = self.eventfds.pop((whole.index, whole.start + place), None)
                if former is not None:
                    former.close()
                if taken:
                    self.eventfds[whole.index, whole.start + place] = taken[place]
                elif whole.data is vfio.IrqData.NONE and former is not None:
                    raise OSError(errno.ENOTTY, "no loopback")

    def bytes_of(self, region: int) -> bytearray | mmap.mmap | None:
        program = self.program
        known: dict[int, bytearray | mmap.mmap] = {BAR0: program.registers, BAR2: program.view, CONFIG: program.config}
        return known.get(region)

    def read(self, region: int, offset: int, count: int) -> bytes:
        source = self.bytes_of(region)
        if source is None or offset + count > len(source):
            raise OSError(errno.EINVAL, "out of range")
        if region == BAR0:
            struct.pack_into("<III", self.program.registers, 0x28, len(self.maps), len(self.eventfds), self.sets)
            self.program.registers[0x100 : 0x100 + CONFIG_SIZE] = self.program.config
        return bytes(source[offset : offset + count])

    def write(self, region: int, offset: int, data: bytes) -> None:
        target = self.bytes_of(region)
        if target is None or offset + len(data) > len(target):
            raise OSError(errno.EINVAL, "out of range")
        if region == BAR0 and not offset:
            return
        target[offset : offset + len(data)] = data
        if region == CONFIG:
            self.program.config[0x50] &= 0x7F  # the top bit of a control register of its own clears itself
        value = int.from_bytes(data[:4], "little")
        if region == BAR0 and offset == 0x14:
            self.dma(value)
        elif region == BAR0 and offset == 0x20:
            key = (0, 0) if value == INTX else (2, value)
            if key in self.eventfds:
                os.eventfd_write(self.eventfds[key].number, 1)
        elif region == BAR0 and offset == 0x24:
            self.misbehave(value)

    def misbehave(self, value: int) -> None:
        if value == 1:
            self.hung = True
        elif value == 2:
            os._exit(0)
        elif value == 3:
            self.sock.sendall(vu.Header(0, vu.Command.REGION_WRITE, 64, 1).pack()[:9])
            os._exit(0)
        elif value == 4:
            self.sock.sendall(vu.Header(0, vu.Command.REGION_WRITE, 0x7FFF_FFFF, 1).pack())

    def dma(self, value: int) -> None:
        registers = self.program.registers
        address, count = struct.unpack_from("<QI", registers, 0x08)
        data = bytes(index & 0xFF for index in range(count))
        number = 0
        if value == 1:
            reply = self.ask(vu.DmaRead(address, count))
            if isinstance(reply, vu.Reply) and isinstance(reply.payload, vu.DmaData):
                registers[0x1C:0x20] = reply.payload.data[:4].ljust(4, b"\0")
            elif isinstance(reply, vu.Failure):
                number = vu.errno_number(reply.errno)
        elif value in (2, 4):
            outcome = self.ask(vu.DmaWrite(address, data), no_reply=value == 4)
            number = vu.errno_number(outcome.errno) if isinstance(outcome, vu.Failure) else 0
        elif value == 3:
            mapped, fd = self.maps[address]
            if fd is None:
                number = errno.EOPNOTSUPP
            else:
                os.pwrite(fd.number, data, mapped.offset)
        registers[0x18:0x1C] = number.to_bytes(4, "little")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-path")
    parser.add_argument("--fd", type=int)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--no-fds", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--memory")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--id", type=lambda text: int(text, 0), default=0x0042)
    options = parser.parse_args()
    program = Program(options)
    if options.fd is not None:
        program.serve(None, socket.socket(fileno=options.fd))
        return
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(options.socket_path + ".new")
    listener.listen()
    os.rename(options.socket_path + ".new", options.socket_path)  # it is there when it accepts
    program.serve(listener, None)


if __name__ == "__main__":
    main()
