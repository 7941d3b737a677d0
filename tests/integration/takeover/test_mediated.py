"""A server with every kind of built-in mediated device is replaced: each one goes on where it stood."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct

from vfiod.client.sync import Client
from vfiod.protocol.catalogue.ccw import CcwResult
from vfiod.protocol.channel import CcwFlags, ChannelProgram
from vfiod.protocol.fd import FileDescriptor

from .conftest import PATIENCE, House, until
from .test_replaced import get, primer, put

SIZE = 1 << 20
RBR, FCR, LSR, SCR = 0, 2, 5, 7
KINDS = (
    ("serial", "serial-2", "vfio-pci"),
    ("fba", "fba-ccw", "vfio-ccw"),
    ("terminal3270", "terminal3270-ccw", "vfio-ccw"),
    ("matrix", "matrix-ap", "vfio-ap"),
    ("platform", "primer-platform", "vfio-platform"),
)


class Guest:
    """What the guest does with its devices, each named as its parent."""

    def __init__(self, client: Client, memory: FileDescriptor) -> None:
        self.client = client
        self.memory = mmap.mmap(memory.number, SIZE)

    def register(self, region: str, offset: int) -> int:
        value = self.client.region_read(device="serial", region=region, offset=offset, size=1).value
        assert isinstance(value, int)
        return value

    def set(self, region: str, offset: int, value: int) -> None:
        self.client.region_write(device="serial", region=region, offset=offset, size=1, value=value)

    def take(self, region: str, count: int) -> bytes:
        """So many bytes of a port, as a driver reads them: while there are some."""
        seen = bytearray()

        def all_there() -> bool:
            while self.register(region, LSR) & 1:
                seen.append(self.register(region, RBR))
            return len(seen) >= count

        until(all_there)
        return bytes(seen)

    def run(self, device: str, program: ChannelProgram) -> CcwResult:
        laid = program.build()
        for address, data in laid.pieces:
            self.memory[address : address + len(data)] = data
        return self.client.ccw_request(device=device, orb=laid.orb.pack())

    def blocks(self, operation: int, block: int, data: bytes = b"") -> bytes:
        """Write a block of the disk, or read it."""
        program = ChannelProgram(0x1000, 0x8000)
        program.write(0x63, struct.pack(">BBHIII", 0, 0, 512, 0, 0, 63))
        program.write(0x43, struct.pack(">BBHI", operation, 0, 1, block))
        step = program.write(0x41, data) if operation == 5 else program.read(0x42, 512)
        assert self.run("fba", program).decoded.summary == "ended normally"  # type: ignore[union-attr]
        return self.memory[step.address : step.address + 512]

    def show(self, text: bytes) -> None:
        """Write on the terminal's screen."""
        program = ChannelProgram(0x1000, 0x2000)
        program.write(0x01, b"\xc3" + text)
        assert self.run("terminal3270", program).decoded.summary == "ended normally"  # type: ignore[union-attr]

    def entered(self) -> bytes:
        """What the operator entered, with the AID and the cursor before it."""
        program = ChannelProgram(0x1000, 0x2000)
        into = program.read(0x06, 100, flags=CcwFlags.SUPPRESS_LENGTH)
        left = self.run("terminal3270", program).decoded.residual_count  # type: ignore[union-attr]
        assert isinstance(left, int)
        return self.memory[into.address : into.address + 100 - left]

    def matrix(self) -> str:
        return self.attributes("matrix")["matrix"]

    def attributes(self, parent: str) -> dict[str, str]:
        return next(
            device.attributes
            for one in self.client.query_mdev_types()
            if one.parent == parent
            for device in one.devices
        )


def connected(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE)
    made.connect(path)
    return made


def received(number: int, count: int) -> bytes:
    """So many bytes, and no more."""
    seen = b""
    while len(seen) < count:
        assert select.select([number], [], [], PATIENCE)[0], "it never came"
        seen += os.read(number, 4096)
    return seen


def test_each_built_in_device_goes_on(house: House) -> None:
    house.first()
    place = house.directory
    (place / "disk").write_bytes(bytes(64 * 512))
    parameters = {
        "serial": {"port0": f"pty:{place}/tty", "port1": f"socket:{place}/port1"},
        "fba": {"file": f"{place}/disk"},
        "terminal3270": {"line": f"socket:{place}/screen"},
        "matrix": {"control": f"socket:{place}/control"},
    }
    with house.connect() as client, FileDescriptor(os.memfd_create("guest")) as memory:
        os.ftruncate(memory.number, SIZE)
        client.dma_map(iova=0, size=SIZE, fd=memory)
        guest = Guest(client, memory)
        primer(client)
        for parent, kind, driver in KINDS:
            uuid = client.mdev_create(parent=parent, type=kind, parameters=parameters.get(parent, {})).uuid
            client.device_add(driver=driver, id=parent, mdev=uuid)
        with (
            FileDescriptor(os.open(place / "tty", os.O_RDWR | os.O_NOCTTY)) as terminal,
            connected(f"{place}/port1") as peer,
            connected(f"{place}/screen") as operator,
            connected(f"{place}/control") as control,
        ):
            until(lambda: guest.register("bar1", 6) & 0x80 != 0)
            until(lambda: guest.attributes("terminal3270")["connected"] == "true")
            for region in ("bar0", "bar1"):
                guest.set(region, FCR, 1)
            for turn in range(3):
                # Something of everybody is under way when the server is replaced.
                text = b"turn %d: " % turn + bytes(range(200))
                put(client, 0x04, turn)
                guest.set("bar0", SCR, turn)
                os.write(terminal.number, text)
                peer.sendall(text)
                for value in b"to the peer":
                    guest.set("bar1", RBR, value)
                guest.blocks(5, turn, b"%d" % turn * 512)
                guest.show(b"turn %d" % turn)
                operator.sendall(b"\x7d\x40\x40answer")
                control.sendall(b"assign_domain 1\nassign_adapt")
                before = guest.matrix() if turn else ""
                house.next()
                assert get(client, 0x04) == turn ^ 0xFFFF_FFFF
                assert guest.register("bar0", SCR) == turn
                assert guest.take("bar0", len(text)) == text
                assert guest.take("bar1", len(text)) == text
                assert received(peer.fileno(), 11) == b"to the peer"
                assert guest.blocks(6, turn) == b"%d" % turn * 512
                shown = b"\x01\xc3turn %d\xff\xef" % turn
                assert received(operator.fileno(), len(shown)) == shown
                operator.sendall(b" %d\xff\xef" % turn)
                expected = b"\x7d\x40\x40answer %d" % turn
                until(lambda expected=expected: guest.entered() == expected)  # type: ignore[misc]
                assert guest.matrix() == before or turn == 0
                control.sendall(b"er %d\n" % turn)
                assert received(control.fileno(), 6) == b"ok\nok\n"
                assert guest.matrix() == " ".join(f"{adapter:02x}.0001" for adapter in range(turn + 1))
                assert client.query_subchannel(device="fba").requests == 2 * (turn + 1)
        # Whoever hangs up is noticed by the last one, and everything can be taken apart.
        until(lambda: guest.attributes("terminal3270")["connected"] == "false")
        for parent, _, _ in KINDS:
            client.device_del(id=parent)
        until(lambda: [one.id for one in client.query_devices()] == ["n0"])
        for one in client.query_mdev_types():
            for device in one.devices if one.parent != "primer" else ():
                client.mdev_destroy(uuid=device.uuid)
        assert sorted(one.name for one in place.iterdir()) == sorted(
            ["disk", "hand-over", "qmp", *(f"log{number}" for number in range(4))]
        )
        guest.memory.close()
