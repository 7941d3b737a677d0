"""A PCI device of your own, in Python: a parent that makes dice, and a vfiod that finds it.

The two classes below are the whole parent. A package offers it by an entry point; run as a program, this file does so
for a package that lives for a moment, starts a vfiod, makes a device, adds it, and throws.

    python examples/mdev_parent.py
"""

# ruff: noqa: D102 -- what the methods are for, vfiod.server.mdev.parent says

from __future__ import annotations

import errno
import os
import random
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfiod.client import Client
from vfiod.client.spawn import own_server
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.mdev.parent import (
    DeviceApi,
    DeviceInfo,
    Host,
    IrqInfo,
    MdevType,
    MediatedDevice,
    Parent,
    RegionInfo,
    SetIrqs,
)
from vfiod.server.mdev.pci_irqs import PciIrqs

# --- the parent: this is what you write -------------------------------------------------------------------------


class Dice(MediatedDevice):
    """BAR0: a byte read is a throw; a byte written is a guess at the last one, and INTx is up when it is right."""

    def __init__(self, host: Host, sides: int) -> None:
        self.sides = sides
        self.thrown = 0
        self.irqs = PciIrqs(host, intx=True)
        self.config = bytearray(struct.pack("<HHHHBBBB", 0x1234, 0xD1CE, 2, 0, 1, 0, 0, 0xFF).ljust(256, b"\0"))
        self.config[0x3D] = 1  # INTA#

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(regions=9, irqs=5)

    def region_info(self, index: int) -> RegionInfo:
        sizes = {0: 16, 7: len(self.config)}  # BAR0 and config space; the others are absent
        return RegionInfo(sizes[index], readable=True, writable=True) if index in sizes else RegionInfo()

    def irq_info(self, index: int) -> IrqInfo:
        return self.irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        return self.irqs.set_irqs(request)

    def read(self, index: int, offset: int, length: int) -> bytes:
        if index == 7:
            return bytes(self.config[offset : offset + length])
        throws = [random.randint(1, self.sides) for _ in range(length)]
        self.thrown = throws[-1]
        return bytes(throws)

    def write(self, index: int, offset: int, data: bytes) -> None:
        if index == 0:  # config space is read-only here: what a guest writes there, vfiod keeps for it
            self.irqs.set_line(data[-1] == self.thrown)

    def close(self) -> None:
        self.irqs.close()


class Casino(Parent):
    """Makes dice."""

    name = "casino"
    types = (MdevType("dice", "Dice", "One die", DeviceApi.VFIO_PCI, 8, {"sides": "2 to 255; default 6"}),)

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> Dice:
        sides = parameters.get("sides", 6)
        if type(sides) is not int or not 2 <= sides <= 255:
            raise OSError(errno.EINVAL, f"'sides' is a number from 2 to 255, got {sides!r}")
        return Dice(host, sides)


# --- trying it ---------------------------------------------------------------------------------------------------


def install(directory: Path) -> None:
    """What a package's installation leaves: its metadata with the entry point. The module is this file."""
    made = directory / "casino-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: casino\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[vfiod.mdev_parents]\ncasino = mdev_parent:Casino\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )


def main() -> None:
    """A server that finds the parent, a device, ten throws, and a guess that is right."""
    with tempfile.TemporaryDirectory() as directory:
        install(Path(directory))
        with own_server(Path(directory)) as server, Client.connect(server.path, timeout=60) as client:
            [dice] = [one for one in client.query_mdev_types() if one.parent == "casino"]
            print(f"{dice.parent} makes {dice.type}: {dice.description}; {dice.available_instances} available")
            try:
                client.mdev_create(parent="casino", type="dice", parameters={"sides": 1})
            except RemoteError as error:
                print(f"refused: {error.desc}")
            uuid = client.mdev_create(parent="casino", type="dice", parameters={"sides": 20}).uuid
            client.device_add(driver="vfio-pci", id="die", mdev=uuid)
            with client.irq_start(device="die", index="intx") as started:
                throws = [client.region_read(device="die", region="bar0", offset=0, size=1).value for _ in range(10)]
                print("thrown:", *throws)
                client.region_write(device="die", region="bar0", offset=0, size=1, value=throws[-1])
                trigger = started.irqs[0].trigger_fd
                assert isinstance(trigger, FileDescriptor)
                print(f"guessed right: {os.eventfd_read(trigger.number)} interrupt")


if __name__ == "__main__":
    main()
