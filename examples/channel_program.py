"""Channel programs from Python: read blocks of a disk, write to a terminal and read what its operator answers.

    python examples/channel_program.py                       a server of its own, and its built-in disk and terminal
    python examples/channel_program.py vm1.sock dev0         SENSE ID to a device of driver vfio-ccw that is there

A program lies in guest memory, as a guest's own would: here 1 MiB of it, which this maps. A ChannelProgram says which
bytes go where and gives the ORB; ccw-request starts it and returns how it ended, as bytes and in words.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path

from vfiod.client import Client, FileDescriptor
from vfiod.client.spawn import own_server
from vfiod.protocol.catalogue.ccw import DecodedIrb
from vfiod.protocol.channel import CcwFlags, ChannelProgram, Idaws, SenseId
from vfiod.protocol.errors import VfiodError

MEMORY = 1 << 20  # bytes of guest memory, from address 0
PROGRAM = 0x1000  # where programs are laid out
BLOCK = 512
PATIENCE = 60.0  # seconds for any one answer

# Commands of the two device types.
FBA_DEFINE_EXTENT, FBA_LOCATE, FBA_READ = 0x63, 0x43, 0x42
TERMINAL_ERASE_WRITE, TERMINAL_READ_MODIFIED = 0x05, 0x06


class Guest:
    """Guest memory, and one subchannel."""

    def __init__(self, client: Client, device: str) -> None:
        self.client = client
        self.device = device
        with FileDescriptor(os.memfd_create("guest", os.MFD_CLOEXEC)) as fd:
            os.ftruncate(fd.number, MEMORY)
            self.memory = mmap.mmap(fd.number, MEMORY)
            client.dma_map(iova=0, size=MEMORY, fd=fd)

    def close(self) -> None:
        """Take the memory back."""
        self.client.dma_unmap(iova=0, size=MEMORY)
        self.memory.close()

    def run(self, program: ChannelProgram) -> DecodedIrb:
        """Lay a program out, start it, and wait for its end."""
        laid = program.build()
        for address, data in laid.pieces:
            self.memory[address : address + len(data)] = data
        result = self.client.ccw_request(device=self.device, orb=laid.orb.pack())
        if not isinstance(result.decoded, DecodedIrb):  # a condition code other than 0
            raise RuntimeError(f"not started: {result.meaning}")  # noqa: TRY004 - it is no type that is wrong
        return result.decoded

    def at(self, address: int, length: int) -> bytes:
        """Bytes of guest memory."""
        return self.memory[address : address + length]


def who(guest: Guest) -> None:
    """Ask what is there, by SENSE ID."""
    program = ChannelProgram(PROGRAM, 0x1000)
    sensed = program.sense_id(12)
    result = guest.run(program)
    print(f"{guest.device}: {SenseId.unpack(guest.at(sensed.address, sensed.length)).describe()}")
    print(f"{guest.device}: {result.summary}")


def read_disk(guest: Guest, first: int, count: int) -> bytes:
    """Read blocks of an FBA disk, through IDAWs of 64 bits."""
    program = ChannelProgram(PROGRAM, 0x40000, idaws=Idaws.FORMAT_2_4K)
    program.write(FBA_DEFINE_EXTENT, struct.pack(">BBHIII", 0x40, 0, BLOCK, first, 0, count - 1))
    program.write(FBA_LOCATE, struct.pack(">BBHI", 0x06, 0, count, 0))
    into = program.read(FBA_READ, count * BLOCK)
    result = guest.run(program)
    print(f"disk: blocks {first} to {first + count - 1}: {result.summary}")
    return guest.at(into.address, into.length)


def write_terminal(guest: Guest, text: str) -> None:
    """Erase the screen and write; a write control character (restore the keyboard) comes first. Text is EBCDIC."""
    program = ChannelProgram(PROGRAM, 0x8000)
    program.write(TERMINAL_ERASE_WRITE, b"\xc3" + text.encode("cp037"))
    print(f"terminal: written: {guest.run(program).summary}")


def read_terminal(guest: Guest) -> str:
    """What the operator entered, after the attention interrupt: AID, cursor (2 bytes), the modified data."""
    program = ChannelProgram(PROGRAM, 0x8000)
    into = program.read(TERMINAL_READ_MODIFIED, 256, flags=CcwFlags.SUPPRESS_LENGTH)
    result = guest.run(program)
    length = into.length - result.residual_count
    return guest.at(into.address + 3, length - 3).decode("cp037")


def demo(directory: Path) -> None:
    """The built-in devices: a disk on a file, a terminal whose operator is this program."""
    image, line = directory / "disk", directory / "line"
    image.write_bytes(b"".join(f"block {number}".encode().ljust(BLOCK) for number in range(64)))
    # The sandbox keeps the server from every file but those it is told of: the disk, and the terminal's socket.
    options = ["--allow-path", str(directory)]
    with own_server(directory, options) as server, Client.connect(server.path, timeout=PATIENCE) as client:
        disk = client.mdev_create(parent="fba", type="fba-ccw", parameters={"file": str(image), "device-number": 0x200})
        client.device_add(driver="vfio-ccw", id="disk", mdev=disk.uuid)
        terminal = client.mdev_create(
            parent="terminal3270", type="terminal3270-ccw", parameters={"line": f"socket:{line}"}
        )
        client.device_add(driver="vfio-ccw", id="terminal", mdev=terminal.uuid)
        guest = Guest(client, "disk")
        with contextlib.closing(guest):
            print("\n".join(f"disk: {words}" for words in client.query_subchannel(device="disk").words))
            who(guest)
            data = read_disk(guest, 7, 3)
            print("disk:", ", ".join(data[at : at + BLOCK].decode().strip() for at in range(0, len(data), BLOCK)))
            guest.device = "terminal"
            with client.events("CCW_IO", "CCW_CRW") as events, socket.socket(socket.AF_UNIX) as operator:
                operator.settimeout(PATIENCE)
                operator.connect(str(line))
                events.get(timeout=PATIENCE)  # the terminal is switched on: its channel path is there
                who(guest)
                write_terminal(guest, "YOUR NAME?")
                screen = operator.recv(4096)
                print(f"operator: sees {screen[2:-2].decode('cp037')!r}")
                operator.sendall(b"\x7d\x40\x40" + "ADA".encode("cp037") + b"\xff\xef")  # ENTER
                attention = events.get(timeout=PATIENCE).data
                print(f"terminal: {attention.decoded.summary}")  # type: ignore[union-attr]
                print(f"terminal: the operator entered {read_terminal(guest)!r}")
    print("done")


def main() -> int:
    """Run it. 0: every step worked."""
    parser = argparse.ArgumentParser(description="Channel programs from Python.")
    parser.add_argument("path", nargs="?", help="the monitor's socket; without it, a server of its own")
    parser.add_argument("device", nargs="?", help="the id of a vfio-ccw device")
    options = parser.parse_args()
    try:
        if options.path is None:
            with tempfile.TemporaryDirectory(prefix="vfiod-channel-") as directory:
                demo(Path(directory))
        else:
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(Client.connect(options.path, timeout=PATIENCE))
                who(stack.enter_context(contextlib.closing(Guest(client, options.device or "dev0"))))
    except (VfiodError, OSError, RuntimeError) as error:
        print(f"channel_program: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
